"""Data files from strangers: whatever they hold, a reader reads them or raises DataError.

Fuzzed with damaged valid files; sizes, lines and records that would fill memory are refused by a
limit. Nothing here writes a large file: a small limit stands for the real one.
"""

import csv
import gzip
import io
import tempfile
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckf.data.config import DataConfig, SplitConfig
from ckf.data.errors import DataError
from ckf.data.files import Limits, csv_records, lines
from ckf.data.readers import READERS, read_source
from ckf.data.store import write_names
from tests.data import samples
from tests.hardening.strangers import FORMATS, answers, damage, fuzzed, write_valid

EVENTS = samples.events()


def read(root: Path, **options):
    if isinstance(options.get("split"), str):
        options["split"] = SplitConfig(options["split"])
    config = DataConfig("stranger", **options)
    found = read_source(config, READERS[config.format].files(config, root), io.BytesIO())
    with tempfile.TemporaryDirectory() as folder:
        write_names(Path(folder), found)  # what was read can be stored
    return found


@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_files_are_read_or_refused(kind, tmp_path):
    options, files = write_valid(kind, tmp_path)
    assert len(read(tmp_path, **options)) > 0
    valid = [file.read_bytes() for file in files]
    read_to_the_end = []

    @settings(fuzzed, max_examples=300)
    @given(st.integers(0, len(files) - 1), damage(), st.booleans())
    def run(which, harm, inside):
        data = valid[which]
        packed = data[:2] == b"\x1f\x8b" and inside  # else the archive itself is damaged
        harmed = gzip.compress(harm(gzip.decompress(data)), 1) if packed else harm(data)
        files[which].write_bytes(harmed)
        try:
            if answers(lambda: read(tmp_path, **options)) is None:
                read_to_the_end.append(1)
        finally:
            files[which].write_bytes(data)

    run()
    assert read_to_the_end  # not everything was refused at the first byte


@settings(fuzzed, max_examples=300)
@given(st.sampled_from(sorted(FORMATS)), st.binary(max_size=400))
def test_random_bytes_are_read_or_refused(kind, data):
    with tempfile.TemporaryDirectory() as folder:
        options, files = write_valid(kind, Path(folder))
        files[0].write_bytes(data)
        answers(lambda: read(Path(folder), **options))


ONE_LINE = ["u.data", "ratings.csv", "mine.csv", "mine.jsonl", "reviews_Books_5.json", "u.item"]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ONE_LINE)
def test_a_long_line_is_refused_by_name_and_number(name, packed, tmp_path):
    kind = next(k for k, names in FORMATS.items() if {name, name + ".gz"} & {*names})
    options, files = write_valid(kind, tmp_path)
    file = next(f for f in files if f.name.startswith(name))
    data = file.read_bytes()
    data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    head, rest = data.split(b"\n", 3)[:3], data.split(b"\n", 3)[3]
    harmed = b"\n".join([*head, b"7" * 2000, rest])
    file.write_bytes(gzip.compress(harmed) if packed else harmed)
    options["max_line_bytes"] = 1000
    with pytest.raises(DataError, match=rf"{file.name}:\d+: more than 1,000 bytes in one line"):
        read(tmp_path, **options)
    options["max_line_bytes"] = 1 << 22
    answers(lambda: read(tmp_path, **options))  # a broken line as any other


def test_a_line_of_just_the_limit_is_read(tmp_path):
    file = samples.write(tmp_path / "a", "x" * 50 + "\n" + "y" * 50)
    assert [n for n, _ in lines(file, Limits(line=50))] == [1, 2]
    with pytest.raises(DataError, match="a:1: more than 49"):
        list(lines(file, Limits(line=49)))


def test_a_record_without_an_end_is_refused(tmp_path):
    """Every line closes one quote and opens the next: one record of the whole file."""
    file = samples.write(tmp_path / "a.csv", 'a,b\n"x\n' + '","x\n' * 1000)
    with pytest.raises(DataError, match=r"a.csv:\d+: more than 200 bytes in one line or record"):
        list(csv_records(file, Limits(line=200)))
    samples.write(file, 'a,b\n"' + "x\n" * 200_000)  # longer than Python's csv takes a field
    (numbers, record) = list(csv_records(file, Limits()))[1]
    assert isinstance(record, csv.Error) and numbers[0] == 2 and len(numbers) > 60_000


@pytest.mark.parametrize("kind", ["collm", "amazon", "jsonl.gz"])
def test_what_unpacks_to_too_much_is_refused(kind, tmp_path):
    options, files = write_valid(kind, tmp_path)
    size = len(gzip.decompress(files[0].read_bytes()))
    read(tmp_path, **options, max_unpacked_bytes=size)
    with pytest.raises(DataError, match="unpacks to more than .* data.max_unpacked_bytes"):
        read(tmp_path, **options, max_unpacked_bytes=size - 1)


@pytest.mark.parametrize("name", ["mine.jsonl.gz", "mine.csv.gz"])
def test_a_bomb_costs_no_memory(name, tmp_path):
    """64 MiB without a line end in 64 KiB: refused after one limit's worth of it."""
    columns = {"user": "who", "item": "what", "rating": "stars", "time": "when"}
    file = tmp_path / name
    with gzip.open(file, "wb", compresslevel=9) as out:
        for _ in range(64):
            out.write(b"a" * (1 << 20))
    assert file.stat().st_size < 100_000
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="more than 1,048,576 bytes in one line"):
            read(tmp_path, format="table", columns=columns, max_line_bytes=1 << 20)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_parquet_that_unpacks_to_too_much_is_refused(tmp_path):
    import polars as pl

    columns = {"user": "who", "item": "what", "rating": "stars", "time": "when"}
    n = 100_000  # equal values: a few kilobytes
    frame = pl.DataFrame({"who": ["u"] * n, "what": ["i"] * n, "stars": [5] * n, "when": [1] * n})
    frame.write_parquet(tmp_path / "mine.parquet")
    options = {"format": "table", "columns": columns}
    assert (tmp_path / "mine.parquet").stat().st_size < 50_000
    with pytest.raises(DataError, match="100,000 rows, which unpack to more than"):
        read(tmp_path, **options, max_unpacked_bytes=1 << 20)
    pl.DataFrame(
        {"who": ["u", "x" * 3000], "what": ["i"] * 2, "stars": [5] * 2, "when": [1] * 2}
    ).write_parquet(tmp_path / "mine.parquet")
    with pytest.raises(DataError, match="mine.parquet:2: more than 1,000 bytes"):
        read(tmp_path, **options, max_line_bytes=1000)
    pl.DataFrame({"who": [["u"]], "what": ["i"], "stars": [5], "when": [1]}).write_parquet(
        tmp_path / "mine.parquet"
    )
    with pytest.raises(DataError, match=r"column 'who' holds List\(String\); expected plain"):
        read(tmp_path, **options)


def test_metadata_is_never_evaluated(tmp_path):
    """2014's metadata are Python literals: calls and names in them are broken lines."""
    raw = samples.amazon(tmp_path / "raw", EVENTS, 2014)
    mark = tmp_path / "ran"
    line = f"{{'asin': 'B1', 'title': __import__('pathlib').Path({str(mark)!r}).touch()}}\n"
    file = next(raw.glob("meta*"))
    file.write_bytes(gzip.compress(line.encode() + gzip.decompress(file.read_bytes())))
    found = read(raw, format="amazon", max_bad_share=0.5)
    assert not mark.exists() and len(found) == len(EVENTS)
