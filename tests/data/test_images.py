"""`open_image` against pictures whose pixels are known, and against files that must be refused."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from vlm.errors import UsageError
from vlm.images import open_image

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_header(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    )


def test_every_kind_of_source_gives_the_same_pixels(tmp_path: Path) -> None:
    image = Image.fromarray(PIXELS)
    path = tmp_path / "a.png"
    path.write_bytes(encoded(image))
    for source in (path, str(path), path.read_bytes(), image, PIXELS, PIXELS[::-1][::-1]):
        opened = open_image(source)
        assert opened.mode == "RGB" and np.array_equal(np.asarray(opened), PIXELS)


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_lossless_formats_are_exact(form: str) -> None:
    options = {"lossless": True} if form == "WEBP" else {}
    assert np.array_equal(np.asarray(open_image(encoded(Image.fromarray(PIXELS), form, **options))), PIXELS)


def test_grey_is_repeated() -> None:
    grey = PIXELS[..., 0]
    assert np.array_equal(np.asarray(open_image(encoded(Image.fromarray(grey)))), np.stack([grey] * 3, -1))


def test_16_bit_grey_is_scaled_and_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 256).reshape(16, 16).astype(np.uint16)
    values = np.asarray(open_image(encoded(Image.fromarray(ramp))))[..., 0]
    assert np.abs(values - np.arange(256).reshape(16, 16)).max() <= 1


def test_16_bit_colour() -> None:
    rows = b"".join(b"\0" + struct.pack(">3H", 65535, 32896, 0) * 2 for _ in range(2))
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0))
    data += chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert open_image(data).getpixel((1, 1)) == (255, 128, 0)


def test_cmyk() -> None:
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    assert np.abs(np.array(open_image(encoded(red, "JPEG")).getpixel((8, 8))) - (255, 0, 0)).max() <= 2


def test_palette_and_one_bit() -> None:
    image = Image.new("RGB", (4, 4), (10, 200, 30))
    assert open_image(encoded(image.quantize(4))).getpixel((0, 0)) == (10, 200, 30)
    assert open_image(encoded(Image.new("1", (4, 4), 1))).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_transparency_falls_on_white(form: str) -> None:
    options = {"lossless": True, "exact": True} if form == "WEBP" else {}
    clear = open_image(encoded(Image.new("RGBA", (4, 4), (255, 0, 0, 0)), form, **options))
    half = open_image(encoded(Image.new("RGBA", (4, 4), (255, 0, 0, 128)), form, **options))
    assert clear.getpixel((0, 0)) == (255, 255, 255)
    assert half.getpixel((0, 0)) == (255, 127, 127)


def test_transparency_of_palettes_grey_and_colour_keys() -> None:
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([9, 9, 9])
    assert open_image(encoded(palette, transparency=0)).getpixel((0, 0)) == (255, 255, 255)
    assert open_image(encoded(Image.new("LA", (2, 2), (9, 0)))).getpixel((0, 0)) == (255, 255, 255)
    keyed = encoded(Image.new("RGB", (2, 2), (1, 2, 3)), transparency=(1, 2, 3))
    assert open_image(keyed).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "LA", "La", "PA", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I", "I;16", "F"]
)
def test_every_mode_of_pillow_becomes_rgb(mode: str) -> None:
    opened = open_image(Image.new(mode, (3, 2)))
    assert opened.mode == "RGB" and opened.size == (3, 2)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_applied(form: str) -> None:
    image = Image.new("RGB", (32, 16), "black")
    image.paste("white", (0, 0, 16, 16))  # white on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned clockwise by 90°: white on top
    opened = open_image(encoded(image, form, exif=exif))
    assert opened.size == (16, 32)
    assert min(opened.getpixel((8, 6))) > 240 and max(opened.getpixel((8, 26))) < 15


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_does_not_cost_the_picture() -> None:
    opened = open_image(encoded(Image.fromarray(PIXELS), exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"))
    assert np.array_equal(np.asarray(opened), PIXELS)


def test_a_bomb_is_refused_by_its_header() -> None:
    # Its 99 bytes of pixels are too few: had they been decoded, the complaint would be of those.
    with pytest.raises(UsageError, match="cat.png: 60000×50000 pixels, the limit is 64000000"):
        open_image(png_header(60000, 50000), name="cat.png")


def test_the_limit_holds_for_every_source() -> None:
    image = Image.fromarray(PIXELS)
    for source in (image, encoded(image), encoded(image, "JPEG"), encoded(image, "WEBP")):
        with pytest.raises(UsageError, match="20×12 pixels, the limit is 239"):
            open_image(source, max_pixels=239)


def test_a_text_bomb_is_refused() -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("note", "a" * 80_000_000, zip=True)
    with pytest.raises(UsageError, match="replace the file"):
        open_image(encoded(Image.fromarray(PIXELS), pnginfo=info))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_truncated_files_are_refused(form: str, share: float) -> None:
    data = encoded(Image.fromarray(np.tile(PIXELS, (4, 4, 1))), form)
    with pytest.raises(UsageError, match="a.bin: .*replace"):
        open_image(data[: int(len(data) * share)], name="a.bin")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("/no/such/cat.png", "/no/such/cat.png: no such image file"),
        ("/", "can not be opened"),
        ("a\0b", "can not be opened"),
        ("http://example.org/a.png", "no such image file"),
        (b"", "empty file"),
        (b"%PDF-1.4", "not a JPEG, PNG or WebP"),
        (b"RIFF\0\0\0\0AVI ", "not a JPEG, PNG or WebP"),
        (encoded(Image.new("RGB", (3, 3)), "GIF"), "not a JPEG, PNG or WebP"),
        (png_header(0, 5), "header can not be read"),
        (None, "can not be a NoneType"),
        (np.zeros((4, 4), np.uint8), r"shape (4, 4) of uint8"),
        (np.zeros((4, 4, 3), np.float32), r"shape (4, 4, 3) of float32"),
        (np.zeros((0, 4, 3), np.uint8), r"shape (0, 4, 3)"),
    ],
)
def test_what_is_no_picture_is_refused_in_one_line(source: Any, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        open_image(source)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_any_flipped_byte_gives_a_picture_or_a_usage_error() -> None:
    rng = np.random.default_rng(0)
    for form in ("JPEG", "PNG", "WEBP"):
        data = bytearray(encoded(Image.fromarray(PIXELS), form))
        for place in rng.integers(0, len(data), 150):
            damaged = bytes(data[:place]) + bytes([data[place] ^ int(rng.integers(1, 256))]) + bytes(data[place + 1 :])
            try:
                assert open_image(damaged).mode == "RGB"
            except UsageError:
                pass
