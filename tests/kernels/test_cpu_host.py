"""csrc/cpu by itself, under sanitizers: nothing beside a matrix is touched, no two threads meet."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.kernels.host_build import CSRC
from tests.kernels.test_cuda_build import build  # noqa: F401

HARNESS = Path(__file__).with_name("cpu_harness.cpp")


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_sanitized(build, tmp_path, sanitizer):  # noqa: F811
    cxx = shlex.split(os.environ.get("CXX", "g++"))
    flags = ["-std=c++17", "-O1", "-g", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    flags += ["-Wall", "-Wextra", "-Werror"]
    parts = [(HARNESS, []), (CSRC / "cpu" / "passes.cpp", []), (CSRC / "cpu" / "dropout.cpp", [])]
    for name, own in build.INSTRUCTIONS.items():
        parts.append((CSRC / "cpu" / "micro.cpp", [*own, f"-DCKF_INSTRUCTIONS={name}"]))
    objects = [str(tmp_path / f"{i}.o") for i in range(len(parts))]
    try:
        for (source, own), target in zip(parts, objects, strict=True):
            run([*cxx, *flags, *own, "-c", str(source), "-o", target])
        program = str(tmp_path / "harness")
        run([*cxx, *flags, *objects, "-rdynamic", "-ldl", "-lpthread", "-o", program])
    except FileNotFoundError:
        pytest.skip(f"no C++ compiler: {cxx[0]} is not on PATH")
    assert run([program, "30"]) == "right\n"


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if "cannot find -l" in done.stderr:
        pytest.skip("this compiler has no sanitizers")
    assert done.returncode == 0, (done.stdout + done.stderr)[:4000]
    return done.stdout
