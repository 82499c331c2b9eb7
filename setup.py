"""Builds the optional extensions ``ckf._C`` (CUDA) and ``ckf._cpu``; the rest is in pyproject.toml.

Never imports torch: the extensions take raw pointers; the CUDA runtime is linked statically.

CKF_BUILD_CUDA   auto (default): build if nvcc is found, go on without it if that fails;
                 1: build or fail; 0: leave it out.
CKF_BUILD_CPU    the same for ckf._cpu, which needs a C++ compiler (CXX, default g++).
CKF_CUDA_ARCHS   e.g. "sm_80,sm_90a". Default: sm_80, sm_90a, sm_100 as far as nvcc knows them.
                 PTX of the newest portable one is added for GPUs to come.
"""

import hashlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
DEFAULT_ARCHS = ("sm_80", "sm_90a", "sm_100")
# Of csrc/cpu/micro.cpp, on every machine and beside that on x86-64; chosen when it runs.
INSTRUCTIONS = {"base": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    INSTRUCTIONS |= {
        "avx2": ["-mavx2", "-mfma"],
        "avx512": ["-mavx512f", "-mavx2", "-mfma"],
    }


def say(text: str) -> None:
    print(f"ckf: {text}", file=sys.stderr, flush=True)


def build_mode(variable: str) -> str:
    mode = os.environ.get(variable, "auto")
    if mode not in ("auto", "1", "0"):
        raise SystemExit(f"{variable} is {mode!r}; expected auto, 1 or 0")
    return mode


def find_nvcc() -> str | None:
    """CUDA_HOME first, then PATH, then /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME")
    candidates = [Path(home) / "bin" / "nvcc"] if home else []
    on_path = shutil.which("nvcc")
    candidates += [Path(on_path)] if on_path else []
    candidates.append(Path("/usr/local/cuda/bin/nvcc"))
    return next((str(path) for path in candidates if os.access(path, os.X_OK)), None)


def wanted_archs() -> list[str]:
    """From CKF_CUDA_ARCHS, else the default, as sm_NN or sm_NNa."""
    text = os.environ.get("CKF_CUDA_ARCHS", "")
    archs = []
    for word in re.split(r"[\s,;]+", text.strip()) if text.strip() else DEFAULT_ARCHS:
        match = re.fullmatch(r"(?:sm_)?(\d+)\.?(\d)([af]?)", word)
        if match is None:
            raise SystemExit(f"CKF_CUDA_ARCHS has {word!r}; expected names like sm_80 or sm_90a")
        archs.append("sm_{}{}{}".format(*match.groups()))
    return archs


def run(command: list[str], log) -> str:
    """Runs, keeps the output in the log; CompileError with its end on failure."""
    log.write("$ " + " ".join(command) + "\n")
    log.flush()
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise CompileError(f"{command[0]} cannot be run: {error}") from error
    output = done.stdout + done.stderr
    log.write(f"of {command[-1]}:\n{output}\n")  # several may run at once
    log.flush()
    if done.returncode != 0:
        raise CompileError(f"{command[0]} failed (whole log: {log.name}):\n{output[-4000:]}")
    return output


class CudaToolkit:
    """What the build needs to know about one nvcc."""

    def __init__(self, nvcc: str, log):
        self.nvcc = nvcc
        self.version = run([nvcc, "--version"], log).strip().splitlines()[-2]
        self.known = set(re.findall(r"compute_(\d+)", run([nvcc, "--list-gpu-arch"], log)))
        # A wrapper script may stand in for nvcc: ask it where the libraries are.
        plan = run([nvcc, "--dryrun", "-c", str(CSRC / "multi_lora_decode.cu")], log)
        top = re.search(r"^#\$ TOP=(.*)$", plan, re.MULTILINE)
        root = Path(top.group(1).strip()) if top else Path(nvcc).resolve().parent.parent
        folders = [root / "lib64", root / "lib", *root.glob("targets/*-linux/lib")]
        self.libraries = [f for f in folders if (f / "libcudart_static.a").exists()]
        if not self.libraries:
            raise CompileError(f"libcudart_static.a is in none of {', '.join(map(str, folders))}")

    def choose(self, wanted: list[str]) -> list[str]:
        """The wanted archs that this nvcc can do, then PTX for the newest portable one."""
        archs = [arch for arch in wanted if arch[3:].rstrip("af") in self.known]
        dropped = [arch for arch in wanted if arch not in archs]
        if dropped:
            say(f"{self.nvcc} ({self.version}) does not know {', '.join(dropped)}: left out")
        if not archs:
            raise CompileError(f"nvcc knows none of {', '.join(wanted)}; set CKF_CUDA_ARCHS")
        newest = max(int(arch[3:].rstrip("af")) for arch in archs)
        return [*archs, f"compute_{newest}"]


def gencode(arch: str) -> list[str]:
    virtual = arch.replace("sm_", "compute_")
    return ["-gencode", f"arch={virtual},code={arch}"]


def pybind11_include() -> str:
    """pybind11's headers; torch ships a copy, found here without importing torch."""
    if importlib.util.find_spec("pybind11") is not None:
        import pybind11

        return pybind11.get_include()
    torch = importlib.util.find_spec("torch")
    if torch is not None and torch.origin is not None:
        include = Path(torch.origin).parent / "include"
        if (include / "pybind11" / "pybind11.h").exists():
            return str(include)
    raise CompileError("pybind11 is not installed: pip install pybind11")


def sources_hash(folder: Path = CSRC) -> str:
    """SHA-256 over what an extension is compiled from, to tell a stale build."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.cu"), *folder.glob("*.h"), *folder.glob("*.cpp")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def cxx() -> list[str]:
    """The C++ compiler."""
    return shlex.split(os.environ.get("CXX") or "g++")


def write_info(temp: Path, folder: Path, log, **own) -> None:
    """build_info.h: what the extension was built from."""
    info = own | {
        "cxx": (run([*cxx(), "--version"], log).splitlines() or ["?"])[0],
        "python": sysconfig.get_python_version(),
        "sources": sources_hash(folder),
    }
    (temp / "build_info.h").write_text(
        f'#pragma once\nconstexpr char kCkfBuildInfo[] = R"json({json.dumps(info)})json";\n'
    )


def compile_bindings(source: Path, temp: Path, log) -> Path:
    """The object of the file that knows Python."""
    includes = {sysconfig.get_path("include"), sysconfig.get_path("platinclude")}
    includes |= {pybind11_include(), str(temp)}
    flags = ["-O2", "-std=c++17", "-fPIC", "-fvisibility=hidden"]
    flags += [f"-I{path}" for path in sorted(includes)]
    run([*cxx(), *flags, "-c", str(source), "-o", str(temp / "bindings.o")], log)
    return temp / "bindings.o"


class Build(build_ext):
    """Both extensions; where one is optional and cannot be built, a warning."""

    def run(self) -> None:
        self.in_source_tree = bool(self.inplace)  # the base class clears it while it builds
        super().run()

    def build_extension(self, ext: Extension) -> None:
        name = ext.name.rpartition(".")[2]
        kind, build = {"_C": ("cuda", self.build_cuda), "_cpu": ("cpu", self.build_cpu)}[name]
        file = ROOT / "build" / f"{kind}_build.log"
        file.parent.mkdir(exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name))
        temp = Path(self.build_temp) / kind
        for folder in (temp, target.parent):
            folder.mkdir(parents=True, exist_ok=True)
        try:
            with file.open("w") as log:
                build(temp, target, log)
        except CompileError as error:
            if not ext.optional:
                raise
            say(f"WARNING: {ext.name} was not built, going on without it: {error}")
            target.unlink(missing_ok=True)  # an older build must not pass for this one
            if self.in_source_tree:
                (ROOT / "ckf" / target.name).unlink(missing_ok=True)

    def build_cpu(self, temp: Path, target: Path, log) -> None:
        folder = CSRC / "cpu"
        say(f"building ckf._cpu with {' '.join(cxx())} (log: {log.name})")
        write_info(temp, folder, log)
        flags = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden"]
        objects = []

        def compile_to(name: str, source: str, *own: str) -> None:
            objects.append(temp / f"{name}.o")
            command = [*cxx(), *flags, *own, "-c", str(folder / source), "-o", str(objects[-1])]
            run(command, log)

        for name in ("passes", "dropout"):
            compile_to(name, f"{name}.cpp")
        for name, own in INSTRUCTIONS.items():
            compile_to(f"micro_{name}", "micro.cpp", *own, f"-DCKF_INSTRUCTIONS={name}")
        objects.append(compile_bindings(folder / "bindings.cpp", temp, log))
        undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
        run([*cxx(), "-shared", *undefined, *map(str, objects), "-o", str(target), "-ldl"], log)

    def build_cuda(self, temp: Path, target: Path, log) -> None:
        """nvcc for the .cu files, the C++ compiler for the bindings and the link."""
        nvcc = find_nvcc()
        if nvcc is None:
            raise CompileError("nvcc is not in CUDA_HOME, on PATH or in /usr/local/cuda/bin")
        toolkit = CudaToolkit(nvcc, log)
        archs = toolkit.choose(wanted_archs())
        say(f"building ckf._C for {', '.join(archs)} with {nvcc} (log: {log.name})")
        write_info(temp, CSRC, log, archs=archs, nvcc=toolkit.version)
        cores = os.cpu_count() or 1
        threads = min(len(archs), cores)
        flags = ["-O3", "-std=c++17", "-lineinfo", "-Xcompiler", "-fPIC"]
        flags += ["-Xptxas", "-v", "--threads", str(threads)]
        flags += [flag for arch in archs for flag in gencode(arch)]

        def compile_one(source: Path) -> Path:
            made = temp / f"{source.stem}.cu.o"
            run([nvcc, *flags, "-c", str(source), "-o", str(made)], log)
            return made

        with ThreadPoolExecutor(max(1, cores // threads)) as pool:
            objects = list(pool.map(compile_one, sorted(CSRC.glob("*.cu"))))
        objects.append(compile_bindings(CSRC / "bindings.cpp", temp, log))
        link = [*cxx(), "-shared", *map(str, objects), "-o", str(target)]
        link += [f"-L{folder}" for folder in toolkit.libraries]
        run([*link, "-lcudart_static", "-ldl", "-lrt", "-lpthread"], log)


def extensions() -> list[Extension]:
    """Those that are asked for, or whose compiler is there."""
    found = []
    for name, variable, folder, compiler, there in (
        ("ckf._C", "CKF_BUILD_CUDA", CSRC, "nvcc", find_nvcc()),
        ("ckf._cpu", "CKF_BUILD_CPU", CSRC / "cpu", cxx()[0], shutil.which(cxx()[0])),
    ):
        mode = build_mode(variable)
        if mode == "0" or (mode == "auto" and there is None):
            why = f"{variable}=0" if mode == "0" else f"no {compiler} found"
            say(f"{why}: building without {name}")
            continue
        sources = sorted(str(path.relative_to(ROOT)) for path in folder.glob("*.c*"))
        found.append(Extension(name, sources=sources, optional=mode == "auto"))
    return found


class BuildPy(build_py):
    """A wheel brings the runs to start from, as ckf/configs; a checkout has them beside it."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            folder = Path(self.build_lib) / "ckf" / "configs"
            self.mkpath(str(folder))
            for file in sorted((ROOT / "configs").glob("*.yaml")):
                self.copy_file(str(file), str(folder / file.name))


if __name__ == "__main__":
    commands = {"build_ext": Build, "build_py": BuildPy}
    setup(license="Apache-2.0", ext_modules=extensions(), cmdclass=commands)
