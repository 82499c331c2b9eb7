"""Stack: the experts of a group as the other kernels read them, in one launch.

    A (R, k) <- every A_e (r_e, k)     B_l^T (R_l, n_l) <- every B_e (n_l, r_e)     G (T, R) <- G_l

cast to x's dtype on the way (the gates to float32). Torch takes a cat and a cast for A and for the
B of every linear, and one or two launches for the gates: 5 to 10 launches a pass of some 2 us each
on a GPU, forward and again in backward, where the bytes take 1 us. The experts arrive as tuples of
tensors, so that nothing is cached and parameters may be replaced at any time (FSDP2, ``.to()``).
Many experts take a launch for every 32 or so: 51 MB at R 1040, k = n = 4096, where torch moves 119.
"""

import itertools
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ckf.kernels import launch
from ckf.kernels.group import GroupShape
from ckf.kernels.launch import ceil_div
from ckf.kernels.stacks import Stacks
from ckf.kernels.triton_launcher import remembered

ALIGNMENT = 16  # elements: the B of every linear starts where 16-byte loads can
ROWS = 16  # rank columns, or tasks, that a program copies at once
BLOCK = 256  # elements of k or n


@remembered
@triton.jit(do_not_specialize=["tasks"])
def stack_kernel(
    p_as,
    p_bs,
    p_gs,
    p_a,
    p_b,
    p_g,
    tasks,
    K: tl.constexpr,
    R: tl.constexpr,
    EXPERTS: tl.constexpr,
    LAYOUT: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block, item = tl.program_id(0), tl.program_id(1)
    own, part = item % EXPERTS, item // EXPERTS
    p_ae, p_be, p_ge = p_as[0], p_bs[0], p_gs[0]
    rank, first, n, at, stride = 0, 0, 0, 0, 0
    for e in tl.static_range(EXPERTS):  # selected, not branched over: the code stays small
        mine = own == e
        p_ae = tl.where(mine, p_as[e], p_ae)
        p_be = tl.where(mine, p_bs[e], p_be)
        p_ge = tl.where(mine, p_gs[LAYOUT[e][4]] + LAYOUT[e][5], p_ge)
        rank = tl.where(mine, LAYOUT[e][0], rank)
        first = tl.where(mine, LAYOUT[e][1], first)
        n = tl.where(mine, LAYOUT[e][2], n)
        at = tl.where(mine, LAYOUT[e][3], at)
        stride = tl.where(mine, LAYOUT[e][6], stride)
    if ALIGNED:
        rank, first = tl.multiple_of(rank, 8), tl.multiple_of(first, 8)
        n, at = tl.multiple_of(n, 8), tl.multiple_of(at, 8)
    o_c = block * BLOCK + tl.arange(0, BLOCK)
    o_t = block * ROWS + tl.arange(0, ROWS)
    for start in range(0, rank, ROWS):
        o_j = start + tl.arange(0, ROWS)
        m_j = o_j < rank
        if part == 0:  # of A
            m_a = m_j[:, None] & (o_c < K)[None, :]
            o_a = o_j[:, None] * K + o_c[None, :]
            b_a = tl.load(p_ae + o_a, mask=m_a, other=0.0)
            tl.store(p_a + first * K + o_a, b_a.to(p_a.dtype.element_ty), mask=m_a)
        elif part == 1:  # of B, turned
            m_b = (o_c < n)[:, None] & m_j[None, :]
            b_b = tl.load(p_be + o_c[:, None] * rank + o_j[None, :], mask=m_b, other=0.0)
            p_turned = p_b + at + o_j[:, None] * n + o_c[None, :]
            tl.store(p_turned, tl.trans(b_b).to(p_b.dtype.element_ty), mask=tl.trans(m_b))
        else:  # of the gates
            b_gate = tl.load(p_ge + o_t * stride, mask=o_t < tasks, other=0.0).to(tl.float32)
            m_g = (o_t < tasks)[:, None] & m_j[None, :]
            p_gate = p_g + o_t[:, None] * R + first + o_j[None, :]
            tl.store(p_gate, tl.broadcast_to(b_gate[:, None], [ROWS, ROWS]), mask=m_g)


def stack(
    shape: GroupShape,
    gates: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    dtype: torch.dtype,
) -> Stacks:
    """``Stacks.of`` in a launch for every ``launch.STACK_EXPERTS``; that itself for strided or
    unlike experts."""
    if not (launch.STACK_EXPERTS and _alike([*a, *b]) and _alike(gates)):
        return Stacks.of(shape, gates, a, b, dtype)
    rank, k, tasks = shape.columns, a[0].shape[1], gates[0].shape[0]
    heights = tuple([t.shape[0] for t in b])
    parts, views, size = _layout(shape, heights, launch.STACK_EXPERTS)
    new = {"dtype": dtype, "device": a[0].device}
    stacked, flat = torch.empty(rank, k, **new), torch.empty(size, **new)
    columns = torch.empty(tasks, rank, dtype=torch.float32, device=a[0].device)
    for part in parts:
        own = slice(part.first, part.first + len(part.layout))
        blocks = max(ceil_div(max(k, part.widest), BLOCK), ceil_div(tasks, ROWS))
        stack_kernel[(blocks, 3 * len(part.layout))](
            p_as=tuple(a[own]),
            p_bs=tuple(b[own]),
            p_gs=tuple([gates[linear][:, expert:] for linear, expert in part.gates]),
            p_a=stacked[part.column :],
            p_b=flat[part.at :],
            p_g=columns[:, part.column :],
            tasks=tasks,
            K=k,
            R=rank,
            EXPERTS=len(part.layout),
            LAYOUT=part.layout,
            ALIGNED=part.aligned,
            ROWS=ROWS,
            BLOCK=BLOCK,
            num_warps=4,
        )
    return Stacks(stacked, [flat[at : at + r * n].view(r, n) for at, r, n in views], columns)


def _alike(tensors: Sequence[Tensor]) -> bool:
    """All of one dtype, all contiguous."""
    dtype = tensors[0].dtype
    return all([t.dtype is dtype and t.is_contiguous() for t in tensors])


class _Part(NamedTuple):
    """Experts that one launch stacks, in a row.

    layout: per expert: rank, first rank column, n, start in the buffer of all B, linear, column of
    its linear's gates, columns of these; all relative to the part, so that parts of the same ranks
    are one binary. gates: the linears there, and the first expert of each. aligned: all ranks and
    n are multiples of 8.
    """

    first: int
    column: int
    at: int
    gates: tuple[tuple[int, int], ...]
    layout: tuple[tuple[int, ...], ...]
    widest: int
    aligned: bool


@lru_cache(maxsize=256)
def _layout(
    shape: GroupShape, heights: tuple[int, ...], most: int
) -> tuple[list[_Part], list[tuple[int, int, int]], int]:
    """Where everything lies: ``heights`` are the n of every expert's linear; ``most`` of a part.

    Returns:
        The parts, of about as many experts each. Per linear: start in the buffer of all B, R_l,
        n_l. The buffer's length.
    """
    layout, views, column, at = [], [], 0, 0
    for linear, ranks in enumerate(shape.ranks):
        n = heights[len(layout)]
        views.append((at, sum(ranks), n))
        starts = itertools.accumulate(ranks, initial=0)
        for own, (rank, start) in enumerate(zip(ranks, starts, strict=False)):
            layout.append((rank, column + start, n, at + start * n, linear, own, len(ranks)))
        column += sum(ranks)
        at += -(-sum(ranks) * n // ALIGNMENT) * ALIGNMENT
    size = ceil_div(len(layout), ceil_div(len(layout), most))
    parts = [_part(first, layout[first : first + size]) for first in range(0, len(layout), size)]
    return parts, views, at


def _part(first: int, experts: list[tuple[int, ...]]) -> _Part:
    _, column, _, at, linear, _, _ = experts[0]
    gates: dict[int, int] = {}
    for _, _, _, _, own, expert, _ in experts:
        gates.setdefault(own, expert)
    layout = tuple(
        (rank, c - column, n, start - at, own - linear, expert - gates[own], stride)
        for rank, c, n, start, own, expert, stride in experts
    )
    widest = max(n for _, _, n, *_ in experts)
    aligned = all(rank % 8 == 0 and n % 8 == 0 for rank, _, n, *_ in layout)
    return _Part(first, column, at, tuple(gates.items()), layout, widest, aligned)
