"""Controls of an experiment: the same model on CF vectors that say nothing of their user."""

from __future__ import annotations

import numpy as np

from ckf.batches import VectorLookup
from ckf.cf import CFVectors
from ckf.data.prepared import PreparedData


class ShuffledUsers(VectorLookup):
    """CF vectors in which every user has the vector and the history of another user.

    Users with a vector trade places among themselves, and so do those that are folded in from
    their history: both groups look as before. They trade with neighbours by the length of their
    history, and a row is shown no more items than its own has: what is taken away is whose history
    it is, not how much of one. Items, and the titles in the prompt, are untouched.
    """

    def __init__(self, vectors: CFVectors, data: PreparedData, seed: int) -> None:
        super().__init__(vectors)
        last = np.zeros(data.n_users, np.int64)
        last[data.user] = np.arange(len(data.user))  # rows lie in order of time within a user
        train = np.flatnonzero(data.split == 0)
        last[data.user[train]] = train  # nothing later than train reaches training
        history = data.history[last]
        self.donor = shuffled(vectors.user_known.numpy(), (history >= 0).sum(1), seed)
        self.donor_history = history[self.donor]

    def profiles(self, users: np.ndarray, history: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Users (b,) and histories (b, h) replaced by another user's; strangers by the last one."""
        return self.donor[users], np.where(history >= 0, self.donor_history[users], -1)


def shuffled(known: np.ndarray, length: np.ndarray, seed: int) -> np.ndarray:
    """A permutation (U,) that moves every user, within the known and within the others (U,) bool.

    length: of the users' histories (U,). Each is shown as a user with one as long, or the next
    shorter one; the user with the shortest as that with the longest. A group of one has nobody to
    trade with and stays.
    """
    donor = np.arange(len(known))
    rng = np.random.default_rng([seed, 0x5FF1E])
    for group in (np.flatnonzero(known), np.flatnonzero(~known)):
        drawn = rng.permutation(group)
        ring = drawn[np.argsort(length[drawn], kind="stable")]
        donor[ring] = np.roll(ring, 1)
    return donor
