"""Everything a GPU machine is needed for, in one command that needs no network.

``python3 benchmarks/gpu.py [build|tests|sanitize|bench|all] [--out FOLDER] [--minutes N]``

Uses the interpreter it is run with. Results go to FOLDER/<gpu>/: environment.json, one log a step
and summary.json, written after every step, so that an interrupted run keeps what it has. Every step
has a time limit, and together they keep to ``--minutes`` (10).
Without a GPU it is a rehearsal in build/gpu_rehearsal/: it builds if nvcc is there, collects the
GPU tests without running them and runs what a CPU can.
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
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REHEARSAL = ROOT / "build" / "gpu_rehearsal"
PARTS = ("build", "tests", "sanitize", "bench")
SANITIZER_ERROR = 86
SANITIZERS = {
    "memcheck": ["--report-api-errors", "no"],  # the bridge raises on those itself
    "racecheck": [],
    "initcheck": [],
}
BENCHMARKS = ("bench_linear", "bench_decode", "bench_step", "bench_scaling")
# Seconds: the most a step may take, and what "all" leaves for the steps after a part.
LIMITS = {"build": 300, "tests": 240, "sanitize": 120, "bench": 600, "plots": 60}
RESERVED = {"build": 240, "tests": 180, "sanitize": 120, "bench": 0}
GRACE_SECONDS, LEAST_SECONDS = 5, 5  # to write what one has; worth starting a step
TABLE = "table.json"  # what backend="auto" would choose by
QUICK_UNDER = 400  # seconds left for all benchmarks: below it they run with --quick


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
    versions = {}
    for name in ("torch", "triton", "transformers", "numpy", "peft", "pytest"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    found = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": output_of(["git", "rev-parse", "HEAD"]),
        "uncommitted": output_of(["git", "status", "--porcelain"]) != "",
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
    if runner.has_gpu:
        command += ["--inplace"]
    elif find_nvcc() is None:
        runner.skip("build", "no nvcc in CUDA_HOME, on PATH or in /usr/local/cuda/bin")
        return
    else:  # the tree's own extension stays as it is
        command += ["--build-lib", str(runner.folder / "lib")]
        command += ["--build-temp", str(runner.folder / "temp")]
    runner.run("build", command, limit(runner, "build", reserved), CKF_BUILD_CUDA="1")
    log = ROOT / "build" / "cuda_build.log"
    if log.exists():
        shutil.copy(log, runner.folder / "nvcc.log")


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc", path=os.pathsep.join([f"{home}/bin", os.environ.get("PATH", "")]))


def side_by_side() -> list[str]:
    """Most of the GPU tests' time is Triton compiling on one core: several processes where they
    can be had."""
    if importlib.util.find_spec("xdist") is None:
        return []
    return ["-n", str(max(1, min(8, (os.cpu_count() or 2) // 2)))]


def part_tests(runner: Runner, reserved: float) -> None:
    if runner.has_gpu:
        command = pytest_command("-rs", "-m", "gpu", *side_by_side(), *gpu_test_files())
        runner.run("tests", command, limit(runner, "tests", reserved))
        return
    command = pytest_command("--collect-only", "-m", "gpu", *gpu_test_files())
    runner.run("tests_collected", command, limit(runner, "tests", reserved))
    runner.skip("tests", "no GPU: collected, not run")
    for name in ("test_cuda_bridge", "test_cuda_build", "test_cuda_host", "test_triton_compile"):
        command = pytest_command("-m", "not gpu and not slow", f"tests/kernels/{name}.py")
        runner.run(name, command, runner.left() - reserved)


def part_sanitize(runner: Runner, reserved: float) -> None:
    tool = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    why = "no GPU" if not runner.has_gpu else "compute-sanitizer is not on PATH"
    if tool is None or not runner.has_gpu:
        for name in SANITIZERS:
            runner.skip(f"sanitize_{name}", why)
        return
    tests = pytest_command("-m", "gpu", "-k", "small", *gpu_test_files())
    for name, options in SANITIZERS.items():
        command = [tool, "--tool", name, "--error-exitcode", str(SANITIZER_ERROR), *options, *tests]
        # Without torch's pool every tensor is an allocation of its own, with borders to overrun.
        seconds = limit(runner, "sanitize", reserved)
        runner.run(f"sanitize_{name}", command, seconds, PYTORCH_NO_CUDA_MEMORY_CACHING="1")


def part_bench(runner: Runner, reserved: float) -> None:
    del reserved  # nothing comes after
    scripts = {name: ROOT / "benchmarks" / f"{name}.py" for name in BENCHMARKS}
    found = [name for name, path in scripts.items() if path.exists()]
    for name in sorted(set(BENCHMARKS) - set(found)):
        runner.skip(name, f"there is no benchmarks/{name}.py")
    quick = not runner.has_gpu or runner.left() < QUICK_UNDER
    for i, name in enumerate(found):
        command = [sys.executable, f"benchmarks/{name}.py"]
        command += ["--device", "cuda" if runner.has_gpu else "cpu", "--out", str(runner.folder)]
        # An equal share of what is left; what a script does not use goes to those after it.
        share = (runner.left() - LIMITS["plots"] / 2) / (len(found) - i)
        runner.run(name, [*command, *["--quick"] * quick], min(LIMITS["bench"], share))
    if runner.has_gpu and (runner.folder / "bench_linear.json").exists():
        command = [sys.executable, "benchmarks/make_table.py", "--results", str(runner.folder)]
        runner.run("table", [*command, "--out", str(runner.folder / TABLE)], LIMITS["plots"])
        print(f'copy {TABLE} to ckf/kernels/tables/{runner.folder.name}.json for backend="auto"')
    if (ROOT / "benchmarks" / "plots.py").exists():
        command = [sys.executable, "benchmarks/plots.py", "--results", str(runner.folder)]
        runner.run("plots", command, LIMITS["plots"])
    else:
        runner.skip("plots", "there is no benchmarks/plots.py")


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
    parser.add_argument("--minutes", type=float, help="for all steps together; 10, rehearsal 20")
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
    minutes = options.minutes or (10 if has_gpu else 20)
    runner = Runner(folder, has_gpu, minutes * 60 - GRACE_SECONDS)
    (folder / "environment.json").write_text(json.dumps(found, indent=1) + "\n")
    if not has_gpu:
        print("no GPU: torch.cuda.is_available() is False; this is a rehearsal", file=sys.stderr)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the step that runs as well
    try:
        run_parts(runner, PARTS if options.part == "all" else (options.part,))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
    for step in runner.steps:
        print(f"{step['state']:>11s}  {step['step']}  {step.get('why', '')}".rstrip())
    failed = runner.failed()
    print(
        f"results in {folder}; " + (f"NOT PASSED: {', '.join(failed)}" if failed else "no failure")
    )
    return 2 if not has_gpu else 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
