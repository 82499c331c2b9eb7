"""The run report: every figure comes from the run, nothing is loaded, missing parts are named."""

import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from ckf import plots, report
from ckf import report_metrics as rm
from ckf.report_metrics import Value

VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """Collects tags, attributes and text; `open_tags` ends empty for well-nested HTML."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.attributes, self.open_tags, self.text, self.cells = [], [], [], [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, key, value) for key, value in attrs]
        if tag in {"td", "th"}:
            self.cells.append("")
        if tag not in VOID:
            self.open_tags.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open_tags = self.open_tags[:-1] if tag not in VOID else self.open_tags

    def handle_endtag(self, tag):
        assert self.open_tags.pop() == tag

    def handle_data(self, data):
        if "style" in self.open_tags:
            return
        self.text.append(data)
        if self.open_tags and {"td", "th"} & set(self.open_tags):
            self.cells[-1] += data


def interval(value, half=0.04, **more):
    return {"value": value, "low": value - half, "high": value + half, **more}


def full_metrics():
    ctr = {"auc": interval(0.7123), "uauc": interval(0.6581, users=224), "loss": {"value": 0.5917}}
    slices = {
        "warm": {"auc": interval(0.7345), "rows": 4220},
        "not_cold": {"auc": interval(0.7011)},
    }
    topk = {"hr@1": interval(0.3123), "ndcg@10": interval(0.5511)}
    return {
        "run": {
            "name": "demo", "created": "2025-01-02", "seed": 3, "model": "tiny-lm",
            "device": "cpu", "trainable_parameters": 4884480,
            "seconds": {"cf": 12.25, "train": 3605.0},
            "rows": {"train": {"ctr": 8000, "topk": 700}},
        },
        "test": {
            "ctr": {**ctr, "slices": slices},
            "topk": {**topk, "lists": {"popular99": {"hr@1": interval(0.0912)}}},
        },
        "untrained": {"ctr": {"auc": interval(0.5124)}, "topk": {"hr@1": interval(0.1015)}},
        "baselines": {
            "ctr": {"item_mean": {"auc": interval(0.7013)}, "cf": {"auc": interval(0.5925)}},
            "topk": {"popularity": {"hr@1": interval(0.4137)}},
        },
        "held_out_loss": {"before": {"ctr": 1.9321}, "after": {"ctr": 0.6234}},
        "gate": {"tasks": ["ctr", "topk"], "experts": ["shared", "ctr"],
                 "values": [[1.0, 0.8765], [0.4321, -0.2109]]},
    }  # fmt: skip


def log_lines(steps=60):
    return [
        {"step": s, "loss": 2 / s + 1, "loss/ctr": 2 / s + 0.9, "loss/topk": 3 / s + 1,
         "text_share": 1 - s / steps, "tokens_per_second": 900.0 + s, "seconds": s * 2.0}
        for s in range(1, steps + 1)
    ]  # fmt: skip


def make_run(folder, metrics="full", log="full", config="name: demo\ndata:\n  name: ml-tiny\n"):
    folder.mkdir(parents=True)
    if metrics is not None:
        metrics = full_metrics() if metrics == "full" else metrics
        text = metrics if isinstance(metrics, str) else json.dumps(metrics)
        (folder / "metrics.json").write_text(text)
    if log is not None:
        entries = log_lines() if log == "full" else log
        lines = [e if isinstance(e, str) else json.dumps(e) for e in entries]
        (folder / "train_log.jsonl").write_text("\n".join(lines) + "\n")
    if config is not None:
        (folder / "config.yaml").write_text(config)
    return folder


def write(run):
    html = report.write_report(run).read_text(encoding="utf-8")
    page = Page(html)
    assert page.open_tags == []
    return html, page


def test_every_figure_in_the_result_tables_is_in_metrics(tmp_path):
    metrics = full_metrics()
    _, page = write(make_run(tmp_path / "run"))
    known = {rm.number(x) for x in rm.leaves(metrics) if rm.is_finite(x)}
    known |= {rm.number(0.6234 - 1.9321)}  # the change of the held-out loss
    shown = [cell for cell in page.cells if re.search(r"\d\.\d", cell)]
    numbers = [n for cell in shown for n in re.findall(r"-?[\d,]+\.[\d]+(?:e-?\d+)?", cell)]
    assert len(numbers) > 40
    assert set(numbers) <= known
    tested = [x for x in rm.leaves([metrics["test"], metrics["baselines"]]) if x != 224]
    assert {rm.number(x) for x in tested} - set(numbers) == {rm.number(4220)}
    assert any("224 users" in cell for cell in page.cells)
    assert any("4,220 rows" in cell for cell in page.cells)


def test_headline_facts(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "data").mkdir()
    (run / "data" / "manifest.json").write_text('{"name": "ml-manifest", "n_users": 943}')
    text = " ".join(write(run)[1].text)
    for fact in ("tiny-lm", "ml-manifest", "8,700", "4,884,480", "1 h 0 min", "CTR 8,000", "943"):
        assert fact in text
    assert "ckf train run/config.yaml" in text


def test_the_page_is_self_contained(tmp_path):
    html, page = write(make_run(tmp_path / "run"))
    assert not {"script", "link", "img", "iframe", "object", "image"} & set(page.tags)
    assert "http://" not in html
    assert "https://" not in html
    assert "@import" not in html
    for tag, key, value in page.attributes:
        assert not key.startswith("on")
        if key in {"href", "xlink:href", "src"}:
            assert value.startswith("#"), (tag, key, value)
    assert set(re.findall(r"url\((.)", html)) == {"#"}


def test_ids_are_unique_and_references_resolve(tmp_path):
    html, page = write(make_run(tmp_path / "run"))
    ids = [value for _, key, value in page.attributes if key == "id"]
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'href="#([^"]+)"', html)) | set(re.findall(r"url\(#([^)]+)\)", html))
    assert used
    assert used <= set(ids)


def test_accessible(tmp_path):
    _, page = write(make_run(tmp_path / "run"))
    images = [v for _, k, v in page.attributes if (k, v) == ("role", "img")]
    labels = [v for tag, k, v in page.attributes if tag == "div" and k == "aria-label"]
    assert len(images) == page.tags.count("svg") == page.tags.count("figure") >= 9
    assert any("CKF 0.712 [0.672, 0.752]; untrained model 0.512" in label for label in labels)
    scopes = sum(1 for tag, k, _ in page.attributes if tag == "th" and k == "scope")
    assert scopes == page.tags.count("th")
    assert page.tags.count("h1") == 1


HOSTILE = "<script>alert(1)</script>\" onload='x' & $\\frac{a}$ {{ 7*7 }} -->"


def test_hostile_names_are_text(tmp_path):
    metrics = full_metrics()
    metrics["run"] |= {"name": HOSTILE, "model": HOSTILE, "device": HOSTILE, "created": HOSTILE}
    metrics["baselines"]["ctr"][HOSTILE] = {"auc": interval(0.61), HOSTILE: 0.5}
    metrics["test"]["ctr"]["slices"][HOSTILE] = {"auc": interval(0.62), "rows": 3}
    metrics["test"][HOSTILE] = {"auc": interval(0.63)}
    metrics["held_out_loss"]["after"][HOSTILE] = 1.5
    metrics["gate"]["experts"][0] = HOSTILE
    log = [{"step": s, f"loss/{HOSTILE}": 1.0, "loss": 1.0} for s in range(3)]
    run = make_run(tmp_path / "a $(x) <b>", metrics, log, f"name: '{HOSTILE[:8]}'\n{HOSTILE}")
    (run / "data").mkdir()
    (run / "data" / "manifest.json").write_text(json.dumps({"name": HOSTILE}))
    html, page = write(run)
    assert "<script" not in html
    assert "script" not in page.tags
    assert not [a for a in page.attributes if a[1].startswith("on")]
    assert HOSTILE in page.text
    assert "49" not in "".join(t for t in page.text if "7*7" in t)
    assert "ckf evaluate 'a $(x) <b>'" in "".join(page.text)


def test_unusual_unicode_is_written(tmp_path):
    metrics = full_metrics()
    metrics["run"]["name"] = "映画 🎬 \ud800"
    metrics["baselines"]["ctr"]["映画 🎬"] = {"auc": 0.6}
    assert "映画 🎬" in write(make_run(tmp_path / "run", metrics))[0]


def test_same_run_same_bytes(tmp_path):
    run = make_run(tmp_path / "run")
    first = report.write_report(run).read_bytes()
    plots.interval_plot("other", "Other", "", [plots.Mark("a", Value(1.0), "1")], None)
    assert report.write_report(run).read_bytes() == first
    other = make_run(tmp_path / "elsewhere" / "run")
    assert report.write_report(other).read_bytes() == first


def test_the_writer_leaves_no_half_file(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run")
    path = report.write_report(run)
    assert path == run / "report.html"
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(report.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        report.write_report(run)
    assert path.read_bytes() == before
    names = {p.name for p in run.iterdir()}
    assert names == {"metrics.json", "train_log.jsonl", "config.yaml", "report.html"}


@pytest.mark.parametrize("part", ["test", "untrained", "baselines", "held_out_loss", "gate", "run"])
@pytest.mark.parametrize("broken", ["missing", None, [], "text", {}])
def test_any_part_may_be_missing_or_odd(tmp_path, monkeypatch, part, broken):
    monkeypatch.setattr(report, "interval_plot", lambda *_: "")  # drawn elsewhere; keep this fast
    monkeypatch.setattr(report, "curve_plot", lambda *_: "")
    metrics = full_metrics()
    metrics[part] = broken
    if broken == "missing":
        del metrics[part]
    text = " ".join(write(make_run(tmp_path / "run", metrics))[1].text)
    absent = {"test": "test metrics", "untrained": "the untrained model", "baselines": "baselines",
              "held_out_loss": "held-out loss", "gate": "gate"}  # fmt: skip
    if part in absent and broken != "text":
        assert absent[part] in text[text.index("Not in this run") :]
    if part == "gate" and broken not in ("missing", None):
        assert "gate in metrics.json is not a matrix" in text
    assert ("No verdict" in text) == (part == "test")


def test_interrupted_before_evaluation(tmp_path):
    log = [*log_lines(), '{"step": 61, "lo']
    text = " ".join(write(make_run(tmp_path / "run", None, log, None))[1].text)
    assert "metrics.json is missing. Run `ckf evaluate run`" in text
    assert "1 unreadable line(s)" in text
    assert "No verdict" in text
    assert "last logged training step is 60" in text
    assert "2 min 0 s" in text
    assert "config.yaml is missing" in text


def test_metrics_alone_suffice(tmp_path):
    text = " ".join(write(make_run(tmp_path / "run", log=None, config="a: [1"))[1].text)
    assert "train_log.jsonl is missing" in text
    assert "CTR AUC is 0.712" in text
    assert "a: [1" in text


def test_broken_metrics_beside_a_good_log(tmp_path):
    text = " ".join(write(make_run(tmp_path / "run", '{"test": '))[1].text)
    assert "metrics.json cannot be read (Expecting value" in text


@pytest.mark.parametrize(
    ("metrics", "log", "said"),
    [
        (None, None, ["metrics.json is missing", "train_log.jsonl is missing"]),
        ("{", ["", "nonsense"], ["metrics.json cannot be read", "no readable line (1 unreadable)"]),
        ("[1]", [""], ["metrics.json holds '[1]'", "train_log.jsonl is empty"]),
        ("{}", [{"loss": 1.0}], ["metrics.json holds '{}'", "no readable line"]),
    ],
)
def test_nothing_to_report_raises(tmp_path, metrics, log, said):
    run = make_run(tmp_path / "run", metrics, log)
    with pytest.raises(ValueError, match="nothing to report") as error:
        report.write_report(run)
    for words in (*said, str(run), "ckf train", "ckf evaluate"):
        assert words in str(error.value)
    assert not (run / "report.html").exists()


def test_no_run_folder_raises(tmp_path):
    with pytest.raises(ValueError, match="is not a run folder"):
        report.write_report(tmp_path / "none")


def test_values_that_are_not_finite_become_dashes(tmp_path):
    metrics = full_metrics()
    metrics["test"]["ctr"]["auc"] = interval(math.nan)
    metrics["test"]["ctr"]["uauc"]["low"] = -math.inf
    metrics["test"]["topk"]["hr@1"] = True
    log = [*log_lines(), {"step": 61, "loss": math.nan, "loss/ctr": math.inf}]
    html, page = write(make_run(tmp_path / "run", metrics, log))
    text = " ".join(page.text)
    assert "4 value(s) in metrics.json are not finite" in text
    assert "2 logged loss(es) are not finite" in text
    assert "CTR UAUC is 0.658." in text
    assert not re.search(r"\b(nan|inf)\b", html)


def test_verdict_claims_only_separate_intervals():
    sentences = rm.verdict(full_metrics())
    assert sentences[0] == (
        "CKF against the untrained model: better on 2 of 2 tasks. "
        "Against the best baseline: worse on 1 of 2 tasks, not told apart on 1."
    )
    assert "better than the untrained model (0.512 [0.472, 0.552])" in sentences[1]
    assert "not told apart from the best of 2 baselines, item mean (0.701" in sentences[1]
    assert "worse than popularity (0.414 [0.374, 0.454])" in sentences[2]


@pytest.mark.parametrize(
    ("ours", "theirs", "direction", "relation"),
    [
        (Value(0.7, 0.6, 0.8), Value(0.5, 0.4, 0.59), 1, "better"),
        (Value(0.7, 0.6, 0.8), Value(0.5, 0.4, 0.6), 1, "open"),  # they touch
        (Value(0.7, 0.6, 0.8), Value(0.5, 0.4, 0.59), -1, "worse"),
        (Value(0.4, 0.3, 0.5), Value(0.7, 0.6, 0.8), 1, "worse"),
        (Value(0.4, 0.3, 0.5), Value(0.7, 0.6, 0.8), -1, "better"),
        (Value(0.9, 0.8, 1.0), Value(0.1), 1, "unknown"),
        (Value(0.9), Value(0.1, 0.0, 0.2), 1, "unknown"),
        (Value(0.9, 0.8, 1.0), Value(0.1, 0.0, 0.2), 0, "unknown"),
    ],
)
def test_compare(ours, theirs, direction, relation):
    assert rm.compare(ours, theirs, direction) == relation


def test_the_best_baseline_of_an_error_is_the_smallest():
    rating = {"global_mean": {"rmse": interval(1.1)}, "item_mean": {"rmse": interval(0.9)}}
    metrics = {"test": {"rating": {"rmse": interval(1.0)}}, "baselines": {"rating": rating}}
    assert "worse than the best of 2 baselines, item mean" in rm.verdict(metrics)[1]


def test_verdict_names_chance_and_missing_comparisons():
    metrics = {"test": {"ctr": {"auc": interval(0.52)}}, "untrained": {"ctr": {"auc": 0.3}}}
    lead, sentence = rm.verdict(metrics)
    assert "no claim on 1 of 1 task." in lead
    assert "an interval is missing, so no claim" in sentence
    assert "Its interval includes 0.5, which is chance." in sentence
    lead, sentence = rm.verdict({"test": {"ctr": {"auc": interval(0.4)}}})
    assert "stand alone" in lead
    assert "Its interval lies below 0.5" in sentence
    assert rm.verdict({"untrained": {"ctr": {"auc": 0.5}}}) == []


def test_number():
    assert [rm.number(x) for x in (None, 12345, 0.7080, 0.00423, 0.0, -1e-16, -1.5, 19876.4)] == [
        "–", "12,345", "0.708", "0.0042", "0.000", "0.000", "-1.500", "19,876",
    ]  # fmt: skip


def test_resumed_log_replaces_the_steps_trained_again(tmp_path):
    lines = [{"step": s, "loss": 9.0} for s in (1, 2, 3, 4)] + [{"step": 3, "loss": 1.0}]
    make_run(tmp_path / "run", None, lines)
    entries, problem = report._read_log(tmp_path / "run" / "train_log.jsonl")
    assert [(e["step"], e["loss"]) for e in entries] == [(1, 9.0), (2, 9.0), (3, 1.0)]
    assert problem == ""


def test_smoothed_has_no_lag_and_keeps_a_constant():
    line = np.linspace(3, 1, 400)
    assert np.allclose(plots.smoothed(line)[10:-10], line[10:-10])
    assert np.allclose(plots.smoothed(np.full(50, 2.0)), 2.0)
    assert plots.smoothed(np.array([5.0])).tolist() == [5.0]


def test_thin_keeps_extremes_and_bounds_the_points():
    values = np.random.default_rng(0).normal(size=50_000)
    values[777], values[40_001] = 99.0, -99.0
    steps, kept = plots.thin(np.arange(50_000.0), values)
    assert len(kept) <= plots.MAX_POINTS
    assert (kept.max(), kept.min()) == (99.0, -99.0)
    assert (np.diff(steps) > 0).all()


def test_a_long_log_makes_a_small_page(tmp_path):
    log = [{"step": s, "loss": math.sin(s)} for s in range(20_000)]
    run = make_run(tmp_path / "run", None, log)
    assert len(report.write_report(run).read_bytes()) < 60_000


def test_metrics_table():
    console = pytest.importorskip("rich.console")
    metrics = full_metrics()
    metrics["run"]["name"] = "[red]name[/nope]"
    table = report.metrics_table(metrics)
    heads = [column.header for column in table.columns]
    base = ["task", "metric", "CKF", "untrained", "item mean", "popularity"]
    assert heads == [*base, "CF"]
    rows = list(zip(*(column._cells for column in table.columns), strict=True))
    rows = [[str(cell) for cell in row] for row in rows]
    assert rows[0][6] != "–"
    assert rows[0][:6] == ["CTR", "AUC", "0.712 [0.672, 0.752]", "0.512", "0.701", "–"]
    assert rows[1][:4] == ["", "UAUC", "0.658 [0.618, 0.698]", "–"]
    assert rows[3][:6] == ["Top-K", "HR@1", "0.312 [0.272, 0.352]", "0.102", "–", "0.414"]
    with (out := console.Console(width=110, record=True, quiet=False)).capture() as captured:
        out.print(table)
    assert "[red]name[/nope]" in captured.get()
    assert report.metrics_table({}).row_count == 0


def test_metrics_table_refuses_what_is_no_dict():
    with pytest.raises(ValueError, match="metrics is a str, expected the dict"):
        report.metrics_table("metrics.json")
