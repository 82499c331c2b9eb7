"""RecBole's atomic files: NAME.inter with interactions, NAME.item with titles (optional)."""

from __future__ import annotations

import re
from pathlib import Path

from ckf.data.config import DataConfig
from ckf.data.delimited import header_columns, read_delimited
from ckf.data.errors import DataError
from ckf.data.files import find_file, lines
from ckf.data.interactions import Builder
from ckf.data.titles import movie_title

_INTER = {
    "user": ("user_id",),
    "item": ("item_id",),
    "rating": ("rating",),
    "time": ("timestamp",),
}
_TITLES = ("movie_title", "title", "item_name", "name")
_YEAR = re.compile(r"\d{4}(?:\.0)?$")


def files(config: DataConfig, root: Path) -> list[Path]:
    """NAME.inter and, where there is one, NAME.item."""
    inter = find_file(root, "RecBole's interactions", [config.reviews or "*.inter*"])
    if config.metadata:
        return [inter, find_file(root, "RecBole's items", [config.metadata])]
    try:
        return [inter, find_file(root, "RecBole's items", [f"{inter.name.split('.')[0]}.item*"])]
    except DataError:  # titles are optional
        return [inter]


def read(config: DataConfig, paths: list[Path], out: Builder) -> None:
    """Tab-separated with a typed header ("item_id:token"); title and year become one title."""
    columns = header_columns(paths[0], "\t", _INTER, out.limits)
    read_delimited(paths[0], "\t", columns, out, header=True, encoding="utf-8")
    if len(paths) < 2:
        return
    wanted = {"item": ("item_id",), "title": _TITLES}
    positions = header_columns(paths[1], "\t", wanted, out.limits)
    try:
        wanted = {"year": ("release_year",)}
        year = header_columns(paths[1], "\t", wanted, out.limits)["year"]
    except DataError:
        year = None
    for number, line in lines(paths[1], out.limits):
        if number == 1:
            continue
        row = line.decode("utf-8", "replace").split("\t")
        if len(row) <= max(positions.values()):
            raise DataError(
                f"{paths[1].name}:{number}: {len(row)} fields, too few for the id and the title; "
                "mend the file"
            )
        item = row[positions["item"]].strip()
        if item in out.known_items:
            when = row[year].strip() if year is not None and year < len(row) else ""
            out.titles[item] = _title(row[positions["title"]], when)


def _title(title: str, year: str) -> str:
    """ "Toy Story" and "1995" -> "Toy Story (1995)"."""
    title = movie_title(title)
    if not title or not _YEAR.match(year) or title.endswith(f"({year[:4]})"):
        return title
    return f"{title} ({year[:4]})"
