"""Stack: the experts of a group as the other kernels read them, in one launch.

    A (R, k) <- every A_e (r_e, k)     B_l^T (R_l, n_l) <- every B_e (n_l, r_e)     G (T, R) <- G_l

cast to x's dtype on the way (the gates to float32). Torch takes a cat and a cast for A and for the
B of every linear, and one or two launches for the gates: 5 to 10 launches a pass of some 2 us each
on a GPU, forward and again in backward, where the bytes take 1 us. The experts arrive as tuples of
tensors, so that nothing is cached and parameters may be replaced at any time (FSDP2, ``.to()``).
"""

import itertools
from collections.abc import Sequence
from functools import lru_cache

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
    """``Stacks.of`` in one launch; that itself for many experts, for strided or unlike ones."""
    rank, k, tasks = shape.columns, a[0].shape[1], gates[0].shape[0]
    experts = len(a)
    if experts > launch.STACK_EXPERTS or not (_alike([*a, *b]) and _alike(gates)):
        return Stacks.of(shape, gates, a, b, dtype)
    layout, views, size, widest, aligned = _layout(shape, tuple([t.shape[0] for t in b]))
    new = {"dtype": dtype, "device": a[0].device}
    stacked, flat = torch.empty(rank, k, **new), torch.empty(size, **new)
    columns = torch.empty(tasks, rank, dtype=torch.float32, device=a[0].device)
    blocks = max(ceil_div(max(k, widest), BLOCK), ceil_div(tasks, ROWS))
    stack_kernel[(blocks, 3 * experts)](
        p_as=tuple(a),
        p_bs=tuple(b),
        p_gs=tuple(gates),
        p_a=stacked,
        p_b=flat,
        p_g=columns,
        tasks=tasks,
        K=k,
        R=rank,
        EXPERTS=experts,
        LAYOUT=layout,
        ALIGNED=aligned,
        ROWS=ROWS,
        BLOCK=BLOCK,
        num_warps=4,
    )
    return Stacks(stacked, [flat[at : at + r * n].view(r, n) for at, r, n in views], columns)


def _alike(tensors: Sequence[Tensor]) -> bool:
    """All of one dtype, all contiguous."""
    dtype = tensors[0].dtype
    return all([t.dtype is dtype and t.is_contiguous() for t in tensors])


@lru_cache(maxsize=256)
def _layout(shape: GroupShape, heights: tuple[int, ...]):
    """Where everything lies: ``heights`` are the n of every expert's linear.

    Returns:
        Per expert: rank, first rank column, n, start in the buffer of all B, linear, column of its
        linear's gates, columns of these. Per linear: start in the buffer, R_l, n_l. The buffer's
        length. The largest n. Whether all ranks and n are multiples of 8.
    """
    layout, views, expert, column, at = [], [], 0, 0, 0
    for linear, ranks in enumerate(shape.ranks):
        n = heights[expert]
        views.append((at, sum(ranks), n))
        starts = itertools.accumulate(ranks, initial=0)
        for own, (rank, start) in enumerate(zip(ranks, starts, strict=False)):
            layout.append((rank, column + start, n, at + start * n, linear, own, len(ranks)))
        expert, column = expert + len(ranks), column + sum(ranks)
        at += -(-sum(ranks) * n // ALIGNMENT) * ALIGNMENT
    aligned = all(rank % 8 == 0 and n % 8 == 0 for rank, _, n, *_ in layout)
    return tuple(layout), tuple(views), at, max(heights), aligned
