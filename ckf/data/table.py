"""The user's own CSV, TSV, JSON lines or Parquet, with `data.columns` naming the columns."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

from ckf.data.config import SPLITS, TIME_UNITS, DataConfig
from ckf.data.errors import DataError
from ckf.data.files import Limits, csv_records, find_file, guarded, lines, open_bytes, too_long
from ckf.data.interactions import CHUNK, Broken, Builder, parse_rating, parse_time, show
from ckf.data.titles import clean_title

_PATTERNS = ["*.csv*", "*.tsv*", "*.jsonl*", "*.json*", "*.parquet"]
_SPLIT_NAMES = {name: index for index, name in enumerate(SPLITS)} | {
    "validation": 1,
    "val": 1,
    "dev": 1,
}
_MISSING = (None, "")
_VALUE = 16  # bytes of a value in memory, at least
_SLICE = 4 * CHUNK  # rows read at a time
_HEAD = 4096
_ARRAY = re.compile(rb"\s*\[\s*(\{|$)")  # of objects; a line alone may be another array


def files(config: DataConfig, root: Path) -> list[Path]:
    """The one table (data.reviews names it where several lie in the folder)."""
    return [find_file(root, "the table", [config.reviews] if config.reviews else _PATTERNS)]


def read(config: DataConfig, paths: list[Path], out: Builder) -> None:
    """Every row; empty ratings, labels and texts mean "none"."""
    for number, row in _rows(paths[0], config.columns, out.limits):
        out.bad.lines += 1
        try:
            if isinstance(row, Broken):
                raise row
            _add(row, config, out)
        except Broken as error:
            out.bad.lines += error.lines - 1
            out.bad.add(paths[0], number, str(error), error.lines)


def _rows(
    path: Path, columns: dict[str, str], limits: Limits
) -> Iterator[tuple[int, dict | Broken]]:
    """(line number, {ckf's name: value}) by the file's kind."""
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() != ".gz"]
    kind = suffixes[-1] if suffixes else ""
    if kind in (".csv", ".tsv", ".txt"):
        return _csv_rows(path, columns, "," if kind == ".csv" else "\t", limits)
    if kind in (".jsonl", ".json"):
        return _json_rows(path, columns, limits)
    if kind == ".parquet":
        return _parquet_rows(path, columns, limits)
    raise DataError(
        f"{path.name} is no table that can be read; it must end in .csv, .tsv, .txt, .jsonl, "
        ".json (one object a line) or .parquet, .gz allowed"
    )


def _check_columns(path: Path, columns: dict[str, str], there: list[str]) -> None:
    missing = [
        f"{column!r} (for {name})" for name, column in columns.items() if column not in there
    ]
    if missing:
        raise DataError(
            f"{path.name} has no column {', '.join(missing)}; its columns are: "
            f"{', '.join(there)}. Correct data.columns"
        )
    doubled = [column for column in dict.fromkeys(columns.values()) if there.count(column) > 1]
    if doubled:
        raise DataError(
            f"{path.name} has more than one column {', '.join(map(repr, doubled))}; its columns "
            f"are: {', '.join(there)}. Rename all but the one that is meant"
        )


def _csv_rows(
    path: Path, columns: dict[str, str], sep: str, limits: Limits
) -> Iterator[tuple[int, dict | Broken]]:
    # surrogateescape: bytes that are no UTF-8 become a broken line, not a crash
    records = csv_records(path, limits, sep, errors="surrogateescape")
    _, header = next(records, (range(0), []))
    if isinstance(header, csv.Error):
        raise DataError(f"{path.name}:1: {header}; mend the quotes of the file")
    _check_columns(path, columns, header)
    places = {name: header.index(column) for name, column in columns.items()}
    for numbers, row in records:
        if isinstance(row, csv.Error):
            yield numbers[0], Broken(f"its quotes do not fit ({row})", len(numbers))
        elif row and len(row) != len(header):
            reason = f"{len(row)} fields instead of {len(header)}"
            yield numbers[0], Broken(reason, len(numbers))
        elif row:
            yield numbers[0], {name: row[place] for name, place in places.items()}


def _json_rows(
    path: Path, columns: dict[str, str], limits: Limits
) -> Iterator[tuple[int, dict | Broken]]:
    _refuse_array(path, limits)
    there: dict[str, None] = {}
    seen_all = False
    for number, line in lines(path, limits):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield number, Broken(f"not JSON: {error}")
            continue
        if not isinstance(record, dict):
            yield number, Broken("not a JSON object")
            continue
        if not seen_all:  # keys may be left out in single lines, not in all
            there.update(dict.fromkeys(record))
            seen_all = all(column in there for column in columns.values())
        yield number, {name: record.get(column) for name, column in columns.items()}
    if there and not seen_all:  # without any object the broken lines say what is wrong
        _check_columns(path, columns, list(there))


def _refuse_array(path: Path, limits: Limits) -> None:
    with guarded(path), open_bytes(path, limits) as file:
        head = file.read(_HEAD).removeprefix(b"\xef\xbb\xbf")
    if _ARRAY.match(head):
        raise DataError(
            f"{path.name} holds one JSON array; expected an object a line: convert it, for example "
            "with jq -c '.[]'"
        )


def _parquet_rows(
    path: Path, columns: dict[str, str], limits: Limits
) -> Iterator[tuple[int, dict]]:
    import polars as pl

    wanted = list(dict.fromkeys(columns.values()))
    try:
        there = pl.read_parquet_schema(path)
        _check_columns(path, columns, list(there))
        _check_plain(path, {name: there[name] for name in wanted})
        frame = pl.scan_parquet(path).select(wanted)
        count = frame.select(pl.len()).collect().item()
        if count * len(wanted) * _VALUE > limits.unpacked:
            raise DataError(
                f"{path} has {count:,} rows, which unpack to more than {limits.unpacked:,} bytes; "
                "if that is right, raise data.max_unpacked_bytes"
            )
        for start in range(0, count, _SLICE):  # a part at a time: memory stays constant
            part = frame.slice(start, _SLICE).collect()
            _check_lengths(path, part, start, limits)
            for number, row in enumerate(part.iter_rows(named=True, buffer_size=64), start + 1):
                yield number, {name: row[column] for name, column in columns.items()}
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as error:
        raise DataError(f"{path} is no Parquet file that can be read ({error})") from error


def _check_plain(path: Path, types: dict) -> None:
    for name, kind in types.items():
        if kind.is_nested() or kind.is_object():
            raise DataError(
                f"{path.name}: column {name!r} holds {kind}; expected plain values: take the "
                "values out of it, or correct data.columns"
            )


def _check_lengths(path: Path, part, start: int, limits: Limits) -> None:
    """Long values are found before they are made: many rows may share one in the file."""
    import polars as pl

    for column in part.iter_columns():
        if column.dtype not in (pl.String, pl.Binary):
            continue
        sizes = column.cast(pl.Binary).bin.size().fill_null(0)
        if len(sizes) and sizes.max() > limits.line:
            raise too_long(path, start + sizes.arg_max() + 1, limits)


def _add(row: dict, config: DataConfig, out: Builder) -> None:
    rating, label = row.get("rating"), row.get("label")
    item, title = _id(row["item"], "item"), _words(row.get("title"), "title")
    out.add(
        _id(row["user"], "user"),
        item,
        float("nan") if rating in _MISSING else parse_rating(rating),
        parse_time(row["time"], TIME_UNITS[config.time_unit]),
        text=_words(row.get("text"), "text"),
        label=-1 if label in _MISSING else _flag(label, "label"),
        split=_split(row["split"]) if "split" in row and config.split.kind == "given" else -1,
        not_cold=-1 if row.get("not_cold") in _MISSING else _flag(row["not_cold"], "not_cold"),
    )
    if title and not out.titles.get(item):
        out.titles[item] = clean_title(title)


def _id(value, what: str) -> str:
    if value in _MISSING:
        raise Broken(f"the {what} id is empty")
    no_number = isinstance(value, float) and not math.isfinite(value)
    if isinstance(value, bool) or no_number:
        raise Broken(f"the {what} id is {show(value)}; expected a string or a number")
    return _words(value, f"{what} id").strip()


def _words(value, what: str) -> str:
    if isinstance(value, float) and math.isnan(value):  # how pandas says that there is none
        value = None
    if isinstance(value, bool | list | dict) or value in (math.inf, -math.inf):
        raise Broken(f"the {what} is {show(value)}; expected a string")
    try:
        words = value.decode() if isinstance(value, bytes) else str("" if value is None else value)
        words.encode()
    except UnicodeError as error:  # also lone surrogates
        raise Broken("not valid UTF-8") from error
    return words


def _flag(value, what: str) -> int:
    word = str(value).strip().lower()
    if word in ("1", "1.0", "true", "yes"):
        return 1
    if word in ("0", "0.0", "false", "no"):
        return 0
    raise Broken(f"{what} {show(value)} is neither 0 nor 1")


def _split(value) -> int:
    name = str(value).strip().lower()
    if name not in _SPLIT_NAMES:
        raise Broken(f"split {show(value)} is none of train, valid, test")
    return _SPLIT_NAMES[name]
