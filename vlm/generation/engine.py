"""The decoding engine: requests come and go between steps, and every step gives each of them a token.

Knows which row of the batch belongs to whom, what of it has been read, and what an earlier request left there. Knows nothing
of threads, clocks, conversations or files: one thread owns an engine and calls `step`.

The rows of the room stand in this order: those that generate, those whose prompt is being read, the others. So every forward
pass is over neighbouring rows, and reads their keys and values where they lie. Where a row is to stand elsewhere, it changes
places with the one that stands there.

Shapes: B rows and L tokens of a pass, V words.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vlm.errors import UsageError
from vlm.model import VLMModel

from .choosing import choose
from .decoding import Decoding
from .request import Generation, Prompt
from .sight import Gallery, masks
from .slots import Slots

SPAN = 64  # keys are attended to in multiples of this, so that few shapes occur
SHORTEST_PIECE = 16  # tokens of a prompt that are worth a pass
WORTH_COPYING = 16  # tokens of a prompt that another row has read


@dataclass
class Row:
    """One row of the room: the tokens whose keys and values lie there, the pictures that hang there, and whose it is."""

    tokens: list[int] = field(default_factory=list)
    pictures: list[bytes] = field(default_factory=list)
    generation: Generation | None = None
    freed: int = 0  # when its request ended, as a count of requests


class Engine:
    """Decodes many requests together: continuous batching (Orca, Yu et al. 2022) over static rows.

    A row keeps what it holds when its request ends, until the room is needed: a request that begins with the same tokens
    and pictures (the next turn of a conversation) takes it over, or copies it from a row that is in use.

    rows: most requests at once. length: most tokens of a request, prompt and reply; None is what the language model takes.
    chunk: most tokens of prompts read in a step, so that long ones hold nobody up. int8_cache: see `Slots`.
    compile: run the one-token pass through torch.compile: minutes at the first steps, which its cache on disk spares later
    processes, and less time between kernels from then on.
    """

    def __init__(
        self,
        model: VLMModel,
        tokenizer: PreTrainedTokenizerBase,
        end_tokens: Sequence[int],
        *,
        rows: int,
        length: int | None = None,
        chunk: int = 512,
        int8_cache: bool = False,
        compile: bool = False,
    ) -> None:
        text = model.language_model.config.get_text_config()
        if model.config.reading == "masked":
            raise UsageError(
                f"language model family {text.model_type!r} reads both ways and cannot generate; "
                "use fill_mask or embeddings, or train with a decoder family"
            )
        limit = model.max_tokens
        if length is not None and limit is not None and length > limit:
            raise UsageError(f"length is {length} and the language model takes {limit} tokens; lower it")
        self.model, self.tokenizer, self.end_tokens = model, tokenizer, frozenset(end_tokens)
        self.most_tokens, self.chunk = length or limit or 2**20, chunk
        self.slots = Slots(text.num_hidden_layers, int8_cache)
        self.gallery = Gallery(model.tokens_per_picture)
        self.rows = [Row() for _ in range(rows)]
        self.generating, self.active = 0, 0  # rows before these numbers generate, and belong to somebody
        self.queue: deque[Generation] = deque()
        self.ended = 0
        self._decoding_pass = torch.compile(model.forward) if compile else model
        parameters = inspect.signature(model.language_model.forward).parameters
        self._cache_name = "cache" if "cache" in parameters else "past_key_values"
        self._picks_logits = "logits_to_keep" in parameters
        self._weights = self._state_of_weights()

    # What a caller does

    def add(self, prompt: Prompt, decoding: Decoding) -> Generation:
        """Queue a request. Raises UsageError for one that can never be served."""
        pictures, places = len(prompt.picture_keys), prompt.ids.count(self.model.config.image_token_id or -1)
        if decoding.num_beams > 1:
            raise UsageError(f"num_beams is {decoding.num_beams}; beams are searched apart, by VLM.generate")
        if not prompt.ids:
            raise UsageError("the prompt has 0 tokens; write at least one word")
        if pictures != places:
            raise UsageError(
                f"the text has {places} <image> places and {pictures} pictures came with it; give one picture for each place"
            )
        if len(prompt.ids) >= self.most_tokens:
            who = "the language model" if self.most_tokens == self.model.max_tokens else "this engine"
            raise UsageError(
                f"the text has {len(prompt.ids)} tokens and 1 to come and {who} takes {self.most_tokens}; shorten it"
            )
        generation = Generation(prompt, decoding, self.tokenizer)
        self.queue.append(generation)
        return generation

    @torch.inference_mode()
    def cancel(self, generation: Generation) -> None:
        """End a reply now; its row is free for the next."""
        if generation.finish_reason is not None:
            return
        generation.end("cancelled")
        if generation in self.queue:
            self.queue.remove(generation)
        else:
            self._retire(next(row for row in self.rows if row.generation is generation))

    def cancel_all(self) -> None:
        """End every reply now."""
        for generation in [*self.queue, *(row.generation for row in self.rows[: self.active] if row.generation)]:
            self.cancel(generation)

    @torch.inference_mode()
    def step(self) -> list[Generation]:
        """Admit who waits, read a piece of their prompts, and give every row that has been read a token.

        Returns the generations that changed.
        """
        self._admit()
        return list(dict.fromkeys(self._read_prompts() + self._decode()))

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.active or self.queue)

    @property
    def running(self) -> int:
        """Requests that hold a row."""
        return self.active

    @property
    def waiting(self) -> int:
        """Requests that wait for a row."""
        return len(self.queue)

    @property
    def cache_bytes(self) -> int:
        """Keys and values of text and pictures, all rows."""
        return self.slots.bytes + self.gallery.bytes

    # Rows come and go

    def _admit(self) -> None:
        if self.queue and self._weights != (now := self._state_of_weights()):
            self._weights = now
            for row in self.rows[self.active :]:
                row.tokens, row.pictures = [], []
        unseen: dict[bytes, tuple[Tensor, list[tuple[int, int]]]] = {}
        while self.queue and self.active < len(self.rows) and not self._worth_waiting(self.queue[0].prompt):
            self._place(self.queue.popleft(), unseen)
        if unseen:
            self._look(unseen)

    def _worth_waiting(self, prompt: Prompt) -> bool:
        """Whether a row is about to have read what this prompt begins with, and no row has."""
        _, have = self._likest(prompt)
        reading = [row.generation.prompt for row in self.rows[self.generating : self.active] if row.generation]
        coming = max((self._shared(one.ids, one.picture_keys, prompt) for one in reading), default=0)
        return coming - have >= WORTH_COPYING

    def _place(self, generation: Generation, unseen: dict[bytes, tuple[Tensor, list[tuple[int, int]]]]) -> None:
        """Give a request a row, with as much of its prompt as another row has read; `unseen` gathers pictures to encode."""
        prompt = generation.prompt
        best, shared = self._likest(prompt)
        goes_on = best >= self.active and shared == len(self.rows[best].tokens)
        oldest = min(range(self.active, len(self.rows)), key=lambda index: self.rows[index].freed)
        target = best if goes_on else oldest
        self._reserve(target, len(prompt.ids) + generation.decoding.max_new_tokens)
        if target != best and shared >= WORTH_COPYING:
            self.slots.copy(best, target, shared)
        elif target != best:
            shared = 0
        self.rows[target].tokens = prompt.ids[:shared]
        self._swap(target, self.active)
        self._hang(self.active, prompt, unseen)
        row = self.rows[self.active]
        row.pictures, row.generation = prompt.picture_keys, generation
        generation.reused = shared
        self.active += 1

    def _likest(self, prompt: Prompt) -> tuple[int, int]:
        """The row that begins most like a prompt, and how many tokens they share."""
        best, most = 0, 0
        for index, row in enumerate(self.rows):
            shared = self._shared(row.tokens, row.pictures, prompt) if row.tokens else 0
            if shared > most:
                best, most = index, shared
            if most == len(prompt.ids) - 1:
                break
        return best, most

    def _shared(self, tokens: Sequence[int], pictures: Sequence[bytes], prompt: Prompt) -> int:
        """How many tokens a prompt and a row begin with in common, equal pictures in them; one of the prompt stays to be read."""
        most = min(len(tokens), len(prompt.ids) - 1)
        pairs = enumerate(zip(tokens, prompt.ids[:most], strict=False))
        length = next((place for place, (one, other) in pairs if one != other), most)
        places = [place for place in range(length) if prompt.ids[place] == self.model.config.image_token_id]
        for place, one, other in zip(places, pictures, prompt.picture_keys, strict=False):
            if one != other:
                return place
        return length

    def _reserve(self, index: int, tokens: int) -> None:
        """Room for a row and its tokens; it grows by doubling, up to what the engine was made for."""
        rows, length = max(1, self.slots.rows), max(SPAN, self.slots.length)
        while rows <= index:
            rows *= 2
        while length < min(tokens, self.most_tokens):
            length *= 2
        self.slots.reserve(min(rows, len(self.rows)), min(length, self.most_tokens))
        self.gallery.reserve(self.slots.rows)

    def _retire(self, row: Row) -> None:
        self.ended += 1
        row.generation, row.freed = None, self.ended
        index = self.rows.index(row)
        if index < self.generating:
            self.generating -= 1
            self._swap(index, self.generating)
            index = self.generating
        self.active -= 1
        self._swap(index, self.active)

    def _swap(self, one: int, other: int) -> None:
        if one != other:
            self.slots.swap(one, other, max(len(self.rows[one].tokens), len(self.rows[other].tokens)))
            self.gallery.swap(one, other)
            self.rows[one], self.rows[other] = self.rows[other], self.rows[one]

    def _state_of_weights(self) -> int:
        """Changes whenever weights do; what was read with others is worth nothing."""
        return hash(tuple((weight.data_ptr(), weight._version) for weight in self.model.parameters()))

    # Pictures

    def _hang(self, index: int, prompt: Prompt, unseen: dict[bytes, tuple[Tensor, list[tuple[int, int]]]]) -> None:
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

    def _look(self, unseen: dict[bytes, tuple[Tensor, list[tuple[int, int]]]]) -> None:
        """Encode pictures, all at once, and hang them where they are wanted."""
        pixels = torch.stack([picture for picture, _ in unseen.values()]).to(self.model.device)
        own = torch.arange(len(pixels), device=pixels.device)[:, None]
        keys_values = self.model.image_keys_values(self.model.image_states(pixels), own)  # (n, A, 2, K, S, d)
        for picture, (_, places) in zip(keys_values, unseen.values(), strict=True):
            for index, slot in places:
                self.gallery.hang(index, slot, picture, self.slots.rows, len(self.rows[index].pictures))

    # Passes

    def _read_prompts(self) -> list[Generation]:
        """Read a piece of the prompts that are not read yet; the replies that begin with it."""
        count = min(self.active - self.generating, max(1, self.chunk // SHORTEST_PIECE))
        if not count:
            return []
        rows = self.rows[self.generating : self.generating + count]
        most = self.chunk // count
        pieces = [self._prompt_of(row)[len(row.tokens) :][:most] for row in rows]
        logits = self._pass(self.generating, pieces)
        read = []
        for place, (row, piece) in enumerate(zip(rows, pieces, strict=True)):
            row.tokens = row.tokens + piece
            if len(row.tokens) == len(self._prompt_of(row)):
                read.append(place)
                self._swap(self.rows.index(row), self.generating)
                self.generating += 1
        return self._say([rows[place] for place in read], logits[read]) if read else []

    def _decode(self) -> list[Generation]:
        """One token for every row that generates."""
        rows = self.rows[: self.generating]
        pieces = [row.generation.tokens[-1:] for row in rows if row.generation]
        if not rows:
            return []
        logits = self._pass(0, pieces)
        for row, piece in zip(rows, pieces, strict=True):
            row.tokens = row.tokens + piece
        return self._say(rows, logits)

    def _pass(self, first: int, pieces: list[list[int]]) -> Tensor:
        """Read a piece of each of the rows from `first` on -> logits (B, V) of what follows its last token."""
        rows = self.rows[first : first + len(pieces)]
        length = max(len(piece) for piece in pieces)
        starts = [len(row.tokens) for row in rows]
        ends = [start + len(piece) for start, piece in zip(starts, pieces, strict=True)]
        span = min(-(-max(ends) // SPAN) * SPAN, self.slots.length)
        device = self.model.device
        ids = torch.tensor([piece + [0] * (length - len(piece)) for piece in pieces], device=device)
        positions = torch.tensor(starts, device=device)[:, None] + torch.arange(length, device=device)
        real = positions < torch.tensor(ends, device=device)[:, None]
        positions = torch.where(real, positions, 0)
        told = {
            "attention_mask": masks(
                self.model.language_model.config.get_text_config(), positions, span, self.model.language_model.dtype
            ),
            "position_ids": positions,
            "use_cache": True,
            self._cache_name: self.slots.pass_over(first, positions, real, span),
        }
        pictures = max(len(row.pictures) for row in rows)
        if pictures:
            told["image_keys_values"] = self.gallery.seen_from(first, len(rows), pictures)
            told["token_image"] = self._token_image(rows, pieces, length)
        lasts = sorted({len(piece) - 1 for piece in pieces})
        if self._picks_logits and length > 1:
            told["logits_to_keep"] = torch.tensor(lasts, device=device)
        else:
            lasts = list(range(length))
        logits = (self.model if length > 1 else self._decoding_pass)(input_ids=ids, **told).logits
        return logits[range(len(rows)), [lasts.index(len(piece) - 1) for piece in pieces]]

    def _token_image(self, rows: Sequence[Row], pieces: Sequence[Sequence[int]], length: int) -> Tensor:
        """(B, L): the slot of the picture that each token sees, -1 where there is none."""
        image = self.model.config.image_token_id
        slots = []
        for row, piece in zip(rows, pieces, strict=True):
            seen = row.tokens.count(image) - 1
            own = [seen := seen + (token == image) for token in piece]
            slots.append(own + [-1] * (length - len(piece)))
        return torch.tensor(slots, device=self.model.device)

    def _say(self, rows: Sequence[Row], logits: Tensor) -> list[Generation]:
        """Choose the next token of each row from logits (B, V); who has ended leaves its row."""
        generations = [row.generation for row in rows if row.generation]
        if self.model.config.image_token_id is not None:
            # A generated <image> would stand for no picture, and the text after it would see another one.
            logits[:, self.model.config.image_token_id] = -torch.inf
        tokens, told = choose(logits, [one.chooser for one in generations], [one.said for one in generations])
        for row, generation, token, log_probability in zip(rows, generations, tokens, told, strict=True):
            room = self.most_tokens - len(generation.prompt.ids) - len(generation.tokens) - 1
            generation.add(token, log_probability, token in self.end_tokens, room)
            if generation.finish_reason is not None:
                self._retire(row)
        return generations

    @staticmethod
    def _prompt_of(row: Row) -> list[int]:
        assert row.generation is not None, "it belongs to somebody"
        return row.generation.prompt.ids
