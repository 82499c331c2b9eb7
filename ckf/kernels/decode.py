"""The "cuda" backend, for a few rows: cuBLAS writes every base, one launch adds all updates.

Stacking the experts costs more launches than the update itself, so a caller that decodes keeps a
:class:`DecodeCache`: the stacks are made again only after an adapter or a gate changed.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ckf.kernels.cuda import MAX_LINEARS, DecodeGroup
from ckf.kernels.group import GroupShape
from ckf.kernels.stacks import Stacks


class DecodeCache:
    """The prepared launches of one group of linears.

    Changes in place are seen by the tensors' version counters, replaced tensors by their addresses.
    A change through ``parameter.data`` shows in neither: ``clear`` after one. A CUDA graph captured
    with prepared launches replays the adapters of that moment.
    """

    def __init__(self) -> None:
        self._captured: list[list[DecodeGroup]] = []  # graphs hold their addresses
        self.clear()

    def clear(self) -> None:
        self._key: tuple | None = None
        self._kept: tuple = ()  # so that no address of the key is given out again
        self._groups: list[DecodeGroup] = []

    def groups(self, shape: GroupShape, gates, a, b, dtype: torch.dtype) -> list[DecodeGroup]:
        """The launches of ``_prepare``, made anew where a tensor changed."""
        tensors = (*gates, *a, *b)
        if any(t.is_inference() for t in tensors):  # they count no versions
            return _prepare(shape, gates, a, b, dtype)
        key = (dtype, *((t.data_ptr(), t._version) for t in tensors))
        capturing = tensors[0].is_cuda and torch.cuda.is_current_stream_capturing()
        if key != self._key:
            groups = _prepare(shape, gates, a, b, dtype)
            if capturing:  # only replays of the graph compute these
                return groups
            self._groups, self._key = groups, key
            self._kept = tuple(t.detach() for t in tensors)
        elif capturing and not any(g is self._groups for g in self._captured):
            self._captured.append(self._groups)
        return self._groups


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
    make = _prepare if cache is None else cache.groups
    outputs, first = [], 0
    for weight, bias, ranks in zip(weights, biases, shape.ranks, strict=True):
        n = b[first].shape[0]
        first += len(ranks)
        empty = weight is None
        y = x.new_zeros(*x.shape[:-1], n) if empty else F.linear(x, weight, bias).contiguous()
        outputs.append(y)
    flat = [y.view(-1, y.shape[-1]) for y in outputs]
    ids = task_ids.reshape(-1).contiguous()
    for index, group in enumerate(make(shape, gates, a, b, x.dtype)):
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
