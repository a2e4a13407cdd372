"""Loads any picture as an upright RGB image, or says in one sentence which picture is wrong and why."""

import base64
import io
import os
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers.image_utils import load_image as fetch_image

URLS = ("http://", "https://")
WHITE = (255, 255, 255, 255)
CHANNEL_COUNTS = (1, 3, 4)
SIXTEEN_BIT_STEP = 257  # 65535 / 255


def load_image(source, name: str = "the image") -> Image.Image:
    """Opens, checks and decodes one image.

    Args:
        source: a PIL image, path, URL, bytes, open file, array (H, W, C) or (H, W), tensor (C, H, W), or the
            `{"bytes": ..., "path": ...}` of a datasets row.
        name: what errors call an image that has no path.

    Returns:
        An RGB image, rotated as its EXIF tag says, transparent parts on white, 16-bit greys scaled to 8 bits.

    Raises:
        ValueError: if it is missing, truncated, no image, or larger than `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    return _opened(source, name, lambda image: _to_rgb(ImageOps.exif_transpose(image)))


def check_image(source, name: str = "the image") -> None:
    """Reads an image's header, at a fraction of the cost of decoding it. A URL is not fetched.

    Raises:
        ValueError: as `load_image`, as far as the header shows it.
    """
    if not (isinstance(source, str) and source.startswith(URLS)):
        _opened(source, name, lambda image: None)


def _opened(source, name: str, read: Callable):
    """Applies `read` to an opened image of permitted size; every error becomes a sentence that names the image."""
    if isinstance(source, dict):
        name = source.get("path") or name
        source = source["bytes"] if source.get("bytes") is not None else source.get("path")
    if isinstance(source, str | os.PathLike):
        if not str(source).startswith("data:"):  # of which the whole content would be the name
            name = str(source)
    elif isinstance(source, Image.Image):
        name = getattr(source, "filename", "") or name
    try:
        image = _open(source)
        pixels, limit = image.width * image.height, Image.MAX_IMAGE_PIXELS
        if not pixels:
            raise ValueError("it has no pixels")
        if limit and pixels > limit:
            raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels, the limit is {limit}")
        return read(image)
    except FileNotFoundError as error:
        raise ValueError(f"{name}: there is no such image file.") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{name} is too large ({error}); shrink it, or raise PIL.Image.MAX_IMAGE_PIXELS.") from error
    except Exception as error:  # on a damaged file the decoders raise errors of many kinds
        if isinstance(error, UnidentifiedImageError):
            reason = "it is in no image format that Pillow reads"
        else:
            reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{name} cannot be read as an image ({reason}); replace or remove it.") from error


def _open(source) -> Image.Image:
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, bytes | bytearray):
        return Image.open(io.BytesIO(source))
    if isinstance(source, str):
        if source.startswith(URLS):
            return fetch_image(source)
        if source.startswith("data:"):
            return Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))
    if isinstance(source, str | os.PathLike) or hasattr(source, "read"):
        return Image.open(source)
    if hasattr(source, "shape"):
        return _from_array(source)
    raise ValueError("nothing was given" if source is None else f"it is of type {type(source).__name__}")


def _from_array(source) -> Image.Image:
    """Channels last in an array and first in a tensor, or the other way round where the shape leaves no doubt."""
    is_tensor = torch.is_tensor(source)
    values = source.detach().cpu().numpy() if is_tensor else np.asarray(source)
    if values.ndim == 3:
        can_be_first, can_be_last = values.shape[0] in CHANNEL_COUNTS, values.shape[-1] in CHANNEL_COUNTS
        if can_be_first and (is_tensor or not can_be_last):
            values = np.moveaxis(values, 0, -1)
        if values.shape[-1] == 1:
            values = values[..., 0]
    if values.size and values.min() < 0:
        raise ValueError("it has negative values; pass 0 to 255, or 0 to 1 as floating point")
    return Image.fromarray(np.ascontiguousarray(_to_8_bits(values)))


def _to_8_bits(values: np.ndarray) -> np.ndarray:
    """Scales values to 8 bits; PIL would clip everything above 255, leaving a white square."""
    largest = values.max(initial=0)
    if values.dtype.kind == "f":
        values = np.rint(values * 255 if largest <= 1 else values)
    elif values.dtype.kind == "b":
        values = values * np.uint8(255)
    elif (values.dtype.kind == "u" and values.dtype.itemsize == 2) or largest > 255:
        values = values // SIXTEEN_BIT_STEP
    return values.clip(0, 255).astype(np.uint8)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode[0] in "IF":  # I, I;16 and its variants, F
        image = Image.fromarray(_to_8_bits(np.asarray(image)))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, WHITE), image)
    return image.convert("RGB")
