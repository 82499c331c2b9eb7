"""Everything a GPU machine is needed for, in one command that needs no network.

``python3 benchmarks/gpu.py [build|tests|sanitize|bench|all] [--out FOLDER] [--minutes N]``

Uses the interpreter it is run with. Results go to FOLDER/<gpu>/: environment.json, one log a step
and summary.json, so that an interrupted run keeps what it has; all of it is packed into
FOLDER/<gpu>.tar.gz after every step. Every step has a time limit, and together they keep
to ``--minutes`` (9, so that the whole fits in ten). Outside git CKF_COMMIT names the commit.
Without a GPU it is a rehearsal in build/gpu_rehearsal/: a build where nvcc is, the GPU tests only
collected, and what a CPU can run.
Exit status: 0 if every step passed, 1 if one failed, 2 without a GPU or torch.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

STARTED = time.monotonic()  # importing torch takes its share of the time as well
ROOT = Path(__file__).resolve().parents[1]
REHEARSAL = ROOT / "build" / "gpu_rehearsal"
PARTS = ("build", "tests", "sanitize", "bench")
SANITIZER_ERROR = 86
SANITIZERS = {
    "memcheck": ["--report-api-errors", "no"],  # the bridge raises on those itself
    "racecheck": [],
    "initcheck": [],
}
# The benchmarks' shares of the time.
WEIGHTS = {
    "bench_linear": 4,
    "bench_gemm": 1,
    "bench_decode": 3,
    "bench_step": 4,
    "bench_scaling": 1,
}
# Seconds: the most a step may take, and what "all" leaves for the steps after a part.
LIMITS = {"build": 300, "tests": 240, "sanitize": 60, "bench": 600, "plots": 60}
SANITIZE_ALONE = 100  # with Triton's cache still empty
RESERVED = {"build": 240, "tests": 180, "sanitize": 120, "bench": 0}
GRACE_SECONDS, LEAST_SECONDS = 5, 5  # to write what one has; worth starting a step
TABLE = "table.json"  # what backend="auto" would choose by
QUICK_UNDER = 400  # seconds left for all benchmarks: below it they run with --quick
ARCHS = {(8, 0): "sm_80", (9, 0): "sm_90a", (10, 0): "sm_100"}


def output_of(command: list[str]) -> str:
    """The command's last line of output, or why there is none."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unavailable: {error}"
    lines = (done.stdout.strip() or done.stderr.strip()).splitlines()
    return lines[-1] if lines else ""


def environment(torch) -> dict:
    """What a reader needs to repeat or to doubt the numbers."""
    from benchmarks.harness import commit  # imports torch

    in_git = (ROOT / ".git").exists()
    versions = {}
    for name in ("torch", "triton", "transformers", "numpy", "peft", "pytest"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    found = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "uncommitted": output_of(["git", "status", "--porcelain"]) != "" if in_git else None,
        "cuda": torch.version.cuda,
        "nvcc": output_of([find_nvcc() or "nvcc", "--version"]),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "gpu": None,
    }
    if not torch.cuda.is_available():
        return found
    properties = torch.cuda.get_device_properties(0)
    driver = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return found | {
        "gpu": properties.name,
        "gpus": torch.cuda.device_count(),
        "capability": list(torch.cuda.get_device_capability(0)),
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "driver": output_of(driver),
    }


class Runner:
    """Runs the steps, keeps their logs and a summary on disk at all times."""

    def __init__(self, folder: Path, has_gpu: bool, seconds: float):
        self.folder, self.has_gpu = folder, has_gpu
        self.deadline = time.monotonic() + seconds
        self.steps: list[dict] = []
        folder.mkdir(parents=True, exist_ok=True)

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def skip(self, name: str, why: str) -> None:
        print(f"-- {name}: SKIPPED, {why}", flush=True)
        self._add({"step": name, "state": "skipped", "why": why})

    def run(self, name: str, command: list[str], limit: float, **extra_environment: str) -> bool:
        """True if the command exits with 0 within ``limit`` seconds; its output goes to the screen
        and to <name>.log."""
        if limit < LEAST_SECONDS:
            self.skip(name, "no time left")
            return False
        print(f"-- {name} (at most {limit:.0f} s): {' '.join(command)}", flush=True)
        step = {"step": name, "state": "interrupted", "command": command}
        self._add(step)
        start = time.monotonic()
        status, late = self._execute(name, command, limit, extra_environment)
        step |= {"seconds": round(time.monotonic() - start, 1), "exit_status": status}
        step["state"] = "TIMED OUT" if late else "passed" if status == 0 else "FAILED"
        self._write()
        if self.has_gpu:
            pack(self.folder)
        print(f"-- {name}: {step['state']} in {step['seconds']} s", flush=True)
        return step["state"] == "passed"

    def _execute(self, name: str, command: list[str], limit: float, extra: dict) -> tuple:
        """Exit status, and whether the time limit ended it."""
        late = threading.Event()
        with (self.folder / f"{name}.log").open("w") as log:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | {"PYTHONUNBUFFERED": "1"} | extra,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,  # a sanitizer's or a compiler's children end with it
            )

            def end() -> None:
                """Interrupt, so that Python writes what it has; then kill all that is left."""
                with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                    os.killpg(process.pid, signal.SIGINT)
                    process.wait(GRACE_SECONDS)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)

            def too_late() -> None:
                late.set()
                end()

            timer = threading.Timer(limit, too_late)
            timer.start()
            try:
                for line in process.stdout:
                    print(line, end="", flush=True)
                    log.write(line)
                    log.flush()
                return process.wait(), late.is_set()
            except BaseException:
                end()
                raise
            finally:
                timer.cancel()

    def failed(self) -> list[str]:
        return [s["step"] for s in self.steps if s["state"] not in ("passed", "skipped")]

    def _add(self, step: dict) -> None:
        self.steps.append(step)
        self._write()

    def _write(self) -> None:
        text = json.dumps(self.steps, indent=1) + "\n"
        temporary = self.folder / "summary.json.tmp"
        temporary.write_text(text)
        temporary.replace(self.folder / "summary.json")


def limit(runner: Runner, part: str, reserved: float = 0) -> float:
    """Seconds a step of a part may take: its own limit, less if the parts after it need time."""
    return min(LIMITS[part], runner.left() - reserved)


def pytest_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]


def gpu_test_files() -> list[str]:
    """By file: others may need data-preparation packages that a GPU machine lacks."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(f.relative_to(ROOT)) for f in files if "mark.gpu" in f.read_text()]


def part_build(runner: Runner, reserved: float) -> None:
    command = [sys.executable, "setup.py", "build_ext"]
    extra = {"CKF_BUILD_CUDA": "1"}
    if runner.has_gpu:
        command += ["--inplace"]
        if not os.environ.get("CKF_CUDA_ARCHS") and own_arch() is not None:
            extra["CKF_CUDA_ARCHS"] = own_arch()
    elif find_nvcc() is None:
        runner.skip("build", "no nvcc in CUDA_HOME, on PATH or in /usr/local/cuda/bin")
        return
    else:  # the tree's own extension stays as it is
        command += ["--build-lib", str(runner.folder / "lib")]
        command += ["--build-temp", str(runner.folder / "temp")]
    runner.run("build", command, limit(runner, "build", reserved), **extra)
    log = ROOT / "build" / "cuda_build.log"
    if log.exists():
        shutil.copy(log, runner.folder / "nvcc.log")


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc", path=os.pathsep.join([f"{home}/bin", os.environ.get("PATH", "")]))


def own_arch() -> str | None:
    """The name by which setup.py builds for the GPU at hand alone, if it is one of its own."""
    import torch

    return ARCHS.get(torch.cuda.get_device_capability(0))


def has_extension() -> bool:
    return any((ROOT / "ckf").glob("_C*.so"))


def build_if_missing(runner: Runner, reserved: float) -> None:
    """A fresh machine has no ckf._C, and the CUDA kernels would be left out in silence."""
    tried = any(step["step"] == "build" for step in runner.steps)
    if runner.has_gpu and not tried and not has_extension() and find_nvcc() is not None:
        part_build(runner, reserved)


def side_by_side() -> list[str]:
    """Most of the GPU tests' time is Triton compiling on one core: several processes where they
    can be had."""
    if importlib.util.find_spec("xdist") is None:
        return []
    return ["-n", str(max(1, min(8, (os.cpu_count() or 2) // 2)))]


def part_tests(runner: Runner, reserved: float) -> None:
    build_if_missing(runner, reserved)
    if runner.has_gpu:
        command = pytest_command("-rs", "-m", "gpu", *side_by_side(), *gpu_test_files())
        runner.run("tests", command, limit(runner, "tests", reserved))
        return
    command = pytest_command("--collect-only", "-m", "gpu", *gpu_test_files())
    runner.run("tests_collected", command, limit(runner, "tests", reserved))
    runner.skip("tests", "no GPU: collected, not run")
    for name in (
        "test_cuda_bridge",
        "test_cuda_build",
        "test_cuda_host",
        "test_cuda_hopper_host",
        "test_triton_compile",
    ):
        command = pytest_command("-m", "not gpu and not slow", f"tests/kernels/{name}.py")
        runner.run(name, command, runner.left() - reserved)


def part_sanitize(runner: Runner, reserved: float) -> None:
    tool = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    why = "no GPU" if not runner.has_gpu else "compute-sanitizer is not on PATH"
    if tool is None or not runner.has_gpu:
        for kernels in ("cuda", "triton"):
            for name in SANITIZERS:
                runner.skip(f"sanitize_{kernels}_{name}", why)
        return
    build_if_missing(runner, reserved)
    seconds = LIMITS["sanitize"] if reserved else SANITIZE_ALONE
    files = gpu_test_files()
    own = [file for file in files if file.endswith(("test_cuda_gpu.py", "test_cuda_hopper_gpu.py"))]
    # apart, so that what a tool says of cuBLAS or Triton hides nothing that it says of csrc
    for kernels, part in {"cuda": own, "triton": [f for f in files if f not in own]}.items():
        tests = pytest_command("-m", "gpu", "-k", "small", *part)
        for name, options in SANITIZERS.items():
            command = [tool, "--tool", name, "--error-exitcode", str(SANITIZER_ERROR)]
            # Without torch's pool every tensor is an allocation of its own, with borders to overrun
            runner.run(
                f"sanitize_{kernels}_{name}",
                [*command, *options, *tests],
                min(seconds, runner.left() - reserved),
                PYTORCH_NO_CUDA_MEMORY_CACHING="1",
            )


def part_bench(runner: Runner, reserved: float) -> None:
    build_if_missing(runner, reserved)
    quick = not runner.has_gpu or runner.left() < QUICK_UNDER
    found = []
    for name in WEIGHTS:
        if not (ROOT / "benchmarks" / f"{name}.py").exists():
            runner.skip(name, f"there is no benchmarks/{name}.py")
        elif quick and runner.has_gpu and name == "bench_scaling":
            runner.skip(name, f"under {QUICK_UNDER} s left for all benchmarks")
        else:
            found.append(name)
    for i, name in enumerate(found):
        command = [sys.executable, f"benchmarks/{name}.py"]
        command += ["--device", "cuda" if runner.has_gpu else "cpu", "--out", str(runner.folder)]
        # a share of what is left; what a script does not use goes to those after it
        share = (runner.left() - LIMITS["plots"] / 2) * WEIGHTS[name]
        share /= sum(WEIGHTS[other] for other in found[i:])
        runner.run(name, [*command, *["--quick"] * quick], min(LIMITS["bench"], share))
        if name == "bench_linear":
            make_table(runner)
    if importlib.util.find_spec("matplotlib") is None:
        runner.skip("plots", "matplotlib is not installed; the records can be drawn anywhere")
        return
    command = [sys.executable, "benchmarks/plots.py", "--results", str(runner.folder)]
    runner.run("plots", command, LIMITS["plots"])


def make_table(runner: Runner) -> None:
    """So that the benchmarks after bench_linear measure what backend="auto" chooses by it."""
    if not runner.has_gpu or not (runner.folder / "bench_linear.json").exists():
        return
    table = runner.folder / TABLE
    command = [sys.executable, "benchmarks/make_table.py", "--results", str(runner.folder)]
    if runner.run("table", [*command, "--out", str(table)], LIMITS["plots"]):
        installed = ROOT / "ckf" / "kernels" / "tables" / f"{runner.folder.name}.json"
        installed.parent.mkdir(exist_ok=True)
        shutil.copy(table, installed)
        print(f"{TABLE} is in {installed} as well", flush=True)


def pack(folder: Path) -> Path:
    """All files of the folder in one, for machines that give back few."""
    archive = folder.with_name(f"{folder.name}.tar.gz")
    temporary = archive.with_name(f"{archive.name}.tmp")
    with tarfile.open(temporary, "w:gz") as tar:
        tar.add(folder, folder.name)
    return temporary.replace(archive)


def run_parts(runner: Runner, parts: tuple[str, ...]) -> None:
    steps = {
        "build": part_build,
        "tests": part_tests,
        "sanitize": part_sanitize,
        "bench": part_bench,
    }
    for part in parts:
        steps[part](runner, RESERVED[part] if len(parts) > 1 else 0)
        if part == "build" and runner.failed() and runner.has_gpu:
            print("the build failed: the other parts would test an older one", file=sys.stderr)
            return


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", nargs="?", default="all", choices=[*PARTS, "all"])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--minutes", type=float, help="for all steps together; 9, rehearsal 20")
    options = parser.parse_args(argv)
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    try:
        import torch
    except ImportError as error:
        print(f"no torch for {sys.executable}: {error}", file=sys.stderr)
        return 2
    sys.path.insert(0, str(ROOT))
    from ckf.kernels.dispatch import device_slug  # needs torch

    has_gpu = torch.cuda.is_available()
    found = environment(torch)
    folder = options.out.resolve() / device_slug(found["gpu"]) if has_gpu else REHEARSAL
    minutes = options.minutes or (9 if has_gpu else 20)
    spent = time.monotonic() - STARTED
    runner = Runner(folder, has_gpu, minutes * 60 - GRACE_SECONDS - spent)
    (folder / "environment.json").write_text(json.dumps(found, indent=1) + "\n")
    if not has_gpu:
        print("no GPU: torch.cuda.is_available() is False; this is a rehearsal", file=sys.stderr)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the step that runs as well
    try:
        run_parts(runner, PARTS if options.part == "all" else (options.part,))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
    finally:
        archive = pack(folder)
    for step in runner.steps:
        print(f"{step['state']:>11s}  {step['step']}  {step.get('why', '')}".rstrip())
    failed = runner.failed()
    state = f"NOT PASSED: {', '.join(failed)}" if failed else "no failure"
    print(f"results in {folder}, all of them in {archive}; {state}")
    return 2 if not has_gpu else 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
