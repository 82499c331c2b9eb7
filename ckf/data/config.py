"""Settings of the data: where it lies, how it is read, cleaned and split."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from ckf.data.errors import DataError
from ckf.data.files import Limits

FORMATS = (
    "movielens-100k",
    "movielens-1m",
    "movielens-csv",
    "recbole",
    "amazon",
    "collm",
    "table",
)
SPLITS = ("train", "valid", "test")
SPLIT_KINDS = ("per_user_time", "global_time", "leave_last_out", "given")
TASKS = ("ctr", "topk", "rating", "explain", "review_rating")
# name -> (number of negatives, how they are drawn)
LISTS = {
    "uniform9": (9, "uniform"),
    "uniform19": (19, "uniform"),
    "uniform99": (99, "uniform"),
    "popular99": (99, "popular"),
}
COLUMNS = ("user", "item", "rating", "label", "time", "text", "title", "split", "not_cold")
TIME_UNITS = {"s": 1, "ms": 1000}


def _choice(what: str, value: Any, known) -> None:
    if value not in known:
        raise DataError(f"{what} is {value!r}; it must be one of: {', '.join(known)}")


def _check_number(what: str, value: Any, low: float, high: float, kind: type) -> None:
    allowed = (int,) if kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, allowed) or not low <= value <= high:
        noun = "a whole number" if kind is int else "a number"
        raise DataError(f"{what} is {value!r}; it must be {noun} from {low} to {high}")


@dataclass
class SplitConfig:
    """How rows become train, valid and test.

    `per_user_time`: of each user's rows in time order the last `test` share is test and the
    `valid` share before it is valid, at least one row each; users with fewer than `min_rows`
    rows are train altogether. `leave_last_out`: each user's last row is test, the one before it
    valid; users with fewer than three rows are train. In both a user's rows of one second stay
    together in the later split, and a user without an earlier row left to train on is train
    altogether. `global_time`: the same shares over all rows, cut at two points in time (rows with
    the time of a cut fall before it). `given`: the source says it; histories of train rows hold no
    rows of valid or test, of valid rows none of test, in whatever order of time these are.
    """

    kind: str = "per_user_time"
    valid: float = 0.1
    test: float = 0.1
    min_rows: int = 5

    def __post_init__(self) -> None:
        _choice("data.split.kind", self.kind, SPLIT_KINDS)
        _check_number("data.split.min_rows", self.min_rows, 3, 1_000_000, int)
        for name in ("valid", "test"):
            _check_number(f"data.split.{name}", getattr(self, name), 0.0, 1.0, float)
            if getattr(self, name) in (0, 1):
                raise DataError(
                    f"data.split.{name} is {getattr(self, name)!r}; it must lie between 0 and 1: "
                    "models are chosen on valid and reported on test, so neither may be empty"
                )
        if self.valid + self.test >= 1:
            raise DataError(
                f"data.split.valid + data.split.test is {self.valid + self.test:g}; "
                "it must be below 1 so that rows are left for training"
            )


@dataclass
class TaskRows:
    """How many rows of a task are used per split; None means all eligible rows, 0 means none."""

    train: int | None = None
    valid: int | None = None
    test: int | None = None

    def __post_init__(self) -> None:
        for name in SPLITS:
            if getattr(self, name) is not None:
                _check_number(f"rows of a task in {name}", getattr(self, name), 0, 2**40, int)


@dataclass
class DataConfig:
    """One data set: its format, its files and how it is cleaned.

    `path`: the raw folder or file, where `--data` does not say it. `source`: a known download,
    "ml-100k". `like_threshold`: ratings from it on are likes. `min_user`, `min_item`: rows that a
    user and an item need at least (k-core). `max_bad_share`: of broken lines, above which a file is
    refused. `history`: last liked items kept for a row. `time_unit`: "s" or "ms". `train_list`,
    `test_lists`: candidates of top-K rows, negatives drawn evenly or by popularity: "uniform9",
    "uniform19", "uniform99", "popular99".

    `reviews` and `metadata` are file names (globs allowed) inside the data folder; without them
    the usual names of the format are looked for. `columns` maps ckf's names (see `COLUMNS`) to the
    file's own, for format "table". `max_text_chars` cuts review texts (characters); sentences to
    explain with have `explain_min_words` to `explain_max_words` words. A file with a line (or CSV
    record, or Parquet value) above `max_line_bytes`, or a packed one that unpacks to more than
    `max_unpacked_bytes`, is refused. Unknown or impossible settings raise DataError.
    """

    name: str
    format: str
    path: str | None = None
    source: str | None = None
    reviews: str | None = None
    metadata: str | None = None
    columns: dict[str, str] | None = None
    time_unit: str = "s"
    like_threshold: float = 4.0
    min_user: int = 0
    min_item: int = 0
    max_bad_share: float = 0.01
    history: int = 10
    max_text_chars: int = 2000
    explain_min_words: int = 4
    explain_max_words: int = 40
    split: SplitConfig = field(default_factory=SplitConfig)
    train_list: str = "uniform9"
    test_lists: list[str] = field(default_factory=lambda: ["uniform9"])
    max_line_bytes: int = Limits.line
    max_unpacked_bytes: int = Limits.unpacked

    @property
    def limits(self) -> Limits:
        """What a source file may ask of a reader."""
        return Limits(self.max_line_bytes, self.max_unpacked_bytes)

    def __post_init__(self) -> None:
        _choice("data.format", self.format, FORMATS)
        _choice("data.time_unit", self.time_unit, TIME_UNITS)
        if isinstance(self.split, dict):
            self.split = from_dict(SplitConfig, self.split, "data.split")
        if not isinstance(self.split, SplitConfig):
            raise DataError(
                f"data.split is {self.split!r}; write its fields, for example {{kind: given}}"
            )
        _check_number("data.like_threshold", self.like_threshold, -1e9, 1e9, float)
        _check_number("data.max_bad_share", self.max_bad_share, 0.0, 1.0, float)
        for name, low, high in (
            ("min_user", 0, 10**9),
            ("min_item", 0, 10**9),
            ("history", 1, 1000),
            ("max_text_chars", 1, 10**6),
            ("explain_min_words", 1, 1000),
            ("explain_max_words", self.explain_min_words, 1000),
            ("max_line_bytes", 1, 2**31),
            ("max_unpacked_bytes", 1, 2**50),
        ):
            _check_number(f"data.{name}", getattr(self, name), low, high, int)
        _choice("data.train_list", self.train_list, LISTS)
        if isinstance(self.test_lists, str) or not self.test_lists:
            raise DataError(
                f"data.test_lists is {self.test_lists!r}; it must be a list such as [uniform9]"
            )
        self.test_lists = list(self.test_lists)
        for name in self.test_lists:
            _choice("an entry of data.test_lists", name, LISTS)
        self._check_columns()

    def _check_columns(self) -> None:
        if self.format != "table":
            if self.columns:
                raise DataError(
                    f"data.columns is set but data.format is {self.format!r}; columns are named "
                    "for format 'table' only: remove them or set data.format: table"
                )
            return
        if self.metadata is not None:
            raise DataError(
                f"data.metadata is {self.metadata!r}, but format 'table' reads one file: join the "
                "titles to its rows by the item's id, name their column as title in data.columns, "
                "and leave data.metadata out"
            )
        columns = dict(self.columns or {})
        for name in columns:
            _choice("a name in data.columns", name, COLUMNS)
        missing = [name for name in ("user", "item", "time") if name not in columns]
        if "rating" not in columns and "label" not in columns:
            missing.append("rating (or label)")
        if self.split.kind == "given" and "split" not in columns:
            missing.append("split (because data.split.kind is 'given')")
        if missing:
            raise DataError(
                f"data.columns lacks {', '.join(missing)}; name the file's columns, for example "
                "{user: customer, item: sku, rating: stars, time: when}"
            )


def from_dict(kind: type, values: dict[str, Any], where: str) -> Any:
    """Make a settings dataclass from a mapping; an unknown key raises DataError with the known."""
    if not isinstance(values, dict):
        raise DataError(f"{where} is {values!r}; it must be a mapping of settings")
    known = [f.name for f in dataclasses.fields(kind)]
    unknown = [key for key in values if key not in known]
    if unknown:
        raise DataError(f"{where} has unknown keys {unknown}; known are: {', '.join(known)}")
    required = [
        f.name
        for f in dataclasses.fields(kind)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    lacking = [name for name in required if name not in values]
    if lacking:
        raise DataError(f"{where} lacks {', '.join(lacking)}; add it")
    return kind(**values)
