"""CoLLM's own split of MovieLens-1M: {train,valid,test}_ood2.jsonl.gz and items.tsv.

Labels are given (no ratings); the files are the split. Its `his` column is not used: it begins
with a padding 0 and counts ties as earlier; histories are made from the rows as everywhere.
"""

from __future__ import annotations

import json
from pathlib import Path

from ckf.data.config import SPLITS, DataConfig
from ckf.data.delimited import header_columns
from ckf.data.errors import DataError
from ckf.data.files import find_file, lines
from ckf.data.interactions import Broken, Builder, parse_time, show
from ckf.data.titles import movie_title


def files(config: DataConfig, root: Path) -> list[Path]:
    """The three splits and items.tsv."""
    if config.split.kind != "given":
        raise DataError(
            f"data.split.kind is {config.split.kind!r}; format 'collm' brings its own split: set "
            "data.split.kind: given"
        )
    found = [
        find_file(root, f"CoLLM's {name} rows", [f"{name}_ood2.jsonl*", f"{name}*.jsonl*"])
        for name in SPLITS
    ]
    return [*found, find_file(root, "CoLLM's titles", [config.metadata or "items.tsv*"])]


def read(config: DataConfig, paths: list[Path], out: Builder) -> None:
    """Rows of the three files in turn, then the titles."""
    for split, path in enumerate(paths[:3]):
        for number, line in lines(path, out.limits):
            out.bad.lines += 1
            try:
                _add_row(line, split, out)
            except Broken as error:
                out.bad.add(path, number, str(error))
    titles = paths[3]
    wanted = {"item": ("iid",), "title": ("title",)}
    positions = header_columns(titles, "\t", wanted, out.limits)
    for number, line in lines(titles, out.limits):
        row = line.decode("utf-8", "replace").split("\t")
        if number == 1 or len(row) <= max(positions.values()):
            continue
        if row[positions["item"]] in out.known_items:
            out.titles[row[positions["item"]]] = movie_title(row[positions["title"]])


def _add_row(line: bytes, split: int, out: Builder) -> None:
    try:
        record = json.loads(line)
        user, item, label = record["uid"], record["iid"], record["label"]
        when, not_cold = record["timestamp"], record.get("not_cold", -1)
    except (ValueError, RecursionError) as error:  # also bytes that are no UTF-8
        raise Broken(f"not JSON: {error}") from error
    except KeyError as error:
        raise Broken(f"no key {error}") from error
    except (TypeError, AttributeError) as error:
        raise Broken("not a JSON object") from error
    if label not in (0, 1):
        raise Broken(f"label {show(label)} is neither 0 nor 1")
    if not_cold not in (-1, 0, 1):
        raise Broken(f"not_cold {show(not_cold)} is neither 0 nor 1")
    out.add(
        _id(user),
        _id(item),
        float("nan"),
        parse_time(when),
        label=int(label),
        split=split,
        not_cold=int(not_cold),
    )


def _id(value) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise Broken(f"id {show(value)} is neither a number nor a string")
    return str(value)
