"""How a user and an item fit, for a placeholder of its own: the CF model's score.

All items of a train row are scored by a model and a blend that did not see the row
(ckf.cf.held_out): a score that knows the answer would teach the model to trust it more than it
should. Without them (``cf.held_out: false``) a blend leaves out the row's own pair alone.

That score is a product of two vectors. A language model that is shown the two vectors in two places
must learn to multiply them; shown the score, it only has to read it. The products of the single
dimensions beside the score did not help (LOG.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from ckf.cf import CFVectors
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
        users, items = data.user[rows], data.item[rows]
        raw = self._raw(users, data.history[rows], items, vectors.folds(users, items))
        self.mean, self.std = float(raw.mean()), float(spread(float(raw.std(correction=0))))

    def __call__(
        self,
        users: np.ndarray,
        history: np.ndarray,
        items: Sequence[int],
        folds: Tensor | None = None,
    ) -> Tensor:
        """Users (p,), -1 for a stranger, histories (p, h) padded with -1, items (p,): (p, 1).

        folds: (p,) of the rows that they are shown in, as ``CFVectors.folds`` gives them.
        """
        raw = self._raw(users, history, np.asarray(items, np.int64), folds)
        return ((raw - self.mean) / self.std).float().unsqueeze(1)

    def _raw(
        self, users: np.ndarray, history: np.ndarray, items: np.ndarray, folds: Tensor | None
    ) -> Tensor:
        """Scores (p,) float64."""
        past = history if self.vectors.takes_history else None
        return self.vectors.score(users, items, past, folds).double()
