"""Whether an encoded picture is whole, told from its structure alone, in the time of reading it.

Knows the chunks of PNG and the segments of JPEG. Knows nothing of pixels: what is not plain here is for a decoder to say.
"""

from __future__ import annotations

import struct
import zlib

import numpy as np

_PNG = b"\x89PNG\r\n\x1a\n"
_CHUNK, _NUMBER = struct.Struct(">I4s").unpack_from, struct.Struct(">I").unpack_from
_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive
_SCAN, _END, _RESTARTS = 0xDA, 0xD9, 0xDD
_SEGMENTS = frozenset((*_FRAMES, 0xC4, 0xDA, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)))  # what may stand between two scans


def whole_size(data: bytes) -> tuple[int, int] | None:
    """Width and height in pixels of a JPEG or PNG that is whole; None for one that is not, or may not be."""
    size = None
    try:
        if data.startswith(_PNG):
            size = _png_size(data)
        elif data.startswith(b"\xff\xd8\xff"):
            size = _jpeg_size(data)
    except (struct.error, IndexError, ValueError):
        pass
    return size if size and all(size) else None


def _png_size(data: bytes) -> tuple[int, int] | None:
    """Every chunk has the checksum it says, the first is the header and the last the end of the file."""
    place, kind, has_pixels = len(_PNG), b"", False
    view = memoryview(data)
    while place < len(data):
        length, kind = _CHUNK(data, place)
        end = place + 8 + length
        if _NUMBER(data, end) != (zlib.crc32(view[place + 4 : end]),) or (kind == b"IHDR") != (place == len(_PNG)):
            return None
        has_pixels |= kind == b"IDAT"
        place = end + 4
        if kind == b"IEND":
            break
    width, height, depth, colour, *_ = struct.unpack_from(">IIBB", data, 16)
    plain = depth == 8 and colour in (0, 2, 3, 4, 6)
    return (width, height) if plain and has_pixels and kind == b"IEND" and place == len(data) else None


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Segment follows segment up to the end marker, which ends the file; no marker in a scan's data that ought not to be."""
    size, scans, place, restarts, markers = None, 0, 2, False, None
    while True:
        if data[place] != 0xFF:
            return None
        marker = data[place + 1]
        if marker == _END:
            return size if scans and place + 2 == len(data) else None
        if marker not in _SEGMENTS:
            return None
        length = data[place + 2] << 8 | data[place + 3]
        if marker in _FRAMES:
            if size is not None or data[place + 4] != 8:
                return None
            height, width = struct.unpack_from(">HH", data, place + 5)
            size = (width, height)
        restarts |= marker == _RESTARTS
        place += 2 + length
        if marker == _SCAN:
            scans += 1
            if markers is None:
                markers = _markers(data, restarts)
            place += int(markers[place:].argmax())  # by 0 where there is none, to what is no marker


def _markers(data: bytes, restarts: bool) -> np.ndarray:
    """Where a marker stands that ends the data of a scan: a byte 0xFF, but before 0x00 or the number of a restart."""
    values = np.frombuffer(data, np.uint8)
    following = values[1:]
    found = values[:-1] == 0xFF
    found &= following != 0
    if restarts:
        found &= (following & 0xF8) != 0xD0
    return found
