"""What CF models are trained on, and the training: mini-batch Adam, best epoch by valid rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ckf import metrics
from ckf.cf.folds import train_rows

if TYPE_CHECKING:
    from ckf.cf.fit import CFConfig
    from ckf.data.prepared import PreparedData


@dataclass(frozen=True)
class Rows:
    """users, items (L,) int64 and targets (L,) float32: labels 0/1 or ratings."""

    users: Tensor
    items: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Problem:
    """What a model is trained on and chosen on. ``on_labels``: BCE and AUC, else MSE and RMSE."""

    n_users: int
    n_items: int
    train: Rows
    valid: Rows
    on_labels: bool
    implicit: bool  # every label is 1: zeros are drawn from the items without a train row
    bias: float

    def known(self) -> tuple[Tensor, Tensor]:
        """user_known (U,), item_known (I,): has a train row."""
        users = torch.bincount(self.train.users, minlength=self.n_users) > 0
        return users, torch.bincount(self.train.items, minlength=self.n_items) > 0

    def edges(self) -> tuple[Tensor, Tensor]:
        """Users and items of the train rows that say "liked" (above the mean, where only rated)."""
        liked = self.train.targets > (0.5 if self.on_labels else self.bias)
        return self.train.users[liked], self.train.items[liked]


class Training:
    """A model on its way, from the start that the seed gives."""

    def __init__(
        self, problem: Problem, build: Callable, config: CFConfig, dim: int, weight_decay: float
    ) -> None:
        self.problem, self.config, self.weight_decay = problem, config, weight_decay
        self.generator = torch.Generator().manual_seed(config.seed)
        self.model = build(problem, dim, self.generator)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=config.lr, fused=True)

    def best(self) -> tuple[float, int, tuple[Tensor, Tensor]]:
        """Quality on valid, number and tables of the best epoch; of the last without valid rows."""
        best, epochs, best_tables, waited = -float("inf"), 0, None, 0
        for epoch in range(1, self.config.epochs + 1):
            self._epoch()
            tables = self._tables()
            quality = _quality(tables, self.problem)
            if best_tables is None or quality > best or not np.isfinite(quality):
                best, epochs, best_tables, waited = quality, epoch, tables, 0
            else:
                waited += 1
                if waited >= self.config.patience:
                    break
        return best, epochs, best_tables

    def after(self, epochs: int) -> tuple[Tensor, Tensor]:
        """The tables after so many epochs."""
        for _ in range(epochs):
            self._epoch()
        return self._tables()

    def _epoch(self) -> None:
        problem = self.problem
        rows = (
            _with_negatives(problem, problem.train, self.generator)
            if problem.implicit
            else problem.train
        )
        order = torch.randperm(len(rows.users), generator=self.generator)
        for batch in order.split(self.config.batch_size):
            p, q, penalty = self.model.rows(rows.users[batch], rows.items[batch])
            scores = _scores(p, q, problem.bias)
            if problem.on_labels:
                loss = F.binary_cross_entropy_with_logits(scores, rows.targets[batch])
            else:
                loss = F.mse_loss(scores, rows.targets[batch])
            self.optimizer.zero_grad()
            (loss + self.weight_decay * penalty.mean()).backward()
            self.optimizer.step()

    @torch.no_grad()
    def _tables(self) -> tuple[Tensor, Tensor]:
        """A row without train rows keeps its random start, which says nothing: it counts as 0."""
        known = self.problem.known()
        return tuple(
            table * there[:, None] for table, there in zip(self.model.tables(), known, strict=True)
        )


def _quality(tables: tuple[Tensor, Tensor], problem: Problem) -> float:
    """AUC or minus RMSE on valid; NaN without valid rows or with one class."""
    users, items = tables
    rows = problem.valid
    if len(rows.users) == 0:
        return float("nan")
    scores = _scores(users[rows.users], items[rows.items], problem.bias)
    if problem.on_labels:
        return metrics.auc(scores.numpy(), rows.targets.numpy())
    return -metrics.rmse(scores.numpy(), rows.targets.numpy())


def _scores(p: Tensor, q: Tensor, bias: float) -> Tensor:
    return (p[:, :-1] * q[:, :-1]).sum(-1) + p[:, -1] + q[:, -1] + bias


def rows_of(data: PreparedData, chosen: np.ndarray, on_labels: bool) -> Rows:
    values = data.label if on_labels else data.rating
    return Rows(
        torch.as_tensor(data.user[chosen]).long(),
        torch.as_tensor(data.item[chosen]).long(),
        torch.as_tensor(values[chosen]).float(),
    )


def problem_of(data: PreparedData, seed: int) -> Problem:
    shaping = train_rows(data)
    on_labels = bool((data.label[shaping] >= 0).any())
    usable = data.label >= 0 if on_labels else np.isfinite(data.rating)
    train = rows_of(data, shaping, on_labels)
    valid = rows_of(data, np.flatnonzero((data.split == 1) & usable), on_labels)
    if len(train.users) == 0:
        raise ValueError(
            "the train split has 0 rows with a label or a rating, expected some: check the columns "
            "and the split of the data config"
        )
    implicit = on_labels and bool((train.targets == 1).all())
    bias = _bias(train.targets, on_labels, 0.0)
    problem = Problem(data.n_users, data.n_items, train, valid, on_labels, implicit, bias)
    if implicit and len(valid.users):
        generator = torch.Generator().manual_seed(seed + 1)
        problem = replace(problem, valid=_with_negatives(problem, valid, generator))
    return problem


def part_of(problem: Problem, train: Rows) -> Problem:
    """The same problem on some of its train rows; also where only likes are left of both labels."""
    return replace(problem, train=train, bias=_bias(train.targets, problem.on_labels, problem.bias))


def _bias(targets: Tensor, on_labels: bool, of_one_label: float) -> float:
    """The mean rating, or the log-odds of the mean label."""
    mean = float(targets.double().mean())
    if not on_labels:
        return mean
    return float(np.log(mean / (1 - mean))) if 0 < mean < 1 else of_one_label


def _with_negatives(problem: Problem, rows: Rows, generator: torch.Generator) -> Rows:
    """The rows and, for each, the same user with a random item without a train row by that user."""
    pool = torch.unique(problem.train.items)
    items = pool[torch.randint(len(pool), (len(rows.users),), generator=generator)]
    seen = torch.unique(problem.train.users * problem.n_items + problem.train.items)
    new = ~torch.isin(rows.users * problem.n_items + items, seen)
    zeros = torch.zeros(int(new.sum()))
    return Rows(
        torch.cat([rows.users, rows.users[new]]),
        torch.cat([rows.items, items[new]]),
        torch.cat([rows.targets, zeros]),
    )
