"""GEMM with the update inside: y (m, n) = x W^T + bias + H B^T, written once and rounded once.

Forward, the K loop runs over the tiles of (x, W), then over the tiles of (H, B^T), into one float32
accumulator. For dx (m, k) = drop'(dS A) + dy W the update comes first, the dropout mask acts on the
accumulator, then the tiles of (dy, W) follow. Persistent: a program per multiprocessor walks over
tiles, column tiles of a group of row tiles next to each other, so that W's tiles come from L2.
Operands arrive by tensor descriptors (TMA on Hopper), which need 16-byte strides and addresses; the
store is halved along the columns, so that its staging buffer fits beside the pipeline.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ckf.kernels.launch import GemmLaunch, capability, ceil_div, gemm_launch, multiprocessors
from ckf.kernels.triton_common import keep_mask
from ckf.kernels.triton_launcher import remembered

# By compute capability: with a tensor memory accelerator, and shared memory enough for its pipeline
# (12.x has the one without the other).
GPUS = (9, 10)


@remembered
@triton.jit(do_not_specialize=["m", "threshold"])
def gemm_kernel(
    d_x,
    d_w,
    d_h,
    d_b,
    d_y,
    p_bias,
    p_seed,
    m,
    n,
    k,
    r,
    threshold,
    scale,
    DX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    tiles_m, tiles_n = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS):
        group = tile // (GROUP_M * tiles_n)
        height = min(tiles_m - group * GROUP_M, GROUP_M)
        within = tile % (GROUP_M * tiles_n)
        row = (group * GROUP_M + within % height) * BLOCK_M
        column = within // height * BLOCK_N

        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if DX:
            for start in range(0, r, BLOCK_R):
                acc = tl.dot(d_h.load([row, start]), d_b.load([start, column]), acc)
            if p_seed is not None:
                o_m = row + tl.arange(0, BLOCK_M).to(tl.int64)
                b_keep = keep_mask(o_m, column, p_seed, threshold, BLOCK_N)
                acc = tl.where(b_keep, acc * scale, 0.0)
            for start in range(0, k, BLOCK_K):
                acc = tl.dot(d_x.load([row, start]), d_w.load([start, column]), acc)
        else:
            for start in range(0, k, BLOCK_K):
                acc = tl.dot(d_x.load([row, start]), tl.trans(d_w.load([column, start])), acc)
            for start in range(0, r, BLOCK_R):
                acc = tl.dot(d_h.load([row, start]), d_b.load([start, column]), acc)
        if p_bias is not None:
            o_n = column + tl.arange(0, BLOCK_N)
            acc += tl.load(p_bias + o_n, mask=o_n < n, other=0.0).to(tl.float32)[None, :]

        halves = tl.permute(tl.reshape(acc, [BLOCK_M, 2, BLOCK_N // 2]), [0, 2, 1])
        left, right = tl.split(halves)
        d_y.store([row, column], left.to(d_y.dtype))
        d_y.store([row, column + BLOCK_N // 2], right.to(d_y.dtype))


def why_not_gemm(x: Tensor, weight: Tensor, h: Tensor, b: Tensor) -> str | None:
    """None where the kernel takes these operands, of forward or of dx; else the reason."""
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f"dtype {x.dtype}; expected float16 or bfloat16"
    if x.is_cuda and capability(x.device)[0] not in GPUS:
        return f"compute capability {capability(x.device)}; expected 9.x or 10.x"
    if 0 in (*x.shape, *weight.shape, *h.shape):
        return f"an empty operand: x {tuple(x.shape)}, W {tuple(weight.shape)}, H {tuple(h.shape)}"
    n = b.shape[1]
    if n * x.element_size() % 16:
        return f"n is {n}; rows of y need a multiple of 16 bytes"
    for name, tensor in {"x": x, "W": weight, "H": h, "B^T": b}.items():
        bytes_between_rows = tensor.stride(0) * tensor.element_size()
        if tensor.stride(1) != 1 or bytes_between_rows % 16 or tensor.data_ptr() % 16:
            return f"{name} has strides {tensor.stride()}; rows must start at multiples of 16 bytes"
        if tensor.stride(0) < tensor.shape[1]:  # an expanded dy
            return f"{name} has strides {tensor.stride()}; rows must not overlap"
    return None


def gemm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    h: Tensor,
    b: Tensor,
    launch: GemmLaunch | None = None,
) -> Tensor:
    """x W^T + bias + H B^T; ask :func:`why_not_gemm` first.

    Args:
        x: (m, k); ``weight``: (n, k); ``bias``: (n,) or None; ``h``: (m, R); ``b``: (R, n).
        launch: the blocks; by default ``launch.gemm_launch`` chooses.

    Returns:
        (m, n), contiguous.
    """
    launch = launch or gemm_launch(x.shape[0], b.shape[1], h.shape[1])
    return _launch(x, weight, bias, h, b, None, launch, dx=False)


def gemm_dx(
    dy: Tensor,
    weight: Tensor,
    ds: Tensor,
    a: Tensor,
    dropout: tuple[Tensor, int, float] | None = None,
    launch: GemmLaunch | None = None,
) -> Tensor:
    """drop'(dS A) + dy W; ask :func:`why_not_gemm` (dy, W, dS, A) first.

    Args:
        dy: (m, n); ``weight``: (n, k); ``ds``: (m, R); ``a``: (R, k).
        dropout: seed (one int64 on dy's device), threshold, scale; the mask of dS A.
        launch: the blocks; by default ``launch.gemm_launch`` chooses.

    Returns:
        (m, k), contiguous.
    """
    launch = launch or gemm_launch(dy.shape[0], a.shape[1], ds.shape[1], dropout is not None)
    return _launch(dy, weight, None, ds, a, dropout, launch, dx=True)


def _launch(x, weight, bias, h, b, dropout, launch: GemmLaunch, dx: bool) -> Tensor:
    reason = why_not_gemm(x, weight, h, b)
    assert reason is None, reason
    (m, k), r, n = x.shape, h.shape[1], b.shape[1]
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    rows, columns, depth, rank = launch.block_m, launch.block_n, launch.block_k, launch.block_r
    tiles = ceil_div(m, rows) * ceil_div(n, columns)
    programs = multiprocessors(x.device)
    seed, threshold, scale = dropout or (None, 0, 1.0)
    gemm_kernel[(min(programs, tiles),)](
        d_x=TensorDescriptor.from_tensor(x, [rows, depth]),
        d_w=TensorDescriptor.from_tensor(weight, [depth, columns] if dx else [columns, depth]),
        d_h=TensorDescriptor.from_tensor(h, [rows, rank]),
        d_b=TensorDescriptor.from_tensor(b, [rank, columns]),
        d_y=TensorDescriptor.from_tensor(y, [rows, columns // 2]),
        p_bias=bias,
        p_seed=seed,
        m=m,
        n=n,
        k=k,
        r=r,
        threshold=threshold,
        scale=scale,
        DX=dx,
        BLOCK_M=rows,
        BLOCK_N=columns,
        BLOCK_K=depth,
        BLOCK_R=rank,
        GROUP_M=launch.group_m,
        PROGRAMS=programs,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    return y
