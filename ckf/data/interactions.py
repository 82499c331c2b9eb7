"""What every reader fills: interactions as arrays, raw ids, titles, texts, and the broken lines."""

from __future__ import annotations

import html
import re
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ckf.data.errors import DataError
from ckf.data.files import Limits

CHUNK = 1 << 16  # rows turned into arrays at a time
SHOWN = 5  # broken lines that a message names
_LIMIT = 2**62
_TAG = re.compile(r"<br\s*/?>|</?(?:p|b|i|em|strong|span|div)\b[^<>]{0,200}>", re.IGNORECASE)


class Broken(Exception):
    """A line, or a record of several, that cannot be used, with the reason."""

    def __init__(self, reason: str, lines: int = 1):
        super().__init__(reason)
        self.lines = lines


@dataclass
class Interactions:
    """Rows in input order; text i is the spool's bytes text_start[i] : + text_bytes[i]."""

    user: np.ndarray  # (N,) int32
    item: np.ndarray  # (N,) int32
    rating: np.ndarray  # (N,) float32, NaN: none
    label: np.ndarray  # (N,) int8, -1: none
    time: np.ndarray  # (N,) int64
    split: np.ndarray  # (N,) int8, -1: not given
    not_cold: np.ndarray  # (N,) int8, -1: unknown
    text_start: np.ndarray  # (N,) int64
    text_bytes: np.ndarray  # (N,) int32
    user_ids: list[str]
    item_ids: list[str]
    titles: dict[str, str]  # by raw item id
    counts: dict = field(default_factory=dict)

    def take(self, rows: np.ndarray) -> Interactions:
        """The same with only these rows (an index array), ids and titles untouched."""
        arrays = {name: getattr(self, name)[rows] for name in ROW_ARRAYS}
        return Interactions(
            **arrays,
            user_ids=self.user_ids,
            item_ids=self.item_ids,
            titles=self.titles,
            counts=self.counts,
        )

    def __len__(self) -> int:
        return len(self.user)


_TYPES = {
    "user": np.int32,
    "item": np.int32,
    "rating": np.float32,
    "label": np.int8,
    "time": np.int64,
    "split": np.int8,
    "not_cold": np.int8,
    "text_bytes": np.int32,
}
ROW_ARRAYS = (*_TYPES, "text_start")


class BrokenLines:
    """Counts broken lines, remembers the first few, refuses when their share is too high."""

    def __init__(self, max_share: float):
        self.max_share = max_share
        self.lines = 0
        self.broken = 0
        self.first: list[str] = []

    def add(self, file: Path, number: int, reason: str, lines: int = 1) -> None:
        """Note a broken line, or several from this one on."""
        self.broken += lines
        if len(self.first) < SHOWN:
            self.first.append(f"{file.name}:{number}: {reason}")

    def check(self) -> None:
        """DataError if more than `max_share` of the lines read are broken."""
        if self.broken > self.max_share * self.lines:
            more = f"; and {self.broken - SHOWN} more" if self.broken > SHOWN else ""
            raise DataError(
                f"{self.broken} of {self.lines} lines are broken, more than data.max_bad_share "
                f"({self.max_share:g}) allows: {'; '.join(self.first)}{more}. Mend the file or "
                "raise data.max_bad_share"
            )


class Builder:
    """Collects rows from a reader; turns raw ids into indices by first appearance."""

    def __init__(self, spool: BinaryIO, max_bad_share: float, max_text_chars: int, limits: Limits):
        self.limits = limits
        self.bad = BrokenLines(max_bad_share)
        self.titles: dict[str, str] = {}
        self._spool = spool
        self._max_chars = max_text_chars
        self._users: dict[str, int] = {}
        self._items: dict[str, int] = {}
        self._open: list[tuple] = []
        self._done: dict[str, list[np.ndarray]] = {name: [] for name in _TYPES}

    @property
    def known_items(self) -> dict[str, int]:
        """Raw item ids seen so far, with their indices."""
        return self._items

    def add(
        self,
        user: str,
        item: str,
        rating: float,
        time: int,
        text: str = "",
        label: int = -1,
        split: int = -1,
        not_cold: int = -1,
    ) -> None:
        """Take one row; `Broken` if its text or ids cannot be stored."""
        if not user or not item:
            raise Broken(f"the {'item' if user else 'user'} id is empty")
        try:
            data = clean_text(text, self._max_chars).encode() if text else b""
            user.encode()
            item.encode()
        except UnicodeEncodeError as error:  # lone surrogates
            raise Broken("not valid UTF-8") from error
        users, items = self._users, self._items
        row = (
            users.setdefault(user, len(users)),
            items.setdefault(item, len(items)),
            rating,
            label,
            time,
            split,
            not_cold,
            len(data),
        )
        if data:
            self._spool.write(data)
        self._open.append(row)
        if len(self._open) >= CHUNK:
            self._flush()

    def add_arrays(
        self, users: list[str], user: np.ndarray, items: list[str], item: np.ndarray, **columns
    ) -> None:
        """Take many rows without text: `users[user[i]]` is the raw user id of row i."""
        self._flush()
        columns["user"] = _codes(self._users, users)[user]
        columns["item"] = _codes(self._items, items)[item]
        n = len(user)
        for name, kind in _TYPES.items():
            fill = 0 if name == "text_bytes" else -1
            value = columns[name] if name in columns else np.full(n, fill)
            self._done[name].append(np.asarray(value).astype(kind))

    def _flush(self) -> None:
        if not self._open:
            return
        for (name, kind), values in zip(_TYPES.items(), zip(*self._open, strict=True), strict=True):
            self._done[name].append(np.array(values, dtype=kind))
        self._open = []

    def finish(self, source: Path) -> Interactions:
        """All rows; DataError if too many lines were broken or no row is left."""
        self._flush()
        self.bad.check()
        arrays = {
            name: np.concatenate(parts) if parts else np.zeros(0, _TYPES[name])
            for name, parts in self._done.items()
        }
        self._done.clear()
        if not len(arrays["user"]):
            raise DataError(f"{source} holds no interaction; check that it is the right file")
        sizes = arrays["text_bytes"].astype(np.int64)
        return Interactions(
            **arrays,
            text_start=np.cumsum(sizes) - sizes,
            user_ids=list(self._users),
            item_ids=list(self._items),
            titles=self.titles,
            counts={
                "lines": self.bad.lines,
                "broken_lines": self.bad.broken,
                "first_broken_lines": self.bad.first,
            },
        )


def _codes(index: dict[str, int], names: list[str]) -> np.ndarray:
    return np.array([index.setdefault(name, len(index)) for name in names], dtype=np.int32)


def clean_text(text: str, max_chars: int) -> str:
    """HTML entities and simple tags undone, white space collapsed, cut at a word's end."""
    if "&" in text:
        text = html.unescape(text)
    if "<" in text:
        text = _TAG.sub(" ", text)
    text = " ".join(text.split())
    if len(text) > max_chars:
        cut = text[: max_chars + 1]
        text = (cut[: cut.rfind(" ")] if " " in cut else cut[:max_chars]).rstrip()
    return text


def parse_rating(value) -> float:
    """A finite number; `Broken` otherwise."""
    try:
        if isinstance(value, bool):
            raise ValueError
        rating = float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise Broken(f"rating {show(value)} is not a number") from error
    if not abs(rating) <= 3e38:  # also NaN; float32 holds no more
        raise Broken(f"rating {show(value)} is not finite")
    return rating


def parse_time(value, per_second: int = 1) -> int:
    """Seconds since 1970 from a number (in 1/`per_second` s) or an ISO date (UTC if unsaid)."""
    try:
        if isinstance(value, bool):
            raise ValueError
        seconds = int(value) // per_second
    except OverflowError as error:
        raise Broken(f"time {show(value)} is not finite") from error
    except (TypeError, ValueError):
        seconds = _parse_other_time(value, per_second)
    if not -_LIMIT < seconds < _LIMIT:
        raise Broken(f"time {show(value)} is out of range")
    return seconds


def _parse_other_time(value, per_second: int) -> int:
    if not isinstance(value, (str, date)):
        raise Broken(f"time {show(value)} is not a number")
    try:
        return int(float(value) // per_second)
    except OverflowError as error:
        raise Broken(f"time {show(value)} is not finite") from error
    except (TypeError, ValueError):
        pass
    try:
        text = value.strip() if isinstance(value, str) else value.isoformat()
        moment = datetime.fromisoformat(text)
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=UTC)
        return int(moment.timestamp() // 1)
    except (ValueError, OverflowError) as error:
        raise Broken(f"time {show(value)} is neither a number nor a date") from error


def show(value) -> str:
    """A value for a message, cut where it is long."""
    shown = repr(value)
    return shown if len(shown) <= 40 else shown[:37] + "..."
