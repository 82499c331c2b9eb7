"""Source files: found inside the data folder only, opened by content, read line by line."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import BinaryIO

from ckf.data.errors import DataError

_GZIP = b"\x1f\x8b"


def inside(root: Path, name: str) -> Path:
    """`root / name`, provided that it cannot lie outside `root` (no .., no absolute, no link out).

    `name` comes from a settings file that may not be the reader's own. A glob is not resolved
    here. DataError names the path and the fix.
    """
    pure = PurePosixPath(name)
    if (
        not name
        or pure.is_absolute()
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


def open_bytes(path: Path) -> BinaryIO:
    """Open a file for reading bytes, unpacked if its first bytes say that it is gzip."""
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
        return io.BufferedReader(gzip.GzipFile(fileobj=file, mode="rb"), 1 << 20)
    return file


def blocks(path: Path, size: int = 1 << 24) -> Iterator[bytes]:
    """The unpacked bytes in blocks that end at line ends (the last one may not)."""
    rest = b""
    with guarded(path), open_bytes(path) as file:
        while block := file.read(size):
            block = rest + block
            end = block.rfind(b"\n") + 1
            rest = block[end:]
            if end:
                yield block[:end]
    if rest:
        yield rest


def lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, line without its end) of every line that is not blank."""
    with guarded(path), open_bytes(path) as file:
        for number, line in enumerate(file, 1):
            if number == 1 and line.startswith(b"\xef\xbb\xbf"):  # byte order mark
                line = line[3:]
            line = line.rstrip(b"\r\n")
            if line.strip():
                yield number, line


class guarded:
    """Turns the errors of a file that is cut off or damaged into one DataError."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> guarded:
        return self

    def __exit__(self, kind, error, trace) -> None:
        if isinstance(error, (EOFError, gzip.BadGzipFile, zlib.error)):
            raise DataError(
                f"{self.path} is cut off or damaged ({error}); download or copy it again"
            ) from error
