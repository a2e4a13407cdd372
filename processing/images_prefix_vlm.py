"""Loads any picture as an upright RGB image, or says in one sentence which picture is wrong and why."""

import base64
import io
import os
from collections.abc import Callable
from urllib.request import Request, urlopen

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from transformers.utils import logging

logger = logging.get_logger(__name__)

URLS = ("http://", "https://")
URL_TIMEOUT = 60  # seconds
WHITE = (255, 255, 255, 255)
CHANNEL_COUNTS = (1, 3, 4)
ORIENTATION = 0x0112  # the EXIF tag
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_image(source, name: str = "the image") -> Image.Image:
    """Opens, checks and decodes one image.

    Args:
        source: a PIL image, path, URL, bytes, open file, array (H, W, C) or (H, W), tensor (C, H, W), or the
            `{"bytes": ..., "path": ...}` of a datasets row.
        name: what errors call an image that has no path.

    Returns:
        An RGB image, rotated as its EXIF tag says, transparent parts on white. 8 bits, and floats of 0 to 1 or 0 to 255,
        stay as they are; 16 bits become 8 if the largest value reaches their upper half. All else is stretched from the
        lowest to the largest value of the image, which is logged once.

    Raises:
        ValueError: if it is missing, truncated, no image, or larger than `PIL.Image.MAX_IMAGE_PIXELS`, or has NaN or
            infinite values.
    """
    return _opened(source, name, _to_rgb)


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
            request = Request(source, headers={"User-Agent": "PrefixVLM"})  # some sites refuse Python's own name
            with urlopen(request, timeout=URL_TIMEOUT) as answer:
                return Image.open(io.BytesIO(answer.read()))
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
    if is_tensor and source.dtype == torch.bfloat16:  # which numpy does not have
        source = source.float()
    values = source.detach().cpu().numpy() if is_tensor else np.asarray(source)
    if values.ndim == 3:
        can_be_first, can_be_last = values.shape[0] in CHANNEL_COUNTS, values.shape[-1] in CHANNEL_COUNTS
        if can_be_first and (is_tensor or not can_be_last):
            values = np.moveaxis(values, 0, -1)
        if values.shape[-1] == 1:
            values = values[..., 0]
    return Image.fromarray(np.ascontiguousarray(_to_8_bits(values)))


def _to_8_bits(values: np.ndarray) -> np.ndarray:
    """Scales values (H, W) or (H, W, channels) to 8 bits, all colours alike."""
    if values.dtype == np.uint8 or not values.size:
        return values
    if values.dtype.kind not in "buif":
        raise ValueError(f"its values are of type {values.dtype}; pass numbers")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise ValueError("it has values that are NaN or infinite; replace them")
    if values.ndim == 3 and values.shape[-1] == 4:
        colours, alpha = values[..., :3], values[..., 3:]
        opaque = _limits(alpha)[1]
        return np.concatenate([_scaled(colours, *_limits(colours)), _scaled(alpha, 0, opaque)], axis=-1)
    return _scaled(values, *_limits(values))


def _limits(values: np.ndarray) -> tuple[float, float]:
    """The values that become black and white.

    Pictures of 12 bits often come in 16, and would be black in that range. So a range of more than 8 bits counts only if
    the largest value reaches its upper half; else the picture's own lowest and largest values do, whatever their type.
    """
    lowest, largest = values.min().item(), values.max().item()
    kind, size = values.dtype.kind, values.dtype.itemsize
    if kind == "b":
        return 0, 1
    if lowest >= 0 and kind == "f":
        if largest <= 1:
            return 0, 1
        if 2 <= largest <= 255:  # between 1 and 2 it is one of 0 to 1 that is too bright
            return 0, 255
    elif lowest >= 0:
        # colours of 0 to 255 have 8 bits in every type, and int64 is what numpy and torch make of any integers
        if largest <= 255 and (values.ndim == 3 or size in (1, 8)):
            return 0, 255
        full = 2**16 - 1 if largest < 2**16 else 2**32 - 1
        if full < 2 * largest <= 2 * full:
            return 0, full
    logger.warning_once(
        "An image of more than 8 bits has negative values or does not use the upper half of its range: its lowest value "
        "becomes black, its largest white. This is said once, and done with every such image."
    )
    return lowest, largest


def _scaled(values: np.ndarray, low: float, high: float) -> np.ndarray:
    if high == low:
        return np.zeros(values.shape, np.uint8)
    if values.dtype.kind != "f" and high - low < 2**32:
        return ((values.astype(np.int64) - low) * 255 // (high - low)).astype(np.uint8)
    return np.rint((values.astype(np.float64) - low) / (high - low) * 255).astype(np.uint8)


def _to_rgb(image: Image.Image) -> Image.Image:
    image = _upright(image)
    if image.mode[0] in "IF":  # I, I;16 and its variants, F
        image = Image.fromarray(_to_8_bits(np.asarray(image)))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, WHITE), image)
    return image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF tag says. `ImageOps.exif_transpose` would fail for any damage in the EXIF block."""
    image.load()  # damaged pixels are an error, a damaged EXIF block is not
    try:
        turn = TURNS.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # of many kinds
        return image
    return image if turn is None else image.transpose(turn)
