"""What the CF model expects as the answer, as log-odds under those of the language model.

    log p(answer) = language model's logit + prior + constant

A product of two experts. The language model starts from what CF score, popularity and mean ratings
know, and learns what they do not. The priors are regressions on the train rows, fixed in training:
logistic for ctr, multinomial over the stars, for a list one candidate against another. They see
what training will see (ckf.cf.blend): scores, counts and means that leave a train row itself out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from ckf.baselines import ITEM_PRIOR_OF_SUM, USER_PRIOR
from ckf.batches import QuestionMaker, star
from ckf.match import MatchScores
from ckf.prompts import ANSWERS

_MOST_ROWS = 50_000  # that a regression is fitted on, evenly from all
_STARS = ("rating", "review_rating")


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
        self.by_item, self.by_user = (
            _sums(what, item, data.n_items),
            _sums(what, user, data.n_users),
        )
        self.pairs, place = np.unique(user * data.n_items + item, return_inverse=True)
        self.by_pair = _sums(what, place, len(self.pairs))
        logs = np.log1p(self.by_item[0, item] - self.by_pair[0, place])
        self.mean, self.std = logs.mean(), max(logs.std(), 1e-9)
        # by task (words, 5): weights of the features
        self.weights = {
            task: self._fit_list(maker) if task == "topk" else self._fit_words(maker, task)
            for task in self.tokens
        }

    def features(self, users, history, items, scores: Tensor | None = None) -> np.ndarray:
        """What is known of users (p,), -1 for a stranger, with histories (p, h), and items (p,).

        Returns:
            (p, 5): CF score, log popularity (standardised), mean rating of the item and of the user
            (above the mean of all), 1. A pair of a train row does not count for itself.
        """
        users, items = np.asarray(users, np.int64), np.asarray(items, np.int64)
        scores = self.matches(users, history, items) if scores is None else scores
        keys = users * self.by_item.shape[1] + items
        place = np.searchsorted(self.pairs, keys).clip(max=len(self.pairs) - 1)
        known = users >= 0
        own = self.by_pair[:, place] * (known & (self.pairs[place] == keys))
        of_item = self.by_item[:, items] - own
        of_user = (self.by_user[:, users.clip(min=0)] - own) * known
        popularity = (np.log1p(of_item[0]) - self.mean) / self.std
        means = [
            (found[2] - found[1] * self.rating_mean) / (found[1] + prior)
            for found, prior in ((of_item, ITEM_PRIOR_OF_SUM), (of_user, USER_PRIOR))
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

    def _fit_words(self, maker: QuestionMaker, task: str) -> np.ndarray:
        """(words, 5): a regression of the answer word; mean ratings count for stars alone."""
        data = maker.data
        known = ~np.isnan(data.rating) if task in _STARS else data.label >= 0
        rows = _evenly(np.flatnonzero((data.split == 0) & known))
        if task in _STARS:
            words = np.array([star(r) - 1 for r in data.rating[rows]], np.int64)
        else:
            words = np.where(data.label[rows] == 1, 0, 1)
        x = self.features(data.user[rows], data.history[rows], data.item[rows])[:, :-1]
        x[:, 2:] *= task in _STARS
        # one row more of every word, so that a word nobody used has a small chance, not none
        count = len(ANSWERS[task])
        x, words = np.vstack([x, np.zeros((count, 4))]), np.append(words, np.arange(count))
        fitted = LogisticRegression(max_iter=1000).fit(x, words)
        weights = np.column_stack([fitted.coef_, fitted.intercept_])
        if count == 2:  # one set of weights, for the second word
            weights = np.vstack([-weights, weights]) / 2
        return weights

    def _fit_list(self, maker: QuestionMaker) -> np.ndarray:
        """(1, 5): weights that tell a list's liked item from the others, one against one."""
        data, lists = maker.data, maker.candidates("train")
        count, size = lists.items.shape
        picked = _evenly(np.arange(count), _MOST_ROWS // size)
        items, positive = lists.items[picked], lists.positive[picked]
        rows = np.repeat(lists.rows[picked], size)
        x = self.features(data.user[rows], data.history[rows], items.flatten())[:, :2]
        x = x.reshape(*items.shape, 2)
        liked = np.take_along_axis(x, positive[:, None, None].astype(np.int64), 1)
        others = np.arange(size) != positive[:, None]
        gains = (liked - x)[others]  # (count * (size - 1), 2)
        sign = np.where(np.arange(len(gains)) % 2, 1, -1)  # a regression wants both outcomes
        fitted = LogisticRegression(fit_intercept=False, max_iter=1000)
        fitted.fit(gains * sign[:, None], sign)
        return np.append(fitted.coef_[0], np.zeros(3))[None]


def _sums(what: np.ndarray, groups: np.ndarray, count: int) -> np.ndarray:
    """(len(what), count): the sums of rows (w, r) over groups (r,)."""
    return np.stack([np.bincount(groups, values, count) for values in what])


def _evenly(rows: np.ndarray, most: int = _MOST_ROWS) -> np.ndarray:
    return rows[:: max(1, -(-len(rows) // most))]
