"""Baselines that every table carries: means, popularity, a regression, the CF model, others' words.

All of them see train rows only. The pseudo-counts are fixed: on CoLLM's ML-1M test they give AUC /
UAUC 0.708 / 0.677 (item mean), 0.730 / 0.679 (item and user mean), 0.592 / 0.576 (popularity).
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ckf import metrics

if TYPE_CHECKING:
    from ckf.cf import CFVectors
    from ckf.data.prepared import Candidates, PreparedData

ITEM_PRIOR = 2.0  # pseudo-counts of the item mean alone
ITEM_PRIOR_OF_SUM, USER_PRIOR = 10.0, 20.0  # and of the item mean beside a user mean
_YEAR = re.compile(r"\((\d{4})\)")


@dataclass(frozen=True)
class TrainMeans:
    """Counts (float) and sums of a value, label or rating, over the train rows that have one."""

    mean: float
    item_count: np.ndarray  # (I,)
    item_sum: np.ndarray  # (I,)
    user_count: np.ndarray  # (U,)
    user_sum: np.ndarray  # (U,)

    @classmethod
    def of(cls, data: PreparedData, value: str) -> TrainMeans:
        """value: "label" or "rating". Raises ValueError where no train row has one."""
        rows = _train_rows(data, value)
        if len(rows) == 0:
            raise ValueError(
                f"no train row has a {value}, expected some: check data.columns and data.split, or "
                "leave out the tasks that need it"
            )
        values = getattr(data, value)[rows].astype(np.float64)
        item, user = data.item[rows], data.user[rows]
        return cls(
            mean=float(values.mean()),
            item_count=np.bincount(item, minlength=data.n_items).astype(np.float64),
            item_sum=np.bincount(item, values, data.n_items),
            user_count=np.bincount(user, minlength=data.n_users).astype(np.float64),
            user_sum=np.bincount(user, values, data.n_users),
        )

    def item_mean(self, prior: float) -> np.ndarray:
        """Mean per item (I,), with ``prior`` pseudo-rows at the global mean."""
        return (self.item_sum + prior * self.mean) / (self.item_count + prior)

    def user_mean(self, prior: float) -> np.ndarray:
        """Mean per user (U,), with ``prior`` pseudo-rows at the global mean."""
        return (self.user_sum + prior * self.mean) / (self.user_count + prior)


def evaluate_baselines(
    data: PreparedData,
    split: str,
    tasks: Sequence[str],
    vectors: CFVectors | None = None,
    lists: Sequence[str] | None = None,
    n: int = 1000,
    seed: int = 0,
) -> dict[str, dict]:
    """{task: {baseline: metrics}} on the rows of a split, in the shape of metrics.json.

    vectors: CF vectors before standardising, for
    the row "cf". lists: candidate lists of topk, the first at the top level and every one under
    "lists"; by default those the data was prepared with. n resamples of users for the intervals.
    """
    found = {}
    for task in tasks:
        if task == "topk":
            names = list(lists) if lists is not None else _prepared_lists(data, split)
            found[task] = _evaluate_topk(data, split, names, vectors, n, seed)
            continue
        rows = data.rows(task, split)
        users = data.user[rows]
        if task == "explain":
            found[task] = _evaluate_texts(data, rows, n, seed)
            continue
        if task == "ctr":
            scores, measure = ctr_scores(data, rows, vectors), metrics.ctr_metrics
            targets = data.label[rows]
        else:
            scores, measure = rating_predictions(data, rows), metrics.rating_metrics
            targets = data.rating[rows]
        found[task] = {
            name: measure(values, targets, users, n, seed) for name, values in scores.items()
        }
    return found


def ctr_scores(
    data: PreparedData, rows: np.ndarray, vectors: CFVectors | None = None
) -> dict[str, np.ndarray]:
    """Click scores (N,) of each baseline for row ids (N,)."""
    means = TrainMeans.of(data, "label")
    user, item = data.user[rows], data.item[rows]
    scores = {
        "item_mean": means.item_mean(ITEM_PRIOR)[item],
        "item_user_mean": means.item_mean(ITEM_PRIOR_OF_SUM)[item]
        + means.user_mean(USER_PRIOR)[user],
        "popularity": means.item_count[item],
    }
    regression = _logistic_scores(data, rows, means)
    if regression is not None:
        scores["logistic_regression"] = regression
    if vectors is not None:
        history = data.history[rows] if vectors.takes_history else None
        scores["cf"] = vectors.score(user, item, history).numpy()
    return scores


def topk_scores(
    data: PreparedData, candidates: Candidates, vectors: CFVectors | None = None
) -> dict[str, np.ndarray]:
    """Scores (P, C) of each baseline for the candidates."""
    means = TrainMeans.of(data, "label")
    scores = {
        "popularity": means.item_count[candidates.items],
        "item_mean": means.item_mean(ITEM_PRIOR)[candidates.items],
    }
    if vectors is not None:
        user = data.user[candidates.rows][:, None]  # (P, 1)
        history = data.history[candidates.rows][:, None] if vectors.takes_history else None
        scores["cf"] = vectors.score(user, candidates.items, history).numpy()
    return scores


def rating_predictions(data: PreparedData, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Predicted ratings (N,) of each baseline for row ids (N,)."""
    means = TrainMeans.of(data, "rating")
    train = _train_rows(data, "rating")
    low, high = data.rating[train].min(), data.rating[train].max()
    item = means.item_mean(ITEM_PRIOR_OF_SUM)
    # What a user gives above the items' means: means of both would count good items twice.
    surplus = data.rating[train].astype(np.float64) - item[data.item[train]]
    user = np.bincount(data.user[train], surplus, data.n_users) / (means.user_count + USER_PRIOR)
    both = item[data.item[rows]] + user[data.user[rows]]
    return {
        "global_mean": np.full(len(rows), means.mean),
        "item_mean": means.item_mean(ITEM_PRIOR)[data.item[rows]],
        "item_user_mean": np.clip(both, low, high),
    }


def explanations(data: PreparedData, rows: np.ndarray) -> dict[str, list[str]]:
    """Texts (N,) of each baseline for row ids (N,), of the sentences that explain trains on.

    common_sentence: the most frequent one, for every row. item_sentence: the latest about the same
    item, by whomever; the common one for items without.
    """
    train = data.rows("explain", "train")
    train = train[np.argsort(data.time[train], kind="stable")]
    sentences = [data.explanation(int(row)) for row in train]
    common = Counter(sentences).most_common(1)[0][0] if sentences else ""
    latest = {int(data.item[row]): text for row, text in zip(train, sentences, strict=True)}
    return {
        "common_sentence": [common] * len(rows),
        "item_sentence": [latest.get(int(item), common) for item in data.item[rows]],
    }


def slice_masks(data: PreparedData, rows: np.ndarray, least: int = 3) -> dict[str, np.ndarray]:
    """Masks (N,) of the slices of row ids (N,): warm, cold and, where the data has it, not_cold.

    Warm: user and item each have at least ``least`` rows in train; cold: the others.
    """
    train = data.split == 0
    user_count = np.bincount(data.user[train], minlength=data.n_users)
    item_count = np.bincount(data.item[train], minlength=data.n_items)
    warm = np.minimum(user_count[data.user[rows]], item_count[data.item[rows]]) >= least
    masks = {"warm": warm, "cold": ~warm}
    if (data.not_cold[rows] >= 0).any():
        masks["not_cold"] = data.not_cold[rows] == 1
    return masks


def _evaluate_topk(data, split, names, vectors, n, seed) -> dict[str, dict]:
    found: dict[str, dict] = {}
    for name in names:
        candidates = data.candidates(split, name)
        users = data.user[candidates.rows]
        for baseline, scores in topk_scores(data, candidates, vectors).items():
            measured = metrics.topk_metrics(scores, candidates.positive, users, n, seed)
            part = found.setdefault(baseline, measured | {"lists": {}})
            part["lists"][name] = measured
    return found


def _evaluate_texts(data, rows, n, seed) -> dict[str, dict]:
    from ckf.text_metrics import text_metrics

    own = [data.explanation(int(row)) for row in rows]
    return {
        name: text_metrics(texts, own, data.user[rows], n, seed)
        for name, texts in explanations(data, rows).items()
    }


def _prepared_lists(data: PreparedData, split: str) -> list[str]:
    settings = data.manifest["settings"]["data"]
    return [settings["train_list"]] if split == "train" else list(settings["test_lists"])


def _train_rows(data: PreparedData, value: str) -> np.ndarray:
    has_one = data.label >= 0 if value == "label" else np.isfinite(data.rating)
    return np.flatnonzero((data.split == 0) & has_one)


def _logistic_scores(data: PreparedData, rows: np.ndarray, means: TrainMeans) -> np.ndarray | None:
    """Log-odds (N,) by regression on means, popularity, activity and year; None if it cannot be."""
    if not 0.0 < means.mean < 1.0:
        return None  # one class only: nothing to tell apart
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError:
        warnings.warn(
            "the baseline logistic_regression is left out: scikit-learn is not installed",
            stacklevel=3,
        )
        return None
    year = release_years(data)
    train = _train_rows(data, "label")
    model = make_pipeline(StandardScaler(), LogisticRegression())
    model.fit(regression_features(data, train, means, year, leave_out=True), data.label[train])
    return model.decision_function(regression_features(data, rows, means, year, leave_out=False))


def regression_features(
    data, rows, means: TrainMeans, year: np.ndarray, leave_out: bool
) -> np.ndarray:
    """(N, 5): item mean, user mean, log popularity, user activity, release year.

    leave_out: the rows are all train rows; take the labels of a row's pair of user and item, which
    would give its own away, out of its means.
    """
    user, item = data.user[rows], data.item[rows]
    own, label = 0.0, 0.0
    if leave_out:
        pair = pair_numbers(data, rows)
        own = np.bincount(pair).astype(np.float64)[pair]
        label = np.bincount(pair, data.label[rows])[pair]

    def mean(total: np.ndarray, count: np.ndarray, prior: float) -> np.ndarray:
        return (total - label + prior * means.mean) / (count - own + prior)

    return np.stack(
        [
            mean(means.item_sum[item], means.item_count[item], ITEM_PRIOR),
            mean(means.user_sum[user], means.user_count[user], USER_PRIOR),
            np.log1p(means.item_count[item]),  # counts hold no label
            np.log1p(means.user_count[user]),
            year[item],
        ],
        axis=1,
    )


def pair_numbers(data: PreparedData, rows: np.ndarray) -> np.ndarray:
    """(N,) int64: the number of each row's pair of user and item, in order of first appearance."""
    keys = data.user[rows].astype(np.int64) * data.n_items + data.item[rows]
    _, first, place = np.unique(keys, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[place]


def release_years(data: PreparedData) -> np.ndarray:
    """Release year (I,) from titles such as "Heat (1995)"; without one, the train rows' mean."""
    found = [_YEAR.findall(title) for title in data.titles]
    year = np.array([float(years[-1]) if years else np.nan for years in found])
    of_train = year[data.item[_train_rows(data, "label")]]
    known = of_train[np.isfinite(of_train)]
    return np.where(np.isfinite(year), year, known.mean() if len(known) else 0.0)
