"""Which batches a stage sees: its training micro-batches and its held-out ones.

Knows a run's shards and settings, and how samples divide over ranks. Knows nothing of what a batch holds, or of steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from vlm.augmentation import Augmentation
from vlm.errors import UsageError
from vlm.model import VLMModel
from vlm.processing import VLMProcessor
from vlm.shards import Shards

from .batches import READERS, Batch, MicroBatches, Reader, stream
from .config import Augment, Config
from .config_stage import Stage
from .deepspeed_config import micro_batch_size
from .order import BLOCK, Order
from .ranks import data_rank, data_ranks


@dataclass(frozen=True)
class RunData:
    """The shards of a run."""

    config: Config
    train: list[Shards]
    val: Shards | None

    @classmethod
    def open(cls, config: Config) -> RunData:
        """Raises UsageError for shards that are not there."""
        train = [Shards.open(source.path) for source in config.data.train]
        return cls(config, train, Shards.open(config.data.val) if config.data.val is not None else None)

    def micro_batches(self, model: VLMModel, processor: VLMProcessor, number: int) -> MicroBatches:
        """The training micro-batches of stage `number` for this rank."""
        stage = self.config.stages[number]
        listed = zip(self.train, self.config.data.train, strict=True)
        served = [(shards, source.weight) for shards, source in listed if source.serves(stage.objective)]
        sources, weights = [shards for shards, _ in served], [weight for _, weight in served]
        order = Order([len(source) for source in sources], weights, [self.config.seed, number])
        size = micro_batch_size(stage, data_ranks())
        made_by = _reader(model, processor, stage, _augmentation(self.config))
        return MicroBatches(sources, order, made_by, size, data_rank(), data_ranks())

    def validation_batches(self, model: VLMModel, processor: VLMProcessor, number: int) -> Iterator[Batch]:
        """This rank's part of the first `validation.samples` held-out samples, in whole micro-batches, with all questions."""
        if self.val is None:
            return
        samples, ranks = min(self.config.validation.samples, len(self.val)), data_ranks()
        data = self._held_out(self.val, model, processor, number, samples // ranks)
        yield from islice(stream(data, 0, workers=0), max(1, samples // (data.size * ranks)))

    def _held_out(
        self, val: Shards, model: VLMModel, processor: VLMProcessor, number: int, most: int = 1
    ) -> MicroBatches:
        """Micro-batches of at most so many samples, in the order of the shards."""
        stage = self.config.stages[number].model_copy(update={"questions": None})
        size = max(1, min(micro_batch_size(stage, data_ranks()), most))
        order = Order([len(val)], [1.0], [self.config.seed, number], shuffle=False)
        return MicroBatches([val], order, _reader(model, processor, stage), size, data_rank(), data_ranks())

    def check(self, model: VLMModel, processor: VLMProcessor) -> None:
        """Raise UsageError now where a stage would later find nothing of use in one of its sources, or to be judged by."""
        for number in range(len(self.config.stages)):
            data = self.micro_batches(model, processor, number)
            first_of_source = {data.order.at(position)[0]: position for position in reversed(range(BLOCK))}
            try:
                for first in sorted(first_of_source.values()):
                    data.example(first, [])
                if self.val is not None:
                    self._held_out(self.val, model, processor, number).example(0, [])
            except UsageError as error:
                raise UsageError(f"stages.{number}: {error}") from None


def _reader(model: VLMModel, processor: VLMProcessor, stage: Stage, changes: Augmentation | None = None) -> Reader:
    """What makes the stage's examples."""
    longest = model.max_tokens or stage.max_tokens
    return READERS[stage.objective](processor, stage, longest, model.config.reading == "causal", changes)


def _augmentation(config: Config) -> Augmentation | None:
    """The changes of training pictures; None where there are none."""
    return Augmentation(**config.data.augment.model_dump()) if config.data.augment != Augment() else None
