"""MovieLens as GroupLens ships it: 100K (u.data), 1M (ratings.dat), latest/20M/25M (ratings.csv).

User files with ages and zip codes are not opened.
"""

from __future__ import annotations

import csv
from pathlib import Path

from ckf.data.config import DataConfig
from ckf.data.delimited import header_columns, read_delimited
from ckf.data.errors import DataError
from ckf.data.files import csv_records, find_file, lines
from ckf.data.interactions import Builder
from ckf.data.titles import movie_title

_BY_POSITION = {"user": 0, "item": 1, "rating": 2, "time": 3}
_CSV_NAMES = {
    "user": ("userId",),
    "item": ("movieId",),
    "rating": ("rating",),
    "time": ("timestamp",),
}


def files_100k(config: DataConfig, root: Path) -> list[Path]:
    """u.data and u.item."""
    return [
        find_file(root, "the ratings of MovieLens 100K", [config.reviews or "u.data*"]),
        find_file(root, "the movies of MovieLens 100K", [config.metadata or "u.item*"]),
    ]


def read_100k(config: DataConfig, files: list[Path], out: Builder) -> None:
    """Tab-separated ratings; movies between "|" in latin-1."""
    read_delimited(files[0], "\t", _BY_POSITION, out, header=False, encoding="latin-1")
    _read_titles(files[1], "|", out)


def files_1m(config: DataConfig, root: Path) -> list[Path]:
    """ratings.dat and movies.dat."""
    return [
        find_file(root, "the ratings of MovieLens 1M", [config.reviews or "ratings.dat*"]),
        find_file(root, "the movies of MovieLens 1M", [config.metadata or "movies.dat*"]),
    ]


def read_1m(config: DataConfig, files: list[Path], out: Builder) -> None:
    """Both files between "::", movies in latin-1."""
    read_delimited(files[0], "::", _BY_POSITION, out, header=False, encoding="latin-1")
    _read_titles(files[1], "::", out)


def files_csv(config: DataConfig, root: Path) -> list[Path]:
    """ratings.csv and movies.csv."""
    return [
        find_file(root, "the ratings of MovieLens", [config.reviews or "ratings.csv*"]),
        find_file(root, "the movies of MovieLens", [config.metadata or "movies.csv*"]),
    ]


def read_csv(config: DataConfig, files: list[Path], out: Builder) -> None:
    """CSV with a header; titles may be quoted."""
    columns = header_columns(files[0], ",", _CSV_NAMES, out.limits)
    read_delimited(files[0], ",", columns, out, header=True, encoding="utf-8")
    wanted = {"item": ("movieId",), "title": ("title",)}
    positions = header_columns(files[1], ",", wanted, out.limits)
    for numbers, row in csv_records(files[1], out.limits):
        number = numbers[0]
        if isinstance(row, csv.Error):
            raise DataError(f"{files[1].name}:{number}: {row}; mend the quotes of the file")
        if number == 1 or not row:
            continue
        if len(row) <= max(positions.values()):
            raise DataError(
                f"{files[1].name}:{number}: {len(row)} fields, too few for movieId and title; "
                "mend the file"
            )
        _take(out, row[positions["item"]], row[positions["title"]])


def _read_titles(path: Path, sep: str, out: Builder) -> None:
    """Movies by position: id first, title second (a title may hold "::" but not "|")."""
    for number, line in lines(path, out.limits):
        row = _decode(line).split(sep)
        if len(row) < 3:
            raise DataError(
                f"{path.name}:{number}: {len(row)} fields between {sep!r}, expected at least 3 "
                "(id, title, ...); mend the file"
            )
        _take(out, row[0], sep.join(row[1:-1]) if sep == "::" else row[1])


def _decode(line: bytes) -> str:
    try:  # GroupLens ships latin-1; some copies were converted
        return line.decode("utf-8")
    except UnicodeDecodeError:
        return line.decode("latin-1")


def _take(out: Builder, item: str, title: str) -> None:
    if item.strip() in out.known_items:
        out.titles[item.strip()] = movie_title(title)
