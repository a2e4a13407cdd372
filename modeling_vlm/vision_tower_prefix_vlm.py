"""The vision encoder: built, or loaded for pictures of another size, with the layers and parts that are read, no others.

This file travels to the Hub with every checkpoint, so it imports only torch, transformers and its own siblings.

Shapes: I images, C channels, S side of an image, G patches along a side, n positions (patches and class tokens), D width.
"""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import logging

from ..configuration.configuration_prefix_vlm import PrefixVLMConfig
from ..configuration.vision_backbone_prefix_vlm import TIMM, VisionBackbone

# the norm between the last layer and what the encoder returns, which hidden states of an earlier layer do not pass
FINAL_NORMS = {
    "siglip_vision_model": "post_layernorm",
    "clip_vision_model": None,
    "dinov2": "layernorm",
    "dinov2_with_registers": "layernorm",
    "vit": "layernorm",
    "deit": "layernorm",
}


class PrefixVLMVisionTower(nn.Module):
    """Wraps a vision model whose class has no `vision_model` level of its own.

    transformers 5 removed that level from SigLIP and CLIP; with it, weights have the same names on 4.x and 5.x.
    """

    def __init__(self, vision_model: nn.Module):
        super().__init__()
        self.vision_model = vision_model

    def forward(self, **kwargs):
        return self.vision_model(**kwargs)


class PrefixVLMTimmTower(nn.Module):
    """A timm model without transformers' wrapper, which names its weights differently on 4.x and 5.x."""

    def __init__(self, timm_model: Any):
        super().__init__()
        self.vision_model = timm_model

    def forward(self, pixel_values: torch.Tensor, return_dict: bool = True):
        features = self.vision_model.forward_features(pixel_values)  # (I, D, G, G)
        return BaseModelOutput(last_hidden_state=features.flatten(2).transpose(1, 2))

    def train(self, mode: bool = True):
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _BatchNorm):  # batches are too small, and a frozen encoder must stay as it is
                module.eval()
        return self


def build_tower(config: PrefixVLMConfig) -> nn.Module:
    """The vision tower with random weights.

    Raises:
        ValueError: for hidden states of an earlier layer of an encoder whose final norm is not known here.
    """
    return _tower(AutoModel.from_config(_tower_config(config, config.vision_config.image_size)), config)


def load_tower(backbone: VisionBackbone, config: PrefixVLMConfig, **weights) -> nn.Module:
    """The vision tower with a backbone's weights, its position embeddings interpolated to the images' size.

    Args:
        weights: arguments of `from_pretrained`.

    Raises:
        ValueError: as `build_tower`; if weights are missing, or depend on the image size in an unknown way.
    """
    own_config = _tower_config(config, backbone.checkpoint_size)
    model_class = AutoModel._model_mapping[type(own_config)]
    with _unread_weights_untold():
        model, report = model_class.from_pretrained(backbone.name, config=own_config, output_loading_info=True, **weights)
    names = {id(value): name for name, value in model.state_dict(keep_vars=True).items()}
    tower = _tower(model, config)
    read = {names[id(value)] for value in tower.state_dict(keep_vars=True).values() if id(value) in names}
    if missing := sorted(read.intersection(report["missing_keys"])):
        raise ValueError(f"{backbone.name} lacks weights of the vision encoder: {missing[:3]}.")
    if own_config.image_size == config.vision_config.image_size:
        return tower
    resized = build_tower(config).to(device=model.device, dtype=model.dtype)
    grids = own_config.image_size // own_config.patch_size, config.patch_grid
    # as the class itself would do it
    how = {"mode": "bicubic", "align_corners": False, "antialias": own_config.model_type == "dinov2_with_registers"}
    shapes = {name: value.shape for name, value in resized.state_dict().items()}
    resized.load_state_dict(
        {
            name: value
            if value.shape == shapes[name]
            else _resized(f"{name} of {backbone.name}", value, shapes[name], grids, how)
            for name, value in tower.state_dict().items()
        }
    )
    return resized.eval()


@contextmanager
def _unread_weights_untold() -> Iterator[None]:
    """transformers would list the weights of poolers and of layers above the one that is read; what lacks is an error."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _tower_config(config: PrefixVLMConfig, image_size: int) -> PretrainedConfig:
    """The encoder's own configuration for images of a size: of the layers that are read."""
    vision, layers = config.vision_config, config.num_vision_layers
    if layers == getattr(vision, "num_hidden_layers", None) and image_size == vision.image_size:
        return vision
    vision = copy.deepcopy(vision)
    vision.image_size = image_size
    if layers is not None:
        vision.num_hidden_layers = layers
    return vision


def _tower(model: PreTrainedModel, config: PrefixVLMConfig) -> nn.Module:
    """An encoder without the parts that patch features do not pass: they would get no gradient, which DDP refuses."""
    kind = config.vision_config.model_type
    if kind == TIMM:
        return PrefixVLMTimmTower(model.timm_model)
    inner = getattr(model, "vision_model", model)
    if getattr(inner, "pooler", None) is not None:
        inner.pooler = None
    if kind == "clip_vision_model":
        inner.post_layernorm = nn.Identity()  # of the class token alone
    embeddings = getattr(inner, "embeddings", None)
    if embeddings is not None and isinstance(getattr(embeddings, "mask_token", None), nn.Parameter):
        unread = torch.zeros(embeddings.mask_token.shape)  # of its own: a parameter may still be on the meta device
        del embeddings.mask_token
        embeddings.register_buffer("mask_token", unread, persistent=False)
    if config.num_vision_layers != getattr(config.vision_config, "num_hidden_layers", None):
        if kind not in FINAL_NORMS:
            raise ValueError(
                f"vision_feature_layer is {config.vision_feature_layer}, but of a {kind} encoder only the last layer can "
                f"be read; leave it at -1, or choose one of {', '.join(FINAL_NORMS)}."
            )
        if norm := FINAL_NORMS[kind]:
            setattr(inner, norm, nn.Identity())
    return model if inner is not model else PrefixVLMVisionTower(model)


def _resized(name: str, table: torch.Tensor, shape: torch.Size, grids: tuple[int, int], how: dict) -> torch.Tensor:
    """Position embeddings (n, D) or (1, n, D), interpolated; those of class tokens stay.

    Args:
        name: of the table, for errors.
        shape: of the result.
        grids: G of the table and of the result.
        how: arguments of torch's `interpolate`.

    Raises:
        ValueError: if a tensor of this shape cannot be a table of positions.
    """
    old, new = grids
    others = table.shape[-2] - old**2 if table.ndim > 1 else -1
    if others < 0 or shape != (*table.shape[:-2], others + new**2, table.shape[-1]):
        raise ValueError(
            f"{name} is {tuple(table.shape)}, but {tuple(shape)} for images of another size, and is no table of positions; "
            "leave out image_size."
        )
    kept, patches = table[..., :others, :], table[..., others:, :]
    square = patches.reshape(1, old, old, -1).permute(0, 3, 1, 2).float()
    square = nn.functional.interpolate(square, size=(new, new), **how)
    patches = square.permute(0, 2, 3, 1).reshape(*table.shape[:-2], new**2, -1).to(table.dtype)
    return torch.cat([kept, patches], dim=-2)


class PatchGroups(nn.Module):
    """Neighbouring patches, s x s, in one: side by side (pixel shuffle) or averaged."""

    def __init__(self, pixel_shuffle: int, mean_pooling: int):
        super().__init__()
        self.side, self.averages = max(pixel_shuffle, mean_pooling), mean_pooling > 1

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(I, G*G, D) to (I, (G/s)*(G/s), s*s*D), or D of means; groups, and patches inside one, row by row."""
        if self.side == 1:
            return features
        rows = math.isqrt(features.shape[1]) // self.side
        groups = features.unflatten(1, (rows, self.side, rows, self.side)).transpose(2, 3).flatten(1, 2)
        return groups.mean(dim=(2, 3)) if self.averages else groups.flatten(2)
