"""The fold-in: vectors of users who have no train rows, from their histories."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ckf.cf.tables import as_index

if TYPE_CHECKING:
    from ckf.cf.vectors import CFVectors

# Lengths of the histories on which the fold-in is fitted, so that short ones are met there too.
_WINDOWS = (1, 3, 10)
_RIDGE_GRID = (1e-2, 1e-1, 1.0, 1e1, 1e2)
_MOST_USERS = 500_000  # at most so many shape the fold-in, evenly spread


def fold_in_users(vectors: CFVectors, history: np.ndarray | Tensor) -> Tensor:
    """Vectors (N, d) of users who have no train rows, from their histories (N, H), padded with -1.

    Each item of a history stands for a point in the space of the users (a ridge regression, see
    `fit_fold_in`), and the points are averaged. Items without a vector count as absent; without any
    item the result is zero.
    """
    if vectors.fold_in is None:
        raise ValueError(
            "these CF vectors have no fold-in: call fit_fold_in(vectors, users, items) with the "
            "liked train rows first (fit_cf does)"
        )
    history = as_index(history)
    known = (history >= 0) & vectors.item_known[history.clamp(min=0)]  # (N, H)
    points = vectors.fold_in[history.clamp(min=0)] * known.unsqueeze(-1)  # (N, H, d)
    count = known.sum(-1, keepdim=True)  # (N, 1)
    folded = points.sum(-2) / count.clamp(min=1) + vectors.fold_in_offset
    return torch.where(count > 0, folded, 0.0)


def fit_fold_in(vectors: CFVectors, users: np.ndarray, items: np.ndarray) -> CFVectors:
    """Fit the fold-in on users with train rows and return the vectors with it.

    users, items (L,): the LIKED TRAIN rows, each user's in order of time. A ridge regression maps
    the mean vector of a user's last 1, 3 and 10 liked items to the user's vector; its penalty is
    chosen on a fixed fifth of the users. Without liked rows every fold-in is zero.
    """
    users, items = as_index(users), as_index(items)
    keep = vectors.user_known[users] & vectors.item_known[items]
    users, items = users[keep], items[keep]
    if len(users) == 0:
        return replace(
            vectors,
            fold_in=torch.zeros_like(vectors.items),
            fold_in_offset=torch.zeros(vectors.dim),
        )
    present, users = torch.unique(users, return_inverse=True)
    if len(present) > _MOST_USERS:
        step = -(-len(present) // _MOST_USERS)
        keep = users % step == 0
        present, users, items = present[::step], users[keep] // step, items[keep]
    owner, means = _window_means(users, vectors.items[items].double(), len(present))
    owner = present[owner]
    targets = vectors.users[owner].double()
    held_out = owner % 5 == 0
    best, lowest = _RIDGE_GRID[-1], float("inf")
    if held_out.any() and not held_out.all():
        for penalty in _RIDGE_GRID:
            weight, offset = _ridge(means[~held_out], targets[~held_out], penalty)
            error = (means[held_out] @ weight + offset - targets[held_out]).square().mean().item()
            if error < lowest:
                best, lowest = penalty, error
    weight, offset = _ridge(means, targets, best)
    fold_in = (vectors.items.double() @ weight).float()
    return replace(vectors, fold_in=fold_in, fold_in_offset=offset.float())


def _window_means(users: Tensor, points: Tensor, n_users: int) -> tuple[Tensor, Tensor]:
    """Owners (K,) and means (K, d) of each user's last 1, 3 and 10 points."""
    order = torch.argsort(users, stable=True)
    users, points = users[order], points[order]
    count = torch.bincount(users, minlength=n_users)
    age = count.cumsum(0)[users] - 1 - torch.arange(len(users))  # 0: the user's latest
    owners, means = [], []
    for shorter, window in zip((0, *_WINDOWS), _WINDOWS, strict=False):
        recent = age < window
        total = points.new_zeros(n_users, points.shape[1]).index_add(
            0, users[recent], points[recent]
        )
        size = torch.bincount(users[recent], minlength=n_users)
        chosen = size > shorter  # else the window is the same as the shorter one
        owners.append(chosen.nonzero().squeeze(1))
        means.append(total[chosen] / size[chosen].unsqueeze(1))
    return torch.cat(owners), torch.cat(means)


def _ridge(x: Tensor, y: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Weight (d, d) and offset (d,); the penalty is relative to the mean variance of x."""
    x_mean, y_mean = x.mean(0), y.mean(0)
    x, y = x - x_mean, y - y_mean
    gram = x.T @ x
    scale = (gram.diagonal().mean() / max(len(x), 1)).clamp(min=1e-12)
    damped = gram + penalty * scale * torch.eye(x.shape[1], dtype=x.dtype)
    weight = torch.linalg.solve(damped, x.T @ y)
    return weight, y_mean - x_mean @ weight
