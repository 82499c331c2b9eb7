"""Shrink: the gated low-rank activations of a tile of rows, in one read of x.

    S = scale * keep(x) A^T (m, R)      H = gate * S, or 0 where the gate is 0 (m, R)

x (m, k), A (R, k) stacked over experts, gates (T, R) one a rank column, task ids (m,). Fused:
dropout on the load of x, gates at the store, so the dot reads x as it lies in memory. With dropout
the masked tile would be a left operand in registers, which ptxas before 13.3 can overwrite on
Hopper: A keep(x)^T is computed instead. Given dy and B^T, the same kernel makes dS (and dH).
Where R passes one block, a program whose rows have no gate in its columns reads nothing.
"""

import triton
import triton.language as tl
from torch import Tensor

from ckf.kernels.launch import ShrinkLaunch, dot_precision, shrink_launch
from ckf.kernels.triton_common import keep_mask, tile_gates


@triton.jit(do_not_specialize=["tasks", "threshold"])
def shrink_kernel(
    p_x,
    p_a,
    p_gated,
    p_plain,
    p_gates,
    p_ids,
    p_seed,
    m,
    k,
    r,
    tasks,
    stride_x,
    stride_a,
    stride_gated,
    stride_plain,
    threshold,
    scale,
    GATED: tl.constexpr,
    PLAIN: tl.constexpr,
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
    stop = k
    if SKIP:  # no row of the tile has a gate in these columns: not one step
        b_gate = tile_gates(p_gates, p_ids, o_m, o_r, m, r, tasks)
        stop = tl.where(tl.sum((b_gate != 0).to(tl.int32)) > 0, k, 0)

    p_xm = p_x + o_m[:, None] * stride_x
    p_ar = p_a + o_r[:, None].to(tl.int64) * stride_a
    if DROPOUT:
        acc = tl.zeros([BLOCK_R, BLOCK_M], tl.float32)
    else:
        acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for start in range(0, stop, BLOCK_K):
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

    m_out = m_m[:, None] & m_r[None, :]
    if PLAIN:
        p_out = p_plain + o_m[:, None] * stride_plain + o_r[None, :]
        tl.store(p_out, acc.to(p_plain.dtype.element_ty), mask=m_out)
    if GATED:
        b_gate = tile_gates(p_gates, p_ids, o_m, o_r, m, r, tasks)
        gated = tl.where(b_gate != 0, acc * b_gate, 0.0)
        p_out = p_gated + o_m[:, None] * stride_gated + o_r[None, :]
        tl.store(p_out, gated.to(p_gated.dtype.element_ty), mask=m_out)


def shrink(
    x: Tensor,
    a: Tensor,
    column_gates: Tensor,
    task_ids: Tensor,
    gated: Tensor | None = None,
    plain: Tensor | None = None,
    dropout: tuple[Tensor, int, float] | None = None,
    launch: ShrinkLaunch | None = None,
) -> None:
    """Write H into ``gated`` and S into ``plain``, either or both given.

    Args:
        x: (m, k), rows strided; ``a``: (R, k), rows strided.
        column_gates: (T, R) fp32, contiguous; ``task_ids``: (m,) int64.
        gated, plain: (m, R), rows strided.
        dropout: seed (one int64 on x's device), threshold, scale; None: no dropout.
        launch: the blocks; by default ``launch.shrink_launch`` chooses.
    """
    (m, k), r = x.shape, a.shape[0]
    if m == 0 or r == 0:
        return
    launch = launch or shrink_launch(m, k, r, x.dtype, dropout is not None)
    seed, threshold, scale = dropout or (task_ids, 0, 1.0)
    some = plain if gated is None else gated
    grid = (triton.cdiv(m, launch.block_m) * triton.cdiv(r, launch.block_r),)
    shrink_kernel[grid](
        p_x=x,
        p_a=a,
        p_gated=some if gated is None else gated,
        p_plain=some if plain is None else plain,
        p_gates=column_gates,
        p_ids=task_ids,
        p_seed=seed,
        m=m,
        k=k,
        r=r,
        tasks=column_gates.shape[0],
        stride_x=x.stride(0),
        stride_a=a.stride(0),
        stride_gated=0 if gated is None else gated.stride(0),
        stride_plain=0 if plain is None else plain.stride(0),
        threshold=threshold,
        scale=scale,
        GATED=gated is not None,
        PLAIN=plain is not None,
        DROPOUT=dropout is not None,
        SKIP=plain is None and r > launch.block_r,
        BLOCK_M=launch.block_m,
        BLOCK_R=launch.block_r,
        BLOCK_K=launch.block_k,
        PRECISION=dot_precision(x.dtype),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
