"""GEMM with the update inside: y (m, n) = x W^T + bias + H B^T, written once and rounded once.

The K loop runs over the tiles of (x, W), then over the tiles of (H, B^T), into one float32
accumulator. Persistent: a program per multiprocessor walks over tiles, column tiles of a group of
row tiles next to each other, so that W's tiles come from L2. Operands arrive by tensor descriptors
(TMA on Hopper), which need 16-byte strides and addresses; the store is halved along n, so that its
staging buffer fits beside the pipeline. Off by default: the accumulate of triton_expand.py costs
366 / k of the base product in traffic of y, and no measurement says that this one loses less.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ckf.kernels.launch import GemmLaunch, gemm_launch


@triton.jit
def gemm_kernel(
    d_x,
    d_w,
    d_h,
    d_b,
    d_y,
    p_bias,
    m,
    n,
    k,
    r,
    BIAS: tl.constexpr,
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
        for start in range(0, k, BLOCK_K):
            b_x = d_x.load([row, start])
            b_w = d_w.load([column, start])
            acc = tl.dot(b_x, tl.trans(b_w), acc)
        for start in range(0, r, BLOCK_R):
            b_h = d_h.load([row, start])
            b_b = d_b.load([start, column])
            acc = tl.dot(b_h, b_b, acc)
        if BIAS:
            o_n = column + tl.arange(0, BLOCK_N)
            acc += tl.load(p_bias + o_n, mask=o_n < n, other=0.0).to(tl.float32)[None, :]

        halves = tl.permute(tl.reshape(acc, [BLOCK_M, 2, BLOCK_N // 2]), [0, 2, 1])
        left, right = tl.split(halves)
        d_y.store([row, column], left.to(d_y.dtype))
        d_y.store([row, column + BLOCK_N // 2], right.to(d_y.dtype))


def why_not_gemm(x: Tensor, weight: Tensor, h: Tensor, b: Tensor) -> str | None:
    """None where the kernel takes x (m, k), W (n, k), H (m, R), B^T (R, n); else the reason."""
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f"dtype {x.dtype}; expected float16 or bfloat16"
    if x.is_cuda and torch.cuda.get_device_capability(x.device)[0] < 9:
        return "no tensor memory accelerator; expected compute capability 9.0 or later"
    if 0 in (*x.shape, *weight.shape, *h.shape):
        return f"an empty operand: x {tuple(x.shape)}, W {tuple(weight.shape)}, H {tuple(h.shape)}"
    n = weight.shape[0]
    if n * x.element_size() % 16:
        return f"n is {n}; rows of y need a multiple of 16 bytes"
    for name, tensor in {"x": x, "W": weight, "H": h, "B^T": b}.items():
        bytes_between_rows = tensor.stride(0) * tensor.element_size()
        if tensor.stride(1) != 1 or bytes_between_rows % 16 or tensor.data_ptr() % 16:
            return f"{name} has strides {tensor.stride()}; rows must start at multiples of 16 bytes"
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
    reason = why_not_gemm(x, weight, h, b)
    assert reason is None, reason
    (m, k), n, r = x.shape, weight.shape[0], h.shape[1]
    launch = launch or gemm_launch(m, n, k, r)
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    rows, columns, depth, rank = launch.block_m, launch.block_n, launch.block_k, launch.block_r
    tiles = triton.cdiv(m, rows) * triton.cdiv(n, columns)
    programs = _multiprocessors(x.device)
    gemm_kernel[(min(programs, tiles),)](
        d_x=TensorDescriptor.from_tensor(x, [rows, depth]),
        d_w=TensorDescriptor.from_tensor(weight, [columns, depth]),
        d_h=TensorDescriptor.from_tensor(h, [rows, rank]),
        d_b=TensorDescriptor.from_tensor(b, [rank, columns]),
        d_y=TensorDescriptor.from_tensor(y, [rows, columns // 2]),
        p_bias=x if bias is None else bias,
        m=m,
        n=n,
        k=k,
        r=r,
        BIAS=bias is not None,
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


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 3  # the interpreter: more tiles than programs even in small tests
    return torch.cuda.get_device_properties(device).multi_processor_count
