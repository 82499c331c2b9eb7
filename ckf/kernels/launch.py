"""Launch configurations of the Triton kernels: plain rules from shapes, no run-time tuning.

float32 products run on the plain cores unless torch allows TF32, and want small blocks. The 16-bit
rules keep every kernel without spills and inside the shared memory of sm_80, sm_90 and sm_100
(tests/kernels/test_triton_compile.py compiles all of them). None was measured on a GPU yet.
"""

from dataclasses import dataclass

import torch

PROGRAMS = 264  # wanted in flight: two for each of an H200's 132 multiprocessors
DENSE_RANK = 128  # up to here all rank columns of a tile are one block
FEWEST_CHUNK_ROWS = 256


@dataclass(frozen=True)
class ShrinkLaunch:
    block_m: int
    block_r: int
    block_k: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class ExpandLaunch:
    """``skip``: look for rank blocks that are all zero."""

    block_m: int
    block_n: int
    block_r: int
    skip: bool
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class OuterLaunch:
    """``chunk``: rows a program sums, a multiple of block_m."""

    block_m: int
    block_r: int
    block_c: int
    chunk: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class GemmLaunch:
    """``group_m``: row tiles that take their column tiles in turn."""

    block_m: int
    block_n: int
    block_k: int
    block_r: int
    group_m: int
    num_warps: int
    num_stages: int


def shrink_launch(m: int, k: int, r: int, dtype: torch.dtype, dropout: bool) -> ShrinkLaunch:
    """Few rows a program where rows are few; blocks of 64 columns to skip where R is large."""
    if dtype == torch.float32:
        return ShrinkLaunch(
            32 if _wide(k) else 16, _power(r, 16, 32), 32, num_warps=4, num_stages=2
        )
    if not _wide(k):
        return ShrinkLaunch(16, _power(r, 16, 32), 64, num_warps=4, num_stages=2)
    block_m = _rows(m)
    block_r = _power(r, 16, DENSE_RANK) if r <= DENSE_RANK else 64
    block_k = 64 if dropout and block_m > 16 else 128  # the mask of a tile lives in registers
    warps = 8 if block_m * block_r == 64 * DENSE_RANK else 4
    return ShrinkLaunch(block_m, block_r, block_k, num_warps=warps, num_stages=3)


def expand_launch(m: int, n: int, r: int, dtype: torch.dtype) -> ExpandLaunch:
    """The rank is the contraction: one or two steps for most calls, so traffic of y decides."""
    skip = r > DENSE_RANK
    if dtype == torch.float32:
        return ExpandLaunch(32, 64, 16, skip, num_warps=4, num_stages=2)
    if not _wide(n):
        return ExpandLaunch(32, 64, 16, skip, num_warps=4, num_stages=2)
    return ExpandLaunch(_rows(m), 128, _power(r, 16, 64), skip, num_warps=4, num_stages=2)


def outer_launch(m: int, r: int, c: int, dtype: torch.dtype) -> OuterLaunch:
    """As many chunks of rows as fill the chip, none shorter than FEWEST_CHUNK_ROWS."""
    warps, stages = 4, 3
    if dtype == torch.float32:
        stages = 2
        block_m, block_r, block_c = 32, _power(r, 16, 32), 32
    elif not _wide(c):
        block_m, block_r, block_c = 32, _power(r, 16, 64), 64
    else:
        block_m, block_r, block_c = 64, _power(r, 64, DENSE_RANK), 128  # 64: the least for wgmma
        warps = 8 if block_r == DENSE_RANK else 4
    blocks = -(-r // block_r) * -(-c // block_c)
    chunks = max(1, min(-(-PROGRAMS // blocks), m // FEWEST_CHUNK_ROWS))
    rows = -(-m // chunks)
    chunk = -(-rows // block_m) * block_m
    return OuterLaunch(block_m, block_r, block_c, chunk, num_warps=warps, num_stages=stages)


def gemm_launch(m: int, n: int, k: int, r: int) -> GemmLaunch:
    """Wide tiles where there are enough of them to fill the chip; 16-bit operands only."""
    block_r = _power(r, 16, 64)
    if -(-m // 128) * -(-n // 256) * 2 >= PROGRAMS:
        return GemmLaunch(128, 256, 64, block_r, group_m=8, num_warps=8, num_stages=3)
    return GemmLaunch(128, 128, 64, block_r, group_m=8, num_warps=4, num_stages=4)


def dot_precision(dtype: torch.dtype) -> str:
    """TF32 products for float32 where torch's own matrix products may use them."""
    tf32 = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return "tf32" if tf32 else "ieee"


def _wide(width: int) -> bool:
    """Whether Triton can load rows of this width 16 bytes at a time; else blocks are small."""
    return width % 16 == 0


def _rows(m: int) -> int:
    """Rows a tile: enough tiles for the chip first, then large tiles."""
    return 16 if m <= 2048 else 32 if m <= 4096 else 64


def _power(value: int, low: int, high: int) -> int:
    """The power of two at or above ``value``, inside [low, high]."""
    return min(max(1 << (max(value, 1) - 1).bit_length(), low), high)
