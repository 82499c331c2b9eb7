"""Sources of csrc/ compiled by the host's C++ compiler, as they are or with a defect planted."""

import ctypes
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
INVALID_VALUE, LAUNCH_FAILURE, NOT_SUPPORTED = 1, 719, 801  # of cudaError_t


def compile_for_host(source: Path, folder: Path, planted: bool = False) -> ctypes.CDLL:
    """``planted``: a defect is in it, so compile fast and without warnings."""
    cxx = shlex.split(os.environ.get("CXX", "g++"))
    if shutil.which(cxx[0]) is None:
        pytest.skip(f"no C++ compiler: {cxx[0]} is not on PATH")
    library = folder / f"{source.stem}.so"
    flags = ["-x", "c++", "-std=c++17", "-shared", "-fPIC", "-DCKF_HOST_SHIM"]
    flags += ["-U_FORTIFY_SOURCE"]  # it forbids _longjmp between stacks
    if "clang" not in cxx[0]:
        flags += ["-fno-gnu-unique"]  # else libraries share the shim's inline variables
    if planted:
        flags += ["-O0", "-w"]
    else:
        flags += ["-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    command = [*cxx, *flags, f"-I{CSRC}", str(source), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:4000]
    return ctypes.CDLL(str(library))


def copy_changed(folder: Path, file: str, right: str, wrong: str) -> None:
    """The sources, with a defect in one of them."""
    for source in (*CSRC.glob("*.h"), *CSRC.glob("*.cu")):
        shutil.copy(source, folder)
    text = (folder / file).read_text()
    assert right in text, f"{file} has no {right!r}: update this test"
    (folder / file).write_text(text.replace(right, wrong))
