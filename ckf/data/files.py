"""Source files: found inside the data folder only, opened by content, read line by line.

Nothing here holds more than a few lines at a time, however a file was made: lines and unpacked
sizes have limits, since a packed file of some megabytes can hold one line of many gigabytes.
"""

from __future__ import annotations

import csv
import gzip
import io
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import BinaryIO

import numpy as np

from ckf.data.errors import DataError

_GZIP = b"\x1f\x8b"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")  # byte order marks
_LONGEST = 255  # characters of a file name


@dataclass(frozen=True)
class Limits:
    """What a source file may ask of a reader, in bytes; see data.max_line_bytes."""

    line: int = 1 << 22
    unpacked: int = 1 << 36


def inside(root: Path, name: str) -> Path:
    """`root / name`, provided that it cannot lie outside `root` (no .., no absolute, no link out).

    `name` comes from a settings file that may not be the reader's own. A glob is not resolved
    here. DataError names the path and the fix.
    """
    pure = PurePosixPath(name)
    if not pure.parts or "\0" in name or not is_text(name) or len(name) > _LONGEST:
        raise DataError(f"{name!r} is no file name; give one of the files in {root}")
    if (
        pure.is_absolute()
        or PureWindowsPath(name).is_absolute()
        or ".." in pure.parts
        or ".." in PureWindowsPath(name).parts
    ):
        raise DataError(
            f"file name {name!r} leaves the data folder; give a name relative to {root}, without "
            "'..', and copy the file there"
        )
    path = root / pure
    if not path.resolve().is_relative_to(root.resolve()):
        raise DataError(
            f"file {name!r} in {root} is a link that leaves the data folder; copy the file there"
        )
    return path


def is_text(text: str) -> bool:
    """Whether it can be stored: no lone surrogates, which stand for bytes that fit no encoding."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def find_file(root: Path, what: str, patterns: list[str], avoid: tuple[str, ...] = ()) -> Path:
    """The one file in `root` that matches the first matching pattern.

    Names that start with one of `avoid` are passed over. DataError when none or several match.
    """
    for pattern in patterns:
        inside(root, pattern)
        found = sorted(
            path
            for path in root.glob(pattern)
            if path.is_file() and not path.name.lower().startswith((".", *avoid))
        )
        if len(found) > 1:
            raise DataError(
                f"{len(found)} files in {root} match {pattern!r} ({what}): "
                f"{', '.join(path.name for path in found[:6])}; name one of them in the settings"
            )
        if found:
            return inside(root, str(found[0].relative_to(root)))
    there = sorted(path.name for path in root.iterdir())[:20] if root.is_dir() else []
    raise DataError(
        f"{what} not found: no file in {root} matches {' or '.join(map(repr, patterns))}; "
        f"the folder holds: {', '.join(there) or 'nothing'}"
    )


def open_bytes(path: Path, limits: Limits) -> BinaryIO:
    """Open a file of text for reading bytes, unpacked if its first bytes say that it is gzip."""
    try:
        file = open(path, "rb")
        head = file.read(2)
        file.seek(0)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; check the path") from error
    if not head:
        file.close()
        raise DataError(f"{path} is empty; download or copy it again")
    if head == _GZIP:
        file = io.BufferedReader(_Unpacked(path, file, limits.unpacked), 1 << 20)
    try:
        if file.peek(2)[:2] in _UTF16:
            raise DataError(
                f"{path} is UTF-16 by its first bytes; expected UTF-8: convert it, for example "
                "with iconv -f UTF-16 -t UTF-8"
            )
    except BaseException:
        file.close()
        raise
    return file


class _Unpacked(io.RawIOBase):
    """The unpacked bytes of a gzip file; DataError once there are more than ``most``."""

    def __init__(self, path: Path, packed: BinaryIO, most: int):
        self._path, self._packed, self._most = path, packed, most
        self._gzip = gzip.GzipFile(fileobj=packed, mode="rb")
        self._count = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        size = self._gzip.readinto(buffer)
        self._count += size
        if self._count > self._most:
            raise DataError(
                f"{self._path} unpacks to more than {self._most:,} bytes; if that is right, raise "
                "data.max_unpacked_bytes"
            )
        return size

    def close(self) -> None:
        self._gzip.close()
        self._packed.close()
        super().close()


def too_long(path: Path, number: int, limits: Limits) -> DataError:
    """The error for a line, or a record over several lines, that no reader will hold."""
    return DataError(
        f"{path.name}:{number}: more than {limits.line:,} bytes in one line or record; if that is "
        "right, raise data.max_line_bytes"
    )


def blocks(path: Path, limits: Limits, size: int = 1 << 24) -> Iterator[bytes]:
    """The unpacked bytes in blocks that end at line ends (the last one may not)."""
    rest, number = b"", 1
    with guarded(path), open_bytes(path, limits) as file:
        while block := file.read(size):
            block = rest + block
            number += _check_lines(path, block, number, limits)
            end = block.rfind(b"\n") + 1
            rest = block[end:]
            if end:
                yield block[:end]
    if rest:
        yield rest


def _check_lines(path: Path, block: bytes, first: int, limits: Limits) -> int:
    """The number of line ends in a block whose first line is ``first``; DataError if too long."""
    ends = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n"))
    sizes = np.diff(np.concatenate([[-1], ends, [len(block)]])) - 1
    if sizes.max() > limits.line:
        raise too_long(path, first + int(np.argmax(sizes > limits.line)), limits)
    return len(ends)


def lines(path: Path, limits: Limits) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, line without its end) of every line that is not blank."""
    number = 0
    with guarded(path), open_bytes(path, limits) as file:
        while line := file.readline(limits.line + 1):
            number += 1
            if len(line) > limits.line and not line.endswith(b"\n"):
                raise too_long(path, number, limits)
            if number == 1 and line.startswith(b"\xef\xbb\xbf"):  # byte order mark
                line = line[3:]
            line = line.rstrip(b"\r\n")
            if line.strip():
                yield number, line


def csv_records(
    path: Path, limits: Limits, sep: str = ",", errors: str = "replace"
) -> Iterator[tuple[range, list[str] | csv.Error]]:
    """(its lines, fields) of every CSV record; ``errors`` as ``bytes.decode``.

    A record whose quotes do not fit comes as the error, with all lines that it swallowed: a quote
    that is never closed must not make the rest of a file one field.
    """
    held = 0  # characters of the record under way: a quote left open makes it the whole file

    def feed(text: io.TextIOWrapper) -> Iterator[str]:
        nonlocal held
        while line := text.readline(limits.line + 2):
            held += len(line)
            if held > limits.line + 2 or len(line.rstrip("\r\n")) > limits.line:
                raise too_long(path, reader.line_num + 1, limits)
            yield line

    with guarded(path), open_bytes(path, limits) as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig", errors=errors, newline="")
        reader = csv.reader(feed(text), delimiter=sep, strict=True)
        row, before = [], 0
        while row is not None:
            try:
                row = _next_record(reader, limits)
            except csv.Error as error:  # the reader goes on at the next line
                row = error
            if row is not None:
                numbers, before, held = range(before + 1, reader.line_num + 1), reader.line_num, 0
                yield numbers, row


def _next_record(reader: Iterator[list[str]], limits: Limits) -> list[str] | None:
    """The next record, None at the end. csv's own limit of a field (131,072) holds for the process:
    it is raised for the time of a record only."""
    with _FIELD_LIMIT:
        before = csv.field_size_limit(min(limits.line + 2, 2**31 - 1))  # a C long
        try:
            return next(reader, None)
        finally:
            csv.field_size_limit(before)


_FIELD_LIMIT = threading.Lock()  # two threads must not restore each other's


class guarded:
    """Turns the errors of a file that is cut off, damaged or unreadable into one DataError."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> guarded:
        return self

    def __exit__(self, kind, error, trace) -> None:
        if isinstance(error, (EOFError, gzip.BadGzipFile, zlib.error)):
            raise DataError(
                f"{self.path} is cut off or damaged ({error}); download or copy it again"
            ) from error
        if isinstance(error, OSError):
            raise DataError(
                f"{self.path} cannot be read ({error.strerror or error}); look at its permissions "
                "and its disk"
            ) from error
