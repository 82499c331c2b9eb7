"""ckf tune: what it measures, refuses and keeps; on a CPU, where wall time stands in."""

import json

import pytest
import torch
from transformers import LlamaConfig

from ckf import cli
from ckf.kernels import config, dispatch, tune
from ckf.kernels.tune import Timed
from ckf.sizes import linear_groups

TRAIN = Timed("train", 40, 16, (16, 8), tasks=2, rank=4, dropout=0.05)
FORWARD = Timed("forward", 4, 16, (16, 8), tasks=2, rank=4)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(tune, "ROUNDS", 1)
    monkeypatch.setattr(tune, "ROUND_SECONDS", 0.0)
    monkeypatch.setattr(tune, "CACHED_BYTES", 1)
    yield
    dispatch.load_table.cache_clear()
    config.forget_choices()


def rows_of(file) -> list[dict]:
    return json.loads(file.read_text())["rows"]


def others(monkeypatch, results: dict):
    """Other backends than torch exist on this CPU: torch's results times a number, or an error."""
    real = tune.run_group

    def run_group(*arguments):
        backend = arguments[9]
        outcome = results.get(backend, 1.0)
        if isinstance(outcome, Exception):
            raise outcome
        outputs = real(*arguments[:9], "torch", *arguments[10:])
        return tuple(y * outcome for y in outputs)

    monkeypatch.setattr(tune, "run_group", run_group)


def test_only_what_can_run_is_measured(tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    said = []
    file = tune.tune([TRAIN, FORWARD], "cpu", said.append, tmp_path)
    assert file == tmp_path / "cpu.json"
    train, forward = rows_of(file)
    assert {name: train[name] for name in ("pass", "m", "k", "n", "rank", "tasks", "dropout")} == {
        "pass": "train", "m": 40, "k": 16, "n": 24, "rank": 24, "tasks": 2, "dropout": True,
    }  # fmt: skip
    assert forward["pass"] == "forward" and not forward["dropout"]
    for row in (train, forward):
        assert row["torch"] > 0 and row["triton"] is None and row["cuda"] is None
    assert said[0].startswith("1/2 train 40 x 16 -> 16+8, dropout: torch ")
    assert "no triton:expand: backend='triton:expand' cannot compute this call" in said[0]


def test_the_fastest_plans_are_the_row_s(monkeypatch, tmp_path):
    others(monkeypatch, {})
    seconds = {"torch": 4.0, "triton:expand": 3.0, "triton:addmm": 2.0, "triton:gemm": 2.5}
    seconds |= {"cuda": 6.0, "cuda:linear": 5.0}
    assert tuple(seconds) == tune.CANDIDATES

    def clock(step, calls):
        step()
        clock.at = (getattr(clock, "at", -1) + 1) % len(seconds)
        return calls * list(seconds.values())[clock.at]

    monkeypatch.setattr(tune, "_wall_seconds", clock)
    (row,) = rows_of(tune.tune([TRAIN], "cpu", print, tmp_path))
    assert (row["torch"], row["triton"], row["triton_plan"]) == (4000.0, 2000.0, "addmm")
    assert (row["cuda"], row["cuda:linear"]) == (6000.0, 5000.0)


@pytest.mark.parametrize(
    ("outcome", "why"),
    [
        (1.1, "off by 0.1"),
        (float("nan"), "off by inf"),
        (RuntimeError("out of registers\nmore"), "out of registers"),
        (torch.OutOfMemoryError("much"), "memory"),
    ],
)
def test_a_backend_that_errs_gets_no_time(monkeypatch, tmp_path, outcome, why):
    others(monkeypatch, dict.fromkeys(("triton:expand", "cuda", "cuda:linear"), outcome))
    said = []
    (row,) = rows_of(tune.tune([TRAIN], "cpu", said.append, tmp_path))
    assert row["cuda"] is None and row["cuda:linear"] is None
    assert row["triton_plan"] in ("addmm", "gemm")
    assert said[0].count(why) == 3 and "more" not in said[0]


def test_without_a_time_of_torch_there_is_no_row(monkeypatch, tmp_path):
    others(monkeypatch, {})
    real, calls = tune.run_group, []

    def run_group(*arguments):
        calls.append(arguments[9])
        if arguments[9] == "torch" and calls.count("torch") > 1:  # the first gives what is exact
            raise torch.OutOfMemoryError("all of it")
        return real(*arguments)

    monkeypatch.setattr(tune, "run_group", run_group)
    said = []
    assert rows_of(tune.tune([TRAIN], "cpu", said.append, tmp_path)) == []
    assert "triton:expand " in said[0] and "no torch: memory" in said[0]


def test_what_the_memory_does_not_hold_is_left_out(monkeypatch, tmp_path):
    monkeypatch.setattr(tune, "_free_bytes", lambda _: TRAIN.peak_bytes)
    said = []
    (row,) = rows_of(tune.tune([TRAIN, FORWARD], "cpu", said.append, tmp_path))
    assert "left out, it takes" in said[0] and row["pass"] == "forward"

    def no_memory(*_):
        raise torch.OutOfMemoryError("all of it")

    monkeypatch.setattr(tune, "measure", no_memory)
    tune.tune([FORWARD], "cpu", said.append, tmp_path)
    assert "the memory does not suffice" in said[-1]


def test_wrong_gradients_are_seen(monkeypatch, tmp_path):
    """Outputs that are right do not save a backend."""
    others(monkeypatch, {})
    real = tune.run_group

    def run_group(*arguments):
        outputs = real(*arguments)
        if arguments[9].startswith("cuda"):
            outputs = tuple(y.detach() + 1.1 * (y - y.detach()) for y in outputs)
        return outputs

    monkeypatch.setattr(tune, "run_group", run_group)
    said = []
    (row,) = rows_of(tune.tune([TRAIN], "cpu", said.append, tmp_path))
    assert row["cuda"] is None and "no cuda:linear: its result is off by 0.1" in said[0]


def test_decoding_is_measured_with_its_kept_stacks(monkeypatch, tmp_path):
    others(monkeypatch, {})
    real, seen = tune.run_group, []
    monkeypatch.setattr(tune, "run_group", lambda *a: seen.append(a[12]) or real(*a))
    tune.tune([FORWARD], "cpu", print, tmp_path)
    assert sum(cache is not None for cache in seen) > len(seen) / 2
    seen.clear()
    tune.tune([TRAIN], "cpu", print, tmp_path)
    assert set(seen) == {None}


def test_a_backend_that_fails_while_it_is_timed_costs_itself_alone(monkeypatch, tmp_path):
    others(monkeypatch, {})
    real, count = tune._wall_seconds, []

    def clock(step, calls):
        count.append(calls)
        if len(count) == len(tune.CANDIDATES) + 2:  # the first round's second backend
            raise RuntimeError("unspecified launch failure")
        return real(step, calls)

    monkeypatch.setattr(tune, "_wall_seconds", clock)
    said = []
    (row,) = rows_of(tune.tune([TRAIN], "cpu", said.append, tmp_path))
    assert row["torch"] > 0 and "no triton:expand: unspecified launch failure" in said[0]


def test_sums_of_a_group_are_what_auto_asks_by():
    for n in ((16,), (16, 8, 8)):
        key = Timed("train", 40, 16, n, tasks=2, rank=4).key
        assert (key["n"], key["rank"]) == (sum(n), 4 * 3 * len(n))


def test_rows_of_other_versions_are_begun_anew(tmp_path):
    file = tune.tune([TRAIN], "cpu", print, tmp_path)
    table = json.loads(file.read_text())
    table["record"]["torch"] = "1.0"
    file.write_text(json.dumps(table))
    said = []
    (row,) = rows_of(tune.tune([FORWARD], "cpu", said.append, tmp_path))
    assert row["pass"] == "forward" and "other versions" in said[0]


def test_a_table_is_read_by_others_too(tmp_path):
    file = tune.tune([FORWARD], "cpu", print, tmp_path)
    plain = tmp_path / "plain"
    plain.write_text("")
    assert file.stat().st_mode == plain.stat().st_mode


def test_rows_of_other_calls_stay_and_the_same_call_is_replaced(tmp_path):
    file = tune.tune([TRAIN, FORWARD], "cpu", print, tmp_path)
    table = json.loads(file.read_text())
    for row in table["rows"]:
        row["torch"] = 1e9
    file.write_text(json.dumps(table))
    tune.tune([FORWARD], "cpu", print, tmp_path)
    train, forward = rows_of(file)
    assert train["torch"] == 1e9 and forward["torch"] < 1e9
    assert [path.name for path in tmp_path.iterdir()] == ["cpu.json"]


def test_an_own_table_goes_before_the_package_s(tmp_path, monkeypatch):
    monkeypatch.setenv("CKF_CACHE", str(tmp_path / "own"))
    monkeypatch.setattr(dispatch, "TABLES", tmp_path / "package")
    row = TRAIN.key | {"torch": 2.0, "triton": 1.0, "cuda": None, "triton_plan": "gemm"}
    far = row | {"m": 40 * 64, "triton": 3.0}
    for folder, rows in (("own/tables", [row]), ("package", [row | {"triton": 9.0}, far])):
        (tmp_path / folder).mkdir(parents=True)
        made = {"gpu": "NVIDIA Test 100", "record": {"commit": folder}, "rows": rows}
        (tmp_path / folder / "test-100.json").write_text(json.dumps(made))
    dispatch.load_table.cache_clear()

    def chosen(m: int) -> str:
        call = dispatch.Call(m, 16, 24, 24, train=True, dropout=True)
        return dispatch.measured_choice("NVIDIA Test 100", call, ("torch", "triton")).backend

    assert chosen(40) == "triton"  # one's own row, not the package's of the same call
    assert chosen(40 * 64) == "torch"  # what was not measured here is the package's
    assert dispatch.load_table("NVIDIA Test 100")["record"]["commit"] == "own/tables"


GOOD = TRAIN.key | {"torch": 2.0, "triton": 1.0, "cuda": None, "triton_plan": "gemm"}


def table_of(row) -> str:
    return json.dumps({"gpu": "x", "record": {}, "rows": [row]})


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "3",
        '{"gpu": "x", "record": [], "rows": []}',
        table_of({"m": 1}),
        table_of([]),
        *(table_of(GOOD | wrong) for wrong in (
            {"m": "x"}, {"k": None}, {"torch": "fast"}, {"triton": float("nan")}, {"cuda": -1.0},
            {"triton_plan": "nonsense"}, {"dropout": 1}, {"pass": "both"}, {"torch": True},
        )),
    ],
)  # fmt: skip
def test_a_file_that_is_no_table_is_not_used_and_named(tmp_path, monkeypatch, content):
    monkeypatch.setenv("CKF_CACHE", str(tmp_path))
    (tmp_path / "tables").mkdir()
    file = tmp_path / "tables" / "broken-1.json"
    file.write_text(content)
    dispatch.load_table.cache_clear()
    with pytest.warns(UserWarning, match=r"broken-1\.json is no table of measurements"):
        assert dispatch.load_table("NVIDIA Broken 1") is None


def test_a_folder_that_cannot_be_written_is_said_before_anything_is_measured(tmp_path):
    (tmp_path / "file").write_text("")
    said = []
    with pytest.raises(ValueError, match="set CKF_CACHE to a folder that can be written"):
        tune.tune([TRAIN], "cpu", said.append, tmp_path / "file" / "tables")
    assert said == []


def test_the_groups_of_a_model(tmp_path):
    config = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=3, vocab_size=64,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    groups = linear_groups(config)
    assert groups == [(16, (16, 8, 8)), (16, (16,)), (16, (32, 32)), (32, (16,))]
    calls = tune.calls_of(groups, 2, 4, train_rows=[64], forward_rows=[1, 8])
    assert len(calls) == len(set(calls)) == 4 * (2 + 2)


def test_a_good_row_is_one(tmp_path):
    (tmp_path / "x.json").write_text(table_of(GOOD))
    assert dispatch.read_table(tmp_path / "x.json")["rows"] == [GOOD]


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "there is no GPU to measure"), (["--tasks", "0"], "1 or more")],
)
def test_the_command_says_what_is_wrong(arguments, message, capsys):
    assert cli.main(["tune", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
