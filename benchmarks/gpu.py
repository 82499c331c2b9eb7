"""Everything a GPU machine is needed for, in one command that needs no network.

``python3 benchmarks/gpu.py [build|tests|sanitize|bench|all] [--out FOLDER]``

Uses the interpreter it is run with. Results go to FOLDER/<gpu>/: environment.json, one log a step
and summary.json, written after every step, so that an interrupted run keeps what it has.
Exit status: 0 if every step passed, 1 if one failed, 2 if there is no GPU.
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("build", "tests", "sanitize", "bench")
SANITIZER_ERROR = 86
SANITIZERS = {
    "memcheck": ["--report-api-errors", "no"],  # the bridge raises on those itself
    "racecheck": [],
    "initcheck": [],
    "synccheck": [],
}


def slug(name: str) -> str:
    """NVIDIA H200 -> h200."""
    words = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return words.removeprefix("nvidia-")


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
    import importlib.metadata

    versions = {}
    for name in ("torch", "triton", "transformers", "numpy", "peft", "pytest"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    properties = torch.cuda.get_device_properties(0)
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": output_of(["git", "rev-parse", "HEAD"]),
        "uncommitted": output_of(["git", "status", "--porcelain"]) != "",
        "gpu": properties.name,
        "gpus": torch.cuda.device_count(),
        "capability": list(torch.cuda.get_device_capability(0)),
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "driver": output_of(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]),
        "cuda": torch.version.cuda,
        "nvcc": output_of(["nvcc", "--version"]),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
    }


class Runner:
    """Runs the steps, keeps their logs and a summary on disk at all times."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.steps: list[dict] = []

    def skip(self, name: str, why: str) -> None:
        print(f"-- {name}: SKIPPED, {why}", flush=True)
        self._add({"step": name, "state": "skipped", "why": why})

    def run(self, name: str, command: list[str], **extra_environment: str) -> bool:
        """True if the command exits with 0; its output goes to the screen and to <name>.log."""
        print(f"-- {name}: {' '.join(command)}", flush=True)
        step = {"step": name, "state": "interrupted", "command": command}
        self._add(step)
        start = time.monotonic()
        with (self.folder / f"{name}.log").open("w") as log:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | extra_environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for line in process.stdout:
                print(line, end="", flush=True)
                log.write(line)
                log.flush()
            status = process.wait()
        step |= {"seconds": round(time.monotonic() - start, 1), "exit_status": status}
        step["state"] = "passed" if status == 0 else "FAILED"
        self._write()
        print(f"-- {name}: {step['state']} in {step['seconds']} s", flush=True)
        return status == 0

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


def part_build(runner: Runner) -> None:
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    runner.run("build", command, CKF_BUILD_CUDA="1")
    log = ROOT / "build" / "cuda_build.log"
    if log.exists():
        shutil.copy(log, runner.folder / "nvcc.log")


def part_tests(runner: Runner) -> None:
    # By file: others may need data-preparation packages that a GPU machine lacks.
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    marked = [str(f.relative_to(ROOT)) for f in files if "mark.gpu" in f.read_text()]
    runner.run("tests", [sys.executable, "-m", "pytest", "-q", "-rs", "-m", "gpu", *marked])


def part_sanitize(runner: Runner) -> None:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        runner.skip("sanitize", "compute-sanitizer is not on PATH")
        return
    tests = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    tests += ["-k", "small", "tests/kernels/test_cuda_bridge.py"]
    for name, options in SANITIZERS.items():
        command = [tool, "--tool", name, "--error-exitcode", str(SANITIZER_ERROR), *options, *tests]
        # Without torch's pool every tensor is an allocation of its own, with borders to overrun.
        runner.run(f"sanitize_{name}", command, PYTORCH_NO_CUDA_MEMORY_CACHING="1")


def part_bench(runner: Runner) -> None:
    scripts = sorted((ROOT / "benchmarks").glob("bench_linear*.py"))
    if not scripts:
        runner.skip("bench", "there is no benchmarks/bench_linear.py")
    for script in scripts:
        command = [sys.executable, str(script.relative_to(ROOT)), "--device", "cuda"]
        runner.run(script.stem, [*command, "--out", str(runner.folder)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", nargs="?", default="all", choices=[*PARTS, "all"])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    try:
        import torch
    except ImportError as error:
        print(f"no torch for {sys.executable}: {error}", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("no GPU: torch.cuda.is_available() is False; make test needs none", file=sys.stderr)
        return 2
    found = environment(torch)
    folder = options.out.resolve() / slug(found["gpu"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "environment.json").write_text(json.dumps(found, indent=1) + "\n")
    runner = Runner(folder)
    steps = {
        "build": part_build,
        "tests": part_tests,
        "sanitize": part_sanitize,
        "bench": part_bench,
    }
    try:
        for part in PARTS if options.part == "all" else [options.part]:
            steps[part](runner)
            if part == "build" and runner.failed():
                print("the build failed: the other parts would test an older one", file=sys.stderr)
                break
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
    failed = runner.failed()
    print(f"results in {folder}; " + (f"FAILED: {', '.join(failed)}" if failed else "all passed"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
