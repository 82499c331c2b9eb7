"""What "auto" takes, from tables that say what was measured."""

import json
import logging
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from ckf.kernels import config, cuda, multi_lora_linear
from ckf.kernels.config import check_backend, choose_backend, explain_auto
from ckf.kernels.dispatch import TABLES, Call, Choice, device_slug, load_table, measured_choice
from tests.kernels.cases import random_case

GPU = "NVIDIA Test 100"
ALL = ("torch", "triton", "cuda")


def row(m, rank, torch_ms, triton=None, cuda=None, kind="train", plan="gemm", dropout=False):
    return {
        "pass": kind, "m": m, "k": 4096, "n": 4096, "rank": rank, "tasks": 4, "dropout": dropout,
        "torch": torch_ms, "triton": triton, "cuda": cuda, "triton_plan": plan,
    }  # fmt: skip


@pytest.fixture
def tables(tmp_path):
    rows = [
        row(8192, 80, 1.0, 0.98),  # under 3% is no reason to change
        row(8192, 1024, 2.0, 1.5),
        row(8192, 80, 1.0, 0.8, dropout=True),
        row(16, 80, 0.05, 0.06, 0.02, kind="forward"),
        row(2048, 80, 0.5, 0.9, kind="forward"),
    ]
    table = {"gpu": GPU, "record": {"commit": "abc"}, "rows": rows}
    (tmp_path / "test-100.json").write_text(json.dumps(table))
    return tmp_path


def call(m=8192, rank=80, train=True, dropout=False, k=4096, n=4096):
    return Call(m, k, n, rank, train, dropout)


@pytest.mark.parametrize(
    ("asked", "usable", "expected"),
    [
        (call(), ALL, "torch"),
        (call(rank=1000), ALL, "triton"),
        (call(rank=1000), ("torch",), "torch"),
        (call(dropout=True), ALL, "triton"),
        (call(m=12, train=False), ALL, "cuda"),
        (call(m=12, train=False), ("torch", "triton"), "torch"),
        (call(m=1500, train=False), ALL, "torch"),
        (call(m=2, rank=1, k=64, n=64), ALL, "torch"),
    ],
)
def test_the_nearest_measured_shape_decides(tables, asked, usable, expected):
    choice = measured_choice(GPU, asked, usable, tables)
    assert choice.backend == expected
    assert choice.plan == {"triton": "gemm", "cuda": "update", "torch": "expand"}[expected]


def test_the_plan_of_cuda_that_owns_the_base(tables):
    """Where it is fastest and can compute the call; else the other, or whatever is then."""
    table = json.loads((tables / "test-100.json").read_text())
    table["rows"] = [
        one | {"cuda:linear": 0.015 if one["m"] == 16 else None} for one in table["rows"]
    ]
    table["rows"].append(row(64, 80, 0.03, 0.05, 0.038, kind="forward") | {"cuda:linear": 0.018})
    (tables / "test-100.json").write_text(json.dumps(table))
    load_table.cache_clear()
    every = (*ALL, "cuda:linear")
    few, some = call(m=12, train=False), call(m=64, train=False)
    for asked, usable, wanted in (
        (few, every, ("cuda", "linear")), (few, ALL, ("cuda", "update")),
        (some, every, ("cuda", "linear")), (some, ALL, ("torch", "expand")),
        (call(rank=1000), every, ("triton", "gemm")),
    ):  # fmt: skip
        choice = measured_choice(GPU, asked, usable, tables)
        assert (choice.backend, choice.plan) == wanted
    table["rows"][0]["cuda:linear"] = "soon"
    (tables / "test-100.json").write_text(json.dumps(table))
    load_table.cache_clear()
    with pytest.warns(UserWarning, match="'soon' in a row; expected a number"):
        assert measured_choice(GPU, call(rank=1000), every, tables).backend == "torch"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, None),
        ({"m": 65}, "65 rows; this plan is for 64 or fewer"),
        ({"m": 17, "linear_rank": 129}, "129 rank columns of a linear; this plan takes 128"),
        ({"linear_rank": 257}, "257 rank columns of a linear; this plan takes 256"),
        ({"k": 4100}, "k is 4100; this plan takes multiples of 8"),
        ({"train": True}, "forward only"),
        ({"dtype": torch.float32}, "dtype torch.float32; this plan takes float16 and bfloat16"),
    ],
)
def test_what_that_plan_is_asked_for_by_name(tables, monkeypatch, changes, why):
    """By name it raises; "auto" does not take it."""
    monkeypatch.setattr("ckf.kernels.dispatch.TABLES", tables)
    monkeypatch.setattr("ckf.kernels.dispatch.own_tables", lambda: tables / "none")
    monkeypatch.setattr(config, "_cuda_usable", lambda index: (True, ""))
    monkeypatch.setattr(config, "_triton_usable", lambda: (True, ""))
    monkeypatch.setattr(config, "_device_name", lambda index: GPU)
    seen = []

    def choose(device, asked, usable):
        seen.append(usable)
        return Choice("torch", "")

    monkeypatch.setattr(config, "measured_choice", choose)
    changes = dict(changes)
    dtype = changes.pop("dtype", torch.bfloat16)
    asked = call(m=16, train=False)._replace(linear_rank=80)._replace(**changes)
    x = SimpleNamespace(device=torch.device("cuda:0"), dtype=dtype)
    config.forget_choices()
    config.choose_backend("auto", x, asked)
    config.forget_choices()
    assert ("cuda:linear" in seen[0]) == (why is None)
    if why is None:
        assert config.choose_backend("cuda:linear", x, asked).plan == "linear"
        assert config.choose_backend("cuda", x, asked).plan == "update"
    else:
        with pytest.raises(ValueError, match=why):
            config.choose_backend("cuda:linear", x, asked)


def test_what_the_plan_takes_is_asked_inside_a_graph():
    """torch.compile reads it with the rest of the choice."""

    def scaled(x):
        refused = config._outside_linear(x.dtype, call(m=x.shape[0], train=False))
        return x * cuda.most_linear_rank(x.shape[0]) if refused is None else -x

    compiled = torch.compile(scaled, backend="eager", fullgraph=True)
    for m, most in ((16, 256), (64, 128)):
        x = torch.ones(m, 1, dtype=torch.bfloat16)
        assert torch.equal(compiled(x), most * x)
    assert torch.equal(compiled(torch.ones(65, 1)), -torch.ones(65, 1))


@pytest.mark.parametrize("name", ["NVIDIA H200", "NVIDIA H100 80GB HBM3"])
def test_a_table_is_found_by_the_name_that_the_driver_gives(tables, name):
    table = json.loads((tables / "test-100.json").read_text()) | {"gpu": name}
    (tables / f"{device_slug(name)}.json").write_text(json.dumps(table))
    assert measured_choice(name, call(rank=1000), ALL, tables).backend == "triton"


def test_a_gpu_of_the_same_chip_goes_by_its_relative(monkeypatch, tmp_path):
    """An H200 by the H100's table, until it has its own; no other GPU does."""
    monkeypatch.setattr("ckf.kernels.dispatch.own_tables", lambda: tmp_path)
    load_table.cache_clear()
    relative = load_table("NVIDIA H200")
    assert relative is not None and relative["gpu"] == "NVIDIA H100 80GB HBM3"
    assert load_table("NVIDIA A100-SXM4-80GB") is None
    (tmp_path / "h200.json").write_text(json.dumps(relative | {"gpu": "NVIDIA H200"}))
    load_table.cache_clear()
    assert load_table("NVIDIA H200")["gpu"] == "NVIDIA H200"
    load_table.cache_clear()


def test_the_reason_has_the_figures_and_is_logged(tables, caplog):
    with caplog.at_level(logging.INFO, logger="ckf.kernels"):
        choice = measured_choice(GPU, call(rank=900), ALL, tables)
    assert "m 8192, k 4096, n 4096, rank 1024 it took torch 2 ms, triton 1.5 ms" in choice.why
    assert [r.message for r in caplog.records] == [
        f"auto on {GPU}, m 8192, k 4096, n 4096, rank 900, forward and backward: "
        f"triton ({choice.why})"
    ]


def test_far_shapes_and_unknown_gpus_take_torch(tables):
    far = measured_choice(GPU, call(m=2, rank=1, k=64, n=64), ALL, tables)
    assert far.why == "no measured shape is near"
    unknown = measured_choice("NVIDIA Other", call(), ALL, tables)
    assert unknown.backend == "torch" and "nothing was measured on NVIDIA Other" in unknown.why


def test_two_gpus_have_a_verdict_each(tables, monkeypatch):
    """csrc's kernels were built for the second; the first, the current one, is older."""
    monkeypatch.setattr(cuda, "_load_extension", lambda: (object(), ""))
    monkeypatch.setattr(cuda, "_built_for", lambda extension: ("sm_90a",))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    capabilities = {None: (7, 5), 0: (7, 5), 1: (9, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: capabilities[index])
    monkeypatch.setattr(config, "_triton_usable", lambda: (False, ""))
    monkeypatch.setattr(config, "_device_name", lambda index: GPU)
    usable = []
    monkeypatch.setattr(
        config, "measured_choice", lambda *args: (usable.append(args[2]), Choice("torch", ""))[1]
    )
    asked = call(m=16, train=False)
    config.forget_choices()
    for index in (0, 1):
        x = SimpleNamespace(device=torch.device("cuda", index), dtype=torch.bfloat16)
        config.choose_backend("auto", x, asked)
        if index == 1:
            assert config.choose_backend("cuda", x, asked).backend == "cuda"
        else:
            with pytest.raises(ValueError, match="the device is sm_75"):
                config.choose_backend("cuda", x, asked)
    config.forget_choices()
    assert ["cuda" in names for names in usable] == [False, True]
    assert not cuda.available()[0] and cuda.available(1)[0]


@pytest.fixture
def a_gpu(tables, monkeypatch):
    """Every tensor passes for one on a GPU that has the table."""
    monkeypatch.setattr("ckf.kernels.dispatch.TABLES", tables)
    monkeypatch.setattr(config, "_GPU", "cpu")
    monkeypatch.setattr(config, "_device_name", lambda index: GPU)
    monkeypatch.setattr(config, "_triton_usable", lambda: (True, ""))
    config._measured_once.cache_clear()
    yield
    config._measured_once.cache_clear()


def test_auto_asks_the_table_once_for_each_distinct_call(a_gpu, caplog):
    with caplog.at_level(logging.INFO, logger="ckf.kernels"):
        for rank in (1000, 1000, 80, 1000):
            choice = choose_backend("auto", torch.zeros(1, 1), call(rank=rank))
            assert choice.backend == ("triton" if rank == 1000 else "torch")
    assert len(caplog.records) == 2


def test_auto_is_traced_without_a_graph_for_each_length(a_gpu):
    """torch.compile resolves the choice while it traces; lengths of one bucket share a graph."""

    def run(x):
        choice = choose_backend("auto", x, call(m=x.shape[0], rank=1000))
        return x * (len(choice.plan) if choice.backend == "triton" else 0)

    torch._dynamo.reset()
    counter = CompileCounter()
    fast = torch.compile(run, fullgraph=True, backend=counter, dynamic=True)
    for m in (4097, 5000, 8192):
        assert torch.equal(fast(torch.ones(m, 2)), torch.full((m, 2), 4.0))
    assert counter.frame_count == 1


def test_committed_tables_are_readable():
    for file in TABLES.glob("*.json"):
        table = json.loads(file.read_text())
        assert device_slug(table["gpu"]) == file.stem
        for made in table["rows"]:
            assert set(made) - {"cuda:linear"} == set(row(1, 1, 1.0)), file


@pytest.mark.parametrize("backend", ["gpu", "", "triton:fast", "torch:gemm", "auto:", None, 3])
def test_unknown_backends_list_the_known(backend):
    with pytest.raises(ValueError, match="expected one of auto, torch, cpu, triton, cuda, "):
        check_backend(backend)


def test_a_plan_can_be_asked_for(monkeypatch):
    monkeypatch.setattr("ckf.kernels.config._refusal", lambda *_: None)
    choice = choose_backend("triton:gemm", torch.zeros(1, 1), call())
    assert (choice.backend, choice.plan) == ("triton", "gemm")


@pytest.mark.parametrize("built", [True, False])
def test_what_auto_takes_on_a_cpu(monkeypatch, built):
    said = (built, "" if built else "the extension ckf._cpu is not built")
    monkeypatch.setattr(config.cpu, "available", lambda: said)
    choice = choose_backend("auto", torch.zeros(1, 1), call())
    assert choice.backend == ("cpu" if built else "torch")
    assert choose_backend("auto", torch.zeros(1, 1).double(), call()).backend == "torch"
    if not torch.cuda.is_available():
        words = "cpu, and torch for learned gates and dtypes other than float32: there is no GPU"
        assert explain_auto() == (words if built else f"torch: there is no GPU, and {said[1]}")


def test_auto_gives_the_bits_of_what_it_takes():
    case = random_case()
    auto = multi_lora_linear(*case.arguments())
    taken = choose_backend("auto", case.x, call()).backend
    assert torch.equal(auto, multi_lora_linear(*case.arguments(), backend=taken))
