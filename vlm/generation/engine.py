"""The decoding engine: requests come and go between steps; a step tells who came their first token, or all the next one.

Knows who waits, what is read next, and what follows from it. Knows nothing of threads, clocks, conversations or files: one
thread owns an engine and calls `step`.

Shapes: B rows and L tokens of a pass, V words.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vlm.errors import UsageError
from vlm.model import VLMModel
from vlm.packed_linear import packed_layers

from .choosing import choose, continuations
from .decoding import Decoding
from .request import Generation, Prompt
from .room import SPAN, Room, Row, Unseen
from .sight import Gallery, masks
from .slots import Slots

SHORTEST_PIECE = 16  # tokens of a prompt that are worth a pass


class Engine:
    """Decodes many requests together: continuous batching (Orca, Yu et al. 2022) over static rows.

    A row keeps what it holds when its request ends, until the room is needed: a request that begins with the same tokens
    and pictures (the next turn of a conversation) takes it over, or copies it from a row that is in use. A request with
    beams has a row for each, once its prompt is read, and waits until so many are free.

    rows: most requests, or beams of them, at once. length: most tokens of a request, prompt and reply; None is what the
    language model takes. chunk: most tokens of prompts read in a step, so that long ones hold nobody up. int8_cache: see `Slots`.
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
        if length is not None and length < 2:
            raise UsageError(f"length is {length} and a prompt and a reply take 2 tokens; raise it")
        self.model, self.tokenizer, self.end_tokens = model, tokenizer, frozenset(end_tokens)
        self.most_tokens, self.chunk = length or limit or 2**20, chunk
        self.slots = Slots(text.num_hidden_layers, int8_cache)
        self.gallery = Gallery(model.tokens_per_picture)
        self.room = Room(rows, self.most_tokens, self.slots, self.gallery, model.config.image_token_id)
        self.queue: deque[Generation] = deque()
        self._has_begun = False  # whether the step before brought first tokens
        self._decoding_pass = torch.compile(model.forward) if compile else model
        parameters = inspect.signature(model.language_model.forward).parameters
        self._cache_name = "cache" if "cache" in parameters else "past_key_values"
        self._picks_logits = "logits_to_keep" in parameters
        self._weights, self._kinds = self._state_of_weights(), self._kinds_of_weights()

    # What a caller does

    def add(self, prompt: Prompt, decoding: Decoding) -> Generation:
        """Queue a request. Raises UsageError for one that can never be served."""
        pictures, places = len(prompt.picture_keys), prompt.ids.count(self.model.config.image_token_id or -1)
        rows = len(self.room.rows)
        if decoding.num_beams > rows:
            raise UsageError(
                f"num_beams is {decoding.num_beams} and this engine has {rows} rows; ask for at most so many"
            )
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
        most = min(decoding.max_new_tokens, self.most_tokens - len(prompt.ids))
        generation = Generation(prompt, decoding, self.tokenizer, most)
        self.queue.append(generation)
        return generation

    @torch.inference_mode()
    def cancel(self, generation: Generation) -> None:
        """End a reply now; its rows are free for the next."""
        if generation.finish_reason is not None:
            return
        generation.end("cancelled")
        if generation in self.queue:
            self.queue.remove(generation)
        self.room.retire([row for row in self.room.rows if row.generation is generation])

    def cancel_all(self) -> None:
        """End every reply now."""
        for generation in [*self.queue, *self.room.generations]:
            self.cancel(generation)

    @torch.inference_mode()
    def step(self) -> list[Generation]:
        """Admit who waits and read a piece of their prompts; tell their first tokens, or give every row the next one.

        First tokens are told at once, a pass earlier than with the others' next ones, and the step after them reads nothing:
        who comes holds up who is there by one pass in two. Returns the generations that changed.
        """
        if not (self._has_begun and self.room.generating):
            self._admit()
            if begun := self._read_prompts():
                self._has_begun = True
                return begun
        self._has_begun = False
        return self._decode()

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.room.active or self.queue)

    @property
    def running(self) -> int:
        """Requests that hold rows."""
        return len(self.room.generations)

    @property
    def waiting(self) -> int:
        """Requests that wait for rows."""
        return len(self.queue)

    @property
    def cache_bytes(self) -> int:
        """Keys and values of text and pictures, all rows."""
        return self.slots.bytes + self.gallery.bytes

    @property
    def fits(self) -> bool:
        """Whether the weights are of the types and on the devices that they were made room for."""
        return self._kinds == self._kinds_of_weights()

    # Who comes, and what they show

    def _admit(self) -> None:
        if self.queue and self._weights != (now := self._state_of_weights()):
            self._weights = now
            self.room.forget()
        unseen: Unseen = {}
        while self.queue and self._has_room_for(self.queue[0]):
            self.room.place(self.queue.popleft(), unseen)
        if unseen:
            self._look(unseen)

    def _has_room_for(self, generation: Generation) -> bool:
        return generation.decoding.num_beams <= self.room.free and not self.room.worth_waiting(generation.prompt)

    def _state_of_weights(self) -> int:
        """Changes whenever weights do; what was read with others is worth nothing."""
        plain = ((weight.data_ptr(), weight._version) for weight in self.model.parameters())
        packed = (layer.packed.number for layer in packed_layers(self.model) if layer.packed)
        return hash((*plain, *packed))

    def _kinds_of_weights(self) -> int:
        return hash(tuple((weight.dtype, weight.device) for weight in self.model.parameters()))

    def _look(self, unseen: Unseen) -> None:
        """Encode pictures, all at once, and hang them where they are wanted."""
        pixels = torch.stack([picture for picture, _ in unseen.values()]).to(self.model.device)
        own = torch.arange(len(pixels), device=pixels.device)[:, None]
        keys_values = self.model.image_keys_values(self.model.image_states(pixels), own)  # (n, A, 2, K, S, d)
        for picture, (_, places) in zip(keys_values, unseen.values(), strict=True):
            for index, slot in places:
                self.gallery.hang(index, slot, picture, self.slots.rows, len(self.room.rows[index].pictures))

    # Passes

    def _read_prompts(self) -> list[Generation]:
        """Read a piece of the prompts that are not read yet; the replies that begin with it."""
        first = self.room.generating
        count = min(self.room.active - first, max(1, self.chunk // SHORTEST_PIECE))
        if not count:
            return []
        rows = self.room.rows[first : first + count]
        logits = self._pass(first, [row.pending[: self.chunk // count] for row in rows])
        read = [place for place, row in enumerate(rows) if not row.pending]
        for place in read:
            self.room.begin(rows[place])
        return self._say([rows[place] for place in read], logits[read]) if read else []

    def _decode(self) -> list[Generation]:
        """One token for every row that generates."""
        rows = self.room.rows[: self.room.generating]
        return self._say(rows, self._pass(0, [row.pending for row in rows])) if rows else []

    def _pass(self, first: int, pieces: list[list[int]]) -> Tensor:
        """Read a piece of each of the rows from `first` on -> logits (B, V) of what follows its last token."""
        rows = self.room.rows[first : first + len(pieces)]
        length = max(len(piece) for piece in pieces)
        starts = [len(row.tokens) for row in rows]
        ends = [start + len(piece) for start, piece in zip(starts, pieces, strict=True)]
        self.room.reserve(max(ends))
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
        for row, piece in zip(rows, pieces, strict=True):
            row.tokens, row.pending = row.tokens + piece, row.pending[len(piece) :]
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

    # What follows

    def _say(self, rows: Sequence[Row], logits: Tensor) -> list[Generation]:
        """What follows in each row, from logits (B, V); who has ended leaves its rows."""
        alone = [place for place, row in enumerate(rows) if row.owner.search is None]
        beams: dict[Generation, list[int]] = {}
        for place in sorted(set(range(len(rows))).difference(alone), key=lambda place: rows[place].beam):
            beams.setdefault(rows[place].owner, []).append(place)
        changed = self._choose([rows[place] for place in alone], logits[alone] if beams else logits) if alone else []
        for generation, places in beams.items():
            self._search(generation, [rows[place] for place in places], logits[places])
        return changed + [generation for generation in beams if generation.finish_reason is not None]

    def _choose(self, rows: Sequence[Row], logits: Tensor) -> list[Generation]:
        """The next token of each row."""
        generations = [row.owner for row in rows]
        if self.model.config.image_token_id is not None:
            # A generated <image> would stand for no picture, and the text after it would see another one.
            logits[:, self.model.config.image_token_id] = -torch.inf
        tokens, told = choose(logits, [one.chooser for one in generations], [one.said for one in generations])
        for row, generation, token, log_probability in zip(rows, generations, tokens, told, strict=True):
            row.pending = [token]
            generation.add(token, log_probability, token in self.end_tokens)
        self.room.retire([row for row in rows if row.owner.finish_reason is not None])
        return generations

    def _search(self, generation: Generation, rows: Sequence[Row], logits: Tensor) -> None:
        """The next beams of a request, from the logits (B, V) of those it has."""
        search = generation.search
        assert search is not None, "it has beams"
        likeliest = continuations(
            logits,
            [beam.log_probability for beam in search.beams],
            [generation.prompt.ids + beam.tokens for beam in search.beams],
            penalty=generation.decoding.repetition_penalty,
            never=self.model.config.image_token_id,
            count=search.wanted(self.end_tokens),
        )
        parents = search.advance(likeliest, self.end_tokens)
        if search.over:
            generation.settle(search.hypotheses[0])
            parents = []
        for number, row in enumerate(self.room.branch(rows, parents)):
            row.beam, row.pending = number, search.beams[number].tokens[-1:]
