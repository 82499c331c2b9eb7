"""Every provider computes the case exactly, and a wrong one gets no figure."""

from dataclasses import replace

import pytest
import torch

from benchmarks import measure as measuring
from benchmarks.floors import decode_floor, least_work, step_floor
from benchmarks.harness import arguments
from benchmarks.measure import measure
from benchmarks.models import (
    LAYOUTS,
    SHAPES,
    ModelShape,
    make_base,
    make_batch,
    make_rows,
    sharing_copy,
)
from benchmarks.peers import ours, providers_for
from benchmarks.peers.base import check, references
from benchmarks.peers.dense import Dense, Single
from benchmarks.problems import Case, make_problem, task_ids
from benchmarks.records import load_record
from ckf.kernels import ops

CPU = torch.device("cpu")
SMALL = Case("train", 96, ((32, (48,)),), tasks=3, rank=8)
CASES = {
    "balanced": SMALL,
    "token": replace(SMALL, mix="token"),
    "skewed": replace(SMALL, mix="skewed"),
    "sorted": replace(SMALL, mix="sorted"),
    "layer": replace(SMALL, groups=((32, (48, 16)), (48, (32,)))),
    "forward": replace(SMALL, step="forward", m=5, mix="token"),
    "bfloat16": replace(SMALL, dtype="bfloat16"),
    "bfloat16 adapters": replace(SMALL, dtype="bfloat16", adapters="bfloat16"),
    "more tasks than rows": replace(SMALL, m=4, tasks=7, mix="token"),
}


@pytest.mark.parametrize("name", CASES)
def test_every_provider_passes_the_gate(name):
    case = CASES[name]
    problem = make_problem(case, CPU)
    classes, _ = providers_for(case, CPU)
    assert {"frozen", "dense", "peft-big", "ckf"} <= set(classes)
    for provider_name, kind in classes.items():
        provider = kind(problem)
        verdict = check(provider, *references(provider.problem, 0.0))
        assert verdict.failure is None, (provider_name, verdict)


def test_dropout_is_drawn_by_those_who_have_it():
    case = replace(SMALL, dropout=0.3)
    problem = make_problem(case, CPU)
    exact, plain = references(problem, 0.3)
    without, _ = references(problem, 0.0)
    assert (exact[0] - without[0]).norm() > 0.01 * exact[0].norm()
    classes, skipped = providers_for(case, CPU)
    assert "dropout" in skipped["grouped"]
    for name, kind in classes.items():
        if kind.draws_like_reference:
            assert check(kind(problem), exact, plain).failure is None, name
        elif name not in ("frozen", "single"):
            assert check(kind(problem), exact, plain).failure is not None, name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["peft-loop-compiled", "peft-masks-compiled", "peft-big-compiled"])
def test_a_compiled_provider_passes_the_gate(name):
    problem = make_problem(SMALL, CPU)
    classes, _ = providers_for(SMALL, CPU, [name])
    provider = classes[name](problem)
    assert check(provider, *references(problem, 0.0)).failure is None
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    provider.step()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs, "it compiles each time"


def test_what_a_step_does_once_is_timed_apart():
    rows, _, _ = measure(replace(SMALL, mix="token"), CPU, None, rounds=2, seconds=0.1)
    routing = {row["provider"]: row["routing_ms"] for row in rows}
    assert all(routing[name] > 0 for name in ("dense", "grouped", "peft-loop", "peft-big"))
    assert routing["frozen"] is None and routing["ckf"] is None


@pytest.mark.parametrize("name", ["dense", "grouped", "bmm", "peft-loop", "peft-masks", "peft-big"])
def test_routing_follows_the_ids(name):
    """What ``route`` makes is what the step goes by: other ids, other results."""
    problem = make_problem(replace(SMALL, mix="sorted"), CPU)
    classes, _ = providers_for(SMALL, CPU, [name])
    provider = classes[name](problem)
    before = [t.clone() for t in provider.outputs(provider.forward())]
    provider.problem.ids = (problem.ids + 1) % SMALL.tasks
    provider.route()
    if name in ("grouped", "peft-loop"):  # whose rows lie sorted before
        assert provider.order[0] != 0
    else:
        assert not torch.allclose(before[0], provider.outputs(provider.forward())[0])


def test_a_wrong_provider_gets_no_figure(monkeypatch):
    class Wrong(Dense):
        name = "wrong"

        def __init__(self, problem):
            super().__init__(problem)
            self.gate = self.gate.roll(1, 0)  # each row takes its neighbour's route

    class Broken(Dense):
        name = "broken"

        def __init__(self, problem):
            raise RuntimeError("does not load here")

    case = replace(SMALL, mix="token")
    real = providers_for

    def with_wrong(case, device, names=None):
        classes, skipped = real(case, device, ["dense"])
        return classes | {"wrong": Wrong, "broken": Broken}, skipped

    monkeypatch.setattr(measuring, "providers_for", with_wrong)
    rows, _, failures = measure(case, CPU, None, rounds=2, seconds=0.1)
    assert {row["provider"] for row in rows} == {"frozen", "dense"}
    assert "off by" in failures["wrong"] and "does not load" in failures["broken"]


def test_a_provider_that_cannot_be_copied_costs_its_own_rows(monkeypatch):
    class Once(Dense):
        name, built = "once", 0

        def __init__(self, problem):
            super().__init__(problem)
            Once.built += 1
            if Once.built > 1:
                raise torch.OutOfMemoryError("full")

    def with_once(case, device, names=None):
        classes, skipped = providers_for(case, device, ["dense"])
        return classes | {"once": Once}, skipped

    monkeypatch.setattr(measuring, "providers_for", with_once)
    rows, _, failures = measure(SMALL, CPU, None, rounds=2, seconds=0.1)
    assert {row["provider"] for row in rows} == {"frozen", "dense"}
    assert failures == {"once": "OutOfMemoryError: full"}


def test_a_case_that_breaks_costs_itself_alone(monkeypatch, tmp_path):
    real = measuring.measure

    def sometimes(case, *args, **kwargs):
        if case.m == 96:
            raise RuntimeError("x" * 999)
        return real(case, *args, **kwargs)

    monkeypatch.setattr(measuring, "measure", sometimes)
    options = arguments("", "").parse_args(["--quick", "--out", str(tmp_path)])
    cases = [(SMALL, ["dense"]), (replace(SMALL, m=32), ["dense"])]
    assert measuring.run_cases("x", cases, options) == 1
    broken, good = load_record(tmp_path / "x.json")["cases"]
    assert broken["rows"] == [] and broken["skipped"]["case"].startswith("RED: RuntimeError: xxx")
    assert len(broken["skipped"]["case"]) == len("RED: ") + 300
    assert {row["provider"] for row in good["rows"]} == {"frozen", "dense"}


def test_a_refusal_runs_nothing(monkeypatch):
    monkeypatch.setattr(ops, "run_group", None)
    assert ours.OursTorch.refusal(SMALL, CPU) is None
    assert ours.OursAuto.refusal(SMALL, CPU) is None
    assert (
        ours.OursCuda.refusal(SMALL, CPU)
        == "the input is on cpu; the CUDA kernel needs a GPU tensor"
    )


def test_a_refusal_asks_with_the_rank_of_a_whole_group(monkeypatch):
    asked = []
    monkeypatch.setattr(ours.config, "choose_backend", lambda *args: asked.append(args))
    case = replace(CASES["layer"], dropout=0.1, dtype="bfloat16")
    ours.our_providers()[1].refusal(case, CPU)
    (backend, x, call) = asked.pop()
    assert backend == "triton:expand" and x.dtype == torch.bfloat16
    assert call == (96, 16, 16, 2 * case.total_rank, True, True, case.total_rank, False)


def test_auto_waits_for_a_table(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H200")
    monkeypatch.setattr(ours, "load_table", lambda device: None)
    assert ours.OursAuto.refusal(SMALL, torch.device("cuda")) == "no table yet"


def test_a_plan_is_asked_for_by_name():
    plans = {p.name: p.backend for p in ours.our_providers() if ":" in p.name}
    asked = [*(f"triton:{plan}" for plan in ("expand", "addmm", "gemm"))]
    asked += ["cuda:linear"]
    assert plans == {f"ckf-{one}": one for one in asked}


def test_ours_keeps_the_stacks_of_decoding(monkeypatch):
    seen = []
    real = ops.run_group

    def note(*args, decode_cache, **kwargs):
        seen.append(decode_cache)
        return real(*args, **kwargs)

    provider = ours.OursTorch(make_problem(replace(CASES["layer"], step="forward"), CPU))
    monkeypatch.setattr(ops, "run_group", note)
    provider.step()
    provider.step()
    assert seen == 2 * provider.caches and len(set(map(id, seen))) == 2


@pytest.mark.parametrize("kind", [Dense, Single])
def test_dense_stacks_once_for_forward_alone(monkeypatch, kind):
    case = replace(SMALL, step="forward", dtype="bfloat16")
    provider = kind(make_problem(case, CPU))
    want = torch.cat(provider.problem.linears[0].a).bfloat16().t()
    assert torch.equal(provider.stacks[0][0], want)
    assert kind(make_problem(SMALL, CPU)).stacks == []
    monkeypatch.setattr(torch, "cat", None)
    (y,) = provider.step()
    assert y.shape == (96, 48)


@pytest.mark.parametrize("mix", ["sorted", "balanced", "skewed", "token"])
@pytest.mark.parametrize(("m", "tasks"), [(2048, 4), (64, 64), (1000, 3), (8192, 256)])
def test_every_task_has_rows(mix, m, tasks):
    ids = task_ids(m, tasks, mix)
    counts = torch.bincount(ids, minlength=tasks)
    assert ids.shape == (m,) and counts.shape == (tasks,)
    assert counts.min() > 0


def test_the_floor_of_a_training_step():
    shape = ModelShape(hidden=8, intermediate=12, layers=3, heads=2, kv_heads=1, vocabulary=20)
    case = {"tasks": 4, "rank": 2, "dtype": "float32", "adapters": "float32"}
    floor = step_floor(shape, case, [5, 7], 2, "a CPU")
    weights = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 12
    ends = 16 + 2 * 12 + 16 + 3 * 20  # k + n of q, k, v, o, gate, up, down
    attention = 3 * 4 * 8 * (25 + 49) / 2 * 3
    frozen = 2 * 2 * (12 * 3 * weights + 2 * 8 * 20) + attention
    assert floor["frozen_flops"] == frozen
    assert floor["flops"] == frozen + 3 * 2 * 12 * 2 * 2 * ends * 3
    assert floor["floor_ratio"] == round(floor["flops"] / frozen, 4)


def test_the_floor_of_decoding_is_traffic():
    shape = ModelShape(hidden=8, intermediate=12, layers=3, heads=2, kv_heads=1, vocabulary=20)
    case = {"m": 2, "context": 9, "tasks": 4, "rank": 2, "dtype": "float16", "adapters": "float16"}
    floor = decode_floor(shape, case, "NVIDIA H200")
    weights = 3 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 12) + 8 * 20
    cache = 2 * 2 * 10 * 4 * 3
    rows = 2 * (3 * (8 + 16 + 8 + 8 + 8 + 24 + 12 + 8) + 8 + 20)
    assert floor["frozen_bytes"] == 2 * (weights + cache + rows)
    assert floor["floor_ratio"] > 1


def test_the_floor_counts_each_row_s_two_loras():
    case = Case("train", 10, ((4, (6,)),), tasks=5, rank=2)
    base, ours = least_work(case, False), least_work(case, True)
    assert sum(base.flops) == 2 * 2 * 10 * 4 * 6
    assert sum(ours.flops) - sum(base.flops) == 3 * 2 * 10 * 4 * (4 + 6)


def test_providers_of_models_share_the_frozen_weights():
    base = make_base(SHAPES["tiny"], CPU, torch.float32)
    copy = sharing_copy(base)
    pairs = zip(base.parameters(), copy.parameters(), strict=True)
    assert all(a is b for a, b in pairs)
    assert copy.model.layers[0] is not base.model.layers[0]


def test_layouts_hold_the_same_tokens_and_labels():
    rows = make_rows(3, 7, 20, 256)
    batches = {layout: make_batch(rows, layout, 1) for layout in LAYOUTS}
    padded, packed, labels = (batches[layout] for layout in LAYOUTS)
    kept = padded.attention_mask.bool()
    assert torch.equal(padded.input_ids[kept], packed.input_ids[0])
    assert torch.equal(padded.labels[kept], packed.labels[0])
    assert torch.equal(packed.input_ids[0, labels.positions + 1], labels.targets)
    assert padded.task_ids.tolist() == [row.task for row in rows]
    assert (packed.position_ids == 0).sum() == len(rows)


def test_rows_of_equal_length():
    assert {len(row.tokens) for row in make_rows(4, 8, 40, 256, 0.0)} == {40}
    assert len({len(row.tokens) for row in make_rows(4, 8, 40, 256)}) > 4
