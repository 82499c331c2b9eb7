"""Odd but legal data: defined once in docs/robustness.md, and here."""

import json

import numpy as np
import pytest

from ckf.data.prepared import load_prepared
from tests.data import samples

COLUMNS = {"user": "who", "item": "what", "rating": "stars", "time": "when"}
COLUMNS |= {"title": "name", "text": "words"}


def table(folder, rows: list[dict]):
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    samples.write(folder / "mine.jsonl", text)
    return folder


def rows_of(count: int, **fixed) -> list[dict]:
    return [
        {
            "who": f"u{k % 4}",
            "what": f"i{k}",
            "stars": 4 - k % 2,
            "when": 1000 + k,
            "name": "",
            "words": "",
        }
        | fixed
        for k in range(count)
    ]


def prepare(raw, out, **settings):
    settings = {"format": "table", "columns": COLUMNS} | settings
    return samples.prepared(raw, out, ["ctr"], **settings)


UNICODE = [
    "Amélie", "Ame\u0301lie",  # one letter, and two: not the same id
    "千と千尋の神隠し", "لعبة",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467", "a\u200bb", "\u202egnp.exe",
    "ﬁ", "I\u0307", "\ufeffx", "x\u0000y", "\x1b[31m",
]  # fmt: skip


def test_unicode_comes_out_as_it_went_in(tmp_path):
    rows = rows_of(40)
    for row, word in zip(rows, UNICODE, strict=False):
        row |= {"what": word, "name": word, "words": f"{word} is good. I like {word}."}
    data = prepare(table(tmp_path / "raw", rows), tmp_path / "out")
    again = load_prepared(tmp_path / "out")
    for word in UNICODE:
        item = data.item_ids.index(word)  # ids are kept as they are: never normalised
        assert again.title(item) == " ".join(word.split())
        (row,) = np.flatnonzero(data.item == item)
        assert again.text(row).startswith(" ".join(word.split()))
    assert len({*data.item_ids}) == len(data.item_ids)


@pytest.mark.parametrize("title", ["", "   ", "\u3000\t", "&nbsp;", None])
def test_an_item_without_a_title_is_called_by_its_id(title, tmp_path):
    data = prepare(table(tmp_path / "raw", rows_of(40, name=title)), tmp_path / "out")
    assert [data.title(i) for i in range(data.n_items)] == [f"item {i}" for i in data.item_ids]


def test_the_first_title_that_is_not_empty_counts(tmp_path):
    rows = rows_of(40, what="one")
    for row, name in zip(rows, ["   ", "First", "Second"], strict=False):
        row["name"] = name
    data = prepare(table(tmp_path / "raw", rows), tmp_path / "out")
    assert data.titles == ["First"]


def test_an_exact_duplicate_counts_once_and_the_first_one_stays(tmp_path):
    rows = rows_of(40)
    rows.append(rows[0] | {"stars": 1, "words": "other"})  # the same user, item and second
    rows.append(rows[0] | {"when": 5000})  # at another time: another event
    data = prepare(table(tmp_path / "raw", rows), tmp_path / "out")
    assert data.manifest["counts"]["duplicates"] == 1 and len(data) == 41
    of_pair = (data.user == 0) & (data.item == 0)
    assert data.rating[of_pair].tolist() == [4, 4]


def test_neither_a_split_nor_a_history_tells_rows_of_one_second_apart(tmp_path):
    rows = [
        {
            "who": f"u{u}",
            "what": f"i{u}-{k}",
            "stars": 5 if u < 5 else 1,
            "when": 1000 + k // 4,
            "name": "",
            "words": "",
        }
        for u in range(6)
        for k in range(4 * (u + 2))
    ]
    data = prepare(table(tmp_path / "raw", rows), tmp_path / "out")
    for user in range(5):
        for second in set(data.time[data.user == user]):
            own = (data.user == user) & (data.time == second)
            assert len({*data.split[own]}) == 1
            assert len({tuple(h) for h in data.history[own]}) == 1
            assert not {*data.history[own].flat} & {*data.item[own]}
