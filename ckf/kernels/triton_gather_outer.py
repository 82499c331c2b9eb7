"""Gradients of A and B for many rank columns and hard gates: every row is read once.

    out[column] (R, c) = scale * sum over rows i with that column of L[i, slot] keep(X_i)

dB^T = H^T dy and dA = dS^T drop(x) with L compact (m, C). Programs own a column block of one chunk
of the rows grouped by task (triton_groups.py) and go through the tasks in it, one after another: a
task's C columns are summed over its rows, as many as lie in the chunk, and written as the float32
partial number chunk + task. That number is unique, because chunks and tasks rise together, so
(chunks + T) partials hold any mix. A second kernel adds a column's partials, task by task and chunk
by chunk, in that order; columns without a row get exact zeros. No atomics.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ckf.kernels.launch import (
    OuterLaunch,
    ceil_div,
    dot_precision,
    gather_outer_launch,
    next_power,
    reduce_blocks,
)
from ckf.kernels.triton_common import keep_mask
from ckf.kernels.triton_groups import RowGroups, slot_range
from ckf.kernels.triton_launcher import remembered
from ckf.kernels.triton_outer import rank_runs, store_expert


@remembered
@triton.jit(do_not_specialize=["tasks", "low", "threshold"])
def gather_outer_kernel(
    p_l,
    p_x,
    p_part,
    p_columns,
    p_rows,
    p_starts,
    p_seed,
    r,
    c,
    width,
    low,
    tasks,
    chunk,
    stride_l,
    stride_x,
    threshold,
    ALIGNED: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    column_blocks = tl.cdiv(c, BLOCK_C)
    pid, split = tl.program_id(0), tl.program_id(1)
    left = (pid % column_blocks) * BLOCK_C
    block = pid // column_blocks
    o_c = left + tl.arange(0, BLOCK_C)
    m_c = o_c < c
    o_g = tl.arange(0, GROUPS)
    end = tl.load(p_starts + 1 + o_g, mask=o_g < tasks, other=2147483647)
    position = split * chunk
    last = min(position + chunk, tl.load(p_starts + tasks))
    while position < last:
        task = tl.sum((end <= position).to(tl.int32))
        stop = min(tl.load(p_starts + 1 + task), last)
        low_slot, stop_slot = slot_range(p_columns, task, low, r, width, ALIGNED, WIDTH)
        o_s = low_slot + block * BLOCK_R + tl.arange(0, BLOCK_R)
        m_s = o_s < stop_slot
        acc = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
        if low_slot + block * BLOCK_R < stop_slot:
            for start in range(position, stop, BLOCK_M):
                o_i = start + tl.arange(0, BLOCK_M)
                m_m = o_i < stop
                o_m = tl.load(p_rows + o_i, mask=m_m, other=0).to(tl.int64)
                p_lm = p_l + o_m[:, None] * stride_l + o_s[None, :]
                p_xm = p_x + o_m[:, None] * stride_x + o_c[None, :]
                b_l = tl.load(p_lm, mask=m_m[:, None] & m_s[None, :], other=0.0)
                b_x = tl.load(p_xm, mask=m_m[:, None] & m_c[None, :], other=0.0)
                if p_seed is not None:
                    b_keep = keep_mask(o_m, left, p_seed, threshold, BLOCK_C)
                    b_x = tl.where(b_keep, b_x, 0.0)
                acc = tl.dot(tl.trans(b_l), b_x, acc, input_precision=PRECISION)
        p_out = p_part + ((split + task).to(tl.int64) * width + o_s[:, None]) * c + o_c[None, :]
        tl.store(p_out, acc, mask=m_s[:, None] & m_c[None, :])
        position = stop


@remembered
@triton.jit(do_not_specialize=["tasks", "low", "base"])
def gather_reduce_kernel(
    p_part,
    p_out,
    p_slots,
    p_starts,
    c,
    width,
    low,
    base,
    rank,
    tasks,
    chunk,
    stride_slots,
    scale,
    TRANSPOSED: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    rank_blocks = tl.cdiv(rank, BLOCK_R)
    expert, block = tl.program_id(0) // rank_blocks, tl.program_id(0) % rank_blocks
    first = low + expert * rank
    o_j = block * BLOCK_R + tl.arange(0, BLOCK_R)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_i = (o_j < rank)[:, None] & (o_c < c)[None, :]
    o_g = tl.arange(0, GROUPS)
    m_g = o_g < tasks
    slot = tl.load(p_slots + o_g.to(tl.int64) * stride_slots + base + first, mask=m_g, other=-1)
    begin = tl.load(p_starts + o_g, mask=m_g, other=0)
    end = tl.load(p_starts + 1 + o_g, mask=m_g, other=0)
    live = (slot >= 0) & (end > begin)  # an expert's columns are live together, slot by slot
    count = tl.where(live, (end - 1) // chunk - begin // chunk + 1, 0)
    before = tl.cumsum(count, 0) - count
    o_row = (begin // chunk + o_g - before) * width + slot  # of a task's partial i: + i * width
    acc = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for i in tl.range(0, tl.sum(count), num_stages=5):  # four loads under way
        mine = (i >= before) & (i < before + count)
        row = tl.sum(tl.where(mine, o_row + i * width, 0)) + o_j
        p_i = p_part + row.to(tl.int64)[:, None] * c + o_c[None, :]
        acc += tl.load(p_i, mask=m_i, other=0.0)
    invalid = tl.load(p_starts + tasks + 2) > tl.load(p_starts + tasks + 1)
    acc = tl.where(invalid, float("nan"), acc * scale)  # an invalid row is a row of every expert
    store_expert(acc, p_out, first, rank, o_j, o_c, c, TRANSPOSED)


def gather_outer(
    left: Tensor,
    x: Tensor,
    ranks: Sequence[int],
    dtype: torch.dtype,
    transposed: bool,
    groups: RowGroups,
    slots: Tensor,
    low: int,
    aligned: bool,
    dropout: tuple[Tensor, int, float] | None = None,
    launch: OuterLaunch | None = None,
) -> Tensor:
    """``triton_outer.outer`` for a compact left side: the columns [low, low + sum(ranks)).

    Args:
        left: (m, C) compact, rows strided; ``x``: (m, c), rows strided.
        ranks, dtype, transposed: as for ``outer``.
        groups: the rows by task; ``slots``: (T, R) int32, rows strided.
        aligned: every rank is a multiple of 8.
        dropout: seed (one int64 on x's device), threshold, scale; masks x.
        launch: the blocks and the rows a chunk; by default ``launch.gather_outer_launch`` chooses.

    Returns:
        As ``outer``.
    """
    (m, width), c, tasks, r = left.shape, x.shape[1], groups.tasks, sum(ranks)
    out = torch.empty(r * c if transposed else (r, c), dtype=dtype, device=x.device)
    if 0 in (m, r, c):
        return out.zero_()
    expected = -(-width * r // slots.shape[1])  # slots in these columns, if spread evenly
    masked = dropout is not None
    launch = launch or gather_outer_launch(m, expected, c, x.dtype, masked, aligned)
    chunks = ceil_div(m, launch.chunk)
    parts = torch.empty(chunks + tasks, width, c, dtype=torch.float32, device=x.device)
    seed, threshold, scale = dropout or (None, 0, 1.0)
    blocks = ceil_div(min(width, r), launch.block_r) * ceil_div(c, launch.block_c)
    common = {
        "p_part": parts,
        "p_starts": groups.starts,
        "c": c,
        "width": width,
        "tasks": tasks,
        "chunk": launch.chunk,
        "GROUPS": next_power(tasks),
    }
    gather_outer_kernel[(blocks, chunks)](
        p_l=left,
        p_x=x,
        p_columns=groups.columns,
        p_rows=groups.rows,
        p_seed=seed,
        r=r,
        low=low,
        stride_l=left.stride(0),
        stride_x=x.stride(0),
        threshold=threshold,
        ALIGNED=aligned,
        WIDTH=next_power(width),
        BLOCK_M=launch.block_m,
        BLOCK_R=launch.block_r,
        BLOCK_C=launch.block_c,
        PRECISION=dot_precision(x.dtype),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        **common,
    )
    for first, count, rank in rank_runs(ranks):
        block_r, block_c = reduce_blocks(rank)
        gather_reduce_kernel[(count * ceil_div(rank, block_r), ceil_div(c, block_c))](
            p_out=out,
            p_slots=slots,
            low=first,
            base=low,
            rank=rank,
            stride_slots=slots.stride(0),
            scale=scale,
            TRANSPOSED=transposed,
            BLOCK_R=block_r,
            BLOCK_C=block_c,
            num_warps=4,
            **common,
        )
    return out
