"""Train a CF model on the train rows of prepared data: mini-batch Adam, early stopping on valid."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ckf import metrics
from ckf.cf.blend import fit_blend, principal_components
from ckf.cf.held_out import HeldOut, fit_folds, train_rows
from ckf.cf.models import LightGCNWithBiases, MatrixFactorisation
from ckf.cf.vectors import CFVectors, fit_fold_in, load_vectors

if TYPE_CHECKING:
    from ckf.data.prepared import PreparedData

_FOLDS = 5  # of held-out vectors without a blend
KINDS = ("mf", "lightgcn", "file")
Log = Callable[[str], None]


@dataclass
class CFConfig:
    """Settings of the CF model.

    dim: factors per vector, the bias not counted. weight_decay: on the squared norms of the vectors
    of each row. Where either is a list, every pair is tried and the best on valid kept.
    patience: epochs without a gain on valid before the best is taken. layers: propagation steps of
    LightGCN. users, items: files of vectors for kind "file". blend: folds, 2 or more, of the
    regression that joins the model's score with what else is known of user and item
    (ckf.cf.blend); 0 leaves the score alone. titles: principal components of the items' titles, as
    the language model reads them, that the blend knows too; 0 for none. history: let a row's last
    liked items count in the blend (ckf.cf.history). held_out: show train rows vectors of models
    that did not see them (ckf.cf.held_out), in as many folds as the blend has, or five; None: yes,
    for a model that can be fitted again. beside: models ("mf",
    "lightgcn") that an experiment fits as rows of their own, without blend. weight_decay and
    batch_size None: what suits the kind, 0.03 and 1024 for "mf", 0.005 and 4096 for "lightgcn".
    """

    kind: str = "mf"
    dim: int | list[int] = 16
    epochs: int = 60
    lr: float = 0.01
    weight_decay: float | list[float] | None = None
    batch_size: int | None = None
    patience: int = 5
    seed: int = 0
    layers: int = 2
    users: str | None = None
    items: str | None = None
    blend: int = 0
    titles: int = 0
    history: bool = False
    beside: list[str] = field(default_factory=list)
    held_out: bool | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"cf.kind is {self.kind!r}, expected one of {', '.join(KINDS)}")
        for name in self.beside:
            if name not in ("mf", "lightgcn"):
                raise ValueError(f"cf.beside names {name!r}, expected mf or lightgcn")
        if self.kind == "file" and not (self.users and self.items):
            raise ValueError(
                f"cf.kind is 'file' but cf.users is {self.users!r} and cf.items {self.items!r}: "
                "set both to .npy or .safetensors files"
            )
        if self.weight_decay is None:
            self.weight_decay = 0.005 if self.kind == "lightgcn" else 0.03
        if self.batch_size is None:
            self.batch_size = 4096 if self.kind == "lightgcn" else 1024
        for name in ("epochs", "batch_size", "patience", "layers"):
            _check(name, getattr(self, name), isinstance(getattr(self, name), int), 1)
        _check("blend", self.blend, isinstance(self.blend, int), 0)
        if self.blend == 1 or (self.blend and self.kind == "file"):
            raise ValueError(
                f"cf.blend is {self.blend} and cf.kind {self.kind!r}; expected 2 folds or more of "
                "a model that can be fitted again (mf, lightgcn), or 0"
            )
        _check("titles", self.titles, isinstance(self.titles, int), 0)
        if self.titles and not self.blend:
            raise ValueError(
                f"cf.titles is {self.titles}, which only a blend reads: set cf.blend, for example "
                "to 5, or cf.titles to 0"
            )
        if not isinstance(self.history, bool):
            raise ValueError(f"cf.history is {self.history!r}, expected true or false")
        if self.history and not self.blend:
            raise ValueError(
                "cf.history is true, which only a blend reads: set cf.blend, for example to 5, or "
                "cf.history to false"
            )
        if self.held_out is None:
            self.held_out = self.kind != "file"
        if not isinstance(self.held_out, bool):
            raise ValueError(f"cf.held_out is {self.held_out!r}, expected true or false")
        if self.held_out and self.kind == "file":
            raise ValueError(
                "cf.held_out is true and cf.kind 'file', whose vectors cannot be fitted again "
                "without a row: leave cf.held_out out"
            )
        _check("lr", self.lr, isinstance(self.lr, (int, float)), 1e-12)
        for name in ("dim", "weight_decay"):
            if getattr(self, name) in ([], ()):
                raise ValueError(f"cf.{name} is an empty list, expected at least one value")
        for dim, weight_decay in self.trials():
            _check("dim", dim, isinstance(dim, int), 1)
            _check("weight_decay", weight_decay, isinstance(weight_decay, (int, float)), 0.0)

    def trials(self) -> list[tuple[int, float]]:
        """The pairs of dim and weight_decay to try."""
        dims, decays = (
            value if isinstance(value, (list, tuple)) else [value]
            for value in (self.dim, self.weight_decay)
        )
        return [(dim, decay) for dim in dims for decay in decays]


@dataclass(frozen=True)
class _Rows:
    """users, items (L,) int64 and targets (L,) float32: labels 0/1 or ratings."""

    users: Tensor
    items: Tensor
    targets: Tensor


@dataclass(frozen=True)
class _Problem:
    """What a model is trained on and chosen on. ``on_labels``: BCE and AUC, else MSE and RMSE."""

    n_users: int
    n_items: int
    train: _Rows
    valid: _Rows
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


def fit_cf(
    config: CFConfig, data: PreparedData, log: Log = print, titles: Tensor | None = None
) -> CFVectors:
    """The CF vectors that the config asks for, with their fold-in. Same seed, same vectors.

    Only rows of the train split shape the vectors; valid rows choose the epoch and the width; test
    rows are never read.

    titles: (I, width) the items' titles as the language model reads them
    (ckf.titles.read_titles); needed where ``config.titles`` is not 0.
    """
    if config.kind == "mf":
        return fit_mf(config, data, log, titles)
    if config.kind == "lightgcn":
        return fit_lightgcn(config, data, log, titles)
    vectors = load_vectors(config.users, config.items, data.n_users, data.n_items)
    log(f"cf file: {vectors.dim} dimensions, {int(vectors.user_known.sum())} users with a vector")
    return _with_fold_in(vectors, data)


def fit_mf(
    config: CFConfig, data: PreparedData, log: Log = print, titles: Tensor | None = None
) -> CFVectors:
    """Matrix factorisation with biases: BCE on labels, MSE on ratings where there are no labels."""

    def build(problem: _Problem, dim: int, generator: torch.Generator):
        return MatrixFactorisation(problem.n_users, problem.n_items, dim, generator)

    return _fit("mf", config, data, build, log, titles)


def fit_lightgcn(
    config: CFConfig, data: PreparedData, log: Log = print, titles: Tensor | None = None
) -> CFVectors:
    """LightGCN over the liked train rows, with biases appended; needs torch_geometric."""

    def build(problem: _Problem, dim: int, generator: torch.Generator):
        edges = problem.edges()
        sizes = problem.n_users, problem.n_items
        return LightGCNWithBiases(*sizes, dim, config.layers, *edges, generator)

    return _fit("lightgcn", config, data, build, log, titles)


def _fit(
    kind: str,
    config: CFConfig,
    data: PreparedData,
    build: Callable,
    log: Log,
    titles: Tensor | None = None,
) -> CFVectors:
    if config.titles and (titles is None or titles.ndim != 2 or len(titles) != data.n_items):
        raise ValueError(
            f"cf.titles is {config.titles}, so fit_cf needs titles ({data.n_items}, width), as "
            "ckf.titles.read_titles gives them, or set cf.titles to 0"
        )
    problem = _problem(data, config.seed)
    trials = config.trials()
    if len(trials) > 1 and len(problem.valid.users) == 0:
        raise ValueError(
            f"cf.dim is {config.dim} and cf.weight_decay {config.weight_decay}, but there are no "
            "valid rows to choose on: give one value each, or set split.valid above 0"
        )
    best, chosen, tables = -float("inf"), trials[0], None
    for dim, weight_decay in trials:
        generator = torch.Generator().manual_seed(config.seed)
        model = build(problem, dim, generator)
        quality, found = _train(model, problem, config, weight_decay, generator)
        measure = "AUC" if problem.on_labels else "minus RMSE"
        log(f"cf {kind} dim {dim} weight_decay {weight_decay}: valid {measure} {quality:.4f}")
        if tables is None or quality > best:
            best, chosen, tables = quality, (dim, weight_decay), found
    if len(trials) > 1:
        log(f"cf {kind}: chose dim {chosen[0]} and weight_decay {chosen[1]} on valid")
    users, items = tables
    user_known, item_known = problem.known()
    vectors = CFVectors(
        users=users,
        items=items,
        user_known=user_known,
        item_known=item_known,
        kind=kind,
        bias=problem.bias,
    )
    vectors = _with_fold_in(vectors, data)
    if not (config.blend or config.held_out):
        return vectors
    plain = {"blend": 0, "titles": 0, "history": False, "held_out": False}
    alone = replace(config, dim=chosen[0], weight_decay=chosen[1], **plain)

    def refit(part: PreparedData) -> CFVectors:
        return _fit(kind, alone, part, build, lambda line: None)

    return _with_folds(vectors, config, data, refit, log, titles)


def _with_folds(
    vectors: CFVectors,
    config: CFConfig,
    data: PreparedData,
    refit: Callable[[PreparedData], CFVectors],
    log: Log,
    titles: Tensor | None,
) -> CFVectors:
    """The vectors with what needs fits that leave train rows out."""
    if config.blend:
        _check_labels(config, data)
    folds = fit_folds(data, refit, config.blend or _FOLDS, config.seed, log)
    if config.held_out and folds.models:
        vectors = replace(vectors, held_out=HeldOut.of_models(folds, data, vectors))
    if config.blend:
        components = principal_components(titles, config.titles) if config.titles else None
        vectors = fit_blend(vectors, data, refit, folds, config.seed, components, config.history)
        _log_blend(vectors, data, log)
    return vectors


def _check_labels(config: CFConfig, data: PreparedData) -> None:
    if len(np.unique(data.label[train_rows(data)])) < 2:
        raise ValueError(
            f"cf.blend is {config.blend}, but the train rows have not both labels, which its "
            "regression needs: set cf.blend to 0"
        )


def _log_blend(vectors: CFVectors, data: PreparedData, log: Log) -> None:
    valid = np.flatnonzero((data.split == 1) & (data.label >= 0))
    if len(valid):
        history = data.history[valid] if vectors.takes_history else None
        scores = vectors.score(data.user[valid], data.item[valid], history)
        quality = metrics.auc(scores.numpy(), data.label[valid])
        log(f"cf {vectors.kind} in the blend: valid AUC {quality:.4f}")


def _train(model, problem: _Problem, config: CFConfig, weight_decay: float, generator):
    """Quality on valid and the tables of the best epoch (the last epoch without valid rows)."""
    # A row without train rows keeps its random start, which says nothing: it counts as zero.
    known = [known[:, None] for known in problem.known()]
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, fused=True)
    best, best_tables, waited = -float("inf"), None, 0
    for _ in range(config.epochs):
        rows = (
            _with_negatives(problem, problem.train, generator)
            if problem.implicit
            else problem.train
        )
        order = torch.randperm(len(rows.users), generator=generator)
        for batch in order.split(config.batch_size):
            p, q, penalty = model.rows(rows.users[batch], rows.items[batch])
            scores = _scores(p, q, problem.bias)
            if problem.on_labels:
                loss = F.binary_cross_entropy_with_logits(scores, rows.targets[batch])
            else:
                loss = F.mse_loss(scores, rows.targets[batch])
            optimizer.zero_grad()
            (loss + weight_decay * penalty.mean()).backward()
            optimizer.step()
        with torch.no_grad():
            tables = tuple(table * mask for table, mask in zip(model.tables(), known, strict=True))
        quality = _quality(tables, problem)
        if best_tables is None or quality > best or not np.isfinite(quality):
            best, best_tables, waited = quality, tables, 0
        else:
            waited += 1
            if waited >= config.patience:
                break
    return best, best_tables


def _quality(tables: tuple[Tensor, Tensor], problem: _Problem) -> float:
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


def _problem(data: PreparedData, seed: int) -> _Problem:
    train = train_rows(data)
    on_labels = bool((data.label[train] >= 0).any())
    usable = data.label >= 0 if on_labels else np.isfinite(data.rating)
    values = data.label if on_labels else data.rating

    def rows(chosen: np.ndarray) -> _Rows:
        return _Rows(
            torch.as_tensor(data.user[chosen]).long(),
            torch.as_tensor(data.item[chosen]).long(),
            torch.as_tensor(values[chosen]).float(),
        )

    train, valid = rows(train), rows(np.flatnonzero((data.split == 1) & usable))
    if len(train.users) == 0:
        raise ValueError(
            "the train split has 0 rows with a label or a rating, expected some: check the columns "
            "and the split of the data config"
        )
    implicit = on_labels and bool((train.targets == 1).all())
    mean = float(train.targets.double().mean())
    bias = (
        (0.0 if implicit else float(np.log(mean / (1 - mean)))) if on_labels and mean > 0 else mean
    )
    problem = _Problem(data.n_users, data.n_items, train, valid, on_labels, implicit, bias)
    if implicit and len(valid.users):
        generator = torch.Generator().manual_seed(seed + 1)
        problem = replace(problem, valid=_with_negatives(problem, valid, generator))
    return problem


def _with_negatives(problem: _Problem, rows: _Rows, generator: torch.Generator) -> _Rows:
    """The rows and, for each, the same user with a random item without a train row by that user."""
    pool = torch.unique(problem.train.items)
    items = pool[torch.randint(len(pool), (len(rows.users),), generator=generator)]
    seen = torch.unique(problem.train.users * problem.n_items + problem.train.items)
    new = ~torch.isin(rows.users * problem.n_items + items, seen)
    zeros = torch.zeros(int(new.sum()))
    return _Rows(
        torch.cat([rows.users, rows.users[new]]),
        torch.cat([rows.items, items[new]]),
        torch.cat([rows.targets, zeros]),
    )


def _with_fold_in(vectors: CFVectors, data: PreparedData) -> CFVectors:
    """Rows of prepared data are sorted by user and time, as `fit_fold_in` expects."""
    liked = np.flatnonzero((data.split == 0) & (data.label == 1))
    return fit_fold_in(vectors, data.user[liked], data.item[liked])


def _check(name: str, value, right_type: bool, least: float) -> None:
    if isinstance(value, bool) or not right_type or value < least:
        kind = "a whole number" if isinstance(least, int) else "a number"
        raise ValueError(f"cf.{name} is {value!r}, expected {kind} of at least {least}")
