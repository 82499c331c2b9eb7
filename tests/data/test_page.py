"""docs/data.md: its config works as it stands, and it names what the code knows, all of it."""

import csv
import dataclasses
import io
import re
from pathlib import Path

import pytest
import yaml

from ckf.cf.fit import KINDS
from ckf.config_files import load_config
from ckf.data.config import COLUMNS, FORMATS, LISTS, SPLIT_KINDS, TASKS, DataConfig, SplitConfig
from ckf.data.prepare import prepare
from tests.data import samples

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")


def code(kind: str) -> str:
    """The page's one block of that kind ("" for the CSV, which comes first)."""
    return re.search(rf"^```{kind}\n(.*?)^```$", PAGE, re.M | re.S)[1]


def table(head: str) -> list[list[str]]:
    """Cells of the rows below the head, ticks taken off."""
    rows = re.search(rf"^\| {head} \|.*\n\| ---.*\n((?:\|.*\n)+)", PAGE, re.M)[1]
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows.splitlines()]


def names(head: str) -> list[str]:
    return [row[0].strip("` ") for row in table(head)]


@pytest.fixture
def config(tmp_path):
    (tmp_path / "shop.yaml").write_text(code("yaml"), encoding="utf-8")
    return load_config(tmp_path / "shop.yaml")


def test_the_config_of_the_page_prepares_such_a_file(config, tmp_path):
    header, *rows = csv.reader(io.StringIO(code("")))
    assert set(config.data.columns.values()) == set(header)
    rows += [[u, i, r, t, f"Item {i}"] for u, i, r, t in samples.events()]
    file = io.StringIO()
    csv.writer(file).writerows([header, *rows])
    path = samples.write(tmp_path / config.data.path, file.getvalue())
    data = prepare(config.data, config.tasks, path, tmp_path / "out", config.seed, lambda line: 0)
    assert len(data) == len(rows) and data.manifest["counts"]["broken_lines"] == 0
    assert data.title(data.item_ids.index("377")) == "Heavyweights (1994)"


def test_the_keys_said_to_be_required_are_required(config, tmp_path):
    said = re.search(r"The keys (.*?) are required", PAGE, re.S)[1]
    keys = re.findall(r"`([\w.]+)`", said)
    assert keys == ["name", "model.name", "data.name", "data.format", "tasks"]
    for key in [*keys, "data.columns"]:
        values = yaml.safe_load(code("yaml"))
        *groups, last = key.split(".")
        inner = values
        for group in groups:
            inner = inner[group]
        del inner[last]
        (tmp_path / "less.yaml").write_text(yaml.safe_dump(values))
        with pytest.raises(ValueError, match=f"{last}.* is missing|{key} lacks"):
            load_config(tmp_path / "less.yaml")


@pytest.mark.parametrize(
    ("head", "known"),
    [
        ("column", COLUMNS),
        ("format", FORMATS),
        ("split", SPLIT_KINDS),
        ("task", TASKS),
        ("`cf.kind`", KINDS),
    ],
)
def test_every_name_is_one_that_the_code_knows(head, known):
    assert sorted(names(head)) == sorted(known)


def test_defaults_are_those_of_the_code():
    split = {f"split.{f.name}": f.default for f in dataclasses.fields(SplitConfig)}
    own = dataclasses.asdict(DataConfig("x", "amazon"))
    for name, default, *_ in table("setting"):
        key = name.strip("` ").removeprefix("data.")
        assert yaml.safe_load(default) == (split | own)[key], key
    assert all(name in PAGE for name in LISTS)


def test_every_setting_in_the_text_exists():
    known = {f"data.{f.name}" for f in dataclasses.fields(DataConfig)}
    known |= {f"data.split.{f.name}" for f in dataclasses.fields(SplitConfig)}
    assert set(re.findall(r"`(data\.[a-z_.]+)", PAGE)) <= known


def test_the_readme_links_the_page():
    assert "[docs/data.md](docs/data.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
