"""Every kernel compiles for every GPU of the default build, and none keeps anything on a stack."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import threading
import types
from collections import Counter
from pathlib import Path

import pytest

from ckf.kernels import cpu, cuda

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def build():
    """setup.py as a module: the tests use the same choices as the build."""
    spec = importlib.util.spec_from_file_location("ckf_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def nvcc(build) -> str:
    found = build.find_nvcc()
    if found is None:
        pytest.skip("no nvcc in CUDA_HOME, on PATH or in /usr/local/cuda/bin")
    return found


def cuobjdump(option: str, file: Path) -> str | None:
    """What the toolkit's tool, or the one that comes with Triton, says; None without either."""
    folders = [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    triton = importlib.util.find_spec("triton")
    if triton is not None:
        folders.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    tool = shutil.which("cuobjdump", path=os.pathsep.join(folders))
    if tool is None:
        return None
    command = [tool, option, str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def compile_cubin(build, nvcc: str, source: str, arch: str, folder: Path) -> tuple[Path, str]:
    """The cubin, and what ptxas said of it."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True)
    if arch.removeprefix("sm_").rstrip("a") not in re.findall(r"compute_(\d+)", listed.stdout):
        pytest.skip(f"this nvcc does not know {arch}")
    cubin = folder / "kernel.cubin"
    command = [nvcc, "-O3", "-std=c++17", "-cubin", *build.gencode(arch), "-Xptxas", "-v"]
    command += [str(ROOT / "csrc" / source), "-o", str(cubin)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert cubin.stat().st_size > 0
    return cubin, done.stderr


@pytest.mark.parametrize("source", sorted(p.name for p in (ROOT / "csrc").glob("*.cu")))
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100"])
def test_no_stack_no_spills(build, nvcc, tmp_path, arch, source):
    assert arch in build.DEFAULT_ARCHS
    cubin, said = compile_cubin(build, nvcc, source, arch, tmp_path)
    usage = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said
    )
    kernels = re.findall(r"Compiling entry function '(\w+)'", said)
    assert kernels, "ptxas -v named no kernel"
    assert len(usage) == len(kernels)
    wasteful = {k: u for k, u in zip(kernels, usage, strict=True) if u != ("0", "0", "0")}
    assert not wasteful, f"stack, spill stores, spill loads: {wasteful}"
    resources = cuobjdump("--dump-resource-usage", cubin)
    if resources is None:
        return
    sizes = re.findall(r"STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", resources)
    assert len(sizes) == len(kernels)
    assert all(stack == local == "0" for stack, _, local in sizes)
    assert max(int(shared) for _, shared, _ in sizes) <= 48 * 1024
    code = cuobjdump("--dump-sass", cubin)
    assert not re.search(r"\b(LDL|STL)\b", code), "something lives in local memory"
    if source == "multi_lora_decode.cu":
        assert bool(re.search("UCGABAR_WAIT", code)) is (arch != "sm_80"), "cluster barriers"
        assert bool(re.search("ACQBULK", code)) is (arch != "sm_80"), "the wait for the grid before"
    if source == "decode_linear.cu":  # clusters, tensor cores, W past the L1 cache and ahead to L2
        for op in ("UCGABAR_WAIT", r"HMMA\.16816", r"LDG\.E\.NA\.128", r"CCTL\.E\.PF2"):
            assert bool(re.search(op, code)) is (arch != "sm_80"), op
    if source == "decode_wgmma.cu":  # products of warpgroups fed by tile copies, h by bulk copies
        assert not re.search(r"C75\d\d", said), said
        for op in ("HGMMA", "UTMALDG", "UBLKCP", r"HMMA\.1688", "UCGABAR_WAIT"):
            kernels = re.split(r"Function : ", code)[1:]
            found = [bool(re.search(op, kernel)) for kernel in kernels]
            assert found == 8 * [arch == "sm_90a"], op  # two types, four widths
    # Of one such copy ptxas 13.0 left the coordinate as it was in the round before.
    assert not re.search(r"@!?U?P\d\s+UTMALDG", code), "a tile copy under a predicate"


def test_hopper_gemm_on_its_chip(build, nvcc, tmp_path):
    """Tensor cores fed by TMA in every kernel, no product made to wait, registers handed over."""
    cubin, said = compile_cubin(build, nvcc, "hopper_gemm.cu", "sm_90a", tmp_path)
    assert not re.search(r"C75\d\d", said), said  # 08, 10: setmaxnreg ignored, products serialized
    assert set(re.findall(r"Used (\d+) registers", said)) == {"168"}  # 65536 over 384, in eights
    code = cuobjdump("--dump-sass", cubin)
    if code is None:
        pytest.skip("no cuobjdump")
    kernels = re.split(r"Function : ", code)[1:]
    assert len(kernels) == 4  # two types, forward and dx
    for kernel in kernels:
        ops = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@\S+\s+)?([A-Z][\w.]*)", kernel)
        dx = "Lb1E" in kernel.splitlines()[0]
        wide = [i for i, op in enumerate(ops) if op.startswith("HGMMA.64x256x16.F32")]
        narrow = [i for i, op in enumerate(ops) if op.startswith("HGMMA.64x128x16.F32")]
        # four of a stage of H (wide and narrow) and of the base; in a loop, one of the update,
        # which is there twice in dx: before the base and after it
        assert (len(wide), len(narrow)) == (10 if dx else 9, 4)
        loads = Counter(op for op in ops if op.startswith("UTMALDG"))
        assert sum(n for op, n in loads.items() if "MULTICAST" in op) >= 4
        assert loads["UTMALDG.2D"] == (5 if dx else 4)  # the left operand of each
        # 128 x 2 bytes of a thread in 16-byte stores, and twice what a tile of H writes
        assert ops.count("STG.E.128") == 16 + 2 * (16 + 8)
        assert Counter(op for op in ops if op.startswith("STG"))["STG.E.128"] == 64
        assert sum(op.startswith("USETMAXREG") for op in ops) == 2
        assert kernel.count("tnspB") == (6 if dx else 1)
        fences = [op for op in ops if op.startswith("MEMBAR")]
        # of the whole GPU: one a cluster barrier, one where a warp counts its rows of H
        assert ops.count("UCGABAR_ARV") == 2 and fences.count("MEMBAR.ALL.GPU") == 4
        assert "MEMBAR.SC.GPU" not in fences
        # what H's tile reads of the forward comes in whole words
        assert not [op for op in ops if op.startswith("LDG") and ".U8" in op]
        for stage in (wide[:4], narrow, wide[-5:-1]):
            between = ops[stage[0] : stage[-1]]
            assert len(between) < 40
            assert not any(op.startswith(("HMMA", "MEMBAR", "CCTL")) for op in between)


@pytest.mark.parametrize("arch", ["sm_80", "sm_100"])
def test_hopper_gemm_elsewhere_is_empty(build, nvcc, tmp_path, arch):
    """It traps, with few registers: by their number the launcher tells it from the real one."""
    _, said = compile_cubin(build, nvcc, "hopper_gemm.cu", arch, tmp_path)
    source = (ROOT / "csrc" / "hopper_gemm.cu").read_text()
    least = int(re.search(r"kLeastRegisters = (\d+);", source)[1])
    assert max(map(int, re.findall(r"Used (\d+) registers", said))) < least < 168


@pytest.fixture
def compiling(build, monkeypatch, tmp_path):
    """build_cuda with ``nvcc`` in place of every command, on so many cores."""

    def compile_all(nvcc, cores: int) -> None:
        toolkit = types.SimpleNamespace(choose=lambda archs: ["sm_90a", "compute_90"])
        toolkit.version, toolkit.libraries = "", []
        monkeypatch.setattr(build, "CudaToolkit", lambda *args: toolkit)
        monkeypatch.setattr(build, "find_nvcc", lambda: "nvcc")
        monkeypatch.setattr(build, "write_info", lambda *args, **own: None)
        monkeypatch.setattr(build, "compile_bindings", lambda *args: tmp_path / "bindings.o")
        monkeypatch.setattr(build, "run", lambda command, log: nvcc(command))
        monkeypatch.setattr(build.os, "cpu_count", lambda: cores)
        log = types.SimpleNamespace(name="log")
        build.Build.build_cuda(None, tmp_path, tmp_path / "_C.so", log)

    return compile_all


@pytest.mark.parametrize("cores", [16, 2])
def test_files_are_compiled_side_by_side_where_there_are_cores(compiling, cores):
    sources = sorted(path.stem for path in (ROOT / "csrc").glob("*.cu"))
    barrier = threading.Barrier(len(sources) if cores == 16 else 1, timeout=30)
    commands, at_once, most = [], 0, 0

    def nvcc(command):
        nonlocal at_once, most
        commands.append(command)
        if command[0] == "nvcc":
            at_once += 1
            most = max(most, at_once)
            barrier.wait()
            at_once -= 1

    compiling(nvcc, cores)
    assert most == (len(sources) if cores == 16 else 1)
    link = commands[-1]
    objects = [Path(word).name for word in link if word.endswith(".cu.o")]
    assert objects == [f"{stem}.cu.o" for stem in sources] and len(commands) == len(sources) + 1
    assert all(command[command.index("--threads") + 1] == "2" for command in commands[:-1])


def test_an_error_of_one_file_ends_the_build(build, compiling):
    commands = []

    def nvcc(command):
        commands.append(command)
        if "hopper_gemm" in command[-1]:
            raise build.CompileError("nvcc failed: line 7")

    with pytest.raises(build.CompileError, match="line 7"):
        compiling(nvcc, 16)
    assert all(command[0] == "nvcc" for command in commands), "nothing is linked"


@pytest.mark.parametrize(("module", "folder"), [(cuda, "."), (cpu, "cpu")], ids=["_C", "_cpu"])
def test_extension_is_of_these_sources(build, module, folder):
    """A stale extension would make every other test of it meaningless."""
    info = module.build_info()
    if not info["built"]:
        pytest.skip(info["reason"])
    assert info["sources"] == build.sources_hash(build.CSRC / folder), "it has changed: make build"
    assert info["python"] == f"{sys.version_info.major}.{sys.version_info.minor}"


def test_archs(build, monkeypatch):
    monkeypatch.delenv("CKF_CUDA_ARCHS", raising=False)
    assert build.wanted_archs() == ["sm_80", "sm_90a", "sm_100"]
    monkeypatch.setenv("CKF_CUDA_ARCHS", "sm_80, 9.0a;120")
    assert build.wanted_archs() == ["sm_80", "sm_90a", "sm_120"]
    monkeypatch.setenv("CKF_CUDA_ARCHS", "hopper")
    with pytest.raises(SystemExit, match="'hopper'; expected names like sm_80"):
        build.wanted_archs()


def test_old_nvcc_drops_what_it_cannot_do(build, monkeypatch, capsys):
    old = object.__new__(build.CudaToolkit)
    old.nvcc, old.version, old.known = "nvcc", "release 12.0", {"80", "86", "89", "90"}
    assert old.choose(["sm_80", "sm_90a", "sm_100"]) == ["sm_80", "sm_90a", "compute_90"]
    assert "does not know sm_100: left out" in capsys.readouterr().err
    with pytest.raises(build.CompileError, match="set CKF_CUDA_ARCHS"):
        old.choose(["sm_100"])


@pytest.mark.parametrize(
    ("name", "variable", "find"),
    [("ckf._C", "CKF_BUILD_CUDA", "find_nvcc"), ("ckf._cpu", "CKF_BUILD_CPU", "cxx")],
)
def test_modes(build, monkeypatch, capsys, name, variable, find):
    def wanted() -> list[bool]:
        return [e.optional for e in build.extensions() if e.name == name]

    monkeypatch.setenv(variable, "0")
    assert wanted() == []
    compiler = {"find_nvcc": ("nvcc", None), "cxx": ("/no/g++", ["/no/g++"])}[find]
    monkeypatch.setattr(build, find, lambda: compiler[1])
    monkeypatch.setenv(variable, "auto")
    capsys.readouterr()
    assert wanted() == []
    said = capsys.readouterr().err.splitlines()
    assert f"ckf: no {compiler[0]} found: building without {name}" in said
    monkeypatch.setenv(variable, "1")
    assert wanted() == [False]
    monkeypatch.setattr(build, find, {"find_nvcc": lambda: "/x/nvcc", "cxx": lambda: ["sh"]}[find])
    monkeypatch.setenv(variable, "auto")
    assert wanted() == [True]
    monkeypatch.setenv(variable, "yes")
    with pytest.raises(SystemExit, match=f"{variable} is 'yes'; expected auto, 1 or 0"):
        build.extensions()
