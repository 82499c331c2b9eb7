"""Multi-LoRA on the Triton kernels: what torch_backend.py computes and saves, in fewer passes.

For linears l that share x (m, k), with the experts of all of them stacked along R:

    forward   H = shrink(x, A)                  y_l = x W_l^T + bias_l + H_l B_l^T
    backward  dS_l = shrink(dy_l, B_l^T)        dB_l^T = outer(H_l, dy_l)    dA = outer(dS, x)
              dx = mask * (dS A), then += dy_l W_l by cuBLAS (a later mask would hit dy W too)

Gates act where the shrink stores, dropout where x is loaded: no (m, k) or (m, n) tensor exists
beside x, y, dy and dx. Saved: x and one more tensor: the compact H of hard gates, H, or S where
gates need a gradient. Past DENSE_RANK columns hard gates take the gather kernels, which touch the
columns of a row's own task alone. dB follows dS at once, while the L2 cache still holds part of dy;
the last linear's comes with dA from one launch where that pays (outer_pair).
With the plan "gemm" on Hopper H and y come from one product, dS and dx from another (hopper.py).
No host synchronisation, no shape that depends on values, no atomics.
"""

import itertools
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from ckf.kernels import hopper, launch
from ckf.kernels.group import Gradients, GroupShape, base_gradients, unflatten
from ckf.kernels.launch import DENSE_RANK, PLANS, dot_precision
from ckf.kernels.replay import replayed
from ckf.kernels.torch_backend import gate_gradients
from ckf.kernels.triton_launcher import RememberedKernel
from ckf.kernels.triton_stack import stack, stack_kernel
from ckf.kernels.triton_update import Dense, Gathered

# launches in Triton's interpreter, and on ROCm, are not heard of
_REPEATS = isinstance(stack_kernel, RememberedKernel)


def forward_pass(
    shape: GroupShape,
    x: Tensor,
    weights: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    gates: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    task_ids: Tensor,
    seed: Tensor | None,
    save_plain: bool,
    slots: Tensor | None,
    width: int,
    plan: str,
) -> tuple[list[Tensor], Tensor]:
    """One new (..., n_l) output a linear, and what backward needs beside the inputs.

    Args:
        x: (..., k); ``weights``, ``biases``, ``gates``: one a linear; ``a``, ``b``: the experts of
            all linears, one after another.
        task_ids: int64, one a row of x; ``seed``: one int64 on x's device, None: no dropout.
        save_plain: gates need a gradient, so S is saved.
        slots, width: of ``slots.compact_slots`` for hard gates; None, 0: any gate may be non-zero.
        plan: one of ``launch.PLANS``.
    """
    assert plan in PLANS, plan
    trained = tuple([w is not None and w.requires_grad for w in weights])  # for F.linear's choice
    static = shape, save_plain, width, plan, _settings(x), trained
    tensors = [x, task_ids, seed, slots, *weights, *biases, *gates, *a, *b]
    with torch.cuda.device_of(x):
        *outputs, saved = _made(_forward, static, tensors)
    return outputs, saved


def _made(make, static: tuple, tensors: Sequence[Tensor | None]) -> list[Tensor]:
    return replayed(make, static, tensors) if _REPEATS else make(static, tensors)


def _forward(static: tuple, tensors: Sequence[Tensor | None]) -> list[Tensor]:
    shape, save_plain, width, plan, *_ = static
    x, task_ids, seed, slots, *tensors = tensors
    weights, biases, gates, a, b = unflatten(shape, tensors)
    rows = _rows(x)
    biases = [None if bias is None else bias.contiguous() for bias in biases]
    stacks = stack(shape, gates, a, b, x.dtype)
    compact = not save_plain and saves_compact(shape, slots)
    saved = rows.new_empty(rows.shape[0], width if compact else shape.columns)
    inside = plan == "gemm" and seed is None and shrinks_inside(shape, rows, weights)
    kind = Gathered if gathers(shape, save_plain, slots) and not inside else Dense
    update = kind(shape, stacks, task_ids, seed, save_plain, slots, width)
    update.shrink(rows, saved)
    outputs = [
        update.output(x, rows, linear, weight, bias, plan)
        for linear, (weight, bias) in enumerate(zip(weights, biases, strict=True))
    ]
    return [*outputs, saved]


def backward_pass(
    shape: GroupShape,
    dys: Sequence[Tensor],
    x: Tensor,
    saved: Tensor,
    weights: Sequence[Tensor | None],
    gates: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    task_ids: Tensor,
    seed: Tensor | None,
    save_plain: bool,
    slots: Tensor | None,
    width: int,
    needs: Sequence[bool],
    plan: str,
) -> list[Tensor]:
    """The gradients that ``needs`` asks for (of x, weights, biases, gates, a, b), packed.

    ``dys``: one (..., n_l) a linear; ``saved``: of :func:`forward_pass`, whose arguments the others
    are.
    """
    assert plan in PLANS, plan
    static = shape, save_plain, width, tuple(needs), plan, _settings(x)
    tensors = [x, saved, task_ids, seed, slots, *dys, *weights, *gates, *a, *b]
    with torch.cuda.device_of(x):
        return _made(_backward, static, tensors)


def _backward(static: tuple, tensors: Sequence[Tensor | None]) -> list[Tensor]:
    shape, save_plain, width, needs, plan, _ = static
    x, saved, task_ids, seed, slots, *tensors = tensors
    dys, weights, gates, a, b = unflatten(shape, tensors)
    need_w, need_bias, need_g, need_a, need_b = unflatten(shape, needs[1:])
    rows, dys = _rows(x), [_rows(dy) for dy in dys]
    firsts = list(itertools.accumulate([0, *map(len, shape.ranks)]))
    needed = [any(need_b[i:j]) for i, j in itertools.pairwise(firsts)]
    dtypes = [b[first].dtype for first in firsts[:-1]]
    dx = da = dg = None
    stacks = stack(shape, gates, a, b, x.dtype)
    inside = plan == "gemm" and needs[0] and shrinks_inside(shape, rows, weights)
    if seed is not None and hopper.waits_for_ds(*rows.shape):
        inside = False
    kind = Gathered if gathers(shape, save_plain, slots) and not inside else Dense
    update = kind(shape, stacks, task_ids, seed, save_plain, slots, width)
    bases = weights if needs[0] and plan == "gemm" else ()  # dx may come with dS
    db = update.rank_gradients(dys, saved, needed, dtypes, any(need_g), bases, pair=any(need_a))
    if needs[0]:
        dx = update.input_gradient(dys, weights, plan).view(x.shape)
    if any(need_a):
        da = update.a_gradient(rows, a[0].dtype, db)
    if any(need_g):
        dg = gate_gradients(shape, update.dh, saved, gates, task_ids)
    base = base_gradients(rows, dys, need_w, need_bias)
    return Gradients(dx, base, dg, da, db).packed()


def _settings(x: Tensor) -> tuple:
    """What else decides how a pass is computed."""
    precise = dot_precision(x.dtype) if x.dtype == torch.float32 else ""
    return launch.STACK_EXPERTS, os.environ.get("CKF_HOPPER_GEMM"), precise


def saves_compact(shape: GroupShape, slots: Tensor | None) -> bool:
    """Whether H is saved compact, (m, C): wherever the slots are known; the shrink packs it."""
    return slots is not None


def shrinks_inside(shape: GroupShape, rows: Tensor, weights) -> bool:
    """Whether csrc's products can make H, each linear its own columns, so that nothing is gathered:
    a first look, the products have the last word."""
    return (
        rows.dtype.itemsize == 2
        and hopper.available(rows.device)[0]
        and max(shape.linear_ranks) <= hopper.MAX_SHRINK
        and shape.aligned
        and not any(weight is None for weight in weights)
    )


def gathers(shape: GroupShape, save_plain: bool, slots: Tensor | None) -> bool:
    """Whether row tiles gather their own columns: hard gates, and too many columns for a block."""
    return slots is not None and not save_plain and shape.columns > DENSE_RANK


def _rows(x: Tensor) -> Tensor:
    """(m, k) with neighbouring columns side by side; a copy only where they are not."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()
