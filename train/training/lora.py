"""Low-rank adapters (LoRA) through peft: which layers get them, how they are saved, and how they go back into the model."""

from collections.abc import Sequence
from pathlib import Path

from prefixvlm.train.recipes.schema import LoraRecipe
from prefixvlm.train.recipes.stages import Stage

# by the names that SigLIP, CLIP, Qwen, Llama and similar models give to attention and MLP layers
LAYERS = {
    "vision_tower": "q_proj|k_proj|v_proj|out_proj|fc1|fc2",
    "projector": "linear_1|linear_2",
    "language_model": "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj",
}


def target_pattern(modules: Sequence[str]) -> str:
    """A regular expression for whole paths of layers: a suffix such as q_proj alone would also match the image encoder."""
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


def merged(folder: Path, base):
    """The base model with the adapters of `folder` added to its weights: a plain PrefixVLM again."""
    from peft import PeftModel

    return PeftModel.from_pretrained(base, str(folder)).merge_and_unload()
