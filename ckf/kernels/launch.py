"""Launch configurations of the Triton kernels: plain rules from shapes, no run-time tuning.

float32 products run on the plain cores unless torch allows TF32, and want small blocks. The 16-bit
rules keep every kernel without spills and inside the shared memory of sm_80, sm_90 and sm_100
(tests/kernels/test_triton_compile.py compiles all of them). The dense shrink with dropout, expand
and outer are as measured on an H100 (benchmarks/bench_kernels.py); the rest is by arithmetic.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

MULTIPROCESSORS = 132  # an H200's
PROGRAMS = 2 * MULTIPROCESSORS  # wanted in flight
DENSE_RANK = 128  # up to here all rank columns of a tile are one block; past it tiles gather theirs
STACK_EXPERTS = 32  # that one launch stacks at most; 0: torch's cat
FEWEST_CHUNK_ROWS = 256
FEWEST_SPLIT_COLUMNS = 256
MOST_SPLIT = 4  # beyond, writing and adding the sums costs more than the programs save
FEWEST_SPLIT_TILES = 32  # as measured; fewer fill the chip once
CALLS = 1024  # of which a rule remembers its answer: packed steps bring a new m each

# How the base gets under the update; LOG.md has the bytes of each. "expand": cuBLAS writes the
# base, the expand adds in place. "addmm": the expand stores, cuBLAS adds the base in place (as dx
# always does; two bytes an element less to read in the expand, which cuBLAS can hide).
# "gemm": one product for both, of y and of dx, where operands are aligned and H is dense: csrc's on
# Hopper (hopper.py), which can make H and dS as well, else triton_gemm.py; else as "expand".
PLANS = ("expand", "addmm", "gemm")
CUDA_PLANS = ("update", "linear")  # of the "cuda" backend: decode.py


@dataclass(frozen=True)
class ShrinkLaunch:
    """``split``: programs that share k."""

    block_m: int
    block_r: int
    block_k: int
    num_warps: int
    num_stages: int
    split: int = 1


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


@lru_cache(maxsize=CALLS)
def shrink_launch(m: int, k: int, r: int, dtype: torch.dtype, dropout: bool) -> ShrinkLaunch:
    """Tiles of 64 rows, k split where they are too few for one on every multiprocessor (with
    dropout for two, MOST_SPLIT parts at most); blocks of 64 columns where R is large.

    Without dropout blocks of 64 of k in four stages were up to 8% faster on an H100 (18% at k 576),
    but some of their forms spill; "gemm" makes that H inside the product.

    A tile reads all of A from the L2 cache, R / BLOCK_M of the bytes of x. At m 2048, k 4096, R 80
    tiles of 16 rows fill the chip but read 84 MB of A for 17 MB of x; 32 tiles of 64 rows on four
    parts of k read 21 MB, and 5 MB of float32 sums go out and back.
    """
    if dtype == torch.float32:
        return ShrinkLaunch(
            32 if _wide(k) else 16, _power(r, 16, 32), 32, num_warps=4, num_stages=2
        )
    if not _wide(k):
        return ShrinkLaunch(16, _power(r, 16, 32), 64, num_warps=4, num_stages=2)
    block_m = _power(m, 16, 64)
    block_r = _power(r, 16, DENSE_RANK) if r <= DENSE_RANK else 64
    block_k = 64 if dropout and block_m > 16 else 128  # the mask of a tile lives in registers
    warps = 8 if block_m * block_r == 64 * DENSE_RANK else 4
    if dropout and r % 16 and warps == 8:  # stores one by one: their offsets need the registers
        block_m = 32
    tiles = ceil_div(m, block_m) * ceil_div(r, block_r)
    programs, stages = MULTIPROCESSORS, 3
    if dropout:  # half the shared memory: two run at a time
        stages = 4
        if tiles >= FEWEST_SPLIT_TILES:
            programs = min(PROGRAMS, MOST_SPLIT * tiles)
    split = max(1, min(programs // tiles, k // FEWEST_SPLIT_COLUMNS))
    return ShrinkLaunch(block_m, block_r, block_k, num_warps=warps, num_stages=stages, split=split)


@lru_cache(maxsize=CALLS)
def expand_launch(m: int, n: int, r: int, dtype: torch.dtype) -> ExpandLaunch:
    """The rank is the contraction: a few steps for most calls, so traffic of y decides.

    A tile reads its columns of B from the L2 cache: tiles of 64 rows wherever they are enough, also
    because WGMMA starts there. At m 2048, n 4096, R 80 tiles of 16 rows read 84 MB for 17 MB of y.
    """
    skip = r > DENSE_RANK
    if dtype == torch.float32:
        return ExpandLaunch(32, 64, 16, skip, num_warps=4, num_stages=2)
    if not _wide(n):
        return ExpandLaunch(32, 64, 16, skip, num_warps=4, num_stages=2)
    many = ceil_div(m, 64) * ceil_div(n, 128) >= 4 * MULTIPROCESSORS  # as many as run at a time
    block_m = 64 if many else _rows(m)
    return ExpandLaunch(block_m, 128, _power(r, 16, 32), skip, num_warps=4, num_stages=3)


@lru_cache(maxsize=CALLS)
def outer_launch(m: int, r: int, c: int, dtype: torch.dtype, dropout: bool) -> OuterLaunch:
    """As many chunks of rows as fit on the chip, none shorter than FEWEST_CHUNK_ROWS.

    One program with four stages on a multiprocessor where that leaves two chunks and more, else
    (and with dropout) two with three.
    """
    warps, stages, programs = 4, 3, PROGRAMS
    if dtype == torch.float32:
        stages = 2
        block_m, block_r, block_c = 32, _power(r, 16, 32), 32
    elif not _wide(c):
        block_m, block_r, block_c = 32, _power(r, 16, 64), 64
    else:
        block_m, block_r, block_c = 64, _power(r, 64, DENSE_RANK), 128  # 64: the least for wgmma
        warps = 8  # with 4 Triton 3.6 spills for sm_100
        if ceil_div(r, block_r) * ceil_div(c, block_c) * 2 <= MULTIPROCESSORS and not dropout:
            stages, programs = 4, MULTIPROCESSORS
    chunk = _chunk(m, ceil_div(r, block_r) * ceil_div(c, block_c), block_m, programs)
    return OuterLaunch(block_m, block_r, block_c, chunk, num_warps=warps, num_stages=stages)


@lru_cache(maxsize=CALLS)
def outer_pair_launch(
    m: int, r: int, c: int, other_r: int, other_c: int, dtype: torch.dtype
) -> OuterLaunch | None:
    """As an outer of both, (r, c) and (other_r, other_c), side by side.

    None where the busiest multiprocessor has fewer rows to sum with one after the other (with
    unlike widths the tiles of both may fill the chip badly), and in 16 bits for widths that are no
    multiple of 16, whose code for both spills.
    """
    if dtype != torch.float32 and not (_wide(c) and _wide(other_c)):
        return None
    alone = outer_launch(m, r, c, dtype, False), outer_launch(m, other_r, other_c, dtype, False)
    blocks = outer_launch(m, max(r, other_r), c + other_c, dtype, False)

    def tiles(launch: OuterLaunch, r: int, c: int) -> int:
        return ceil_div(r, launch.block_r) * ceil_div(c, launch.block_c)

    def busiest(launch: OuterLaunch, tiles: int) -> int:
        return ceil_div(tiles * ceil_div(m, launch.chunk), MULTIPROCESSORS) * launch.chunk

    both = tiles(blocks, r, c) + tiles(blocks, other_r, other_c)
    programs = MULTIPROCESSORS if blocks.num_stages > 3 else PROGRAMS
    chunk = _chunk(m, both, blocks.block_m, programs)
    narrow = blocks.block_r == 64  # three stages of it spill for sm_100 under Triton 3.6
    pair = replace(blocks, chunk=chunk, num_stages=4 if narrow else blocks.num_stages)
    in_turn = busiest(alone[0], tiles(alone[0], r, c))
    in_turn += busiest(alone[1], tiles(alone[1], other_r, other_c))
    return pair if busiest(pair, both) <= in_turn else None


def _chunk(m: int, blocks: int, block_m: int, programs: int = PROGRAMS) -> int:
    """Rows a program sums, where each chunk of them takes ``blocks`` programs: not past a wave."""
    chunks = max(1, min(programs // blocks, m // FEWEST_CHUNK_ROWS))
    return ceil_div(ceil_div(m, chunks), block_m) * block_m


@lru_cache(maxsize=CALLS)
def gather_shrink_launch(
    m: int, k: int, width: int, dtype: torch.dtype, dropout: bool
) -> ShrinkLaunch:
    """``width``: the slots of a task, so A's share of the traffic is small for small tiles too."""
    if dtype == torch.float32:
        return ShrinkLaunch(16, _power(width, 16, 32), 32, num_warps=4, num_stages=2)
    if not _wide(k):
        return ShrinkLaunch(16, _power(width, 16, 32), 64, num_warps=4, num_stages=2)
    block_m, block_r = _rows(m), _power(width, 16, DENSE_RANK)
    block_k = 64 if block_r == DENSE_RANK or (dropout and block_m > 16) else 128
    warps = 8 if block_m * block_r == 64 * DENSE_RANK else 4
    return ShrinkLaunch(block_m, block_r, block_k, num_warps=warps, num_stages=3)


@lru_cache(maxsize=CALLS)
def gather_expand_launch(m: int, n: int, width: int, dtype: torch.dtype) -> ExpandLaunch:
    """As the dense expand's, in two stages; nothing to skip."""
    return replace(expand_launch(m, n, width, dtype), skip=False, num_stages=2)


@lru_cache(maxsize=CALLS)
def gather_outer_launch(
    m: int, width: int, c: int, dtype: torch.dtype, dropout: bool, aligned: bool
) -> OuterLaunch:
    """As the dense outer's, in rank blocks that fit a task's slots.

    Five stages: the row index is loaded before the rows, which takes two of them, so that two
    tiles of x are in flight; one with four, where registers do not allow it.
    """
    launch = outer_launch(m, width, c, dtype, dropout)
    if dtype == torch.float32:
        return replace(launch, block_m=16)
    if not _wide(c):
        return launch
    block_r = _power(width, 16, DENSE_RANK)
    # warps and stages: what Triton 3.6, 3.8 and 3.9 compile without spills for all three GPUs
    narrow, full = block_r == 16, block_r == DENSE_RANK
    block_m = 32 if narrow else launch.block_m
    block_c = 64 if full else 128
    chunk = _chunk(m, ceil_div(width, block_r) * ceil_div(c, block_c), block_m)
    warps = 8 if full or (narrow and dropout) else 4
    stages = 4 if (full and aligned) or (narrow and not dropout) else 5
    return OuterLaunch(block_m, block_r, block_c, chunk, num_warps=warps, num_stages=stages)


@lru_cache(maxsize=CALLS)
def reduce_blocks(rank: int) -> tuple[int, int]:
    """Rank columns and linear columns of a program that adds up an outer's partials."""
    block_r = _power(rank, 1, 16)
    return block_r, 512 // block_r  # 16 bytes a thread, and programs enough for the chip


@lru_cache(maxsize=CALLS)
def gemm_launch(m: int, n: int, r: int, dropout: bool = False) -> GemmLaunch:
    """Wide tiles where there are enough of them to fill the chip; 16-bit operands only."""
    block_r = _power(r, 16, 64)
    if dropout:  # the mask of a tile lives in registers beside the accumulator
        return GemmLaunch(128, 128, 64, block_r, group_m=8, num_warps=8, num_stages=4)
    if ceil_div(m, 128) * ceil_div(n, 256) * 2 >= PROGRAMS:
        return GemmLaunch(128, 256, 64, block_r, group_m=8, num_warps=8, num_stages=3)
    return GemmLaunch(128, 128, 64, block_r, group_m=8, num_warps=4, num_stages=4)


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """Programs of a persistent kernel."""
    if device.type != "cuda":
        return 3  # the interpreter: more tiles than programs even in small tests
    return torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a GPU."""
    return torch.cuda.get_device_capability(device)


def dot_precision(dtype: torch.dtype) -> str:
    """TF32 products for float32 where torch's own matrix products may use them."""
    # the older getters raise once a program has set the precision by this newer name
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def _wide(width: int) -> bool:
    """Whether Triton can load rows of this width 16 bytes at a time; else blocks are small."""
    return width % 16 == 0


def _rows(m: int) -> int:
    """Rows a tile: enough tiles for the chip first, then large tiles."""
    return 16 if m <= 2048 else 32 if m <= 4096 else 64


def _power(value: int, low: int, high: int) -> int:
    """The power of two at or above ``value``, inside [low, high]."""
    return min(max(next_power(value), low), high)


# As triton.cdiv and triton.next_power_of_2, which take 3 us on the host: they also run in kernels.


def ceil_div(size: int, block: int) -> int:
    """Blocks that cover ``size``."""
    return -(-size // block)


def next_power(value: int) -> int:
    """The power of two at or above ``value``; 1 below 1."""
    return 1 << (max(value, 1) - 1).bit_length()
