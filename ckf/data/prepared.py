"""The prepared folder: interactions, texts, task rows and candidate lists, with checksums.

Reading needs numpy, safetensors and json only, so that a training machine needs no data tools.

    manifest.json             settings, source checksums, counts, sha256 of every other file
    interactions.safetensors  one entry per row, sorted by (user, time, input order); history (N, H)
    texts.safetensors         all review texts in one UTF-8 blob with N + 1 offsets; memory-mapped
    names.json                raw user ids, raw item ids, titles
    tasks.safetensors         "<task>.<split>" -> row ids
    candidates.safetensors    "<split>.<list>.{rows,items,positive}"
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from ckf.data.errors import DataError
from ckf.data.explain import explanation_of

# 2: rows of one user and second stay in one split. 3: train lists know train rows alone. 4: so do
# histories of train rows, whatever the order of a given split.
FORMAT_VERSION = 4
MANIFEST = "manifest.json"
INTERACTIONS = "interactions.safetensors"
TEXTS = "texts.safetensors"
NAMES = "names.json"
TASK_ROWS = "tasks.safetensors"
CANDIDATES = "candidates.safetensors"
_ROW_TYPES = {
    "user": np.int32,
    "item": np.int32,
    "rating": np.float32,
    "label": np.int8,
    "time": np.int64,
    "split": np.int8,
    "not_cold": np.int8,
    "history": np.int32,
}


@dataclass
class Candidates:
    """Lists to choose from: per positive row one positive item among drawn negatives."""

    rows: np.ndarray  # (P,) int64, row ids
    items: np.ndarray  # (P, C) int32
    positive: np.ndarray  # (P,) int64, the column of the positive


class Texts:
    """Review texts by row, read from the memory-mapped blob; picklable (it maps anew)."""

    def __init__(self, path: Path):
        self.path = Path(path)
        try:
            places = self._places()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise _damaged(self.path, f"no table of texts: {error}") from error
        (low, high), (first, last) = places
        self.offsets = np.fromfile(self.path, dtype="<i8", count=(high - low) // 8, offset=low)
        # mmap refuses length 0
        self.blob = (
            np.memmap(self.path, dtype=np.uint8, mode="r", offset=first, shape=(last - first,))
            if last > first
            else np.zeros(0, np.uint8)
        )
        ends = [0, *self.offsets[-1:]]
        if ends != [0, len(self.blob)] or self.offsets[0] or (np.diff(self.offsets) < 0).any():
            raise _damaged(self.path, "the offsets do not cover the texts")

    def _places(self) -> list[tuple[int, int]]:
        """First and last byte of offsets and blob; whatever is wrong raises."""
        end = self.path.stat().st_size
        with open(self.path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > end - 8:
                raise ValueError(f"a header of {size} bytes in a file of {end}")
            header = json.loads(file.read(size))
        places = []
        for name, kind in (("offsets", "I64"), ("blob", "U8")):
            low, high = (8 + size + int(place) for place in header[name]["data_offsets"])
            if header[name]["dtype"] != kind or not 8 + size <= low <= high <= end:
                raise ValueError(f"{name} is {header[name]}")
            places.append((low, high))
        if (places[0][1] - places[0][0]) % 8:
            raise ValueError("offsets of no whole number")
        return places

    def __getstate__(self) -> dict:
        return {"path": self.path}

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["path"])

    def __getitem__(self, row: int) -> str:
        data = self.blob[self.offsets[row] : self.offsets[row + 1]]
        return bytes(data).decode("utf-8", "replace")  # what ckf wrote needs no replacing


@dataclass
class PreparedData:
    """A prepared data set; row ids are indices into the (N,) arrays.

    Rows are sorted by (user, time, input order). `history` holds the last H liked items of the
    row's user strictly earlier in time than the row, of its own and earlier splits alone, oldest
    first, padded on the left with -1. Splits: 0 train, 1 valid, 2 test.
    """

    folder: Path
    manifest: dict
    n_users: int
    n_items: int
    user: np.ndarray  # (N,) int32
    item: np.ndarray  # (N,) int32
    rating: np.ndarray  # (N,) float32, NaN: none
    label: np.ndarray  # (N,) int8: 1 like, 0 not, -1 none
    time: np.ndarray  # (N,) int64 seconds
    split: np.ndarray  # (N,) int8
    not_cold: np.ndarray  # (N,) int8, -1 unknown
    history: np.ndarray  # (N, H) int32
    has_text: np.ndarray  # (N,) bool
    user_ids: list[str]
    item_ids: list[str]
    titles: list[str]  # "" if none
    _texts: Texts = field(repr=False)
    _rows: dict[str, np.ndarray] = field(repr=False)
    _candidates: dict[str, np.ndarray] = field(repr=False)

    def __len__(self) -> int:
        return len(self.user)

    def text(self, row: int) -> str:
        """The review text of a row, "" if it has none."""
        return self._texts[self._row(row)]

    def explanation(self, row: int) -> str:
        """The sentence of the row's own review that `explain` trains on, "" if there is none.

        See `ckf.data.explain.explanation_of` for the rule.
        """
        settings = self.manifest["settings"]["data"]
        return explanation_of(
            self.text(row), settings["explain_min_words"], settings["explain_max_words"]
        )

    def title(self, item: int) -> str:
        """The title of an item to write into prompts: "item <raw id>" where it has none."""
        return self.titles[item] or f"item {self.item_ids[item]}"

    def rows(self, task: str, split_name: str) -> np.ndarray:
        """Row ids (int64, ascending) selected for a task in a split; DataError if unprepared."""
        key = f"{task}.{split_name}"
        if key not in self._rows:
            raise DataError(
                f"no rows for task {task!r} in split {split_name!r}: {self.folder} was prepared "
                f"for {', '.join(sorted(self._rows))}; add the task to the settings and prepare "
                "into another folder"
            )
        return self._rows[key]

    def candidates(self, split_name: str, list_name: str) -> Candidates:
        """Candidate lists of the positive rows of task topk in a split; DataError if unprepared."""
        key = f"{split_name}.{list_name}"
        if f"{key}.rows" not in self._candidates:
            known = sorted({name.rsplit(".", 1)[0] for name in self._candidates})
            raise DataError(
                f"no candidate list {list_name!r} for split {split_name!r}: {self.folder} has "
                f"{', '.join(known) or 'none (task topk was not prepared)'}; set data.train_list "
                "or data.test_lists and prepare into another folder"
            )
        return Candidates(
            *(self._candidates[f"{key}.{part}"] for part in ("rows", "items", "positive"))
        )

    def _row(self, row: int) -> int:
        if not 0 <= row < len(self.user):  # a negative index would silently count from the end
            raise IndexError(f"row {row} is outside 0..{len(self.user) - 1}")
        return int(row)


def file_sha256(path: Path) -> str:
    """The sha256 of a file's bytes, as hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(folder: str | Path) -> dict:
    """The manifest of a prepared folder; DataError when it is no such folder."""
    path = Path(folder) / MANIFEST
    try:
        if not path.is_file():  # nor is a pipe or a device, which have no end
            raise FileNotFoundError(path)
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        why = f": {error.strerror}" if error.strerror else ""
        raise DataError(
            f"{folder} is not a prepared data folder: it has no {MANIFEST} that can be read{why}; "
            "prepare it first"
        ) from error
    except (ValueError, RecursionError) as error:  # also bytes that are no UTF-8
        raise _damaged(path, str(error)) from error
    version = manifest.get("format") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise DataError(
            f"{path} has format {version!r}, this version reads {FORMAT_VERSION}; delete the "
            "folder and prepare it again"
        )
    settings = manifest.get("settings")
    data = settings.get("data") if isinstance(settings, dict) else None
    words = ("explain_min_words", "explain_max_words")
    if not isinstance(data, dict) or not all(isinstance(data.get(w), int) for w in words):
        raise _damaged(path, f"no settings of the data with {' and '.join(words)}")
    if not isinstance(manifest.get("files"), dict):
        raise _damaged(path, "no table of files")
    return manifest


def load_prepared(folder: str | Path) -> PreparedData:
    """Read a prepared folder, every file checked against its sha256 and for what it must hold.

    The folder may come from anybody: a checksum proves that nothing was damaged, not who wrote it,
    so shapes, dtypes and index ranges are checked as well. DataError names the file and the fix.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    for name in (INTERACTIONS, TEXTS, NAMES, TASK_ROWS, CANDIDATES):
        path, about = folder / name, manifest["files"].get(name)
        expected = about.get("sha256") if isinstance(about, dict) else None
        if not path.is_file():
            raise DataError(f"{path} is missing; delete {folder} and prepare it again")
        found = file_sha256(path)
        if found != expected:
            raise DataError(
                f"{path} has sha256 {found}, but its manifest says {expected}: the file was "
                f"changed or damaged; delete {folder} and prepare it again"
            )
    names = _read_names(folder / NAMES)
    users, items = len(names["users"]), len(names["items"])
    arrays = _read_arrays(folder / INTERACTIONS)
    _check_rows(folder / INTERACTIONS, arrays, users, items)
    texts = Texts(folder / TEXTS)
    n = len(arrays["user"])
    if len(texts.offsets) != n + 1:
        raise _damaged(texts.path, f"{len(texts.offsets) - 1} texts for {n} rows")
    rows, lists = _read_arrays(folder / TASK_ROWS), _read_arrays(folder / CANDIDATES)
    for key, value in rows.items():
        _check_indices(folder / TASK_ROWS, key, value, n, np.int64)
    _check_lists(folder / CANDIDATES, lists, n, items)
    return PreparedData(
        folder=folder,
        manifest=manifest,
        n_users=users,
        n_items=items,
        has_text=np.diff(texts.offsets) > 0,
        user_ids=names["users"],
        item_ids=names["items"],
        titles=names["titles"],
        _texts=texts,
        _rows=rows,
        _candidates=lists,
        **arrays,
    )


def _damaged(path: Path, why: str) -> DataError:
    return DataError(
        f"{path} is damaged or not ckf's ({why}); delete {path.parent} and prepare it again"
    )


def _read_names(path: Path) -> dict[str, list[str]]:
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise _damaged(path, str(error)) from error
    lists = (
        [names.get(key) for key in ("users", "items", "titles")] if isinstance(names, dict) else []
    )
    if not lists or not all(
        isinstance(found, list) and all(isinstance(name, str) for name in found) for found in lists
    ):
        raise _damaged(path, "no lists of users, items and titles")
    if len(lists[1]) != len(lists[2]):
        raise _damaged(path, f"{len(lists[2])} titles for {len(lists[1])} items")
    return names


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, str(error)) from error


def _check_rows(path: Path, arrays: dict[str, np.ndarray], users: int, items: int) -> None:
    n = len(arrays["user"]) if arrays.get("user", np.zeros(())).ndim else 0
    for name, kind in _ROW_TYPES.items():
        found, dims = arrays.get(name), 2 if name == "history" else 1
        if found is None or found.dtype != kind or found.ndim != dims or len(found) != n:
            shown = "missing" if found is None else f"{found.dtype} {found.shape}"
            raise _damaged(path, f"{name} is {shown}; expected {np.dtype(kind)} of {n} rows")
    if extra := sorted({*arrays} - {*_ROW_TYPES}):
        raise _damaged(path, f"it also holds {extra[0]}")
    _check_indices(path, "user", arrays["user"], users, np.int32)
    if (np.diff(arrays["user"]) < 0).any():
        raise _damaged(path, "its rows are not sorted by user")
    _check_indices(path, "item", arrays["item"], items, np.int32)
    _check_indices(path, "history", arrays["history"], items, np.int32, low=-1)
    for name, low, high in (("label", -1, 1), ("split", 0, 2), ("not_cold", -1, 1)):
        _check_indices(path, name, arrays[name], high + 1, np.int8, low)


def _check_indices(
    path: Path, name: str, found: np.ndarray, count: int, kind, low: int = 0
) -> None:
    if found.dtype != kind:
        raise _damaged(path, f"{name} is {found.dtype}; expected {np.dtype(kind)}")
    if found.size and not low <= found.min() <= found.max() < count:
        raise _damaged(path, f"{name} is {found.min()} to {found.max()}; expected below {count}")


def _check_lists(path: Path, lists: dict[str, np.ndarray], n: int, items: int) -> None:
    names = {key.rpartition(".")[0] for key in lists}
    if {*lists} != {f"{name}.{part}" for name in names for part in ("rows", "items", "positive")}:
        raise _damaged(path, "a candidate list lacks rows, items or positive")
    for name in names:
        rows, there, positive = (lists[f"{name}.{part}"] for part in ("rows", "items", "positive"))
        if there.ndim != 2 or rows.shape != positive.shape or rows.shape != there.shape[:1]:
            raise _damaged(path, f"{name} has shapes that do not fit one another")
        _check_indices(path, f"{name}.rows", rows, n, np.int64)
        _check_indices(path, f"{name}.items", there, items, np.int32)
        _check_indices(path, f"{name}.positive", positive, there.shape[1], np.int64)
