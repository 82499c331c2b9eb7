"""Compile the Triton kernels for GPUs that are not here, and say what they use.

The launchers run on meta tensors of realistic shapes under a driver that names a GPU and launches
nothing: Triton specialises, compiles and assembles exactly what it would on that GPU. One JSON
line a kernel: registers, stack (spills), shared memory, the tensor-core instructions in its PTX.

    python -m tests.kernels.triton_compile [80 90 100]

The defect that the register-operand rule keeps away from: ptxas before 13.3 can overwrite the
registers of a WGMMA's left operand while it still runs (github.com/triton-lang/triton/issues/9433).
"""

import itertools
import json
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import triton
from triton import knobs
from triton.runtime.jit import JITFunction

from benchmarks.stub_driver import NamedDriver
from ckf.kernels import triton_launcher
from ckf.kernels.group import GroupShape
from ckf.kernels.launch import (
    DENSE_RANK,
    expand_launch,
    gather_expand_launch,
    gather_outer_launch,
    gather_shrink_launch,
    gemm_launch,
    outer_launch,
    outer_pair_launch,
    shrink_launch,
)
from ckf.kernels.triton_backend import backward_pass, forward_pass
from ckf.kernels.triton_drop import drop
from ckf.kernels.triton_expand import expand
from ckf.kernels.triton_gather import gather_expand, gather_shrink
from ckf.kernels.triton_gather_outer import gather_outer
from ckf.kernels.triton_gemm import gemm, gemm_dx, why_not_gemm
from ckf.kernels.triton_groups import group_rows
from ckf.kernels.triton_outer import Factors, outer, outer_pair
from ckf.kernels.triton_shrink import shrink
from ckf.kernels.triton_stack import stack

ARCHS = (80, 90, 100)
SHARED_LIMIT = {80: 166912, 90: 232448, 100: 232448}  # bytes a program
ROWS = (256, 3072, 8192)
RANKS = (8, 32, 64, 128, 1024)


class Compiler:
    """Turns every launch into a compilation; reports each new kernel once."""

    def __init__(self, report):
        self.report, self.seen, self.arch = report, set(), None
        self._run = JITFunction.run

    def __enter__(self):
        compiler = self

        def run(self, *args, grid, warmup, **kwargs):
            start = time.perf_counter()
            kernel = compiler._run(self, *args, grid=grid, warmup=True, **kwargs)
            key = (compiler.arch, kernel.hash)
            if key not in compiler.seen:
                compiler.seen.add(key)
                seconds = time.perf_counter() - start
                compiler.report(describe(kernel, compiler.arch, kwargs, seconds))
            return kernel

        JITFunction.run = run
        triton_launcher.REMEMBER = False
        return self

    def __exit__(self, *_):
        JITFunction.run = self._run
        triton_launcher.REMEMBER = True

    def target(self, arch: int) -> None:
        self.arch = arch
        triton.runtime.driver.set_active(NamedDriver(arch))


def describe(kernel, arch: int, arguments: dict, seconds: float) -> dict:
    """What a compiled kernel uses; ``stack`` is bytes a thread, so spills where it is not 0."""
    ptx = kernel.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(kernel.asm["cubin"])
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    fields = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", usage)}
    wgmma = left_operands(ptx)
    flags = {k: v for k, v in arguments.items() if k.isupper() or k.startswith("num_")}
    return {
        "arch": arch,
        "kernel": kernel.metadata.name,
        "dtype": element_type(arguments),
        "flags": flags,
        "registers": fields["REG"],
        "stack": fields["STACK"] + fields["LOCAL"],
        "shared": kernel.metadata.shared,
        "wgmma": len(wgmma),
        "wgmma_register_a": sum(first == "{" for first in wgmma),
        "mma": len(re.findall(r"\bmma\.sync", ptx)),
        "tcgen05": len(re.findall(r"tcgen05\.mma", ptx)),
        "tma": len(re.findall(r"cp\.async\.bulk\.tensor", ptx)),
        "ptxas": knobs.nvidia.ptxas.version if arch < 100 else knobs.nvidia.ptxas_blackwell.version,
        "seconds": round(seconds, 2),
    }


def problems(line: dict) -> list[str]:
    """What is wrong with a compiled kernel, in words; nothing for one that may be launched."""
    found = []
    if line["stack"]:
        found.append(f"spills {line['stack']} bytes a thread")
    if line["shared"] > SHARED_LIMIT[line["arch"]]:
        found.append(f"{line['shared']} bytes of shared memory; {SHARED_LIMIT[line['arch']]} fit")
    stages = line["flags"].get("num_stages", 1)
    old = tuple(int(part) for part in line["ptxas"].split(".")[:2]) < (13, 3)
    if line["wgmma_register_a"] and stages >= 2 and old:
        found.append(f"WGMMA with its left operand in registers, ptxas {line['ptxas']}")
    if line["kernel"] == "gemm_kernel" and line["arch"] == 90 and not line["wgmma"]:
        found.append("no WGMMA instruction")
    if line["kernel"] == "gemm_kernel" and not line["tma"]:
        found.append("no bulk tensor copy")
    return found


def left_operands(ptx: str) -> list[str]:
    """First character of every WGMMA's left operand: "{" where it lies in registers."""
    return re.findall(r"wgmma\.mma_async\S*\s+\{[^}]*\},\s*(\S)", ptx)


def element_type(arguments: dict) -> str:
    names = ("p_x", "d_x", "p_h", "p_part", "p_ids", "p_a")
    first = next(arguments[name] for name in names if name in arguments)
    return str(getattr(first, "base", first).dtype).removeprefix("torch.")


def launches(arch: int, tf32: bool = False):
    """Every launch configuration that the rules in launch.py give, as calls on meta tensors.

    sm_90 gets all of them; the others all but those that differ little (middle tiles, float16).
    """
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    hopper = arch == 90
    if tf32:
        cases = [(fp32, 8192, 4096, r) for r in (32, 1024)]
        gathered = [(fp32, 8192, 4096, 32)]
    else:
        rows, ranks = (ROWS, RANKS) if hopper else (ROWS[-1:], RANKS[1::2])
        cases = [
            *itertools.product([bf16], rows, [4096], ranks),
            *itertools.product([bf16], ROWS[1:2], [1024], ranks if hopper else ()),
            *itertools.product([fp32], [8192], [4096], (8, 32, 1024)),
            *itertools.product([bf16, fp32], [8191], [4095], [32]),
            *([(bf16, 8192, 4096, 100), (fp16, 8192, 4096, 128)] if hopper else []),
            (bf16, ROWS[0], 4096, 32),
        ]
        gathered = [
            *itertools.product([bf16], rows, [4096], (32, 128)),
            *itertools.product([bf16], ROWS[1:2], [1024], (32, 128) if hopper else ()),
            *itertools.product([bf16], ROWS[-1:], [4096], (16, 48, 384) if hopper else ()),
            *itertools.product([bf16, fp32], [8191], [4095], [40]),
            (fp32, 8192, 4096, 32),
        ]
    seen = set()
    for (kind, case), dropout_p in itertools.product(
        [*(("dense", c) for c in cases), *(("gathered", c) for c in gathered)], (0.0, 0.1)
    ):
        found = calls if kind == "dense" else gathered_calls
        for key, launch in found(arch, *case, dropout_p):
            if key not in seen:
                seen.add(key)
                yield launch
    if not tf32:
        yield from small_calls()


def small_calls():
    """Stacking experts (of few and of many tasks, three linears), the mask of dense products."""
    bf16, fp32 = torch.bfloat16, torch.float32
    for linears, rank, own, adapters in ((3, 16, 5, fp32), (1, 20, 5, bf16), (3, 16, 65, fp32)):
        a = [meta(rank, 4096, dtype=adapters) for _ in range(own * linears)]
        b = [meta(4096, rank, dtype=adapters) for _ in range(own * linears)]
        gates = [meta(own - 1, own, dtype=fp32) for _ in range(linears)]
        yield partial(stack, GroupShape(((rank,) * own,) * linears, 0.0), gates, a, b, bf16)
    for dtype, k in ((bf16, 4096), (fp32, 4095)):
        yield partial(drop, meta(8192, k, dtype=dtype), meta(1, dtype=torch.int64), 0.1)


def training_step(m: int, rank: int, tasks: int = 4, plan: str = "expand") -> None:
    """Every launch of a forward and a backward pass of one linear over m rows, hard gates."""
    bf16, ids, seed = torch.bfloat16, meta(m, dtype=torch.int64), meta(1, dtype=torch.int64)
    experts, shape = tasks + 1, GroupShape(((rank,) * (tasks + 1),), 0.1)
    a = [meta(rank, 512, dtype=torch.float32) for _ in range(experts)]
    b = [meta(384, rank, dtype=torch.float32) for _ in range(experts)]
    x, dy, weight = meta(m, 512, dtype=bf16), meta(m, 384, dtype=bf16), meta(384, 512, dtype=bf16)
    gates = [meta(tasks, experts, dtype=torch.float32)]
    last = (ids, seed, False, meta(tasks, rank * experts, dtype=torch.int32), 2 * rank)
    _, saved = forward_pass(shape, x, [weight], [None], gates, a, b, *last, plan)
    needs = [True, False, False, False, *[True] * (2 * experts)]
    backward_pass(shape, [dy], x, saved, [weight], gates, a, b, *last, needs, plan)


def calls(arch: int, dtype, m: int, k: int, r: int, dropout_p: float):
    """The kernels of one linear k to k, each with a key of what Triton would specialise on."""
    x, h, a = meta(m, k, dtype=dtype), meta(m, r, dtype=dtype), meta(r, k, dtype=dtype)
    gates, slots = meta(4, r, dtype=torch.float32), meta(4, r, dtype=torch.int32)
    ids, packed = meta(m, dtype=torch.int64), meta(m, 32, dtype=dtype)
    dropout = dropout_of(dropout_p)
    key = (dtype, k % 16 == 0, r == 100, dropout is not None)
    launch = shrink_launch(m, k, r, dtype, dropout is not None)
    given = partial(shrink, x, a, gates, ids, h, dropout=dropout, launch=launch)
    code = (replace(launch, split=min(launch.split, 2)), *key)
    if r <= DENSE_RANK:  # forward with slots
        yield ("packs", *code), partial(given, slots=slots, packed=packed)
    else:
        yield ("shrink", *code), given
    if r == DENSE_RANK and not dropout:  # backward
        yield ("both", *code), partial(given, plain=h, saved=h, restored=h)
        yield ("restores", *code), partial(given, slots=slots, saved=packed, restored=h)
    launch = expand_launch(m, k, r, dtype)
    bias = None if dropout else meta(k, dtype=dtype)
    for accumulate in {dropout is None, dropout is None and r != DENSE_RANK}:
        given = partial(expand, h, a, x, accumulate, dropout, None if accumulate else bias, launch)
        yield ("expand", launch, accumulate, key), given
    launch = outer_launch(m, r, k, dtype, dropout is not None)
    same_code = (replace(launch, chunk=0), r > 2 * launch.block_r)
    for transposed in (False, True) if r == 128 and not dropout else (False,):
        given = partial(outer, h, x, [r], torch.float32, transposed, dropout, launch)
        yield ("outer", same_code, transposed, key), given
    for other_r, other_k in ((r, k), (3 * r, k), (r, 2 * k)) if dropout is None else ():
        launch = outer_pair_launch(m, r, k, other_r, other_k, dtype)
        if launch is None:
            continue
        left, wide = meta(m, other_r, dtype=dtype), meta(m, other_k, dtype=dtype)
        same_code = (replace(launch, chunk=0), max(r, other_r) > 2 * launch.block_r)
        of_b = Factors(h, x, [r], torch.float32, True)
        of_a = Factors(left, wide, [other_r], torch.float32, False)
        given = partial(outer_pair, of_b, of_a, launch)
        yield ("outer pair", same_code, key, other_r % 16, other_k % 16), given
    weight = meta(k, k, dtype=dtype)
    if dtype == torch.bfloat16 and arch >= 90 and why_not_gemm(x, weight, h, a) is None:
        launch = gemm_launch(m, k, r, dropout is not None)
        yield ("dx", launch, key), partial(gemm_dx, x, weight, h, a, dropout, launch)
        if not dropout:
            yield ("gemm", launch), partial(gemm, x, weight, meta(k, dtype=dtype), h, a, launch)


def gathered_calls(arch: int, dtype, m: int, k: int, width: int, dropout_p: float):
    """The gather kernels of one linear k to k, ``width`` columns a task, 64 tasks."""
    tasks, ranks = 64, [width // 2] * 65
    x, h = meta(m, k, dtype=dtype), meta(m, width, dtype=dtype)
    a = meta(sum(ranks), k, dtype=dtype)
    gates = meta(tasks, sum(ranks), dtype=torch.float32)
    slots = meta(tasks, sum(ranks), dtype=torch.int32)
    dropout, aligned = dropout_of(dropout_p), width % 16 == 0
    key = (dtype, k % 16 == 0, width % 16 == 0, dropout is not None)
    groups = group_rows(meta(m, dtype=torch.int64), slots, width)
    launch = gather_shrink_launch(m, k, width, dtype, dropout is not None)
    given = (x, a, gates, groups, 0, h, aligned, dropout, launch)
    yield ("gather_shrink", launch, key), partial(gather_shrink, *given)
    launch = gather_expand_launch(m, k, width, dtype)
    given = (h, a, x, groups, 0, aligned, dropout is None, dropout, None, launch)
    yield ("gather_expand", launch, key), partial(gather_expand, *given)
    launch = gather_outer_launch(m, width, k, dtype, dropout is not None, aligned)
    for transposed in (False, True) if not dropout else (False,):
        given = (h, x, ranks, torch.float32, transposed, groups, slots, 0, aligned, dropout, launch)
        same_code = ("gather_outer", replace(launch, chunk=0), transposed, key)
        yield same_code, partial(gather_outer, *given)


def meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def dropout_of(p: float):
    """Seed, threshold and scale; None without dropout."""
    seed = meta(1, dtype=torch.int64)
    return (seed, round(p * 65536), 1 / (1 - p)) if p else None


def main(archs) -> None:
    def report(line: dict) -> None:
        print(json.dumps({**line, "problems": problems(line)}), flush=True)

    with Compiler(report) as compiler:
        for arch in archs:
            compiler.target(arch)
            for launch in launches(arch):
                launch()
            if arch == 90:
                torch.set_float32_matmul_precision("high")  # TF32 products
                for launch in launches(arch, tf32=True):
                    launch()
                torch.set_float32_matmul_precision("highest")


if __name__ == "__main__":
    main([int(a) for a in sys.argv[1:]] or ARCHS)
