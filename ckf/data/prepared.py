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
from safetensors.numpy import load_file

from ckf.data.errors import DataError
from ckf.data.explain import explanation_of

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
INTERACTIONS = "interactions.safetensors"
TEXTS = "texts.safetensors"
NAMES = "names.json"
TASK_ROWS = "tasks.safetensors"
CANDIDATES = "candidates.safetensors"


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
        with open(self.path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        start = 8 + size
        low, high = header["offsets"]["data_offsets"]
        self.offsets = np.fromfile(
            self.path, dtype="<i8", count=(high - low) // 8, offset=start + low
        )
        low, high = header["blob"]["data_offsets"]
        # mmap refuses length 0
        self.blob = (
            np.memmap(self.path, dtype=np.uint8, mode="r", offset=start + low, shape=(high - low,))
            if high > low
            else np.zeros(0, np.uint8)
        )

    def __getstate__(self) -> dict:
        return {"path": self.path}

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["path"])

    def __getitem__(self, row: int) -> str:
        return bytes(self.blob[self.offsets[row] : self.offsets[row + 1]]).decode("utf-8")


@dataclass
class PreparedData:
    """A prepared data set; row ids are indices into the (N,) arrays.

    Rows are sorted by (user, time, input order). `history` holds the last H liked items of the
    row's user strictly earlier in time than the row, whatever their split, oldest first, padded on
    the left with -1. Splits: 0 train, 1 valid, 2 test.
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
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(
            f"{folder} is not a prepared data folder: it has no {MANIFEST}; prepare it first"
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} is damaged ({error}); delete the folder and prepare it again"
        ) from error
    version = manifest.get("format") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise DataError(
            f"{path} has format {version!r}, this version reads {FORMAT_VERSION}; delete the "
            "folder and prepare it again"
        )
    return manifest


def load_prepared(folder: str | Path) -> PreparedData:
    """Read a prepared folder, every file checked against its sha256.

    A missing or changed file raises DataError naming it and the fix.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    for name in (INTERACTIONS, TEXTS, NAMES, TASK_ROWS, CANDIDATES):
        path = folder / name
        expected = manifest.get("files", {}).get(name, {}).get("sha256")
        if not path.is_file():
            raise DataError(f"{path} is missing; delete {folder} and prepare it again")
        found = file_sha256(path)
        if found != expected:
            raise DataError(
                f"{path} has sha256 {found}, but its manifest says {expected}: the file was "
                f"changed or damaged; delete {folder} and prepare it again"
            )
    names = json.loads((folder / NAMES).read_text(encoding="utf-8"))
    arrays = load_file(folder / INTERACTIONS)
    texts = Texts(folder / TEXTS)
    return PreparedData(
        folder=folder,
        manifest=manifest,
        n_users=len(names["users"]),
        n_items=len(names["items"]),
        has_text=np.diff(texts.offsets) > 0,
        user_ids=names["users"],
        item_ids=names["items"],
        titles=names["titles"],
        _texts=texts,
        _rows=load_file(folder / TASK_ROWS),
        _candidates=load_file(folder / CANDIDATES),
        **arrays,
    )
