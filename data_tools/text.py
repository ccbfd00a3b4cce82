"""Text files and JSON lines into blocks of tokens from which the source can be put together again, byte for byte.

Knows files, encodings, documents, packing and what is stored of a block. Knows nothing of where a text is best cut, nor of
who works on which piece.
"""

from __future__ import annotations

import json
import os
from codecs import getincrementaldecoder
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from vlm.errors import RunError, UsageError
from vlm.shards import write_index
from vlm.storage import Folder

from .engines import LocalEngine
from .job import Engine, PieceWriter, job
from .text_cutting import CHARACTERS, Cutter, Part, cutter, leading_blank

LINES = (".jsonl", ".ndjson")
WINDOW = 1 << 20  # bytes of a file that are in memory at once, where lines are not longer
PIECE = 16 << 20  # bytes of source, about, that one process works on at a time
SEPARATOR = "\n\n"  # between two documents of a block; part of neither
_SEARCH = 1 << 16  # bytes in which a line ends


@dataclass(frozen=True)
class Span:
    """The text of a file from the first good place at or after byte `first` to the first at or after `last`."""

    path: str
    first: int
    last: int


Piece = tuple[Span, ...]


@dataclass(frozen=True)
class Cutting:
    """How texts are cut. tokenizer: path or hub id. length, overlap: tokens of a block, and of it shared with the last."""

    tokenizer: str
    length: int = 512
    overlap: int = 64

    def cutter(self) -> Cutter:
        """The one of this process. Raises UsageError for contradictory numbers or a tokenizer that cannot be used."""
        return cutter(self.tokenizer, self.length, self.overlap)


@dataclass(frozen=True)
class Placed:
    """A part and where it comes from: the document's name, the byte of it that the part begins at, and whether it ends it."""

    name: str
    start: int
    part: Part
    ends: bool = False


def chunk(files: Sequence[str | Path], out: str | Path, cutting: Cutting, engine: Engine | None = None) -> Counter[str]:
    """Write the blocks of some files as shards into the new folder `out`; return how many blocks, documents and tokens.

    A file is text in UTF-8, or JSON lines of {"text": …}. Raises UsageError naming what is no text. The bytes do not depend
    on the engine; killed and started again it goes on where it was.
    """
    cutting.cutter()
    pieces = plan(files)
    changed = [os.stat(path).st_mtime_ns for path in files]
    settings = {"text": [asdict(span) for piece in pieces for span in piece], "changed": changed, **asdict(cutting)}
    counts: Counter[str] = Counter()
    with job(out, settings, engine or LocalEngine()) as work:
        done = list(work.run("chunk", partial(_chunk_piece, cutting), pieces))
        for one in done:
            counts.update(one["counts"])
        if not counts["blocks"]:
            raise UsageError(f"{', '.join(map(str, files))}: no text in there; give files that have some")
        write_index(work.folder.place, [shard for one in done for shard in one["shards"]])
    return counts


def _chunk_piece(cutting: Cutting, folder: Folder, number: int, piece: Piece) -> dict[str, Any]:
    counts: Counter[str] = Counter()
    with PieceWriter(folder, number) as writer:
        for key, parts in blocks(number, piece, cutting, counts):
            writer.write(key, parts)
    return {"samples": counts["blocks"], "shards": writer.shards, "counts": counts}


def plan(files: Sequence[str | Path]) -> list[Piece]:
    """Cut files into pieces of bounded size that can be worked on in any order, by their sizes alone.

    Raises UsageError for a file that is missing, named twice or unreadable, and where all of them are empty.
    """
    paths = [str(file) for file in files]
    twice = [path for path, times in Counter(paths).items() if times > 1]
    if twice:
        raise UsageError(f"{twice[0]}: given twice; name every file once")
    pieces: list[Piece] = []
    waiting: list[Span] = []
    size = 0
    for span in (span for path in paths for span in _spans(path)):
        waiting.append(span)
        size += span.last - span.first
        if size >= PIECE:
            pieces.append(tuple(waiting))
            waiting, size = [], 0
    pieces += [tuple(waiting)] if waiting else []
    if not pieces:
        raise UsageError(f"{', '.join(paths)}: no text in there; give files that have some")
    return pieces


def blocks(number: int, piece: Piece, cutting: Cutting, counts: Counter[str]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key and parts of every block of a piece; `number` is the piece's own, and goes into the keys.

    A block is `{"text": …, "documents": […]}`. Each document in it says its `name`, the `characters` [from, to) of the
    text that are its own, the byte `start` of the document that these begin at, the `overlap` in characters with the
    block before, the white space `before` (with a byte order mark) and `after` it in the source, and whether the document
    `ends` there. Documents that fit
    are packed into one block, in order; one that is longer has blocks of its own up to its rest. A JSON line's document
    is named `FILE@BYTE` by where the line begins, a text file's `FILE`. Added to `counts`: blocks, documents, tokens, and
    blank, the documents of white space alone, which have no block. Raises UsageError naming file and byte or line for
    what is not text.
    """
    cut = cutting.cutter()
    placed = (one for span in piece for one in _parts(span, cut, counts))
    for index, (block, tokens) in enumerate(_packed(placed, cut)):
        counts["blocks"] += 1
        counts["tokens"] += tokens
        yield f"{number:05d}-{index:06d}", {"json": json.dumps(block, ensure_ascii=False).encode()}


def restore(stored: Iterable[Mapping[str, Any]]) -> dict[str, bytes]:
    """The documents that blocks, in any order, were cut from, by name: overlaps removed, white space put back.

    Raises RunError naming the document and its bytes where a block other than the last is missing.
    """
    found: dict[str, list[tuple[int, bytes]]] = {}
    for block in stored:
        for document in block["documents"]:
            first, last = document["characters"]
            text = block["text"][first:last]
            shared = len(text[: document["overlap"]].encode())
            start = document["start"] + shared - len(document["before"].encode())
            fresh = document["before"] + text[document["overlap"] :] + document["after"]
            found.setdefault(document["name"], []).append((start, fresh.encode()))
    return {name: _joined(name, sorted(parts)) for name, parts in found.items()}


def _joined(name: str, parts: list[tuple[int, bytes]]) -> bytes:
    whole = bytearray()
    for start, data in parts:
        if start != len(whole):
            raise RunError(
                f"document {name}: a block ends at byte {len(whole)}, the next begins at {start}; add all blocks"
            )
        whole += data
    return bytes(whole)


# Where pieces begin and end


def _spans(path: str) -> Iterator[Span]:
    try:
        size = Path(path).stat().st_size
        if not size:
            return
        # Counted from the first letter on, so that no span holds white space alone.
        head = 0 if path.endswith(LINES) else _letter(path, 0)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; check the path and its permissions") from None
    places = [0, *range(head + WINDOW, size, WINDOW), size]
    yield from (Span(path, first, last) for first, last in zip(places, places[1:], strict=False))


def _letter(path: str, start: int) -> int:
    """The byte of the first character from `start` on that is not white space; the file's size where there is none."""
    decoder = getincrementaldecoder("utf-8")("replace")
    with open(path, "rb") as file:
        file.seek(start)
        while data := file.read(_SEARCH):
            text = decoder.decode(data)
            blank = leading_blank(text)
            start += len(blank.encode())
            if len(blank) < len(text):
                return start
        return file.tell()


def _text_place(path: str, nominal: int) -> int:
    """The first place from `nominal` on where a line begins with a letter; a word, or a character, where lines do not end."""
    if nominal == 0:
        return 0
    with open(path, "rb") as file:
        file.seek(nominal)
        data = file.read(_SEARCH)
    for white in (b"\n", b" "):
        if white in data:
            return _letter(path, nominal + data.index(white) + 1)
    # A byte 10…… goes on with a character, of which there are three at most.
    return _letter(path, nominal + next((n for n, byte in enumerate(data[:4]) if byte & 0xC0 != 0x80), 0))


def _line_place(path: str, nominal: int) -> int:
    """Where the first line begins from `nominal` on."""
    if nominal == 0:
        return 0
    with open(path, "rb") as file:
        file.seek(nominal - 1)
        while data := file.read(_SEARCH):
            if b"\n" in data:
                return file.tell() - len(data) + data.index(b"\n") + 1
        return file.tell()


# What is in a span


def _parts(span: Span, cut: Cutter, counts: Counter[str]) -> Iterator[tuple[Placed, bool]]:
    """Every part of a span's documents, and whether it is the last that the span has of its document."""
    whole = span.path.endswith(LINES)
    for name, base, text, context in _documents(span, cut.overlap):
        counts["documents"] += context == 0
        placed: Placed | None = None
        start, read = base, 0
        try:
            for part in cut.parts(text, context):
                if placed is not None:
                    yield placed, False
                start, read = start + len(text[read : part.start].encode()), part.start
                placed = Placed(name, start, part)
        except UsageError as error:
            raise UsageError(f"{name}: {error}") from None
        if placed is not None:
            yield replace(placed, ends=whole or span.last == os.stat(span.path).st_size), True
        else:
            counts["blank"] += 1


def _documents(span: Span, overlap: int) -> Iterator[tuple[str, int, str, int]]:
    """Name, byte of the document that the text begins at, text, and how many of its characters are of the span before."""
    if span.path.endswith(LINES):
        yield from ((name, 0, text, 0) for name, text in _lines(span))
        return
    first, last = _text_place(span.path, span.first), _text_place(span.path, span.last)
    # White space alone may have filled the span; then the one before has it.
    if first < last:
        back, before = _context(span.path, first, overlap)
        with open(span.path, "rb") as file:
            file.seek(first)
            text = _utf8(span.path, file.read(last - first), first)
        yield span.path, back, before + text, len(before)


def _context(path: str, end: int, overlap: int) -> tuple[int, str]:
    """Enough of the text before byte `end` for the overlap of what follows, and the byte at which that begins.

    One character at least, by which a span that goes on with a document is told from one that begins it.
    """
    back = max(0, end - max(1, overlap * CHARACTERS) * 4)  # a character has four bytes at most
    with open(path, "rb") as file:
        file.seek(back)
        data = file.read(end - back)
    skipped = next((n for n, byte in enumerate(data[:4]) if byte & 0xC0 != 0x80), 0) if back else 0
    return back + skipped, _utf8(path, data[skipped:], back + skipped)


def _lines(span: Span) -> Iterator[tuple[str, str]]:
    first, last = _line_place(span.path, span.first), _line_place(span.path, span.last)
    with open(span.path, "rb") as file:
        file.seek(first)
        while (start := file.tell()) < last:
            line = file.readline()
            if line.strip():
                yield f"{span.path}@{start}", _line_text(span.path, start, line)


def _line_text(path: str, start: int, line: bytes) -> str:
    try:
        fields = json.loads(line.decode("utf-8-sig"))
        text = fields.get("text") if isinstance(fields, dict) else None
        if not isinstance(text, str):
            raise ValueError('no "text" that is a string')
        text.encode()
    except (ValueError, RecursionError) as error:
        reason = "half a surrogate pair" if isinstance(error, UnicodeEncodeError) else error
        place = f"{path} line {_line_number(path, start)}"
        raise UsageError(f'{place}: {reason}; write one {{"text": …}} a line, in UTF-8') from None
    return text


def _line_number(path: str, start: int) -> int:
    number = 1
    with open(path, "rb") as file:
        while file.tell() < start:
            file.readline()
            number += 1
    return number


def _utf8(path: str, data: bytes, offset: int) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        place = offset + error.start
        raise UsageError(
            f"{path}: byte {place} is {data[error.start]:#04x}, no UTF-8; save the file as UTF-8"
        ) from None


# Packing


def _packed(parts: Iterable[tuple[Placed, bool]], cut: Cutter) -> Iterator[tuple[dict[str, Any], int]]:
    """Blocks and their tokens: rests and short documents together as they come, every other part alone."""
    separator = cut.count(SEPARATOR)
    waiting: list[Placed] = []
    tokens = 0
    for placed, is_last in parts:
        more = placed.part.tokens + separator
        if waiting and (not is_last or tokens + more > cut.length):
            yield from _flushed(waiting, cut)
            waiting, tokens = [], 0
        waiting.append(placed)
        tokens += more
        if not is_last:
            yield from _flushed(waiting, cut)
            waiting, tokens = [], 0
    yield from _flushed(waiting, cut)


def _flushed(waiting: Sequence[Placed], cut: Cutter) -> Iterator[tuple[dict[str, Any], int]]:
    """What waits as one block; as several where the tokens of the whole are more than those of its documents."""
    while waiting:
        for number in range(len(waiting), 0, -1):
            block = _block(waiting[:number])
            tokens = cut.count(block["text"]) if number > 1 else waiting[0].part.tokens
            if tokens <= cut.length:
                break
        yield block, tokens
        waiting = waiting[number:]


def _block(placed: Sequence[Placed]) -> dict[str, Any]:
    documents, first = [], 0
    for one in placed:
        part, last = one.part, first + len(one.part.text)
        kept = {
            "start": one.start,
            "overlap": part.overlap,
            "before": part.before,
            "after": part.after,
            "ends": one.ends,
        }
        documents.append({"name": one.name, "characters": [first, last], **kept})
        first = last + len(SEPARATOR)
    return {"text": SEPARATOR.join(one.part.text for one in placed), "documents": documents}
