"""Shrink: the gated low-rank activations of a tile of rows, in one read of x.

    S = scale * keep(x) A^T (m, R)      H = gate * S, or 0 where the gate is 0 (m, R)

x (m, k), A (R, k) stacked over experts, gates (T, R) one a rank column, task ids (m,). Fused:
dropout on the load of x, gates at the store, so the dot reads x as it lies in memory. With dropout
the masked tile would be a left operand in registers, which ptxas before 13.3 can overwrite on
Hopper: A keep(x)^T is computed instead. Given dy and B^T, the same kernel makes dS (and dH).
The same launch packs H into the compact form that is saved (slots.py), or in backward restores the
dense H from what was saved. Few rows split k over programs; their float32 sums are added in a fixed
order by a second kernel. Where R passes one block, a program without a gate reads nothing.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ckf.kernels.launch import ShrinkLaunch, ceil_div, dot_precision, shrink_launch
from ckf.kernels.triton_common import keep_mask, tile_gates, tile_slots
from ckf.kernels.triton_launcher import remembered


@triton.jit
def store_tile(
    acc,
    o_m,
    o_r,
    p_gated,
    p_plain,
    p_packed,
    p_saved,
    p_restored,
    p_gates,
    p_slots,
    p_ids,
    m,
    r,
    tasks,
    stride_gated,
    stride_plain,
    stride_packed,
    stride_saved,
    stride_restored,
    stride_gates,
    stride_slots,
):
    """Store what is asked for of S (rows, columns): S, H, packed H; and H as it was saved."""
    m_out = (o_m < m)[:, None] & (o_r < r)[None, :]
    if p_plain is not None:
        p_out = p_plain + o_m[:, None] * stride_plain + o_r[None, :]
        tl.store(p_out, acc.to(p_plain.dtype.element_ty), mask=m_out)
    b_gate = tile_gates(p_gates, p_ids, o_m, o_r, m, r, tasks, stride_gates)
    gated = tl.where(b_gate != 0, acc * b_gate, 0.0)
    if p_gated is not None:
        p_out = p_gated + o_m[:, None] * stride_gated + o_r[None, :]
        tl.store(p_out, gated.to(p_gated.dtype.element_ty), mask=m_out)
    if p_slots is not None:
        b_slot = tile_slots(p_slots, p_ids, o_m, o_r, m, r, tasks, stride_slots)
        m_slot = m_out & (b_slot >= 0)
    if p_packed is not None:
        p_out = p_packed + o_m[:, None] * stride_packed + b_slot
        tl.store(p_out, gated.to(p_packed.dtype.element_ty), mask=m_slot)
    if p_restored is not None:
        if p_slots is not None:
            b_h = tl.load(p_saved + o_m[:, None] * stride_saved + b_slot, mask=m_slot, other=0.0)
            b_h = tl.where(b_gate != b_gate, b_gate, b_h.to(tl.float32))  # invalid ids: NaN
        else:
            b_s = tl.load(p_saved + o_m[:, None] * stride_saved + o_r[None, :], mask=m_out)
            b_h = tl.where(b_gate != 0, b_s.to(tl.float32) * b_gate, 0.0)
        p_out = p_restored + o_m[:, None] * stride_restored + o_r[None, :]
        tl.store(p_out, b_h.to(p_restored.dtype.element_ty), mask=m_out)


@remembered
@triton.jit(do_not_specialize=["m", "tasks", "threshold"])
def shrink_kernel(
    p_x,
    p_a,
    p_part,
    p_gated,
    p_plain,
    p_packed,
    p_saved,
    p_restored,
    p_gates,
    p_slots,
    p_ids,
    p_seed,
    m,
    k,
    r,
    tasks,
    part,
    stride_x,
    stride_a,
    stride_gated,
    stride_plain,
    stride_packed,
    stride_saved,
    stride_restored,
    stride_gates,
    stride_slots,
    threshold,
    scale,
    DROPOUT: tl.constexpr,
    SKIP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    column_blocks = tl.cdiv(r, BLOCK_R)
    pid = tl.program_id(0)
    o_m = (pid // column_blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_r = (pid % column_blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_m, m_r = o_m < m, o_r < r
    first, stop = 0, k
    if p_part is not None:
        first = tl.program_id(1) * part
        stop = min(first + part, k)
    if SKIP:  # no row of the tile has a gate in these columns: not one step
        b_gate = tile_gates(p_gates, p_ids, o_m, o_r, m, r, tasks, stride_gates)
        stop = tl.where(tl.sum((b_gate != 0).to(tl.int32)) > 0, stop, first)

    p_xm = p_x + o_m[:, None] * stride_x
    p_ar = p_a + o_r[:, None].to(tl.int64) * stride_a
    if DROPOUT:
        acc = tl.zeros([BLOCK_R, BLOCK_M], tl.float32)
    else:
        acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for start in range(first, stop, BLOCK_K):
        o_k = start + tl.arange(0, BLOCK_K)
        m_k = o_k < k
        b_x = tl.load(p_xm + o_k[None, :], mask=m_m[:, None] & m_k[None, :], other=0.0)
        b_a = tl.load(p_ar + o_k[None, :], mask=m_r[:, None] & m_k[None, :], other=0.0)
        if DROPOUT:
            b_keep = keep_mask(o_m, start, p_seed, threshold, BLOCK_K)
            b_x = tl.where(b_keep, b_x, 0.0)
            acc = tl.dot(b_a, tl.trans(b_x), acc, input_precision=PRECISION)
        else:
            acc = tl.dot(b_x, tl.trans(b_a), acc, input_precision=PRECISION)
    if DROPOUT:
        acc = tl.trans(acc) * scale

    if p_part is not None:
        p_out = p_part + (tl.program_id(1).to(tl.int64) * m + o_m[:, None]) * r + o_r[None, :]
        tl.store(p_out, acc, mask=m_m[:, None] & m_r[None, :])
    else:
        store_tile(
            acc,
            o_m,
            o_r,
            p_gated,
            p_plain,
            p_packed,
            p_saved,
            p_restored,
            p_gates,
            p_slots,
            p_ids,
            m,
            r,
            tasks,
            stride_gated,
            stride_plain,
            stride_packed,
            stride_saved,
            stride_restored,
            stride_gates,
            stride_slots,
        )


@remembered
@triton.jit(do_not_specialize=["m", "tasks", "parts"])
def shrink_sum_kernel(
    p_part,
    p_gated,
    p_plain,
    p_packed,
    p_saved,
    p_restored,
    p_gates,
    p_slots,
    p_ids,
    m,
    r,
    tasks,
    parts,
    size,
    stride_gated,
    stride_plain,
    stride_packed,
    stride_saved,
    stride_restored,
    stride_gates,
    stride_slots,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    column_blocks = tl.cdiv(r, BLOCK_R)
    pid = tl.program_id(0)
    o_m = (pid // column_blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_r = (pid % column_blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_in = (o_m < m)[:, None] & (o_r < r)[None, :]
    p_i = p_part + o_m[:, None] * r + o_r[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for _ in tl.range(0, parts, num_stages=5):  # four loads under way
        acc += tl.load(p_i, mask=m_in, other=0.0)
        p_i += size
    store_tile(
        acc,
        o_m,
        o_r,
        p_gated,
        p_plain,
        p_packed,
        p_saved,
        p_restored,
        p_gates,
        p_slots,
        p_ids,
        m,
        r,
        tasks,
        stride_gated,
        stride_plain,
        stride_packed,
        stride_saved,
        stride_restored,
        stride_gates,
        stride_slots,
    )


def shrink(
    x: Tensor,
    a: Tensor,
    column_gates: Tensor,
    task_ids: Tensor,
    gated: Tensor | None = None,
    plain: Tensor | None = None,
    dropout: tuple[Tensor, int, float] | None = None,
    slots: Tensor | None = None,
    packed: Tensor | None = None,
    saved: Tensor | None = None,
    restored: Tensor | None = None,
    launch: ShrinkLaunch | None = None,
) -> None:
    """Write H into ``gated`` and S into ``plain``, either or both given.

    Args:
        x: (m, k), rows strided; ``a``: (R, k), rows strided.
        column_gates: (T, R) fp32, rows strided; ``task_ids``: (m,) int64.
        gated, plain: (m, R), rows strided.
        dropout: seed (one int64 on x's device), threshold, scale; None: no dropout.
        slots: (T, R) int32, rows strided: where ``packed`` and ``saved`` hold a column.
        packed: (m, C), gets H in compact form; slots that a row's task has not stay unwritten.
        saved, restored: H (m, R) is written to ``restored`` from ``saved``: the compact H where
            ``slots`` are given, else S.
        launch: the blocks; by default ``launch.shrink_launch`` chooses.
    """
    (m, k), r = x.shape, a.shape[0]
    if m == 0 or r == 0:
        return
    launch = launch or shrink_launch(m, k, r, x.dtype, dropout is not None)
    seed, threshold, scale = dropout or (None, 0, 1.0)
    part = ceil_div(max(k, 1), launch.split * launch.block_k) * launch.block_k
    parts = max(1, ceil_div(k, part))
    sums = torch.empty(parts, m, r, dtype=torch.float32, device=x.device) if parts > 1 else None
    common = {
        "p_part": sums,
        "p_gated": gated,
        "p_plain": plain,
        "p_packed": packed,
        "p_saved": saved,
        "p_restored": restored,
        "p_gates": column_gates,
        "p_slots": slots,
        "p_ids": task_ids,
        "m": m,
        "r": r,
        "tasks": column_gates.shape[0],
        "stride_gated": _stride(gated),
        "stride_plain": _stride(plain),
        "stride_packed": _stride(packed),
        "stride_saved": _stride(saved),
        "stride_restored": _stride(restored),
        "stride_gates": column_gates.stride(0),
        "stride_slots": _stride(slots),
    }
    grid = (ceil_div(m, launch.block_m) * ceil_div(r, launch.block_r), parts)
    shrink_kernel[grid](
        p_x=x,
        p_a=a,
        p_seed=seed,
        k=k,
        part=part,
        stride_x=x.stride(0),
        stride_a=a.stride(0),
        threshold=threshold,
        scale=scale,
        DROPOUT=dropout is not None,
        SKIP=plain is None and r > launch.block_r,
        BLOCK_M=launch.block_m,
        BLOCK_R=launch.block_r,
        BLOCK_K=launch.block_k,
        PRECISION=dot_precision(x.dtype),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        **common,
    )
    if sums is not None:
        grid = (ceil_div(m, 16) * ceil_div(r, 32),)
        shrink_sum_kernel[grid](
            parts=parts, size=m * r, BLOCK_M=16, BLOCK_R=32, num_warps=4, **common
        )


def _stride(rows: Tensor | None) -> int:
    return 0 if rows is None else rows.stride(0)
