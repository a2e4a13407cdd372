"""Loading a saved PrefixVLM and its processor, in a chosen dtype or quantised."""

from typing import Any

import torch

from prefixvlm.inference.auto import PrefixVLMForConditionalGeneration, PrefixVLMProcessor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
QUANTIZED: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}


def load(folder: str, dtype: str = "float32", quantize: str | None = None):
    """Loads a saved PrefixVLM and its processor.

    Args:
        folder: folder or Hub id.
        dtype: of the weights, one of `DTYPES`.
        quantize: `nf4` or `int8`, to train adapters on a quantised base model.

    Raises:
        ValueError: if the folder holds no PrefixVLM, naming the folder.
    """
    options = {"quantization_config": quantization(quantize, dtype_named(dtype))} if quantize else {}
    try:
        model = PrefixVLMForConditionalGeneration.from_pretrained(folder, dtype=dtype_named(dtype), **options)
        processor = PrefixVLMProcessor.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{folder} is not a PrefixVLM that can be loaded ({' '.join(str(error).split())[:200]})."
        ) from error
    model.set_stop_tokens(processor.tokenizer)  # whoever saved it may not have
    return model, processor


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
