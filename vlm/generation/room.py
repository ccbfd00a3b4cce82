"""The rows of a batch: what each of them holds, whose it is, and where it stands.

Knows tokens, pictures' keys, and where a row's keys and values lie. Knows nothing of models, of how a token is chosen, or of
who waits.

The rows stand in this order: those that generate, those whose prompt is being read, the others. So every forward pass is
over neighbouring rows, and reads their keys and values where they lie. Where a row is to stand elsewhere, it changes places
with the one that stands there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import compress, count
from operator import ne

from torch import Tensor

from .request import Generation, Prompt
from .sight import Gallery
from .slots import Slots

SPAN = 64  # keys are attended to in multiples of this, so that few shapes occur
AHEAD = 256  # tokens of a reply that there is room for from the start: most end long before they may say no more
WORTH_COPYING = 16  # tokens of a prompt that another row has read

Unseen = dict[
    bytes, tuple[Tensor, list[tuple[int, int]]]
]  # a picture's key -> its pixels, and the rows and slots it is for


@dataclass(eq=False)
class Row:
    """One row of the room: the tokens whose keys and values lie there, the pictures that hang there, and whose it is.

    pending: tokens of its request that are to be read there next. beam: which of the request's beams it is.
    """

    tokens: list[int] = field(default_factory=list)
    pending: list[int] = field(default_factory=list)
    pictures: list[bytes] = field(default_factory=list)
    generation: Generation | None = None
    beam: int = 0
    freed: int = 0  # when its request ended, as a count of rows

    @property
    def owner(self) -> Generation:
        """Whose it is, of a row that is somebody's."""
        assert self.generation is not None, "it belongs to somebody"
        return self.generation


class Room:
    """Rows in their order. A row keeps what it holds when it is freed, until the room is needed.

    rows: how many. length: most tokens of each. image_token_id: the token that stands for a picture.
    generating, active: rows before these numbers generate, and belong to somebody.
    """

    def __init__(self, rows: int, length: int, slots: Slots, gallery: Gallery, image_token_id: int | None) -> None:
        self.rows = [Row() for _ in range(rows)]
        self.length, self.slots, self.gallery, self.image_token_id = length, slots, gallery, image_token_id
        self.generating, self.active = 0, 0
        self._freed = 0

    @property
    def generations(self) -> list[Generation]:
        """Who has rows."""
        return list(dict.fromkeys(row.owner for row in self.rows[: self.active]))

    @property
    def free(self) -> int:
        """Rows that are nobody's, now and later: a search begins with one row and is owed one for each of its beams."""
        return len(self.rows) - sum(one.decoding.num_beams for one in self.generations)

    def forget(self) -> None:
        """What the rows that are nobody's hold is worth nothing any more."""
        for row in self.rows[self.active :]:
            row.tokens, row.pictures = [], []

    def reserve(self, tokens: int, index: int = 0) -> None:
        """Room for so many tokens, in each row up to this one; it grows by doubling, up to what there is to be."""
        rows, length = max(1, self.slots.rows), max(SPAN, self.slots.length)
        while rows <= index:
            rows *= 2
        while length < min(tokens, self.length):
            length *= 2
        self.slots.reserve(min(rows, len(self.rows)), min(length, self.length))
        self.gallery.reserve(self.slots.rows)

    # Rows come and go

    def place(self, generation: Generation, unseen: Unseen) -> None:
        """Give a request a row, with as much of its prompt as another row has read; `unseen` gathers pictures to encode."""
        prompt = generation.prompt
        best, shared = self.likest(prompt)
        goes_on = best >= self.active and shared == len(self.rows[best].tokens)
        target = best if goes_on else self._oldest()
        self.reserve(len(prompt.ids) + min(generation.most, AHEAD), target)
        if target != best and shared >= WORTH_COPYING:
            self.slots.copy([best], [target], 0, shared)
        elif target != best:
            shared = 0
        row = self.rows[target]
        row.tokens, row.pending = prompt.ids[:shared], prompt.ids[shared:]
        self._swap(target, self.active)
        self._hang(self.active, prompt, unseen)
        row.pictures, row.generation, row.beam = prompt.picture_keys, generation, 0
        generation.reused = shared
        self.active += 1

    def begin(self, row: Row) -> None:
        """Its prompt has been read: it generates from now on."""
        self._swap(self.rows.index(row), self.generating)
        self.generating += 1

    def branch(self, rows: Sequence[Row], parents: Sequence[int]) -> list[Row]:
        """A row for each child of the `parents` among a request's rows, holding what its parent's holds.

        A first child stays where its parent is. The others take rows of those that have no child, then free ones; what rows
        hold in common is not copied. Rows that are left over are freed.
        """
        spare = [row for number, row in enumerate(rows) if number not in parents]
        children: list[Row] = []
        copies: list[tuple[Row, Row]] = []
        for place, parent in enumerate(parents):
            child = rows[parent]
            if parent in parents[:place]:
                child = spare.pop() if spare else self._open(child.owner)
                copies.append((rows[parent], child))
            children.append(child)
        self.retire(spare)
        if copies:
            self._copy(copies)
        return children

    def retire(self, rows: Iterable[Row]) -> None:
        """They are nobody's now. The last goes first, so that neighbours need not change places."""
        for row in sorted(rows, key=self.rows.index, reverse=True):
            self._freed += 1
            row.generation, row.freed = None, self._freed
            index = self.rows.index(row)
            if index < self.generating:
                self.generating -= 1
                self._swap(index, self.generating)
                index = self.generating
            self.active -= 1
            self._swap(index, self.active)

    def _open(self, generation: Generation) -> Row:
        """One row more for a request that generates."""
        oldest = self._oldest()
        self.reserve(0, oldest)
        row = self.rows[oldest]
        row.generation = generation
        self._swap(oldest, self.active)
        self.active += 1
        self.begin(row)
        return row

    def _copy(self, pairs: Sequence[tuple[Row, Row]]) -> None:
        """Give every second row what the first one holds, from where any two begin to differ."""
        start = min(alike(one.tokens, other.tokens) if one.pictures == other.pictures else 0 for one, other in pairs)
        end = max(len(one.tokens) for one, _ in pairs)
        sources, targets = ([self.rows.index(pair[side]) for pair in pairs] for side in (0, 1))
        self.slots.copy(sources, targets, start, end)
        if any(one.pictures != other.pictures for one, other in pairs):
            self.gallery.copy(sources, targets)
        for one, other in pairs:
            other.tokens, other.pictures = list(one.tokens), one.pictures

    def _oldest(self) -> int:
        return min(range(self.active, len(self.rows)), key=lambda index: self.rows[index].freed)

    def _swap(self, one: int, other: int) -> None:
        if one != other:
            self.slots.swap(one, other, max(len(self.rows[one].tokens), len(self.rows[other].tokens)))
            self.gallery.swap(one, other)
            self.rows[one], self.rows[other] = self.rows[other], self.rows[one]

    def _hang(self, index: int, prompt: Prompt, unseen: Unseen) -> None:
        """Hang a prompt's pictures into a row: those that hang somewhere are copied, the others wait in `unseen`."""
        hanging = {key: (row, slot) for row, held in enumerate(self.rows) for slot, key in enumerate(held.pictures)}
        known = {
            slot: self.gallery.take(*hanging[key]).clone()
            for slot, key in enumerate(prompt.picture_keys)
            if key in hanging and key not in unseen and hanging[key] != (index, slot)
        }
        for slot, keys_values in known.items():
            self.gallery.hang(index, slot, keys_values, self.slots.rows, len(prompt.picture_keys))
        for slot, key in enumerate(prompt.picture_keys):
            if key not in hanging or key in unseen:
                assert prompt.pixels is not None, "it has a key"
                unseen.setdefault(key, (prompt.pixels[slot], []))[1].append((index, slot))

    # Who begins alike

    def likest(self, prompt: Prompt) -> tuple[int, int]:
        """The row that begins most like a prompt, and how many tokens they share."""
        best, most = 0, 0
        for index, row in enumerate(self.rows):
            shared = self.shared(row.tokens, row.pictures, prompt) if row.tokens else 0
            if shared > most:
                best, most = index, shared
            if most == len(prompt.ids) - 1:
                break
        return best, most

    def worth_waiting(self, prompt: Prompt) -> bool:
        """Whether a row is about to have read what this prompt begins with, and no row has."""
        _, have = self.likest(prompt)
        reading = [row.owner.prompt for row in self.rows[self.generating : self.active]]
        coming = max((self.shared(one.ids, one.picture_keys, prompt) for one in reading), default=0)
        return coming - have >= WORTH_COPYING

    def shared(self, tokens: Sequence[int], pictures: Sequence[bytes], prompt: Prompt) -> int:
        """How many tokens a prompt and a row begin with in common, equal pictures in them; one of the prompt stays to be read."""
        length = min(alike(tokens, prompt.ids), len(prompt.ids) - 1)
        places = [place for place in range(length) if prompt.ids[place] == self.image_token_id]
        for place, one, other in zip(places, pictures, prompt.picture_keys, strict=False):
            if one != other:
                return place
        return length


def alike(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return next(compress(count(), map(ne, one, other)), min(len(one), len(other)))
