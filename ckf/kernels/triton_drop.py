"""Drop: the dropout of the LoRA input alone, for the dense-gated products on a GPU.

    y (m, k) = scale * keep * x

One read and one write of x (134 MB at m 8192, k 4096 in 16 bits: 31 us on an H200). PyTorch has no
unsigned 64-bit products, so that ``dropout_mask`` takes some 70 passes over int64 tensors of m k
bytes: about 2 ms there, more than the frozen linear.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ckf.kernels.dropout import dropout_scale, dropout_threshold
from ckf.kernels.launch import ceil_div
from ckf.kernels.triton_common import keep_mask
from ckf.kernels.triton_launcher import remembered

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@remembered
@triton.jit(do_not_specialize=["m", "threshold"])
def drop_kernel(
    p_x,
    p_y,
    p_seed,
    m,
    k,
    stride_x,
    threshold,
    scale,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    column_blocks = tl.cdiv(k, BLOCK_K)
    pid = tl.program_id(0)
    o_m = (pid // column_blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = (pid % column_blocks) * BLOCK_K
    o_k = first + tl.arange(0, BLOCK_K)
    m_x = (o_m < m)[:, None] & (o_k < k)[None, :]
    b_x = tl.load(p_x + o_m[:, None] * stride_x + o_k[None, :], mask=m_x, other=0.0)
    b_keep = keep_mask(o_m, first, p_seed, threshold, BLOCK_K)
    b_y = tl.where(b_keep, b_x.to(tl.float32) * scale, 0.0)
    tl.store(p_y + o_m[:, None] * k + o_k[None, :], b_y.to(p_y.dtype.element_ty), mask=m_x)


def drop(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """x with elements dropped and the others scaled, (m, k), contiguous.

    Args:
        x: (m, k) of DTYPES; ``seed``: one int64 on x's device; ``p``: of dropping.
    """
    m, k = x.shape
    if x.stride(1) != 1:
        x = x.contiguous()
    y = torch.empty(m, k, dtype=x.dtype, device=x.device)
    if 0 in (m, k):
        return y
    block_m, block_k = 8, 256
    with torch.cuda.device_of(x):
        drop_kernel[(ceil_div(m, block_m) * ceil_div(k, block_k),)](
            p_x=x,
            p_y=y,
            p_seed=seed,
            m=m,
            k=k,
            stride_x=x.stride(0),
            threshold=dropout_threshold(p),
            scale=dropout_scale(p),
            BLOCK_M=block_m,
            BLOCK_K=block_k,
            num_warps=4,
        )
    return y
