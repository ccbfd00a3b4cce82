"""The headers of tars: read one by one without trust, and written as `tarfile` would.

Knows the formats of ustar and PAX. Knows nothing of samples, and extracts nothing.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from vlm.errors import UsageError

BLOCK = tarfile.BLOCKSIZE  # bytes
_OCTAL = re.compile(rb"[0-7]+")
_TIMES = re.compile(rb"(?:\d+ [acm]time=[\d.]+\n)+")  # of an extended header that says no more
_PLAIN = (b"0", b"\0")  # types of a tar header that says all there is to say of a regular file


def members(tar: Path, start: int = 0, end: int | None = None) -> Iterator[tuple[int, str, int, int]]:
    """Offset of the header, name, offset and size of every regular file, of the whole tar or from `start` to `end`.

    Links, devices and folders are nothing that a sample is made of.
    """
    try:
        with open(tar, "rb") as file:
            length = os.fstat(file.fileno()).st_size
            here, stop = start, length if end is None else end
            while here < stop and (header := _header_at(file, here)) is not None:
                name, offset, size, regular = header
                first, here = here, offset + -(-size // BLOCK) * BLOCK
                if regular and here <= length:
                    yield first, name, offset, size
        # A tar cut between two members reads as a shorter one; what tells is the empty block that ends it.
        if end is None and here + BLOCK > length:
            raise UsageError(f"{tar}: truncated at {length} bytes; copy or convert it again")
    except tarfile.TarError as error:
        raise UsageError(f"{tar}: not an uncompressed tar ({error}); convert the data again") from None
    except OSError as error:
        raise UsageError(f"{tar}: {error.strerror or error}; check the path and its permissions") from None


def _header_at(file: IO[bytes], here: int) -> tuple[str, int, int, bool] | None:
    """Name, offset, size and whether it is a regular file, of the member at `here`; None at the end, or past it.

    The headers that nearly every member has are read here, in a tenth of the time; tarfile reads the others.
    """
    file.seek(here)
    block = file.read(BLOCK)
    if not block.strip(b"\0") or (here and len(block) < BLOCK):
        return None
    plain = _plain_header(block)
    if plain is not None and plain[0] == b"x" and plain[2] <= BLOCK and _TIMES.fullmatch(file.read(BLOCK)[: plain[2]]):
        # webdataset, and so img2dataset, puts a header with the time in fractions of a second before every member.
        plain, start = _plain_header(file.read(BLOCK)), here + 2 * BLOCK
    else:
        start = here
    if plain is not None and plain[0] in _PLAIN and not plain[1].endswith(b"/"):
        return plain[1].decode("utf-8", "surrogateescape"), start + BLOCK, plain[2], True
    file.seek(here)
    member = tarfile.TarFile(fileobj=file).next()
    if member is None:  # tarfile takes a damaged header for the end
        raise tarfile.ReadError(f"invalid header at byte {here}")
    if member.issparse():  # its size is more than what is stored: it would take what follows for a part of it
        raise tarfile.ReadError(f"a file with holes at byte {here}")
    return member.name, member.offset_data, member.size if member.isreg() else 0, member.isreg()


def _plain_header(block: bytes) -> tuple[bytes, bytes, int] | None:
    """Type, name and size that a header of ordinary numbers gives; None for any other."""
    fields = block[124:136].rstrip(b"\0 "), block[148:156].rstrip(b"\0 ")
    if len(block) < BLOCK or block[257:262] != b"ustar" or not all(map(_OCTAL.fullmatch, fields)):
        return None
    size, checksum = (int(field, 8) for field in fields)
    if checksum != sum(block) - sum(block[148:156]) + 8 * ord(" "):
        return None
    name = (block[345:500].rstrip(b"\0") + b"/" if block[345] else b"") + block[:100].partition(b"\0")[0]
    return block[156:157], name, size


def tar_header(name: str, size: int) -> bytes:
    """The tar header of a regular file: tarfile's, whose fixed fields are taken from a template where they suffice."""
    encoded = name.encode("utf-8", "surrogateescape")
    if len(encoded) > 100 or not name.isascii() or size >= 8**11:
        member = tarfile.TarInfo(name)
        member.size = size
        return member.tobuf(tarfile.PAX_FORMAT)
    digits = b"%011o" % size
    return _TEMPLATE % (encoded.ljust(100, b"\0"), digits, _TEMPLATE_SUM + sum(encoded) + sum(digits))


def _template() -> tuple[bytes, int]:
    """A header with places for name, size and checksum, and the sum of all its bytes but the first two of these."""
    plain = tarfile.TarInfo("").tobuf(tarfile.PAX_FORMAT)
    before, between, after = plain[100:124], plain[135:148], plain[156:]
    # The checksum's own bytes count as spaces.
    return b"%b" + before + b"%b" + between + b"%06o\0 " + after, sum(before + between + b" " * 8 + after)


_TEMPLATE, _TEMPLATE_SUM = _template()
