"""Plain delimited files without quoting (u.data, ratings.dat, ratings.csv, .inter), many rows at
a time with polars; used by the MovieLens and RecBole readers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl

from ckf.data.errors import DataError
from ckf.data.files import Limits, blocks, is_text, lines
from ckf.data.interactions import Broken, Builder, parse_rating, parse_time, show

FIELDS = ("user", "item", "rating", "time")


def header_columns(
    path: Path, sep: str, wanted: dict[str, tuple[str, ...]], limits: Limits
) -> dict[str, int]:
    """Positions of the wanted columns in the file's first line.

    `wanted` maps ckf's names to the names a header may use (compared without case and without
    RecBole's ":type"). DataError lists the columns there are.
    """
    first = next(lines(path, limits), None)
    if first is None:
        raise DataError(f"{path} is empty; download or copy it again")
    names = first[1].decode("utf-8", "replace").split(sep)
    plain = [name.split(":")[0].strip().strip('"').lower() for name in names]
    found = {}
    for name, known in wanted.items():
        for candidate in known:
            if candidate.lower() in plain:
                found[name] = plain.index(candidate.lower())
                break
        else:
            raise DataError(
                f"{path.name} has no column {' or '.join(map(repr, known))} (the {name}); its "
                f"columns are: {', '.join(names)}"
            )
    return found


def read_delimited(
    path: Path, sep: str, columns: dict[str, int | None], out: Builder, header: bool, encoding: str
) -> None:
    """Add every row of the file to `out`; `columns` has a position for each of `FIELDS`.

    A rating position of None means that the file has none. Lines that do not fit (too few fields,
    no finite rating, no time, not `encoding`) are noted as broken with their number.
    """
    number = 1  # of the block's first line
    for block in blocks(path, out.limits):
        rows = _decode(block, encoding)
        if number == 1:
            rows[0] = rows[0].removeprefix("\ufeff")
        if rows[-1] == "":  # behind the last line end
            rows.pop()
        skip = 1 if header and number == 1 else 0
        _add_block(path, rows[skip:], number + skip, sep, columns, out)
        number += len(rows)


def _decode(block: bytes, encoding: str) -> list[str]:
    # surrogateescape keeps bytes that do not fit; such lines are noted as broken one by one
    return block.decode(encoding, "surrogateescape").split("\n")


def _add_block(
    path: Path, rows: list[str], first: int, sep: str, columns: dict[str, int | None], out: Builder
) -> None:
    try:
        text = pl.Series(rows, dtype=pl.String)
    except UnicodeEncodeError:  # bytes that do not fit the encoding: find the lines
        good = [index for index, row in enumerate(rows) if is_text(row)]
        for index in sorted(set(range(len(rows))) - set(good)):
            out.bad.add(path, first + index, "not in the file's encoding (UTF-8)")
            out.bad.lines += 1
        rows = [rows[index] for index in good]
        text = pl.Series(rows, dtype=pl.String)
        numbers = np.array(good, dtype=np.int64) + first
    else:
        numbers = np.arange(first, first + len(rows))
    frame = _parse(text, sep, columns)
    blank = (text.str.strip_chars().str.len_bytes() == 0).to_numpy()
    fine = frame["fine"].to_numpy()
    for index in np.flatnonzero(~fine & ~blank):
        out.bad.add(path, int(numbers[index]), _reason(rows[index], sep, columns))
    out.bad.lines += int((~blank).sum())
    frame = frame.filter(pl.Series(fine & ~blank))
    if frame.is_empty():
        return
    codes, names = {}, {}
    for field in ("user", "item"):
        unique = frame[field].unique(maintain_order=True)
        names[field] = unique.to_list()
        index = pl.Series(np.arange(len(unique), dtype=np.int32))
        codes[field] = frame[field].replace_strict(unique, index).to_numpy()
    out.add_arrays(
        names["user"],
        codes["user"],
        names["item"],
        codes["item"],
        rating=frame["rating"].to_numpy(),
        time=frame["time"].to_numpy(),
    )


def _parse(text: pl.Series, sep: str, columns: dict[str, int | None]) -> pl.DataFrame:
    """user, item (strings), rating, time and `fine`: whether all of them are usable."""
    parts = text.str.strip_chars_end("\r").str.split(sep)

    def column(name: str) -> pl.Expr:
        position = columns[name]
        if position is None:
            return pl.lit(float("nan")).cast(pl.String)
        return pl.col("parts").list.get(position, null_on_oob=True).str.strip_chars()

    frame = pl.DataFrame({"parts": parts}).select(
        column("user").alias("user"),
        column("item").alias("item"),
        column("rating").cast(pl.Float64, strict=False).alias("rating"),
        # times are often written as floats; Float64 is exact for seconds
        column("time").cast(pl.Float64, strict=False).alias("time"),
    )
    no_rating = columns["rating"] is None
    fine = (
        (pl.col("user").str.len_bytes() > 0)
        & (pl.col("item").str.len_bytes() > 0)
        & (pl.lit(no_rating) | (pl.col("rating").abs() <= 3e38))
        & (pl.col("time").abs() < 2.0**53)
    )
    frame = frame.with_columns(fine.fill_null(value=False).alias("fine"))
    return frame.with_columns(
        pl.when("fine").then(pl.col("time").floor()).otherwise(0).cast(pl.Int64).alias("time")
    )


def _reason(row: str, sep: str, columns: dict[str, int | None]) -> str:
    """Why a line does not fit (for the few lines that do not)."""
    parts = row.rstrip("\r").split(sep)
    needed = max(position for position in columns.values() if position is not None) + 1
    if len(parts) < needed:
        return f"{len(parts)} fields instead of {needed} between {sep!r}"
    try:
        for name in ("user", "item"):
            if not parts[columns[name]].strip():
                return f"the {name} id is empty"
        if columns["rating"] is not None:
            parse_rating(parts[columns["rating"]])
        parse_time(parts[columns["time"]])
    except Broken as error:
        return str(error)
    return f"time {show(parts[columns['time']])} is not a number of seconds"
