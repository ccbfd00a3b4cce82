"""The look at a picture's structure against Pillow's decoder: what Pillow decodes is never refused, what is cut always is."""

from __future__ import annotations

import io
import re
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from vlm.errors import UsageError
from vlm.image_structure import whole_size
from vlm.images import check_image, open_image

WIDTH, HEIGHT = 21, 18


def pixels(*channels: int) -> np.ndarray:
    """A gradient with some noise, (HEIGHT, WIDTH, *channels) uint8."""
    noise = np.random.default_rng(0).integers(0, 40, (HEIGHT, WIDTH, *channels))
    ramp = np.linspace(0, 200, WIDTH).reshape(1, WIDTH, *(1 for _ in channels))
    return (noise + ramp).astype(np.uint8)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def rgb() -> Image.Image:
    return Image.fromarray(pixels(3))


def exif() -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = 1  # upright
    tags[0x010F] = "a camera \xff\xd9"
    return tags


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    depth: int, colour: int, rows: bytes, *, interlaced: bool = False, width: int = WIDTH, more: bytes = b""
) -> bytes:
    header = struct.pack(">IIBBBBB", width, HEIGHT, depth, colour, 0, 0, interlaced)
    body = chunk(b"IHDR", header) + more + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def interlaced() -> bytes:
    """Pillow reads the seven passes of Adam7 and does not write them."""
    passes = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    parts = (pixels(3)[top::down, left::right] for left, top, right, down in passes)
    return png(8, 2, b"".join(b"\0" + row.tobytes() for part in parts for row in part), interlaced=True)


# Named as what a person would call them; each is a whole file.
PICTURES = {
    "jpeg baseline": saved(rgb(), "JPEG"),
    "jpeg best": saved(rgb(), "JPEG", quality=100, subsampling=0),
    "jpeg worst": saved(rgb(), "JPEG", quality=1),
    "jpeg 4:2:2": saved(rgb(), "JPEG", subsampling=1),
    "jpeg progressive": saved(rgb(), "JPEG", progressive=True),
    "jpeg progressive optimised": saved(rgb(), "JPEG", progressive=True, optimize=True, quality=95),
    "jpeg optimised": saved(rgb(), "JPEG", optimize=True),
    "jpeg grey": saved(Image.fromarray(pixels()), "JPEG"),
    "jpeg grey progressive": saved(Image.fromarray(pixels()), "JPEG", progressive=True),
    "jpeg CMYK": saved(Image.fromarray(pixels(4), "CMYK"), "JPEG"),
    "jpeg unconverted RGB": saved(rgb(), "JPEG", keep_rgb=True),
    "jpeg restarts by block": saved(rgb(), "JPEG", restart_marker_blocks=1),
    "jpeg restarts by row": saved(rgb(), "JPEG", restart_marker_rows=1, progressive=True),
    "jpeg EXIF": saved(rgb(), "JPEG", exif=exif()),
    "jpeg ICC": saved(rgb(), "JPEG", icc_profile=bytes(range(256)) * 300),
    "jpeg comment": saved(rgb(), "JPEG", comment=b"\xff\xd9 is the end"),
    "jpeg resolution": saved(rgb(), "JPEG", dpi=(300, 300)),
    "png": saved(rgb(), "PNG"),
    "png optimised": saved(rgb(), "PNG", optimize=True),
    "png not compressed": saved(rgb(), "PNG", compress_level=0),
    "png transparent": saved(Image.fromarray(pixels(4)), "PNG"),
    "png one colour transparent": saved(rgb(), "PNG", transparency=(0, 0, 0)),
    "png grey": saved(Image.fromarray(pixels()), "PNG"),
    "png grey transparent": saved(Image.fromarray(pixels(2)), "PNG"),
    "png palette": saved(rgb().quantize(200), "PNG"),
    "png palette transparent": saved(rgb().quantize(200), "PNG", transparency=b"\x00\x80"),
    "png palette of 4": saved(rgb().quantize(4), "PNG"),
    "png black and white": saved(Image.fromarray(pixels()).convert("1"), "PNG"),
    "png 16 bit": saved(Image.fromarray(pixels().astype(np.uint16) * 257), "PNG"),
    "png 16 bit colour": png(16, 2, b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels(3) * np.uint16(257))),
    "png interlaced": interlaced(),
    "png EXIF": saved(rgb(), "PNG", exif=exif()),
    "png ICC": saved(rgb(), "PNG", icc_profile=bytes(range(256)) * 30),
    "png resolution": saved(rgb(), "PNG", dpi=(300, 300)),
    "png animated": saved(rgb(), "PNG", save_all=True, append_images=[rgb().rotate(180)]),
    "webp": saved(rgb(), "WEBP"),
    "webp lossless": saved(rgb(), "WEBP", lossless=True),
}  # fmt: skip
# Read from the structure alone; the others are decoded.
KNOWN_BY_STRUCTURE = {name for name in PICTURES if name.startswith(("jpeg", "png"))} - {
    "png palette of 4",
    "png black and white",
    "png 16 bit",
    "png 16 bit colour",
}


def refused(check, data: bytes) -> bool:
    try:
        check(data)
    except UsageError:
        return True
    return False


@pytest.mark.parametrize("name", PICTURES)
def test_whole_pictures_are_taken_and_have_their_size(name):
    data = PICTURES[name]
    check_image(data)
    assert open_image(data).size == (WIDTH, HEIGHT)
    assert whole_size(data) == ((WIDTH, HEIGHT) if name in KNOWN_BY_STRUCTURE else None)


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_cut_at_any_byte_is_refused_as_pillow_refuses_it(name):
    data = PICTURES[name]
    for length in range(len(data)):
        cut = data[:length]
        assert whole_size(cut) is None
        assert refused(check_image, cut) == refused(open_image, cut), f"{length} of {len(data)} bytes"


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.parametrize(
    "more", [b"\0", b"\0" * 600, b"<html>", b"\xff\xd9", PICTURES["png"], PICTURES["jpeg baseline"]]
)
def test_what_follows_a_picture_is_for_the_decoder_to_judge(name, more):
    data = PICTURES[name] + more
    assert whole_size(data) is None
    assert refused(check_image, data) == refused(open_image, data)


def flips(data: bytes):
    """Each place in the file three times, with the file in which that byte is another one."""
    for place in range(0, len(data), 1 + len(data) // 4000):
        for mask in (0x01, 0x80, 0xFF):
            yield place, data[:place] + bytes([data[place] ^ mask]) + data[place + 1 :]


def told_by_header(data: bytes) -> set[int]:
    """The places in a JPEG that are not data of a scan: tables of codes, sizes, names."""
    places, here = set(), 2
    while data[here + 1] != 0xD9:
        end = here + 2 + struct.unpack_from(">H", data, here + 2)[0]
        places |= set(range(here, end))
        scan = re.compile(rb"\xff[^\x00\xd0-\xd7]").search(data, end) if data[here + 1] == 0xDA else None
        here = scan.start() if scan else end
    return places


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of damaged EXIF
@pytest.mark.parametrize("name", PICTURES)
def test_a_damaged_byte_is_refused_where_pillow_refuses_it(name):
    """None that Pillow decodes is refused, and no size is wrong. What passes that Pillow refuses is in a JPEG's headers.

    They have no checksum, and whether a table of codes makes sense is for a decoder to say. Of all bytes of such headers,
    some 600 in a file, a fifth is let pass so (progressive: half); of a picture's data, and of a PNG, nothing.
    """
    headers = told_by_header(PICTURES[name]) if name.startswith("jpeg") else set()
    passed = count = 0
    for place, data in flips(PICTURES[name]):
        by_pillow, by_structure = refused(open_image, data), refused(check_image, data)
        assert by_pillow or not by_structure
        assert by_structure or not by_pillow or place in headers, f"byte {place}"
        count += place in headers
        passed += by_pillow and not by_structure
        size = whole_size(data)
        assert by_pillow or size is None or size == open_image(data).size
    assert passed <= count * 0.6, f"{passed} of {count}"


@pytest.mark.parametrize("name", ["png", "jpeg baseline", "jpeg progressive"])
def test_a_piece_that_is_missing_or_foreign_is_refused_as_pillow_refuses_it(name):
    """A hole in the middle, or a block of zeros there: what a failed download and a failing disk leave."""
    data = PICTURES[name]
    for start in range(0, len(data), 7):
        for size in (1, 16, 64):
            hole = data[:start] + data[start + size :]
            zeros = data[:start] + bytes(len(data[start : start + size])) + data[start + size :]
            for damaged in (hole, zeros):
                by_pillow, by_structure = refused(open_image, damaged), refused(check_image, damaged)
                assert by_pillow or not by_structure
                assert by_structure or not by_pillow or name != "png"


@pytest.mark.parametrize("width", [0, 2**31 - 1])
def test_absurd_sizes_are_refused_before_a_pixel_is_decoded(width):
    header = bytearray(PICTURES["jpeg baseline"])
    frame = header.index(b"\xff\xc0")
    header[frame + 7 : frame + 9] = struct.pack(">H", min(width, 65535))
    header[frame + 5 : frame + 7] = struct.pack(">H", 65535)
    for data in (png(8, 2, b"", width=width), bytes(header)):
        with pytest.raises(UsageError, match="pixels|header"):
            check_image(data)


def test_nothing_at_all():
    for data in (b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"\xff\xd8\xff\xd9", b"RIFF\0\0\0\0WEBP", b"GIF89a"):
        assert whole_size(data) is None
        assert refused(check_image, data)
