"""Shrink and expand for many rank columns and hard gates: a tile gathers its task's columns alone.

    H[i, s] = gate * scale * keep(x_i) . A[column]       y_i [+]= [mask *] sum_s H[i, s] B^T[column]

with column = columns[t_i, s] of the s-th slot of the row's task (slots.py). Row tiles come from the
rows grouped by task (triton_groups.py), so a tile has one task: C columns instead of R, whatever T
is and however the rows are mixed. Rows of A and B^T are gathered by pointer, each contiguous. H is
compact (m, C); slots past a task's last, and rows of the base alone, are neither written nor read.
"""

import triton
import triton.language as tl
from torch import Tensor

from ckf.kernels.launch import (
    ExpandLaunch,
    ShrinkLaunch,
    ceil_div,
    dot_precision,
    gather_expand_launch,
    gather_shrink_launch,
    next_power,
)
from ckf.kernels.triton_common import keep_mask
from ckf.kernels.triton_groups import RowGroups, group_tile, most_tiles, slot_range
from ckf.kernels.triton_launcher import remembered


@remembered
@triton.jit(do_not_specialize=["tasks", "low", "threshold"])
def gather_shrink_kernel(
    p_x,
    p_a,
    p_h,
    p_gates,
    p_columns,
    p_rows,
    p_starts,
    p_seed,
    k,
    r,
    width,
    low,
    tasks,
    stride_x,
    stride_a,
    stride_h,
    stride_gates,
    threshold,
    scale,
    ALIGNED: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile, block = tl.program_id(0), tl.program_id(1)
    task, first, stop = group_tile(p_starts, tile, tasks, BLOCK_M, GROUPS)
    if first >= stop:
        return
    low_slot, stop_slot = slot_range(p_columns, task, low, r, width, ALIGNED, WIDTH)
    o_s = low_slot + block * BLOCK_R + tl.arange(0, BLOCK_R)
    m_s = o_s < stop_slot
    if low_slot + block * BLOCK_R >= stop_slot:
        return
    o_i = first + tl.arange(0, BLOCK_M)
    m_m = o_i < stop
    o_m = tl.load(p_rows + o_i, mask=m_m, other=0).to(tl.int64)
    column = tl.load(p_columns + task.to(tl.int64) * width + o_s, mask=m_s, other=low)

    p_xm = p_x + o_m[:, None] * stride_x
    p_ar = p_a + (column - low).to(tl.int64)[:, None] * stride_a
    if p_seed is not None:
        acc = tl.zeros([BLOCK_R, BLOCK_M], tl.float32)
    else:
        acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for start in range(0, k, BLOCK_K):
        o_k = start + tl.arange(0, BLOCK_K)
        m_k = o_k < k
        b_x = tl.load(p_xm + o_k[None, :], mask=m_m[:, None] & m_k[None, :], other=0.0)
        b_a = tl.load(p_ar + o_k[None, :], mask=m_s[:, None] & m_k[None, :], other=0.0)
        if p_seed is not None:
            b_keep = keep_mask(o_m, start, p_seed, threshold, BLOCK_K)
            b_x = tl.where(b_keep, b_x, 0.0)
            acc = tl.dot(b_a, tl.trans(b_x), acc, input_precision=PRECISION)
        else:
            acc = tl.dot(b_x, tl.trans(b_a), acc, input_precision=PRECISION)
    if p_seed is not None:
        acc = tl.trans(acc) * scale

    p_gate = p_gates + task.to(tl.int64) * stride_gates + column
    b_gate = tl.load(p_gate, mask=m_s, other=0.0)[None, :]
    gated = tl.where(b_gate != 0, acc * b_gate, 0.0)
    p_out = p_h + o_m[:, None] * stride_h + o_s[None, :]
    tl.store(p_out, gated.to(p_h.dtype.element_ty), mask=m_m[:, None] & m_s[None, :])


@remembered
@triton.jit(do_not_specialize=["tasks", "low", "threshold"])
def gather_expand_kernel(
    p_h,
    p_b,
    p_y,
    p_bias,
    p_columns,
    p_rows,
    p_starts,
    p_seed,
    n,
    r,
    width,
    low,
    tasks,
    stride_h,
    stride_b,
    stride_y,
    threshold,
    scale,
    ACCUMULATE: tl.constexpr,
    ALIGNED: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    column_blocks = tl.cdiv(n, BLOCK_N)
    pid = tl.program_id(0)
    group, first, stop = group_tile(p_starts, pid // column_blocks, tasks + 2, BLOCK_M, GROUPS)
    if first >= stop:
        return
    left = (pid % column_blocks) * BLOCK_N
    o_n = left + tl.arange(0, BLOCK_N)
    o_i = first + tl.arange(0, BLOCK_M)
    m_m, m_n = o_i < stop, o_n < n
    o_m = tl.load(p_rows + o_i, mask=m_m, other=0).to(tl.int64)
    low_slot, stop_slot = 0, 0
    if group < tasks:
        low_slot, stop_slot = slot_range(p_columns, group, low, r, width, ALIGNED, WIDTH)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(low_slot, stop_slot, BLOCK_R):
        o_s = start + tl.arange(0, BLOCK_R)
        m_s = o_s < stop_slot
        column = tl.load(p_columns + group.to(tl.int64) * width + o_s, mask=m_s, other=low)
        p_hm = p_h + o_m[:, None] * stride_h + o_s[None, :]
        p_br = p_b + (column - low).to(tl.int64)[:, None] * stride_b + o_n[None, :]
        b_h = tl.load(p_hm, mask=m_m[:, None] & m_s[None, :], other=0.0)
        b_b = tl.load(p_br, mask=m_s[:, None] & m_n[None, :], other=0.0)
        acc = tl.dot(b_h, b_b, acc, input_precision=PRECISION)

    if p_seed is not None:
        acc = tl.where(keep_mask(o_m, left, p_seed, threshold, BLOCK_N), acc * scale, 0.0)
    if p_bias is not None:
        acc += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    acc = tl.where(group == tasks + 1, float("nan"), acc)  # invalid ids
    m_y = m_m[:, None] & m_n[None, :]
    p_out = p_y + o_m[:, None] * stride_y + o_n[None, :]
    if ACCUMULATE:
        acc += tl.load(p_out, mask=m_y, other=0.0).to(tl.float32)
    tl.store(p_out, acc.to(p_y.dtype.element_ty), mask=m_y)


def gather_shrink(
    x: Tensor,
    a: Tensor,
    column_gates: Tensor,
    groups: RowGroups,
    low: int,
    h: Tensor,
    aligned: bool,
    dropout: tuple[Tensor, int, float] | None = None,
    launch: ShrinkLaunch | None = None,
) -> None:
    """Write the slots of H that hold the columns of ``a``.

    Args:
        x: (m, k), rows strided; ``a``: (r, k), the columns [low, low + r) of the group's R.
        column_gates: (T, R) fp32; ``groups``: the rows by task, the columns by slot.
        h: (m, C), rows strided.
        aligned: every rank is a multiple of 8.
        dropout: seed (one int64 on x's device), threshold, scale; None: no dropout.
        launch: the blocks; by default ``launch.gather_shrink_launch`` chooses.
    """
    (m, k), r, width = x.shape, a.shape[0], h.shape[1]
    if m == 0 or r == 0:
        return
    expected = -(-width * r // column_gates.shape[1])  # slots in these columns, if spread evenly
    launch = launch or gather_shrink_launch(m, k, expected, x.dtype, dropout is not None)
    seed, threshold, scale = dropout or (None, 0, 1.0)
    tiles = most_tiles(m, groups.tasks, launch.block_m)
    gather_shrink_kernel[(tiles, ceil_div(min(width, r), launch.block_r))](
        p_x=x,
        p_a=a,
        p_h=h,
        p_gates=column_gates,
        p_columns=groups.columns,
        p_rows=groups.rows,
        p_starts=groups.starts,
        p_seed=seed,
        k=k,
        r=r,
        width=width,
        low=low,
        tasks=groups.tasks,
        stride_x=x.stride(0),
        stride_a=a.stride(0),
        stride_h=h.stride(0),
        stride_gates=column_gates.stride(0),
        threshold=threshold,
        scale=scale,
        ALIGNED=aligned,
        GROUPS=next_power(groups.tasks + 2),
        WIDTH=next_power(width),
        BLOCK_M=launch.block_m,
        BLOCK_R=launch.block_r,
        BLOCK_K=launch.block_k,
        PRECISION=dot_precision(x.dtype),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )


def gather_expand(
    h: Tensor,
    b: Tensor,
    y: Tensor,
    groups: RowGroups,
    low: int,
    aligned: bool,
    accumulate: bool,
    dropout: tuple[Tensor, int, float] | None = None,
    bias: Tensor | None = None,
    launch: ExpandLaunch | None = None,
) -> None:
    """Add the update (and the bias) to y in place, or store it there.

    Args:
        h: (m, C), rows strided; ``b``: (r, n), the columns [low, low + r) of the group's R.
        y: (m, n), rows strided; ``accumulate``: add to what y holds.
        groups, aligned: as for :func:`gather_shrink`.
        dropout: seed (one int64 on h's device), threshold, scale; the mask of y's elements.
        bias: (n,) or None.
        launch: the blocks; by default ``launch.gather_expand_launch`` chooses.
    """
    (m, width), (r, n) = h.shape, b.shape
    if m == 0 or n == 0:
        return
    launch = launch or gather_expand_launch(m, n, min(width, r), h.dtype)
    seed, threshold, scale = dropout or (None, 0, 1.0)
    tiles = most_tiles(m, groups.tasks, launch.block_m)
    gather_expand_kernel[(tiles * ceil_div(n, launch.block_n),)](
        p_h=h,
        p_b=b,
        p_y=y,
        p_bias=bias,
        p_columns=groups.columns,
        p_rows=groups.rows,
        p_starts=groups.starts,
        p_seed=seed,
        n=n,
        r=r,
        width=width,
        low=low,
        tasks=groups.tasks,
        stride_h=h.stride(0),
        stride_b=b.stride(0),
        stride_y=y.stride(0),
        threshold=threshold,
        scale=scale,
        ACCUMULATE=accumulate,
        ALIGNED=aligned,
        GROUPS=next_power(groups.tasks + 2),
        WIDTH=next_power(width),
        BLOCK_M=launch.block_m,
        BLOCK_N=launch.block_n,
        BLOCK_R=launch.block_r,
        PRECISION=dot_precision(h.dtype),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
