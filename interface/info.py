"""What a model is made of, in numbers (Table IV)."""

from pathlib import Path

import torch

from prefixvlm.configuration.configuration_prefix_vlm import PRESETS
from prefixvlm.inference.auto import PrefixVLMConfig, PrefixVLMForConditionalGeneration
from prefixvlm.inference.loading import refuse_another_type
from prefixvlm.train.recipes.stages import MODULES, PAPER_STAGES
from prefixvlm.train.training.cost import training_flops

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
        f"Projector: {model.projector.linear_1.in_features} -> {hidden} -> {config.text_config.hidden_size}. The paper "
        "names two layers and 18 M parameters, not the width between: 8960 gives 18.36 M, the text width 896 gives 1.84 M.",
        f"Image tokens: {config.num_image_tokens} ({config.vision_config.image_size} pixels, patches of "
        f"{config.vision_config.patch_size}{_compression(config)}).",
        f"Attention: {config.attention_mode}.",
        "",
        f"FLOPs of one training sample, an image and {TEXT_TOKENS} text tokens (2 a weight and token forward, 2 more where "
        "gradients run back, 2 more where weights train; attention scores counted in full):",
    ]
    tokens = config.num_image_tokens + TEXT_TOKENS
    for number, stage in PAPER_STAGES.items():
        flops = training_flops(model, stage.trains, 1, tokens, tokens**2, TEXT_TOKENS)
        lines.append(f"  stage {number}: {flops / 1e9:,.1f} GFLOPs")
    return "\n".join(lines)


def _compression(config: PrefixVLMConfig) -> str:
    for name in ("pixel_shuffle", "mean_pooling"):
        if (group := getattr(config, name)) > 1:
            return f", {name} {group}"
    return ""


def _config(name: str) -> PrefixVLMConfig:
    if name in PRESETS:
        return PrefixVLMConfig.from_preset(name)
    if not Path(name).exists() and "/" not in name:
        raise ValueError(
            f"There is no preset or folder {name}; presets are {', '.join(PRESETS)}, and a Hub id has a slash."
        )
    refuse_another_type(name)
    return PrefixVLMConfig.from_pretrained(name)
