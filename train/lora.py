"""Low-rank adapters (LoRA) through peft: which layers get them, how they are saved, and how they go back into the model."""

from pathlib import Path

import torch

from prefixvlm.train.recipe import LoraRecipe
from prefixvlm.train.stages import Stage

# by the names that SigLIP, CLIP, Qwen, Llama and their kin give to attention and MLP layers
LAYERS = {
    "vision_tower": "q_proj|k_proj|v_proj|out_proj|fc1|fc2",
    "projector": "linear_1|linear_2",
    "language_model": "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj",
}
QUANTIZED = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}


def target_pattern(modules: list[str]) -> str:
    """A regular expression for whole paths of layers: a mere suffix such as q_proj would also hit the image encoder."""
    return "|".join(rf"(?:.*\.)?{module}\..*?(?:{LAYERS[module]})" for module in modules)


def add_adapters(model, recipe: LoraRecipe, stage: Stage):
    """The model with adapters on `recipe.modules`; a projector that the stage trains and that has none trains in full.

    Raises:
        ValueError: if peft is missing, or a module that is to have adapters has a learning rate of 0.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ValueError("LoRA needs peft; run: pip install 'prefixvlm[train]'") from error
    still = [module for module in recipe.modules if not stage.learning_rates[module]]
    if still:
        raise ValueError(
            f"Stage {stage.number}: lora.modules has {', '.join(still)}, whose learning rate is 0; set {still[0]}_lr."
        )
    in_full = ["projector"] if stage.projector_lr and "projector" not in recipe.modules else None
    config = LoraConfig(
        r=recipe.r,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        target_modules=target_pattern(recipe.modules),
        modules_to_save=in_full,
    )
    return get_peft_model(model, config)


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
    # the head and what reads images stay exact: they are small, and the head shares its weights with the embeddings
    return BitsAndBytesConfig(**options, llm_int8_skip_modules=["lm_head", "projector", "vision_tower"])


def merged(folder: Path, base):
    """The base model with the adapters of `folder` added to its weights: a plain PrefixVLM again."""
    from peft import PeftModel

    return PeftModel.from_pretrained(base, str(folder)).merge_and_unload()
