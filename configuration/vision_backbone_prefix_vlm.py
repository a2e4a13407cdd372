"""What a pretrained vision backbone brings: its configuration at the size that its pictures get, and its preprocessor.

Model and processor are joined apart from each other, and agree because both ask here.

This file travels to the Hub with every checkpoint, so it imports only torch, transformers and PIL.

Shapes: C channels, S side of a picture, G patches along a side.
"""

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModel, PretrainedConfig
from transformers.utils import logging, requires_backends

logger = logging.get_logger(__name__)

TIMM = "timm_wrapper"
TIMM_RESAMPLING = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}  # as Pillow numbers them
# what another preprocessor takes over: how values are scaled and by which filter pictures are resized
SCALING = ("image_mean", "image_std", "rescale_factor", "resample", "do_rescale", "do_normalize")
STRIPE = 2  # pixels at an edge that are looked for


@dataclass
class VisionBackbone:
    """A vision model on the Hub or in a folder, its weights not loaded.

    name: its Hub id or folder.
    config: of the image tower, for pictures of `config.image_size`.
    checkpoint_size: the side of the pictures that its position embeddings were trained for.
    preprocessor: its own image processor, `None` in a folder of weights alone.
    """

    name: str
    config: PretrainedConfig
    checkpoint_size: int
    preprocessor: Any

    @property
    def patch_grid(self) -> int:
        return self.config.image_size // self.config.patch_size

    def image_processor(self, center_crop: bool = False):
        """The image processor for whole pictures, resized to S x S: its own if it makes those, else one scaled like it.

        Args:
            center_crop: keep its own, even if it cuts off the edges of pictures.

        Raises:
            ValueError: for a centre crop of another size than the model's, or if there is none to keep.
        """
        size, own = self.config.image_size, self.preprocessor
        if center_crop:
            if own is None or _side(own, size) != size:
                raise ValueError(
                    f"{self.name} has no preprocessor of its own that makes pictures of {size} x {size} pixels; leave out "
                    "center_crop, or image_size."
                )
            return own
        if own is None:
            return siglip_image_processor(size)
        is_square, is_whole = _side(own, size) == size, _shows_the_edges(own, size)
        if is_square and is_whole:
            return own
        if not is_whole:
            logger.warning_once(
                f"The preprocessor of {self.name} cuts off the edges of pictures; whole pictures are resized to {size} x "
                f"{size} pixels instead. To keep the cut, pass center_crop=True (in a recipe: model.center_crop)."
            )
        return siglip_image_processor(size, **{name: getattr(own, name) for name in SCALING if hasattr(own, name)})


def vision_backbone(name: str, image_size: int | None = None, **hub) -> VisionBackbone:
    """Reads what a vision backbone is; of a model of two towers, the image tower.

    Args:
        image_size: S; by default that of the pictures which its preprocessor makes, or else what its configuration says.
        hub: arguments of transformers for the Hub.

    Raises:
        ValueError: for a model without a fixed square size or square patches, a size that its patches do not fill, or a
            model of timm without timm.
    """
    try:
        config = AutoConfig.from_pretrained(name, **hub)
        if config.model_type == TIMM:
            requires_backends(config, "timm")
    except ImportError as error:
        raise ValueError(f"{name} is a model of timm, which is missing; run: pip install 'prefixvlm[timm]'") from error
    config = getattr(config, "vision_config", config)
    if config.model_type == TIMM:
        preprocessor = _timm_preprocessor(config)
        config.image_size = image_size or (preprocessor.crop_size["height"] if preprocessor else None)
    if not isinstance(getattr(config, "image_size", None), int):
        raise ValueError(
            f"{name} is a {config.model_type} model without a fixed square image size; choose a SigLIP, SigLIP 2, CLIP, "
            "DINOv2 or ViT model of fixed resolution."
        )
    if config.model_type == TIMM:
        _measure_timm(name, config)
        return VisionBackbone(name, config, config.image_size, preprocessor)
    if not isinstance(getattr(config, "patch_size", None), int):
        raise ValueError(f"{name} is a {config.model_type} model without square patches; choose another vision model.")
    checkpoint_size, patch = config.image_size, config.patch_size
    preprocessor = _preprocessor(name, **hub)
    if image_size is None and preprocessor is not None:
        config.image_size = _side(preprocessor, checkpoint_size) or checkpoint_size
    elif image_size is not None and image_size != checkpoint_size:
        if image_size < patch or image_size % patch:
            lower = max(image_size // patch, 1) * patch
            raise ValueError(
                f"image_size is {image_size}, which patches of {patch} pixels do not fill; choose {lower} or "
                f"{lower + patch}."
            )
        config.image_size = image_size
    return VisionBackbone(name, config, checkpoint_size, preprocessor)


def siglip_image_processor(image_size: int, **kwargs):
    """SigLIP's image processor for square images of `image_size` pixels; needs no torchvision."""
    return _without_torchvision("SiglipImageProcessor")(size={"height": image_size, "width": image_size}, **kwargs)


def _without_torchvision(name: str):
    # on transformers 5 the plain name is the class for torchvision, and merely accessing it warns
    pil = f"{name}Pil"
    return getattr(transformers, pil if hasattr(transformers, pil) else name)


def _preprocessor(name: str, **hub):
    try:
        return AutoImageProcessor.from_pretrained(name, **hub)
    except OSError:  # a folder of weights alone
        return None


def _side(image_processor, size: int) -> int | None:
    """S of the picture that an image processor makes of a square one and of a wide one; `None` if those differ."""
    shapes = [_pixels(image_processor, Image.new("RGB", (width, size))).shape[-2:] for width in (size, 2 * size)]
    sides = {side for shape in shapes for side in shape}
    return sides.pop() if len(sides) == 1 else None


def _shows_the_edges(image_processor, size: int) -> bool:
    """Whether stripes at the left and right edge of a wide picture change anything in what an image processor makes."""
    plain = Image.new("RGB", (2 * size, size))
    striped = plain.copy()
    for left in (0, 2 * size - STRIPE):
        striped.paste((255, 255, 255), (left, 0, left + STRIPE, size))
    return not torch.equal(_pixels(image_processor, plain), _pixels(image_processor, striped))


def _pixels(image_processor, picture: Image.Image) -> torch.Tensor:
    """(C, S, S)."""
    return image_processor(images=picture, return_tensors="pt")["pixel_values"][0]


def _timm_preprocessor(config):
    """What timm does to pictures, by the `pretrained_cfg` of a model; its own class needs torchvision and is not saved."""
    settings = getattr(config, "pretrained_cfg", None) or {}
    if "input_size" not in settings:
        return None
    side = settings["input_size"][-1]
    return _without_torchvision("CLIPImageProcessor")(
        size={"shortest_edge": int(side / settings.get("crop_pct", 0.875))},
        crop_size={"height": side, "width": side},
        resample=TIMM_RESAMPLING.get(settings.get("interpolation", "bicubic"), TIMM_RESAMPLING["bicubic"]),
        **{f"image_{name}": list(settings[name]) for name in ("mean", "std") if name in settings},
    )


def _measure_timm(name: str, config) -> None:
    """Writes width and effective patch size of a timm model into its configuration, found with a blank picture."""
    size = config.image_size
    with torch.device("meta"), torch.no_grad():
        model = AutoModel.from_config(config).eval()
        features = model(torch.zeros(1, 3, size, size), do_pooling=False).last_hidden_state
    shape = list(features.shape)
    grid = shape[-1]
    if len(shape) != 4 or shape[1] != model.timm_model.num_features or shape[2] != grid:
        raise ValueError(
            f"The features of {name} are not a square map of {model.timm_model.num_features} channels, but {shape}; choose "
            "a convolutional or hybrid timm model, or a ViT of transformers."
        )
    config.hidden_size, config.patch_size = shape[1], size // grid
    if size // config.patch_size != grid:
        raise ValueError(
            f"{name} makes {grid} x {grid} features of a picture of {size} x {size} pixels; choose an image_size that is a "
            f"multiple of {grid}."
        )
