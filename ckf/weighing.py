"""How much the language model counts beside the prior: a number a task, fitted on valid rows.

    log p(answer) = weight * language model's logit + prior + constant        (ckf.prior)

The prior is fitted on rows that leave themselves out, so its odds are as good on new rows. The
language model has seen the answers of its train rows: of few rows it learns noise too, and is too
sure of it. The weight, at least 0, is the one that makes the answers of the valid rows likeliest:
0 says that the language model tells nothing that the prior does not know.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ckf.prompts import ANSWERS

if TYPE_CHECKING:
    from ckf.assembly import Assembly

MOST_ROWS = 2000  # of a task, evenly from its valid rows
_TOWARDS_ONE = 1e-3  # a ridge: where the language model says the same of all, the weight stays 1


def weigh(logits: np.ndarray, prior: np.ndarray, weight: float) -> np.ndarray:
    """Logits of the answer words with the language model's part times the weight.

    The words that have a prior keep the chance that the model gave them all together.

    Args:
        logits: (r, words), prior included; ``prior``: (r, words), NaN for words that have none.
    """
    own = ~np.isnan(prior)
    mixed = prior + weight * (logits - prior)
    kept = np.logaddexp.reduce(np.where(own, logits, -np.inf), 1, keepdims=True)
    made = np.logaddexp.reduce(np.where(own, mixed, -np.inf), 1, keepdims=True)
    with np.errstate(invalid="ignore"):  # rows without a prior: -inf - -inf
        return np.where(own, mixed + (kept - made), logits)


def likeliest_weight(logits: np.ndarray, prior: np.ndarray, answers: np.ndarray) -> float:
    """The weight, at least 0, under which the answers (r,), by index, are likeliest.

    The other arguments as for :func:`weigh`. Newton's method on a convex function of one number.
    """
    own = ~np.isnan(prior)
    base, said = np.where(own, prior, -np.inf), np.where(own, logits - prior, 0.0)
    told = np.take_along_axis(said, answers[:, None], 1)[:, 0].sum()
    weight = 1.0
    for _ in range(100):
        odds = base + weight * said
        p = np.exp(odds - np.logaddexp.reduce(odds, 1, keepdims=True))
        mean = (p * said).sum(1)
        slope = mean.sum() - told + _TOWARDS_ONE * (weight - 1)
        curve = (p * said**2).sum() - (mean**2).sum() + _TOWARDS_ONE
        step = max(-0.5, min(0.5, slope / curve))  # no leap where it is flat
        weight, before = max(0.0, weight - step), weight
        if abs(weight - before) < 1e-6:
            break
    return float(weight)


def fit_weights(assembly: Assembly) -> dict[str, float]:
    """The weight of every task that has a prior and valid rows."""
    from ckf.scoring import Scorer

    prior, maker, data = assembly.batcher.collator.prior, assembly.maker, assembly.data
    scorer, found = Scorer(assembly), {}
    scorer.weights = {}  # as trained
    for task in prior.tokens if prior is not None else ():
        if not len(data.rows(task, "valid")):
            continue
        examples = maker.examples(task, "valid")
        examples = examples[:: max(1, -(-len(examples) // MOST_ROWS))]
        rows = [example.row for example in examples]
        prompts = [assembly.batcher.encode(example, "valid", True) for example in examples]
        logits, values = scorer.word_logits_and_prior(prompts, data.user[rows], data.history[rows])
        answers = [ANSWERS[task].index(maker.question(e, "valid").answer) for e in examples]
        found[task] = round(likeliest_weight(logits, values, np.array(answers)), 4)
    return found
