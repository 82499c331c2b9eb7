"""Outer: the gradients of A and B, sums over the rows of a batch, without atomics.

    out (R, c) = scale * L (m, R)^T keep(X (m, c))

dB^T = H^T dy and dA = dS^T drop(x). Programs own a (rank, column) block of one chunk of rows and
write float32 partials (chunks, R, c); a second kernel adds them in the order of the chunks, rounds
once and lays the result out as the experts' gradients lie, B's transposed, so that autograd keeps
them without a copy an expert. X is the right operand, so a masked X reaches the tensor cores
through shared memory. Past two blocks of R, row tiles whose rank block is all zero are skipped.
"""

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ckf.kernels.launch import OuterLaunch, ceil_div, dot_precision, outer_launch, reduce_blocks
from ckf.kernels.triton_common import keep_mask
from ckf.kernels.triton_launcher import remembered


@remembered
@triton.jit(do_not_specialize=["m", "threshold"])
def outer_kernel(
    p_l,
    p_x,
    p_part,
    p_seed,
    m,
    r,
    c,
    chunk,
    stride_l,
    stride_x,
    threshold,
    DROPOUT: tl.constexpr,
    SKIP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    rank_blocks = tl.cdiv(r, BLOCK_R)
    pid, split = tl.program_id(0), tl.program_id(1)
    o_r = (pid % rank_blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    first = (pid // rank_blocks) * BLOCK_C
    o_c = first + tl.arange(0, BLOCK_C)
    m_r, m_c = o_r < r, o_c < c
    row = split.to(tl.int64) * chunk

    acc = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for start in range(0, chunk, BLOCK_M):
        o_m = row + start + tl.arange(0, BLOCK_M)
        m_m = o_m < m
        p_lm = p_l + o_m[:, None] * stride_l + o_r[None, :]
        p_xm = p_x + o_m[:, None] * stride_x + o_c[None, :]
        b_l = tl.load(p_lm, mask=m_m[:, None] & m_r[None, :], other=0.0)
        live = True
        if SKIP:
            live = tl.sum((b_l != 0).to(tl.int32)) > 0
        if live:
            b_x = tl.load(p_xm, mask=m_m[:, None] & m_c[None, :], other=0.0)
            if DROPOUT:
                b_keep = keep_mask(o_m, first, p_seed, threshold, BLOCK_C)
                b_x = tl.where(b_keep, b_x, 0.0)
            acc = tl.dot(tl.trans(b_l), b_x, acc, input_precision=PRECISION)
    p_out = p_part + (split.to(tl.int64) * r + o_r[:, None]) * c + o_c[None, :]
    tl.store(p_out, acc, mask=m_r[:, None] & m_c[None, :])


@remembered
@triton.jit(do_not_specialize=["low", "chunks"])
def reduce_kernel(
    p_part,
    p_out,
    c,
    low,
    rank,
    chunks,
    size,
    scale,
    TRANSPOSED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    rank_blocks = tl.cdiv(rank, BLOCK_R)
    expert, block = tl.program_id(0) // rank_blocks, tl.program_id(0) % rank_blocks
    first = low + expert * rank
    o_j = block * BLOCK_R + tl.arange(0, BLOCK_R)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_i = (o_j < rank)[:, None] & (o_c < c)[None, :]
    p_i = p_part + (first + o_j).to(tl.int64)[:, None] * c + o_c[None, :]
    acc = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for _ in tl.range(0, chunks, num_stages=5):  # four loads under way
        acc += tl.load(p_i, mask=m_i, other=0.0)
        p_i += size
    store_expert(acc * scale, p_out, first, rank, o_j, o_c, c, TRANSPOSED)


@triton.jit
def store_expert(acc, p_out, first, rank, o_j, o_c, c, TRANSPOSED: tl.constexpr):
    """Rows ``o_j`` of the expert whose columns start at ``first``: (rank, c), or (c, rank)."""
    p_out += first.to(tl.int64) * c
    m_i = (o_j < rank)[:, None] & (o_c < c)[None, :]
    if TRANSPOSED:
        p_i = p_out + o_c.to(tl.int64)[:, None] * rank + o_j[None, :]
        tl.store(p_i, tl.trans(acc).to(p_out.dtype.element_ty), mask=tl.trans(m_i))
    else:
        p_i = p_out + o_j.to(tl.int64)[:, None] * c + o_c[None, :]
        tl.store(p_i, acc.to(p_out.dtype.element_ty), mask=m_i)


def outer(
    left: Tensor,
    x: Tensor,
    ranks: Sequence[int],
    dtype: torch.dtype,
    transposed: bool,
    dropout: tuple[Tensor, int, float] | None = None,
    launch: OuterLaunch | None = None,
) -> Tensor:
    """left^T x, summed in float32 in a fixed order.

    Args:
        left: (m, R), rows strided; ``x``: (m, c), rows strided.
        ranks: of the experts, R in all.
        dtype: of the result.
        transposed: gradients of B.
        dropout: seed (one int64 on x's device), threshold, scale; masks x.
        launch: the blocks and the rows a chunk; by default ``launch.outer_launch`` chooses.

    Returns:
        (R, c); if transposed (R * c,), the (c, r_e) of the experts one after the other.
    """
    (m, r), c = left.shape, x.shape[1]
    out = torch.empty(r * c if transposed else (r, c), dtype=dtype, device=x.device)
    if 0 in (m, r, c):
        return out.zero_()
    launch = launch or outer_launch(m, r, c, x.dtype, dropout is not None)
    chunks = ceil_div(m, launch.chunk)
    parts = torch.empty(chunks, r, c, dtype=torch.float32, device=x.device)
    seed, threshold, scale = dropout or (None, 0, 1.0)
    blocks = ceil_div(r, launch.block_r) * ceil_div(c, launch.block_c)
    outer_kernel[(blocks, chunks)](
        p_l=left,
        p_x=x,
        p_part=parts,
        p_seed=seed,
        m=m,
        r=r,
        c=c,
        chunk=launch.chunk,
        stride_l=left.stride(0),
        stride_x=x.stride(0),
        threshold=threshold,
        DROPOUT=dropout is not None,
        SKIP=r > 2 * launch.block_r,  # looking costs the loads their overlap
        BLOCK_M=launch.block_m,
        BLOCK_R=launch.block_r,
        BLOCK_C=launch.block_c,
        PRECISION=dot_precision(x.dtype),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    for low, count, rank in rank_runs(ranks) if transposed else [(0, 1, r)]:
        block_r, block_c = reduce_blocks(rank)
        reduce_kernel[(count * ceil_div(rank, block_r), ceil_div(c, block_c))](
            p_part=parts,
            p_out=out,
            c=c,
            low=low,
            rank=rank,
            chunks=chunks,
            size=r * c,
            scale=scale,
            TRANSPOSED=transposed,
            BLOCK_R=block_r,
            BLOCK_C=block_c,
            num_warps=4,
        )
    return out


def rank_runs(ranks: Sequence[int]) -> list[tuple[int, int, int]]:
    """(first column, experts, rank) of every run of experts of one rank: a launch each."""
    runs, low = [], 0
    for rank, members in itertools.groupby(ranks):
        count = len(list(members))
        if rank:
            runs.append((low, count, rank))
        low += count * rank
    return runs
