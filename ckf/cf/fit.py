"""Fit a CF model to the train rows of prepared data, and what stands beside its vectors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ckf import metrics
from ckf.cf.blend import fit_blend, principal_components
from ckf.cf.files import centred, load_folds, load_vectors
from ckf.cf.fold_in import fit_fold_in
from ckf.cf.folds import Folds, fit_folds, train_rows
from ckf.cf.held_out import HeldOut
from ckf.cf.models import LightGCNWithBiases, MatrixFactorisation
from ckf.cf.tables import MAPPED_BYTES
from ckf.cf.training import Problem, Training, part_of, problem_of, rows_of
from ckf.cf.vectors import CFVectors

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
    LightGCN. users, items: files of vectors for kind "file"; fold_users, fold_items: a file each
    per fold, of models trained without the rows of that fold (ckf.cf.fold_numbers), which held_out
    and blend need of such vectors. blend: folds, 2 or more, of the
    regression that joins the model's score with what else is known of user and item
    (ckf.cf.blend); 0 leaves the score alone. titles: principal components of the items' titles, as
    the language model reads them, that the blend knows too; 0 for none. history: let a row's last
    liked items count in the blend (ckf.cf.history). held_out: show train rows vectors of models
    that did not see them (ckf.cf.held_out), in as many folds as the blend has, or five; None: yes,
    but for files without fold_users. beside: models ("mf",
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
    fold_users: list[str] = field(default_factory=list)
    fold_items: list[str] = field(default_factory=list)
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
        if self.blend == 1:
            raise ValueError("cf.blend is 1, expected 2 folds or more, or 0")
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
            self.held_out = self.kind != "file" or bool(self.fold_users)
        if not isinstance(self.held_out, bool):
            raise ValueError(f"cf.held_out is {self.held_out!r}, expected true or false")
        if self.kind == "file":
            self._check_fold_files()
        _check("lr", self.lr, isinstance(self.lr, (int, float)), 1e-12)
        for name in ("dim", "weight_decay"):
            if getattr(self, name) in ([], ()):
                raise ValueError(f"cf.{name} is an empty list, expected at least one value")
        for dim, weight_decay in self.trials():
            _check("dim", dim, isinstance(dim, int), 1)
            _check("weight_decay", weight_decay, isinstance(weight_decay, (int, float)), 0.0)

    def _check_fold_files(self) -> None:
        count = len(self.fold_users)
        if count != len(self.fold_items) or count == 1:
            raise ValueError(
                f"cf.fold_users names {count} files and cf.fold_items {len(self.fold_items)}: give "
                "two each or more, one per fold, or none"
            )
        for name in ("held_out", "blend"):
            if getattr(self, name) and not count:
                raise ValueError(
                    f"cf.{name} is {getattr(self, name)} and cf.kind 'file', whose vectors ckf "
                    "cannot fit again without a row: give cf.fold_users and cf.fold_items, or "
                    f"leave cf.{name} out"
                )
        if self.blend and self.blend != count:
            raise ValueError(
                f"cf.blend is {self.blend}, but cf.fold_users names {count} files: set cf.blend to "
                f"{count}"
            )
        if self.history:
            raise ValueError(
                "cf.history is true and cf.kind 'file': its weights for new users are fitted on "
                "models without a user, so set cf.history to false"
            )

    def trials(self) -> list[tuple[int, float]]:
        """The pairs of dim and weight_decay to try."""
        dims, decays = (
            value if isinstance(value, (list, tuple)) else [value]
            for value in (self.dim, self.weight_decay)
        )
        return [(dim, decay) for dim in dims for decay in decays]


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
    return _read_files(config, data, log, titles)


def _read_files(config: CFConfig, data: PreparedData, log: Log, titles: Tensor | None) -> CFVectors:
    above = MAPPED_BYTES
    if config.fold_users:  # in memory, as the folds' tables are
        _check_before_folds(config, problem_of(data, config.seed), titles)
        above = float("inf")
    vectors = load_vectors(config.users, config.items, data.n_users, data.n_items, above)
    log(f"cf file: {vectors.dim} dimensions, {int(vectors.user_known.sum())} users with a vector")
    if not config.fold_users:
        return _with_fold_in(vectors, data)
    folds = load_folds(config.fold_users, config.fold_items, data, vectors.dim)
    if config.blend:
        vectors = centred(vectors)
        folds = replace(folds, models=[centred(model) for model in folds.models])
    vectors = _with_fold_in(vectors, data)
    return _with_folds(vectors, config, data, folds, None, log, titles)


def fit_mf(
    config: CFConfig, data: PreparedData, log: Log = print, titles: Tensor | None = None
) -> CFVectors:
    """Matrix factorisation with biases: BCE on labels, MSE on ratings where there are no labels."""

    def build(problem: Problem, dim: int, generator: torch.Generator):
        return MatrixFactorisation(problem.n_users, problem.n_items, dim, generator)

    return _fit("mf", config, data, build, log, titles)


def fit_lightgcn(
    config: CFConfig, data: PreparedData, log: Log = print, titles: Tensor | None = None
) -> CFVectors:
    """LightGCN over the liked train rows, with biases appended; needs torch_geometric."""

    def build(problem: Problem, dim: int, generator: torch.Generator):
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
    problem = problem_of(data, config.seed)
    _check_before_folds(config, problem, titles)
    trials = config.trials()
    if len(trials) > 1 and len(problem.valid.users) == 0:
        raise ValueError(
            f"cf.dim is {config.dim} and cf.weight_decay {config.weight_decay}, but there are no "
            "valid rows to choose on: give one value each, or set split.valid above 0"
        )
    best, chosen, tables = -float("inf"), None, None
    for dim, weight_decay in trials:
        training = Training(problem, build, config, dim, weight_decay)
        quality, epochs, found = training.best()
        measure = "AUC" if problem.on_labels else "minus RMSE"
        log(f"cf {kind} dim {dim} weight_decay {weight_decay}: valid {measure} {quality:.4f}")
        if tables is None or quality > best:
            best, chosen, tables = quality, (dim, weight_decay, epochs), found
    dim, weight_decay, epochs = chosen
    if len(trials) > 1:
        log(f"cf {kind}: chose dim {dim} and weight_decay {weight_decay} on valid")
    vectors = _vectors(kind, problem, tables, data)
    if not (config.blend or config.held_out):
        return vectors

    def refit(part: PreparedData) -> CFVectors:
        """As long as the whole fit: stopped by itself, each would have a length of its own."""
        own = part_of(problem, rows_of(part, train_rows(part), problem.on_labels))
        training = Training(own, build, config, dim, weight_decay)
        return _vectors(kind, own, training.after(epochs), part)

    folds = fit_folds(data, refit, config.blend or _FOLDS, config.seed, log)
    return _with_folds(vectors, config, data, folds, refit, log, titles)


def _vectors(
    kind: str, problem: Problem, tables: tuple[Tensor, Tensor], data: PreparedData
) -> CFVectors:
    (users, items), (user_known, item_known) = tables, problem.known()
    vectors = CFVectors(
        users=users,
        items=items,
        user_known=user_known,
        item_known=item_known,
        kind=kind,
        bias=problem.bias,
    )
    return _with_fold_in(vectors, data)


def _with_folds(
    vectors: CFVectors,
    config: CFConfig,
    data: PreparedData,
    folds: Folds,
    refit: Callable[[PreparedData], CFVectors] | None,
    log: Log,
    titles: Tensor | None,
) -> CFVectors:
    """The vectors with what needs models that did not see some train rows."""
    if config.held_out and folds.models:
        vectors = replace(vectors, held_out=HeldOut.of_models(folds, data, vectors))
    if config.blend:
        components = principal_components(titles, config.titles) if config.titles else None
        vectors = fit_blend(vectors, data, refit, folds, config.seed, components, config.history)
        _log_blend(vectors, data, log)
    return vectors


def _check_before_folds(config: CFConfig, problem: Problem, titles: Tensor | None) -> None:
    if config.titles and (titles is None or titles.ndim != 2 or len(titles) != problem.n_items):
        raise ValueError(
            f"cf.titles is {config.titles}, so fit_cf needs titles ({problem.n_items}, width), as "
            "ckf.titles.read_titles gives them, or set cf.titles to 0"
        )
    if config.blend and (not problem.on_labels or len(problem.train.targets.unique()) < 2):
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


def _with_fold_in(vectors: CFVectors, data: PreparedData) -> CFVectors:
    """Rows of prepared data are sorted by user and time, as `fit_fold_in` expects."""
    liked = np.flatnonzero((data.split == 0) & (data.label == 1))
    return fit_fold_in(vectors, data.user[liked], data.item[liked])


def _check(name: str, value, right_type: bool, least: float) -> None:
    if isinstance(value, bool) or not right_type or value < least:
        kind = "a whole number" if isinstance(least, int) else "a number"
        raise ValueError(f"cf.{name} is {value!r}, expected {kind} of at least {least}")
