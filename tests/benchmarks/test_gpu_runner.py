"""The steps of the command for a GPU machine: limits, logs, interrupts, what is packed."""

import json
import signal
import sys
import tarfile
import threading
import time

import pytest

from benchmarks import gpu, gpu_runner


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
    with tarfile.open(runner.folder.with_name("out.tar.gz")) as tar:
        assert {"out/summary.json", "out/good.log", "out/bad.log"} <= set(tar.getnames())
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


def test_the_deaf_are_killed(runner):
    code = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    assert not runner.run("deaf", python(code), 2, least=0, grace=0.5)
    assert summary(runner) == {"deaf": "TIMED OUT"}


def test_no_time_left(runner):
    assert not runner.run("never", python("print(1)"), 0)
    assert summary(runner) == {"never": "not done"} and runner.failed() == []


def test_steps_side_by_side(runner):
    """Each waits for the other; one fails."""
    paths = [runner.folder / name for name in "ab"]
    wait = "import os, time, sys; open(sys.argv[1], 'w').close()\n"
    wait += "while not os.path.exists(sys.argv[2]): time.sleep(0.05)\n"
    wait += "print(os.environ['WHO']); raise SystemExit(os.environ['WHO'] == 'b')"
    jobs = [
        (name, [*python(wait), str(own), str(other)], {"WHO": name})
        for name, own, other in (("a", *paths), ("b", *paths[::-1]))
    ]
    assert not runner.run_beside(jobs, 60)
    assert summary(runner) == {"a": "passed", "b": "FAILED"}
    assert (runner.folder / "a.log").read_text() == "a\n"
    assert runner.run_beside(jobs[:1], 60)


def test_an_interrupt_ends_all_that_run_side_by_side(runner):
    """SIGTERM comes as one; those that are deaf to it are killed."""
    code = "import signal, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    code += "open(sys.argv[1], 'w').close(); time.sleep(60)"
    paths = [runner.folder / name for name in "abc"]
    jobs = [(path.name, [*python(code), str(path)], {}) for path in paths]

    def interrupt():
        while not all(path.exists() for path in paths):
            time.sleep(0.05)
        signal.raise_signal(signal.SIGINT)

    timer = threading.Thread(target=interrupt)
    start = time.monotonic()
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        runner.run_beside(jobs, 50, grace=0.5)
    timer.join()
    assert time.monotonic() - start < 40
    assert set(summary(runner).values()) == {"interrupted"} and len(runner.failed()) == 3


def test_a_benchmark_that_is_cut_off_counts_if_it_wrote(runner):
    path = runner.folder / "bench.json"
    code = "import sys, time; {}; time.sleep(60)"
    assert not runner.run("silent", python(code.format("pass")), 5, partial=path)
    write = f"open({str(path)!r}, 'w').close()"
    assert not runner.run("bench", python(code.format(write)), 5, partial=path)
    assert summary(runner) == {"silent": "TIMED OUT", "bench": "partial"}
    assert runner.failed() == ["silent"]


def test_parts_of_the_same_sources_share_a_summary(tmp_path):
    first = gpu.Runner(tmp_path, True, 100, sources="a")
    for name in ("build", "tests"):
        first.run(name, python("pass"), 60)
    again = gpu.Runner(tmp_path, True, 100, sources="a")
    again.run("tests", python("raise SystemExit(1)"), 60)
    again.run("bench", python("pass"), 60)
    assert summary(again) == {"build": "passed", "tests": "FAILED", "bench": "passed"}
    changed = gpu.Runner(tmp_path, True, 100, sources="b")
    changed.run("tests", python("pass"), 60)
    assert summary(changed) == {"tests": "passed"}


def test_a_long_step_is_packed_as_it_goes(runner, monkeypatch):
    monkeypatch.setattr(gpu_runner, "PACK_EVERY", 0.1)
    packed = runner.folder.with_name("out.tar.gz")
    code = f"""
import os, time
print("as it goes", flush=True)
deadline = time.monotonic() + 30
while not os.path.exists({str(packed)!r}):
    assert time.monotonic() < deadline
    time.sleep(0.05)
"""
    assert runner.run("long", python(code), 60)


def test_an_interrupted_run_has_a_summary(runner, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "_execute", interrupt)
    with pytest.raises(KeyboardInterrupt):
        runner.run("step", python(""), 60)
    assert summary(runner) == {"step": "interrupted"}
    assert runner.failed() == ["step"]
