"""Tables, names and paths that are not what they should be: one clear answer to each."""

import csv
import gzip
import json
import os
from pathlib import Path

import pytest

from ckf.data.errors import DataError
from ckf.data.prepared import load_prepared
from tests.data import samples

COLUMNS = {"user": "who", "item": "what", "rating": "stars", "time": "when"}
COLUMNS |= {"title": "name", "text": "words"}
HEAD = b"who,what,stars,when,name,words\n"
ROWS = [b"u%d,i%d,%d,%d,N%d,\n" % (k % 6, k % 17, 1 + k % 5, 1000 + k, k % 17) for k in range(60)]


def read(raw: Path, out: Path, **settings):
    return samples.prepared(
        raw, out, ["ctr"], **({"format": "table", "columns": COLUMNS} | settings)
    )


def csv_file(folder: Path, *parts: bytes, name: str = "mine.csv") -> Path:
    folder.mkdir()
    (folder / name).write_bytes(b"".join(parts))
    return folder


def jsonl_file(folder: Path, **change) -> Path:
    folder.mkdir()
    rows = [
        {"who": f"u{k % 6}", "what": f"i{k % 17}", "stars": 1 + k % 5, "when": 1000 + k}
        for k in range(60)
    ]
    rows[5] |= {"name": "", "words": ""} | change
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


# ---- quotes


@pytest.mark.parametrize("tail", [b'"u9,i1,5,7,N,\n', b'u9,i1,5,7,N,"good\n'])
def test_a_quote_left_open_costs_all_lines_that_it_swallows(tail, tmp_path):
    """As the last field it would be a text of half the file, in a row that looks right."""
    raw = csv_file(tmp_path / "raw", HEAD, *ROWS[:30], tail, *ROWS[30:])
    with pytest.raises(DataError, match=r"31 of 61 lines are broken.*mine.csv:32: its quotes do"):
        read(raw, tmp_path / "out")
    data = read(raw, tmp_path / "out", max_bad_share=0.6)
    assert len(data) == 30 and data.manifest["counts"]["broken_lines"] == 31


def test_reading_goes_on_behind_quotes_that_do_not_fit(tmp_path):
    bad = b'u9,i1,5,7,N,"very "good" one"\n'
    raw = csv_file(tmp_path / "raw", HEAD, *ROWS[:30], bad, *ROWS[30:])
    data = read(raw, tmp_path / "out", max_bad_share=0.02)
    (said,) = data.manifest["counts"]["first_broken_lines"]
    assert said.startswith("mine.csv:32: its quotes do not fit") and len(data) == 60


def test_a_record_over_several_lines_counts_once(tmp_path):
    good = b'u9,i1,5,7,N,"one\ntwo\n\nthree"\n'
    data = read(csv_file(tmp_path / "raw", HEAD, good, *ROWS), tmp_path / "out")
    assert data.manifest["counts"]["lines"] == len(data) == 61
    assert "one two three" in [data.text(row) for row in range(61)]


def test_a_field_may_be_as_long_as_a_line(tmp_path):
    """Python's csv refuses fields above 131,072 characters unless told otherwise."""
    before = csv.field_size_limit()
    words = b"so good. " * 20_000
    raw = csv_file(tmp_path / "raw", HEAD, b'u9,i1,5,7,N,"' + words + b'"\n', *ROWS)
    data = read(raw, tmp_path / "out", max_text_chars=10**6)
    assert data.manifest["counts"]["broken_lines"] == 0 and csv.field_size_limit() == before
    assert max(len(data.text(row)) for row in range(61)) == len(words.strip())
    with pytest.raises(DataError, match="mine.csv:2: more than 150,000 bytes"):
        read(raw, tmp_path / "no", max_line_bytes=150_000)
    assert csv.field_size_limit() == before


def test_quotes_of_a_header_and_of_movies(tmp_path):
    raw = csv_file(tmp_path / "raw", b'"who,what\n', *ROWS)
    with pytest.raises(DataError, match=r"mine.csv:1: .*mend the quotes"):
        read(raw, tmp_path / "out")
    raw = samples.movielens_csv(tmp_path / "movies", samples.events())
    with open(raw / "movies.csv", "ab") as file:
        file.write(b'99,"Open,Drama\n')
    with pytest.raises(DataError, match=r"movies.csv:32: .*mend the quotes"):
        samples.prepared(raw, tmp_path / "out", format="movielens-csv")


@pytest.mark.parametrize("ends", [b"\r\n", b"\r"])
def test_line_ends_and_byte_order_marks(ends, tmp_path):
    data = b"\xef\xbb\xbf" + HEAD + b"".join(ROWS)
    raw = csv_file(tmp_path / "raw", data.replace(b"\n", ends))
    assert len(read(raw, tmp_path / "out")) == 60


# ---- values


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"name": "\ud800x"}, "not valid UTF-8"),
        ({"words": "\ud800x"}, "not valid UTF-8"),
        ({"who": "\ud800"}, "not valid UTF-8"),
        ({"who": [1, 2]}, "the user id is [1, 2]; expected a string"),
        ({"what": {"a": 1}}, "the item id is {'a': 1}; expected a string"),
        ({"who": True}, "the user id is True; expected a string or a number"),
        ({"who": float("nan")}, "the user id is nan; expected a string or a number"),
        ({"who": "\u3000 "}, "the user id is empty"),
        ({"name": ["a"]}, "the title is ['a']; expected a string"),
        ({"words": {"a": 1}}, "the text is {'a': 1}; expected a string"),
        ({"name": True}, "the title is True; expected a string"),
        ({"words": False}, "the text is False; expected a string"),
        ({"name": float("inf")}, "the title is inf; expected a string"),
        ({"words": float("-inf")}, "the text is -inf; expected a string"),
        ({"stars": float("inf")}, "rating inf is not finite"),
        ({"stars": "1e999"}, "rating '1e999' is not finite"),
        ({"stars": 10**400}, "is not a number"),
        ({"stars": True}, "rating True is not a number"),
        ({"when": float("inf")}, "time inf is not finite"),
        ({"when": "9" * 5000}, "is neither a number nor a date"),
        ({"when": 2**62}, "is out of range"),
    ],
)
def test_values_that_are_none_are_broken_lines(change, reason, tmp_path):
    data = read(jsonl_file(tmp_path / "raw", **change), tmp_path / "out", max_bad_share=0.02)
    (said,) = data.manifest["counts"]["first_broken_lines"]
    assert said.startswith("mine.jsonl:6: ") and reason in said and len(data) == 59


@pytest.mark.parametrize(
    ("change", "user", "time"),
    [
        ({"who": "a\nb"}, "a\nb", 1005),
        ({"who": "a\"b'c<i>"}, "a\"b'c<i>", 1005),
        ({"who": 7.5}, "7.5", 1005),
        ({"when": -5}, None, -5),
        ({"when": "2020-01-02"}, None, 1577923200),
        ({"when": "2020-01-02T00:00:00+02:00"}, None, 1577916000),
    ],
)
def test_odd_values_are_kept(change, user, time, tmp_path):
    data = read(jsonl_file(tmp_path / "raw", **change), tmp_path / "out")
    assert len(data) == 60 and time in data.time and (user or "u5") in data.user_ids


def test_nan_is_no_title_and_no_text(tmp_path):
    raw = jsonl_file(tmp_path / "raw", name=float("nan"), words=float("nan"))
    data = read(raw, tmp_path / "out")
    assert len(data) == 60 and not any(data.titles) and not data.has_text.any()


def test_titles_in_another_encoding_are_broken_lines(tmp_path):
    raw = csv_file(tmp_path / "raw", HEAD, b"u1,i99,5,3,Caf\xe9,\n", *ROWS)
    data = read(raw, tmp_path / "out", max_bad_share=0.02)
    assert data.manifest["counts"]["first_broken_lines"] == ["mine.csv:2: not valid UTF-8"]


def test_half_a_character_in_metadata_is_a_question_mark(tmp_path):
    raw = samples.amazon(tmp_path / "raw", samples.events(), 2023)
    meta = next(raw.glob("meta*"))
    meta.write_text('{"parent_asin": "B1", "title": "Half \\ud83d of it"}\n')
    data = samples.prepared(raw, tmp_path / "out", format="amazon")
    assert data.title(data.item_ids.index("B1")) == "Half ? of it"


def test_parquet_has_bytes_and_dates(tmp_path):
    import datetime

    import polars as pl

    day, one = datetime.date(2020, 1, 2), datetime.timedelta(days=1)
    rows = [
        {"who": b"u%d" % (k % 6), "what": f"i{k}", "stars": 4 - k % 2, "when": day + k * one}
        for k in range(60)
    ]
    (tmp_path / "raw").mkdir()
    columns = {name: COLUMNS[name] for name in ("user", "item", "rating", "time")}
    for last, lines in ((b"u9", 0), (b"\xff", 1)):
        rows[-1]["who"] = last
        pl.DataFrame(rows).write_parquet(tmp_path / "raw" / "mine.parquet")
        data = read(tmp_path / "raw", tmp_path / f"out{lines}", columns=columns, max_bad_share=0.02)
        assert set(data.user_ids) - {"u9"} == {f"u{k}" for k in range(6)}
        assert data.manifest["counts"]["broken_lines"] == lines
        assert data.time.min() == 1577923200


# ---- packed files

PACKED = gzip.compress(HEAD + b"".join(ROWS))


@pytest.mark.parametrize(
    "data",
    [
        PACKED + b"garbage" * 9,
        PACKED[:-20],
        PACKED[:-8],
        PACKED[:-8] + bytes(8),
        PACKED[:9],
        PACKED[:2],
    ],
    ids=["garbage behind", "cut", "no checksum", "wrong checksum", "half a header", "two bytes"],
)
def test_damaged_archives_are_refused(data, tmp_path):
    raw = csv_file(tmp_path / "raw", data, name="mine.csv.gz")
    with pytest.raises(DataError, match="is cut off or damaged"):
        read(raw, tmp_path / "out", max_bad_share=1.0)


def test_archives_of_several_members_and_zeros_behind(tmp_path):
    members = gzip.compress(HEAD) + gzip.compress(b"".join(ROWS)) + bytes(512)
    raw = csv_file(tmp_path / "raw", members, name="mine.csv.gz")
    assert len(read(raw, tmp_path / "out")) == 60


# ---- paths


@pytest.mark.parametrize("name", ["a\0b", ".", "x" * 300, "\ud800", "./."])
def test_names_that_are_none(name, tmp_path):
    raw = csv_file(tmp_path / "raw", HEAD, *ROWS)
    with pytest.raises(DataError, match="is no file name"):
        read(raw, tmp_path / "out", reviews=name)


@pytest.mark.parametrize("path", ["a\0b", "x" * 300, "\ud800", "~nobody-here/x"])
def test_paths_that_are_none(path, tmp_path):
    with pytest.raises(DataError, match="give the folder"):
        read(path, tmp_path / "out")


@pytest.mark.timeout(30)
def test_pipes_and_devices_are_never_read(tmp_path):
    """They have no end, and opening a pipe waits for its writer."""
    (tmp_path / "raw").mkdir()
    pipe = tmp_path / "raw" / "mine.csv"
    os.mkfifo(pipe)
    for path, said in (
        (pipe, "is neither a folder nor a file"),
        (Path("/dev/zero"), "is neither a folder nor a file"),
        (pipe.parent, "no file in .* matches"),
    ):
        with pytest.raises(DataError, match=said):
            read(path, tmp_path / "out")
    os.mkfifo(tmp_path / "manifest.json")
    with pytest.raises(DataError, match="it has no manifest.json that can be read"):
        load_prepared(tmp_path)


def test_a_file_that_cannot_be_read_is_said_with_the_reason(tmp_path):
    """/proc/self/mem fails as a broken disk does: it opens, and reading is an I/O error."""
    if not Path("/proc/self/mem").exists():
        pytest.skip("needs /proc")
    with pytest.raises(DataError, match=r"mem cannot be read \(Input/output error\)"):
        read(Path("/proc/self/mem"), tmp_path / "out")


# ---- files of another make


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("name", ["mine.json", "mine.json.gz"])
def test_a_json_array_is_named_with_the_fix(name, indent, tmp_path):
    rows = [{"who": f"u{k % 6}", "what": k % 17, "stars": 4, "when": k} for k in range(60)]
    samples.write(tmp_path / "raw" / name, json.dumps(rows, indent=indent))
    with pytest.raises(DataError, match=f"{name} holds one JSON array; .* jq -c"):
        read(tmp_path / "raw", tmp_path / "out", max_line_bytes=100)


def test_without_a_json_object_the_broken_lines_speak(tmp_path):
    samples.write(tmp_path / "raw" / "mine.jsonl", "[1, 2]\nx\n" * 3)
    with pytest.raises(DataError, match="6 of 6 lines are broken.*mine.jsonl:1: not a JSON object"):
        read(tmp_path / "raw", tmp_path / "out")


def test_a_mapped_column_that_stands_twice_is_refused(tmp_path):
    """The other one may be the one that is meant."""
    head = HEAD.replace(b"words", b"stars")
    raw = csv_file(tmp_path / "raw", head, *ROWS)
    columns = {name: column for name, column in COLUMNS.items() if name != "text"}
    with pytest.raises(DataError, match="more than one column 'stars'; its columns are: who, what"):
        read(raw, tmp_path / "out", columns=columns)
    raw = csv_file(tmp_path / "other", HEAD.replace(b"name,words", b"more,more"), *ROWS)
    columns = {name: column for name, column in columns.items() if name != "title"}
    assert len(read(raw, tmp_path / "out", columns=columns)) == 60


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", ["mine.csv", "mine.csv.gz", "mine.jsonl"])
def test_utf_16_is_named_with_the_fix(name, encoding, tmp_path):
    text = "\ufeff" + (HEAD + b"".join(ROWS)).decode()
    samples.write(tmp_path / "raw" / name, text, encoding)
    with pytest.raises(DataError, match=f"{name} is UTF-16 .* expected UTF-8: .*iconv"):
        read(tmp_path / "raw", tmp_path / "out")
