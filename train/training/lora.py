"""Low-rank adapters (LoRA) through peft: which layers get them, how they are saved, and how they go back into the model."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from safetensors import SafetensorError, safe_open

from prefixvlm.inference.auto import PrefixVLMConfig, PrefixVLMProcessor
from prefixvlm.inference.loading import (
    ADAPTER_CONFIG,
    DTYPES,
    base_of_adapter,
    load,
    one_line,
    refuse_another_type,
    refuse_missing_path,
)
from prefixvlm.train.recipes.schema import LoraRecipe
from prefixvlm.train.recipes.stages import Stage
from prefixvlm.train.training.checkpoints import complete_or_absent

# by the names that SigLIP, CLIP, ViT, DINOv2, Qwen, Llama and similar models give to attention and MLP layers
LAYERS = {
    "vision_tower": "q_proj|k_proj|v_proj|o_proj|out_proj|query|key|value|dense|fc1|fc2",
    "projector": "linear_1|linear_2",
    "language_model": "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj",
}
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def target_pattern(modules: Sequence[str]) -> str:
    """A regular expression for whole paths of layers: a suffix such as q_proj alone would also match the image encoder."""
    return "|".join(rf"(?:.*\.)?{module}\..*?(?:{LAYERS[module]})" for module in modules)


def refuse_without_peft() -> None:
    """Raises a ValueError if peft is missing."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ValueError("LoRA needs peft; run: pip install 'prefixvlm[train]'") from error


@cache
def _adapter_config():
    """The class of peft's `LoraConfig` that also writes the attention mode, wherever and by whomever it is saved."""
    from peft import LoraConfig

    class AdapterConfig(LoraConfig):
        attention_mode = ""

        def save_pretrained(self, save_directory: str, **kwargs) -> None:
            # the one mapping in which peft keeps what others put: our model reads the mode, `AutoPeftModel` the rest
            kwargs["auto_mapping_dict"] = {
                "parent_library": "transformers",
                "base_model_class": "AutoModelForImageTextToText",
                "attention_mode": self.attention_mode,
            }
            super().save_pretrained(save_directory, **kwargs)

    return AdapterConfig


def add_adapters(model, recipe: LoraRecipe, stage: Stage):
    """The model with adapters on `recipe.modules`; a projector that the stage trains and that has none trains in full.

    Raises:
        ValueError: if peft is missing, or a module that is to have adapters has a learning rate of 0.
    """
    refuse_without_peft()
    from peft import get_peft_model

    still = [module for module in recipe.modules if not stage.learning_rates[module]]
    if still:
        raise ValueError(
            f"Stage {stage.number}: lora.modules has {', '.join(still)}, whose learning rate is 0; set {still[0]}_lr."
        )
    in_full = ["projector"] if stage.projector_lr and "projector" not in recipe.modules else None
    config = _adapter_config()(
        r=recipe.r,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        target_modules=target_pattern(recipe.modules),
        modules_to_save=in_full,
    )
    config.attention_mode = stage.attention_mode
    return get_peft_model(model, config)


def merged(folder: Path, base):
    """The base model with the adapter of `folder` added to its weights: a plain PrefixVLM again, in the adapter's mode.

    Raises:
        ValueError: if the adapter does not fit the base model, or is of a kind that cannot be added to weights.
    """
    from peft import PeftModel, get_peft_model_state_dict

    try:
        with safe_open(folder / ADAPTER_WEIGHTS, "pt") as file:
            saved = set(file.keys())
        model = PeftModel.from_pretrained(base, str(folder))
    except (SafetensorError, RuntimeError, KeyError, TypeError, ValueError, OSError) as error:
        raise ValueError(f"The adapter {folder} cannot be put into its base model ({one_line(error)}).") from error
    if not hasattr(model, "merge_and_unload"):
        raise ValueError(f"The adapter {folder} is of a kind that cannot be merged into weights.")
    # peft leaves out what does not fit, and what is missing as it was drawn
    unlike = sorted(saved ^ get_peft_model_state_dict(model).keys())
    if unlike:
        raise ValueError(f"The adapter {folder} does not fit its base model: {len(unlike)} weights, such as {unlike[0]}.")
    return model.merge_and_unload()


def merge(adapter: str, output: str, base: str | None = None, dtype: str | None = None) -> None:
    """Writes a whole model: the adapter's base model with the adapter merged in, its processor, code and card.

    Args:
        adapter: folder or Hub id of an adapter; also a LoRA checkpoint.
        output: the folder to write.
        base: folder or Hub id of the model that the adapter was trained on; by default where it was at that time.
        dtype: of the weights; by default that of the base model.

    Raises:
        ValueError: if there is no adapter, its base model is missing or does not fit, or `output` exists.
    """
    refuse_without_peft()
    target = Path(output)
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise ValueError(f"{output} exists; choose another output, or remove it.")
    folder = _local(adapter)
    if not (folder / ADAPTER_CONFIG).is_file():
        inner = folder / "adapter"
        hint = f"; there is one in {inner}" if (inner / ADAPTER_CONFIG).is_file() else ""
        raise ValueError(f"{adapter} holds no adapter: it has no {ADAPTER_CONFIG}{hint}.")
    try:
        base = base or base_of_adapter(folder)
        if base is None:
            raise ValueError("a config.json beside the adapter says that the folder is a whole model")
        if (Path(base) / ADAPTER_CONFIG).is_file():
            raise ValueError(f"{base} is an adapter too; merge that first")
        model, processor = load(base, dtype or _dtype_of(base))
    except ValueError as error:
        reason = str(error).rstrip(".")
        raise ValueError(
            f"The model that {adapter} was trained on cannot be loaded ({reason}); name it with --base."
        ) from error
    if (folder / "processor_config.json").is_file():
        processor = PrefixVLMProcessor.from_pretrained(folder)
    model = merged(folder, model)
    with complete_or_absent(target) as partial:
        model.save_pretrained(partial)
        processor.save_pretrained(partial)


def _local(name: str) -> Path:
    """The folder of an adapter, downloaded if it is on the Hub."""
    refuse_missing_path(name)
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name))
    except (OSError, ValueError) as error:
        raise ValueError(f"There is no adapter {name}, neither a folder nor on the Hub ({one_line(error)}).") from error


def _dtype_of(base: str) -> str:
    refuse_another_type(base)
    name = str(PrefixVLMConfig.from_pretrained(base).dtype).removeprefix("torch.")
    return name if name in DTYPES else "float32"
