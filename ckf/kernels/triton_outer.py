"""Outer: the gradients of A and B, sums over the rows of a batch, without atomics.

    out (R, c) = scale * L (m, R)^T keep(X (m, c))

dB^T = H^T dy and dA = dS^T drop(x). Programs own a (rank, column) block of one chunk of rows and
write float32 partials (chunks, R, c); a second kernel adds them in the order of the chunks, rounds
once and lays the result out as the experts' gradients lie, B's transposed, so that autograd keeps
them without a copy an expert. X is the right operand, so a masked X reaches the tensor cores
through shared memory. Past two blocks of R, row tiles whose rank block is all zero are skipped.

A launch costs 13 us that depend on no byte (H100): the first loads, and a last wave that nothing
hides. So both gradients of a linear come from one, where nothing masks x (``outer_pair``).
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ckf.kernels.launch import (
    OuterLaunch,
    ceil_div,
    dot_precision,
    outer_launch,
    outer_pair_launch,
    reduce_blocks,
)
from ckf.kernels.triton_common import keep_mask
from ckf.kernels.triton_launcher import remembered


@remembered
@triton.jit(do_not_specialize=["m", "threshold"])
def outer_kernel(
    p_l,
    p_x,
    p_part,
    p_other_l,
    p_other_x,
    p_other_part,
    p_seed,
    m,
    r,
    c,
    chunk,
    stride_l,
    stride_x,
    other_r,
    other_c,
    stride_other_l,
    stride_other_x,
    threshold,
    PAIR: tl.constexpr,
    DROPOUT: tl.constexpr,
    SKIP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid, split = tl.program_id(0), tl.program_id(1)
    if PAIR:
        before = tl.cdiv(r, BLOCK_R) * tl.cdiv(c, BLOCK_C)
        other = pid >= before
        pid = tl.where(other, pid - before, pid)
        p_l, p_x = tl.where(other, p_other_l, p_l), tl.where(other, p_other_x, p_x)
        p_part = tl.where(other, p_other_part, p_part)
        r, c = tl.where(other, other_r, r), tl.where(other, other_c, c)
        stride_l = tl.where(other, stride_other_l, stride_l)
        stride_x = tl.where(other, stride_other_x, stride_x)
    rank_blocks = tl.cdiv(r, BLOCK_R)
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
    add_parts(
        p_part, p_out, tl.program_id(0), tl.program_id(1), c, low, rank, chunks, size, scale,
        TRANSPOSED, BLOCK_R, BLOCK_C,
    )  # fmt: skip


@remembered
@triton.jit(do_not_specialize=["chunks"])
def reduce_pair_kernel(
    p_part,
    p_out,
    p_part_a,
    p_out_a,
    c_b,
    rank_b,
    size_b,
    experts_b,
    c_a,
    rank_a,
    size_a,
    chunks,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Of B's experts, of one rank, and of A behind them."""
    pid = tl.program_id(0)
    rows = experts_b * tl.cdiv(rank_b, BLOCK_R)
    before = rows * tl.cdiv(c_b, BLOCK_C)
    if pid < before:
        add_parts(
            p_part, p_out, pid % rows, pid // rows, c_b, 0, rank_b, chunks, size_b, 1.0,
            True, BLOCK_R, BLOCK_C,
        )  # fmt: skip
    else:
        pid -= before
        rows_a = tl.cdiv(rank_a, BLOCK_R)
        add_parts(
            p_part_a, p_out_a, pid % rows_a, pid // rows_a, c_a, 0, rank_a, chunks, size_a, 1.0,
            False, BLOCK_R, BLOCK_C,
        )  # fmt: skip


@triton.jit
def add_parts(
    p_part, p_out, row, column, c, low, rank, chunks, size, scale,
    TRANSPOSED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Block (row, column) of experts of one rank, whose columns start at ``low``."""
    rank_blocks = tl.cdiv(rank, BLOCK_R)
    first = low + row // rank_blocks * rank
    o_j = row % rank_blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    o_c = column * BLOCK_C + tl.arange(0, BLOCK_C)
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


class Factors(NamedTuple):
    """Of a gradient: left (m, R), x (m, c), ranks (R in all), dtype and whether it is B's."""

    left: Tensor
    x: Tensor
    ranks: Sequence[int]
    dtype: torch.dtype
    transposed: bool

    def sizes(self) -> tuple[int, int, int]:
        """m, R, c."""
        return (*self.left.shape, self.x.shape[1])

    def new(self) -> Tensor:
        _, r, c = self.sizes()
        shape = (r * c,) if self.transposed else (r, c)
        return torch.empty(shape, dtype=self.dtype, device=self.x.device)


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
    own = Factors(left, x, ranks, dtype, transposed)
    (m, r, c), out = own.sizes(), own.new()
    if 0 in (m, r, c):
        return out.zero_()
    launch = launch or outer_launch(m, r, c, x.dtype, dropout is not None)
    parts = _partials([own], launch, dropout)[0]
    scale = 1.0 if dropout is None else dropout[2]
    for low, count, rank in rank_runs(ranks) if transposed else [(0, 1, r)]:
        block_r, block_c = reduce_blocks(rank)
        reduce_kernel[(count * ceil_div(rank, block_r), ceil_div(c, block_c))](
            p_part=parts,
            p_out=out,
            c=c,
            low=low,
            rank=rank,
            chunks=len(parts),
            size=r * c,
            scale=scale,
            TRANSPOSED=transposed,
            BLOCK_R=block_r,
            BLOCK_C=block_c,
            num_warps=4,
        )
    return out


def outer_pair(
    of_b: Factors, of_a: Factors, launch: OuterLaunch | None = None
) -> tuple[Tensor, Tensor]:
    """The gradients of B of one linear and of A of its group.

    One launch, and one for the sums, where both are of one dtype and none is empty, B's experts
    have one rank, and ``outer_pair_launch`` says that it pays; else those of two ``outer``, whose
    sums are in chunks of other sizes.
    """
    (m, r, c), (_, r_a, c_a) = of_b.sizes(), of_a.sizes()
    runs = rank_runs(of_b.ranks)
    if len(runs) != 1 or of_b.x.dtype != of_a.x.dtype or 0 in (m, c, c_a):
        return outer(*of_b), outer(*of_a)
    launch = launch or outer_pair_launch(m, r, c, r_a, c_a, of_b.x.dtype)
    if launch is None:
        return outer(*of_b), outer(*of_a)
    parts, parts_a = _partials([of_b, of_a], launch)
    out, out_a = of_b.new(), of_a.new()
    ((_, count, rank),) = runs
    block_r, block_c = reduce_blocks(rank)
    blocks = count * ceil_div(rank, block_r) * ceil_div(c, block_c)
    blocks += ceil_div(r_a, block_r) * ceil_div(c_a, block_c)
    reduce_pair_kernel[(blocks,)](
        p_part=parts,
        p_out=out,
        p_part_a=parts_a,
        p_out_a=out_a,
        c_b=c,
        rank_b=rank,
        size_b=r * c,
        experts_b=count,
        c_a=c_a,
        rank_a=r_a,
        size_a=r_a * c_a,
        chunks=len(parts),
        BLOCK_R=block_r,
        BLOCK_C=block_c,
        num_warps=4,
    )
    return out, out_a


def _partials(
    factors: Sequence[Factors],
    launch: OuterLaunch,
    dropout: tuple[Tensor, int, float] | None = None,
) -> list[Tensor]:
    """Of one or two gradients the sums of every chunk of rows: (chunks, R, c)."""
    sizes = [one.sizes() for one in factors]
    chunks = ceil_div(sizes[0][0], launch.chunk)
    parts = [
        torch.empty(chunks, r, c, dtype=torch.float32, device=factors[0].x.device)
        for _, r, c in sizes
    ]
    blocks = sum(ceil_div(r, launch.block_r) * ceil_div(c, launch.block_c) for _, r, c in sizes)
    first, other, pair = factors[0], factors[-1], len(factors) > 1
    (m, r, c), (_, other_r, other_c) = sizes[0], sizes[-1]
    seed, threshold, _ = dropout or (None, 0, 1.0)
    outer_kernel[(blocks, chunks)](
        p_l=first.left,
        p_x=first.x,
        p_part=parts[0],
        p_other_l=other.left if pair else None,
        p_other_x=other.x if pair else None,
        p_other_part=parts[-1] if pair else None,
        p_seed=seed,
        m=m,
        r=r,
        c=c,
        chunk=launch.chunk,
        stride_l=first.left.stride(0),
        stride_x=first.x.stride(0),
        other_r=other_r,
        other_c=other_c,
        stride_other_l=other.left.stride(0),
        stride_other_x=other.x.stride(0),
        threshold=threshold,
        PAIR=pair,
        DROPOUT=dropout is not None,
        SKIP=max(r, other_r) > 2 * launch.block_r,  # looking costs the loads their overlap
        BLOCK_M=launch.block_m,
        BLOCK_R=launch.block_r,
        BLOCK_C=launch.block_c,
        PRECISION=dot_precision(first.x.dtype),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    return parts


def rank_runs(ranks: Sequence[int]) -> list[tuple[int, int, int]]:
    """(first column, experts, rank) of every run of experts of one rank: a launch each."""
    runs, low = [], 0
    for rank, members in itertools.groupby(ranks):
        count = len(list(members))
        if rank:
            runs.append((low, count, rank))
        low += count * rank
    return runs
