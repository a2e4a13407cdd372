"""What a model is made of, in numbers (Table IV)."""

from pathlib import Path

import torch

from prefixvlm.configuration.configuration_prefix_vlm import PRESETS
from prefixvlm.inference.auto import PrefixVLMConfig, PrefixVLMForConditionalGeneration
from prefixvlm.inference.loading import refuse_another_type
from prefixvlm.train.recipes.stages import MODULES, PAPER_STAGES
from prefixvlm.train.training.cost import training_flops

TEXT_TOKENS = 128  # of the sample that FLOPs are counted for
COMPRESSIONS = ("pixel_shuffle", "mean_pooling")  # of image tokens, in the projector
PAPER_MILLIONS = {"vision_tower": 400, "projector": 18, "language_model": 500}  # Table IV


def count(name: str) -> dict:
    """The numbers of a preset, folder or Hub id: parameters by module, image tokens, FLOPs of one training sample by stage.

    Raises:
        ValueError: if there is no such model.
    """
    config = _config(name)
    with torch.device("meta"):  # shapes are enough to count
        model = PrefixVLMForConditionalGeneration(config)
    tokens = config.num_image_tokens + TEXT_TOKENS
    text_size = config.text_config.hidden_size
    return {
        "parameters": {module: sum(p.numel() for p in getattr(model, module).parameters()) for module in MODULES},
        "projector": [model.projector.linear_1.in_features, config.projector_hidden_size or text_size, text_size],
        "image_tokens": config.num_image_tokens,
        "image_size": config.vision_config.image_size,
        "patch_size": config.vision_config.patch_size,
        **{name: getattr(config, name) for name in COMPRESSIONS},
        "attention_mode": config.attention_mode,
        "text_tokens": TEXT_TOKENS,
        "training_flops": {
            number: training_flops(model, stage.trains, 1, tokens, tokens**2, TEXT_TOKENS)
            for number, stage in PAPER_STAGES.items()
        },
    }


def as_text(found: dict) -> str:
    """A page of text with the paper's numbers beside these."""
    lines = [f"{'module':<16}{'parameters':>14}{'paper':>10}"]
    for module, parameters in found["parameters"].items():
        lines.append(f"{module:<16}{parameters:>14,}{PAPER_MILLIONS[module]:>8} M")
    compression = "".join(f", {name} {found[name]}" for name in COMPRESSIONS if found[name] > 1)
    lines += [
        f"{'total':<16}{sum(found['parameters'].values()):>14,}{900:>8} M",
        "",
        f"Projector: {' -> '.join(map(str, found['projector']))}. The paper names two layers and 18 M parameters, not the "
        "width between: 8960 gives 18.36 M, the text width 896 gives 1.84 M.",
        f"Image tokens: {found['image_tokens']} ({found['image_size']} pixels, patches of "
        f"{found['patch_size']}{compression}).",
        f"Attention: {found['attention_mode']}.",
        "",
        f"FLOPs of one training sample, an image and {found['text_tokens']} text tokens (2 a weight and token forward, 2 "
        "more where gradients run back, 2 more where weights train; attention scores counted in full):",
        *(f"  stage {number}: {flops / 1e9:,.1f} GFLOPs" for number, flops in found["training_flops"].items()),
    ]
    return "\n".join(lines)


def _config(name: str) -> PrefixVLMConfig:
    if name in PRESETS:
        return PrefixVLMConfig.from_preset(name)
    if not Path(name).exists() and "/" not in name:
        raise ValueError(
            f"There is no preset or folder {name}; presets are {', '.join(PRESETS)}, and a Hub id has a slash."
        )
    refuse_another_type(name)
    return PrefixVLMConfig.from_pretrained(name)
