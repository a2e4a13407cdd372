"""Any picture to an upright RGB image, or one sentence that says which picture is wrong and why."""

import io
import os
import warnings

import numpy as np
from PIL import Image, ImageOps
from transformers.image_transforms import to_pil_image
from transformers.image_utils import load_image as fetch_image

WHITE = (255, 255, 255, 255)
SIXTEEN_BIT_STEP = 257  # 65535 / 255


def load_image(source, name: str = "the image") -> Image.Image:
    """Opens, checks and decodes one image.

    Args:
        source: a PIL image, path, URL, bytes, array or tensor, or the `{"bytes": ..., "path": ...}` of a datasets row.
        name: what to call an image that has no path of its own in an error.

    Returns:
        An RGB image, turned as its EXIF tag asks, transparent parts on white, 16-bit greys scaled to 8.

    Raises:
        ValueError: if it is missing, truncated, no image, or larger than `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    if isinstance(source, dict):
        name = source.get("path") or name
        source = source.get("bytes") or source.get("path")
    if isinstance(source, str | os.PathLike):
        name = str(source)
    elif isinstance(source, Image.Image):
        name = getattr(source, "filename", "") or name
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = _open(source)
            limit = Image.MAX_IMAGE_PIXELS
            if limit and image.width * image.height > limit:
                raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels, the limit is {limit}")
            return _to_rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError as error:
        raise ValueError(f"{name}: there is no such image file.") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{name} is too large ({error}); shrink it, or raise PIL.Image.MAX_IMAGE_PIXELS.") from error
    except Exception as error:  # on a damaged file the decoders raise errors of many kinds
        raise ValueError(f"{name} cannot be read as an image ({error}); replace or remove it.") from error


def _open(source) -> Image.Image:
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, bytes | bytearray):
        return Image.open(io.BytesIO(source))
    if isinstance(source, os.PathLike):
        return Image.open(source)
    if isinstance(source, str):
        if source.startswith(("http://", "https://", "data:image/")):
            return fetch_image(source)
        return Image.open(source)
    if source is None:
        raise ValueError("nothing was given")
    return to_pil_image(source)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, WHITE), image).convert("RGB")
    if image.mode.startswith("I"):
        # PIL would clip 16-bit greys at 255 and show a white square
        values = np.asarray(image)
        if values.max(initial=0) > 255:
            values = values // SIXTEEN_BIT_STEP
        image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    return image.convert("RGB")
