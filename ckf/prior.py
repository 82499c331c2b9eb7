"""What the CF model expects as the answer, as log-odds under those of the language model.

    log p(answer) = language model's logit + prior + constant

A product of two experts. The language model starts from what CF score, popularity and mean ratings
know, and learns what they do not. The priors are softmax regressions on the train rows, fixed in
training: over Yes and No, over the stars, and over the candidates of a list. They see what training
will see (ckf.cf.blend): scores, counts and means that leave a train row itself out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ckf.baselines import ITEM_PRIOR_OF_SUM, USER_PRIOR
from ckf.batches import QuestionMaker, stars
from ckf.cf.blend import spread
from ckf.data.prepared import PreparedData
from ckf.match import MatchScores
from ckf.newton import damped_newton
from ckf.prompts import ANSWERS

_MOST_CHOICES = 50_000  # rows x words that a regression is fitted on, evenly from all
_RIDGE = 1.0
_STARS = ("rating", "review_rating")
_KNOWN = {  # the features that count
    "ctr": [0, 1, 4],
    "topk": [0, 1],
    "rating": [0, 1, 2, 3, 4],
    "review_rating": [0, 1, 2, 3, 4],
}


class AnswerPrior:
    """Log-odds of every answer word of a task, for a user and an item or a list of items.

    Args:
        matches: scores of users and items, from vectors with a blend.
        maker: of the rows it is fitted on.
        tokens: token of every answer word, in the order of ``ANSWERS``, by task; others get none.
    """

    def __init__(
        self, matches: MatchScores, maker: QuestionMaker, tokens: Mapping[str, Sequence[int]]
    ) -> None:
        self.matches, self.tokens = matches, {t: np.array(w) for t, w in tokens.items()}
        data = maker.data
        train = np.flatnonzero(data.split == 0)
        user, item = data.user[train].astype(np.int64), data.item[train].astype(np.int64)
        rated = ~np.isnan(data.rating[train])
        rating = np.where(rated, data.rating[train], 0).astype(np.float64)
        self.rating_mean = rating.sum() / max(1, rated.sum())
        # (3, ...) by item, by user and by pair of both: rows, rated rows, sum of ratings
        what = np.stack([np.ones(len(train)), rated, rating])
        self.by_item = _sums(what, item, data.n_items)
        self.by_user = _sums(what, user, data.n_users)
        self.pairs, place = np.unique(user * data.n_items + item, return_inverse=True)
        self.by_pair = _sums(what, place, len(self.pairs))
        logs = np.log1p(self.by_item[0, item] - self.by_pair[0, place])
        self.mean, self.std = logs.mean(), float(spread(logs.std()))
        # by task (words, 5): weights of the features; one row for a list, whose words are places
        self.weights = {
            task: self._fit_list(maker) if task == "topk" else self._fit_words(data, task)
            for task in self.tokens
        }

    def features(
        self, users, history, items, scores: Tensor | None = None, folds: Tensor | None = None
    ) -> np.ndarray:
        """What is known of users (p,), -1 for a stranger, with histories (p, h), and items (p,).

        Returns:
            (p, 5): CF score, log popularity (standardised), mean rating of the item and of the user
            (above the mean of all), 1. A pair of a train row does not count for itself. ``folds``
            as for the matches, where their scores are not given.
        """
        users, items = np.asarray(users, np.int64), np.asarray(items, np.int64)
        scores = self.matches(users, history, items, folds) if scores is None else scores
        keys = users * self.by_item.shape[1] + items
        place = np.searchsorted(self.pairs, keys).clip(max=len(self.pairs) - 1)
        known = users >= 0
        own = self.by_pair[:, place] * (known & (self.pairs[place] == keys))
        of_item = self.by_item[:, items] - own
        of_user = (self.by_user[:, users.clip(min=0)] - own) * known
        popularity = (np.log1p(of_item[0]) - self.mean) / self.std
        means = [
            (found[2] - found[1] * self.rating_mean) / (found[1] + pseudo)
            for found, pseudo in ((of_item, ITEM_PRIOR_OF_SUM), (of_user, USER_PRIOR))
        ]
        return np.column_stack([scores.flatten().numpy(), popularity, *means, np.ones(len(items))])

    def entries(
        self, tasks: Sequence[str], rows: np.ndarray, features: np.ndarray
    ) -> dict[str, Tensor]:
        """What is added to the logits of a batch.

        Args:
            tasks: the task of every row of the batch.
            rows: (p,) the row of every item, those of one row neighbours in the order of its list.
            features: (p, 5), of every item.

        Returns:
            prior_rows (q,), prior_tokens (q,) and prior_values (q,): logit of a token, by row.
        """
        found = []
        starts = np.flatnonzero(np.r_[True, rows[1:] != rows[:-1]]) if len(rows) else []
        for start, stop in zip(starts, [*starts[1:], len(rows)], strict=False):
            row = int(rows[start])
            if tasks[row] not in self.tokens:
                continue
            values = (features[start:stop] @ self.weights[tasks[row]].T).flatten()
            tokens = self.tokens[tasks[row]][: len(values)]
            found += zip([row] * len(values), tokens, values - values.mean(), strict=True)
        rows, tokens, values = zip(*found, strict=True) if found else ((), (), ())
        return {
            "prior_rows": torch.tensor(rows, dtype=torch.int64),
            "prior_tokens": torch.tensor(tokens, dtype=torch.int64),
            "prior_values": torch.tensor(values, dtype=torch.float32),
        }

    def _fit_words(self, data: PreparedData, task: str) -> np.ndarray:
        """(words, 5): a softmax over the answer words."""
        count = len(ANSWERS[task])
        known = data.label >= 0
        if task in _STARS:
            known = (data.rating >= 0.5) & (data.rating < 5.5)  # NaN: False
        rows = _evenly(np.flatnonzero((data.split == 0) & known), _MOST_CHOICES // count)
        if task in _STARS:
            words = stars(data.rating[rows], rows) - 1
        else:
            words = np.where(data.label[rows] == 1, 0, 1)
        users, items = data.user[rows], data.item[rows]
        folds = self.matches.vectors.folds(users, items)
        x = self.features(users, data.history[rows], items, folds=folds)[:, _KNOWN[task]]
        # every word has its weights: (r, words, words * features), block by block
        choices = np.einsum("kj,rf->rkjf", np.eye(count), x).reshape(len(x), count, -1)
        weights = np.zeros((count, 5))
        weights[:, _KNOWN[task]] = softmax_regression(choices, words).reshape(count, -1)
        return weights

    def _fit_list(self, maker: QuestionMaker) -> np.ndarray:
        """(1, 5): a softmax over the candidates of a list."""
        data, lists = maker.data, maker.candidates("train")
        size = lists.items.shape[1]
        picked = _evenly(np.arange(len(lists.items)), _MOST_CHOICES // size)
        items, rows = lists.items[picked], np.repeat(lists.rows[picked], size)
        users = data.user[rows]
        folds = self.matches.vectors.folds(users, data.item[rows])
        x = self.features(users, data.history[rows], items.flatten(), folds=folds)
        x = x[:, _KNOWN["topk"]]
        weights = np.zeros((1, 5))
        weights[0, _KNOWN["topk"]] = softmax_regression(
            x.reshape(*items.shape, x.shape[1]), lists.positive[picked]
        )
        return weights


def softmax_regression(choices: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Weights w (f,) that make softmax(choices @ w) likeliest, with a ridge, by Newton.

    Args:
        choices: (r, k, f) features of k choices.
        chosen: (r,) the choice that was made.
    """
    made = np.take_along_axis(choices, chosen.astype(np.int64)[:, None, None], 1)[:, 0].sum(0)
    flat = choices.reshape(-1, choices.shape[2])

    def slope_and_curve(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        logits = choices @ weights
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)  # (r, k)
        mean = np.einsum("rk,rkf->rf", p, choices)
        curve = (flat * p.reshape(-1, 1)).T @ flat - mean.T @ mean
        slope = mean.sum(0) - made + _RIDGE * weights
        return slope, curve + _RIDGE * np.eye(len(weights))

    return damped_newton(np.zeros(choices.shape[2]), slope_and_curve)


def _sums(what: np.ndarray, groups: np.ndarray, count: int) -> np.ndarray:
    """(len(what), count): the sums of rows (w, r) over groups (r,)."""
    return np.stack([np.bincount(groups, values, count) for values in what])


def _evenly(rows: np.ndarray, most: int) -> np.ndarray:
    return rows[:: max(1, -(-len(rows) // most))]
