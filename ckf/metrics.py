"""Metrics of scores, lists and ratings, with 95% intervals by bootstrap over users.

A resample of users with replacement is the same data with whole-number row weights: the count of
the row's user. So every statistic here is a function from weights (B, N) to values (B,), one value
per resample, computed for many resamples at once. The point value has all weights one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike

Statistic = Callable[[np.ndarray], np.ndarray]
_WEIGHTS_AT_ONCE = 4_000_000  # 32 MB of float64 weights


def auc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Area under the ROC curve of scores (N,) for labels (N,) in {0, 1}; ties count one half.

    Equals sklearn's roc_auc_score. NaN with a single class. NaN scores raise ValueError.
    """
    scores, labels = _scores_and_labels(scores, labels)
    return float(auc_statistic(scores, labels)(np.ones((1, len(scores))))[0])


def uauc(scores: ArrayLike, labels: ArrayLike, users: ArrayLike) -> tuple[float, int]:
    """Unweighted mean of the AUC within each user that has both labels, and the number of these."""
    scores, labels = _scores_and_labels(scores, labels)
    values, _ = _user_aucs(scores, labels, _same_length(users, scores, "users"))
    count = int(np.isfinite(values).sum())
    return (float(np.nanmean(values)) if count else float("nan")), count


def rmse(predictions: ArrayLike, targets: ArrayLike) -> float:
    """Root of the mean squared error, in the unit of the targets."""
    errors = _errors(predictions, targets)
    return float(np.sqrt(np.mean(errors**2)))


def mae(predictions: ArrayLike, targets: ArrayLike) -> float:
    """Mean absolute error, in the unit of the targets."""
    return float(np.mean(np.abs(_errors(predictions, targets))))


def ranking_metrics(scores: ArrayLike, positive: ArrayLike) -> dict[str, np.ndarray]:
    """HR@1/5/10, NDCG@5/10 and MRR of each list, arrays (P,).

    scores (P, C); positive (P,): the column of the one positive. Ties get the expected value over a
    random order of the tied, so a constant score earns exactly what chance does.
    """
    scores, positive = np.asarray(scores, dtype=np.float64), np.asarray(positive)
    if scores.ndim != 2 or positive.shape != scores.shape[:1]:
        raise ValueError(
            f"scores {scores.shape} and positive {positive.shape}: expected (P, C) and (P,), one "
            "column index per list"
        )
    _no_nan(scores)
    n_lists, width = scores.shape
    if n_lists and not (positive.min() >= 0 and positive.max() < width):
        raise ValueError(
            f"positive holds columns {positive.min()}..{positive.max()}, expected 0..{width - 1}: "
            "give the positive's column in each list"
        )
    own = scores[np.arange(n_lists), positive][:, None]
    better = (scores > own).sum(1)  # the rank is better + 1 .. better + tied, all equally likely
    tied = (scores == own).sum(1)
    rank = np.arange(1, width + 1)

    def expected(gain: np.ndarray) -> np.ndarray:
        total = np.concatenate([[0.0], np.cumsum(gain)])
        return (total[better + tied] - total[better]) / tied

    found = {f"hr@{k}": expected((rank <= k).astype(float)) for k in (1, 5, 10)}
    ndcg = {f"ndcg@{k}": expected((rank <= k) / np.log2(rank + 1)) for k in (5, 10)}
    return found | ndcg | {"mrr": expected(1.0 / rank)}


def auc_statistic(scores: ArrayLike, labels: ArrayLike) -> Statistic:
    """The weighted AUC as a function of row weights (B, N), for the bootstrap."""
    scores, labels = _scores_and_labels(scores, labels)
    order = np.argsort(scores, kind="stable")
    ranked = scores[order]
    ends = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], len(ranked) > 0))  # of tie groups
    is_positive = labels[order].astype(np.float64)

    def statistic(weights: np.ndarray) -> np.ndarray:
        weights = weights[:, order]
        positive = np.cumsum(weights * is_positive, axis=1)[:, ends]  # (B, tie groups)
        negative = np.cumsum(weights, axis=1)[:, ends] - positive
        gained = np.diff(positive, axis=1, prepend=0.0)
        # Each positive beats the negatives below its group and half of those in it.
        below = negative - 0.5 * np.diff(negative, axis=1, prepend=0.0)
        pairs = gained.sum(1) * (weights.sum(1) - gained.sum(1))
        wins = np.einsum("bg,bg->b", gained, below)
        return np.divide(wins, pairs, out=np.full(len(weights), np.nan), where=pairs > 0)

    return statistic


def uauc_statistic(scores: ArrayLike, labels: ArrayLike, users: ArrayLike) -> Statistic:
    """The mean AUC within users as a function of row weights that are equal within a user."""
    scores, labels = _scores_and_labels(scores, labels)
    values, first = _user_aucs(scores, labels, _same_length(users, scores, "users"))
    counted = np.isfinite(values)
    return _weighted_mean(values[counted], first[counted])


def mean_statistic(values: ArrayLike) -> Statistic:
    """The weighted mean of values (N,)."""
    values = np.asarray(values, dtype=np.float64)
    _no_nan(values, "values")
    return _weighted_mean(values, slice(None))


def rmse_statistic(predictions: ArrayLike, targets: ArrayLike) -> Statistic:
    """The weighted RMSE of predictions (N,)."""
    mean = mean_statistic(_errors(predictions, targets) ** 2)
    return lambda weights: np.sqrt(mean(weights))


def bootstrap_over_users(
    statistic: Statistic, users: ArrayLike, n: int = 1000, seed: int = 0
) -> dict[str, float | None]:
    """{"value", "low", "high"}: the statistic and its 95% percentile interval over n resamples.

    users (N,): the user of each row; whole users are drawn with replacement, since rows of one user
    are not independent. Resamples in which the statistic is undefined (one class) are left out;
    values that are undefined in the data are None.
    """
    users = np.asarray(users)
    value = float(statistic(np.ones((1, len(users))))[0]) if len(users) else float("nan")
    return _interval(value, bootstrap_draws([statistic], users, n, seed)[0])


def paired_bootstrap(
    statistic_a: Statistic, statistic_b: Statistic, users: ArrayLike, n: int = 1000, seed: int = 0
) -> dict[str, float | None]:
    """Difference a - b of two systems on the same rows: {"value", "low", "high", "p"}.

    Both see the same resamples of users. p is two-sided: twice the smaller share of resamples on
    one side of zero, with one added to both counts so that it is never zero.
    """
    users = np.asarray(users)
    ones = np.ones((1, len(users)))
    value = float(statistic_a(ones)[0] - statistic_b(ones)[0]) if len(users) else float("nan")
    a, b = bootstrap_draws([statistic_a, statistic_b], users, n, seed)
    return paired_figures(value, a - b)


def paired_figures(value: float, differences: np.ndarray) -> dict[str, float | None]:
    """{"value", "low", "high", "p"} as ``paired_bootstrap``, from the differences of resamples."""
    differences = differences[np.isfinite(differences)]
    tail = min((differences <= 0).sum(), (differences >= 0).sum())
    p = min(1.0, 2.0 * (tail + 1) / (len(differences) + 1))
    return _interval(value, differences) | {"p": float(p) if np.isfinite(value) else None}


def bootstrap_draws(
    statistics: Sequence[Statistic], users: ArrayLike, n: int = 1000, seed: int = 0
) -> np.ndarray:
    """(S, n): each statistic on the same n resamples of users (N,), empty without rows.

    More resamples begin with the fewer ones of the same seed.
    """
    draws = [[s(weights) for s in statistics] for weights in _resamples(np.asarray(users), n, seed)]
    return np.concatenate(draws, axis=1) if draws else np.empty((len(statistics), 0))


def ctr_metrics(
    scores: ArrayLike, labels: ArrayLike, users: ArrayLike, n: int = 1000, seed: int = 0
) -> dict[str, dict]:
    """{"auc": {"value", "low", "high"}, "uauc": {..., "users"}} of click scores (N,)."""
    _, count = uauc(scores, labels, users)
    pooled = bootstrap_over_users(auc_statistic(scores, labels), users, n, seed)
    within = bootstrap_over_users(uauc_statistic(scores, labels, users), users, n, seed)
    return {"auc": pooled, "uauc": within | {"users": count}}


def ctr_slices(
    scores: ArrayLike,
    labels: ArrayLike,
    users: ArrayLike,
    masks: dict[str, np.ndarray],
    n: int = 1000,
    seed: int = 0,
) -> dict[str, dict]:
    """`ctr_metrics` within each mask (N,) bool, with the number of its rows under "rows"."""
    scores, labels, users = np.asarray(scores), np.asarray(labels), np.asarray(users)
    slices = {}
    for name, mask in masks.items():
        metrics = ctr_metrics(scores[mask], labels[mask], users[mask], n, seed)
        slices[name] = metrics | {"rows": int(np.count_nonzero(mask))}
    return slices


def topk_metrics(
    scores: ArrayLike, positive: ArrayLike, users: ArrayLike, n: int = 1000, seed: int = 0
) -> dict[str, dict]:
    """Means of `ranking_metrics` over the lists, each with its interval. users (P,)."""
    return {
        name: bootstrap_over_users(mean_statistic(values), users, n, seed)
        for name, values in ranking_metrics(scores, positive).items()
    }


def rating_metrics(
    predictions: ArrayLike, targets: ArrayLike, users: ArrayLike, n: int = 1000, seed: int = 0
) -> dict[str, dict]:
    """{"rmse", "mae"} of predicted ratings (N,), each with its interval."""
    absolute = np.abs(_errors(predictions, targets))
    return {
        "rmse": bootstrap_over_users(rmse_statistic(predictions, targets), users, n, seed),
        "mae": bootstrap_over_users(mean_statistic(absolute), users, n, seed),
    }


def _resamples(users: np.ndarray, n: int, seed: int) -> Iterator[np.ndarray]:
    """Row weights (B, N) of n resamples, a chunk at a time."""
    if len(users) == 0:
        return
    _, owner = np.unique(users, return_inverse=True)
    n_users = int(owner.max()) + 1
    rng = np.random.default_rng(seed)
    chunk = max(1, _WEIGHTS_AT_ONCE // max(len(users), n_users))
    for start in range(0, n, chunk):
        size = min(chunk, n - start)
        drawn = rng.integers(n_users, size=(size, n_users)) + n_users * np.arange(size)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=size * n_users).reshape(size, n_users)
        yield counts.astype(np.float64)[:, owner]


def _interval(value: float, draws: np.ndarray) -> dict[str, float | None]:
    draws = draws[np.isfinite(draws)]
    if not np.isfinite(value):
        return {"value": None, "low": None, "high": None}
    if len(draws) == 0:
        return {"value": value, "low": None, "high": None}
    low, high = np.percentile(draws, [2.5, 97.5])
    return {"value": value, "low": float(low), "high": float(high)}


def _weighted_mean(values: np.ndarray, columns) -> Statistic:
    def statistic(weights: np.ndarray) -> np.ndarray:
        weights = weights[:, columns]
        total = weights.sum(1)
        return np.divide(
            weights @ values, total, out=np.full(len(weights), np.nan), where=total > 0
        )

    return statistic


def _user_aucs(scores: np.ndarray, labels: np.ndarray, users: np.ndarray):
    """AUC of each user (NaN with one class) and the index of each user's first row."""
    _, first, owner = np.unique(users, return_index=True, return_inverse=True)
    n_users = len(first)
    order = np.lexsort((scores, owner))
    owner, scores, labels = owner[order], scores[order], labels[order]
    # Mid-ranks within the user: the rank sum of the positives is the Mann-Whitney statistic.
    starts = np.ones(len(owner), dtype=bool)
    starts[1:] = (owner[1:] != owner[:-1]) | (scores[1:] != scores[:-1])
    group = np.cumsum(starts) - 1
    size = np.bincount(group)
    last = np.cumsum(size)  # one past each tie group
    middle = last - (size - 1) / 2.0  # mean of the 1-based ranks in the group
    count = np.bincount(owner, minlength=n_users)
    rank = middle[group] - (np.cumsum(count) - count)[owner]
    positive = np.bincount(owner, weights=labels, minlength=n_users)
    rank_sum = np.bincount(owner, weights=rank * labels, minlength=n_users)
    pairs = positive * (count - positive)
    wins = rank_sum - positive * (positive + 1) / 2.0
    values = np.divide(wins, pairs, out=np.full(n_users, np.nan), where=pairs > 0)
    return values, first


def _scores_and_labels(scores, labels) -> tuple[np.ndarray, np.ndarray]:
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 1:
        raise ValueError(f"scores have shape {scores.shape}, expected (N,): give one score per row")
    labels = _same_length(labels, scores, "labels")
    _no_nan(scores)
    odd = np.unique(labels[(labels != 0) & (labels != 1)])
    if len(odd):
        raise ValueError(f"labels hold {odd[:5].tolist()}, expected 0 and 1: leave other rows out")
    return scores, labels.astype(np.int64)


def _same_length(values, scores: np.ndarray, name: str) -> np.ndarray:
    values = np.asarray(values)
    if values.shape != scores.shape:
        raise ValueError(
            f"{name} have shape {values.shape}, the scores {scores.shape}: give one per row"
        )
    return values


def _errors(predictions, targets) -> np.ndarray:
    predictions = np.asarray(predictions, dtype=np.float64)
    targets = _same_length(np.asarray(targets, dtype=np.float64), predictions, "targets")
    _no_nan(predictions, "predictions")
    _no_nan(targets, "targets")
    return predictions - targets


def _no_nan(values: np.ndarray, name: str = "scores") -> None:
    bad = int(np.isnan(values).sum())
    if bad:
        raise ValueError(
            f"{bad} of {values.size} {name} are NaN, expected numbers: find the rows that give NaN "
            "(numpy.isnan) and mend or drop them before measuring"
        )
