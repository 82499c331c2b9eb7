"""Everything a GPU machine is needed for, in one command that needs no network.

``python3 benchmarks/gpu.py [build|tests|sanitize|bench|goals|all] [--out FOLDER] [--minutes N]
[--archive FOLDER]``

Uses the interpreter it is run with. Results go to FOLDER/<gpu>/: environment.json, one log a step
and summary.json, so that an interrupted run keeps what it has; all of it is packed into
<gpu>.tar.gz as it grows (beside the folder, or in --archive). Every step has a time limit, and
together they keep to ``--minutes`` (9, so that the whole fits in ten). "all" is build, the tests of
csrc, the benchmarks (each checks its figures), the Triton tests, compute-sanitizer: what is cut off
is what can be run again alone, and what there is no time for is not begun. With 25 minutes it is
all done. "goals", about 8 minutes: what each goal is read from, then racecheck of what never had
it. CKF_COMMIT names the commit of a copy.
Without a GPU it is a rehearsal in build/gpu_rehearsal/: a build where nvcc is, the GPU tests only
collected, and what a CPU can run.
Exit status: 0 if no step failed and time was left for each, 1 if not, 2 without a GPU or torch.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

STARTED = time.monotonic()  # importing torch takes its share of the time as well
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu_environment import environment, find_nvcc, output_of  # noqa: E402
from benchmarks.gpu_runner import GRACE_SECONDS, Runner  # noqa: E402

REHEARSAL = ROOT / "build" / "gpu_rehearsal"
PARTS = ("build", "tests", "sanitize", "bench")
GOALS = (  # script, its option, seconds at most
    ("bench_decode", "--quick", 60),
    ("bench_linear", "--goals", 55),
    ("bench_scaling", "--goals", 35),
    ("bench_gemm", "--goals", 40),
    ("bench_step", "--goals", 150),
)
SANITIZER_ERROR = 86
SANITIZERS = {
    "memcheck": ["--report-api-errors", "no"],  # the bridge raises on those itself
    "racecheck": [],
    "initcheck": [],
}
HOPPER_TESTS, CUDA_TESTS = "test_cuda_hopper_gpu.py", "test_cuda_gpu.py"
LINEAR_TESTS = "test_cuda_linear_gpu.py"
CSRC_TESTS = (("hopper", HOPPER_TESTS, 1), ("decode", CUDA_TESTS, 4), ("linear", LINEAR_TESTS, 4))
TRITON_SANITIZED = "test_cuda_sanitized.py"
TRITON_TESTS = "test_triton_gpu.py"
REPEATED = "any_call or no_more_memory or (repeated and dense)"  # passes of one kind again
# What never had a verdict first. A process each: one that hangs costs no other its own; racecheck,
# the slowest by far, in several.
SANITIZED = (
    ("hopper", HOPPER_TESTS, "racecheck"),
    ("triton", TRITON_SANITIZED, "racecheck"),
    ("decode", CUDA_TESTS, "memcheck"),
    ("linear", LINEAR_TESTS, "memcheck"),
    ("hopper", HOPPER_TESTS, "memcheck"),
    ("triton", TRITON_SANITIZED, "memcheck"),
    ("decode", CUDA_TESTS, "racecheck"),
    ("linear", LINEAR_TESTS, "racecheck"),
    ("decode", CUDA_TESTS, "initcheck"),
    ("linear", LINEAR_TESTS, "initcheck"),
    ("hopper", HOPPER_TESTS, "initcheck"),
    ("triton", TRITON_SANITIZED, "initcheck"),
)
SHARDS = {"racecheck": 4}
# The benchmarks' shares of the time, and the seconds below which a share is one for --quick.
WEIGHTS = {
    "bench_linear": 5,
    "bench_gemm": 2,
    "bench_decode": 4,
    "bench_training": 3,
    "bench_step": 6,
    "bench_scaling": 2,
}
FULL_FROM = {
    "bench_linear": 150,
    "bench_gemm": 60,
    "bench_decode": 200,
    "bench_training": 130,
    "bench_step": 240,
    "bench_scaling": 60,
}
# Seconds: the most a step may take, what "all" leaves for the steps after a part, and what it
# leaves for those after the benchmarks where these keep BENCH_SECONDS.
LIMITS = {
    "build": 300, "cuda_tests": 120, "bench": 600, "plots": 60, "triton_tests": 300,
    "sanitize": 100,
}  # fmt: skip
RESERVED = {"build": 240, "cuda_tests": 300, "bench": 60}
BENCH_SECONDS, AFTER_BENCH = 300, 720  # Triton tests and sanitizers
LEAST_TRITON = 200  # all of these tests; a part of them tells little
LEAST_SANITIZER = {"memcheck": 45, "racecheck": 90, "initcheck": 45}  # torch starts slowly
TEST_SECONDS = 60  # a test: a kernel that hangs must not take the time of all
TABLE = "table.json"  # what backend="auto" would choose by
ARCHS = {(8, 0): "sm_80", (9, 0): "sm_90a", (10, 0): "sm_100"}


def limit(runner: Runner, part: str, reserved: float = 0) -> float:
    """Seconds a step of a part may take: its own limit, less if the parts after it need time."""
    return min(LIMITS[part], runner.left() - reserved)


def pytest_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]


def gpu_tests(files: list[str], processes: int = 1) -> list[str]:
    """pytest on GPU tests, each named as it ends. A kernel that hangs is seen by a thread alone,
    which ends its process; others go on where there are several."""
    arguments = ["-v", "-v", "-rs", "-m", "gpu", "-p", "benchmarks.first_failures"]
    if importlib.util.find_spec("pytest_timeout") is not None:
        arguments += [f"--timeout={TEST_SECONDS}", "-o", "timeout_method=thread"]
    if importlib.util.find_spec("xdist") is not None and processes > 1:
        arguments += ["-n", str(processes)]
    return pytest_command(*arguments, *files)


def pytest_jobs(name: str, files: list[str], processes: int) -> list[tuple[str, list[str], dict]]:
    """For ``Runner.run_beside``: one step, or without xdist one a process."""
    command = gpu_tests(files, processes)
    if processes == 1 or importlib.util.find_spec("xdist") is not None:
        return [(name, command, {"OMP_NUM_THREADS": "1"})]
    return sharded(name, command, processes, OMP_NUM_THREADS="1")


def sharded(name: str, pytest: list[str], parts: int, **environment: str) -> list[tuple]:
    """The command so many times, each with its part of the tests."""
    command = [*pytest, "-p", "benchmarks.shard"]
    return [
        (f"{name}_{i}", command, environment | {"CKF_SHARD": f"{i}/{parts}"})
        for i in range(1, parts + 1)
    ]


def gpu_test_files() -> list[str]:
    """By file: others may need data-preparation packages that a GPU machine lacks."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(f.relative_to(ROOT)) for f in files if "mark.gpu" in f.read_text()]


def named(name: str) -> list[str]:
    return [file for file in gpu_test_files() if file.endswith(f"/{name}")]


def part_build(runner: Runner, reserved: float) -> bool:
    """Whether the other parts may go on: False where the extension would be an older one."""
    command = [sys.executable, "setup.py", "build_ext"]
    extra = {"CKF_BUILD_CUDA": "1", "CKF_BUILD_CPU": "0"}
    if runner.has_gpu:
        command += ["--inplace"]
        if not os.environ.get("CKF_CUDA_ARCHS") and own_arch() is not None:
            extra["CKF_CUDA_ARCHS"] = own_arch()
    elif find_nvcc() is None:
        runner.skip("build", "no nvcc in CUDA_HOME, on PATH or in /usr/local/cuda/bin")
        return True
    else:  # the tree's own extension stays as it is
        command += ["--build-lib", str(runner.folder / "lib")]
        command += ["--build-temp", str(runner.folder / "temp")]
    built = runner.run("build", command, limit(runner, "build", reserved), **extra)
    log = ROOT / "build" / "cuda_build.log"
    if log.exists():
        shutil.copy(log, runner.folder / "nvcc.log")
    if not built and runner.has_gpu:
        print("the build failed: the other parts would test an older one", file=sys.stderr)
    return built or not runner.has_gpu


def own_arch() -> str | None:
    """The name by which setup.py builds for the GPU at hand alone, if it is one of its own."""
    import torch

    return ARCHS.get(torch.cuda.get_device_capability(0))


def extension_is_current() -> bool:
    """Whether there is a ckf._C, of the sources as they are."""
    path = next((ROOT / "ckf").glob("_C*.so"), None)
    if path is None:
        return False
    code = (  # in a process of its own: a loaded library must not be built over
        "import importlib.util as u, setup; "
        f"spec = u.spec_from_file_location('_C', {str(path)!r}); "
        "module = u.module_from_spec(spec); spec.loader.exec_module(module); "
        "print(module.build_info()['sources'] == setup.sources_hash())"
    )
    return output_of([sys.executable, "-c", code], ROOT) == "True"


def build_if_needed(runner: Runner, reserved: float) -> bool:
    """A fresh machine has no ckf._C, and the CUDA kernels would be left out in silence; False
    where it could not be built."""
    tried = any(step["step"] == "build" for step in runner.steps)
    if not runner.has_gpu or tried or find_nvcc() is None or extension_is_current():
        return True
    return part_build(runner, reserved)


def part_tests(runner: Runner, reserved: float) -> None:
    if runner.has_gpu:
        part_cuda_tests(runner, reserved)
        part_triton_tests(runner, reserved)
    else:
        rehearse_tests(runner, reserved)


def part_cuda_tests(runner: Runner, reserved: float, more: Sequence[tuple] = ()) -> None:
    """csrc's own (and ``more``) side by side, a step a file: which kernel failed is asked later."""
    jobs = list(more) + [
        job
        for name, file, processes in CSRC_TESTS
        for job in pytest_jobs(f"tests_{name}", named(file), processes)
    ]
    # what xdist knows of a process that hangs, it says after ten seconds
    runner.run_beside(jobs, limit(runner, "cuda_tests", reserved), grace=15)


def part_triton_tests(runner: Runner, reserved: float) -> None:
    """All others: most of their time is Triton compiling, a core a process."""
    own = tuple(file for _, file, _ in CSRC_TESTS)
    files = [f for f in gpu_test_files() if not f.endswith(own)]
    jobs = pytest_jobs("tests_triton", files, max(1, min(14, (os.cpu_count() or 2) - 2)))
    seconds = limit(runner, "triton_tests", reserved)
    runner.run_beside(jobs, seconds, least=LEAST_TRITON, grace=15)


def rehearse_tests(runner: Runner, reserved: float) -> None:
    command = pytest_command("--collect-only", "-m", "gpu", *gpu_test_files())
    runner.run("tests_collected", command, limit(runner, "triton_tests", reserved))
    runner.skip("tests", "no GPU: collected, not run")
    for name in (
        "test_cuda_bridge",
        "test_cuda_build",
        "test_cuda_host",
        "test_cuda_host_defects",
        "test_cuda_hopper_host",
        "test_cuda_hopper_shrink",
        "test_cuda_linear_host",
        "test_cuda_linear_host_defects",
        "test_triton_compile",
    ):
        command = pytest_command("-m", "not gpu and not slow", f"tests/kernels/{name}.py")
        runner.run(name, command, runner.left() - reserved)


def part_sanitize(runner: Runner, reserved: float) -> None:
    for kernels, file, name in SANITIZED:
        seconds = limit(runner, "sanitize", reserved)
        sanitize(runner, [(kernels, file, name)], seconds, LEAST_SANITIZER[name])


def sanitize(runner: Runner, chosen: Sequence[tuple], seconds: float, least: float) -> None:
    """Those of SANITIZED at once, or why they are not run."""
    tool = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    jobs = []
    for kernels, file, name in chosen:
        step = f"sanitize_{kernels}_{name}"
        if tool is None or not runner.has_gpu:
            why = "compute-sanitizer is not on PATH" if runner.has_gpu else "no GPU"
            runner.skip(step, why)
            continue
        if seconds < least:
            why = f"{max(seconds, 0):.0f} s left, it takes {least} or more"
            runner.skip(step, why, "not done")
            continue
        command = [tool, "--tool", name, "--error-exitcode", str(SANITIZER_ERROR)]
        command += [*SANITIZERS[name], *pytest_command("-m", "gpu", "-k", "small", *named(file))]
        # Without torch's pool every tensor is an allocation of its own, with borders to overrun
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        parts = SHARDS.get(name, 1)
        if parts > 1:
            jobs += sharded(step, command, parts, **environment)
        else:
            jobs.append((step, command, environment))
    if jobs:
        runner.run_beside(jobs, seconds)


def part_goals(runner: Runner, reserved: float) -> None:
    """What the goals are read from; then, for all that is left, what never had a verdict."""
    if runner.has_gpu:
        repeated = pytest_jobs("tests_repeated", [*named(TRITON_TESTS), "-k", REPEATED], 4)
        part_cuda_tests(runner, reserved, repeated)
    else:
        runner.skip("tests", "no GPU")
    for name, option, seconds in GOALS:
        left = runner.left() - reserved
        run_bench(runner, name, min(seconds, left) if runner.has_gpu else left, option)
    sanitize(runner, SANITIZED[:2], runner.left() - reserved, least=45)


def part_bench(runner: Runner, reserved: float) -> None:
    found = []
    for name in WEIGHTS:
        if (ROOT / "benchmarks" / f"{name}.py").exists():
            found.append(name)
        else:
            runner.skip(name, f"there is no benchmarks/{name}.py")
    end = reserved + LIMITS["plots"] / 2
    for i, name in enumerate(found):
        # a share of what is left; what a script does not use goes to those after it
        share = (runner.left() - end) * WEIGHTS[name]
        share = min(LIMITS["bench"], share / sum(WEIGHTS[other] for other in found[i:]))
        run_bench(runner, name, share, *(["--quick"] if share < FULL_FROM[name] else []))
        if name == "bench_linear":
            make_table(runner)
    if importlib.util.find_spec("matplotlib") is None:
        runner.skip("plots", "matplotlib is not installed; the records can be drawn anywhere")
        return
    command = [sys.executable, "benchmarks/plots.py", "--results", str(runner.folder)]
    runner.run("plots", command, LIMITS["plots"])


def run_bench(runner: Runner, name: str, seconds: float, *options: str) -> None:
    command = [sys.executable, f"benchmarks/{name}.py", "--out", str(runner.folder)]
    if runner.has_gpu:
        command += ["--device", "cuda", *options]
    else:
        command += ["--device", "cpu", "--quick"]
    if name == "bench_gemm" and "tests_hopper" in runner.failed():
        command += ["--without", "hopper"]  # one that hangs would take the others' figures
    runner.run(name, command, seconds, partial=runner.folder / f"{name}.json")


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


STEPS = {
    "build": part_build,
    "tests": part_tests,
    "cuda_tests": part_cuda_tests,
    "triton_tests": part_triton_tests,
    "sanitize": part_sanitize,
    "bench": part_bench,
    "goals": part_goals,
}
ALL = ("build", "cuda_tests", "bench", "triton_tests", "sanitize")


def reserved_by(runner: Runner, part: str) -> float:
    """Seconds that "all" leaves for what comes after a part. The benchmarks go first where time is
    short."""
    if not runner.has_gpu:
        return 120 if part == "tests" else 0
    if part == "bench" and runner.left() >= BENCH_SECONDS + AFTER_BENCH:
        return AFTER_BENCH
    return RESERVED.get(part, 0)


def run_parts(runner: Runner, part: str) -> None:
    """One part, or "all"; none after a build that failed."""
    if part == "build":
        part_build(runner, 0)
        return
    if part == "all":
        parts = ALL if runner.has_gpu else PARTS  # a rehearsal needs no order
        ready = part_build(runner, reserved_by(runner, "build"))
        for name in parts[1:] if ready else ():
            STEPS[name](runner, reserved_by(runner, name))
    elif build_if_needed(runner, 0):
        STEPS[part](runner, 0)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", nargs="?", default="all", choices=[*PARTS, "goals", "all"])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--archive", type=Path, help="where to pack it to; beside the results")
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
    from ckf.kernels.dispatch import device_slug  # needs torch

    has_gpu = torch.cuda.is_available()
    found = environment(torch)
    folder = options.out.resolve() / device_slug(found["gpu"]) if has_gpu else REHEARSAL
    archive = options.archive.resolve() if has_gpu and options.archive else folder.parent
    minutes = options.minutes or (9 if has_gpu else 20)
    spent = time.monotonic() - STARTED
    seconds = minutes * 60 - GRACE_SECONDS - spent
    runner = Runner(folder, has_gpu, seconds, found["sources"], archive)
    (folder / "environment.json").write_text(json.dumps(found, indent=1) + "\n")
    if not has_gpu:
        print("no GPU: torch.cuda.is_available() is False; this is a rehearsal", file=sys.stderr)
    if found["commit"] is None:
        print("no .git here and no CKF_COMMIT: the records will name no commit", file=sys.stderr)
    # SIGTERM ends the step that runs as well; SIGINT, which ends a late step, is one that a shell's
    # background job ignores, and so would all that it starts
    for ending in (signal.SIGTERM, signal.SIGINT):
        signal.signal(ending, signal.default_int_handler)
    try:
        run_parts(runner, options.part)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
    finally:
        packed = runner.pack()
    for step in runner.steps:
        print(f"{step['state']:>11s}  {step['step']}  {step.get('why', '')}".rstrip())
    print(f"results in {folder}, all of them in {packed}; {in_short(runner)}")
    return 2 if not has_gpu else 1 if runner.failed() or runner.those("not done") else 0


def in_short(runner: Runner) -> str:
    """What failed, and what has no verdict or not all its figures."""
    failed = runner.failed()
    words = [f"NOT PASSED: {', '.join(failed)}" if failed else "no failure"]
    for state, name in (("not done", "NOT DONE"), ("skipped", "skipped"), ("partial", "cut off")):
        if steps := runner.those(state):
            words.append(f"{name}: {', '.join(steps)}")
    return "; ".join(words)


if __name__ == "__main__":
    sys.exit(main())
