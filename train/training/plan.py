"""What a recipe would take, before it is run: rows, tokens, steps, parameters, memory, FLOPs and time, stage by stage.

Shapes: T tokens, P image tokens.
"""

import copy
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from prefixvlm.inference.auto import PrefixVLMForConditionalGeneration
from prefixvlm.inference.environment import bf16_note, choose_device
from prefixvlm.inference.loading import refuse_missing_path
from prefixvlm.train.data.collator import ConversationCollator
from prefixvlm.train.data.conversation import Conversation
from prefixvlm.train.data.screening import screen
from prefixvlm.train.data.sources import InMemory, is_stream
from prefixvlm.train.recipes.schema import Recipe, StageRecipe
from prefixvlm.train.recipes.stages import MODULES
from prefixvlm.train.training import lora
from prefixvlm.train.training.cost import training_flops
from prefixvlm.train.training.progress import duration
from prefixvlm.train.training.run import all_texts, chosen_stages
from prefixvlm.train.training.starting_model import PAPER_PAIR, build, paper_config, refuse_random_start
from prefixvlm.train.training.validation import stage_samples

SAMPLE = 256  # rows that are tokenized to estimate lengths
TEXT_TOKENS = 128  # of a sample whose data cannot be read
GIB = 2**30
FORWARD_AND_BACKWARD = 3  # times the cost of a forward pass alone
ADAM_BYTES = 8  # two moments in float32 for each weight that trains


@dataclass
class DataSize:
    """How much data a stage has: rows, mean tokens, supervised tokens and images, how that is known; and rows held out."""

    rows: int
    tokens: float
    supervised: float
    images: float
    how: str
    held_out: int = 0


@dataclass
class MeasuredStep:
    """One real step of one sample: seconds forward and backward, seconds of the optimiser, bytes kept for backward."""

    seconds: float
    optimizer_seconds: float
    activation_bytes: int


def plan(recipe: Recipe, only: list[int] | None = None, random_init: bool = False) -> dict:
    """The plan of a recipe's stages, in numbers and notes. Trains nothing and writes nothing.

    Weights are not loaded: their values change neither counts nor times. Memory is in bytes, time in seconds.

    Raises:
        ValueError: for stages that the recipe does not have, or a model whose shape cannot be read.
    """
    numbers = chosen_stages(recipe, only)
    model_recipe = recipe.model
    device = choose_device(recipe.device)
    sources = {}
    for number in numbers:
        _announce(f"Stage {number}: reading {_data_names(recipe.stages[number].data)}")
        sources[number] = _source(recipe.stages[number], recipe.seed)
    texts = all_texts(samples for samples, _ in sources.values() if not isinstance(samples, str))
    refuse_random_start(model_recipe, random_init)
    processor = None
    _announce("Building the model with random weights")
    try:
        model, processor = build(model_recipe, texts, random_init=True)
    except ValueError:
        if (model_recipe.vision, model_recipe.text) != PAPER_PAIR:
            raise
        # the tokenizer is on the Hub; everything else about the paper's pair is built in
        model = PrefixVLMForConditionalGeneration(paper_config(model_recipe))
    notes = []
    if processor is None:
        notes.append(f"The tokenizer cannot be loaded here: {TEXT_TOKENS} text tokens per sample are assumed.")
    if recipe.bf16 and (note := bf16_note(device)):
        notes.append(note)
    stages = {}
    for number in numbers:
        _announce(f"Stage {number}: measuring a step on {device}")
        size = _size(*sources[number], recipe.stages[number], processor, model.config.num_image_tokens)
        stages[number] = _stage_plan(recipe, recipe.stages[number], model, size, device)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "image_tokens": model.config.num_image_tokens,
        "device": device.type,
        "notes": notes,
        "stages": stages,
        "seconds": sum(stage["seconds"] or 0.0 for stage in stages.values()),
    }


def as_text(found: dict) -> str:
    """A plan as a page of text."""
    lines = [f"Model: {found['parameters']:,} parameters, {found['image_tokens']} image tokens.", *found["notes"]]
    for number, stage in found["stages"].items():
        lines += ["", *_stage_lines(number, stage, found["device"])]
    if found["seconds"]:
        lines += ["", f"In total: {duration(found['seconds'])} on one device like this."]
    return "\n".join(lines)


def refuse_missing_paths(recipe: Recipe) -> None:
    """Raises a ValueError, naming the key, for a path in a recipe that leads to nothing; asks no network."""
    for key in ("start", "vision", "text", "tokenizer"):
        _refuse(f"model.{key}", getattr(recipe.model, key))
    for number, stage in recipe.stages.items():
        validation = (stage.validation and stage.validation.data) or {}
        of_validation = _paths_of_data(f"stages.{number}.validation.data", validation)
        for place, value in (*_paths_of_data(f"stages.{number}.data", stage.data), *of_validation):
            _refuse(place, value)


def _refuse(key: str, value) -> None:
    if isinstance(value, str):
        try:
            refuse_missing_path(value)
        except ValueError as error:
            raise ValueError(f"{key} is {error}") from error


def _paths_of_data(key: str, data: dict) -> Iterator[tuple[str, Any]]:
    """Yields the paths in the settings of a data source and in the parts of a mixture, with their keys."""
    if not any(sign in str(data.get("path")) for sign in "*?["):
        yield f"{key}.path", data.get("path")
    yield f"{key}.images", data.get("images")
    parts = data.get("parts")
    for place, part in enumerate(parts if isinstance(parts, list) else []):
        if isinstance(part, dict):
            yield from _paths_of_data(f"{key}.parts.{place}", part)


def _data_names(data: dict) -> str:
    """What a data source is called in a sentence."""
    names = [str(value) for place, value in _paths_of_data("", data) if place.endswith(".path") and value]
    return ", ".join(names) or str(data["source"])


def _announce(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def _source(stage_recipe: StageRecipe, seed: int) -> tuple[Any, Any]:
    """The samples of a stage, or the reason why they cannot be read; and those held out, if any."""
    try:
        return stage_samples(stage_recipe, seed)
    except ValueError as error:
        if stage_recipe.expected_rows is None:
            raise
        return str(error), None


def _size(samples, held_out, stage_recipe: StageRecipe, processor, image_tokens: int) -> DataSize:
    assumed = (image_tokens + TEXT_TOKENS, TEXT_TOKENS, 1.0)
    validation = stage_recipe.validation
    if isinstance(samples, str):
        how = f"as the recipe says; {samples.split(' (')[0].rstrip('.')}"
        rows = stage_recipe.expected_rows or 0
        measured = round(rows * (validation.share or 0)) if validation else 0
        return DataSize(rows - measured, *assumed, how, measured)
    measured = 0 if held_out is None else len(held_out)
    if validation and validation.examples:
        measured = min(measured, validation.examples)
    streamed = is_stream(samples)
    rows = stage_recipe.max_steps * stage_recipe.stage.batch_size if streamed else len(samples)
    if processor is None:
        return DataSize(rows, *assumed, "rows counted, tokens assumed", measured)
    looked_at = _some(samples)
    collator = ConversationCollator(processor, stage_recipe.stage.text_format)
    verdict = screen(looked_at, collator, stage_recipe.max_length, measure=True)
    if not verdict.indices:
        raise ValueError(f"None of {len(looked_at)} samples can be used. The first: {verdict.skipped[0][2]}")
    count = len(verdict.indices)
    skipped = f"; {len(verdict.skipped)} of them cannot be used" if verdict.skipped else ""
    tokens, supervised, images = (sum(column) / count for column in (verdict.lengths, verdict.supervised, verdict.images))
    return DataSize(rows, tokens, supervised, images, f"tokens from {len(looked_at)} of the rows{skipped}", measured)


def _some(samples) -> InMemory:
    """Samples to look at: of a large data set, a random subset."""
    if is_stream(samples):
        makers = (make for _, (_, make) in zip(range(SAMPLE), samples.epoch("0"), strict=False))
    else:
        chosen = random.Random(0).sample(range(len(samples)), min(SAMPLE, len(samples)))
        makers = ((lambda index=index: samples[index]) for index in sorted(chosen))
    made = InMemory()
    for make in makers:
        try:
            made.append(make())
        except ValueError as error:
            made.append(Conversation(name=str(error)))  # which screening reports as having no text
    return made


def _stage_plan(recipe: Recipe, stage_recipe: StageRecipe, model, size: DataSize, device) -> dict:
    """The numbers of one stage; without those of a step if none could be measured, and then with the reason."""
    stage = stage_recipe.stage
    if recipe.lora:
        model = lora.add_adapters(copy.deepcopy(model), recipe.lora, stage)
    stage.prepare(model)
    steps = -(-size.rows // stage.batch_size) * stage.epochs if stage_recipe.max_steps < 0 else stage_recipe.max_steps
    seen = (
        min(steps * stage.batch_size, size.rows * stage.epochs) if stage_recipe.max_steps < 0 else steps * stage.batch_size
    )
    flops = training_flops(model, stage.trains, size.images, size.tokens, size.tokens**2, size.supervised)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    state = sum(p.numel() * (p.element_size() + ADAM_BYTES) for p in model.parameters() if p.requires_grad)
    device_batch = min(stage_recipe.device_batch_size, stage.batch_size)
    measured = _measured(recipe, model, size, device, weights + state)
    validation = stage_recipe.validation
    found = {
        "attention_mode": stage.attention_mode,
        "text_format": stage.text_format,
        "noise": stage.noise,
        "rows": size.rows,
        "rows_are": size.how,
        "tokens_per_sample": size.tokens,
        "supervised_per_sample": size.supervised,
        "steps": steps,
        "batch_size": stage.batch_size,
        "device_batch_size": device_batch,
        "trains": {
            module: {
                "parameters": sum(p.numel() for p in getattr(model, module).parameters() if p.requires_grad),
                "learning_rate": stage.learning_rates[module],
            }
            for module in MODULES
        },
        "flops": flops * seen,
        "flops_per_sample": flops,
        "validation": validation and validation.model_dump(exclude={"data"}) | {"rows": size.held_out},
        "weight_bytes": weights,
        "state_bytes": state,
        "seconds": None,
    }
    if isinstance(measured, str):
        return found | {"not_measured": measured}
    seconds = seen * measured.seconds + steps * measured.optimizer_seconds
    if validation is not None:
        evaluations = -(-steps // validation.every_steps)
        seconds += evaluations * size.held_out * measured.seconds / FORWARD_AND_BACKWARD
    return found | {
        "activation_bytes": measured.activation_bytes * device_batch,
        "sample_seconds": measured.seconds,
        "optimizer_seconds": measured.optimizer_seconds,
        "seconds": seconds,
    }


def _stage_lines(number: int, stage: dict, device: str) -> list[str]:
    trains = (f"{module} {one['parameters']:,} at {one['learning_rate']:g}" for module, one in stage["trains"].items())
    lines = [
        f"Stage {number}: {stage['attention_mode']} attention, {stage['text_format']}s"
        + (f", {stage['noise']:.0%} noise" if stage["noise"] else ""),
        f"  rows        {stage['rows']:,} ({stage['rows_are']})",
        f"  tokens      {stage['rows'] * stage['tokens_per_sample']:,.0f} ({stage['tokens_per_sample']:,.0f} per sample, "
        f"{stage['supervised_per_sample']:,.0f} supervised)",
        f"  steps       {stage['steps']:,.0f} of {stage['batch_size']} samples, {stage['device_batch_size']} at once",
        "  trains      " + ", ".join(trains),
        f"  FLOPs       {stage['flops']:.3g} ({stage['flops_per_sample'] / 1e9:,.0f} G per sample)",
        *_validation_lines(stage["validation"]),
    ]
    weights, state = stage["weight_bytes"], stage["state_bytes"]
    if "not_measured" in stage:
        lines.append(f"  memory      {(weights + state) / GIB:.1f} GiB of weights, gradients and Adam, and activations")
        return [*lines, f"  time        not measured: {stage['not_measured']}"]
    activations, each = stage["activation_bytes"], stage["sample_seconds"]
    return [
        *lines,
        f"  memory      {(weights + state + activations) / GIB:.1f} GiB ({weights / GIB:.1f} weights, {state / GIB:.1f} "
        f"gradients and Adam, {activations / GIB:.1f} activations of {stage['device_batch_size']})",
        f"  time        {duration(stage['seconds'])}, from one sample in {each:.3g} s "
        f"({stage['flops_per_sample'] / each / 1e9:,.0f} GFLOP/s) and {stage['optimizer_seconds']:.3g} s of Adam "
        f"({device})",
    ]


def _validation_lines(validation: dict | None) -> list[str]:
    """The line about a stage's validation, if it has one."""
    if validation is None:
        return []
    rows = f"{validation['rows']:,} rows held out" if validation["rows"] else "rows of its own"
    what = [f"{rows}, measured every {validation['every_steps']:,} steps"]
    what += ["the best checkpoint is kept"] if validation["keep_best"] else []
    what += [f"ends after {validation['patience']} without a better one"] if validation["patience"] else []
    return [f"  validation  {'; '.join(what)}"]


def _measured(recipe: Recipe, model, size: DataSize, device, state_bytes: int) -> MeasuredStep | str:
    """A real step of one sample of mean length, or why there was none."""
    free = torch.cuda.mem_get_info()[0] if device.type == "cuda" else psutil.virtual_memory().available
    if free < state_bytes:
        return f"weights, gradients and Adam take {state_bytes / GIB:.1f} GiB, {free / GIB:.1f} are free here"
    model.to(device).train()
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    inputs = {name: values.to(device) for name, values in _sample(model.config, size).items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    head = model.get_output_embeddings().weight.shape  # of its gradient, which is kept from the forward pass on
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tensor.shape != head:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def step() -> tuple[float, float]:
        started = _now(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.bf16):
            loss = model(**inputs, use_cache=False, skip_logits=True).loss
        loss.backward()
        between = _now(device)
        optimizer.step()
        optimizer.zero_grad()
        return between - started, _now(device) - between

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step()  # also warms up, and makes Adam's moments
    seconds, optimizer_seconds = step()
    return MeasuredStep(seconds, optimizer_seconds, sum(kept.values()))


def _sample(config, size: DataSize) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = round(size.images)
    text = max(2, round(size.tokens - images * config.num_image_tokens))
    words = torch.randint(config.text_config.vocab_size, (1, text), generator=generator)
    words[words == config.image_token_id] -= 1
    placeholders = torch.full((1, images * config.num_image_tokens), config.image_token_id)
    labels = torch.cat([torch.full_like(placeholders, -100), words.clone()], dim=1)
    labels[:, placeholders.shape[1] + max(1, round(size.supervised)) :] = -100
    side = config.vision_config.image_size
    batch = {"input_ids": torch.cat([placeholders, words], dim=1), "labels": labels}
    if images:
        batch["pixel_values"] = torch.randn(images, 3, side, side, generator=generator)
    return batch


def _now(device: torch.device) -> float:
    torch.get_device_module(device).synchronize()
    return time.perf_counter()
