"""Pictures that a client sends, judged before a pixel of them is decoded.

Knows data URLs and the containers of PNG, JPEG and WebP. Knows nothing of models. Nothing is ever fetched: whatever is not
a data URL is refused as it stands. What comes out decodes to at most so many pixels, in one frame.
"""

from __future__ import annotations

import binascii
import io
import re
import struct
from collections.abc import Iterator

from PIL.JpegImagePlugin import JpegImageFile

from .refusals import Refusal

_HEAD = re.compile(r"data:image/[\w.+-]{1,40};base64,", re.ASCII | re.IGNORECASE)
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"eXIf")
_WEBP_PIXELS = (b"VP8X", b"ALPH", b"VP8 ", b"VP8L", b"EXIF")
MOST_SCANS = 64  # of a JPEG; encoders write about ten, and each costs a pass over all pixels


def picture_bytes(url: str, *, max_pixels: int, param: str) -> bytes:
    """A data URL -> an encoded picture of one frame. Raises Refusal (400) naming `param`."""
    head = _HEAD.match(url)
    if head is None:
        raise _refusal(param, "not a data URL of a picture; addresses are not fetched, write data:image/png;base64,…")
    try:
        data = binascii.a2b_base64(url[head.end() :].encode("ascii"), strict_mode=True)
    except (binascii.Error, UnicodeEncodeError):
        raise _refusal(param, "its base64 is damaged; encode it again") from None
    try:
        (width, height), slim = _judged(data)
    except _NotOne as error:
        raise _refusal(param, str(error)) from None
    except Exception:  # Pillow and struct have a dozen ways to fail at a damaged header
        raise _refusal(param, "its header can not be read; replace the file") from None
    if width * height > max_pixels or width * height == 0:
        raise _refusal(param, f"{width}×{height} pixels, the limit is {max_pixels}; make it smaller")
    return slim


class _NotOne(Exception):
    """A file that is no single picture."""


def _refusal(param: str, reason: str) -> Refusal:
    return Refusal(400, f"{param}: {reason}", param=param, code="invalid_image")


def _judged(data: bytes) -> tuple[tuple[int, int], bytes]:
    """Width and height, and the file with what its pixels need and no more: texts and profiles may be bombs of their own."""
    if data.startswith(_PNG):
        return _png(data)
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return _webp(data)
    if data.startswith(b"\xff\xd8\xff"):
        if (scans := data.count(b"\xff\xda")) > MOST_SCANS:
            raise _NotOne(f"{scans} scans, the limit is {MOST_SCANS}; save it again")
        return JpegImageFile(io.BytesIO(data)).size, data
    raise _NotOne("not a JPEG, PNG or WebP file; convert it to one of these")


def _png(data: bytes) -> tuple[tuple[int, int], bytes]:
    kept = [_PNG]
    for name, start, end in _png_chunks(data):
        if name == b"acTL":
            raise _NotOne("an animated PNG; send one of its frames")
        if name in _PNG_PIXELS:
            kept.append(data[start:end])
    width, height = struct.unpack_from(">II", data, 16)
    return (width, height), b"".join(kept)


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Name, start and end of every chunk; the last may be cut short, which a decoder will tell."""
    place = len(_PNG)
    while place + 8 <= len(data):
        (length,) = struct.unpack_from(">I", data, place)
        yield data[place + 4 : place + 8], place, place + 12 + length
        place += 12 + length


def _webp(data: bytes) -> tuple[tuple[int, int], bytes]:
    chunks = [(name, data[start:end]) for name, start, end in _webp_chunks(data)]
    if any(name in (b"ANIM", b"ANMF") for name, _ in chunks) or (chunks[0][0] == b"VP8X" and chunks[0][1][8] & 0x02):
        raise _NotOne("an animated WebP; send one of its frames")
    sizes = [_webp_size(name, chunk) for name, chunk in chunks if name in (b"VP8X", b"VP8 ", b"VP8L")]
    kept = b"WEBP" + b"".join(_padded(chunk) for name, chunk in chunks if name in _WEBP_PIXELS)
    return max(sizes, key=lambda size: size[0] * size[1]), b"RIFF" + struct.pack("<I", len(kept)) + kept


def _webp_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    place = 12
    while place + 8 <= len(data):
        (length,) = struct.unpack_from("<I", data, place + 4)
        yield data[place : place + 4], place, place + 8 + length
        place += 8 + length + length % 2


def _webp_size(name: bytes, chunk: bytes) -> tuple[int, int]:
    """WebP Container Specification: VP8X holds 24 bits each, less one; VP8 14 bits each after its start code; VP8L 14, less one."""
    body = chunk[8:]
    if name == b"VP8X":
        return int.from_bytes(body[4:7], "little") + 1, int.from_bytes(body[7:10], "little") + 1
    if name == b"VP8 ":
        width, height = struct.unpack_from("<HH", body, 6)
        return width & 0x3FFF, height & 0x3FFF
    (bits,) = struct.unpack_from("<I", body, 1)
    return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1


def _padded(chunk: bytes) -> bytes:
    return chunk + b"\0" * (len(chunk) % 2)
