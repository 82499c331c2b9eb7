"""How a user and an item fit, for a placeholder of its own: the CF model's score.

Pairs of the train rows are scored as if their row were new where the CF vectors have a blend
(ckf.cf.blend): a score that knows the answer would teach the model to trust it more than it should.

That score is a product of two vectors. A language model that is shown the two vectors in two places
must learn to multiply them; shown the score, it only has to read it. The products of the single
dimensions beside the score did not help (LOG.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ckf.cf import CFVectors, fold_in_users
from ckf.cf.blend import spread

if TYPE_CHECKING:
    from ckf.data.prepared import PreparedData

_ROWS_TO_SCALE_ON = 100_000  # of the train rows


class MatchScores:
    """The CF model's score of a user and an item, of mean 0 and deviation 1 over the train rows.

    Users without train rows are folded in; in a blend they have the items' part and, with
    ``cf.history``, what their history adds.

    Args:
        vectors: CF vectors before standardising.
    """

    def __init__(self, vectors: CFVectors, data: PreparedData) -> None:
        self.vectors = vectors
        train = np.flatnonzero(data.split == 0)
        rows = train[:: max(1, len(train) // _ROWS_TO_SCALE_ON)]
        raw = self._raw(data.user[rows], data.history[rows], data.item[rows])
        self.mean, self.std = float(raw.mean()), float(spread(float(raw.std(correction=0))))

    def __call__(self, users: np.ndarray, history: np.ndarray, items: Sequence[int]) -> Tensor:
        """Users (p,), -1 for a stranger, histories (p, h) padded with -1, items (p,): (p, 1)."""
        raw = self._raw(users, history, np.asarray(items, np.int64))
        return ((raw - self.mean) / self.std).float().unsqueeze(1)

    def _raw(self, users: np.ndarray, history: np.ndarray, items: np.ndarray) -> Tensor:
        """Scores (p,) float64, the global bias left out."""
        index = torch.as_tensor(np.array(users, np.int64))
        if self.vectors.blend is not None:
            past = history if self.vectors.takes_history else None
            return self.vectors.score(index, items, past).double()
        known = (index >= 0) & self.vectors.user_known[index.clamp(min=0)]
        folded = fold_in_users(self.vectors, np.asarray(history))
        u = torch.where(known.unsqueeze(1), self.vectors.users[index.clamp(min=0)], folded)
        i = self.vectors.items[torch.as_tensor(np.array(items, np.int64))]
        u, i = u.double(), i.double()
        if self.vectors.score_form == "biased_dot":  # the last dimensions are biases, they add up
            return (u[:, :-1] * i[:, :-1]).sum(1) + u[:, -1] + i[:, -1]
        return (u * i).sum(1)
