"""The command for a GPU machine: its limits, its records, and its rehearsal without a GPU."""

import json
import sys
import time

import pytest
import torch

from benchmarks import gpu


@pytest.fixture
def runner(tmp_path) -> gpu.Runner:
    return gpu.Runner(tmp_path / "out", has_gpu=True, seconds=100)


def summary(runner: gpu.Runner) -> dict[str, str]:
    steps = json.loads((runner.folder / "summary.json").read_text())
    return {step["step"]: step["state"] for step in steps}


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_states_and_logs(runner):
    assert runner.run("good", python("print('fine')"), 60)
    assert not runner.run("bad", python("print('broken'); raise SystemExit(3)"), 60)
    runner.skip("other", "not here")
    assert summary(runner) == {"good": "passed", "bad": "FAILED", "other": "skipped"}
    assert (runner.folder / "good.log").read_text() == "fine\n"
    assert runner.failed() == ["bad"]


def test_a_late_step_is_ended_and_keeps_its_output(runner):
    code = """
import subprocess, sys, time
print("kept")
deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
child = subprocess.Popen([sys.executable, "-c", deaf])
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("written at the end")
"""
    start = time.monotonic()
    assert not runner.run("late", python(code), 5)
    assert time.monotonic() - start < 30, "its child held the pipe open"
    assert summary(runner) == {"late": "TIMED OUT"}
    log = (runner.folder / "late.log").read_text()
    assert log.startswith("kept\n")
    assert log.endswith("written at the end\n")


def test_the_deaf_are_killed(runner, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE_SECONDS", 0.5)
    monkeypatch.setattr(gpu, "LEAST_SECONDS", 0)
    code = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    assert not runner.run("deaf", python(code), 2)
    assert summary(runner) == {"deaf": "TIMED OUT"}


def test_no_time_left(runner):
    assert not runner.run("never", python("print(1)"), 0)
    assert summary(runner) == {"never": "skipped"}


def test_an_interrupted_run_has_a_summary(runner, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "_execute", interrupt)
    with pytest.raises(KeyboardInterrupt):
        runner.run("step", python(""), 60)
    assert summary(runner) == {"step": "interrupted"}
    assert runner.failed() == ["step"]


def commands_of(runner, monkeypatch) -> dict[str, list[str]]:
    seen = {}

    def note(name, command, limit, **environment):
        seen[name] = command
        runner.steps.append({"step": name, "state": "passed"})
        return True

    monkeypatch.setattr(runner, "run", note)
    return seen


def test_all_benchmarks_on_the_gpu(runner, monkeypatch, tmp_path):
    seen = commands_of(runner, monkeypatch)
    (tmp_path / "benchmarks").mkdir()
    for name in ("bench_linear", "bench_step", "plots"):
        (tmp_path / "benchmarks" / f"{name}.py").touch()
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    gpu.part_bench(runner, 0)
    assert list(seen) == ["bench_linear", "bench_step", "plots"]
    assert seen["bench_step"][2:] == ["--device", "cuda", "--out", str(runner.folder), "--quick"]
    assert summary(runner)["bench_decode"] == "skipped"
    runner.deadline += 1000
    (runner.folder / "bench_linear.json").touch()
    gpu.part_bench(runner, 0)
    assert "--quick" not in seen["bench_step"]
    assert seen["table"][2:] == [
        *["--results", str(runner.folder)],
        *["--out", str(runner.folder / "table.json")],
    ]


@pytest.mark.parametrize(("found", "cores", "flags"), [(1, 16, "8"), (1, 3, "1"), (None, 16, None)])
def test_gpu_tests_run_side_by_side_where_xdist_is(runner, monkeypatch, found, cores, flags):
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: found)
    monkeypatch.setattr(gpu.os, "cpu_count", lambda: cores)
    runner.has_gpu = True
    command = commands_of(runner, monkeypatch)
    gpu.part_tests(runner, 0)
    (command,) = command.values()
    assert ("-n" in command) == (flags is not None)
    assert flags is None or command[command.index("-n") + 1] == flags


def test_sanitizers_see_every_kernel(runner, monkeypatch):
    seen = commands_of(runner, monkeypatch)
    monkeypatch.setattr(gpu.shutil, "which", lambda name, path=None: f"/x/{name}")
    gpu.part_sanitize(runner, 0)
    assert list(seen) == ["sanitize_memcheck", "sanitize_racecheck", "sanitize_initcheck"]
    for command in seen.values():
        assert "tests/kernels/test_cuda_gpu.py" in command
        assert "tests/kernels/test_cuda_sanitized.py" in command
        assert command[command.index("-k") + 1] == "small"


def test_a_failed_build_stops_the_rest(runner, monkeypatch):
    monkeypatch.setattr(
        runner, "run", lambda *a, **k: runner.steps.append({"step": "build", "state": "FAILED"})
    )
    gpu.run_parts(runner, gpu.PARTS)
    assert runner.failed() == ["build"]
    assert len(runner.steps) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="a rehearsal is for machines without a GPU")
def test_rehearsal(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "REHEARSAL", tmp_path)
    assert gpu.main(["sanitize", "--out", str(tmp_path / "never")]) == 2
    assert not (tmp_path / "never").exists(), "a rehearsal is no record"
    steps = json.loads((tmp_path / "summary.json").read_text())
    assert [step["why"] for step in steps] == ["no GPU"] * 3
    assert json.loads((tmp_path / "environment.json").read_text())["gpu"] is None
    assert "this is a rehearsal" in capsys.readouterr().err
