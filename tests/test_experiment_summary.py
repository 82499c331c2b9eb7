"""The page is made from the records: the same figures, the same verdicts."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from ckf.experiment.picture import picture
from ckf.experiment.summary import main, summary
from ckf.report_metrics import number

ROOT = Path(__file__).parent.parent


def figure(value, low, high, seeds=(0.7,)):
    return {"value": value, "low": low, "high": high, "seeds": list(seeds), "std": None}


def comparison(a, b, value, p, seeds, name="auc"):
    return figure(value, value - 0.01, value + 0.01, seeds) | {
        "a": a, "b": b, "claim": f"{a} over {b}", "task": "ctr", "metric": name,
        "p": p, "p_holm": p,
    }  # fmt: skip


@pytest.fixture
def record():
    return {
        "name": "small",
        "split": "test",
        "reduced": [],
        "runs": 2,
        "runs_done": 2,
        "environment": {"devices": ["cpu"]},
        "rows": {"ctr": 1000, "topk": 60},
        "model": {"name": "tiny"},
        "cells": {
            "ckf": {
                "title": "all of it",
                "test_ctr_auc": figure(0.74, 0.71, 0.77),
                "test_ctr_uauc": figure(0.68, 0.64, 0.72) | {"users": 224},
            },
            "text": {"title": "no CF", "test_ctr_auc": figure(0.61, 0.58, 0.64)},
        },
        "baselines": {"cf": {"test_ctr_auc": figure(0.735, 0.7, 0.76)}},
        "comparisons": [
            comparison("ckf", "text", 0.13, 0.002, [0.13]),
            comparison("ckf", "cf", 0.005, 0.4, [0.005]),
            comparison("ckf", "linear", -0.05, 0.01, [-0.05]),
            comparison("ckf", "one", 0.05, 0.01, [0.11, -0.01]),
        ],
    }


def test_figures_and_verdicts_are_those_of_the_record(record):
    text = summary(record, "results/small.json")
    lines = text.splitlines()
    assert "| ckf: all of it | 0.740 [0.710, 0.770] | 0.680 [0.640, 0.720], 224 users |" in (
        " |".join(line.split(" |")[:3]) + " |" for line in lines
    )
    assert any(line.startswith("| cf | 0.735 [0.700, 0.760] |") for line in lines)
    claims = [line for line in lines if line.startswith("* ")]
    assert [line.partition("**")[2].partition("**")[0] for line in claims] == [
        "holds",
        "the opposite holds",
        "open",
    ]
    assert claims[-1].endswith(": ckf over cf; ckf over one")  # of the latter, two seeds disagree
    assert "| ckf over cf | ckf - cf | 0.005 [" in text
    assert "| ckf over one | ckf - one | 0.050 [" in text
    assert "(../results/small.json)" in text
    assert "Reduced" not in text and "Not complete" not in text


def test_weights_beside_a_prior_are_said(record):
    assert "Weight of the language model" not in summary(record, "x.json")
    record["cells"]["ckf"]["weights"] = {"ctr": [0.0, 0.5], "topk": [0.125, 1.0]}
    assert "the prior in ckf, by seed: ctr 0.00, 0.50; topk 0.12, 1.00 (0:" in summary(record, "x")


def test_differences_by_what_is_known_of_the_user(record):
    assert "train rows" not in summary(record, "x.json")
    slices = (("0", 300, 0.02, 0.5), ("50 or more", 700, 0.04, 0.01))
    record["by_user_rows"] = [
        comparison("ckf", "ckf-shuffled", value, p, [value]) | {"slice": name, "rows": rows}
        for name, rows, value, p in slices
    ]
    lines = summary(record, "x.json").splitlines()
    assert lines[-3] == "| A | B | 0 (300) | 50 or more (700) |"
    assert lines[-1] == (
        "| ckf | ckf-shuffled | 0.020 [0.010, 0.030] | 0.040 [0.030, 0.050], A better |"
    )


def test_reduced_and_unfinished_records_say_so(record):
    text = summary(record | {"reduced": ["1 seed instead of 3"], "runs_done": 1}, "x.json")
    assert text.startswith("**Reduced run**: ") and "\n* 1 seed instead of 3\n" in text
    assert "AUC (reduced)" in text and "**Not complete: 1 of 2 runs.**" in text


def test_the_command_prints_it(record, tmp_path, capsys):
    file = tmp_path / "small.json"
    file.write_text(json.dumps(record))
    assert main([str(file)]) == 0
    assert capsys.readouterr().out.strip() == summary(record, str(file))


PAGE = "docs/experiments.md"


@pytest.mark.parametrize("file", sorted((ROOT / "benchmarks" / "results").glob("*-collm*.json")))
def test_a_page_says_what_its_record_says(file):
    path = file.relative_to(ROOT).as_posix()
    record = json.loads(file.read_text())
    expected = summary(record, path, PAGE)
    assert expected in (ROOT / PAGE).read_text(), (
        f"put the output of python -m ckf.experiment.summary {path} {PAGE} there"
    )
    (link,) = set(re.findall(r"\]\(([^)]*\.json)\)", expected))
    assert (ROOT / PAGE).parent.joinpath(link).resolve() == file


def test_the_picture_beside_a_record_shows_it():
    files = sorted((ROOT / "benchmarks" / "results").glob("*-collm*.json"))
    assert files
    for file in files:
        record = json.loads(file.read_text())
        drawn = file.with_suffix(".svg").read_text()
        ElementTree.fromstring(drawn)
        for part in (*record["cells"].values(), *record["baselines"].values()):
            if "test_ctr_auc" in part:
                assert f">{number(part['test_ctr_auc']['value'])}<" in drawn
        made = picture(record)
        assert re.findall(r">([^<>]+)</text>", made) == re.findall(r">([^<>]+)</text>", drawn), (
            f"python -m ckf.experiment.picture {file.relative_to(ROOT)}"
        )


def test_a_record_without_figures_has_no_picture(record):
    assert "<svg" in picture(record)
    for part in (*record["cells"].values(), *record["baselines"].values()):
        part.clear()
    with pytest.raises(ValueError, match="no AUC, UAUC or MRR to draw"):
        picture(record)
