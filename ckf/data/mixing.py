"""Which row of which task stands where in training: mixed batches, shares by temperature."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import numpy as np

from ckf.data.errors import DataError


def task_order(
    sizes: dict[str, int], batch_size: int, steps: int, temperature: float = 1.0, seed: int = 0
) -> list[tuple[str, int]]:
    """(task, number of its row) for every position of `steps` batches of `batch_size` rows.

    Position p belongs to step p // batch_size. Shares are proportional to
    size ** (1 / temperature), but every task with rows is in every batch when the batch has room
    for all of them; without room, tasks take turns at their shares. Each task goes through its
    rows in epochs, shuffled anew each time. The same arguments give the same order, and a task's
    own order does not depend on the other tasks. DataError for settings that cannot be.
    """
    names = [name for name, size in sizes.items() if size > 0]
    if any(size < 0 for size in sizes.values()) or not names:
        raise DataError(f"task sizes are {sizes}; at least one task needs rows")
    if batch_size < 1 or steps < 0:
        raise DataError(f"batch_size is {batch_size} and steps {steps}; need at least 1 and 0")
    if not 0 < temperature < float("inf"):
        raise DataError(f"temperature is {temperature}; it must be above 0 (1: by size)")
    logs = np.log([sizes[name] for name in names]) / temperature
    weights = np.exp(logs - logs.max())  # no overflow at a low temperature
    floor = 1 if batch_size >= len(names) else 0
    rates = _rates(weights, batch_size, floor)
    walks = [_epochs(sizes[name], seed, name) for name in names]
    rng = np.random.default_rng([seed, 0])
    owed = np.zeros(len(names))
    order: list[tuple[str, int]] = []
    for _ in range(steps):
        owed += rates
        counts = np.full(len(names), floor)
        owed -= floor
        for _ in range(batch_size - counts.sum()):
            task = int(np.argmax(owed))
            counts[task] += 1
            owed[task] -= 1
        batch = rng.permutation(np.repeat(np.arange(len(names)), counts))
        order.extend((names[task], next(walks[task])) for task in batch)
    return order


def _rates(weights: np.ndarray, batch_size: int, floor: int) -> np.ndarray:
    """Rows per batch of each task, summing to the batch: by weight, none below `floor`."""
    rates = np.full(len(weights), float(floor))
    free = np.ones(len(weights), dtype=bool)
    while free.any():
        room = batch_size - rates[~free].sum()
        share = weights * room / weights[free].sum()
        small = free & (share < floor)
        if not small.any():
            rates[free] = share[free]
            break
        rates[small] = floor
        free &= ~small
    return rates


def _epochs(size: int, seed: int, name: str) -> Iterator[int]:
    rng = np.random.default_rng([seed, 1, zlib.crc32(name.encode())])
    while True:
        yield from rng.permutation(size).tolist()
