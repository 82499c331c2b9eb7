"""Runs side by side: what they give; what a process that fails, dies or is interrupted costs."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import ckf.experiment.jobs as jobs
from ckf.cli import main
from ckf.experiment import make_experiment, run_experiment
from ckf.experiment.jobs import OUTPUT, Run, progress, run_side_by_side
from ckf.experiment.report import read_experiment
from tests import job_workers
from tests.test_experiment import CELLS, SEEDS, finished, quick  # noqa: F401


def runs_of(folder: Path, *names: str) -> list[Run]:
    return [Run(name, name, folder / "runs" / name, 40) for name in names]


def side_by_side(folder: Path, *names: str, at_once=2, make=job_workers.make):
    said: list[str] = []
    found = run_side_by_side(runs_of(folder, *names), at_once, make, (folder,), said.append)
    return found, said


def test_two_at_a_time_each_process_for_several(tmp_path):
    names = ("together1", "together2", "a", "b", "c")
    failed, said = side_by_side(tmp_path, *names)
    assert failed == {}
    processes = [(tmp_path / name).read_text() for name in names]
    assert len(set(processes)) == 2 and str(os.getpid()) not in processes
    assert sum(f"made with {tmp_path.name}" in line for line in said) == 2


def test_what_a_run_prints_is_in_its_folder(tmp_path, capfd):
    side_by_side(tmp_path, "a", "b")
    for name in "ab":
        words = (tmp_path / "runs" / name / OUTPUT).read_text()
        assert f"printed by {name}" in words and "printed by a child" in words
    assert "printed by" not in capfd.readouterr().out


@pytest.mark.parametrize(
    ("bad", "why"),
    [("wrong", "three is not four"), ("dies", "ended with code 7"), ("breaks", "code 1")],
)
def test_a_run_that_fails_costs_itself_alone(tmp_path, bad, why):
    failed, said = side_by_side(tmp_path, "a", bad, "b", "c")
    assert list(failed) == [bad] and why in failed[bad]
    assert any(f"{bad} failed: " in line for line in said)
    assert all((tmp_path / name).exists() for name in "abc")
    if bad == "breaks":
        assert "nobody expected this" in (tmp_path / "runs" / bad / OUTPUT).read_text()


def test_what_cannot_be_made_fails_every_run(tmp_path):
    failed, _ = side_by_side(tmp_path, "a", "b", "c", make=job_workers.make_nothing)
    assert failed == dict.fromkeys("abc", "the data are gone")


def test_where_training_is(tmp_path, monkeypatch):
    (run,) = runs_of(tmp_path, "slow")
    assert progress(run) == "at work"
    run.folder.mkdir(parents=True)
    (run.folder / "train_log.jsonl").write_text('{"step": 1}\n{"step": 20, "loss": 2.0}\n')
    assert progress(run) == "step 20 of 40"
    monkeypatch.setattr(jobs, "SECONDS_BETWEEN_LINES", 0.2)
    monkeypatch.setattr(jobs, "SECONDS_TO_END", 1.0)
    said: list[str] = []

    def log(line: str) -> None:
        said.append(line)
        if line == "slow: step 20 of 40":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_side_by_side([run], 2, job_workers.make, (tmp_path,), log)
    assert said[-1] == "slow: step 20 of 40"


def children_of(process: int) -> list[int]:
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):  # it has ended since
            if f"\nPPid:\t{process}\n" in status.read_text():
                found.append(int(status.parent.name))
    return found


def works(process: int) -> bool:
    """Whether it is there, and not merely waits for somebody to ask how it ended."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc").exists(), reason="asks /proc for processes")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_the_command(tmp_path, how):
    command = [sys.executable, "-m", "tests.job_workers", str(tmp_path)]
    root = Path(__file__).parent.parent
    parent = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True)
    lines = [parent.stdout.readline() for _ in range(2)]
    assert all("made with" in line for line in lines), lines
    children = children_of(parent.pid)
    assert len(children) >= 2
    parent.send_signal(how)
    assert parent.wait(30) != 0
    deadline = time.monotonic() + 20
    while any(map(works, children)):
        assert time.monotonic() < deadline, "a process trains on"
        time.sleep(0.1)


def test_an_experiment_side_by_side_is_the_same_experiment(
    finished,  # noqa: F811
    small_model, raw_data, tmp_path, monkeypatch,
):  # fmt: skip
    """Also when it is resumed: a run that is done is not run again."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    said: list[str] = []
    config = quick(small_model, train__workers=1)  # which loads batches in processes of its own
    experiment = make_experiment(config, tmp_path / "out", CELLS, SEEDS)
    run_experiment(experiment, str(raw_data), device="cpu", log=said.append, jobs=2)
    whole, found = read_experiment(finished.out), read_experiment(experiment.out)
    assert (found["runs"], found["runs_done"], found["failed"]) == (4, 4, {})
    for cell in ("linear", "ckf"):
        assert found["cells"][cell]["checks"] == whole["cells"][cell]["checks"]
        for task, name in (("ctr", "auc"), ("topk", "mrr")):
            ours = found["cells"][cell]["figures"][task][name]["seeds"]
            theirs = whole["cells"][cell]["figures"][task][name]["seeds"]
            assert ours == pytest.approx(theirs, abs=0.1)  # threads sum in another order
    assert "2 runs at a time" in "\n".join(said)
    assert sum("encoding" in line and "seed" in line for line in said) == 0, "made once a process"
    (experiment.folder(experiment.cells[0], 1) / "result-test.json").unlink()
    said.clear()
    run_experiment(experiment, None, device="cpu", log=said.append, jobs=2)
    assert "4 runs, 3 of them done" in said
    assert read_experiment(experiment.out)["runs_done"] == 4


def test_a_number_of_jobs_is_checked(small_model, tmp_path, capsys):
    experiment = make_experiment(quick(small_model), tmp_path / "out", CELLS, 1)
    with pytest.raises(ValueError, match="jobs is 0; expected 1 or more"):
        run_experiment(experiment, device="cpu", jobs=0)
    with pytest.raises(SystemExit):
        main(["experiment", "x.yaml", "--jobs", "two"])
    assert "invalid int value: 'two'" in capsys.readouterr().err
