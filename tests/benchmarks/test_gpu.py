"""The command for a GPU machine: its parts, their shares of the time, and its rehearsal."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import tarfile
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, shard
from ckf.kernels import cuda
from tests.benchmarks.test_gpu_runner import summary


class Calls(dict):
    """What a runner is asked to run, by step: command, limit, environment."""

    def __init__(self, runner, monkeypatch, extension: bool = True):
        self.runner = runner
        monkeypatch.setattr(runner, "run", self.note)
        monkeypatch.setattr(gpu, "extension_is_current", lambda: extension)

    def note(self, name, command, limit, least=0, grace=None, partial=None, **environment):
        if limit < least:
            self.runner.skip(name, "no time", "not done")
            return False
        self[name] = {"command": command, "limit": limit, "environment": environment}
        self.runner.steps.append({"step": name, "state": "passed"})
        return True


@pytest.fixture
def tree(monkeypatch, tmp_path):
    """A checkout with all benchmarks and nothing else."""
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "ckf" / "kernels").mkdir(parents=True)
    for name in (*gpu.WEIGHTS, "plots"):
        (tmp_path / "benchmarks" / f"{name}.py").touch()
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    return tmp_path


def test_all_benchmarks_on_the_gpu(runner, monkeypatch, tree):
    calls = Calls(runner, monkeypatch)
    (tree / "benchmarks" / "bench_decode.py").unlink()
    gpu.part_bench(runner, 0)
    names = ["linear", "gemm", "training", "step", "scaling"]
    assert list(calls) == [*(f"bench_{name}" for name in names), "plots"]
    out = ["--out", str(runner.folder), "--device", "cuda"]
    assert calls["bench_step"]["command"][2:] == [*out, "--quick"]
    assert summary(runner)["bench_decode"] == "skipped"
    runner.deadline += 1000
    gpu.part_bench(runner, 0)
    assert calls["bench_step"]["command"][2:] == out


def test_a_kernel_that_failed_its_tests_is_not_timed(runner, monkeypatch, tree):
    calls = Calls(runner, monkeypatch)
    runner.steps.append({"step": "tests_hopper", "state": "TIMED OUT"})
    gpu.part_bench(runner, 0)
    assert calls["bench_gemm"]["command"][-2:] == ["--without", "hopper"]
    assert "--without" not in calls["bench_linear"]["command"]


def test_the_table_comes_before_what_goes_by_it(runner, monkeypatch, tree):
    calls = Calls(runner, monkeypatch)
    (runner.folder / "bench_linear.json").touch()
    (runner.folder / "table.json").write_text("{}")
    gpu.part_bench(runner, 0)
    assert list(calls)[:3] == ["bench_linear", "table", "bench_gemm"]
    assert calls["table"]["command"][2:] == [
        *["--results", str(runner.folder)],
        *["--out", str(runner.folder / "table.json")],
    ]
    installed = tree / "ckf" / "kernels" / "tables" / f"{runner.folder.name}.json"
    assert installed.read_text() == "{}"


def test_shares_of_the_time(runner, monkeypatch, tree):
    calls = Calls(runner, monkeypatch)
    monkeypatch.setattr(runner, "left", lambda: 510.0)
    gpu.part_bench(runner, 0)
    shares = [calls[name]["limit"] for name in gpu.WEIGHTS]
    assert shares == pytest.approx(
        [480 * 5 / 22, 480 * 2 / 17, 480 * 4 / 15, 480 * 3 / 11, 480 * 6 / 8, 480]
    )


def test_no_pictures_without_matplotlib(runner, monkeypatch, tree):
    calls = Calls(runner, monkeypatch)
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    gpu.part_bench(runner, 0)
    assert "plots" not in calls and summary(runner)["plots"] == "skipped"


@pytest.mark.parametrize("part", ["tests", "sanitize", "bench", "goals"])
def test_a_fresh_machine_builds_the_extension_once(runner, monkeypatch, tree, part):
    (tree / "tests").mkdir()
    calls = Calls(runner, monkeypatch, extension=False)
    monkeypatch.setattr(gpu.shutil, "which", lambda name, path=None: f"/x/{name}")
    monkeypatch.setattr(gpu, "own_arch", lambda: "sm_90a")
    monkeypatch.delenv("CKF_CUDA_ARCHS", raising=False)
    gpu.run_parts(runner, part)
    assert next(iter(calls)) == "build" and len(calls) > 1
    asked = {"CKF_BUILD_CUDA": "1", "CKF_BUILD_CPU": "0", "CKF_CUDA_ARCHS": "sm_90a"}
    assert calls.pop("build")["environment"] == asked
    gpu.run_parts(runner, part)
    assert "build" not in calls


def test_no_build_where_it_is_there_or_cannot_be(runner, monkeypatch):
    calls = Calls(runner, monkeypatch)
    assert gpu.build_if_needed(runner, 0)
    monkeypatch.setattr(gpu, "extension_is_current", lambda: False)
    monkeypatch.setattr(gpu, "find_nvcc", lambda: None)
    assert gpu.build_if_needed(runner, 0)
    assert not calls


def test_an_extension_of_other_sources_is_none(tree):
    assert not gpu.extension_is_current()
    built = next((Path(__file__).parents[2] / "ckf").glob("_C*.so"), None)
    if built is None:
        pytest.skip("no ckf._C here to ask")
    shutil.copy(built, tree / "ckf")
    for sources in (cuda.build_info()["sources"], "other"):
        (tree / "setup.py").write_text(f"def sources_hash():\n    return {sources!r}\n")
        assert gpu.extension_is_current() == (sources != "other")


@pytest.mark.parametrize(("asked", "own"), [("sm_80", "sm_90a"), ("", None)])
def test_archs_that_were_asked_for_are_built(runner, monkeypatch, asked, own):
    calls = Calls(runner, monkeypatch)
    monkeypatch.setattr(gpu, "own_arch", lambda: own)
    monkeypatch.setenv("CKF_CUDA_ARCHS", asked)
    gpu.part_build(runner, 0)
    assert calls["build"]["environment"] == {"CKF_BUILD_CUDA": "1", "CKF_BUILD_CPU": "0"}


@pytest.mark.parametrize(("cores", "processes"), [(16, 14), (3, 1)])
@pytest.mark.parametrize("xdist", [True, False])
def test_gpu_tests_run_side_by_side(runner, monkeypatch, cores, processes, xdist):
    """Where xdist is missing, processes with a part of the tests each."""
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: xdist or None)
    monkeypatch.setattr(gpu.os, "cpu_count", lambda: cores)
    monkeypatch.setattr(runner, "left", lambda: 500.0)
    calls = Calls(runner, monkeypatch)
    gpu.part_tests(runner, 0)
    wanted = {"tests_hopper": 1, "tests_decode": 4, "tests_linear": 4, "tests_triton": processes}
    names = set()
    for name, count in wanted.items():
        names |= {name} if xdist or count == 1 else {f"{name}_{i + 1}" for i in range(count)}
    assert set(calls) == names
    assert "-n" not in calls["tests_hopper"]["command"], "one that hangs would hide the others"
    files = set()
    for name, call in calls.items():
        command, count = call["command"], wanted["_".join(name.split("_")[:2])]
        assert ("timeout_method=thread" in command) == xdist
        assert call["environment"]["OMP_NUM_THREADS"] == "1"
        files |= {a for a in command if a.startswith("tests/")}
        if xdist and count > 1:
            assert command[command.index("-n") + 1] == str(count)
        elif count > 1:
            part = name.split("_")[-1]
            assert call["environment"]["CKF_SHARD"] == f"{part}/{count}"
            assert command[-2:] == ["-p", "benchmarks.shard"] and "-n" not in command
    assert files == set(gpu.gpu_test_files())


def test_the_parts_of_a_shard_are_the_whole(monkeypatch):
    found = []
    for i in "1234":
        monkeypatch.setenv("CKF_SHARD", f"{i}/4")
        items = list(range(10))
        shard.pytest_collection_modifyitems(items)
        found += items
    assert sorted(found) == list(range(10))


def test_a_shard_is_of_what_was_asked_for(tmp_path):
    """By pytest itself: after -k."""
    lines = [f"def test_{kind}_{i}(): pass" for i in range(4) for kind in ("small", "large")]
    (tmp_path / "test_them.py").write_text("\n".join(lines))
    command = [*gpu.pytest_command("-k", "small", "-vv"), "-p", "benchmarks.shard", str(tmp_path)]
    environment = os.environ | {"CKF_SHARD": "2/2", "PYTHONPATH": str(gpu.ROOT)}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=True
    )
    passed = [line.split("::")[1].split()[0] for line in done.stdout.splitlines() if "::" in line]
    assert passed == ["test_small_1", "test_small_3"], done.stdout


@pytest.mark.parametrize(("left", "most"), [(200.0, 100), (80.0, 80)])
def test_sanitizers_see_every_kernel(runner, monkeypatch, left, most):
    """Racecheck in four processes; without the time for one it is not begun."""
    calls = Calls(runner, monkeypatch)
    monkeypatch.setattr(runner, "left", lambda: left)
    monkeypatch.setattr(gpu.shutil, "which", lambda name, path=None: f"/x/{name}")
    gpu.part_sanitize(runner, 0)
    assert {call["limit"] for call in calls.values()} == {most}
    kinds, races = ("decode", "linear", "hopper", "triton"), left > 90
    names = {f"sanitize_{kind}_{tool}" for tool in ("memcheck", "initcheck") for kind in kinds}
    parts = [f"racecheck_{i}" for i in range(1, 5)] if races else []
    assert set(calls) == names | {f"sanitize_{kind}_{part}" for kind in kinds for part in parts}
    undone = [] if races else [f"sanitize_{k}_racecheck" for k in ("hopper", "triton", *kinds[:2])]
    assert runner.those("not done") == undone
    of_kind = {"decode": "test_cuda_gpu", "linear": "linear_gpu"}
    of_kind |= {"hopper": "hopper_gpu", "triton": "cuda_sanitized"}
    for name, call in calls.items():
        command = call["command"]
        kind, tool = name.split("_")[1:3]
        assert next(f for f in gpu.gpu_test_files() if of_kind[kind] in f) in command
        assert command[command.index("--tool") + 1] == tool
        assert command[command.index("-k") + 1] == "small"
        assert call["environment"].get("CKF_SHARD", "/4").endswith("/4") or tool != "racecheck"


def test_the_goals_in_one_call(runner, monkeypatch):
    """csrc's tests, the figures, then racecheck with all that is left."""
    monkeypatch.setattr(gpu.shutil, "which", lambda name, path=None: f"/x/{name}")
    monkeypatch.setattr(runner, "left", lambda: 465.0)
    calls = Calls(runner, monkeypatch)
    gpu.run_parts(runner, "goals")
    names = [name for name in calls if name.startswith("bench")]
    goals = ["bench_linear", "bench_scaling", "bench_gemm", "bench_step"]
    assert names == ["bench_decode", *goals]
    assert list(calls).index("bench_decode") > list(calls).index("tests_hopper")
    (repeated,) = [name for name in calls if name.startswith("tests_repeated")][:1]
    command = calls[repeated]["command"]
    (file,) = [part for part in command if part.endswith("test_triton_gpu.py")]
    assert command[command.index("-k", 3) + 1] == gpu.REPEATED
    names = re.findall(r"def (test_\w+)", (gpu.ROOT / file).read_text())
    for word in ("any_call", "repeated", "no_more_memory"):
        assert any(word in name for name in names)
    assert "--quick" in calls["bench_decode"]["command"]
    assert all("--goals" in calls[name]["command"] for name in goals)
    assert "table" not in calls, "a few rows are no table"
    races = [name for name in list(calls)[-8:]]
    assert {name[:-2] for name in races} == {
        f"sanitize_{k}_racecheck" for k in ("hopper", "triton")
    }
    assert {calls[name]["limit"] for name in races} == {465.0}
    seconds = sum(most for _, _, most in gpu.GOALS)
    assert 60 + gpu.LIMITS["cuda_tests"] + seconds <= 525, "they fit after a build of a minute"


@pytest.mark.parametrize(("minutes", "kept"), [(9, 60), (25, gpu.AFTER_BENCH)])
def test_the_benchmarks_leave_time_where_there_is_enough_for_all(runner, minutes, kept):
    runner.deadline = time.monotonic() + minutes * 60 - 150  # the build and csrc's tests
    assert gpu.reserved_by(runner, "bench") == kept
    assert gpu.reserved_by(runner, "sanitize") == 0


def test_the_last_line_names_what_was_not_done(runner):
    assert gpu.in_short(runner) == "no failure"
    states = {"a": "passed", "b": "not done", "c": "skipped", "d": "partial", "e": "not done"}
    runner.steps += [{"step": name, "state": state} for name, state in states.items()]
    words = "NOT DONE: b, e; skipped: c; cut off: d"
    assert gpu.in_short(runner) == f"no failure; {words}"
    runner.steps.append({"step": "f", "state": "TIMED OUT"})
    assert gpu.in_short(runner) == f"NOT PASSED: f; {words}"


@pytest.mark.parametrize(("state", "status"), [("passed", 0), ("skipped", 0), ("not done", 1)])
def test_what_was_not_done_is_no_success(monkeypatch, tmp_path, state, status):
    def run(runner, part):
        runner.steps.append({"step": "sanitize", "state": state})

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        gpu, "environment", lambda torch: dict.fromkeys(("gpu", "commit"), "x") | {"sources": "y"}
    )
    monkeypatch.setattr(gpu, "run_parts", run)
    assert gpu.main(["all", "--out", str(tmp_path)]) == status


def test_all_of_it_in_order(runner, monkeypatch, tree):
    """What a second call can do alone comes last."""
    asked = []
    for name in gpu.STEPS:
        note = lambda r, reserved, n=name: asked.append((n, reserved))  # noqa: E731
        monkeypatch.setitem(gpu.STEPS, name, note)
    monkeypatch.setattr(gpu, "part_build", lambda r, reserved: True)
    gpu.run_parts(runner, "all")
    names = ["cuda_tests", "bench", "triton_tests", "sanitize"]
    assert asked == [(name, gpu.RESERVED.get(name, 0)) for name in names]


def test_a_failed_build_stops_the_rest(runner, monkeypatch):
    def fails(*arguments, **options):
        runner.steps.append({"step": "build", "state": "FAILED"})
        return False

    monkeypatch.setattr(runner, "run", fails)
    monkeypatch.setattr(gpu, "own_arch", lambda: None)
    monkeypatch.setattr(gpu, "find_nvcc", lambda: "/x/nvcc")
    monkeypatch.setattr(gpu, "extension_is_current", lambda: False)
    for part in ("all", "tests"):
        runner.steps.clear()
        gpu.run_parts(runner, part)
        assert [step["step"] for step in runner.steps] == ["build"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a rehearsal is for machines without a GPU")
def test_rehearsal(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "REHEARSAL", tmp_path)
    assert gpu.main(["sanitize", "--out", str(tmp_path / "never")]) == 2
    assert not (tmp_path / "never").exists(), "a rehearsal is no record"
    steps = json.loads((tmp_path / "summary.json").read_text())
    assert [step["why"] for step in steps] == ["no GPU"] * 12
    assert json.loads((tmp_path / "environment.json").read_text())["gpu"] is None
    said = capsys.readouterr()
    assert "this is a rehearsal" in said.err
    archive = tmp_path.with_name(f"{tmp_path.name}.tar.gz")
    assert str(archive) in said.out.splitlines()[-1]
    with tarfile.open(archive) as tar:
        names = {Path(name).name for name in tar.getnames()}
    assert names == {tmp_path.name, "environment.json", "summary.json"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_results_are_packed_whatever_happens(monkeypatch, tmp_path, error):
    def broken(runner, part):
        assert runner.left() < 60 - 7, "importing counts"
        (runner.folder / "kept.log").touch()
        raise error

    monkeypatch.setattr(gpu, "REHEARSAL", tmp_path / "out")
    monkeypatch.setattr(gpu, "STARTED", time.monotonic() - 7)
    monkeypatch.setattr(gpu, "run_parts", broken)
    with contextlib.suppress(RuntimeError):
        gpu.main(["bench", "--minutes", "1"])
    with tarfile.open(tmp_path / "out.tar.gz") as tar:
        assert "out/kept.log" in tar.getnames()
