"""What is measured, in which order, and what a failure in the middle costs."""

import signal
from dataclasses import replace

import pytest
import torch

from benchmarks import (
    bench_decode,
    bench_gemm,
    bench_linear,
    bench_scaling,
    bench_step,
    bench_training,
    harness,
)
from benchmarks.bench_step import Contender
from benchmarks.peers.models import BigModel, FrozenModel, LoopModel, MasksModel, OursGraphsModel
from benchmarks.problems import MIXES
from benchmarks.records import Record, load_record
from ckf.layer_graphs import LayerGraphs
from tests.benchmarks.synthetic import ABOUT
from tests.test_layer_graphs import Rerun, one_kernel  # noqa: F401

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("cases", [bench_linear.gpu_cases(), bench_linear.quick_cases("cuda")])
def test_the_goals_come_first(cases):
    wanted = {(m, n, p) for m in (8192, 2048) for n in (4096, 14336) for p in (0, 0.1)}
    goals = [case for case, names in cases[:8] if names == bench_linear.GOALS]
    assert {(c.m, c.linears[0][1], c.dropout) for c in goals} == wanted
    assert {(c.step, c.dtype, c.adapters, c.mix) for c in goals} == {
        ("train", "bfloat16", "float32", "balanced")
    }
    decoding = [case for case, _ in cases[8:13]]
    assert [(c.m, c.step) for c in decoding] == [(m, "forward") for m in (1, 4, 16, 64, 256)]
    plain = [entry if isinstance(entry, tuple) else (entry, None) for entry in cases]
    layer = next(i for i, (case, _) in enumerate(plain) if len(case.linears) > 1)
    assert layer == len(bench_linear.goal_cases()) and len(plain[layer][0].linears) == 7
    compiled = [names == bench_linear.COMPILED for _, names in plain]
    assert compiled == sorted(compiled), "compiling takes long: last"
    keys = [(case, tuple(names or ())) for case, names in plain]
    assert len(keys) == len(set(keys))


def test_a_quick_decode_on_a_gpu():
    cases = bench_decode.linear_cases("cuda", True)
    assert [case.m for case, _ in cases] == [1, 4, 16, 64]
    for case, names in cases:
        assert names == ["single", "dense", "grouped", "peft-big", "ckf*"]
        assert (case.step, case.mix, case.adapters) == ("forward", "token", "bfloat16")


def test_training_steps_on_a_gpu():
    cases = bench_step.cases("cuda", False)
    order = [(c["model"], c["layouts"], c["adapters"], c.get("sigma")) for c in cases]
    assert order == [
        ("8B", "labels", "float32", None),
        ("8B", "padded", "float32", None),
        ("8B", "labels", "bfloat16", None),
        ("8B", "packed", "float32", None),
        ("8B, 8 layers", "labels", "float32", None),
        ("1B", "labels", "float32", None),
        ("1B", "padded", "float32", None),
        ("8B", "padded", "float32", 0.0),
        ("8B", "labels", "float32", None),
    ]
    assert [c["compiled"] for c in cases] == [False] * 8 + [True]
    small = bench_step.cases("cuda", False, memory=85e9)
    assert {c["row_count"] for c in small if c["model"] == "8B"} == {8}
    assert {c["row_count"] for c in cases if c["model"] == "8B"} == {16}
    names = [
        [kind.name for kind in bench_step.contender_kinds(case, CUDA)[0]]
        for case in (cases[0], cases[-1], cases[4])
    ]
    assert names.pop() == ["frozen", "peft-big", "ckf", "ckf-graphs"]
    assert cases[4]["row_count"] * cases[4]["mean_length"] == 8192
    on_cpu = bench_step.contender_kinds(bench_step.cases("cpu", False)[0], CPU)[0]
    assert "ckf-graphs" not in {kind.name for kind in on_cpu}
    assert names[0][0] == names[1][0] == "peft-loop"
    ours = {"ckf", "ckf-triton", "ckf-triton:gemm", "ckf-graphs"}
    assert {"frozen", "single", *ours} < set(names[0])
    assert "peft-big-compiled" in names[1] and "peft-masks" not in names[1]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_scaling_has_every_axis_and_mix(device):
    found = [case for case, _ in bench_scaling.cases(device, False)]
    assert {c.tasks for c in found} == {2**i for i in range(9)}
    assert {c.mix for c in found} == set(MIXES)
    assert {c.rank for c in found} >= {8, 16, 32, 64} and len({c.m for c in found}) >= 4


def test_a_quick_scaling_on_a_gpu_has_the_goal():
    """T 64 over T 2, at the size of all others."""
    cases = bench_scaling.cases("cuda", True)
    assert [case.tasks for case, _ in cases] == [2, 64]
    for case, names in cases:
        assert replace(case, tasks=4) == bench_scaling.start("cuda")
        assert names == ["dense", "grouped", "ckf*"]
    assert {case.m for case, _ in bench_scaling.cases("cpu", True)} == {128}


def test_the_goals_alone():
    """What ``make gpu PART=goals`` measures: the keys are those of the longer runs."""
    squares = bench_linear.square_goals()
    assert [(c.m, c.linears, c.dropout) for c, _ in squares] == [
        (m, [(4096, 4096)], 0.0) for m in (8192, 2048)
    ]
    assert all(entry in bench_linear.gpu_cases() for entry in squares)
    products = bench_gemm.cases("cuda", False, goals=True)
    assert [(c["rank"], c["n"], c["product"]) for c in products] == [
        (80, n, product) for n in (4096, 14336) for product in ("y", "dx")
    ]
    steps = bench_step.cases("cuda", False, goals=True)
    assert [c["model"] for c in steps] == ["1B", "8B, 8 layers"]
    assert {c["contenders"] for c in steps} == {"frozen,peft-big,ckf,ckf-graphs"}
    assert steps[1] in bench_step.cases("cuda", False)


def test_the_full_sweep_holds_the_rule_book():
    found = [e[0] if isinstance(e, tuple) else e for e in bench_linear.full_cases("cuda")]
    found += [e[0] if isinstance(e, tuple) else e for e in bench_decode.linear_cases("cuda", False)]
    assert {c.tasks for c in found} >= {1, 2, 4, 8, 16, 32}
    assert {c.rank for c in found} >= {8, 16, 32, 64} and {c.mix for c in found} == set(MIXES)
    assert {c.m for c in found} >= {1, 4, 16, 64, 256, 2048, 8192, 32768}
    assert {c.linears[0] for c in found if len(c.linears) == 1} >= set(bench_linear.GPU_SHAPES)
    assert {c.adapters for c in found if c.dtype == "bfloat16"} == {"float32", "bfloat16"}


@pytest.fixture
def few(monkeypatch):
    """The quick case in one layout, by few contenders whose small checks are trusted."""
    monkeypatch.setattr(bench_step, "MODELS", (FrozenModel, LoopModel, MasksModel, BigModel))
    monkeypatch.setattr(bench_step, "check_small", lambda *args: None)
    return bench_step.cases("cpu", True)[0] | {"layouts": "labels", "contenders": "f*,peft*"}


@pytest.mark.parametrize("when", ["build", "first step", "timing", "figures"])
def test_a_lack_of_memory_costs_one_contender(monkeypatch, few, when):
    class Large(MasksModel):
        name, calls = "peft-large", 0

        def build(self, adapters):
            super().build(adapters)
            if when == "build":
                raise torch.OutOfMemoryError("full")

        def loss(self, batch):
            Large.calls += 1
            if Large.calls > {"first step": 0, "timing": 2, "figures": 4}.get(when, 99):
                raise torch.OutOfMemoryError("full")
            return super().loss(batch)

    monkeypatch.setattr(bench_step, "MODELS", (Large, *bench_step.MODELS))
    rows, reasons = bench_step.measure(few, CPU, rounds=2)
    assert reasons == {"peft-large labels": "OutOfMemoryError: full"}
    assert {row["provider"] for row in rows} == {"frozen", "peft-loop", "peft-masks", "peft-big"}
    assert all(row["rounds"] == 2 and row["ratio"] > 0 for row in rows)


@pytest.fixture
def graphs(monkeypatch, few, request):
    """The quick case with graphs among the contenders, replayed by running again."""
    request.getfixturevalue("one_kernel")
    monkeypatch.setattr(LayerGraphs, "_cuda_captures", lambda self: lambda: Rerun({"graphs": self}))
    monkeypatch.setattr(LayerGraphs, "_warm_up", lambda self: None)
    monkeypatch.setattr(bench_step, "MODELS", (FrozenModel, BigModel, OursGraphsModel))
    return few | {"contenders": "frozen,peft-big,ckf-graphs"}


def test_a_step_of_graphs_is_checked_and_timed_replayed(graphs, monkeypatch):
    replayed, replay = [], Rerun.replay_backward

    def noted(self):
        replayed.append(1)
        replay(self)

    monkeypatch.setattr(Rerun, "replay_backward", noted)
    monkeypatch.setattr(bench_step, "check_small", None)  # of none: see below
    monkeypatch.setattr(bench_step, "_small_failure", lambda kind, *args: None)
    rows, reasons = bench_step.measure(graphs, CPU, rounds=2)
    own = {row["provider"]: row for row in rows}["ckf-graphs"]
    assert not reasons and own["gradient_difference"] < 1e-3 and own["ratio"] > 0
    assert own["peak_bytes"] is None and own["saved_bytes"] is None
    layers = bench_step.SHAPES["tiny"].layers
    assert len(replayed) == layers * (1 + 1 + 2), "the check, the round that warms up, two rounds"


@pytest.mark.parametrize("when", ["capture", "later", "never"])
def test_a_step_without_its_graphs_has_no_figure(graphs, monkeypatch, when):
    if when == "capture":
        monkeypatch.setattr(Rerun, "forward", None)
    elif when == "never":  # every pass is noted anew
        monkeypatch.setattr(LayerGraphs, "_captured", lambda self, *args: False)
    else:
        update = Contender.update

        def gives_up(self):
            if isinstance(self.provider, OursGraphsModel):
                self.provider.graphs.give_up("another dtype")
            update(self)

        monkeypatch.setattr(Contender, "update", gives_up)
    rows, reasons = bench_step.measure(graphs, CPU, rounds=1)
    assert {row["provider"] for row in rows} == {"frozen", "peft-big"}
    why = "no CUDA graph was replayed" if when == "never" else "CUDA graphs were given up"
    assert reasons == {"ckf-graphs labels": f"RED: {why}"}


def interrupted_at(calls: int, function):
    """The function, that gpu.py's time limit meets at that call."""
    made = 0

    def call(*args, **kwargs):
        nonlocal made
        made += 1
        if made == calls:
            signal.raise_signal(signal.SIGINT)
        return function(*args, **kwargs)

    return call


@pytest.fixture
def cut(tmp_path, capsys):
    """A script that is interrupted: what its record holds of the case."""

    def run(main, name: str) -> dict:
        with pytest.raises(KeyboardInterrupt):
            main(["--quick", "--out", str(tmp_path)])
        (case,) = load_record(tmp_path / f"{name}.json")["cases"]
        assert case["finished"] is False
        again = Record(name, tmp_path, ABOUT, {})
        again.cases = [case]
        assert not again.done(case["case"]), "it is measured again"
        return case

    return run


@pytest.mark.parametrize(
    ("when", "rounds"), [("check", 0), ("build", 0), ("round", 2), ("bytes", 3)]
)
def test_a_step_that_is_cut_keeps_what_it_has(monkeypatch, few, cut, when, rounds):
    """Four contenders, three rounds after one that warms up, then bytes."""
    monkeypatch.setattr(bench_step, "cases", lambda *args: [few])
    place, name = {
        "check": (bench_step, "check_small"),
        "build": (Contender, "__init__"),
        "round": (Contender, "update"),
        "bytes": (bench_step, "peak_bytes"),
    }[when]
    calls = {"check": 3, "build": 3, "round": 4 * 3 + 2, "bytes": 3}[when]
    monkeypatch.setattr(place, name, interrupted_at(calls, getattr(place, name)))
    case = cut(bench_step.main, "bench_step")
    assert len(case["rows"]) == (4 if rounds else 0)
    for row in case["rows"]:
        assert row["rounds"] == rounds and row["ratio"] > 0 and row["floor_ratio"] >= 1
    known = [row["saved_bytes"] is not None for row in case["rows"]]
    assert sum(known) == (2 if when == "bytes" else 0)
    right = [why for why in case["skipped"].values() if why.startswith("right")]
    assert len(right) == {"check": 2, "build": 4}.get(when, 0)
    assert sum("at full size" in why for why in right) == (2 if when == "build" else 0)


def test_a_small_model_s_step_that_is_cut_keeps_its_variants(monkeypatch, cut):
    whole = bench_training.measure_one
    monkeypatch.setattr(bench_training, "measure_one", interrupted_at(3, whole))
    case = cut(bench_training.main, "bench_training")
    assert [row["provider"] for row in case["rows"]] == ["frozen", "ckf"]


@pytest.mark.parametrize(("when", "rounds"), [("check", 0), ("round", 2)])
def test_a_decoder_that_is_cut_keeps_its_rounds(monkeypatch, cut, when, rounds):
    monkeypatch.setattr(bench_decode, "run_cases", lambda *args: 0)
    if when == "check":
        check = interrupted_at(3, bench_decode.check_small)
        monkeypatch.setattr(bench_decode, "check_small", check)
    else:  # five providers a round
        monkeypatch.setattr(harness, "_wall_ms", interrupted_at(5 * 3 + 2, harness._wall_ms))
    case = cut(bench_decode.main, "bench_decode_model")
    assert len(case["rows"]) == (5 if rounds else 0)
    assert all(row["rounds"] == rounds for row in case["rows"])
    assert len(case["skipped"]) == (0 if rounds else 2)


def test_no_check_comes_between_a_build_and_its_timing(monkeypatch, few):
    events = []
    monkeypatch.setattr(torch._dynamo, "reset", lambda: events.append("reset"))

    class Noted(Contender):
        def step(self):
            events.append("step")
            return super().step()

    monkeypatch.setattr(bench_step, "Contender", Noted)
    bench_step.measure(few, CPU, rounds=1)
    assert "step" in events and "reset" not in events[events.index("step") :]


def test_a_broken_case_does_not_end_the_script(monkeypatch, tmp_path):
    def broken(*args):
        raise ValueError("nothing works")

    monkeypatch.setattr(bench_step, "measure", broken)
    assert bench_step.main(["--quick", "--out", str(tmp_path)]) == 1
    assert "RED: ValueError: nothing works" in (tmp_path / "bench_step.json").read_text()
    monkeypatch.setattr(bench_decode, "build_models", broken)
    options = bench_decode.arguments("", "").parse_args(["--quick", "--out", str(tmp_path)])
    assert bench_decode.run_models(options) == 1
    assert "nothing works" in (tmp_path / "bench_decode_model.json").read_text()
