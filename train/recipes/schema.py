"""Recipes: strict YAML files that say what is trained, on what and how. A key that nothing reads is an error."""

import dataclasses
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from prefixvlm.train.recipes.stages import MODULES, PAPER_STAGES, Stage

RECIPE_NAMES = ("paper", "pathvqa", "pathvqa_lora", "quickstart")


@dataclass
class ModelRecipe:
    """The model that training starts from: a saved one, or two backbones.

    Attributes:
        start: Hub id or folder of a whole PrefixVLM; then nothing else is needed.
        vision, text: Hub ids or folders of pretrained backbones, or the fields of configurations for random weights.
        tokenizer: Hub id or folder; by default that of `text`. `{vocab_size: N}` trains one on the recipe's own texts.
        image_mean, image_std: a channel each, for the image processor of a model with random weights.
        config: further fields of `PrefixVLMConfig`.
        dtype: of the weights, such as `float32` or `bfloat16`.
    """

    start: str | None = None
    vision: str | dict | None = None
    text: str | dict | None = None
    tokenizer: str | dict | None = None
    image_mean: list[float] | None = None
    image_std: list[float] | None = None
    config: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"


@dataclass
class LoraRecipe:
    """Train low-rank adapters in place of whole weights.

    Attributes:
        r, alpha, dropout: of LoRA.
        modules: which of the model's modules get adapters; the projector, unless it is among them, trains in full.
        quantize: `nf4` or `int8` keeps the base model in 4 or 8 bits (QLoRA); needs bitsandbytes.
        merge: leave a self-contained model at the end, with the adapter beside it in `adapter/`; else the adapter alone.
    """

    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    modules: list[str] = field(default_factory=lambda: ["language_model"])
    quantize: str | None = None
    merge: bool = True


@dataclass
class EvaluationRecipe:
    """Generation on part of a test set in the middle of training.

    Attributes:
        task: one of `train/evaluation/tasks.py`, with its `data`, `images`, `split` and the keys of its rows.
        every_steps: how often, in optimiser steps.
        examples: how many of the set's, spread evenly and always the same.
        prompt: asks for captions in these words.
        num_beams, max_new_tokens, batch_size: of the generation.
    """

    task: str
    every_steps: int
    data: str | None = None
    images: str | None = None
    split: str = "test"
    texts: str | None = None
    question: str | None = None
    answer: str | None = None
    prompt: str | None = None
    examples: int = 200
    num_beams: int = 1
    max_new_tokens: int = 32
    batch_size: int = 32


@dataclass
class StageRecipe:
    """One stage's data, and how its batches fit the machine.

    Attributes:
        data: `source` (see `train/data/sources.py`) and its options.
        stage: the stage itself: the paper's, with the fields that the recipe names changed.
        device_batch_size: samples a device takes at once; the rest of `stage.batch_size` is accumulated.
        augment: mirror and turn images at random.
        max_steps: stop after so many optimiser steps; -1 for whole epochs. A stream needs it.
        group_by_length: put samples of similar length into the same batch.
        max_tokens_per_row: pack the samples of a device batch into rows of at most so many tokens; 0 for one sample a row.
        max_length: samples with more tokens are not trained on, but reported; `None` for no limit.
        expected_rows: what a dry run reckons with where the data cannot be read.
        evaluation: generation on part of a test set every N steps; `None` for none.
    """

    data: dict[str, Any]
    stage: Stage
    device_batch_size: int = 8
    augment: bool = False
    max_steps: int = -1
    group_by_length: bool = False
    max_tokens_per_row: int = 0
    max_length: int | None = None
    expected_rows: int | None = None
    evaluation: EvaluationRecipe | None = None


@dataclass
class Recipe:
    """A whole training run.

    Attributes:
        output: the folder that gets one folder a stage.
        seed: of everything random.
        bf16: train in bfloat16 autocast; off on machines without it.
        gradient_checkpointing: trade time for memory.
        workers: processes that prepare batches.
        save_steps: write a checkpoint every so many steps; 0 for none.
        keep_checkpoints: the newest so many stay; the one before the last is there in case the last is damaged.
        max_skipped: the run stops if a larger share of the samples cannot be used.
        feature_cache_gb: keep what the frozen encoder of stages 0 and 1 says of each image on disk, up to so many
            gigabytes; 0 for none.
        lora: adapters to train in place of whole weights.
        logging_steps: log every so many steps.
        report_to: `none` or `tensorboard`.
    """

    model: ModelRecipe
    stages: dict[int, StageRecipe]
    output: str = "runs/prefixvlm"
    seed: int = 0
    bf16: bool = False
    gradient_checkpointing: bool = False
    workers: int = 0
    save_steps: int = 0
    keep_checkpoints: int = 2
    max_skipped: float = 0.01
    feature_cache_gb: float = 0.0
    lora: LoraRecipe | None = None
    logging_steps: int = 10
    report_to: str = "none"


def load_recipe(name_or_path: str, overrides: list[str] | None = None) -> Recipe:
    """Reads a recipe of ours by name or any by path, with `key.key=value` overrides.

    Raises:
        ValueError: naming the file and the key, for a missing file, bad YAML, an unknown key or a value of a wrong type.
    """
    path = Path(name_or_path)
    if name_or_path in RECIPE_NAMES:
        path = Path(str(resources.files("prefixvlm.train"))) / "recipes" / f"{name_or_path}.yaml"
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ValueError(f"There is no recipe {name_or_path}; name a file, or one of {', '.join(RECIPE_NAMES)}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: a recipe is a mapping of keys to values.")
    for override in overrides or []:
        _override(values, override)
    return parse_recipe(values, str(path))


def parse_recipe(values: dict, where: str = "recipe") -> Recipe:
    """A recipe from plain values; see `load_recipe` for what it refuses."""
    values = dict(values)
    model = _build(ModelRecipe, values.pop("model", {}), f"{where}: model")
    if model.start is None and (model.vision is None or model.text is None):
        raise ValueError(f"{where}: model needs `start`, or `vision` and `text`.")
    stages = {}
    given = values.pop("stages", None)
    if not isinstance(given, dict) or not given:
        raise ValueError(f"{where}: `stages` must map stage numbers (0 to 3) to their settings.")
    for number, settings in given.items():
        if number not in PAPER_STAGES:
            raise ValueError(
                f"{where}: stages has the key {number!r}; stages are numbered {', '.join(map(str, PAPER_STAGES))}."
            )
        stages[number] = _stage(number, settings, f"{where}: stages.{number}")
    if values.get("lora") is not None:
        values["lora"] = _lora(values["lora"], f"{where}: lora")
    recipe = _build(Recipe, {**values, "model": model, "stages": dict(sorted(stages.items()))}, where)
    if not 0 <= recipe.max_skipped <= 1:
        raise ValueError(f"{where}: max_skipped is {recipe.max_skipped}; it must lie in [0, 1].")
    if recipe.keep_checkpoints < 2:
        raise ValueError(f"{where}: keep_checkpoints is {recipe.keep_checkpoints}; keep 2, one may be damaged.")
    if recipe.lora is not None and len(stages) > 1 and not recipe.lora.merge:
        raise ValueError(f"{where}: with lora.merge off there is no model for a second stage to start from.")
    if recipe.report_to not in ("none", "tensorboard"):
        raise ValueError(f"{where}: report_to is {recipe.report_to!r}; choose none or tensorboard.")
    return recipe


def _lora(values, where: str) -> LoraRecipe:
    lora = _build(LoraRecipe, values, where)
    if unknown := [str(module) for module in lora.modules if module not in MODULES]:
        raise ValueError(f"{where}.modules has {', '.join(unknown)}; choose among {', '.join(MODULES)}.")
    if not lora.modules or lora.r < 1:
        raise ValueError(f"{where}: r must be positive, and modules not empty.")
    if lora.quantize not in (None, "nf4", "int8"):
        raise ValueError(f"{where}.quantize is {lora.quantize!r}; choose nf4 or int8.")
    return lora


def _stage(number: int, settings, where: str) -> StageRecipe:
    if not isinstance(settings, dict):
        raise ValueError(f"{where} must be a mapping.")
    settings = dict(settings)
    # Stage's own fields stand beside those of StageRecipe in the file
    names = {f.name for f in dataclasses.fields(Stage)} - {"number"}
    changes = {name: settings.pop(name) for name in list(settings) if name in names}
    for name, value in changes.items():
        changes[name] = _checked(value, type(getattr(PAPER_STAGES[number], name)), f"{where}.{name}")
    try:
        stage = dataclasses.replace(PAPER_STAGES[number], **changes)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if settings.get("evaluation") is not None:
        settings["evaluation"] = _evaluation(settings["evaluation"], stage, f"{where}.evaluation")
    recipe = _build(StageRecipe, {**settings, "stage": stage}, where)
    if "source" not in recipe.data:
        raise ValueError(f"{where}.data needs a `source`.")
    if recipe.device_batch_size < 1:
        raise ValueError(f"{where}.device_batch_size must be positive.")
    if recipe.max_tokens_per_row < 0 or (recipe.max_length is not None and recipe.max_length < 1):
        raise ValueError(f"{where}: max_tokens_per_row and max_length must not be negative.")
    if recipe.data.get("streaming") and (recipe.max_steps < 0 or recipe.group_by_length):
        raise ValueError(f"{where}: a stream has no end and no known lengths; set max_steps, and group_by_length off.")
    return recipe


def _evaluation(values, stage: Stage, where: str) -> EvaluationRecipe:
    evaluation = _build(EvaluationRecipe, values, where)
    for name in ("every_steps", "examples", "num_beams", "max_new_tokens", "batch_size"):
        if getattr(evaluation, name) < 1:
            raise ValueError(f"{where}.{name} is {getattr(evaluation, name)}; it must be positive.")
    if stage.attention_mode == "bidirectional":
        raise ValueError(f"{where}: a model that sees later tokens cannot generate; evaluate in stages 1 to 3.")
    return evaluation


def _build(cls, values, where: str):
    if not isinstance(values, dict):
        raise ValueError(f"{where} must be a mapping.")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    unknown = sorted(str(key) for key in values if key not in fields)
    if unknown:
        raise ValueError(f"{where}: unknown key {', '.join(unknown)}; known are {', '.join(sorted(fields))}.")
    missing = [
        name
        for name, f in fields.items()
        if name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{where}: the key {', '.join(missing)} is missing.")
    return cls(**{name: _checked(value, fields[name].type, f"{where}: {name}") for name, value in values.items()})


def _checked(value, kind, where: str):
    """The value if it fits a field's type; whole numbers pass as floats, and "1e-4", which YAML reads as text, too."""
    kinds = getattr(kind, "__args__", None) if getattr(kind, "__origin__", None) is None else None
    for one in kinds or (kind,):
        one = getattr(one, "__origin__", one)
        if one is Any or (isinstance(value, one) and not (isinstance(value, bool) and one is not bool)):
            return value
        if one is float and not isinstance(value, bool):
            try:
                return float(value)
            except (TypeError, ValueError):
                continue
    raise ValueError(f"{where} is {value!r}, which is not of type {getattr(kind, '__name__', kind)}.")


def _override(values: dict, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ValueError(f"The override {override!r} must have the form key.key=value.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"The override {override!r} has a value that is not YAML.") from error
    *path, last = [int(part) if part.isdigit() else part for part in key.split(".")]
    for part in path:
        values = values.setdefault(part, {}) if isinstance(values, dict) else None
        if not isinstance(values, dict):
            raise ValueError(f"The override {override!r} goes through {part}, which is no mapping.")
    values[last] = value
