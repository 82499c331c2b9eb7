"""Vectors of one's own, from files: of any model whose score is a dot product."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ckf.cf.folds import Folds, files_of_folds
from ckf.cf.tables import MAPPED_BYTES, MappedTable, chunks_of
from ckf.cf.vectors import CFVectors

if TYPE_CHECKING:
    from ckf.data.prepared import PreparedData


def load_vectors(
    users: str | Path,
    items: str | Path,
    n_users: int | None = None,
    n_items: int | None = None,
    mapped_above: int = MAPPED_BYTES,
) -> CFVectors:
    """The user's own vectors, one .npy or .safetensors file each for users and items.

    Row r belongs to user or item index r of the prepared data. A safetensors file holds one tensor,
    or one named "users" / "items" (both may lie in one file). An all-zero row means "no vector".
    A users file of more than ``mapped_above`` bytes stays on disk; it is read once here, in chunks.
    Raises ValueError for wrong row counts (where n_users, n_items are given), shapes or values.
    """
    user_table = _read_table(users, "users", mapped_above)
    item_table = _read_table(items, "items")
    for table, path, name, expected in (
        (user_table, users, "users", n_users),
        (item_table, items, "items", n_items),
    ):
        if expected is not None and len(table) != expected:
            raise ValueError(
                f"{path}: {len(table)} rows, expected {expected} (one per {name[:-1]} of the "
                f"prepared data): write the vectors in the order of {name!r} in the prepared "
                "folder's names.json, a row of zeros for each one without a vector"
            )
    user_known, item_known = _known_rows(user_table, users), _known_rows(item_table, items)
    if user_table.shape[1] != item_table.shape[1]:
        raise ValueError(
            f"{users} has vectors of width {user_table.shape[1]}, {items} of width "
            f"{item_table.shape[1]}: both must have the same width, so pad the narrower with zeros"
        )
    return CFVectors(
        users=user_table,
        items=item_table,
        user_known=user_known,
        item_known=item_known,
        kind="file",
        score_form="dot",
    )


def load_folds(
    users: Sequence[str | Path], items: Sequence[str | Path], data: PreparedData, dim: int
) -> Folds:
    """Vectors of models that were each trained without a fold of the train rows, in order.

    Args:
        users, items: a file each per fold of ``ckf.cf.fold_numbers(data, len(users))``, as
            `load_vectors` reads them.
        dim: width of the vectors of the model of all train rows.

    Raises:
        ValueError: files of another width, or that `load_vectors` refuses.
    """
    models = []
    for own, its in zip(users, items, strict=True):
        model = load_vectors(own, its, data.n_users, data.n_items, float("inf"))
        if model.dim != dim:
            raise ValueError(
                f"{own} has vectors of width {model.dim}, those of all train rows {dim}: a fold's "
                "model must be the same model, trained on fewer rows"
            )
        models.append(model)
    return files_of_folds(data, models)


def centred(vectors: CFVectors) -> CFVectors:
    """Users and items less their means over the known rows, both in memory.

    p . q is then what a pair has beyond its user and its item, which a blend fits by itself: a
    train row's user has less than the user's mean without the row, if the row is liked, and a
    regression on such products would learn that as a sign of likes.
    """
    tables = {}
    for name in ("users", "items"):
        table, known = getattr(vectors, name), getattr(vectors, f"{name[:-1]}_known")
        mean = table[known].double().mean(0).float() if known.any() else 0.0
        tables[name] = (table - mean) * known[:, None]
    return replace(vectors, **tables)


def _read_table(
    path: str | Path, name: str, mapped_above: float = float("inf")
) -> Tensor | MappedTable:
    path = Path(path)
    if not path.is_file():
        raise ValueError(
            f"no file of CF vectors at {path}: set cf.{name} to a .npy or .safetensors file"
        )
    if path.stat().st_size > mapped_above or path.suffix not in (".npy", ".safetensors"):
        return MappedTable.open(path, name)
    try:
        if path.suffix == ".npy":
            table = torch.from_numpy(np.load(path, allow_pickle=False))
        else:
            tensors = load_file(str(path))
    except (ValueError, TypeError, OSError, EOFError, SafetensorError) as error:
        raise ValueError(
            f"{path} cannot be read as {path.suffix} ({error}): write it with "
            "np.save(path, table.astype(np.float32)) or safetensors"
        ) from error
    if path.suffix == ".safetensors":
        if len(tensors) != 1 and name not in tensors:
            raise ValueError(
                f"{path}: tensors {sorted(tensors)}, expected one tensor or one named {name!r}: "
                "rename the tensor"
            )
        table = tensors[name] if name in tensors else next(iter(tensors.values()))
    if table.ndim != 2 or 0 in table.shape:
        raise ValueError(f"{path}: shape {tuple(table.shape)}, expected (rows, width): reshape it")
    return table.float()


def _known_rows(table: Tensor | MappedTable, path: str | Path) -> Tensor:
    """Rows that are not zero, (rows,) bool; ValueError for values that are not finite."""
    # One tensor from the start: small ones kept between the chunks would break up the memory.
    known, start = torch.empty(len(table), dtype=torch.bool), 0
    for rows in chunks_of(table):
        if not rows.isfinite().all():
            row = start + int((~rows.isfinite().all(1)).nonzero()[0])
            raise ValueError(
                f"{path}: row {row} has NaN or infinite values, expected finite ones: fix it"
            )
        known[start : start + len(rows)] = (rows != 0).any(1)
        start += len(rows)
    return known
