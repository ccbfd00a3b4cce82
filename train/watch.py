"""What a step comes to: its numbers over micro-batches and ranks, and the line and events that tell them.

Knows the logs of an objective and the counts of a batch. Knows nothing of models, optimizers or how a step is taken.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from vlm.errors import RunError

from .batches import Batch
from .checkpoint import Progress
from .log import RunLog
from .ranks import copies, is_main, joined, sums

# Loss scaling of fp16 finds its scale by overflowing first, some steps in a row.
MOST_SKIPPED = 25


@dataclass(frozen=True)
class Totals:
    """A step over all ranks. means: the loss and what else the objective logs. seconds: those of the main rank.

    flops: model FLOPs. skipped: (key, reason) of samples that were passed over for the first time.
    """

    means: dict[str, float]
    samples: int
    tokens: int
    flops: float
    seconds: float
    skipped: list[tuple[str, str]]


class Tally:
    """Adds up the micro-batches of one step. Its clock runs from when it is made.

    known: (key, reason) of samples that were passed over before, the same on every rank.
    """

    def __init__(self, known: set[tuple[str, str]]) -> None:
        self.known = known
        self.started = time.perf_counter()
        self.losses: list[tuple[Tensor, dict[str, Tensor]]] = []
        self.counts = {"samples": 0.0, "tokens": 0.0, "flops": 0.0}
        self.skipped: set[tuple[str, str]] = set()

    def add(self, batch: Batch, flops: float, loss: Tensor, logs: dict[str, Tensor]) -> None:
        """Remember one micro-batch; waits for nothing."""
        self.losses.append((loss.detach(), logs))
        for name, value in (("samples", batch["samples"]), ("tokens", batch["tokens"]), ("flops", flops)):
            self.counts[name] += value
        self.skipped.update(pair for pair in batch["skipped"] if pair not in self.known)

    def totals(self, device: torch.device) -> Totals:
        """The step over all ranks, the same on each; a collective call."""
        added: Counter[str] = Counter()
        for loss, logs in self.losses:
            added.update({"loss": float(loss)} | {name: float(value) for name, value in logs.items()})
        seconds = time.perf_counter() - self.started if is_main() else 0.0
        own = [*added.values(), *self.counts.values(), len(self.skipped), seconds]
        *values, samples, tokens, flops, anything_skipped, seconds = sums(own, device)
        samples, tokens, flops = (counted / copies() for counted in (samples, tokens, flops))
        parts = len(self.losses) * dist.get_world_size()
        means = {name: value / parts for name, value in zip(added, values, strict=True)}
        skipped = joined(sorted(self.skipped)) if anything_skipped else []
        return Totals(means, int(samples), int(tokens), flops, seconds, skipped)


class Watch:
    """Writes a stage's steps into the log, and ends a run that never recovers. peak: FLOP/s of all devices together."""

    def __init__(self, log: RunLog, peak: float) -> None:
        self.log = log
        self.peak = peak
        self.nonfinite_in_a_row = 0
        self.passed_over: set[tuple[str, str]] = set()

    def report(
        self, totals: Totals, progress: Progress, share: float, grad_norm: float, lr: float, seen: dict[str, Any]
    ) -> None:
        """The line of a step after which `progress` and `share` of the stage are done. seen: what else was looked at.

        Raises RunError after too many steps in a row that are not finite.
        """
        self._tell_skipped_samples(totals, progress)
        self._check_finite(totals.means["loss"], grad_norm, progress)
        means = dict(totals.means)
        self.log.step(
            progress=share,
            stage=progress.stage,
            step=progress.step,
            **{"loss": means.pop("loss"), "lr": lr, "grad_norm": grad_norm},
            samples=progress.samples,
            tokens=progress.tokens,
            samples_per_second=totals.samples / totals.seconds,
            tokens_per_second=totals.tokens / totals.seconds,
            seconds=progress.seconds,
            mfu=totals.flops / totals.seconds / self.peak,
            **means,
            **seen,
        )

    def _tell_skipped_samples(self, totals: Totals, progress: Progress) -> None:
        """One event for each sample and reason, whichever rank met it, and however often."""
        for key, reason in dict.fromkeys(totals.skipped):
            self.log.event("skipped_sample", key=key, reason=reason, **progress.position())
        self.passed_over.update(totals.skipped)

    def _check_finite(self, loss: float, grad_norm: float, progress: Progress) -> None:
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.nonfinite_in_a_row = 0
            return
        self.nonfinite_in_a_row += 1
        self.log.event("nonfinite", loss=loss, grad_norm=grad_norm, **progress.position())
        if self.nonfinite_in_a_row == MOST_SKIPPED:
            raise RunError(
                f"loss {loss} and gradient norm {grad_norm} for {MOST_SKIPPED} steps in a row, up to step {progress.step}; "
                "lower lr, or use precision fp32"
            )
