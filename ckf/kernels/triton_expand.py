"""Expand: from the rank columns to the width of the linear, onto y where it lies.

    y (m, n) [+]= [scale * keep *] (H (m, R) B^T (R, n))

Accumulated in float32, rounded at the store. Forward adds to the base's output in place, or stores
the update (and the bias) for cuBLAS to add the base to; for dx, H is dS, B^T is A, the dropout mask
acts on the accumulator and the result is stored (the base's dy W comes on top). Where R passes one
block, blocks of H that are all zero are skipped. Tiles run from the last to the first: what
cuBLAS wrote last, and what it reads first, is then what the L2 cache still holds.
"""

import triton
import triton.language as tl
from torch import Tensor

from ckf.kernels.launch import ExpandLaunch, ceil_div, dot_precision, expand_launch
from ckf.kernels.triton_common import keep_mask
from ckf.kernels.triton_launcher import remembered


@remembered
@triton.jit(do_not_specialize=["m", "threshold"])
def expand_kernel(
    p_h,
    p_b,
    p_y,
    p_bias,
    p_seed,
    m,
    n,
    r,
    stride_h,
    stride_b,
    stride_y,
    threshold,
    scale,
    ACCUMULATE: tl.constexpr,
    DROPOUT: tl.constexpr,
    SKIP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    column_blocks = tl.cdiv(n, BLOCK_N)
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    o_m = (pid // column_blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = (pid % column_blocks) * BLOCK_N
    o_n = first + tl.arange(0, BLOCK_N)
    m_m, m_n = o_m < m, o_n < n

    p_hm = p_h + o_m[:, None] * stride_h
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, r, BLOCK_R):
        o_r = start + tl.arange(0, BLOCK_R)
        m_r = o_r < r
        p_br = p_b + o_r[:, None].to(tl.int64) * stride_b + o_n[None, :]
        b_h = tl.load(p_hm + o_r[None, :], mask=m_m[:, None] & m_r[None, :], other=0.0)
        if SKIP:
            if tl.sum((b_h != 0).to(tl.int32)) > 0:
                b_b = tl.load(p_br, mask=m_r[:, None] & m_n[None, :], other=0.0)
                acc = tl.dot(b_h, b_b, acc, input_precision=PRECISION)
        else:
            b_b = tl.load(p_br, mask=m_r[:, None] & m_n[None, :], other=0.0)
            acc = tl.dot(b_h, b_b, acc, input_precision=PRECISION)

    if DROPOUT:
        acc = tl.where(keep_mask(o_m, first, p_seed, threshold, BLOCK_N), acc * scale, 0.0)
    if p_bias is not None:
        acc += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    m_y = m_m[:, None] & m_n[None, :]
    p_out = p_y + o_m[:, None] * stride_y + o_n[None, :]
    if ACCUMULATE:
        acc += tl.load(p_out, mask=m_y, other=0.0).to(tl.float32)
    tl.store(p_out, acc.to(p_y.dtype.element_ty), mask=m_y)


def expand(
    h: Tensor,
    b: Tensor,
    y: Tensor,
    accumulate: bool,
    dropout: tuple[Tensor, int, float] | None = None,
    bias: Tensor | None = None,
    launch: ExpandLaunch | None = None,
) -> None:
    """Add H B^T + bias to y in place, or store it there.

    Args:
        h: (m, R), rows strided; ``b``: (R, n), B transposed, rows strided.
        y: (m, n), rows strided; ``accumulate``: add to what y holds.
        dropout: seed (one int64 on h's device), threshold, scale; the mask of y's elements.
        bias: (n,) or None.
        launch: the blocks; by default ``launch.expand_launch`` chooses.
    """
    (m, r), n = h.shape, b.shape[1]
    if m == 0 or n == 0 or (r == 0 and accumulate and bias is None):
        return
    launch = launch or expand_launch(m, n, r, h.dtype)
    seed, threshold, scale = dropout or (None, 0, 1.0)
    grid = (ceil_div(m, launch.block_m) * ceil_div(n, launch.block_n),)
    expand_kernel[grid](
        p_h=h,
        p_b=b,
        p_y=y,
        p_bias=bias,
        p_seed=seed,
        m=m,
        n=n,
        r=r,
        stride_h=h.stride(0),
        stride_b=b.stride(0),
        stride_y=y.stride(0),
        threshold=threshold,
        scale=scale,
        ACCUMULATE=accumulate,
        DROPOUT=dropout is not None,
        SKIP=launch.skip,
        BLOCK_M=launch.block_m,
        BLOCK_N=launch.block_n,
        BLOCK_R=launch.block_r,
        PRECISION=dot_precision(h.dtype),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
