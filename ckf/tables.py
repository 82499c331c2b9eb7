"""Parquet files, by polars or by pyarrow, whichever is there."""

from pathlib import Path

import numpy as np


def write_parquet(columns: dict[str, list | np.ndarray], path: Path) -> None:
    """Columns of equal length to a Parquet file, by way of a temporary file."""
    temporary = path.with_name(path.name + ".part")
    try:
        import polars
    except ImportError:
        _write_with_pyarrow(columns, temporary)
    else:
        polars.DataFrame(columns, strict=False).write_parquet(temporary)
    temporary.replace(path)


def _write_with_pyarrow(columns: dict, path: Path) -> None:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(
            "predictions are written as Parquet, which needs polars or pyarrow; "
            "pip install -e '.[recsys]' in ckf's folder"
        ) from error
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
