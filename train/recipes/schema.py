"""Recipes: strict YAML files that say what is trained, on what and how. A key that nothing reads is an error."""

import dataclasses
import inspect
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    Field,
    InstanceOf,
    PlainValidator,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from transformers import CONFIG_MAPPING

from prefixvlm.configuration.configuration_prefix_vlm import PrefixVLMConfig
from prefixvlm.train.recipes.checking import (
    AtLeastOne,
    AtLeastZero,
    Checked,
    DataSource,
    Dtype,
    Names,
    NotNegative,
    Number,
    PlainDict,
    Positive,
    SettingsError,
    Share,
    Text,
    did_you_mean,
    refuse_not_finite,
    refuse_unknown_keys,
)
from prefixvlm.train.recipes.evaluation import EvaluationRecipe, FinalEvaluation, ValidationRecipe
from prefixvlm.train.recipes.stages import PAPER_STAGES, Module, Stage

RECIPE_NAMES = ("paper", "captions", "interleaved", "pathvqa", "pathvqa_lora", "quickstart")
STAGE_KEYS = frozenset(field.name for field in dataclasses.fields(Stage)) - {"number"}
# the other fields of `PrefixVLMConfig` come from the backbones and the tokenizer
CONFIG_KEYS = inspect.signature(PrefixVLMConfig).parameters.keys() - {
    "vision_config",
    "text_config",
    "image_token_id",
    "kwargs",
}
# fields of configurations that not every class lists: those of all classes, and of each version what the other one reads
UNLISTED_FIELDS = frozenset(
    (
        *("model_type", "dtype", "torch_dtype", "attn_implementation", "tie_word_embeddings"),
        *("rope_theta", "rope_scaling", "rope_parameters"),
    )
)
OF_TOKENIZER = ("bos_token_id", "eos_token_id", "pad_token_id")
HUB_KEYS = ("revision", "token", "cache_dir")
MIN_VOCAB_SIZE = 261  # 256 bytes and five special tokens
MAX_SEED = 2**32 - 1  # numpy's


def _name_or_fields(value: Any) -> str | dict[str, Any]:
    if isinstance(value, str) and value:
        return value
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return refuse_not_finite(value)
    raise ValueError("must be a name or a mapping.")


def _refuse_unknown_fields(values: dict[str, Any], model_type: str) -> None:
    """Raises a ValueError for a key that the configuration class does not have: transformers would keep it and not read it.

    Args:
        values: fields of a configuration of transformers.
        model_type: of the class, unless `values` names another.
    """
    model_type = values.get("model_type", model_type)
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"model_type is {model_type!r}; {did_you_mean(model_type, CONFIG_MAPPING.keys())}")
    config_class = CONFIG_MAPPING[model_type]
    listed = {*inspect.signature(config_class.__init__).parameters, *config_class.attribute_map}
    refuse_unknown_keys(values, (listed | UNLISTED_FIELDS) - {"self", "kwargs"})


def _tokenizer(value: str | dict[str, Any]) -> str | dict[str, Any]:
    if isinstance(value, dict):
        TokenizerRecipe(**value)
    return value


# one check in place of a union's, whose errors would be one for each member
NameOrFields = Annotated[str | dict[str, Any], PlainValidator(_name_or_fields)]
Channels = Annotated[list[Number], Field(min_length=3, max_length=3)]
PositiveChannels = Annotated[list[Positive], Field(min_length=3, max_length=3)]


class TokenizerRecipe(Checked):
    """A tokenizer that is trained on the recipe's own texts.

    Attributes:
        vocab_size: with the bytes and the special tokens.
    """

    vocab_size: Annotated[int, Field(ge=MIN_VOCAB_SIZE)]


class ModelRecipe(Checked):
    """The model that training starts from: a saved one, or two backbones.

    Attributes:
        start: Hub id or folder of a whole PrefixVLM; then nothing else but `dtype` may be given.
        vision, text: Hub ids or folders of pretrained backbones, or the fields of configurations for random weights.
        tokenizer: Hub id or folder, by default that of `text`; or the fields of a `TokenizerRecipe`.
        image_mean, image_std: of red, green and blue, for the image processor of a model with random weights.
        image_size: side of the pictures of a pretrained `vision`, in pixels; by default what its preprocessor makes.
        center_crop: let its preprocessor cut off the edges of pictures, if it does; else whole pictures are resized.
        config: further fields of `PrefixVLMConfig`, but for the attention mode, which is that of each stage.
        chat_template: `chatml` or `own`, the decoder's; by default its own, unless that frames turns as ChatML does.
        dtype: of the weights.
        revision, token, cache_dir: for the Hub, as in transformers; of two backbones they go to both.
    """

    start: Text | None = None
    vision: NameOrFields | None = None
    text: NameOrFields | None = None
    tokenizer: Annotated[NameOrFields, AfterValidator(_tokenizer)] | None = None
    image_mean: Channels | None = None
    image_std: PositiveChannels | None = None
    image_size: AtLeastOne | None = None
    center_crop: bool = False
    config: PlainDict = {}
    chat_template: Literal["chatml", "own"] | None = None
    dtype: Dtype = "float32"
    revision: Text | None = None
    token: Text | None = None
    cache_dir: Text | None = None

    @property
    def hub(self) -> dict[str, str]:
        """Those of `revision`, `token` and `cache_dir` that are given."""
        return {name: value for name in HUB_KEYS if (value := getattr(self, name)) is not None}

    @field_validator("config")
    @classmethod
    def _is_read(cls, config: dict[str, Any]) -> dict[str, Any]:
        refuse_unknown_keys(config, CONFIG_KEYS)
        if "attention_mode" in config:
            raise ValueError("attention_mode is that of each stage; set it there (stages.2.attention_mode).")
        return config

    @field_validator("vision", "text")
    @classmethod
    def _are_fields(cls, values: str | dict[str, Any] | None, info: ValidationInfo) -> str | dict[str, Any] | None:
        if isinstance(values, dict):
            for key in OF_TOKENIZER if info.field_name == "text" else ():
                if key in values:
                    raise ValueError(f"{key} comes from the tokenizer; leave it out.")
            _refuse_unknown_fields(values, "siglip_vision_model" if info.field_name == "vision" else "qwen2")
        return values

    @model_validator(mode="after")
    def _is_enough(self) -> "ModelRecipe":
        if self.start is None and (self.vision is None or self.text is None):
            raise ValueError("needs `start`, or `vision` and `text`.")
        with_start = ("start", "dtype", *HUB_KEYS)
        others = [name for name in type(self).model_fields if name not in with_start and getattr(self, name)]
        if self.start is not None and others:
            raise ValueError(
                f"has `start`, a whole model, and beside it {', '.join(others)}, which nothing would read; leave one of "
                "them out."
            )
        if isinstance(self.vision, dict) and (self.image_size or self.center_crop):
            raise ValueError(
                "has image_size or center_crop, which are for a pretrained `vision`; leave them out, and set "
                "vision.image_size."
            )
        return self


class LoraRecipe(Checked):
    """Train low-rank adapters in place of whole weights.

    Attributes:
        r, alpha, dropout: of LoRA.
        modules: which of the model's modules get adapters; the projector, unless it is among them, trains in full.
        quantize: `nf4` or `int8` keeps the base model in 4 or 8 bits (QLoRA); needs bitsandbytes.
        merge: leave a self-contained model at the end, with the adapter beside it in `adapter/`; else the adapter alone.
    """

    r: AtLeastOne = 16
    alpha: AtLeastOne = 32
    dropout: Share = 0.0
    modules: Annotated[list[Module], Field(min_length=1)] = ["language_model"]
    quantize: Literal["nf4", "int8"] | None = None
    merge: bool = True


class StageRecipe(Checked):
    """One stage's data, and how its batches fit the machine.

    Attributes:
        data: `source` (see `train/data/sources.py`) and its options.
        stage: the stage itself: the paper's, with the fields changed that stand beside these keys in the file.
        device_batch_size: samples a device takes at once; the rest of `stage.batch_size` is accumulated.
        augment: mirror and turn images at random.
        max_steps: stop after N optimiser steps; -1 for whole epochs. A stream needs it.
        group_by_length: put samples of similar length into the same batch.
        max_tokens_per_row: pack the samples of a device batch into rows of at most N tokens; 0 for one sample per row.
        max_length: samples with more tokens are not trained on, but reported; `None` for no limit.
        expected_rows: what a dry run reckons with where the data cannot be read.
        evaluation: generation on part of a test set every N steps; `None` for none.
        validation: the loss on held-out data every N steps, the best checkpoint and early stopping; `None` for none.
    """

    data: DataSource
    stage: InstanceOf[Stage]
    device_batch_size: AtLeastOne = 8
    augment: bool = False
    max_steps: Annotated[int, Field(ge=-1)] = -1
    group_by_length: bool = False
    max_tokens_per_row: AtLeastZero = 0
    max_length: AtLeastOne | None = None
    expected_rows: AtLeastOne | None = None
    evaluation: EvaluationRecipe | None = None
    validation: ValidationRecipe | None = None

    @field_validator("max_steps")
    @classmethod
    def _takes_steps(cls, max_steps: int) -> int:
        if max_steps == 0:
            raise ValueError("is 0; it must be at least 1, or -1 for whole epochs.")
        return max_steps

    @field_validator("evaluation")
    @classmethod
    def _can_generate(cls, evaluation: EvaluationRecipe | None, info: ValidationInfo) -> EvaluationRecipe | None:
        if evaluation is not None and "stage" in info.data and info.data["stage"].attention_mode == "bidirectional":
            raise ValueError("a model that sees later tokens cannot generate; evaluate in stages 1 to 3.")
        return evaluation

    @model_validator(mode="after")
    def _streams_have_an_end(self) -> "StageRecipe":
        if _is_streamed(self.data) and (self.max_steps < 0 or self.group_by_length):
            raise ValueError("a stream has no end and no known lengths; set max_steps, and group_by_length off.")
        return self

    @model_validator(mode="after")
    def _validation_has_an_end(self) -> "StageRecipe":
        if self.validation is not None and self.validation.share is not None and _is_streamed(self.data):
            raise ValueError("validation.share: no share of a stream can be held out; give validation.data.")
        if self.validation is not None and _is_streamed(self.validation.data or {}):
            raise ValueError("validation.data is read as a whole each time; leave out streaming.")
        return self


def _is_streamed(data: dict[str, Any]) -> bool:
    parts = data.get("parts")
    inner = [part for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []
    return bool(data.get("streaming")) or any(map(_is_streamed, inner))


class Recipe(Checked):
    """A whole training run.

    Attributes:
        model: what training starts from.
        stages: by number, in order.
        output: the folder that gets one folder a stage.
        seed: of everything random.
        device: `cuda`, `mps` or `cpu`; by default the first there is. CUDA_VISIBLE_DEVICES chooses among several GPUs.
        bf16: train in bfloat16 autocast; a CPU without bfloat16 arithmetic computes in float32 instead, and says so.
        gradient_checkpointing: trade time for memory.
        workers: processes that prepare batches; 0 for none beside the training itself.
        save_steps: write a checkpoint every N optimiser steps; 0 for none.
        keep_checkpoints: how many of the newest checkpoints stay, beside the best one of a stage with `validation`; at
            least 2, in case the last one is damaged.
        max_skipped: the run stops if a larger share of the samples cannot be used.
        feature_cache_gb: size limit, in gigabytes, of the disk cache of image features from the frozen encoder of stages 0
            and 1; 0 for no cache.
        lora: adapters to train in place of whole weights.
        logging_steps: log every N optimiser steps.
        report_to: a reporter that transformers knows (`tensorboard`, `wandb`, `mlflow`, ...), several, `all`, or `none`.
        test: what the finished model is evaluated on; `None` for nothing.
    """

    model: ModelRecipe
    stages: Annotated[dict[int, StageRecipe], Field(min_length=1)]
    output: Text = "runs/prefixvlm"
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] = 0
    device: Literal["cuda", "mps", "cpu"] | None = None
    bf16: bool = False
    gradient_checkpointing: bool = False
    workers: AtLeastZero = 0
    save_steps: AtLeastZero = 0
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2
    max_skipped: Annotated[Number, Field(ge=0, le=1)] = 0.01
    feature_cache_gb: NotNegative = 0.0
    lora: LoraRecipe | None = None
    logging_steps: AtLeastOne = 10
    report_to: Names = ["none"]
    test: FinalEvaluation | None = None

    @model_validator(mode="after")
    def _has_a_model_to_go_on_from(self) -> "Recipe":
        if self.lora is not None and len(self.stages) > 1 and not self.lora.merge:
            raise ValueError("with lora.merge off there is no model for a second stage to start from.")
        return self

    @model_validator(mode="after")
    def _can_be_tested(self) -> "Recipe":
        if self.test is not None and self.stages[max(self.stages)].stage.attention_mode == "bidirectional":
            raise ValueError("test: a model that sees later tokens cannot generate; its last stage must be 1 to 3.")
        return self


class _UniqueKeys(yaml.SafeLoader):
    """YAML whose mappings have each key once; PyYAML would keep the last and drop the others without a word."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def load_recipe(
    name_or_path: str, overrides: list[str] | None = None, output: str | None = None, max_steps: int | None = None
) -> Recipe:
    """Reads a recipe of ours by name or any by path.

    Args:
        overrides: changes to it, each `key.key=value`.
        output, max_steps: replace what the recipe says; `max_steps` in every stage.

    Raises:
        ValueError: naming the file and the key, for a missing file, bad YAML, an unknown key or a value that does not fit.
    """
    path = Path(name_or_path)
    if name_or_path in RECIPE_NAMES:
        path = Path(str(resources.files("prefixvlm.train"))) / "recipes" / f"{name_or_path}.yaml"
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise ValueError(f"There is no recipe {name_or_path}; {did_you_mean(name_or_path, RECIPE_NAMES)}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: a recipe is a mapping of keys to values.")
    for override in overrides or []:
        _override(values, override)
    if output is not None:
        values["output"] = output
    stages = values.get("stages")
    for settings in stages.values() if max_steps is not None and isinstance(stages, dict) else ():
        if isinstance(settings, dict):
            settings["max_steps"] = max_steps
    return parse_recipe(values, str(path))


def parse_recipe(values: dict, where: str = "recipe") -> Recipe:
    """A recipe from plain values; see `load_recipe` for what it refuses."""
    stages = values.get("stages")
    if not isinstance(stages, dict) or not stages:
        raise ValueError(f"{where}: `stages` must map stage numbers (0 to 3) to their settings.")
    for number in stages:
        if type(number) is not int or number not in PAPER_STAGES:
            raise ValueError(
                f"{where}: stages has the key {number!r}; stages are numbered {', '.join(map(str, PAPER_STAGES))}."
            )
    parsed = {number: _stage_values(number, stages[number], where) for number in sorted(stages)}
    try:
        return Recipe.model_validate({**values, "stages": parsed})
    except ValidationError as error:
        raise ValueError(SettingsError(error).sentence(where)) from error


def _stage_values(number: int, settings: object, where: str) -> dict:
    """The values of a `StageRecipe`, from a mapping where `Stage`'s own fields stand beside those."""
    if not isinstance(settings, dict):
        raise ValueError(f"{where}: stages.{number} must be a mapping.")
    try:
        refuse_unknown_keys(settings, STAGE_KEYS | StageRecipe.model_fields.keys() - {"stage"})
    except ValueError as error:
        raise ValueError(f"{where}: stages.{number}: {error}") from error
    changes = {key: value for key, value in settings.items() if key in STAGE_KEYS}
    try:
        stage = dataclasses.replace(PAPER_STAGES[number], **changes)
    except ValidationError as error:
        sentence = SettingsError(error).sentence(where, lambda path: ".".join(map(str, ("stages", number, *path))))
        raise ValueError(sentence) from error
    return {"stage": stage, **{key: value for key, value in settings.items() if key not in STAGE_KEYS}}


def setting(text: str) -> tuple[str, Any]:
    """The key and the value of `key=value`, the value in YAML.

    Raises:
        ValueError: if it has another form.
    """
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ValueError(f"The override {text!r} must have the form key.key=value.")
    try:
        return key, yaml.load(value, _UniqueKeys)
    except yaml.YAMLError as error:
        raise ValueError(f"The override {text!r} has a value that is not YAML.") from error


def _override(values: dict, override: str) -> None:
    key, value = setting(override)
    *path, last = [int(part) if part.isdecimal() else part for part in key.split(".")]
    for part in path:
        if values.get(part) is None:
            values[part] = {}
        values = values[part]
        if not isinstance(values, dict):
            raise ValueError(f"The override {override!r} goes through {part}, which is not a mapping.")
    values[last] = value
