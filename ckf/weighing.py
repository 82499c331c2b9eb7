"""How much the language model counts beside the prior: a number a task, fitted on valid rows.

    log p(answer) = weight * language model's logit + prior + constant        (ckf.prior)

The prior is fitted on rows that leave themselves out, so its odds are as good on new rows. The
language model has seen the answers of its train rows: of few rows it learns noise too, and is too
sure of it. The weight, 0 to 10, is the one that makes the answers of the valid rows likeliest:
0 says that the language model tells nothing that the prior does not know.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np

from ckf.prompts import ANSWERS

if TYPE_CHECKING:
    from ckf.assembly import Assembly

MOST_ROWS = 2000  # of a task, evenly from its valid rows
LARGEST = 10.0
_TOWARDS_ONE = 1e-3  # a ridge: where the language model says the same of all, the weight stays 1
_HALVINGS = 50


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
    """The weight, 0 to LARGEST, under which the answers (r,), by index, are likeliest.

    The other arguments as for :func:`weigh`. The slope of the loss rises with the weight: halving
    finds where it passes zero. Rows without a prior say nothing.

    Raises:
        ValueError: logits that are not finite.
    """
    own = ~np.isnan(prior)
    if not np.isfinite(logits[own]).all():
        raise ValueError("logits that are not finite")
    rows = own.any(1)
    own, answers = own[rows], answers[rows, None]
    base = np.where(own, prior[rows], -np.inf)
    said = np.where(own, logits[rows] - prior[rows], 0.0)
    told = np.take_along_axis(said, answers, 1).sum()

    def slope(weight: float) -> float:
        odds = base + weight * said
        p = np.exp(odds - np.logaddexp.reduce(odds, 1, keepdims=True))
        return (p * said).sum() - told + _TOWARDS_ONE * (weight - 1)

    low, high = 0.0, LARGEST
    if slope(low) >= 0:
        return low
    if slope(high) <= 0:
        return high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return (low + high) / 2


def check_weights(weights: object) -> dict[str, float]:
    """The weights as a file says them; ValueError for anything else."""
    if not isinstance(weights, dict) or not all(
        type(w) in (int, float) and 0 <= w <= LARGEST for w in weights.values()
    ):
        raise ValueError(f"{weights!r} as weights; expected a number from 0 to {LARGEST:g} a task")
    return weights


def fit_weights(assembly: Assembly) -> dict[str, float]:
    """The weight of every task that has a prior and valid rows.

    A task whose logits are not finite gets none, with a warning.
    """
    from ckf.scoring import Scorer

    prior, maker, data = assembly.batcher.collator.prior, assembly.maker, assembly.data
    scorer, found = Scorer(assembly), {}
    for task in prior.tokens if prior is not None else ():
        if not len(data.rows(task, "valid")):
            continue
        examples = maker.examples(task, "valid")
        examples = examples[:: max(1, -(-len(examples) // MOST_ROWS))]
        if not examples:  # a list of none of these rows
            continue
        rows = [example.row for example in examples]
        prompts = [assembly.batcher.encode(example, "valid", True) for example in examples]
        logits, values = scorer.word_logits_and_prior(prompts, data.user[rows], data.history[rows])
        answers = [ANSWERS[task].index(maker.question(e, "valid").answer) for e in examples]
        try:
            found[task] = round(likeliest_weight(logits, values, np.array(answers)), 4)
        except ValueError as error:
            warnings.warn(f"no weight for {task}: {error} on its valid rows", stacklevel=2)
    return found
