"""The gates of every row, from those of every task.

Small tables of gates are kept as long as the gates live: making one takes a dozen small operations,
forward and again in backward, which on a GPU are as many launches. None is kept or used while a
CUDA graph is captured, whose replays would not know when it is given up.
"""

import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ckf.kernels.decode_cache import Made, capturing
from ckf.kernels.group import GroupShape
from ckf.kernels.selection import bit_mask, select_
from ckf.kernels.stacks import column_gates

MOST_KEPT = 2**13  # elements of a table: 64 KB with its mask
MOST_KEPT_ON_A_GPU = 2**16  # where making one costs launches, whatever its size


class RowGates(NamedTuple):
    """Gates and what they select: a gate of zero gives zero whatever it is applied to."""

    values: Tensor  # (rows, R)
    mask: Tensor  # (rows, R): selection.bit_mask of those that are not zero

    def at(self, places: Tensor) -> "RowGates":
        return RowGates(self.values.index_select(0, places), self.mask.index_select(0, places))

    def __call__(self, s: Tensor) -> Tensor:
        return select_((s * self.values).to(s.dtype), self.mask)


def gate_table(shape: GroupShape, gates: Sequence[Tensor], dtype: torch.dtype) -> RowGates:
    """The rows are ids -2, -1, 0 .. T: zeros for -1, NaN for those out of range.

    Args:
        gates: per linear (T, E); ``dtype``: of what they are applied to.
    """
    first, on_gpu = gates[0], _on_gpu(gates[0])
    most = MOST_KEPT_ON_A_GPU if on_gpu else MOST_KEPT if first.device.type == "cpu" else 0
    elements = (first.shape[0] + 3) * shape.columns
    if elements > most or any(g.requires_grad for g in gates) or capturing(first):
        return _make(shape, gates, dtype)
    kept = _KEPT.get(first)
    versions = [-1 if g.is_inference() else g._version for g in gates]
    if kept is not None and kept.fits(shape, gates, dtype, versions):
        if kept.where is not None:
            kept.where.wait(kept.table)
        return kept.table
    table = _make(shape, gates, dtype)
    if -1 not in versions:
        others = [weakref.ref(gate) for gate in gates[1:]]  # one may be the key itself
        where = Made.here(first) if on_gpu else None
        _KEPT[first] = _Kept(shape.ranks, others, dtype, versions, table, where)
    return table


def _on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda


class _Kept(NamedTuple):
    ranks: tuple
    others: Sequence[weakref.ref]
    dtype: torch.dtype
    versions: list[int]
    table: RowGates
    where: Made | None

    def fits(self, shape: GroupShape, gates, dtype: torch.dtype, versions: list[int]) -> bool:
        if (self.dtype, self.versions, self.ranks) != (dtype, versions, shape.ranks):
            return False
        return all(one() is other for one, other in zip(self.others, gates[1:], strict=True))


_KEPT = WeakIdKeyDictionary()  # by the gates of the first linear


def _make(shape: GroupShape, gates: Sequence[Tensor], dtype: torch.dtype) -> RowGates:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    columns = column_gates([gate.detach() for gate in gates], shape.ranks, wide)  # (T, R)
    values = F.pad(columns, (0, 0, 2, 1), value=float("nan"))
    values[1] = 0
    return RowGates(values, bit_mask(values != 0, dtype))
