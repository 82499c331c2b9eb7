"""Controls of an experiment: the same model on CF vectors that say nothing of their user."""

from __future__ import annotations

import numpy as np

from ckf.batches import VectorLookup
from ckf.cf import CFVectors
from ckf.data.prepared import PreparedData


class ShuffledUsers(VectorLookup):
    """CF vectors in which every user has the vector and the history of another user.

    Users with a vector trade places among themselves, and so do those that are folded in from
    their history: both groups look as before. Items, and the titles in the prompt, are untouched.
    """

    def __init__(self, vectors: CFVectors, data: PreparedData, seed: int) -> None:
        super().__init__(vectors)
        self.donor = shuffled(vectors.user_known.numpy(), seed)
        last = np.zeros(data.n_users, np.int64)
        last[data.user] = np.arange(len(data.user))  # rows lie in order of time within a user
        train = np.flatnonzero(data.split == 0)
        last[data.user[train]] = train  # nothing later than train reaches training
        self.donor_history = data.history[last][self.donor]

    def profiles(self, users: np.ndarray, history: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Users (b,) and histories (b, h) replaced by another user's; strangers by the last one."""
        return self.donor[users], self.donor_history[users]


def shuffled(known: np.ndarray, seed: int) -> np.ndarray:
    """A permutation (U,) that moves every user, within the known and within the others (U,) bool.

    A group of one has nobody to trade with and stays.
    """
    donor = np.arange(len(known))
    rng = np.random.default_rng([seed, 0x5FF1E])
    for group in (np.flatnonzero(known), np.flatnonzero(~known)):
        ring = rng.permutation(group)
        donor[ring] = np.roll(ring, 1)
    return donor
