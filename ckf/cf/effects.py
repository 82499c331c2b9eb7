"""A logistic regression with an effect of every user and item, and every user's taste in items.

    logit = bias + w dot_ui + b_u + (a_i + x_i . beta) + z_i . t_u

dot_ui: the product of a CF model's vectors. x_i: what is known of an item (release year,
popularity, its title as a language model reads it), z_i: the same as axes of taste. All have
Gaussian priors, so that few rows move little: a generalised linear mixed model, as GLMix (Zhang et
al. 2016). It is convex; L-BFGS finds the same answer at every call.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

# Deviations of the priors, in logits, chosen on the valid rows of CoLLM's ML-1M split; half or one
# and a half of a variance changes AUC there by .003 at most.
_USER, _ITEM, _BETA, _TASTE = 0.5, 1.0, 0.6, 0.2
_DOT, _BIAS = 1.0, 10.0
# At most so many steps; ended earlier by such a slope in units that make the curvature 1. A longer
# slope than _FLAT_ENOUGH at the end is worth a warning.
_STEPS, _FLAT, _FLAT_ENOUGH = 300, 1e-4, 0.1
_ROWS_AT_ONCE = 1_000_000  # a pass keeps (rows, axes) of so many


@dataclass(frozen=True)
class Observations:
    """Rows (L,): users and items int64, dots and labels (0 or 1) float64."""

    users: Tensor
    items: Tensor
    dots: Tensor
    labels: Tensor


@dataclass(frozen=True)
class ItemSide:
    """What is known of the items, float64: features x (I, f) and axes of taste z (I, k)."""

    features: Tensor
    axes: Tensor


@dataclass(frozen=True)
class Effects:
    """users (U,), items (I,) with their features, tastes (U, k); scalars (2,): w and bias."""

    users: Tensor
    items: Tensor
    tastes: Tensor
    scalars: Tensor

    def logits(self, rows: Observations, side: ItemSide) -> Tensor:
        """(L,) float64."""
        weight, bias = self.scalars
        found = bias + weight * rows.dots + self.users[rows.users] + self.items[rows.items]
        return found + (self.tastes[rows.users] * side.axes[rows.items]).sum(1)


def fit_effects(rows: Observations, side: ItemSide, n_users: int) -> Effects:
    """The likeliest effects given rows and priors.

    Users without rows have zeros, items without rows what their features say.
    """
    problem = _Problem(rows, side, n_users)
    mean = rows.labels.mean()
    curvature = problem.precision + problem.summed(
        (mean * (1 - mean)).expand(len(rows.labels)).split(_ROWS_AT_ONCE), power=2
    )
    scale = curvature.rsqrt()  # parameters in these units curve the loss alike
    z = torch.zeros_like(scale)

    def loss_and_slope() -> Tensor:
        flat = z * scale
        now = problem.effects(flat)
        logits = [now.logits(chunk, side) for chunk in problem.chunks]
        errors = [
            torch.sigmoid(found) - chunk.labels
            for found, chunk in zip(logits, problem.chunks, strict=True)
        ]
        pull = problem.precision * flat
        z.grad = (problem.summed(errors) + pull) * scale
        wrong = F.binary_cross_entropy_with_logits(torch.cat(logits), rows.labels, reduction="sum")
        return wrong + (pull * flat).sum() / 2

    optimizer = torch.optim.LBFGS(
        [z], max_iter=_STEPS, max_eval=2 * _STEPS, tolerance_grad=_FLAT, tolerance_change=0.0,
        history_size=20, line_search_fn="strong_wolfe",
    )  # fmt: skip
    optimizer.step(loss_and_slope)
    if z.grad.norm() > _FLAT_ENOUGH:
        warnings.warn(
            f"the blend's regression stopped after {_STEPS} steps with a slope of "
            f"{float(z.grad.norm()):.2g}, short of its optimum; its scores are less sharp",
            stacklevel=3,
        )
    return problem.effects(z * scale)


class _Problem:
    """The parameters as one flat tensor (scalars, users, items, beta, tastes) and their priors."""

    def __init__(self, rows: Observations, side: ItemSide, n_users: int) -> None:
        self.side = side
        self.shapes = {
            "scalars": (2,),
            "users": (n_users,),
            "items": (len(side.features),),
            "beta": (side.features.shape[1],),
            "tastes": (n_users, side.axes.shape[1]),
        }
        deviations = {"users": _USER, "items": _ITEM, "beta": _BETA, "tastes": _TASTE}
        self.precision = self._zeros()
        for name, part in self._parts(self.precision).items():
            part.fill_(deviations.get(name, _BIAS) ** -2)
        self.precision[0] = _DOT**-2
        split = zip(*(values.split(_ROWS_AT_ONCE) for values in vars(rows).values()), strict=True)
        self.chunks = [Observations(*values) for values in split]

    def effects(self, flat: Tensor) -> Effects:
        found = self._parts(flat)
        items = found["items"] + self.side.features @ found["beta"]
        return Effects(found["users"], items, found["tastes"], found["scalars"])

    def summed(self, weights: Sequence[Tensor], power: int = 1) -> Tensor:
        """Flat sums over rows of weight x (what a parameter is multiplied by)^power.

        weights: (rows,) of each chunk. Errors and power 1 give the slope of the loss.
        """
        total = self._zeros()
        into = self._parts(total)
        for chunk, weight in zip(self.chunks, weights, strict=True):
            into["scalars"] += torch.stack([weight @ chunk.dots**power, weight.sum()])
            into["users"].index_add_(0, chunk.users, weight)
            into["items"].index_add_(0, chunk.items, weight)
            axes = self.side.axes[chunk.items].pow_(power)
            into["tastes"].index_add_(0, chunk.users, axes.mul_(weight.unsqueeze(1)))
        into["beta"] += (self.side.features**power).T @ into["items"]
        return total

    def _zeros(self) -> Tensor:
        count = sum(torch.Size(shape).numel() for shape in self.shapes.values())
        return torch.zeros(count, dtype=torch.float64)

    def _parts(self, flat: Tensor) -> dict[str, Tensor]:
        sizes = [torch.Size(shape).numel() for shape in self.shapes.values()]
        split = zip(self.shapes.items(), flat.split(sizes), strict=True)
        return {name: part.view(shape) for (name, shape), part in split}
