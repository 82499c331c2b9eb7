"""The experts of a group as the kernels read them: stacked by few launches, whatever their number.

A cat each for A, for the B of a linear and for the gates, and one cast each where the adapters are
not of x's dtype: R (k + n) elements, under 1% of the base product's traffic at m 8192, R 80.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ckf.kernels.group import GroupShape


@dataclass(frozen=True)
class Stacks:
    a: Tensor  # (R, k)
    b: list[Tensor]  # per linear (R_l, n_l): B transposed
    gates: Tensor  # (T, R) float32 (float64 for float64 inputs), one column a rank column

    @classmethod
    def of(
        cls,
        shape: GroupShape,
        gates: Sequence[Tensor],
        a: Sequence[Tensor],
        b: Sequence[Tensor],
        dtype: torch.dtype,
    ) -> "Stacks":
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        columns = column_gates([gate.detach() for gate in gates], shape.ranks, wide)
        return cls(*stack_adapters(shape, a, b, dtype), columns)


def stack_adapters(
    shape: GroupShape, a: Sequence[Tensor], b: Sequence[Tensor], dtype: torch.dtype
) -> tuple[Tensor, list[Tensor]]:
    """A and B as in ``Stacks``."""
    experts = iter(b)
    parts = [[t.t() for t in itertools.islice(experts, len(ranks))] for ranks in shape.ranks]
    return _cat(a).to(dtype), [_cat(own).to(dtype) for own in parts]


def _cat(tensors: Sequence[Tensor]) -> Tensor:
    """Along the rows; cat itself casts where dtypes differ."""
    return torch.cat(tensors) if len(tensors) > 1 else tensors[0].contiguous()


def column_gates(
    gates: Sequence[Tensor], ranks: Sequence[Sequence[int]], dtype: torch.dtype
) -> Tensor:
    """(T, R): every gate as often as its expert has columns, run by run of one rank."""
    gate = torch.cat(gates, dim=1) if len(gates) > 1 else gates[0]
    gate = gate.to(dtype)
    runs, start = [], 0
    for rank, members in itertools.groupby(itertools.chain.from_iterable(ranks)):
        count = len(list(members))
        run = gate[:, start : start + count].unsqueeze(2)
        runs.append(run.expand(-1, -1, rank).flatten(1))
        start += count
    return torch.cat(runs, dim=1) if len(runs) > 1 else runs[0].contiguous()
