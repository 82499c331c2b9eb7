"""The "cuda" backend, for a few rows: cuBLAS writes every base, one launch adds all updates.

Stacking the experts costs more launches than the update itself, so a caller that decodes keeps a
``DecodeCache``.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ckf.kernels.cuda import MAX_LINEARS, DecodeGroup
from ckf.kernels.decode_cache import DecodeCache
from ckf.kernels.group import GroupShape
from ckf.kernels.stacks import Stacks


def forward_pass(
    shape: GroupShape,
    x: Tensor,
    weights: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    gates: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    task_ids: Tensor,
    cache: DecodeCache | None = None,
) -> list[Tensor]:
    """The outputs (..., n_l); arguments as in torch_backend.forward_pass."""
    rows = x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()
    arguments = (shape, gates, a, b, x.dtype)
    groups = _prepare(*arguments) if cache is None else cache.get(_prepare, *arguments)
    ids = task_ids.reshape(-1).contiguous()
    outputs, first = [], 0
    for weight, bias, ranks in zip(weights, biases, shape.ranks, strict=True):
        n = b[first].shape[0]
        first += len(ranks)
        empty = weight is None
        y = x.new_zeros(*x.shape[:-1], n) if empty else F.linear(x, weight, bias).contiguous()
        outputs.append(y)
    flat = [y.view(-1, y.shape[-1]) for y in outputs]
    for index, group in enumerate(groups):
        group(flat[index * MAX_LINEARS : (index + 1) * MAX_LINEARS], rows, ids)
    return outputs


def _prepare(shape: GroupShape, gates, a, b, dtype: torch.dtype) -> list[DecodeGroup]:
    """One launch for every MAX_LINEARS linears."""
    groups, expert = [], 0
    for start in range(0, shape.linears, MAX_LINEARS):
        ranks = shape.ranks[start : start + MAX_LINEARS]
        part = GroupShape(ranks, 0.0)
        own = slice(expert, expert + part.experts)
        expert += part.experts
        stacks = Stacks.of(part, gates[start : start + MAX_LINEARS], a[own], b[own], dtype)
        groups.append(DecodeGroup(stacks.a, stacks.b, stacks.gates))
    return groups
