"""Writing the prepared folder: texts in row order, arrays, names, checksums."""

from __future__ import annotations

import json
import mmap
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from ckf.data.interactions import Interactions
from ckf.data.prepared import FORMAT_VERSION, MANIFEST, NAMES, TEXTS, file_sha256

_ROWS_AT_ONCE = 1 << 16


def write_texts(folder: Path, spool: Path, rows: Interactions) -> None:
    """texts.safetensors: {"offsets": (N + 1,) int64, "blob": UTF-8 bytes} in row order.

    Written by hand in safetensors' layout, part by part, so that no more than some thousand texts
    are in memory; `spool` holds the texts in input order.
    """
    sizes = rows.text_bytes.astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype("<i8")
    total = int(offsets[-1])
    header = {
        "offsets": {
            "dtype": "I64",
            "shape": [len(offsets)],
            "data_offsets": [0, offsets.nbytes],
        },
        "blob": {
            "dtype": "U8",
            "shape": [total],
            "data_offsets": [offsets.nbytes, offsets.nbytes + total],
        },
    }
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)  # the arrays start at a multiple of 8 bytes
    with open(folder / TEXTS, "wb") as out:
        out.write(len(head).to_bytes(8, "little") + head)
        out.write(offsets.tobytes())
        if total:
            with open(spool, "rb") as file:
                _copy_texts(file, rows.text_start, sizes, out)


def _copy_texts(file, starts: np.ndarray, sizes: np.ndarray, out) -> None:
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as source:
        for first in range(0, len(starts), _ROWS_AT_ONCE):
            part = slice(first, first + _ROWS_AT_ONCE)
            begin = starts[part].tolist()
            end = (starts[part] + sizes[part]).tolist()
            out.write(b"".join(source[low:high] for low, high in zip(begin, end, strict=True)))


def write_names(folder: Path, rows: Interactions) -> None:
    """names.json: raw ids and titles by index."""
    names = {
        "users": rows.user_ids,
        "items": rows.item_ids,
        "titles": [rows.titles.get(item, "") for item in rows.item_ids],
    }
    (folder / NAMES).write_text(json.dumps(names, ensure_ascii=False), encoding="utf-8")


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """One safetensors file of contiguous arrays."""
    save_file({name: np.ascontiguousarray(value) for name, value in arrays.items()}, path)


def write_manifest(folder: Path, settings: dict, counts: dict) -> None:
    """manifest.json, last: with the sha256 and size of every file already in the folder."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in sorted(folder.iterdir())
    }
    manifest = {
        "format": FORMAT_VERSION,
        "settings": settings,
        "counts": counts,
        "files": files,
    }
    text = json.dumps(manifest, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")
