"""What a model is made of, in numbers (Table IV)."""

from pathlib import Path

import torch

from prefixvlm.auto import PrefixVLMConfig, PrefixVLMForConditionalGeneration
from prefixvlm.configuration.configuration_prefix_vlm import PRESETS
from prefixvlm.train.stages import MODULES, PAPER_STAGES

TEXT_TOKENS = 128  # of the sample that FLOPs are counted for
PAPER_MILLIONS = {"vision_tower": 400, "projector": 18, "language_model": 500}  # Table IV


def describe(name: str) -> str:
    """The parameter table, image tokens and FLOPs of a preset, folder or Hub id.

    Raises:
        ValueError: if there is no such model.
    """
    config = _config(name)
    with torch.device("meta"):  # shapes are enough to count
        model = PrefixVLMForConditionalGeneration(config)
    counts = {module: sum(p.numel() for p in getattr(model, module).parameters()) for module in MODULES}
    total = sum(counts.values())
    lines = [f"{'module':<16}{'parameters':>14}{'paper':>10}"]
    for module, count in counts.items():
        lines.append(f"{module:<16}{count:>14,}{PAPER_MILLIONS[module]:>8} M")
    lines.append(f"{'total':<16}{total:>14,}{900:>8} M")
    hidden = config.projector_hidden_size or config.text_config.hidden_size
    lines += [
        "",
        f"Projector: {config.vision_config.hidden_size} -> {hidden} -> {config.text_config.hidden_size}. The paper names "
        "two layers and 18 M parameters, not the width between: 8960 gives 18.36 M, the text width 896 gives 1.84 M.",
        f"Image tokens: {config.num_image_tokens} ({config.vision_config.image_size} pixels, patches of "
        f"{config.vision_config.patch_size}).",
        f"Attention: {config.attention_mode}.",
        "",
        f"FLOPs of one training sample, an image and {TEXT_TOKENS} text tokens (2 a weight and token forward, 2 more for "
        "activation gradients, 2 more for weight gradients where a module trains; attention scores not counted):",
    ]
    for number, stage in PAPER_STAGES.items():
        lines.append(f"  stage {number}: {training_flops(model, stage) / 1e9:,.1f} GFLOPs")
    return "\n".join(lines)


def training_flops(model, stage, text_tokens: int = TEXT_TOKENS) -> float:
    """Floating-point operations of one sample with one image in a stage, matrix products only."""
    patches = model.config.num_image_tokens
    embedding = model.get_input_embeddings().weight.numel()
    weights = {module: sum(p.numel() for p in getattr(model, module).parameters() if p.ndim > 1) for module in MODULES}
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    # an embedding that is not also the head is a look-up, and the head runs on text tokens only
    weights["language_model"] -= embedding if tied else 2 * embedding
    rates = stage.learning_rates
    flops = 0.0
    for module, tokens in (("vision_tower", patches), ("projector", patches), ("language_model", patches + text_tokens)):
        passes = 1
        if module != "vision_tower" or rates[module]:
            passes += 1  # the gradient runs through everything after the first module that trains
        if rates[module]:
            passes += 1
        flops += 2 * passes * weights[module] * tokens
    return flops + 2 * (3 if rates["language_model"] else 2) * embedding * text_tokens


def _config(name: str) -> PrefixVLMConfig:
    if name in PRESETS:
        return PrefixVLMConfig.from_preset(name)
    try:
        return PrefixVLMConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        where = "folder of a saved PrefixVLM" if Path(name).is_dir() else "preset, folder or Hub id that can be read"
        raise ValueError(f"{name} is no {where}; presets are {', '.join(PRESETS)}.") from error
