"""Tables of vectors too large for memory: rows are read from the file by index.

    table = MappedTable.open("users.npy", "users")     # (100 million, 64): a header is read
    table[torch.tensor([5, 7])]                        # two rows are read, (2, 64) float32

The file is mapped read-only; its pages belong to the operating system's cache, which gives them up
when memory runs short. Copies in other processes (loader workers) map the file anew.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

MAPPED_BYTES = 2**30  # files above this size are mapped
_CHUNK_ROWS = 2**16
_SAFETENSORS_DTYPES = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "BF16": "<u2"}


@dataclass(frozen=True)
class Scale:
    """Column-wise standardising of the rows that are known; the others, and flat columns, are 0."""

    mean: Tensor  # (d,) float64
    std: Tensor  # (d,) float64
    flat: Tensor  # (d,) bool
    known: Tensor  # (rows,) bool

    def __call__(self, rows: Tensor, known: Tensor) -> Tensor:
        """Rows (..., d) with known (...) bool, float32."""
        scaled = (rows.double() - self.mean) / self.std
        scaled[..., self.flat] = 0.0
        scaled[~known] = 0.0
        return scaled.float()


@dataclass(frozen=True, eq=False)
class MappedTable:
    """A table (rows, d) of floats in a .npy or .safetensors file, indexed like a tensor."""

    path: Path
    offset: int
    shape: tuple[int, int]
    dtype: str  # numpy's; "<u2" stands for bfloat16
    scale: Scale | None = None

    ndim = 2

    @classmethod
    def open(cls, path: str | Path, name: str) -> MappedTable:
        """The table in a file; of a safetensors file its only tensor, or the one called ``name``.

        Raises:
            ValueError: another kind of file, dtype or shape.
        """
        path = Path(path)
        reader = {".npy": _npy_header, ".safetensors": _safetensors_header}.get(path.suffix)
        if reader is None:
            raise ValueError(
                f"{path}: suffix {path.suffix!r}, expected .npy or .safetensors: convert it"
            )
        offset, shape, dtype = reader(path, name)
        if len(shape) != 2 or 0 in shape:
            raise ValueError(f"{path}: shape {tuple(shape)}, expected (rows, width): reshape it")
        return cls(path, offset, tuple(shape), dtype)

    def __len__(self) -> int:
        return self.shape[0]

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k != "_map"}

    def __getitem__(self, index: Tensor) -> Tensor:
        """Rows of an index tensor of any shape, (*index.shape, d) float32."""
        rows = self._rows(np.asarray(index))
        return rows if self.scale is None else self.scale(rows, self.scale.known[index])

    def chunks(self) -> Iterator[Tensor]:
        """All rows in their order, (at most 65536, d) float32 at a time."""
        for start in range(0, len(self), _CHUNK_ROWS):
            stop = min(start + _CHUNK_ROWS, len(self))
            rows = self._rows(slice(start, stop))
            yield rows if self.scale is None else self.scale(rows, self.scale.known[start:stop])

    def scaled(self, scale: Scale) -> MappedTable:
        """The same file, rows standardised as they are read."""
        return replace(self, scale=scale)

    def _rows(self, index) -> Tensor:
        if "_map" not in self.__dict__:
            mapped = np.memmap(self.path, self.dtype, "r", self.offset, self.shape)
            object.__setattr__(self, "_map", mapped)
        rows = np.array(self._map[index])  # a copy of these rows in memory
        if self.dtype == "<u2":
            return torch.from_numpy(rows.view(np.int16)).view(torch.bfloat16).float()
        return torch.from_numpy(rows).float()


def as_index(values: ArrayLike | Tensor) -> Tensor:
    """int64; arrays are copied, since torch warns of those that cannot be written to."""
    if isinstance(values, Tensor):
        return values.long()
    return torch.from_numpy(np.array(values, dtype=np.int64))


def chunks_of(table: Tensor | MappedTable) -> Iterator[Tensor]:
    """All rows of a table in its order, some at a time."""
    return iter(table.split(_CHUNK_ROWS)) if isinstance(table, Tensor) else table.chunks()


def scaled_rows(table: Tensor | MappedTable, scale: Scale) -> Tensor | MappedTable:
    """A table standardised by a scale whose ``known`` are its rows."""
    return scale(table, scale.known) if isinstance(table, Tensor) else table.scaled(scale)


def moments(table: MappedTable, known: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation (d,), float64, of the known rows, in one pass (Chan et al. 1979)."""
    count, mean = 0, torch.zeros(table.shape[1], dtype=torch.float64)
    squares = torch.zeros_like(mean)
    start = 0
    for chunk in table.chunks():
        rows = chunk[known[start : start + len(chunk)]].double()
        start += len(chunk)
        if len(rows) == 0:
            continue
        own, total = rows.mean(0), count + len(rows)
        step = own - mean
        squares += (rows - own).square().sum(0) + step.square() * (count * len(rows) / total)
        mean += step * (len(rows) / total)
        count = total
    return mean, (squares / max(count, 1)).sqrt()


_DTYPES = {torch.bool: "BOOL", torch.int64: "I64", torch.float32: "F32", torch.float64: "F64"}


def save_tables(tables: dict[str, Tensor | MappedTable], about: dict, path: str | Path) -> None:
    """A safetensors file with metadata, mapped tables copied a chunk at a time, as float32."""
    header: dict = {"__metadata__": about}
    end = 0
    ordered = sorted(tables.items(), key=lambda item: _itemsize(item[1]), reverse=True)  # aligned
    for name, table in ordered:
        size = _itemsize(table) * int(np.prod(table.shape))
        header[name] = {
            "dtype": "F32" if isinstance(table, MappedTable) else _DTYPES[table.dtype],
            "shape": list(table.shape),
            "data_offsets": [end, end + size],
        }
        end += size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for _, table in ordered:
            for chunk in chunks_of(table):
                file.write(chunk.contiguous().numpy().tobytes())


def _itemsize(table: Tensor | MappedTable) -> int:
    return 4 if isinstance(table, MappedTable) else table.itemsize


def _npy_header(path: Path, _name: str) -> tuple[int, tuple, str]:
    with open(path, "rb") as file:
        version = np.lib.format.read_magic(file)
        reader = getattr(np.lib.format, f"read_array_header_{version[0]}_0")
        shape, fortran, dtype = reader(file)
        offset = file.tell()
    if fortran or dtype.kind != "f":
        order = ", columns first" if fortran else ""
        raise ValueError(
            f"{path}: {dtype}{order}, expected floats with rows first: save "
            "np.ascontiguousarray(table, np.float32)"
        )
    return offset, shape, dtype.str


def _safetensors_header(path: Path, name: str) -> tuple[int, tuple, str]:
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    if len(header) != 1 and name not in header:
        raise ValueError(
            f"{path}: tensors {sorted(header)}, expected one tensor or one named {name!r}: "
            "rename the tensor"
        )
    entry = header.get(name) or next(iter(header.values()))
    if entry["dtype"] not in _SAFETENSORS_DTYPES:
        raise ValueError(f"{path}: {entry['dtype']}, expected floats: convert it")
    dtype = _SAFETENSORS_DTYPES[entry["dtype"]]
    return 8 + size + entry["data_offsets"][0], tuple(entry["shape"]), dtype
