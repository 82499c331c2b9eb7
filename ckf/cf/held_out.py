"""Vectors of train rows from models that did not see the row.

A user's vector was fitted on the answers of the user's train rows, and an item's on those of the
item. Shown in training, they tell the answer: the language model learns to trust them more than new
rows deserve. So each train row is shown the vectors of a model fitted without the row's fold, as a
new row is shown those of a model that does not know it. Rows of one pair of user and item share a
fold.

Factors may be turned at will, all of them together, and each fit has its own turn: the models'
factors are turned onto those of the whole fit (Schoenemann 1966), biases stay.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ckf.cf.blend import Blend
from ckf.cf.folds import Folds
from ckf.cf.tables import MappedTable, Scale, chunks_of, scaled_rows

if TYPE_CHECKING:
    from ckf.cf.vectors import CFVectors
    from ckf.data.prepared import PreparedData

_BLEND = "blend."  # begins the names of the blends' tensors in a file


@dataclass(frozen=True)
class HeldOut:
    """The vectors of F models, one after the other, and which of them a train pair is shown.

    users (F * U, d) and items (F * I, d), in the space of the whole fit; user_known (F * U,) and
    item_known (F * I,) bool: has a train row outside the fold. pairs (L,): user * I + item of the
    train rows, ascending, each once; folds (L,): their model. blends: of F, the model's score
    joined with what else is known without the fold, or none.
    """

    users: Tensor | MappedTable
    items: Tensor
    user_known: Tensor
    item_known: Tensor
    pairs: Tensor
    folds: Tensor
    blends: tuple[Blend, ...] = ()

    @classmethod
    def of_models(cls, folds: Folds, data: PreparedData, whole: CFVectors) -> HeldOut:
        """whole: the vectors of the fit on all train rows."""
        count = len(folds.models)
        users, items = (
            torch.empty(count * len(table), whole.dim) for table in (whole.users, whole.items)
        )
        for model, own, its in zip(
            folds.models, users.chunk(count), items.chunk(count), strict=True
        ):
            turn = _turn(model, whole)
            for table, into in ((model.users, own), (model.items, its)):
                into.copy_(table)
                torch.mm(table[:, whole.factors], turn, out=into[:, whole.factors])
        keys = data.user[folds.rows].astype(np.int64) * data.n_items + data.item[folds.rows]
        pairs, first = np.unique(keys, return_index=True)
        return cls(
            users=users,
            items=items,
            user_known=torch.cat([model.user_known for model in folds.models]),
            item_known=torch.cat([model.item_known for model in folds.models]),
            pairs=torch.from_numpy(pairs),
            folds=torch.from_numpy(folds.fold[first].astype(np.int64)),
        )

    @classmethod
    def of(
        cls, tensors: dict[str, Tensor | MappedTable], n_users: int, n_items: int, dim: int
    ) -> HeldOut | None:
        """From a file's tensors, None without any; ValueError where they do not fit."""
        if not tensors:
            return None
        blends: dict[str, dict[str, Tensor]] = {}
        for name in [name for name in tensors if name.startswith(_BLEND)]:
            _, number, part = name.split(".", 2)
            blends.setdefault(number, {})[part] = tensors.pop(name)
        count, pairs = len(tensors.get("items", ())) // n_items, len(tensors.get("pairs", ()))
        expected = {"users": (count * n_users, dim), "items": (count * n_items, dim)}
        expected |= {"user_known": expected["users"][:1], "item_known": expected["items"][:1]}
        expected |= {"pairs": (pairs,), "folds": (pairs,)}
        found = {name: tuple(value.shape) for name, value in tensors.items()}
        numbers = [t.dtype for name, t in tensors.items() if name in ("pairs", "folds")]
        if found != expected or numbers != [torch.int64] * 2:
            raise ValueError(
                f"held-out vectors of shapes {found}, expected {expected}: fit the vectors anew"
            )
        folds = tensors["folds"]
        if pairs and not 0 <= int(folds.min()) <= int(folds.max()) < count:
            raise ValueError(
                f"held-out vectors of {count} folds, but pairs of {int(folds.min())} to "
                f"{int(folds.max())}: fit the vectors anew"
            )
        if blends and sorted(blends) != sorted(map(str, range(count))):
            raise ValueError(
                f"held-out vectors of {count} folds with blends of {sorted(blends)}: fit the "
                "vectors anew"
            )
        made = (Blend.of(blends[str(number)], n_users, n_items) for number in range(len(blends)))
        return cls(**tensors, blends=tuple(made))

    def tensors(self) -> dict[str, Tensor | MappedTable]:
        """What `of` reads."""
        found = {name: value for name, value in vars(self).items() if name != "blends"}
        for number, blend in enumerate(self.blends):
            found |= {f"{_BLEND}{number}.{name}": t for name, t in blend.tensors().items()}
        return found

    def folds_of(self, users: Tensor, items: Tensor, n_items: int) -> Tensor:
        """The model (n,) that pairs of users (n,), -1 for strangers, and items (n,) are shown; -1
        where a pair has no train row and is shown the vectors of the whole fit."""
        wanted = users * n_items + items
        if len(self.pairs) == 0:
            return torch.full_like(wanted, -1)
        place = torch.searchsorted(self.pairs, wanted.contiguous()).clamp(max=len(self.pairs) - 1)
        there = (users >= 0) & (self.pairs[place] == wanted)
        return torch.where(there, self.folds[place], -1)

    def scaled(self, users: Scale, items: Scale) -> HeldOut:
        """Standardised as the vectors of the whole fit are."""
        return replace(
            self,
            users=scaled_rows(self.users, replace(users, known=self.user_known)),
            items=scaled_rows(self.items, replace(items, known=self.item_known)),
        )


def _turn(model: CFVectors, whole: CFVectors) -> Tensor:
    """(f, f): what turns a model's f factors onto those of the whole fit."""
    factors = whole.factors
    product = 0.0
    for name in ("users", "items"):
        tables = (chunks_of(getattr(vectors, name)) for vectors in (model, whole))
        for own, other in zip(*tables, strict=True):  # unknown rows are zero
            product = product + own[:, factors].double().T @ other[:, factors].double()
    left, _, right = torch.linalg.svd(product)
    return (left @ right).float()
