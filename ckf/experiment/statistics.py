"""Figures of cells that were trained with several seeds, and paired tests between cells.

Two sources of chance are kept apart. The interval and p of a figure come from resampling users of
the one test set, every seed on the same resample: they say how far the mean over these seeds would
move with other users. The spread over seeds says how far it moves with the seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ckf.metrics import Statistic, bootstrap_draws, bootstrap_over_users, paired_figures


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


def paired_samples(samples: int, comparisons: int) -> int:
    """Resamples for each of so many paired tests of one metric, at least ``samples``; 0 stays 0.

    p is never below 2 / (resamples + 1), and Holm multiplies the smallest p by the number of
    tests. 200 resamples a test keep that floor at 0.01.
    """
    return max(samples, 200 * comparisons) if samples else 0


@dataclass(frozen=True)
class Sampled:
    """A metric of one cell. seeds: of each run; value and draws (samples,): of their mean."""

    seeds: list[float]
    value: float
    draws: np.ndarray


def sampled(
    metrics: Mapping[str, Sequence[Statistic]], users: np.ndarray, samples: int, seed: int = 0
) -> dict[str, Sampled]:
    """{metric: its values on resamples of users} of a cell, made once for all its comparisons.

    metrics: statistics by name, one per seed. users (N,): of the rows.
    """
    users = np.asarray(users)
    means = {name: mean_over_seeds(statistics) for name, statistics in metrics.items()}
    draws = bootstrap_draws(list(means.values()), users, samples, seed)
    return {
        name: Sampled([_value(s, users) for s in metrics[name]], _value(mean, users), own)
        for (name, mean), own in zip(means.items(), draws, strict=True)
    }


def difference(a: Sampled, b: Sampled) -> dict:
    """a - b on the same rows: {"value", "low", "high", "p", "seeds": [a - b of each seed]}.

    a, b: from the same users, samples and seed. The interval and the two-sided p are of the means
    over seeds. Where one side has fewer seeds (a baseline has one), its mean stands beside each
    seed of the other.
    """
    found = paired_figures(a.value - b.value, a.draws - b.draws)
    if len(a.seeds) == len(b.seeds):
        pairs = [x - y for x, y in zip(a.seeds, b.seeds, strict=True)]
    elif len(a.seeds) > len(b.seeds):
        pairs = [x - float(np.mean(b.seeds)) for x in a.seeds]
    else:
        pairs = [float(np.mean(a.seeds)) - y for y in b.seeds]
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
