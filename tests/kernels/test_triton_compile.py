"""Every Triton kernel, compiled for three GPUs that are not here, may be launched there."""

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


ARCHS = [80, 90, 100]


@pytest.fixture(scope="module")
def compilations(tmp_path_factory):
    """A process for each GPU, all at once: its output by GPU when it has ended."""
    folder = tmp_path_factory.mktemp("compiled")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["OMP_NUM_THREADS"] = "1"
    running = {}
    for arch in ARCHS:
        command = [sys.executable, "-m", "tests.kernels.triton_compile", str(arch)]
        with open(folder / f"{arch}.out", "w") as out, open(folder / f"{arch}.err", "w") as err:
            running[arch] = subprocess.Popen(
                command, env=environment, cwd=ROOT, stdout=out, stderr=err
            )

    def ended(arch: int) -> tuple[int, str, str]:
        status = running[arch].wait()
        return status, *((folder / f"{arch}.{kind}").read_text() for kind in ("out", "err"))

    yield ended
    for process in running.values():
        process.kill()
        process.wait()


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("arch", ARCHS)
def test_compiles_without_spills(arch, compilations):
    status, output, errors = compilations(arch)
    assert status == 0, errors[-3000:]
    lines = [json.loads(line) for line in output.splitlines()]
    groups = defaultdict(list)
    for line in lines:
        groups[line["kernel"], line["dtype"]].append(line)
    for (kernel, dtype), members in groups.items():
        most = {key: max(m[key] for m in members) for key in ("registers", "stack", "shared")}
        print(f"sm_{arch} {kernel} {dtype}: {len(members)} compiled, at most {most}")
    families = "shrink shrink_sum expand outer reduce group gather_shrink gather_expand"
    families += " gather_outer gather_reduce stack drop"
    kernels = {f"{name}_kernel" for name in families.split()}
    assert {line["kernel"] for line in lines} >= kernels | ({"gemm_kernel"} if arch > 80 else set())
    bad = [line for line in lines if line["problems"]]
    assert not bad, json.dumps(bad, indent=1)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("rank", [16, 64], ids=["dense", "gathered"])
def test_other_numbers_of_rows_compile_nothing_new(rank):
    """Batches of other lengths: divisible by 16 or not, other chunks and other parts of k."""
    program = f"""
from tests.kernels.triton_compile import Compiler, training_step
kernels = []
with Compiler(kernels.append) as compiler:
    compiler.target(90)
    for m in (8192, 8176, 8191, 5003, 4999):
        training_step(m, {rank})
        print(len(kernels))
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    counts = [int(line) for line in done.stdout.split()]
    assert counts[0] > 5 and counts == counts[:1] * 5


def test_chunks_of_an_outer_stay_inside_a_wave():
    from ckf.kernels.launch import PROGRAMS, outer_launch

    for m, r, c in itertools.product((1, 3072, 8192), (8, 80, 384), (1024, 4096, 14336)):
        launch = outer_launch(m, r, c, torch.bfloat16, False)
        blocks = -(-r // launch.block_r) * -(-c // launch.block_c)
        assert -(-m // launch.chunk) * blocks <= max(PROGRAMS, blocks)


def test_rules_can_fail():
    from tests.kernels.triton_compile import left_operands, problems

    in_registers = (
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 \t{%f1, %f2}, {%r1, %r2}, %rd1, p"
    )
    in_memory = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f1, %f2}, %rd2, %rd1, p, 1"
    assert left_operands(f"{in_registers};\n{in_memory};") == ["{", "%"]
    good = {
        "arch": 90,
        "kernel": "gemm_kernel",
        "flags": {"num_stages": 3},
        "stack": 0,
        "shared": 1000,
        "wgmma": 4,
        "wgmma_register_a": 0,
        "tma": 2,
        "ptxas": "12.8",
    }
    assert not problems(good)
    worse = {"stack": 8, "shared": 232449, "wgmma_register_a": 1, "wgmma": 0, "tma": 0}
    for key, value in worse.items():
        assert len(problems({**good, key: value})) == 1, key
    assert not problems({**good, "wgmma_register_a": 1, "ptxas": "13.3"})
