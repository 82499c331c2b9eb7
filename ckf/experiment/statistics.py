"""Figures of cells that were trained with several seeds, and paired tests between cells.

Two sources of chance are kept apart. The interval and p of a figure come from resampling users of
the one test set, every seed on the same resample: they say how far the mean over these seeds would
move with other users. The spread over seeds says how far it moves with the seed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ckf.metrics import Statistic, bootstrap_over_users, paired_bootstrap


def mean_over_seeds(statistics: Sequence[Statistic]) -> Statistic:
    """The mean of one statistic over runs on the same rows, as one statistic."""
    return lambda weights: np.mean([statistic(weights) for statistic in statistics], axis=0)


def figure(statistics: Sequence[Statistic], users: np.ndarray, samples: int, seed: int = 0) -> dict:
    """{"value", "low", "high", "seeds": [value of each run], "std"} of a cell.

    statistics: one per seed. users (N,): of the rows. std: sample deviation over seeds, None for
    one seed.
    """
    users = np.asarray(users)
    interval = bootstrap_over_users(mean_over_seeds(statistics), users, samples, seed)
    return interval | spread([_value(s, users) for s in statistics])


def difference(
    a: Sequence[Statistic], b: Sequence[Statistic], users: np.ndarray, samples: int, seed: int = 0
) -> dict:
    """a - b on the same rows: {"value", "low", "high", "p", "seeds": [a - b of each seed]}.

    The interval and the two-sided p are of the means over seeds. Where one side has fewer seeds (a
    baseline has one), its mean stands beside each seed of the other.
    """
    users = np.asarray(users)
    means = mean_over_seeds(a), mean_over_seeds(b)
    found = paired_bootstrap(*means, users, samples, seed)
    left, right = ([_value(s, users) for s in side] for side in (a, b))
    if len(left) == len(right):
        pairs = [x - y for x, y in zip(left, right, strict=True)]
    elif len(left) > len(right):
        pairs = [x - float(np.mean(right)) for x in left]
    else:
        pairs = [float(np.mean(left)) - y for y in right]
    return found | spread(pairs)


def spread(values: Sequence[float]) -> dict:
    """{"seeds": values, "std": their sample deviation, None for fewer than two}."""
    finite = [None if not np.isfinite(v) else float(v) for v in values]
    enough = len(values) > 1 and None not in finite
    return {"seeds": finite, "std": float(np.std(values, ddof=1)) if enough else None}


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down adjustment of several p values: the chance of any false claim among them.

    None stays None and does not count. Source: Holm, Scandinavian Journal of Statistics 6, 1979.
    """
    known = [i for i, p in enumerate(p_values) if p is not None]
    adjusted: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for place, i in enumerate(sorted(known, key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (len(known) - place) * p_values[i]))
        adjusted[i] = highest
    return adjusted


def _value(statistic: Statistic, users: np.ndarray) -> float:
    return float(statistic(np.ones((1, len(users))))[0])
