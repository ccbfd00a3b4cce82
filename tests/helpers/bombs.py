"""Pictures that mean harm to who decodes them."""

from __future__ import annotations

import io
import random
import struct
import zlib

from PIL import Image


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, *extra: bytes, depth: int = 8, colour: int = 0, data: bytes | None = None) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    pixels = zlib.compress(b"\0" * 60_000_000, 1) if data is None else data
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def saved(picture: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def vp8x(width: int, height: int, flags: int = 0) -> bytes:
    """A small picture that says of itself that it is large."""
    inner = saved(Image.new("RGB", (8, 8)), "WEBP")[12:]
    head = bytes([flags, 0, 0, 0]) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBP" + b"VP8X" + struct.pack("<I", len(head)) + head + inner
    return b"RIFF" + struct.pack("<I", len(body)) + body


def resized_jpeg(width: int, height: int) -> bytes:
    data = bytearray(saved(Image.new("RGB", (64, 64)), "JPEG"))
    place = data.index(b"\xff\xc0")
    struct.pack_into(">HH", data, place + 5, height, width)
    return bytes(data)


def resized_webp(width: int, height: int, lossless: bool) -> bytes:
    data = bytearray(saved(Image.new("RGB", (64, 64)), "WEBP", lossless=lossless))
    if lossless:
        struct.pack_into("<I", data, 21, width - 1 | height - 1 << 14)
    else:
        struct.pack_into("<HH", data, 26, width, height)
    return bytes(data)


def bombs() -> dict[str, bytes]:
    frames = [Image.new("RGB", (64, 64), (n, 0, 0)) for n in range(200)]
    text = zlib.compress(b"a" * 1_000_000, 9)
    texts = [chunk(b"zTXt", b"k%d\0\0" % n + text) for n in range(63)]
    small = zlib.compress(b"\0" * 65 * 8)
    return {
        "a PNG of 40000 × 40000 black pixels": png(40_000, 40_000, depth=1),
        "a PNG of the largest size": png(2**31 - 1, 2**31 - 1),
        "a PNG without pixels": png(0, 0),
        "a PNG of 400 million pixels": png(20_000, 20_000),
        "an animated PNG": saved(frames[0], "PNG", save_all=True, append_images=frames[1:]),
        "a PNG that says it is animated": png(64, 8, chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0)), data=small),
        "a PNG that is cut": png(64, 64)[:60],
        "a PNG with a wrong checksum": png(64, 8, data=small).replace(b"IDAT", b"IDAU", 1),
        "a PNG whose chunk is longer than the file": png(64, 8)[:33] + struct.pack(">I", 2**31 - 1) + b"IDAT",
        "a PNG with texts and no pixels": png(64, 8, *texts, data=b""),
        "a JPEG of 65500 × 65500": resized_jpeg(65_500, 65_500),
        "a JPEG of a thousand scans": saved(frames[0], "JPEG")[:-2]
        + b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00" * 1000,
        "a JPEG of nothing": b"\xff\xd8\xff",
        "a WebP of 16 million × 16 million": vp8x(2**24, 2**24),
        "an animated WebP": saved(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
        "a WebP that says it is animated": vp8x(8, 8, flags=2),
        "a WebP of 16383 × 16383": resized_webp(16_383, 16_383, lossless=False),
        "a lossless WebP of 16384 × 16384": resized_webp(16_384, 16_384, lossless=True),
        "a WebP of nothing": b"RIFF\0\0\0\0WEBP",
        "a WebP cut in its header": b"RIFF\x10\0\0\0WEBPVP8X\x0a\0\0\0\0",
        "a GIF": saved(frames[0], "GIF"),
        "a TIFF": saved(frames[0], "TIFF"),
        "an SVG": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
        "a PDF": b"%PDF-1.4",
        "nothing": b"",
        "noise": random.Random(0).randbytes(1000),
    }
