"""Every kind of picture comes out as the same upright RGB image, and every bad one as one sentence that names it."""

import base64
import io
import struct
import zlib
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_processor

from prefixvlm.processing.images_prefix_vlm import load_image

ORIENTATION = 0x0112  # the EXIF tag
ODD = Path(__file__).resolve().parents[2].parent / "shared" / "cases" / "data" / "odd"
GREYS = np.linspace(0, 255, 12 * 8).reshape(8, 12).round().astype(np.uint8)


def colours() -> Image.Image:
    """12 x 8: red, green, blue and yellow quarters, so that every turn and mirror image differs."""
    picture = Image.new("RGB", (12, 8))
    for place, colour in (((0, 0), "red"), ((6, 0), "lime"), ((0, 4), "blue"), ((6, 4), "yellow")):
        picture.paste(colour, (*place, place[0] + 6, place[1] + 4))
    return picture


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def assert_same(image: Image.Image, expected, tolerance: int = 0) -> None:
    assert image.mode == "RGB"
    expected = np.asarray(expected).astype(int)
    if expected.ndim == 2:
        expected = np.repeat(expected[..., None], 3, axis=2)
    assert np.asarray(image).shape == expected.shape
    assert np.abs(np.asarray(image).astype(int) - expected).max() <= tolerance


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "CMYK", "YCbCr", "P", "HSV"])
def test_colour_modes(mode):
    assert_same(load_image(colours().convert(mode)), colours(), tolerance=4)


@pytest.mark.parametrize("mode", ["L", "LA", "I", "F"])
def test_grey_modes(mode):
    assert_same(load_image(Image.fromarray(GREYS).convert(mode)), GREYS)


def test_black_and_white():
    assert_same(load_image(Image.fromarray(GREYS > 100)), np.where(GREYS > 100, 255, 0))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa", "P"])
def test_transparent_parts_become_white(mode):
    picture = Image.new("RGBA", (4, 2), (0, 0, 0, 255))
    picture.paste((0, 0, 0, 0), (2, 0, 4, 2))  # hidden black
    if mode in ("LA", "PA"):
        alpha, picture = picture.getchannel("A"), picture.convert("L" if mode == "LA" else "P").convert(mode)
        picture.putalpha(alpha)
    elif mode == "P":
        picture = picture.quantize(4)
    else:
        picture = picture.convert(mode)
    assert picture.mode == mode
    expected = [[0, 0, 255, 255]] * 2
    assert_same(load_image(picture), expected)
    if mode in ("RGBA", "LA", "P"):
        assert_same(load_image(encoded(picture)), expected)


def test_half_transparent_is_mixed_with_white():
    assert_same(load_image(Image.new("RGBA", (2, 2), (255, 0, 0, 51))), [[[255, 204, 204]] * 2] * 2)


@pytest.mark.parametrize("mode", ["1", "L", "RGB"])
def test_a_transparent_colour_in_a_png_becomes_white(mode):
    picture = Image.new(mode, (4, 2))
    picture.paste(1 if mode == "1" else "white", (0, 0, 1, 2))
    raw = encoded(picture, transparency=(0, 0, 0) if mode == "RGB" else 0)
    assert "transparency" in Image.open(io.BytesIO(raw)).info
    assert_same(load_image(raw), [[255] * 4] * 2)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_greys_keep_their_contrast(kind, tmp_path):
    values = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(8, 32)
    picture = Image.fromarray(values)
    assert picture.mode == "I;16"
    expected = np.arange(256).reshape(8, 32)
    assert_same(load_image(picture), expected)
    picture.save(tmp_path / "deep.img", kind)
    assert_same(load_image(tmp_path / "deep.img"), expected)
    # a dark one, too, as long as it reaches the upper half of the range
    assert_same(load_image(Image.fromarray(values // 2 + 1)), (values // 2 + 1) // 257)


def test_other_deep_greys():
    values = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(8, 32)
    expected = np.arange(256).reshape(8, 32)
    assert_same(load_image(Image.fromarray(values.astype(np.int32))), expected)  # as old versions of PIL read 16 bits
    big_endian = Image.frombytes("I;16B", (32, 8), values.astype(">u2").tobytes())
    assert_same(load_image(big_endian), expected)
    assert_same(load_image(Image.fromarray((expected / 255).astype(np.float32))), expected)  # F, 0 to 1
    assert_same(load_image(Image.new("F", (2, 2), 0.999)), [[255, 255]] * 2)  # rounded, not cut off
    assert_same(load_image(Image.new("I", (2, 2), -5)), [[0, 0]] * 2)


def stretched(values) -> np.ndarray:
    values = np.asarray(values, np.float64)
    return (values - values.min()) / (values.max() - values.min()) * 255


RAMP = np.linspace(0, 1, 64).reshape(8, 8)
DEEP = {  # pictures of more than 8 bits, and the grey levels that must come of them
    "12 bits": (RAMP * 4095, stretched(RAMP)),
    "12 bits, a dark part": (100 + RAMP * 400, stretched(RAMP)),
    "reflectance of 0 to 10000": (RAMP * 10000, stretched(RAMP)),
    "just below the upper half": (RAMP * 32767, stretched(RAMP)),
    "the upper half": (RAMP * 32768, RAMP * 32768 / 257),
    "all of 16 bits": (RAMP * 65535, RAMP * 255),
    "few counts": (RAMP * 63, stretched(RAMP)),
}


@pytest.mark.parametrize("name", DEEP)
def test_deep_greys_keep_their_contrast_in_every_type(name, tmp_path):
    values, expected = np.rint(DEEP[name][0]), DEEP[name][1]
    shorts = values.astype(np.uint16)
    forms = [shorts, values.astype(np.int32), values.astype(np.uint32), torch.from_numpy(values.astype(np.int32))]
    forms += [Image.fromarray(shorts), Image.fromarray(values.astype(np.int32))]
    forms += [Image.frombytes("I;16B", (8, 8), values.astype(">u2").tobytes()), shorts[None], shorts[..., None]]
    for kind in ("PNG", "TIFF"):
        Image.fromarray(shorts).save(tmp_path / f"deep.{kind}", kind)
        forms.append(tmp_path / f"deep.{kind}")
    first = load_image(forms[0])
    assert_same(first, expected, tolerance=2)
    for form in forms:
        assert_same(load_image(form), first)
    if values.max() < 2**15:
        assert_same(load_image(values.astype(np.int16)), first)
    if values.max() > 255:
        assert_same(load_image(values.astype(np.int64)), first)


def test_negative_values_are_stretched():
    hounsfield = np.rint(-1000 + RAMP * 3000).astype(np.int32)
    for values in (hounsfield, hounsfield.astype(np.int16), hounsfield.astype(np.float32), Image.fromarray(hounsfield)):
        assert_same(load_image(values), stretched(RAMP), tolerance=1)
    assert_same(load_image(torch.from_numpy(RAMP * 2 - 1).bfloat16()), stretched(RAMP), tolerance=1)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, RAMP * 255),
        (0, 0.5, RAMP * 127.5),
        (0, 255, RAMP * 255),
        (0, 60, RAMP * 60),
        (0, 300, stretched(RAMP)),
        (270, 330, stretched(RAMP)),
        (-0.2, 1.1, stretched(RAMP)),
        (0, 1.2, stretched(RAMP)),
        (0, 4095, stretched(RAMP)),
    ],
)
def test_floating_point(low, high, expected):
    values = low + RAMP * (high - low)
    forms = [values, values.astype(np.float32), torch.from_numpy(values), Image.fromarray(values.astype(np.float32))]
    for form in forms:
        assert_same(load_image(form), expected, tolerance=1)


def test_colours_of_more_than_8_bits_are_scaled_together():
    colours_of_12_bits = np.zeros((8, 8, 3), np.uint16)
    colours_of_12_bits[..., 0], colours_of_12_bits[..., 1] = RAMP * 4095, RAMP * 2000
    expected = np.dstack([RAMP * 255, RAMP * 2000 / 4095 * 255, RAMP * 0])
    for values in (
        colours_of_12_bits,
        colours_of_12_bits.astype(np.int32),
        torch.from_numpy(colours_of_12_bits).movedim(2, 0),
    ):
        assert_same(load_image(values), expected, tolerance=1)
    for opaque in (4095, 65535):
        alpha = np.full((8, 8, 1), opaque, np.uint16)
        assert_same(load_image(np.concatenate([colours_of_12_bits, alpha], axis=2)), expected, tolerance=1)
    # and those of 8 bits stay as they are in any type
    dark = np.asarray(colours()) // 4
    for kind in (np.uint8, np.uint16, np.int32, np.int64, np.float32):
        assert_same(load_image(dark.astype(kind)), dark)


@pytest.mark.parametrize("value", [0, 1, 255, 300, 4095, 65535, -5, 0.5, 2.5, 1000.5])
def test_constant_pictures_are_constant(value):
    for kind in (np.float32, np.int32) if value == int(value) else (np.float32,):
        found = np.asarray(load_image(np.full((4, 4), value, kind)))
        assert found.min() == found.max()


def test_extreme_values_are_no_overflow():
    for kind in (np.int32, np.int64, np.uint32, np.uint64):
        limits = np.iinfo(kind)
        assert_same(load_image(np.array([[limits.min, limits.max]], kind)), [[0, 255]])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers_are_refused(bad):
    values = RAMP.astype(np.float32)
    values[3, 3] = bad
    for source in (values, torch.from_numpy(values), Image.fromarray(values)):
        assert "values that are NaN or infinite" in error_of(source)


def test_stretching_is_said_once(caplog):
    load_image.__globals__["logger"].warning_once.cache_clear()
    for factor in (1000, 2000):
        load_image((RAMP * factor).astype(np.uint16))
        load_image(RAMP * -factor)
    assert [record.getMessage() for record in caplog.records if "lowest value becomes black" in record.getMessage()] != []
    assert len(caplog.records) == 1


@pytest.mark.parametrize("name", ["ct_int32.tif", "dicom12bit.png", "sentinel2_band.tif"])
def test_pictures_from_elsewhere(name):
    path = ODD / name
    if not path.is_file():
        pytest.skip(f"there is no {path}")
    found = np.asarray(load_image(path))
    assert (found.min(), found.max()) == (0, 255)
    assert len(np.unique(found)) > min(20, len(np.unique(np.asarray(Image.open(path)))) - 1)


def test_the_first_page_of_several(tmp_path):
    pages = [Image.fromarray((RAMP * factor).astype(np.uint16)) for factor in (4095, 100)]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    assert_same(load_image(tmp_path / "pages.tif"), stretched(RAMP), tolerance=1)


def test_a_url_gives_the_picture_of_its_file(tmp_path, monkeypatch):
    """Not what a library makes of it: 16 bits, transparent parts and damaged EXIF come out as from the disk."""
    monkeypatch.setenv("no_proxy", "*")
    Image.fromarray((RAMP * 4095).astype(np.uint16)).save(tmp_path / "deep.png")
    Image.new("RGBA", (4, 2), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    (tmp_path / "damaged.jpg").write_bytes(encoded(colours(), "JPEG", exif=b"Exif\0\0garbage"))
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        for path in tmp_path.iterdir():
            assert_same(load_image(f"{address}/{path.name}"), load_image(path))
        assert error_of(f"{address}/gone.png").startswith(f"{address}/gone.png cannot be read as an image (HTTP Error 404")
        server.shutdown()


# of each EXIF orientation: the sides of the upright picture that the first row and column of the file hold
SIDES = {1: "top left", 2: "top right", 3: "bottom right", 4: "bottom left"}
SIDES |= {5: "left top", 6: "right top", 7: "right bottom", 8: "left bottom"}


@pytest.mark.parametrize("orientation", SIDES)
def test_exif_turns_the_picture_upright(orientation, tmp_path):
    upright = np.asarray(colours().resize((48, 32), Image.Resampling.NEAREST))
    row, column = SIDES[orientation].split()
    stored = upright if row in ("top", "bottom") else upright.swapaxes(0, 1)
    stored = stored[::-1] if row in ("bottom", "right") else stored
    stored = stored[:, ::-1] if column in ("bottom", "right") else stored
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = tmp_path / "turned.jpg"
    Image.fromarray(stored).save(path, quality=100, subsampling=0, exif=exif)
    for source in (path, path.read_bytes(), Image.open(path)):
        assert_same(load_image(source), upright, tolerance=4)


TURNED = b"MM\0*\0\0\0\x08\0\x02\x01\x12\0\x03\0\0\0\x01\0\x06\0\0"  # to the right; a second entry is missing
DAMAGED = [b"garbage", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\0\x05\x01\x12", TURNED, TURNED + b"\xff" * 12]


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("exif", DAMAGED)
def test_damaged_exif_does_not_cost_the_picture(exif, tmp_path):
    raw = encoded(colours(), "JPEG", quality=100, subsampling=0, exif=b"Exif\0\0" + exif)
    path = tmp_path / "damaged.jpg"
    path.write_bytes(raw)
    expected = load_image(path)
    assert_same(expected, colours().rotate(-90, expand=True) if exif.startswith(TURNED) else colours(), 60)
    opened = Image.open(path)
    decoded = Image.open(io.BytesIO(raw))
    decoded.load()
    for source in (raw, opened, opened, decoded, opened.copy(), opened.convert("RGB"), opened.convert("RGBA")):
        assert_same(load_image(source), expected)


def test_forms_of_the_same_picture(tmp_path):
    picture, raw = colours(), encoded(colours())
    path = tmp_path / "a picture.png"
    path.write_bytes(raw)
    array = np.asarray(picture)
    chw = torch.from_numpy(array.copy()).permute(2, 0, 1)
    rgba = np.dstack([array, np.full(array.shape[:2], 255, np.uint8)])
    forms = {
        "PIL": picture,
        "lazy": Image.open(path),
        "str": str(path),
        "PathLike": path,
        "bytes": raw,
        "bytearray": bytearray(raw),
        "open file": io.BytesIO(raw),
        "row with both": {"bytes": raw, "path": "gone.png"},
        "row with bytes": {"bytes": raw, "path": None},
        "row with path": {"bytes": None, "path": str(path)},
        "data URL": "data:image/png;base64," + base64.b64encode(raw).decode(),
        "HWC": array,
        "CHW array": array.transpose(2, 0, 1),
        "HWC view": array[:, ::-1][:, ::-1],
        "HWC of int64": array.astype(np.int64),
        "HWC of 0 to 1": array / 255,
        "HWC with alpha": rgba,
        "CHW tensor": chw,
        "CHW tensor of 0 to 1": (chw / 255).requires_grad_(),
        "HWC tensor": chw.permute(1, 2, 0),
    }
    for form, source in forms.items():
        try:
            assert_same(load_image(source), picture)
        except (AssertionError, ValueError) as error:
            raise AssertionError(form) from error


def test_grey_arrays():
    for source in (
        GREYS,
        GREYS[None],
        GREYS[..., None],
        torch.from_numpy(GREYS),
        GREYS.astype(np.uint16) * 257,
        GREYS / 255,
    ):
        assert_same(load_image(source), GREYS)
    assert_same(load_image(GREYS > 100), np.where(GREYS > 100, 255, 0))


def test_tiny_arrays_are_read_by_their_kind():
    square = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)
    assert_same(load_image(square), square)
    assert_same(load_image(torch.from_numpy(square)), square.transpose(1, 2, 0))


def test_the_given_image_is_left_as_it_was():
    picture = colours().convert("RGBA")
    before = picture.copy()
    load_image(picture).putpixel((0, 0), (1, 2, 3))
    assert picture.mode == "RGBA"
    assert picture == before
    picture = colours()
    load_image(picture).putpixel((0, 0), (1, 2, 3))
    assert picture == colours()


def claiming(width: int, height: int) -> bytes:
    """A PNG that says it has these sides and holds nothing."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def noise(kind: str, **options) -> bytes:
    return encoded(Image.effect_noise((64, 64), 80).convert("RGB"), kind, **options)


BAD_FILES = {
    "truncated JPEG": (lambda: noise("JPEG")[:-900], "cannot be read as an image"),
    "truncated PNG": (lambda: noise("PNG")[:-900], "cannot be read as an image"),
    "JPEG header only": (lambda: noise("JPEG")[:300], "cannot be read as an image"),
    "random bytes": (lambda: bytes(range(7, 200)), "no image format"),
    "empty": (lambda: b"", "no image format"),
    "a web page": (lambda: b"<html>404</html>\n", "no image format"),
    "oversized": (lambda: claiming(60000, 60000), "too large"),
    "somewhat oversized": (lambda: claiming(15000, 15000), "too large"),
}


def error_of(source, *name) -> str:
    with pytest.raises(ValueError, match=r".") as error:
        load_image(source, *name)
    message = str(error.value)
    assert "\n" not in message
    assert "0x" not in message  # no addresses of objects
    return message


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_files_are_named(kind, tmp_path):
    make, reason = BAD_FILES[kind]
    raw, path = make(), tmp_path / "row 7.img"
    path.write_bytes(raw)
    for source in (
        path,
        str(path),
        {"path": str(path)},
        {"bytes": None, "path": str(path)},
        {"bytes": raw, "path": str(path)},
    ):
        message = error_of(source)
        assert message.startswith(str(path))
        assert reason in message
    for source in (raw, {"bytes": raw, "path": None}, io.BytesIO(raw)):
        message = error_of(source, "image 2 of 3")
        assert message.startswith("image 2 of 3")
        assert reason in message


@pytest.mark.parametrize("kind", ["truncated JPEG", "truncated PNG"])
def test_a_lazily_opened_image_is_checked_too(kind, tmp_path):
    path = tmp_path / "lazy.img"
    path.write_bytes(BAD_FILES[kind][0]())
    assert error_of(Image.open(path)).startswith(str(path))
    assert error_of(Image.open(io.BytesIO(path.read_bytes())), "image 1 of 1").startswith("image 1 of 1")
    closed = Image.open(path)
    closed.close()
    assert error_of(closed).startswith(str(path))


def test_missing_files(tmp_path):
    path = tmp_path / "gone.png"
    for source in (path, str(path), {"bytes": None, "path": str(path)}, {"path": str(path)}):
        assert error_of(source) == f"{path}: there is no such image file."
    assert error_of(tmp_path).startswith(f"{tmp_path} cannot be read as an image")


def test_the_limit_is_the_one_of_pil(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 95)
    already_open = colours()  # 96 pixels
    assert error_of(already_open, "image 2 of 3").startswith("image 2 of 3 is too large (12 x 8 pixels, the limit is 95)")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 96)
    assert_same(load_image(already_open), already_open)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert_same(load_image(already_open), already_open)


@pytest.mark.parametrize(
    "source",
    [
        None,
        5,
        ["a.png"],
        {},
        {"bytes": None, "path": None},
        np.zeros((5, 5, 7), np.uint8),
        np.zeros((2, 4, 4, 3), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        Image.new("RGB", (0, 4)),
        np.full((4, 4), "a"),
        np.full((4, 4), 1j),
        "data:image/png;base64,bm9wZQ==",
        "data:image/png;base64,???",
    ],
    ids=lambda source: type(source).__name__,
)
def test_what_is_no_picture_at_all(source):
    assert error_of(source, "image 1 of 2").startswith("image 1 of 2 cannot be read as an image")


def test_the_processor_names_the_image_that_is_bad(tmp_path):
    processor = tiny_processor()
    good, bad = colours(), tmp_path / "bad.jpg"
    bad.write_bytes(noise("JPEG")[:300])
    for images in ([good, str(bad), good], [[good], [Path(bad), good]]):
        with pytest.raises(ValueError, match=r"bad\.jpg cannot be read"):
            processor(images=images, text=["a"] * len(images))
    with pytest.raises(ValueError, match=r"^image 2 of 3 cannot be read"):
        processor(images=[[good], [bad.read_bytes(), good]], text=["a", "b"])
    messages = [{"role": "user", "content": [{"type": "image", "image": image} for image in (good, bad.read_bytes())]}]
    with pytest.raises(ValueError, match=r"^image 2 of 2 cannot be read"):
        processor.apply_chat_template(messages, tokenize=True)


@pytest.mark.parametrize("height", [1, 2, 3, 4])
def test_very_flat_images_are_no_channels(height):
    image = Image.new("RGB", (16, height), (200, 100, 50))
    found = tiny_processor()(images=image)["pixel_values"][0]
    expected = tiny_processor()(images=Image.new("RGB", (16, 16), (200, 100, 50)))["pixel_values"][0]
    np.testing.assert_allclose(found, expected)
