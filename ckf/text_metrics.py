"""Metrics of generated texts against references, in percent, with intervals over users."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from ckf.metrics import bootstrap_over_users, mean_statistic

_ROUGE = ("rouge1", "rouge2", "rougeL")


def text_metrics(
    predictions: Sequence[str],
    references: Sequence[str],
    users: ArrayLike,
    n: int = 1000,
    seed: int = 0,
) -> dict[str, dict]:
    """BLEU-4, ROUGE-1/2/L and distinct-1/2, each in 0..100 with a 95% interval.

    predictions, references: one text per row; users (N,). Keys: bleu4, rouge1, rouge2, rougeL,
    distinct1, distinct2. BLEU-4 is sacrebleu's corpus BLEU (13a
    tokens, exponential smoothing); ROUGE is rouge-score's F1 without stemming, averaged over rows;
    distinct-n (Li et al. 2016) is the share of different n-grams among all, of lower-cased words
    between blanks. Needs sacrebleu and rouge-score.
    """
    users = np.asarray(users)
    if not len(predictions) == len(references) == len(users):
        raise ValueError(
            f"{len(predictions)} predictions, {len(references)} references and {len(users)} users: "
            "expected one of each per row"
        )
    if len(predictions) == 0:
        names = ("bleu4", *_ROUGE, "distinct1", "distinct2")
        return {name: {"value": None, "low": None, "high": None} for name in names}
    found = {
        "bleu4": bootstrap_over_users(_bleu_statistic(predictions, references), users, n, seed)
    }
    for name, values in _rouge(predictions, references).items():
        found[name] = bootstrap_over_users(mean_statistic(values), users, n, seed)
    for size in (1, 2):
        found[f"distinct{size}"] = distinct(predictions, users, size)
    return found


def distinct(texts: Sequence[str], users: ArrayLike, size: int) -> dict[str, float | None]:
    """Distinct n-grams of ``size`` words over all of them, in percent, with a 95% interval.

    The interval is a jackknife over users: a resample with replacement repeats texts, which lowers
    the share of distinct n-grams by itself. None where there is no n-gram (or a single user).
    """
    _, owner = np.unique(np.asarray(users), return_inverse=True)
    n_users = int(owner.max()) + 1 if len(owner) else 0
    total = np.zeros(n_users)
    owners: dict[tuple[str, ...], int] = {}  # n-gram to its only user, -1: several
    for text, user in zip(texts, owner.tolist(), strict=True):
        words = text.lower().split()
        for gram in zip(*(words[k:] for k in range(size)), strict=False):
            total[user] += 1
            if owners.setdefault(gram, user) != user:
                owners[gram] = -1
    if total.sum() == 0:
        return {"value": None, "low": None, "high": None}
    value = 100.0 * len(owners) / total.sum()
    alone = np.bincount([user for user in owners.values() if user >= 0], minlength=n_users)
    rest = total.sum() - total
    if n_users < 2 or (rest == 0).any():
        return {"value": value, "low": None, "high": None}
    without = 100.0 * (len(owners) - alone) / rest  # the value without each user
    error = np.sqrt((n_users - 1) / n_users * ((without - without.mean()) ** 2).sum())
    low, high = max(0.0, value - 1.96 * error), min(100.0, value + 1.96 * error)
    return {"value": value, "low": float(low), "high": float(high)}


def _bleu_statistic(predictions: Sequence[str], references: Sequence[str]):
    """Corpus BLEU depends on the rows by sums of counts only, so weighted sums resample it."""
    from sacrebleu.metrics import BLEU

    bleu = BLEU(effective_order=False)
    counts = []
    for prediction, reference in zip(predictions, references, strict=True):
        row = bleu.corpus_score([prediction], [[reference]])
        counts.append([*row.counts, *row.totals, row.sys_len, row.ref_len])
    counts = np.array(counts, dtype=np.float64)  # (N, 10)

    def statistic(weights: np.ndarray) -> np.ndarray:
        scores = []
        for row in np.rint(weights @ counts).astype(int).tolist():
            correct, total, (hypothesis, reference) = row[:4], row[4:8], row[8:]
            score = BLEU.compute_bleu(
                correct, total, hypothesis, reference, smooth_method="exp", effective_order=False
            )
            scores.append(score.score)
        return np.array(scores)

    return statistic


def _rouge(predictions: Sequence[str], references: Sequence[str]) -> dict[str, np.ndarray]:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(_ROUGE), use_stemmer=False)
    rows = [
        scorer.score(reference, prediction)
        for prediction, reference in zip(predictions, references, strict=True)
    ]
    return {name: np.array([100.0 * row[name].fmeasure for row in rows]) for name in _ROUGE}
