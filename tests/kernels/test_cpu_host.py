"""csrc/cpu by itself, under sanitizers: nothing beside a matrix is touched, no two threads meet."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.kernels.host_build import CSRC
from tests.kernels.test_cuda_build import build  # noqa: F401

HARNESS = Path(__file__).with_name("cpu_harness.cpp")


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_sanitized(build, tmp_path, sanitizer):  # noqa: F811
    cxx = shlex.split(os.environ.get("CXX") or "g++")
    if shutil.which(cxx[0]) is None:
        pytest.skip(f"no C++ compiler: {cxx[0]} is not on PATH")
    empty = tmp_path / "empty.cpp"
    empty.write_text("int main() {}")
    flags = ["-std=c++17", "-O1", "-g", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    program = str(tmp_path / "program")
    if run([*cxx, *flags, str(empty), "-o", program]).returncode or run([program]).returncode:
        pytest.skip("this compiler, or this machine, has no such sanitizer")
    flags += ["-Wall", "-Wextra", "-Werror"]
    parts = [(HARNESS, []), (CSRC / "cpu" / "passes.cpp", []), (CSRC / "cpu" / "dropout.cpp", [])]
    for name, own in build.INSTRUCTIONS.items():
        parts.append((CSRC / "cpu" / "micro.cpp", [*own, f"-DCKF_INSTRUCTIONS={name}"]))
    objects = [str(tmp_path / f"{i}.o") for i in range(len(parts))]
    for (source, own), target in zip(parts, objects, strict=True):
        right([*cxx, *flags, *own, "-c", str(source), "-o", target])
    right([*cxx, *flags, *objects, "-rdynamic", "-ldl", "-lpthread", "-o", program])
    assert right([program, "40"]) == "right\n"


def run(command: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True)


def right(command: list[str]) -> str:
    done = run(command)
    assert done.returncode == 0, (done.stdout + done.stderr)[:4000]
    return done.stdout
