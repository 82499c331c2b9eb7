"""Which reader reads which format: a pair of functions, one that finds files, one that reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ckf.data import amazon, collm, movielens, recbole, table
from ckf.data.config import DataConfig
from ckf.data.interactions import Builder, Interactions


@dataclass(frozen=True)
class Reader:
    """`files(config, root)` -> source files; `read(config, files, builder)` fills the builder."""

    files: Callable[[DataConfig, Path], list[Path]]
    read: Callable[[DataConfig, list[Path], Builder], None]


READERS = {
    "movielens-100k": Reader(movielens.files_100k, movielens.read_100k),
    "movielens-1m": Reader(movielens.files_1m, movielens.read_1m),
    "movielens-csv": Reader(movielens.files_csv, movielens.read_csv),
    "recbole": Reader(recbole.files, recbole.read),
    "amazon": Reader(amazon.files, amazon.read),
    "collm": Reader(collm.files, collm.read),
    "table": Reader(table.files, table.read),
}


def read_source(config: DataConfig, files: list[Path], spool: BinaryIO) -> Interactions:
    """Read the files of a data set; review texts go to `spool`, a file open for writing.

    Line by line, in constant memory apart from about 40 bytes a row and the ids. DataError for
    whatever the user can mend: missing files and columns, too many broken lines, no rows.
    """
    builder = Builder(spool, config.max_bad_share, config.max_text_chars, config.limits)
    READERS[config.format].read(config, files, builder)
    return builder.finish(files[0])
