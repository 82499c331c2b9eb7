"""Timing, the gate, saved bytes, records that go on."""

import json
import subprocess

import pytest
import torch
import torch.nn.functional as F

from benchmarks import harness
from benchmarks.harness import figures, gate, rotated, spread, time_in_turn, why_no_figure
from benchmarks.memory import peak_bytes, saved_bytes
from benchmarks.records import Record, load_record, rows_of

ABOUT = {"commit": "a", "sources": "b", "device": "c", "threads": 1, "torch": "d"}


def tensors(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(5, 7, generator=generator, dtype=torch.float64) for _ in range(3)]


def test_gate_passes_rounding():
    exact = tensors()
    plain = [t.float() for t in exact]
    verdict = gate(plain, exact, plain, torch.finfo(torch.float32).eps)
    assert verdict.failure is None
    assert 0 < verdict.error < 1e-7


@pytest.mark.parametrize("fault", ["value", "nan", "shape", "count", "zero"])
def test_gate_refuses_a_wrong_result(fault):
    exact = tensors()
    if fault == "zero":
        exact[1] = torch.zeros_like(exact[1])
    wrong = [t.clone() for t in exact]
    if fault == "value":
        wrong[2][0, 0] += 0.01
    elif fault == "nan":
        wrong[0][3, 3] = float("nan")
    elif fault == "shape":
        wrong[1] = wrong[1].t()
    elif fault == "zero":
        wrong[1][0, 0] = 1e-3
    else:
        wrong.pop()
    assert gate(wrong, exact, exact, 1e-7).failure is not None


def test_every_round_times_every_provider_in_turn():
    order = []
    calls = {name: [lambda name=name: order.append(name)] for name in "abc"}
    timings = time_in_turn(calls, "cpu", rounds=4, seconds=60)
    assert {len(t.ms) for t in timings.values()} == {4}
    runs = [name for i, name in enumerate(order) if i == 0 or order[i - 1] != name]
    assert "".join(runs[-12:]) == "abc" + "bca" + "cab" + "abc"
    assert rotated([], 3) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_provider_that_waits_for_the_device_costs_itself_alone():
    x = torch.randn(64, 64, device="cuda")
    calls = {"waits": [lambda: (x @ x).sum().item()], "plain": [lambda: x @ x]}
    timings = time_in_turn(calls, "cuda", rounds=3, seconds=1)
    assert timings["waits"].by == "events" and "no CUDA graph" in timings["waits"].note
    assert timings["plain"].by == "graph"
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert torch.randn(3, device="cuda").isfinite().all()  # a broken capture would keep the seed


def test_a_copy_without_git_is_told_its_commit(monkeypatch, tmp_path):
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    monkeypatch.setenv("CKF_COMMIT", "abc")
    assert harness.commit() == "abc"
    monkeypatch.delenv("CKF_COMMIT")
    assert harness.commit() is None


def test_why_there_is_no_figure():
    assert why_no_figure(ValueError("not here")) == "not here"
    assert why_no_figure(torch.OutOfMemoryError("full")) == "OutOfMemoryError: full"
    assert why_no_figure(KeyError("x" * 999)).startswith("RED: KeyError: 'xx")
    assert len(why_no_figure(KeyError("x" * 999))) == len("RED: ") + 300


def test_spread_and_ratio_are_of_the_same_round():
    from benchmarks.harness import Timing

    own, base = Timing([2.0, 40.0, 6.0], "wall"), Timing([1.0, 20.0, 3.0], "wall")
    row = figures(own, base)
    assert row["ratio"] == row["ratio_q1"] == row["ratio_q3"] == 2.0
    assert row["ms"] == 6.0
    assert spread([3.0], "x") == {"x": 3.0, "x_q1": 3.0, "x_q3": 3.0}


def test_saved_bytes_counts_each_storage_once_without_parameters():
    x = torch.randn(8, 4, requires_grad=True)
    weight = torch.randn(6, 4)

    def linear_and_square():
        y = F.linear(x, weight)  # saves the weight for dx alone
        return (y * y).sum() + (x * x).sum()  # y twice in one storage, x twice

    assert saved_bytes(linear_and_square, [weight]) == 4 * (8 * 6 + 8 * 4)
    assert saved_bytes(linear_and_square) == 4 * (8 * 6 + 8 * 4 + 6 * 4)


def test_peak_bytes_sees_a_large_tensor():
    size = 64 * 2**20
    peak = peak_bytes(lambda: torch.ones(size // 4).sum(), torch.device("cpu"))
    if peak is None:
        pytest.skip("the high-water mark of this system cannot be set back")
    assert 0.9 * size < peak < 2 * size


def test_a_record_keeps_finished_cases(tmp_path):
    first = Record("x", tmp_path, ABOUT, {"rounds": 3})
    first.add({"m": 1}, [{"provider": "a", "ms": 1.0}], {"b": "not here"})
    again = Record("x", tmp_path, ABOUT, {"rounds": 3})
    assert again.resumed == 1
    assert again.done({"m": 1}) and not again.done({"m": 2})
    again.add({"m": 2}, [{"provider": "a", "ms": 2.0, "note": "more"}])
    record = load_record(tmp_path / "x.json")
    assert [(r["m"], r["ms"]) for r in rows_of(record)] == [(1, 1.0), (2, 2.0)]
    assert record["cases"][0]["skipped"] == {"b": "not here"}
    assert (tmp_path / "x.csv").read_text().splitlines()[0] == "m,provider,ms,note"


def test_red_cases_are_measured_again(tmp_path):
    first = Record("x", tmp_path, ABOUT, {})
    first.add({"m": 1}, [{"ms": 1.0}], {"a": "RED: off"})
    first.add({"m": 2}, [{"ms": 2.0}], {"a": "not installed"})
    again = Record("x", tmp_path, ABOUT, {})
    assert again.resumed == 1 and again.done({"m": 2}) and not again.done({"m": 1})
    again.add({"m": 1}, [{"ms": 3.0}])
    assert sorted(r["ms"] for r in again.rows) == [2.0, 3.0]


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository of a package, a kernel and a benchmark, committed."""
    for name in ("ckf/layer.py", "csrc/kernel.cu", "benchmarks/run.py", "benchmarks/results/x.csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], [*who, "commit", "-q", "-m", "x"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["ckf/layer.py", "csrc/kernel.cu", "benchmarks/run.py"])
def test_changed_code_is_measured_again_and_said(checkout, tmp_path, name):
    def about():
        return ABOUT | {"commit": harness.commit(), "sources": harness.sources_digest()}

    Record("x", tmp_path / "out", about(), {}).add({"m": 1}, [{"ms": 1.0}])
    (checkout / "benchmarks" / "results" / "x.csv").write_text("2")  # a result is no code
    assert harness.uncommitted() is False
    assert Record("x", tmp_path / "out", about(), {}).resumed == 1
    (checkout / name).write_text("2")
    assert harness.uncommitted() is True
    assert Record("x", tmp_path / "out", about(), {}).resumed == 0


def test_progress_tells_what_is_left(capsys, monkeypatch):
    now = iter([0.0, 0.0, 60.0])
    monkeypatch.setattr(harness.time, "monotonic", lambda: next(now))
    progress = harness.Progress(3)
    progress.before("a")
    progress.before("b")
    assert capsys.readouterr().out.splitlines() == [
        "-- 1 of 3: a",
        "-- 2 of 3, 1.0 min so far, about 2.0 to go: b",
    ]


@pytest.mark.parametrize("changed", ["commit", "sources", "settings", "fresh", "broken"])
def test_a_record_of_other_code_or_settings_is_not_kept(tmp_path, changed):
    Record("x", tmp_path, ABOUT, {"rounds": 3}).add({"m": 1}, [{"ms": 1.0}])
    about = ABOUT | ({changed: "other"} if changed in ABOUT else {})
    if changed == "broken":
        (tmp_path / "x.json").write_text('{"cases": [')
    settings = {"rounds": 5 if changed == "settings" else 3}
    assert Record("x", tmp_path, about, settings, changed == "fresh").resumed == 0


@pytest.mark.parametrize("changed", ["sources", "settings", "fresh"])
def test_a_shorter_run_costs_no_rows_of_a_longer_one(tmp_path, changed):
    """They stay beside it until each case is measured again."""
    about = ABOUT | {"time": "2026-01-02T03:04:05+00:00"}
    first = Record("x", tmp_path, about, {"rounds": 15})
    for m in (1, 2):
        first.add({"m": m}, [{"ms": float(m)}])
    first.add({"m": 3}, [], {"a": "no memory"})
    own = {"time": "later"} | ({"sources": "other"} if changed == "sources" else {})
    rounds = 5 if changed == "settings" else 15
    again = Record("x", tmp_path, about | own, {"rounds": rounds}, changed == "fresh")
    beside = tmp_path / "x.2026-01-02T030405.json"
    assert again.resumed == 0 and not beside.exists()
    again.add({"m": 2}, [{"ms": 20.0}])
    kept = load_record(beside)
    assert [row["ms"] for row in rows_of(kept)] == [1.0, 2.0] and kept["settings"]["rounds"] == 15
    assert [row["ms"] for row in rows_of(load_record(tmp_path / "x.json"))] == [20.0]
    again.add({"m": 1}, [], {"a": "RED: off"})
    assert beside.exists()
    again.add({"m": 1}, [{"ms": 10.0}])
    assert not beside.exists()


def test_a_record_of_another_format_is_refused(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({"environment": {}, "rows": []}))
    with pytest.raises(ValueError, match="measure again"):
        load_record(tmp_path / "x.json")
