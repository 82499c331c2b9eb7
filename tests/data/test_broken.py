"""Broken lines are named with file and line, counted and kept out; too many are refused."""

import gzip
import json
import re

import pytest

from ckf.data.config import DataConfig, TaskRows
from ckf.data.errors import DataError
from ckf.data.prepare import prepare
from tests.data import samples

EVENTS = samples.events()
MAPPED = {"user": "who", "item": "what", "rating": "stars", "time": "when"}

DELIMITED = [
    ("7\t8\t9", "3 fields instead of 4 between '\\t'"),
    ("7\t8\tgood\t1000000000", "rating 'good' is not a number"),
    ("7\t8\tnan\t1000000000", "rating 'nan' is not finite"),
    ("7\t8\tinf\t1000000000", "rating 'inf' is not finite"),
    ("\t8\t5\t1000000000", "the user id is empty"),
    ("7\t8\t5\tyesterday", "time 'yesterday' is neither a number nor a date"),
]
AMAZON = [
    ("{not json", "not JSON"),
    ("[1, 2]", "not a JSON object"),
    ('{"asin": "B1", "overall": 5.0}', "neither 'reviewerID' (2014, 2018) nor 'user_id' (2023)"),
    ('{"reviewerID": "A", "overall": 5, "unixReviewTime": 1}', "the item id is missing"),
    ('{"reviewerID": "A", "asin": "", "overall": 5, "unixReviewTime": 1}', "item id is empty"),
    ('{"reviewerID": "A", "asin": "B", "unixReviewTime": 1}', "rating None is not a number"),
    ('{"reviewerID": "A", "asin": "B", "overall": NaN, "unixReviewTime": 1}', "is not finite"),
    ('{"reviewerID": "A", "asin": "B", "overall": 1e999, "unixReviewTime": 1}', "is not finite"),
    ('{"reviewerID": "A", "asin": "B", "overall": true, "unixReviewTime": 1}', "not a number"),
    ('{"reviewerID": "A", "asin": "B", "overall": 5}', "neither unixReviewTime nor a reviewTime"),
    ('{"reviewerID": "A", "asin": "B", "overall": 5, "unixReviewTime": 1e999}', "not finite"),
    ('{"reviewerID": "\\ud800", "asin": "B", "overall": 5, "unixReviewTime": 1}', "not valid UTF"),
    ("[" * 100_000, "not JSON"),
]


@pytest.mark.parametrize(("line", "reason"), DELIMITED)
def test_broken_rating_lines(line, reason, tmp_path):
    raw = samples.movielens_100k(tmp_path / "raw", EVENTS)
    lines = (raw / "u.data").read_text().splitlines()
    lines.insert(41, line)
    lines.insert(20, "")  # a blank line is no broken line, but it counts
    samples.write(raw / "u.data", "\n".join(lines))
    data = samples.prepared(raw, tmp_path / "out", format="movielens-100k")
    counts = data.manifest["counts"]
    assert counts["first_broken_lines"] == [f"u.data:43: {reason}"]
    assert (counts["broken_lines"], counts["lines"], counts["rows"]) == (1, 121, 120)
    with pytest.raises(DataError, match=re.escape("1 of 121 lines are broken, more than")) as e:
        samples.prepared(raw, tmp_path / "no", format="movielens-100k", max_bad_share=0.001)
    assert f"u.data:43: {reason}" in str(e.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "raw"]


@pytest.mark.parametrize(("line", "reason"), AMAZON)
def test_broken_reviews(line, reason, tmp_path):
    lines = [json.dumps(samples.review(2014, *row)) for row in EVENTS]
    lines.insert(99, line)
    raw = samples.write(tmp_path / "reviews_X.json.gz", "\n".join(lines))
    data = samples.prepared(raw, tmp_path / "out", format="amazon")
    (said,) = data.manifest["counts"]["first_broken_lines"]
    assert said.startswith("reviews_X.json.gz:100: ") and reason in said
    assert len(data) == len(EVENTS)


def test_wrong_bytes_are_one_broken_line(tmp_path):
    lines = [json.dumps(samples.review(2014, *row)).encode() for row in EVENTS]
    lines[5] = lines[5].replace(b"Jane", b"J\xe9ne")
    (tmp_path / "reviews_X.json").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines))
    data = samples.prepared(tmp_path, tmp_path / "out", format="amazon")
    assert data.manifest["counts"]["first_broken_lines"] == ["reviews_X.json:6: not valid UTF-8"]
    raw = samples.movielens_csv(tmp_path / "raw", EVENTS)
    text = (raw / "ratings.csv").read_bytes().split(b"\n")
    text[7] = b"\xe9" + text[7]
    (raw / "ratings.csv").write_bytes(b"\n".join(text))
    data = samples.prepared(raw, tmp_path / "out2", format="movielens-csv")
    (said,) = data.manifest["counts"]["first_broken_lines"]
    assert said.startswith("ratings.csv:8: not in the file's encoding")
    assert len(data) == len(EVENTS) - 1


def test_line_numbers_across_blocks(tmp_path, monkeypatch):
    from ckf.data import delimited, files

    monkeypatch.setattr(
        delimited, "blocks", lambda path, limits: files.blocks(path, limits, size=64)
    )
    raw = samples.movielens_csv(tmp_path / "raw", EVENTS)
    lines = (raw / "ratings.csv").read_text().splitlines()
    lines[100] = "1,2,x,3"
    samples.write(raw / "ratings.csv", "\n".join(lines))
    data = samples.prepared(raw, tmp_path / "out", format="movielens-csv")
    said = data.manifest["counts"]["first_broken_lines"]
    assert said == ["ratings.csv:101: rating 'x' is not a number"]
    assert len(data) == len(EVENTS) - 1


def test_table_lines_are_counted_through_quoted_line_breaks(tmp_path):
    raw, columns = samples.table(tmp_path / "raw", EVENTS, "csv")  # two lines a record
    path = raw / "mine.csv"
    lines = path.read_text().splitlines()
    lines[21] = lines[21].replace(",5,", ",few,")  # the record of lines 22 and 23
    path.write_text("\n".join([*lines, "u1,i1,many,5,,", "u1,i1", ""]))
    data = samples.prepared(
        raw, tmp_path / "out", format="table", columns=columns, max_bad_share=0.05
    )
    assert data.manifest["counts"]["first_broken_lines"] == [
        "mine.csv:22: rating 'few' is not a number",
        "mine.csv:242: rating 'many' is not a number",
        "mine.csv:243: 2 fields instead of 6",
    ]


def test_only_the_first_broken_lines_are_named(tmp_path):
    raw = samples.movielens_100k(tmp_path / "raw", EVENTS)
    samples.write(raw / "u.data", (raw / "u.data").read_text() + "x\n" * 50)
    with pytest.raises(DataError) as error:
        samples.prepared(raw, tmp_path / "out", format="movielens-100k")
    assert "50 of 170 lines" in str(error.value) and "and 45 more" in str(error.value)
    assert "u.data:121: " in str(error.value) and "u.data:126: " not in str(error.value)


def test_exact_duplicates_are_dropped_and_counted(tmp_path):
    user, item, stars, time = EVENTS[0]
    rows = [*EVENTS, EVENTS[0], EVENTS[50], (user, item, stars, time + 5)]
    raw = samples.movielens_100k(tmp_path / "raw", rows)
    data = samples.prepared(raw, tmp_path / "out", format="movielens-100k")
    assert data.manifest["counts"]["duplicates"] == 2
    assert len(data) == len(EVENTS) + 1  # the same pair at another time stays


def test_k_core_is_iterated(tmp_path):
    # item 1 has three rows; when user 9 goes for having one row only, item 1 goes too
    rows = [(u, i, 1 + u, 100 * u + i) for u in range(1, 5) for i in range(2, 8)]
    rows += [(1, 1, 5, 7), (2, 1, 5, 7), (9, 1, 5, 7)]
    raw = samples.movielens_100k(tmp_path / "raw", rows)
    data = samples.prepared(
        raw, tmp_path / "out", ["ctr"], format="movielens-100k", min_user=2, min_item=3
    )
    assert "9" not in data.user_ids and "1" not in data.item_ids
    assert (data.n_users, data.n_items, len(data)) == (4, 6, 24)
    assert data.manifest["counts"]["outside_k_core"] == 3
    with pytest.raises(DataError, match="lower data.min_user"):
        samples.prepared(raw, tmp_path / "no", ["ctr"], format="movielens-100k", min_user=50)


def damage(kind: str, raw) -> None:
    if kind == "missing":
        (raw / "u.data").unlink()
    elif kind == "empty":
        (raw / "u.data").write_bytes(b"")
    elif kind == "blank":
        (raw / "u.data").write_text("\n\n")
    elif kind == "cut":
        packed = gzip.compress((raw / "u.data").read_bytes())
        (raw / "u.data").write_bytes(packed[: len(packed) // 2])
    elif kind == "several":
        (raw / "u.data.old").write_bytes(b"")
    elif kind == "link":
        (raw / "u.data").rename(raw.parent / "elsewhere")
        (raw / "u.data").symlink_to(raw.parent / "elsewhere")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("missing", r"ratings of MovieLens 100K not found.*holds: u.item"),
        ("empty", "u.data is empty; download or copy it again"),
        ("blank", "u.data holds no interaction"),
        ("cut", "u.data is cut off or damaged"),
        ("several", "2 files in .* match .*u.data, u.data.old; name one"),
        ("link", "is a link that leaves the data folder; copy the file"),
    ],
)
def test_bad_files_give_one_clear_error(kind, said, tmp_path):
    raw = samples.movielens_100k(tmp_path / "raw", EVENTS)
    damage(kind, raw)
    with pytest.raises(DataError, match=said):
        samples.prepared(raw, tmp_path / "out", format="movielens-100k")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name", ["../u.data", "/etc/passwd", "a/../../u.data", "..\\u.data", "C:\\u.data", "../*"]
)
def test_names_cannot_leave_the_data_folder(name, tmp_path):
    raw = samples.movielens_100k(tmp_path / "raw", EVENTS)
    samples.movielens_100k(tmp_path, EVENTS)
    for setting in ("reviews", "metadata"):
        with pytest.raises(DataError, match="leaves the data folder"):
            samples.prepared(raw, tmp_path / "out", format="movielens-100k", **{setting: name})


def test_no_such_path(tmp_path):
    with pytest.raises(DataError, match="nowhere does not exist; give the folder"):
        samples.prepared(tmp_path / "nowhere", tmp_path / "out", format="recbole")
    with pytest.raises(DataError, match="no data: give the folder"):
        samples.prepared(None, tmp_path / "out", format="recbole")


def test_preparing_prints_the_first_broken_lines(tmp_path):
    """A file in Latin-1 loses every line with an accent: that has to be seen, not looked up."""
    lines = [f"u{u},i{i},{r},{t},Café {i}" for u, i, r, t in EVENTS]
    lines = [line if k % 20 == 7 else line.replace("é", "e") for k, line in enumerate(lines)]
    lines[3] = "u1,i2,good,5,x"
    head = "who,what,stars,when,name"
    (tmp_path / "mine.csv").write_bytes("\n".join([head, *lines]).encode("latin-1"))
    said = []
    config = DataConfig("x", "table", columns=MAPPED | {"title": "name"}, max_bad_share=0.1)
    prepare(config, {"ctr": TaskRows()}, tmp_path, tmp_path / "out", 0, said.append)
    assert "dropped 7 broken lines" in said[1]
    assert said[2:7] == ["broken: mine.csv:5: rating 'good' is not a number"] + [
        f"broken: mine.csv:{k}: not valid UTF-8" for k in (9, 29, 49, 69)
    ]
    assert sum(line.startswith("broken: ") for line in said) == 5


@pytest.mark.parametrize(("name", "end"), [("label", "0 nor 1"), ("split", "train, valid, test")])
def test_the_reason_of_a_broken_line_is_short(name, end, tmp_path):
    lines = [f"u{u},i{i},{r},{t},{r % 2},train" for u, i, r, t in EVENTS]
    lines[3] = "u1,i2,4,5," + ("y" * 9999 + ",train" if name == "label" else "1," + "y" * 9999)
    text = "\n".join(["who,what,stars,when,label,split", *lines])
    samples.write(tmp_path / "raw" / "mine.csv", text)
    columns = MAPPED | {"label": "label", "split": "split"}
    with pytest.raises(DataError, match=f"mine.csv:5: {name} 'y") as error:
        samples.prepared(
            tmp_path / "raw",
            tmp_path / "out",
            format="table",
            columns=columns,
            split="given",
            max_bad_share=0.0,
        )
    assert end in str(error.value) and len(str(error.value)) < 300
