"""Runs a recipe: stage after stage, each from the last one's output.

Every output appears under its final name only when it is complete.
"""

import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import TrainingArguments, set_seed

from prefixvlm.configuration.hub_export import write_atomically
from prefixvlm.train import data, figures, model_building
from prefixvlm.train.collator import ConversationCollator
from prefixvlm.train.recipe import Recipe, StageRecipe
from prefixvlm.train.trainer import StageTrainer


def stage_folder(output: Path, number: int) -> Path:
    return output / f"stage-{number}"


@contextmanager
def complete_or_absent(folder: Path):
    """A folder to write into that takes the name `folder` at the end, replacing what was there; on an error it does not.

    Of several processes the main one makes and renames it, while the others wait.
    """
    partial = folder.with_name(folder.name + ".partial")
    processes = PartialState(cpu=not torch.cuda.is_available())
    if processes.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    processes.wait_for_everyone()
    yield partial
    processes.wait_for_everyone()
    if processes.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
    processes.wait_for_everyone()


def run_recipe(recipe: Recipe, only: list[int] | None = None) -> Path:
    """Trains the stages of a recipe, or those in `only`, and returns the folder of the last.

    A first stage other than the recipe's first starts from the folder its predecessor left in `recipe.output`.

    Raises:
        ValueError: for stages that the recipe does not have, a missing predecessor, or data that cannot be used.
    """
    numbers = list(recipe.stages)
    chosen = numbers if only is None else sorted(set(only))
    for number in chosen:
        if number not in numbers:
            raise ValueError(f"The recipe has no stage {number}; it has {', '.join(map(str, numbers))}.")
    output = Path(recipe.output)
    before = [number for number in numbers if number < chosen[0]]
    # all data is opened before any training, so that a wrong path costs no hours
    datasets = {number: data.load(**recipe.stages[number].data) for number in (chosen if before else numbers)}
    set_seed(recipe.seed)
    if before:
        start = stage_folder(output, before[-1])
        if not start.is_dir():
            raise ValueError(
                f"Stage {chosen[0]} starts from {start}, which does not exist; train stage {before[-1]} first."
            )
        model, processor = model_building.load(str(start), recipe.model.dtype)
    else:
        model, processor = model_building.build(recipe.model, _texts(datasets.values()))
    for number in chosen:
        train_stage(model, processor, recipe.stages[number], datasets[number], recipe, stage_folder(output, number))
    return stage_folder(output, chosen[-1])


def _texts(datasets):
    """All that is said, and by whom: the names of roles are part of every rendered conversation."""
    for dataset in datasets:
        for index in range(len(dataset)):
            for role, text in dataset[index].turns:
                yield role
                yield text


def train_stage(model, processor, stage_recipe: StageRecipe, dataset, recipe: Recipe, folder: Path) -> None:
    """Trains one stage and leaves the model, its processor, the log (`history.json`) and a loss curve in `folder`."""
    stage = stage_recipe.stage
    print(
        f"Stage {stage.number}: {len(dataset):,} samples, {stage.attention_mode} attention, learning rates "
        + ", ".join(f"{module} {rate:g}" for module, rate in stage.learning_rates.items()),
        flush=True,
    )
    with complete_or_absent(folder) as partial:
        trainer = StageTrainer(
            model,
            stage,
            training_arguments(stage_recipe, recipe, partial),
            train_dataset=_Indexable(dataset),
            data_collator=ConversationCollator(
                processor,
                stage.text_format,
                noise=stage.noise,
                augment=stage_recipe.augment,
                seed=recipe.seed + stage.number,
            ),
            processing_class=processor,
        )
        trainer.train()
        trainer.save_model(str(partial))
        (partial / "training_args.bin").unlink(missing_ok=True)  # a pickle, no part of a model repository
        if trainer.is_world_process_zero():
            history = trainer.state.log_history
            write_atomically(partial / "history.json", json.dumps(history, indent=1))
            figures.save_loss_curve({f"stage {stage.number}": history}, partial / "loss.png")


def training_arguments(stage_recipe: StageRecipe, recipe: Recipe, folder: Path) -> TrainingArguments:
    """transformers' arguments for one stage; the schedule itself is `StageTrainer`'s."""
    stage = stage_recipe.stage
    devices = PartialState(cpu=not torch.cuda.is_available()).num_processes
    if devices == 1:
        devices = max(1, torch.cuda.device_count())  # one process drives all of them
    device_batch = min(stage_recipe.device_batch_size, stage.batch_size)
    if stage.batch_size % (device_batch * devices):
        raise ValueError(
            f"Stage {stage.number}: a batch of {stage.batch_size} cannot be cut into device batches of {device_batch} on "
            f"{devices} device(s); choose another device_batch_size."
        )
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
        tf32=True if recipe.bf16 and torch.cuda.is_available() else None,
        gradient_checkpointing=recipe.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if recipe.gradient_checkpointing else None,
        dataloader_num_workers=recipe.workers,
        remove_unused_columns=False,
        save_strategy="steps" if recipe.save_steps else "no",
        save_steps=recipe.save_steps or 500,
        logging_steps=recipe.logging_steps,
        report_to=recipe.report_to,
        seed=recipe.seed,
        use_cpu=not torch.cuda.is_available(),
    )


class _Indexable(torch.utils.data.Dataset):
    """What the Trainer wants a data set to be: its length and its items, nothing about columns."""

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]
