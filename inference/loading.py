"""Loading a saved PrefixVLM and its processor, in a chosen dtype or quantised."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers.utils import find_adapter_config_file

from prefixvlm.inference.auto import PrefixVLMConfig, PrefixVLMForConditionalGeneration, PrefixVLMProcessor
from prefixvlm.inference.environment import fast_dtype

ADAPTER_CONFIG = "adapter_config.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
QUANTIZED: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}


def load(
    folder: str,
    dtype: str | None = "float32",
    quantize: str | None = None,
    device: torch.device | None = None,
    device_map=None,
    **hub,
):
    """Loads a saved PrefixVLM and its processor.

    Args:
        folder: folder or Hub id; of an adapter (LoRA), its base model is loaded with it.
        dtype: of the weights, one of `DTYPES`; `None` for what is fast on `device`.
        quantize: `nf4` or `int8`, to train adapters on a quantised base model.
        device: where the weights go; by default they stay on the CPU, from where a trainer takes them.
        device_map: as in transformers, instead of `device`; needs accelerate.
        hub: `revision`, `token` and `cache_dir`, as in transformers.

    Raises:
        ValueError: if the folder holds no PrefixVLM, naming the folder.
    """
    of_weights = fast_dtype(device or torch.device("cpu")) if dtype is None else dtype_named(dtype)
    options: dict[str, Any] = {"quantization_config": quantization(quantize, of_weights)} if quantize else {}
    if device_map is not None:
        options["device_map"] = device_map
    base = base_of_adapter(folder)
    try:
        refuse_another_type(base or folder, **hub)
    except ValueError:
        adapter = None if base else _adapter_on_hub(folder, **hub)
        if adapter is None:
            raise
        folder, base = adapter, base_of_adapter(adapter)
        hub.pop("revision", None)  # is not that of the base model
        refuse_another_type(base or folder, **hub)
    try:
        model, report = PrefixVLMForConditionalGeneration.from_pretrained(
            folder, dtype=of_weights, output_loading_info=True, **options, **hub
        )
        if report["missing_keys"] and not quantize:  # transformers would draw them at random
            raise ValueError(f"it lacks weights, such as {min(report['missing_keys'])}")
        with_processor = base if base and not Path(folder, "processor_config.json").is_file() else folder
        processor = PrefixVLMProcessor.from_pretrained(with_processor, **hub)
    except ImportError:
        raise
    except Exception as error:  # transformers, tokenizers and safetensors raise errors of many kinds
        raise ValueError(f"{folder} is not a PrefixVLM that can be loaded ({one_line(error)}).") from error
    model.set_stop_tokens(processor.tokenizer)  # whoever saved it may not have
    return model if device is None else model.to(device), processor


def base_of_adapter(folder: str | Path) -> str | None:
    """The model that the adapter in a folder was trained on; `None` for a folder that is or has no adapter alone.

    Raises:
        ValueError: if the adapter does not say so.
    """
    path = Path(folder, ADAPTER_CONFIG)
    if not path.is_file() or Path(folder, "config.json").is_file():
        return None
    try:
        base = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({type(error).__name__}: {one_line(error)}).") from error
    if not base:
        raise ValueError(f"{path} does not say which model the adapter was trained on.")
    return base


def _adapter_on_hub(name: str, **hub) -> str | None:
    """The whole folder of an adapter from the Hub, as transformers 4 forgets `cache_dir`; `None` if there is none."""
    try:
        return snapshot_download(name, **hub) if find_adapter_config_file(name, **hub) else None
    except (OSError, ValueError):
        return None


def refuse_another_type(name: str, **hub) -> None:
    """Raises a ValueError unless a folder or Hub id has the configuration of a PrefixVLM; the disk is looked at first."""
    refuse_missing_path(name)
    try:
        values, _ = PrefixVLMConfig.get_config_dict(name, **hub)
    except Exception as error:  # of the Hub's client too, which raises its own kinds
        raise ValueError(f"{name} is not a PrefixVLM that can be loaded ({one_line(error)}).") from error
    if (kind := values.get("model_type")) != PrefixVLMConfig.model_type:
        found = f"it is a {kind}" if kind else "it has no config.json"
        raise ValueError(f"{name} is not a PrefixVLM that can be loaded ({found}).")


def refuse_missing_path(name: str) -> None:
    """Raises a ValueError for what can only be a path, since no Hub id looks like it, and leads to nothing."""
    is_path = name.startswith(("/", ".", "~")) or name.endswith("/") or name.count("/") > 1 or re.match(r"\w:|.*\\", name)
    if is_path and not Path(name).exists():
        raise ValueError(f"{name}: there is no such file or folder.")


def dtype_named(name: str) -> torch.dtype:
    """The dtype that a recipe or the command line names.

    Raises:
        ValueError: for another name.
    """
    if name not in DTYPES:
        raise ValueError(f"The dtype is {name!r}; choose one of {', '.join(DTYPES)}.")
    return DTYPES[name]


def quantization(kind: str, dtype: torch.dtype):
    """transformers' configuration for a base model in 4 or 8 bits (QLoRA).

    Raises:
        ValueError: if bitsandbytes is missing.
    """
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ValueError(f"lora.quantize: {kind} needs bitsandbytes; run: pip install bitsandbytes") from error
    from transformers import BitsAndBytesConfig

    options = dict(QUANTIZED[kind])
    if kind == "nf4":
        options["bnb_4bit_compute_dtype"] = dtype
    # the head and the image side are not quantised: they are small, and the head shares its weights with the embeddings
    return BitsAndBytesConfig(**options, llm_int8_skip_modules=["lm_head", "projector", "vision_tower"])


def one_line(error: Exception) -> str:
    """What an error says, in a line short enough to be part of a sentence."""
    return " ".join(str(error).split())[:200]
