"""User and item vectors of a collaborative-filtering (CF) model: keep, score, standardise.

The biases of the model are the last vector dimension: users = [p_u, b_u], items = [q_i, b_i], and
the model's own score is ``bias + p_u . q_i + b_u + b_i``. Whoever reads the vectors alone then
still sees how well liked an item is, which a dot product of plain factors hides.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from numpy.typing import ArrayLike
from safetensors import safe_open
from torch import Tensor

from ckf.cf.blend import Blend
from ckf.cf.fold_in import fold_in_users
from ckf.cf.held_out import HeldOut
from ckf.cf.tables import (
    MAPPED_BYTES,
    MappedTable,
    Scale,
    as_index,
    moments,
    save_tables,
    scaled_rows,
)

SCORE_FORMS = ("biased_dot", "dot", "none")
_FORMAT = "ckf-cf-1"
_BLEND, _HELD_OUT = "blend.", "held_out."  # begin the names of their tensors in a file


@dataclass(frozen=True)
class CFVectors:
    """Vectors of all users and items, float32, in the index order of the prepared data.

    users (U, d), in memory or, above 1 GiB, mapped from their file; items (I, d); user_known (U,),
    item_known (I,) bool: has a vector learned from train rows (kind "file": has a vector). Unknown
    rows are zero. ``kind`` names the model ("mf",
    "lightgcn", "file"). ``score_form`` says how `score` works: "biased_dot" (last dimension = bias,
    plus the global ``bias``), "dot", or "none" (after `standardised`). fold_in (I, d) and
    fold_in_offset (d,) place a user without train rows by the items in the history (see
    `fold_in_users`); None until `fit_fold_in` ran. blend: what the score has beside p . q in place
    of the biases, see ckf.cf.blend; the vectors keep their own. held_out: what train rows are shown
    in place of users and items, see ckf.cf.held_out.
    """

    users: Tensor | MappedTable
    items: Tensor
    user_known: Tensor
    item_known: Tensor
    kind: str
    score_form: str = "biased_dot"
    bias: float = 0.0
    fold_in: Tensor | None = None
    fold_in_offset: Tensor | None = None
    blend: Blend | None = None
    held_out: HeldOut | None = None

    def __post_init__(self) -> None:
        assert self.score_form in SCORE_FORMS
        assert self.users.ndim == self.items.ndim == 2
        assert self.users.shape[1] == self.items.shape[1]
        assert self.user_known.shape == self.users.shape[:1]
        assert self.item_known.shape == self.items.shape[:1]

    @property
    def dim(self) -> int:
        """Width d of the vectors, biases included."""
        return self.users.shape[1]

    @property
    def factors(self) -> slice:
        """The columns whose product is p . q: all but the biases, which vectors of files lack."""
        return slice(None) if self.score_form == "dot" else slice(-1)

    @property
    def takes_history(self) -> bool:
        """Whether `score` takes a row's history."""
        if self.blend is None:
            return self.fold_in is not None
        return self.blend.history is not None

    def folds(self, user_idx: ArrayLike, item_idx: ArrayLike) -> Tensor | None:
        """Which held-out model rows of users (n,), -1 for strangers, and items (n,) are shown.

        Returns:
            (n,) int64, -1 for a pair without a train row; None where there are no held-out vectors.
        """
        if self.held_out is None:
            return None
        return self.held_out.folds_of(as_index(user_idx), as_index(item_idx), len(self.items))

    def user_rows(self, user_idx: Tensor, folds: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Vectors (n, d) of users (n,), -1 for strangers, and whether they are known (n,).

        folds: (n,) as `folds` gives them; None shows those of the whole fit.
        """
        index = user_idx.clamp(min=0)
        if folds is None:
            return self.users[index], self.user_known[index] & (user_idx >= 0)
        new, place = folds >= 0, folds * len(self.users) + index
        found = torch.empty(len(index), self.dim)
        found[new], found[~new] = self.held_out.users[place[new]], self.users[index[~new]]
        known = torch.empty(len(index), dtype=torch.bool)
        known[new] = self.held_out.user_known[place[new]]
        known[~new] = self.user_known[index[~new]]
        return found, known & (user_idx >= 0)

    def item_rows(self, item_idx: Tensor, folds: Tensor | None = None) -> Tensor:
        """Vectors (*shape, d) of items (n, ...); folds (n,) as for `user_rows`."""
        found = self.items[item_idx]
        if folds is not None:
            new = folds >= 0
            start = folds[new].view(-1, *[1] * (item_idx.ndim - 1)) * len(self.items)
            found[new] = self.held_out.items[start + item_idx[new]]
        return found

    def score(
        self,
        user_idx: ArrayLike | Tensor,
        item_idx: ArrayLike | Tensor,
        history: ArrayLike | Tensor | None = None,
        folds: Tensor | None = None,
    ) -> Tensor:
        """The CF model's own score of user-item pairs, float32, in the broadcast shape of both.

        user_idx and item_idx: ints, arrays or tensors that broadcast, such as (P, 1) with (P, C).
        With ``history``, item indices padded with -1, of shape user_idx.shape + (H,), users without
        train rows are folded in. Trained on labels, the score is a logit; on ratings, a rating.
        A blend leaves such users, and strangers (-1), at the items' part; with ``cf.history`` it
        needs the history, for all users. With ``folds`` (n,), as `folds` gives them, and indices
        (n,) the scores are those of held-out models. Raises ValueError for standardised vectors,
        whose products mean nothing, and for a blend with a history that it does not read or without
        one that it does.
        """
        if self.score_form == "none":
            raise ValueError(
                "these vectors are standardised and have no score: call score() on the vectors "
                "before standardised()"
            )
        user_idx, item_idx = as_index(user_idx), as_index(item_idx)
        if self.blend is not None:
            return self._blended(user_idx, item_idx, history, folds)
        users, known = self.user_rows(user_idx, folds)  # (..., d)
        if history is not None:
            folded = fold_in_users(self, as_index(history)[~known])
            users = users.index_put((~known,), folded)
        items = self.item_rows(item_idx, folds)
        if self.score_form == "dot":
            return (users * items).sum(-1)
        dot = (users[..., :-1] * items[..., :-1]).sum(-1)
        return dot + users[..., -1] + items[..., -1] + self.bias

    def _blended(self, user_idx: Tensor, item_idx: Tensor, history, folds: Tensor | None) -> Tensor:
        if history is None and self.takes_history:
            raise ValueError(
                "these vectors have a blend with cf.history, which scores no row without its "
                "history: give score() the last liked items, padded with -1"
            )
        if history is not None and not self.takes_history:
            raise ValueError(
                "these vectors have a blend, whose score folds nobody in: call score() without "
                "history; users without train rows get the items' part"
            )
        users, known = self.user_rows(user_idx, folds)
        users = torch.where(known.unsqueeze(-1), users, 0.0)
        items = self.item_rows(item_idx, folds)
        dots = (users[..., self.factors] * items[..., self.factors]).sum(-1)
        past = None if history is None else as_index(history)
        rows = (user_idx, item_idx, dots, known) + (() if past is None else (past,))
        blends = () if folds is None else self.held_out.blends
        if not blends:
            return self.blend.score(*rows)
        scores = torch.empty(len(folds))
        for number, blend in enumerate((self.blend, *blends), -1):
            own = folds == number
            scores[own] = blend.score(*(values[own] for values in rows))
        return scores

    def standardised(self) -> CFVectors:
        """Zero mean and unit deviation per column over the known rows; unknown rows stay zero.

        The fold-in follows the scale of the users. A column without spread becomes zero.
        """
        by_user = _scale_of(self.users, self.user_known)
        by_item = _scale_of(self.items, self.item_known)
        fold_in, offset = self.fold_in, self.fold_in_offset
        if fold_in is not None:
            mean, std = by_user.mean.float(), by_user.std.float()
            fold_in, offset = fold_in / std, (offset - mean) / std
        held_out = self.held_out
        return replace(
            self,
            users=scaled_rows(self.users, by_user),
            items=scaled_rows(self.items, by_item),
            score_form="none",
            fold_in=fold_in,
            fold_in_offset=offset,
            blend=None,
            held_out=None if held_out is None else held_out.scaled(by_user, by_item),
        )

    def save(self, path: str | Path) -> None:
        """Write one safetensors file (the fold-in included)."""
        tensors = {
            "users": self.users,
            "items": self.items,
            "user_known": self.user_known,
            "item_known": self.item_known,
        }
        if self.fold_in is not None:
            tensors |= {"fold_in": self.fold_in, "fold_in_offset": self.fold_in_offset}
        if self.blend is not None:
            tensors |= {_BLEND + name: value for name, value in self.blend.tensors().items()}
        if self.held_out is not None:
            parts = self.held_out.tensors()
            tensors |= {_HELD_OUT + name: value for name, value in parts.items()}
        about = {
            "format": _FORMAT,
            "kind": self.kind,
            "score_form": self.score_form,
            "bias": json.dumps(self.bias),
        }
        save_tables(tensors, about, path)

    @classmethod
    def load(cls, path: str | Path, mapped_above: int = MAPPED_BYTES) -> CFVectors:
        """Read what `save` wrote; users stay on disk in a file of more than ``mapped_above`` bytes.

        Raises ValueError for a file of another kind.
        """
        large = ["users", _HELD_OUT + "users"]
        mapped = large if Path(path).stat().st_size > mapped_above else []
        with safe_open(str(path), framework="np") as file:
            about = file.metadata() or {}
            if about.get("format") != _FORMAT:
                mapped = []
            names = list(file.keys())
            tensors = {n: torch.from_numpy(file.get_tensor(n)) for n in names if n not in mapped}
        tensors |= {name: MappedTable.open(path, name) for name in names if name in mapped}
        if about.get("format") != _FORMAT:
            raise ValueError(
                f"{path}: format is {about.get('format')!r}, expected {_FORMAT!r}: give a file "
                "written by CFVectors.save, or read plain vectors with load_vectors"
            )
        blend, held_out = (
            {name[len(of) :]: tensors.pop(name) for name in names if name.startswith(of)}
            for of in (_BLEND, _HELD_OUT)
        )
        sizes = len(tensors["users"]), len(tensors["items"])
        return cls(
            **tensors,
            blend=Blend.of(blend, *sizes),
            held_out=HeldOut.of(held_out, *sizes, tensors["items"].shape[1]),
            kind=about["kind"],
            score_form=about["score_form"],
            bias=json.loads(about["bias"]),
        )


def _scale_of(table: Tensor | MappedTable, known: Tensor) -> Scale:
    """What standardises the table over its known rows."""
    if isinstance(table, MappedTable):
        mean, std = moments(table, known)
    elif known.any():
        rows = table[known].double()
        mean, std = rows.mean(0), rows.std(0, correction=0)
    else:
        mean = std = torch.zeros(table.shape[1], dtype=torch.float64)
    flat = std <= 1e-6 * mean.abs().clamp(min=1e-6)
    return Scale(mean, torch.where(flat, 1.0, std), flat, known)
