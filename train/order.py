"""Which sample comes when: an endless shuffled stream over one or several sources, position by position.

Knows numbers only. What stands at a position depends on the seed and the position alone, not on ranks, workers or what was
asked before; so a run can go on from anywhere, and any number of ranks see the same batches.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# Sources are mixed in blocks of this many positions, each of which holds every source by its share.
BLOCK = 1024


class Order:
    """A stream over sources of `lengths` samples, mixed by `weights`.

    Each source is gone through in a new random order every time (shuffle), or as it is stored, again and again.
    """

    def __init__(
        self, lengths: Sequence[int], weights: Sequence[float], seed: Sequence[int], shuffle: bool = True
    ) -> None:
        self.lengths = list(lengths)
        self.seed = list(seed)
        self.shuffle = shuffle
        self._counts = _shares(weights, BLOCK)  # (sources,)
        self._permutations: dict[tuple[int, int], np.ndarray] = {}

    def at(self, position: int, shift: int = 0) -> tuple[int, int]:
        """Source and index within it of the sample at `position` (0, 1, 2, …), or of the `shift`-th after it in that source."""
        source, visit = self._visit(position)
        epoch, place = divmod(visit, self.lengths[source])
        place = (place + shift) % self.lengths[source]
        if not self.shuffle:
            return source, place
        return source, int(self._permutation(source, epoch)[place])

    def _visit(self, position: int) -> tuple[int, int]:
        """The source at `position`, and how often it was drawn before."""
        if len(self.lengths) == 1:
            return 0, position
        block, place = divmod(position, BLOCK)
        mixed = np.random.default_rng([*self.seed, 1, block]).permutation(
            np.repeat(np.arange(len(self._counts)), self._counts)
        )
        source = int(mixed[place])
        return source, block * int(self._counts[source]) + int((mixed[:place] == source).sum())

    def _permutation(self, source: int, epoch: int) -> np.ndarray:
        if (source, epoch) not in self._permutations:
            # Batches are made in order, so an order two epochs old is not asked for again.
            for old in [key for key in self._permutations if key[0] == source and abs(key[1] - epoch) > 1]:
                del self._permutations[old]
            rng = np.random.default_rng([*self.seed, 2, source, epoch])
            self._permutations[source, epoch] = rng.permutation(self.lengths[source])
        return self._permutations[source, epoch]


def _shares(weights: Sequence[float], total: int) -> np.ndarray:
    """Whole numbers in the proportion of `weights` that add up to `total`; no source is left without."""
    exact = np.asarray(weights, dtype=float) / sum(weights) * total
    counts = np.maximum(1, np.floor(exact)).astype(int)
    while counts.sum() != total:
        step = 1 if counts.sum() < total else -1
        open_to_change = np.where((counts > 1) | (step > 0), step * (exact - counts), -np.inf)
        counts[np.argmax(open_to_change)] += step
    return counts
