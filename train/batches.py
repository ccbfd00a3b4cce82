"""From samples to batches of tensors, one kind for each objective.

Knows samples, the processor and the layout of each objective's batch. Knows nothing of models, losses or optimizers.
A micro-batch is a function of the seed, the stage and its number alone: see `order.py`.

Shapes: B rows, L tokens padded to a multiple of 8, n pictures, M picture slots a row, p pairs, H × W pixels. A row holds
one sample, or several where short samples are packed: see `packing.py`.
"""

from __future__ import annotations

import signal
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vlm.augmentation import Augmentation
from vlm.errors import RunError, UsageError
from vlm.images import open_image
from vlm.losses import IGNORED, mask_tokens
from vlm.processing import VLMProcessor
from vlm.samples import Question, Sample, SampleError, conversations, pair_text, pair_texts, plain_texts, said
from vlm.shards import Shards

from .config_stage import Stage
from .levels import restore, shrink
from .order import Order
from .packing import ENDLESS, Example, Row, laid, layout, padded, slots

Batch = dict[str, Any]

# After so many samples in a row that hold nothing for the stage, it is the data and not the sample.
PATIENCE = 1000


class Reader(ABC):
    """Makes examples of samples and batches of examples.

    longest: tokens that the language model has positions for. augmentation: changes of pictures; None for validation.
    """

    def __init__(
        self,
        processor: VLMProcessor,
        stage: Stage,
        longest: int,
        predicts_next: bool,
        augmentation: Augmentation | None = None,
    ) -> None:
        self.processor = processor
        self.stage = stage
        self.longest = min(longest, stage.max_tokens)
        self.predicts_next = predicts_next
        self.augmentation = augmentation

    @abstractmethod
    def example(self, sample: Sample, rng: np.random.Generator) -> Example:
        """Raises SampleError where the sample holds nothing for this objective, UsageError for a picture that is broken."""

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Rows to tensors."""
        return {
            "input_ids": padded([one.ids for one in examples], self.processor.tokenizer.pad_token_id, self.longest),
            "attention_mask": padded([np.ones_like(one.ids) for one in examples], 0, self.longest),
        }

    def _rows(self, examples: Sequence[Example]) -> list[Row]:
        """The examples side by side in few rows, or each in its own where the stage does not pack."""
        alone = [[number] for number in range(len(examples))]
        lengths = [len(example.ids) for example in examples]
        return laid(examples, layout(lengths, self.stage.max_tokens) if self.stage.pack else alone)

    def _pixels(self, sample: Sample, images: Sequence[bytes], rng: np.random.Generator) -> Tensor:
        """Pictures of a sample (n, 3, H, W), changed in what nothing is said about."""
        if self.augmentation is None:
            return self.processor.pixels(images)
        opened = [open_image(image) for image in images]
        return self.processor.pixels(self.augmentation(opened, said(sample), rng))

    def _pair_text(self, sample: Sample, rng: np.random.Generator) -> np.ndarray:
        """Token ids of one of the texts that go with the sample's pictures, drawn anew at each visit."""
        texts = pair_texts(sample) or (None,)
        return self._text(sample, texts[int(rng.integers(len(texts)))], "caption or question to go with its picture")

    def _text(self, sample: Sample, text: str | None, wanted: str, ends: bool = True) -> np.ndarray:
        """Token ids of a text, closed by eos where it `ends`; no more than there are positions for."""
        if text is None:
            raise SampleError(f"sample {sample.key} has no {wanted}")
        ids = self._tokens(text, ends)
        if len(ids) > self.longest:
            raise SampleError(
                f"sample {sample.key} has a text of {len(ids)} tokens, more than {self.longest}; cut it up"
            )
        return ids

    def _tokens(self, text: str, ends: bool) -> np.ndarray:
        closed = self.processor.plain(text) + (self.processor.tokenizer.eos_token if ends else "")
        return np.asarray(self.processor.tokenizer.encode(closed, add_special_tokens=False), dtype=np.int64)

    def _learnt(self, ids: np.ndarray, is_target: np.ndarray | bool, positions: np.ndarray) -> np.ndarray:
        """Labels (L,): what is to be learnt. Where each token is predicted from the one before, none is asked for that
        begins a document: before it stands nothing, or in a packed row another document."""
        return np.where(is_target & ((positions > 0) | (not self.predicts_next)), ids, IGNORED)


class PairReader(Reader):
    """contrastive: the first picture of a sample and its text."""

    def example(self, sample: Sample, rng: np.random.Generator) -> Example:
        if not sample.images:
            raise SampleError(f"sample {sample.key} has no picture")
        ids = self._pair_text(sample, rng)
        return Example(ids, ids, self._pixels(sample, sample.images[:1], rng))

    def collate(self, examples: Sequence[Example]) -> Batch:
        return super().collate(examples) | {
            "pixel_values": torch.cat([one.pixels for one in examples if one.pixels is not None])
        }


class TextReader(Reader):
    """clm: a sample's text, or the text that goes with its picture. The documents of a block are kept apart."""

    def example(self, sample: Sample, rng: np.random.Generator) -> Example:
        texts = [
            self._text(sample, text, "text", ends) for text, ends in plain_texts(sample) or [(pair_text(sample), True)]
        ]
        lengths = [len(text) for text in texts]
        if sum(lengths) > self.stage.max_tokens:
            raise SampleError(
                f"sample {sample.key} has {len(texts)} documents of {sum(lengths)} tokens together, more than "
                f"{self.stage.max_tokens}; raise max_tokens"
            )
        ids, positions = np.concatenate(texts), _positions(lengths)
        labels = self._learnt(ids, True, positions)
        return Example(ids, labels, positions=positions, documents=_numbers(lengths), token_image=np.full_like(ids, -1))

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Rows of one document each go the language model's own way, which knows padding alone."""
        rows = self._rows(examples)
        lone = all(row.documents[-1] == 1 for row in rows)
        most = self.longest if lone else ENDLESS
        batch = {
            "input_ids": padded([row.ids for row in rows], self.processor.tokenizer.pad_token_id, most),
            "labels": padded([row.labels for row in rows], IGNORED, most),
            "attention_mask": padded([np.ones_like(row.ids) for row in rows], 0, most),
        }
        return batch if lone else batch | _apart(rows)


class MaskedReader(TextReader):
    """mlm: the same text with a share of it hidden, drawn anew at each visit."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        tokenizer = self.processor.tokenizer
        self._special = torch.tensor(sorted(tokenizer.all_special_ids))
        self._ordinary = torch.tensor(sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids)))

    def example(self, sample: Sample, rng: np.random.Generator) -> Example:
        example = super().example(sample, rng)
        ids = torch.from_numpy(example.ids)
        maskable = ~torch.isin(ids, self._special) & torch.from_numpy(example.labels != IGNORED)
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        hidden, labels = mask_tokens(
            ids, maskable, self.stage.mask_share, self.processor.mask_token_id, self._ordinary, generator
        )
        return replace(example, ids=hidden.numpy(), labels=labels.numpy())


@dataclass(frozen=True)
class Document:
    """One conversation or plain text as tokens: ids (l,), which of them are to be learnt, and the question it asks."""

    ids: np.ndarray
    is_target: np.ndarray
    question: Question | None


class JointReader(Reader):
    """joint: all conversations of a sample as isolated documents of one row that share its pictures, or its plain text."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._encoded: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def example(self, sample: Sample, rng: np.random.Generator) -> Example:
        faults: list[str] = []
        documents = self._chosen(sample, rng, faults)
        lengths = [len(document.ids) for document in documents]
        ids = np.concatenate([document.ids for document in documents])
        is_target = np.concatenate([document.is_target for document in documents])
        positions = _positions(lengths)
        places = [np.cumsum(document.ids == self.processor.image_token_id) - 1 for document in documents]
        pairs = self.stage.contrastive_weight > 0 and sample.images and pair_texts(sample)
        return Example(
            ids=ids,
            labels=self._learnt(ids, is_target, positions),
            pixels=self._pixels(sample, sample.images, rng) if sample.images else None,
            positions=positions,
            documents=_numbers(lengths),
            token_image=np.concatenate(places),
            types=[document.question.type or "untyped" if document.question else None for document in documents],
            pair=self._pair_text(sample, rng).tolist() if pairs else None,
            faults=faults,
        )

    def _chosen(self, sample: Sample, rng: np.random.Generator, faults: list[str]) -> list[Document]:
        """The documents of this visit: a draw of the questions, and as many as fit into a row, in random order.

        What is not drawn is not encoded: of a picture with ten questions, four are asked and six need no rendering.
        """
        every = self._documents(sample)
        if not every:
            raise SampleError(f"sample {sample.key} has no caption, question or messages")
        chosen, tokens, questions = [], 0, 0
        for place in rng.permutation(len(every)):
            question, encode = every[place]
            if question is not None and self.stage.questions is not None and questions >= self.stage.questions:
                continue
            document = encode()
            if not document.is_target.any():
                continue
            if len(document.ids) > self.longest:
                faults.append(
                    f"a document of {len(document.ids)} tokens is longer than {self.longest}; raise max_tokens"
                )
            elif tokens + len(document.ids) <= self.stage.max_tokens:
                chosen.append(document)
                tokens += len(document.ids)
                questions += question is not None
        if not chosen:
            reason = f": {faults[0]}" if faults else " has messages without a turn of the assistant to learn"
            raise SampleError(f"sample {sample.key}{reason}")
        return chosen

    def _documents(self, sample: Sample) -> list[tuple[Question | None, Callable[[], Document]]]:
        """Every document of the sample, with the question it asks and how it is encoded."""
        dialogues = conversations(sample, self.processor.caption_prompt)
        if dialogues or sample.images:
            return [(question, partial(self._encode, messages, question)) for messages, question in dialogues]
        texts = plain_texts(sample) or [(caption, True) for caption in sample.captions]
        return [(None, partial(self._plain, text, ends)) for text, ends in texts]

    def _plain(self, text: str, ends: bool) -> Document:
        ids = self._tokens(text, ends)
        return Document(ids, np.ones(len(ids), dtype=bool), None)

    def _encode(self, messages: list[dict], question: Question | None) -> Document:
        """Questions and answers recur, over pictures and over epochs, and rendering a conversation takes its time."""
        key = repr(messages)
        if key not in self._encoded:
            if len(self._encoded) >= 100_000:
                self._encoded.clear()
            ids, is_target = self.processor.encode_dialogue(messages)
            self._encoded[key] = np.asarray(ids, dtype=np.int64), np.asarray(is_target)
        return Document(*self._encoded[key], question)

    def collate(self, examples: Sequence[Example]) -> Batch:
        pixels = [example.pixels for example in examples if example.pixels is not None]
        if not pixels:
            # Every rank runs the same modules whatever its data: a picture that nobody looks at.
            pixels = [torch.zeros(1, *self.processor.image_processor.input_size)]
        rows = self._rows(examples)
        batch = {
            "input_ids": padded([row.ids for row in rows], self.processor.tokenizer.pad_token_id),
            "labels": padded([row.labels for row in rows], IGNORED),
            "token_image": padded([row.token_image for row in rows], -1),
            "pixel_values": torch.cat(pixels),
            "image_slots": slots(rows),
            "question_types": [row.types for row in rows],
        }
        return batch | _apart(rows) | (self._pairs(examples) if self.stage.contrastive_weight else {})

    def _pairs(self, examples: Sequence[Example]) -> Batch:
        """The texts (p, L) of those samples that have one, and the flat number of each one's picture (p,)."""
        first = np.cumsum([0, *(example.pictures for example in examples)])
        rows = [row for row, example in enumerate(examples) if example.pair is not None]
        # Without any, one text that belongs to no picture: see the zero picture above.
        texts = [np.asarray(examples[row].pair) for row in rows] or [
            np.asarray([self.processor.tokenizer.eos_token_id])
        ]
        return {
            "pair_input_ids": padded(texts, self.processor.tokenizer.pad_token_id, self.longest),
            "pair_attention_mask": padded([np.ones_like(text) for text in texts], 0, self.longest),
            "pair_images": torch.as_tensor(first[rows], dtype=torch.long),
        }


def _positions(lengths: Sequence[int]) -> np.ndarray:
    """Of every token within its document."""
    return np.concatenate([np.arange(length) for length in lengths])


def _numbers(lengths: Sequence[int]) -> np.ndarray:
    """Of every token's document, from 1."""
    return np.repeat(np.arange(1, len(lengths) + 1), lengths)


def _apart(rows: Sequence[Row]) -> Batch:
    """What keeps the documents of a row apart; 0 in the padding."""
    return {
        "position_ids": padded([row.positions for row in rows], 0),
        "document_ids": padded([row.documents for row in rows], 0),
    }


READERS: dict[str, type[Reader]] = {
    "contrastive": PairReader,
    "joint": JointReader,
    "clm": TextReader,
    "mlm": MaskedReader,
}


class MicroBatches(Dataset):
    """Number -> the micro-batch of this rank. A sample that cannot be used gives way to the next of its source.

    pixel_values are levels of uint8, which `on_device` makes pixels again: see `levels.py`.
    Beside the objective's tensors a batch holds `samples` and `tokens`, counted, and `skipped`, (key, reason) pairs. An
    error that ends the run is returned, not raised: a data worker would wrap it beyond recognition.
    """

    def __init__(
        self, sources: Sequence[Shards], order: Order, reader: Reader, size: int, rank: int, ranks: int
    ) -> None:
        self.sources, self.order, self.reader = sources, order, reader
        self.size, self.rank, self.ranks = size, rank, ranks

    def __getitem__(self, number: int) -> Batch | UsageError | RunError:
        first = (number * self.ranks + self.rank) * self.size
        skipped: list[tuple[str, str]] = []
        try:
            examples = [self.example(position, skipped) for position in range(first, first + self.size)]
        except (UsageError, RunError) as error:
            return error
        counts = {"samples": self.size, "tokens": sum(len(example.ids) for example in examples)}
        images = self.reader.processor.image_processor
        return shrink(self.reader.collate(examples), images.mean, images.std) | counts | {"skipped": skipped}

    def example(self, position: int, skipped: list[tuple[str, str]]) -> Example:
        """The example at a position of the stream; what had to be passed over is added to `skipped`."""
        number, index = self.order.at(position)
        source = self.sources[number]
        reason = ""
        for shift in range(min(len(source), PATIENCE)):
            _, place = self.order.at(position, shift)
            try:
                rng = np.random.default_rng([*self.order.seed, 3, position])
                example = self.reader.example(source[place], rng)
            except UsageError as error:
                reason = str(error)
                skipped.append((source.entry(place).key, reason))
                continue
            skipped += [(source.entry(place).key, fault) for fault in example.faults]
            return example
        objective = self.reader.stage.objective
        shards = source.entry(index).shard.parent
        tried = min(len(source), PATIENCE)
        raise UsageError(
            f"none of {tried} samples of {shards} can be used by objective {objective}; the last: {reason}"
        )


def stream(batches: MicroBatches, first: int, workers: int) -> Generator[Batch]:
    """The micro-batches `first`, `first` + 1, … made ahead by `workers` processes. Raises what making them raised."""
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=range(first, ENDLESS),
        num_workers=workers,
        collate_fn=_unchanged,
        worker_init_fn=_undisturbed if workers else None,
        pin_memory=torch.cuda.is_available(),
        # Without its own it would draw from the global one, and a resumed run would not be the same.
        generator=torch.Generator(),
    )
    for batch in loader:
        if isinstance(batch, Exception):
            raise batch
        yield batch


def _unchanged(batch: Any) -> Any:
    return batch


def _undisturbed(worker: int) -> None:
    """A worker ends with its parent, which alone answers the signals."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on `device`, and its pictures as pixels."""
    moved = {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }
    return restore(moved)
