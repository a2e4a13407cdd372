"""Runs a recipe: stage after stage, each from the previous one's output.

Every output appears under its final name only when it is complete, and a run that was killed can be resumed from
its last complete checkpoint.
"""

import copy
import json
import platform
import shutil
import sys
import time
from dataclasses import fields
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import PrinterCallback, TrainerCallback, TrainingArguments, set_seed
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from prefixvlm.configuration.writing import write_atomically
from prefixvlm.inference.environment import bf16_note, choose_device, versions
from prefixvlm.inference.loading import quantization
from prefixvlm.modeling_vlm.positions_prefix_vlm import attention_window
from prefixvlm.train.data.collator import ConversationCollator
from prefixvlm.train.data.feature_cache import FeatureCache
from prefixvlm.train.data.noise import add_mask_token
from prefixvlm.train.data.order import OrderedSamples, StreamedSamples
from prefixvlm.train.data.screening import Report, Screening, encode_one, longest_sample
from prefixvlm.train.data.sources import described, is_stream, without_token
from prefixvlm.train.evaluation import figures
from prefixvlm.train.evaluation.tasks import spread
from prefixvlm.train.recipes.checking import did_you_mean
from prefixvlm.train.recipes.schema import MAX_SEED, Recipe, StageRecipe
from prefixvlm.train.training import checkpoints, lora
from prefixvlm.train.training.checkpoints import complete_or_absent, partial_folder, processes
from prefixvlm.train.training.evaluation_callback import EvaluateByGeneration
from prefixvlm.train.training.final_evaluation import evaluate_finished, final_evaluation
from prefixvlm.train.training.interruption import Interruptions, SaveWhenInterrupted
from prefixvlm.train.training.progress import ProgressLines
from prefixvlm.train.training.starting_model import build, load_start, refuse_random_start
from prefixvlm.train.training.trainer import StageTrainer
from prefixvlm.train.training.validation import LOSS, EarlyStopping, KeepBest, Measure, Validation, stage_samples

RECORD = "run.json"
NEVER = 10**9  # evaluations: for checkpoints that `KeepBest` times
GIGABYTE = 10**9
# the modules of which a reporter needs one, where they have another name
REPORTERS = {"tensorboard": ("tensorboard", "tensorboardX"), "azure_ml": ("azureml",), "flyte": ("flytekit",)}


def stage_folder(output: Path, number: int) -> Path:
    return output / f"stage-{number}"


def run_recipe(
    recipe: Recipe,
    only: list[int] | None = None,
    resume: bool = False,
    random_init: bool = False,
    overwrite: bool = False,
) -> Path:
    """Trains the stages of a recipe, or those in `only`, and returns the folder of the last.

    A first stage other than the recipe's first starts from the folder its predecessor left in `recipe.output`. What
    `recipe.test` asks of the finished model goes to `test` in that folder.

    Args:
        resume: keep the stages that are finished, and resume an unfinished one from its newest complete checkpoint.
        random_init: start from random weights where the recipe names pretrained backbones.
        overwrite: replace what an earlier run left of these stages, finished or not.

    Raises:
        ValueError: for stages that the recipe does not have, a missing predecessor, data that cannot be used, what an
            earlier run left, or `resume` in the folder of another run.
    """
    chosen = chosen_stages(recipe, only)
    output = Path(recipe.output)
    processes(recipe.device)
    refuse_random_start(recipe.model, random_init)
    if resume and overwrite:
        raise ValueError("--resume keeps what --overwrite replaces; choose one of them.")
    _refuse_missing_packages(recipe)
    finished = [stage_folder(output, number) for number in chosen if stage_folder(output, number).is_dir()]
    if finished and not resume and not overwrite:
        raise ValueError(
            f"{finished[-1]} is there already; choose another output, replace it with --overwrite, or train what an "
            "interrupted run has left with --resume."
        )
    # all data is opened before any training, so that a wrong path costs no hours
    before = [number for number in recipe.stages if number < chosen[0]]
    opened = {number: stage_samples(recipe.stages[number], recipe.seed) for number in (chosen if before else recipe.stages)}
    sources = {number: samples for number, (samples, _) in opened.items()}
    asked = {number: recipe.stages[number].evaluation for number in chosen}
    evaluations = {number: EvaluateByGeneration(settings) for number, settings in asked.items() if settings}
    is_last = chosen[-1] == max(recipe.stages)
    test = final_evaluation(recipe, stage_folder(output, chosen[-1])) if is_last else None
    settings = {number: _settings(recipe, number, *opened[number], random_init) for number in chosen}
    if resume:
        while chosen and stage_folder(output, chosen[0]).is_dir():
            _refuse_another_run(stage_folder(output, chosen[0]), settings[chosen[0]])
            _say(f"Stage {chosen[0]} is finished.")
            before.append(chosen.pop(0))
        if not chosen:
            evaluate_finished(test, is_new=False)
            return stage_folder(output, before[-1])
    model, processor, start = _starting_model(recipe, before, chosen[0], sources, random_init)
    screening = Screening(output / "screening", resume, recipe.workers, recipe.max_skipped)
    if recipe.bf16 and (note := bf16_note(choose_device(recipe.device))):
        _say(note)
    for number in chosen:
        if model is None:
            model, processor = _load(recipe, start)
        stage = _StageRun(recipe, number, *opened[number], settings[number], screening, resume, overwrite)
        with Interruptions() as interruptions:
            saves = SaveWhenInterrupted(interruptions, number)
            model = stage.train(model, processor, start, evaluations.get(number), saves)
        start = str(stage.folder)
        if processes().is_main_process and overwrite:  # they came from what is replaced: `resume` must not keep them
            for later in chosen[chosen.index(number) + 1 :]:
                shutil.rmtree(stage_folder(output, later), ignore_errors=True)
        interruptions.end_if_asked(f"after stage {number}, which is finished")
    evaluate_finished(test, is_new=True)
    return stage_folder(output, chosen[-1])


def records(recipe: Recipe, only: list[int] | None = None) -> dict[int, dict]:
    """What run.json says of each finished stage."""
    folders = {number: stage_folder(Path(recipe.output), number) for number in chosen_stages(recipe, only)}
    return {number: json.loads((folder / RECORD).read_text(encoding="utf-8")) for number, folder in folders.items()}


def _refuse_missing_packages(recipe: Recipe) -> None:
    """Raises a ValueError for what a recipe needs and is not installed, before anything else takes time."""
    for name in recipe.report_to:
        _refuse_missing_report(name)
    if recipe.lora:
        lora.refuse_without_peft()
        if recipe.lora.quantize:
            quantization(recipe.lora.quantize, torch.float32)


def _refuse_missing_report(name: str) -> None:
    """Raises a ValueError for a reporter that transformers does not know, or whose package is not there."""
    if name in ("none", "all"):
        return
    if name not in INTEGRATION_TO_CALLBACK:
        raise ValueError(f"report_to is {name!r}; {did_you_mean(name, ['none', 'all', *INTEGRATION_TO_CALLBACK])}")
    modules = REPORTERS.get(name, (name,))
    if not any(map(find_spec, modules)):
        raise ValueError(f"report_to: {name} needs {modules[0]}; run: pip install {modules[0].replace('_', '-')}")


def _starting_model(recipe: Recipe, before: list[int], first: int, sources: dict, random_init: bool):
    """The model and processor that the first stage to train starts from, and where they came from, if from anywhere."""
    if before:
        start = str(stage_folder(Path(recipe.output), before[-1]))
        if not Path(start).is_dir():
            raise ValueError(f"Stage {first} starts from {start}, which does not exist; train stage {before[-1]} first.")
    elif recipe.model.start is not None:
        start = recipe.model.start
    else:
        set_seed(recipe.seed)
        model, processor = build(recipe.model, all_texts(sources.values()), random_init)
        if not recipe.lora:
            return model, processor, None
        start = str(Path(recipe.output) / "start")  # without the very model that it was trained on, an adapter is of no use
        with complete_or_absent(Path(start)) as partial:
            if processes().is_main_process:
                model.save_pretrained(partial)
                processor.save_pretrained(partial)
    return *_load(recipe, start), start


def _load(recipe: Recipe, start: str):
    """The model and processor in a folder, as the recipe trains it."""
    hub = recipe.model.hub if start == recipe.model.start else {}
    return load_start(start, recipe.model.dtype, recipe.lora.quantize if recipe.lora else None, **hub)


def chosen_stages(recipe: Recipe, only: list[int] | None) -> list[int]:
    """The stages to train, in order.

    Raises:
        ValueError: for one that the recipe does not have.
    """
    numbers = list(recipe.stages)
    chosen = numbers if only is None else sorted(set(only))
    for number in chosen:
        if number not in numbers:
            raise ValueError(f"The recipe has no stage {number}; it has {', '.join(map(str, numbers))}.")
    return list(chosen)


def all_texts(sources):
    """All texts and role names, to train a tokenizer on; role names are part of every rendered conversation."""
    for samples in sources:
        if is_stream(samples):
            raise ValueError("A tokenizer cannot be learnt from a stream; name one in model.tokenizer.")
        for index in range(len(samples)):
            try:
                sample = samples[index]
            except ValueError:
                continue  # screening reports it
            for role, text in sample.said:
                yield role
                yield text


def _settings(recipe: Recipe, number: int, samples, held_out, random_init: bool) -> dict:
    """What decides the weights that come out of a stage."""
    stage = recipe.stages[number].model_dump()
    del stage["evaluation"]
    stage["data"] = without_token(stage["data"])
    validation = stage.pop("validation")
    if validation and validation["data"]:
        validation["data"] = without_token(validation["data"])
    shared = ("seed", "bf16", "max_skipped")
    return {
        "stage": stage,
        "data_fingerprint": samples.fingerprint,
        "validation": validation,
        "validation_fingerprint": held_out.fingerprint if validation else None,
        "model": recipe.model.model_dump(exclude={"token"}),
        "random_init": random_init,
        "lora": recipe.lora.model_dump() if recipe.lora else None,
        **{name: getattr(recipe, name) for name in shared},
        # which reader of a stream reads what depends on how many there are
        **({"readers": processes().num_processes * max(1, recipe.workers)} if is_stream(samples) else {}),
    }


def _refuse_another_run(folder: Path, settings: dict) -> None:
    try:
        old = json.loads((folder / RECORD).read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder} cannot be resumed: its {RECORD} cannot be read; remove the folder.") from error
    settings = json.loads(json.dumps(settings))
    changed = sorted(name for name in settings if settings[name] != old.get(name))
    if changed:
        raise ValueError(
            f"{folder} belongs to a run with other settings of {', '.join(changed)}; choose another output, or remove it."
        )


class _StageRun:
    """One stage of a run: leaves the model, its processor, log, loss curve, run.json and skipped.jsonl in `folder`."""

    def __init__(
        self,
        recipe: Recipe,
        number: int,
        samples,
        held_out,
        settings: dict,
        screening: Screening,
        resume: bool,
        overwrite: bool,
    ):
        self.recipe, self.settings, self.screening = recipe, settings, screening
        self.samples, self.held_out = samples, held_out
        self.recipe_of_stage = recipe.stages[number]
        self.stage = self.recipe_of_stage.stage
        self.folder = stage_folder(Path(recipe.output), number)
        self.checkpoint = None if overwrite else checkpoints.newest_whole(partial_folder(self.folder))
        if self.checkpoint is not None:
            if not resume:
                raise ValueError(
                    f"{self.checkpoint.parent} holds the checkpoints of an unfinished run; continue it with --resume, or "
                    "replace it with --overwrite."
                )
            _refuse_another_run(self.checkpoint.parent, settings)
            _say(f"Stage {number} resumes from {self.checkpoint}.")
        self.record = _record(settings, recipe)

    def train(
        self, model, processor, start: str | None, evaluation: EvaluateByGeneration | None, saves: SaveWhenInterrupted
    ):
        """Trains the stage; returns its model, or `None` if it is only in `folder`.

        Args:
            start: where the model was loaded from; `None` if it was not.
        """
        recipe, stage = self.recipe, self.stage
        window = attention_window(model.config.text_config)
        if window is not None and self.recipe_of_stage.max_tokens_per_row > window:
            raise ValueError(
                f"Stage {stage.number}: max_tokens_per_row is {self.recipe_of_stage.max_tokens_per_row}, more than the "
                f"sliding window of {window} tokens in some layers of this decoder; choose at most that."
            )
        with complete_or_absent(self.folder, keep=self.checkpoint is not None) as partial:
            if stage.noise_token == "mask":
                if recipe.lora and processor.tokenizer.mask_token_id is None:
                    raise ValueError(
                        f"Stage {stage.number}: noise_token: mask would add a token to the model, which an adapter does "
                        "not hold; choose another."
                    )
                add_mask_token(model, processor.tokenizer)
            collator = ConversationCollator(
                processor,
                stage.text_format,
                noise=stage.noise,
                noise_token=stage.noise_token,
                augment=self.recipe_of_stage.augment,
                max_tokens_per_row=self.recipe_of_stage.max_tokens_per_row,
                context=longest_sample(model.config.text_config),
                feature_cache=_feature_cache(model, recipe, self.recipe_of_stage),
                pad_failures=True,
            )
            report = Report(partial / "skipped.jsonl", recipe.max_skipped)
            dataset = self._dataset(collator, report)
            validation = self._validation(collator, partial)
            self._write_record(partial)
            if recipe.lora:
                # here, so that adapters are drawn alike whatever this process has done before
                set_seed((recipe.seed + stage.number) % (MAX_SEED + 1))
                model = lora.add_adapters(model, recipe.lora, stage)
            trainer = StageTrainer(
                model,
                stage,
                training_arguments(self.recipe_of_stage, recipe, partial),
                train_dataset=dataset,
                data_collator=collator.collate if isinstance(dataset, StreamedSamples) else collator,
                processing_class=processor,
                feature_cache=collator.feature_cache,
                report=report,
                validation=validation,
            )
            trainer.remove_callback(PrinterCallback)
            for callback in (ProgressLines(), *_validation_callbacks(self.recipe_of_stage, recipe), saves):
                trainer.add_callback(callback)
            # which transformers 5's trainer would leave switched off in all that is saved
            vars(model.config).pop("use_cache", None)
            if evaluation is not None:
                evaluation.attach(trainer)
            if trainer.is_sharded and recipe.lora and recipe.lora.merge:
                raise ValueError("Adapters cannot be merged into sharded weights; set lora.merge to false.")
            started = time.time()
            trainer.train(resume_from_checkpoint=str(self.checkpoint) if self.checkpoint else None)
            report.exchange()
            model = _save(trainer, model, recipe, partial, start)
            if trainer.is_world_process_zero():
                checkpoints.keep_models(partial)
                history = trainer.state.log_history
                write_atomically(partial / "history.json", json.dumps(history, indent=1))
                figures.save_loss_curve({f"stage {stage.number}": history}, partial / "loss.png")
            self.record |= {"steps": trainer.state.global_step, "seconds": round(time.time() - started, 1)}
            if counts := self.record.get("samples"):
                failed = len(report.failed)
                self.record["samples"] = counts | {"used": counts["used"] - failed, "skipped": counts["skipped"] + failed}
            if validation is not None:
                self._note_validation(validation, trainer)
            self._write_record(partial)
        return model

    def _write_record(self, folder: Path) -> None:
        if processes().is_main_process:
            write_atomically(folder / RECORD, json.dumps(self.record, indent=1))

    def _dataset(self, collator: ConversationCollator, report: Report) -> OrderedSamples | StreamedSamples:
        """The samples in their order, after a check of each; notes in the record how many there are."""
        settings = self.recipe_of_stage
        seed = self.recipe.seed * 10 + self.stage.number
        self.record["data"] = described(self.samples)
        if is_stream(self.samples):
            self._announce(f"a stream of {self.record['data']}")
            report.path.unlink(missing_ok=True)
            encode = partial(encode_one, collator, settings.max_length)  # no local function, so that it can be pickled
            rank, count = processes().process_index, processes().num_processes
            return StreamedSamples(self.samples, encode, report.add, seed, rank, count)
        screened = self.screening.verdict(self.samples, collator, settings.max_length, settings.group_by_length)
        counts = {"read": len(self.samples), "used": len(screened.indices), "skipped": len(screened.skipped)}
        self.record["samples"] = counts
        self.record["images"] = sum(screened.images)
        if screened.lengths:
            self.record["tokens"] = {"all": sum(screened.lengths), "supervised": sum(screened.supervised)}
        report.read = counts["read"]
        skipped = f" ({counts['skipped']:,} cannot be used, see {report.path.name})" if screened.skipped else ""
        tokens = f", {sum(screened.lengths):,} tokens" if screened.lengths else ""
        images = f"{self.record['images']:,} images{tokens}"
        self._announce(f"{counts['used']:,} samples of {self.record['data']}{skipped}, {images}")
        report.start(screened.skipped)
        if not screened.indices:
            raise ValueError(f"Stage {self.stage.number} has no sample to train on.")
        lengths = screened.lengths if settings.group_by_length else None
        return OrderedSamples(self.samples, screened.indices, lengths, seed, report.occurrences())

    def _validation(self, collator: ConversationCollator, folder: Path) -> Validation | None:
        """The held-out samples, checked as those that train; notes in the record how many there are."""
        settings = self.recipe_of_stage
        if settings.validation is None:
            return None
        screened = self.screening.verdict(self.held_out, collator, settings.max_length, measure=False)
        report = Report(folder / "validation_skipped.jsonl", limit=1.0, read=len(self.held_out))
        report.start(screened.skipped)
        if not screened.indices:
            raise ValueError(f"Stage {self.stage.number} has no sample to validate on; see {report.path}.")
        indices = screened.indices
        if settings.validation.examples is not None:
            indices = spread(indices, settings.validation.examples)
        counts = {"read": len(self.held_out), "used": len(indices), "skipped": len(screened.skipped)}
        self.record["validation"] = counts
        skipped = f" ({counts['skipped']:,} cannot be used, see {report.path.name})" if screened.skipped else ""
        _say(f"Held out: {counts['used']:,} samples{skipped}, measured every {settings.validation.every_steps:,} steps")
        samples = OrderedSamples(self.held_out, indices, None, self.recipe.seed, report.occurrences())
        plain = copy.copy(collator)
        plain.augment = False
        return Validation(samples, plain, report)

    def _note_validation(self, validation: Validation, trainer: StageTrainer) -> None:
        """Adds to the record what validation has come to."""
        validation.report.exchange()
        counts, failed = self.record["validation"], len(validation.report.failed)
        counts |= {"used": counts["used"] - failed, "skipped": counts["skipped"] + failed}
        step, loss = trainer.state.best_global_step, trainer.state.best_metric
        self.record["validation"] = counts | {"best_step": step, "best_loss": loss}
        settings = self.recipe_of_stage.validation
        if settings is not None and settings.keep_best and step:
            _say(f"Stage {self.stage.number} ends with step {step:,}, whose held-out loss of {loss:.4f} is the smallest.")

    def _announce(self, data: str) -> None:
        rates = ", ".join(f"{module} {rate:g}" for module, rate in self.stage.learning_rates.items())
        _say(f"Stage {self.stage.number}: {data}, {self.stage.attention_mode} attention, learning rates {rates}")


def _say(text: str) -> None:
    if processes().is_main_process:
        print(text, flush=True)


def _save(trainer: StageTrainer, model, recipe: Recipe, folder: Path, start: str | None):
    """Saves what a stage has trained; returns the model if the next one can start from it, else `None`.

    Args:
        start: where the model under the adapters was loaded from.
    """
    merge = recipe.lora is not None and recipe.lora.merge
    saved = folder / "adapter" if merge else folder
    if trainer.is_sharded and trainer.better_checkpoint is not None:
        if trainer.is_world_process_zero():
            checkpoints.copy_model(trainer.better_checkpoint, saved)
    else:
        trainer.save_model(str(saved))
    (saved / "training_args.bin").unlink(missing_ok=True)  # a pickle, no part of a model repository
    if merge and trainer.is_world_process_zero():
        # into the weights of the folder, which are not quantised
        base, processor = load_start(str(start), recipe.model.dtype)
        lora.merged(saved, base).save_pretrained(folder)
        processor.save_pretrained(folder)
    return None if recipe.lora or trainer.is_sharded else model


def _feature_cache(model, recipe: Recipe, stage_recipe: StageRecipe) -> FeatureCache | None:
    if not recipe.feature_cache_gb or stage_recipe.stage.vision_tower_lr:
        return None
    is_rounded = recipe.bf16 and bf16_note(choose_device(recipe.device)) is None
    dtype = torch.bfloat16 if is_rounded else model.dtype
    max_bytes = int(recipe.feature_cache_gb * GIGABYTE)
    folder = Path(recipe.output) / "features"
    return FeatureCache(folder, model.vision_tower, dtype, max_bytes, processes().process_index, processes().num_processes)


def _record(settings: dict, recipe: Recipe) -> dict:
    """What is worth knowing about a run afterwards, for `run.json`."""
    is_cuda = choose_device(recipe.device).type == "cuda"
    device = torch.cuda.get_device_name() if is_cuda else platform.processor() or platform.machine()
    return {
        "command": " ".join(sys.argv),
        "seed": recipe.seed,
        "versions": versions(),
        "device": f"{processes().num_processes} x {device}",
        "data_fingerprint": settings["data_fingerprint"],
        "settings": settings,
    }


def _validation_callbacks(stage_recipe: StageRecipe, recipe: Recipe) -> list[TrainerCallback]:
    """What a stage's validation adds to the trainer."""
    validation = stage_recipe.validation
    if validation is None:
        return []
    return [
        Measure(),
        *([KeepBest(recipe.save_steps)] if validation.keep_best else []),
        *([EarlyStopping(validation.patience)] if validation.patience else []),
    ]


def training_arguments(stage_recipe: StageRecipe, recipe: Recipe, folder: Path) -> TrainingArguments:
    """transformers' arguments for one stage; the schedule itself is `StageTrainer`'s."""
    stage = stage_recipe.stage
    devices = processes().num_processes
    device = choose_device(recipe.device).type
    if device == "cuda" and devices == 1 and torch.cuda.device_count() > 1:
        # `Trainer` would split each batch, and separate images from their texts
        raise ValueError(
            f"This machine has {torch.cuda.device_count()} GPUs; start one process for each (torchrun --nproc-per-node "
            f"{torch.cuda.device_count()} -m prefixvlm train ...), or choose one with CUDA_VISIBLE_DEVICES=0."
        )
    device_batch = min(stage_recipe.device_batch_size, stage.batch_size)
    if stage.batch_size % (device_batch * devices):
        raise ValueError(
            f"Stage {stage.number}: a batch of {stage.batch_size} cannot be split into device batches of {device_batch} on "
            f"{devices} device(s); choose another device_batch_size."
        )
    validation = stage_recipe.validation
    every = 0 if validation is None else validation.every_steps
    keeps_best = validation is not None and validation.keep_best
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=device_batch,
        gradient_accumulation_steps=stage.batch_size // (device_batch * devices),
        num_train_epochs=stage.epochs,
        max_steps=stage_recipe.max_steps,
        learning_rate=max(stage.learning_rates.values()),
        weight_decay=stage.weight_decay,
        max_grad_norm=stage.max_grad_norm,
        bf16=recipe.bf16,
        tf32=True if recipe.bf16 and device == "cuda" else None,
        **(_recomputation() if recipe.gradient_checkpointing else {}),
        dataloader_num_workers=recipe.workers,
        remove_unused_columns=False,
        save_strategy="steps" if recipe.save_steps or keeps_best else "no",
        save_steps=every * NEVER if keeps_best else recipe.save_steps or 500,
        save_total_limit=recipe.keep_checkpoints + keeps_best,
        **(
            {
                "eval_strategy": "steps",
                "eval_steps": every,
                "per_device_eval_batch_size": device_batch,
                "load_best_model_at_end": keeps_best,
                "metric_for_best_model": LOSS,
                "greater_is_better": False,
                "restore_callback_states_from_checkpoint": True,  # the patience that is left
            }
            if validation
            else {}
        ),
        logging_steps=recipe.logging_steps,
        disable_tqdm=True,  # `ProgressLines` instead
        report_to=recipe.report_to,
        seed=recipe.seed,
        use_cpu=device == "cpu",
    )


def _recomputation() -> dict:
    """The arguments that trade time for memory, which transformers 5 has renamed."""
    known = {field.name for field in fields(TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}
