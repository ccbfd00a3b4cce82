"""Two columns of numbers from every piece of work to every other, through files: the shuffle between map and reduce.

Knows files of numbers. Knows nothing of what the numbers mean.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vlm.files import atomic_write


def scatter(path: Path, to: np.ndarray, parts: int, left: np.ndarray, right: np.ndarray) -> None:
    """Write two columns so that what goes to one part, by `to`, lies together, in the order given: the map's half."""
    to = to.astype(np.int64)
    order = np.argsort(to, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(to, minlength=parts))]).astype(np.int64)
    table = np.stack([left.astype(np.uint64), right.astype(np.uint64)], axis=1)[order]
    with atomic_write(path) as file:
        file.write(starts.tobytes())
        file.write(table.tobytes())


def gather(folder: Path, kind: str, files: int, part: int, parts: int) -> tuple[np.ndarray, np.ndarray]:
    """Read what all files scattered to one part, as two uint64 columns, in the order of files: the reduce's half."""
    tables = [np.zeros((0, 2), np.uint64)]
    for number in range(files):
        path = folder / f"{kind}-{number}"
        start, stop = np.fromfile(path, np.int64, 2, offset=8 * part)
        rows = np.fromfile(path, np.uint64, 2 * (stop - start), offset=8 * (parts + 1) + 16 * start)
        tables.append(rows.reshape(-1, 2))
    left, right = np.concatenate(tables).T
    return left, right


def save(path: Path, array: np.ndarray) -> None:
    """Write one array, whole or not at all; `.npy` is added to the name."""
    with atomic_write(path.with_name(f"{path.name}.npy")) as file:
        np.save(file, array)
