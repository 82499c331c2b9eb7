"""The "cuda" backend, for a few rows, in one of two ways (``launch.CUDA_PLANS``).

"update": cuBLAS writes every base, one launch adds all updates. "linear": one launch computes bases
and updates, where a kernel for that is for the call; elsewhere as "update" (with 17 to 64 rows
wherever the GPU is not an H100's relative or does not run all of n at once). Stacking the experts
costs more launches than the update itself, so a caller that decodes keeps a ``DecodeCache``.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ckf.kernels.cuda import FORMS, MAX_LINEARS, DecodeGroup
from ckf.kernels.decode_cache import capturing
from ckf.kernels.group import GroupShape, why_no_triton
from ckf.kernels.launch import CUDA_PLANS
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
    plan: str = CUDA_PLANS[0],
) -> list[Tensor]:
    """The outputs (..., n_l), of experts stacked for this call alone; arguments as in
    torch_backend.forward_pass."""
    with torch.cuda.device_of(x):
        groups = prepare(shape, gates, a, b, x.dtype, _stack_at_once(x))
    return decode_pass(groups, x, weights, biases, task_ids, plan)


def decode_pass(
    groups: Sequence[DecodeGroup],
    x: Tensor,
    weights: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    task_ids: Tensor,
    plan: str = CUDA_PLANS[0],
) -> list[Tensor]:
    """The outputs of what :func:`prepare` made of the experts."""
    assert plan in CUDA_PLANS, plan
    rows, ids = (x, task_ids) if x.is_contiguous() else (_strided_rows(x), task_ids.reshape(-1))
    ids = ids.contiguous()
    if len(groups) == 1:
        return _group_pass(groups[0], x, rows, weights, biases, ids, plan)
    outputs = []
    for number, group in enumerate(groups):
        own = slice(number * MAX_LINEARS, (number + 1) * MAX_LINEARS)
        outputs += _group_pass(group, x, rows, weights[own], biases[own], ids, plan)
    return outputs


def _strided_rows(x: Tensor) -> Tensor:
    """(m, k) with the elements of a row side by side, where that can be without a copy."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def _group_pass(group: DecodeGroup, x, rows, weights, biases, ids, plan: str) -> list[Tensor]:
    """``rows``: x itself, or its rows (m, k); ``ids`` of the same leading shape."""
    if plan != CUDA_PLANS[0] and not any(weight is None for weight in weights):
        found = group.linears(rows, weights, biases, ids)
        if found is not None:
            return found if rows is x else [y.view(*x.shape[:-1], y.shape[1]) for y in found]
        if ids.numel() <= FORMS["loads"][1]:  # with more, which widths are taken is the launcher's
            _say_once(str(x.device))
    outputs = []
    for weight, bias, n in zip(weights, biases, group.widths, strict=True):
        empty = weight is None
        y = x.new_zeros(*x.shape[:-1], n) if empty else F.linear(x, weight, bias).contiguous()
        outputs.append(y)
    group(outputs if rows is x else [y.view(len(rows), -1) for y in outputs], rows, ids)
    return outputs


@lru_cache
def _say_once(device: str) -> None:
    warnings.warn(
        "csrc's kernel that computes base and update in one launch cannot read these weights (not "
        f"plain tensors of x's dtype with rows at 16 bytes) or cannot run on {device}; cuBLAS "
        "computes the bases",
        stacklevel=2,
    )


def prepare(
    shape: GroupShape,
    gates: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    dtype: torch.dtype,
    stack: Callable[..., Stacks] = Stacks.of,
) -> list[DecodeGroup]:
    """What a ``DecodeCache`` keeps: the experts stacked, a launch for every MAX_LINEARS linears."""
    groups, expert = [], 0
    for start in range(0, shape.linears, MAX_LINEARS):
        ranks = shape.ranks[start : start + MAX_LINEARS]
        part = GroupShape(ranks, 0.0)
        own = slice(expert, expert + part.experts)
        expert += part.experts
        stacks = stack(part, gates[start : start + MAX_LINEARS], a[own], b[own], dtype)
        groups.append(DecodeGroup(stacks.a, stacks.b, stacks.gates))
    return groups


def _stack_at_once(x: Tensor) -> Callable[..., Stacks]:
    """What stacks the experts of a call that keeps nothing, as a compiled one is.

    Triton's kernel in one launch where it can run: PyTorch's dozen launches a group would be in
    every replay of a graph. What a cache keeps is stacked by PyTorch, which compiles nothing.
    """
    if not x.is_cuda or why_no_triton(x.device, may_try=not capturing(x)) is not None:
        return Stacks.of
    from ckf.kernels.triton_stack import stack  # imports triton

    return stack
