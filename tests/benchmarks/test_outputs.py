"""Tables, plots and the report from invented records; the scripts themselves at tiny size."""

import json
import shutil

import pytest

from benchmarks import (
    bench_decode,
    bench_linear,
    bench_scaling,
    bench_step,
    bench_training,
    make_table,
    plots,
    report,
    summary,
)
from benchmarks.floors import peaks_of
from benchmarks.records import load_record, rows_of
from ckf.kernels.dispatch import device_slug
from tests.benchmarks.synthetic import write_all


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("h200")
    write_all(folder)
    return folder


def test_the_table_has_every_backend_and_the_best_plan(results, tmp_path):
    out = tmp_path / "table.json"
    assert make_table.main(["--results", str(results), "--out", str(out)]) == 0
    table = json.loads(out.read_text())
    assert table["gpu"] == "NVIDIA H200" and table["record"]["torch"] == "2.11.0"
    row = next(r for r in table["rows"] if r["pass"] == "train" and r["tasks"] == 4)
    assert set(row) == {
        *("pass", "m", "k", "n", "rank", "tasks", "dropout"),
        *("torch", "triton", "cuda", "triton_plan", "cuda:linear"),
    }
    assert row["triton_plan"] == "fused" and row["triton"] < row["torch"]
    assert row["cuda"] is None and row["dropout"] is False
    assert all(r["rank"] % (r["tasks"] + 1) == 0 for r in table["rows"])
    keys = [tuple(r[name] for name in make_table.ROW_KEY) for r in table["rows"]]
    assert len(keys) == len(set(keys))
    assert {r["pass"] for r in table["rows"]} == {"forward", "train"}


def test_a_record_of_other_code_decides_nothing(results, tmp_path, capsys):
    """Only bench_decode has these rows; only bench_scaling T 64."""
    shutil.copytree(results, tmp_path / "all")
    path = tmp_path / "all" / "bench_decode.json"
    record = json.loads(path.read_text())
    record["environment"] |= {"sources": "of before", "commit": "abc"}
    path.write_text(json.dumps(record))
    out = tmp_path / "table.json"
    assert make_table.main(["--results", str(tmp_path / "all"), "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert {row["pass"] for row in rows} == {"train"} and 64 in {row["tasks"] for row in rows}
    assert "left out: a record of" in capsys.readouterr().out


def test_no_table_from_a_cpu(results, tmp_path, capsys):
    record = json.loads((results / "bench_linear.json").read_text())
    for case in record["cases"]:
        case["case"]["dtype"] = "float32"
    (tmp_path / "bench_linear.json").write_text(json.dumps(record))
    assert make_table.main(["--results", str(tmp_path)]) == 1
    assert "--device cuda" in capsys.readouterr().err


def test_the_decode_kernel_can_be_measured_apart(tmp_path):
    row = {"pass": "forward", "m": 4, "k": 8, "n": 8, "rank": 80, "cuda": 2.0}
    rows = [row, row | {"m": 5}, row | {"pass": "train", "cuda": None}]
    lines = ["mix,kernel,taken,m,k,n,rank,ms", "token,scalar,yes,4,8,8,80,0.5"]
    lines += ["token,tiles,,4,8,8,80,0.7", "one task,scalar,yes,4,8,8,80,0.4"]
    (tmp_path / "apart.csv").write_text("\n".join(lines) + "\n")
    found = make_table.with_decode(rows, tmp_path / "apart.csv")
    assert [r["cuda"] for r in found] == [0.5, 2.0, None]
    lines = ["mix,kernel,taken,m,k,n,rank,ms", "token,update,cuda,4,8,8,80,0.6"]
    lines += ["token,linear,cuda:linear,4,8,8,80,0.3", "token,linear,cuda:linear,9,8,8,80,0.3"]
    (tmp_path / "later.csv").write_text("\n".join(lines) + "\n")
    found = make_table.with_decode(found, tmp_path / "later.csv")
    assert [(r["cuda"], r.get("cuda:linear")) for r in found] == [
        (0.6, 0.3),
        (2.0, None),
        (None, None),
    ]
    table = tmp_path / "table.json"
    table.write_text(json.dumps({"gpu": "a", "record": {"commit": "b"}, "rows": rows}))
    given = ["--results", str(tmp_path), "--table", str(table), "--out", str(table)]
    assert make_table.main([*given, "--decode", str(tmp_path / "later.csv")]) == 0
    made = json.loads(table.read_text())
    assert (
        made["rows"][0] == row | {"cuda": 0.6, "cuda:linear": 0.3} and made["rows"][1:] == rows[1:]
    )
    assert (made["gpu"], made["record"]) == ("a", {"commit": "b"})


@pytest.mark.parametrize(
    ("name", "slug", "known"),
    [
        ("NVIDIA H200", "h200", True),
        ("NVIDIA H100 80GB HBM3", "h100-80gb-hbm3", True),
        ("NVIDIA H100 PCIe", "h100-pcie", False),
        ("NVIDIA A100-SXM4-80GB", "a100-sxm4-80gb", False),
    ],
)
def test_a_gpu_has_a_slug_and_perhaps_peaks(name, slug, known):
    assert device_slug(name) == slug
    assert (peaks_of(name) is not None) == known


def test_every_picture_is_drawn(results):
    made = plots.draw_all(results)
    assert {path.stem for path in made} == set(plots.PICTURES) == set(report.CAPTIONS)
    for path in made:
        assert path.read_bytes()[:4] == b"\x89PNG" and path.stat().st_size > 5000


def test_no_pictures_without_records(tmp_path, capsys):
    assert plots.main(["--results", str(tmp_path)]) == 1
    assert "no records" in capsys.readouterr().err


def test_the_report_fills_its_block_alone(results, tmp_path):
    readme = tmp_path / "README.md"
    name = results.name
    readme.write_text(f"before\n<!-- begin {name} -->\nstale\n<!-- end {name} -->\nafter\n")
    assert report.main(["--results", str(results), "--readme", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n")
    assert "stale" not in text and text.count("### NVIDIA H200") == 1
    assert "4096-4096" in text and "scaling.png" in text and "| 8B |" in text


def test_the_report_adds_a_block_and_names_what_is_missing(tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text("page\n")
    for text in ("old", "new"):
        report.rewrite(readme, "h200", text)
    assert readme.read_text() == "page\n\n<!-- begin h200 -->\nnew\n<!-- end h200 -->\n"
    assert report.main(["--results", str(tmp_path), "--readme", str(readme)]) == 1
    assert "run the benchmarks" in capsys.readouterr().err


def test_crossings_are_where_lines_meet():
    def row(name, tasks, ratio):
        return {"provider": name, "tasks": tasks, "ratio": ratio}

    rows = [row("dense", t, 1.0) for t in (4, 16)]
    rows += [row("grouped", 4, 2.0), row("grouped", 16, 0.5), row("ckf", 4, 0.9)]
    ((name, place, ratio),) = plots.crossings(rows, "tasks")
    assert (name, place, ratio) == ("grouped", pytest.approx(8.0), 1.0)


def test_growth_and_shares_of_the_records(results):
    text = "\n".join(summary.growth(load_record(results / "bench_scaling.json")))
    assert "- ckf: T 64 takes 1.41 times as long as T 2 (floor 1.0" in text
    table = summary.shares(load_record(results / "bench_step.json"))
    labels = next(s for s in table if "| labels |" in s).split(" | ")[3:]
    # 2.6 x 1.6 / 1.12; 1.6; 2.6 / 1.12; 1.3 / 1.12; 1 / 1.12; equal peaks
    assert labels[1:] == ["3.71", "1.60", "2.32", "1.16 (peft-big)", "0.89", "1.00 |"]


def test_the_front_page_gets_its_summary_and_nothing_else(results, tmp_path, capsys):
    (tmp_path / "benchmarks").mkdir()
    page = tmp_path / "benchmarks" / "README.md"
    page.write_text("page\n")
    front, (begin, end) = tmp_path / "README.md", report.marks(f"speed-{results.name}")
    front.write_text("front\n")
    run = ["--results", str(results), "--readme", str(page)]
    assert report.main(run) == 0
    assert front.read_text() == "front\n" and "put both where" in capsys.readouterr().out
    front.write_text(f"front\n{begin}\nstale\n{end}\nend\n")
    assert report.main(run) == 0
    text = front.read_text()
    assert text.startswith("front\n") and text.endswith("\nend\n") and "stale" not in text
    assert " in 2 of 2 such cases" in text and "ckf is faster than every " in text
    assert "| 8B | float32 | labels |" in text


def test_losses_lists_the_cases_that_a_peer_wins(results):
    record = load_record(results / "bench_scaling.json")
    assert report.losses([record, record]) == [f"None of {2 * len(record['cases'])} cases."]
    row = next(r for r in record["cases"][0]["rows"] if r["provider"] == "dense")
    row["ratio"] /= 2
    lost = report.losses([record, record])
    assert len(lost) == 3 and "dense" in lost[2]  # the same line is not said twice


def test_the_best_peer_is_the_one_with_the_best_ratio():
    """The frozen base of a round may be slow, and with it all that ran then."""
    rows = [
        {"provider": "ckf", "ms": 1.0, "ratio": 1.2, "peer": False},
        {"provider": "dense", "ms": 1.3, "ratio": 1.3, "peer": True},
        {"provider": "bmm", "ms": 1.2, "ratio": 1.4, "peer": True},
        {"provider": "single", "ms": 0.9, "ratio": 1.1, "peer": True},
    ]
    assert [row["provider"] for row in summary.best_of(rows)] == ["ckf", "dense"]
    assert summary.best_of(rows, by="ms")[1]["provider"] == "bmm"
    assert summary.best_of(rows[1:])[0] is None


@pytest.mark.parametrize("script", [bench_linear, bench_scaling, bench_decode])
def test_a_quick_run_writes_its_record_and_is_not_done_twice(script, tmp_path, capsys):
    arguments = ["--quick", "--out", str(tmp_path)]
    assert script.main(arguments) == 0
    name = script.__name__.rpartition(".")[2]
    record = load_record(tmp_path / f"{name}.json")
    assert {"frozen", "ckf"} <= {row["provider"] for row in rows_of(record)}
    before = (tmp_path / f"{name}.json").read_bytes()
    assert script.main(arguments) == 0
    assert (tmp_path / f"{name}.json").read_bytes() == before
    assert "are kept" in capsys.readouterr().out


def test_a_quick_run_of_a_small_model(tmp_path):
    assert bench_training.main(["--quick", "--out", str(tmp_path)]) == 0
    record = load_record(tmp_path / "bench_training.json")
    rows = {row["provider"]: row for row in rows_of(record)}
    assert set(rows) == {"frozen", "ckf", "ckf-torch"}  # on a CPU
    assert 0 < rows["ckf-torch"]["difference"] < 1e-4 and rows["ckf"]["tokens_per_second"] > 0
    assert "model is on cpu" in record["cases"][0]["skipped"]["ckf, graphs"]


@pytest.mark.slow
def test_a_quick_training_step(tmp_path):
    assert bench_step.main(["--quick", "--out", str(tmp_path)]) == 0
    rows = rows_of(load_record(tmp_path / "bench_step.json"))
    found = {(row["provider"], row["layout"]) for row in rows}
    assert {("ckf", "labels"), ("peft-loop", "padded"), ("frozen", "packed")} <= found
    assert all(row["tokens_per_s"] > 0 for row in rows)
