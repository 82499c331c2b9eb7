"""Raw files to a prepared folder, by one call; never half-written.

read -> clean -> sort -> split -> histories -> texts -> task rows -> candidate lists -> checksums,
all in a temporary folder beside the target that is renamed when it is complete.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from ckf.data.candidates import LikedItems, build_list
from ckf.data.cleaning import clean
from ckf.data.config import SPLITS, TASKS, DataConfig, TaskRows
from ckf.data.errors import DataError
from ckf.data.explain import has_explanation
from ckf.data.fetch import fetch
from ckf.data.files import guarded
from ckf.data.interactions import Interactions
from ckf.data.prepared import (
    CANDIDATES,
    INTERACTIONS,
    MANIFEST,
    TASK_ROWS,
    TEXTS,
    PreparedData,
    Texts,
    file_sha256,
    load_prepared,
    read_manifest,
)
from ckf.data.readers import READERS, read_source
from ckf.data.splits import TRAIN, assign_splits, split_histories
from ckf.data.store import write_arrays, write_manifest, write_names, write_texts


def prepare(
    config: DataConfig,
    tasks: dict[str, TaskRows],
    path: str | Path | None,
    out: str | Path,
    seed: int,
    log: Callable[[str], None] = print,
) -> PreparedData:
    """Prepare the data set of `config` in the folder `out` and load it.

    `path` is the folder of the raw files, or the file itself; None means config.path, else the
    download named by config.source. If `out` was made from the same settings and the same files it
    is used as it stands; if from others, DataError says which differ. DataError also for whatever
    is wrong with the files. The same input gives the same bytes.
    """
    config = dataclasses.replace(config)  # checks again what was assigned after construction
    _check_tasks(tasks)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise DataError(f"seed is {seed!r}; it must be a whole number from 0 up")
    out = Path(os.path.abspath(out))
    root, config = _locate(config, path)
    files = READERS[config.format].files(config, root)
    settings = _settings(config, tasks, files, root, seed)
    if _reusable(out, settings):
        log(f"using the prepared data in {out}")
        return load_prepared(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as temporary:
        ready = Path(temporary) / "ready"
        ready.mkdir()
        _write(config, tasks, files, settings, ready, seed, log)
        try:
            os.rename(ready, out)  # replaces an empty folder, and nothing else
        except OSError:
            if not _reusable(out, settings):  # else another process has just made the same
                raise
    return load_prepared(out)


def _locate(config: DataConfig, path: str | Path | None) -> tuple[Path, DataConfig]:
    """The data folder; a path to a file also says which file the interactions are in."""
    chosen = path if path is not None else config.path
    if chosen is None:
        if config.source is None:
            raise DataError(
                "no data: give the folder of the raw files (--data, or data.path), or name a "
                "download in data.source"
            )
        return fetch(config.source), config
    try:
        root = Path(chosen).expanduser()
        root.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        message = f"{root} does not exist; give the folder (or file) of the raw data"
        raise DataError(message) from error
    except (OSError, ValueError, RuntimeError) as error:  # a name too long, ~ of nobody, ...
        why = getattr(error, "strerror", None) or error
        raise DataError(
            f"{chosen} cannot be opened ({why}); give the folder (or file) of the raw data"
        ) from error
    if not (root.is_file() or root.is_dir()):  # a pipe or a device has no end
        raise DataError(f"{root} is neither a folder nor a file; give that of the raw data")
    if root.is_file():
        return root.resolve().parent, dataclasses.replace(config, reviews=root.resolve().name)
    return root, config


def _check_tasks(tasks: dict[str, TaskRows]) -> None:
    for name, rows in tasks.items():
        if name not in TASKS:
            raise DataError(f"unknown task {name!r}; known are: {', '.join(TASKS)}")
        if not isinstance(rows, TaskRows):
            raise DataError(f"rows of task {name} are {rows!r}; they must be TaskRows")
    if not tasks:
        raise DataError(f"no task is named; choose from: {', '.join(TASKS)}")


def _settings(
    config: DataConfig, tasks: dict[str, TaskRows], files: Iterable[Path], root: Path, seed: int
) -> dict:
    """Everything that decides the result, as JSON values; where the files lie does not."""
    data = dataclasses.asdict(config)
    for name in ("path", "source", "max_line_bytes", "max_unpacked_bytes"):
        del data[name]
    settings = {
        "data": data,
        "tasks": {name: dataclasses.asdict(rows) for name, rows in sorted(tasks.items())},
        "seed": seed,
        "sources": {path.relative_to(root).as_posix(): _source_sha256(path) for path in files},
    }
    return json.loads(json.dumps(settings))


def _source_sha256(path: Path) -> str:
    with guarded(path):
        return file_sha256(path)


def _reusable(out: Path, settings: dict) -> bool:
    """Whether `out` holds just this; False if it is free; DataError if it holds something else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not (out / MANIFEST).is_file():
        raise DataError(
            f"{out} exists and is no prepared data folder; choose another folder or remove it"
        )
    there = _flat(read_manifest(out)["settings"])
    wanted = _flat(settings)
    differ = sorted(
        key for key in {*there, *wanted} if there.get(key, "none") != wanted.get(key, "none")
    )
    if differ:
        shown = "; ".join(
            f"{key}: {there.get(key, 'none')} there, {wanted.get(key, 'none')} now"
            for key in differ[:4]
        )
        raise DataError(
            f"{out} was prepared from other settings or files ({shown}); choose another folder, "
            "or delete it to prepare anew"
        )
    return True


def _flat(tree: dict, prefix: str = "") -> dict:
    out = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            out |= _flat(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out


def _write(
    config: DataConfig,
    tasks: dict[str, TaskRows],
    files: list[Path],
    settings: dict,
    folder: Path,
    seed: int,
    log: Callable[[str], None],
) -> None:
    spool = folder / "spool"
    log(f"reading {', '.join(path.name for path in files)}")
    with open(spool, "wb") as file:
        raw = read_source(config, files, file)
    rows = clean(raw, config, log)
    del raw
    _log_ratings(rows, config, log)
    split = assign_splits(rows.user, rows.time, rows.split, config.split)
    write_texts(folder, spool, rows)
    spool.unlink()
    write_names(folder, rows)
    write_arrays(
        folder / INTERACTIONS,
        {
            "user": rows.user,
            "item": rows.item,
            "rating": rows.rating,
            "label": rows.label,
            "time": rows.time,
            "split": split,
            "not_cold": rows.not_cold,
            "history": split_histories(
                rows.user, rows.time, rows.item, rows.label == 1, split, config.history
            ),
        },
    )
    chosen = select_rows(tasks, rows, split, Texts(folder / TEXTS), config, seed)
    write_arrays(folder / TASK_ROWS, chosen)
    log(f"rows per task: {', '.join(f'{key} {len(ids):,}' for key, ids in chosen.items())}")
    lists = candidate_lists(config, chosen, rows, split, seed)
    write_arrays(folder / CANDIDATES, lists)
    write_manifest(folder, settings, _counts(rows, split, chosen))


def _log_ratings(rows: Interactions, config: DataConfig, log: Callable[[str], None]) -> None:
    rating = rows.rating[~np.isnan(rows.rating)]
    if len(rating):
        liked = (rows.label == 1).sum() / (rows.label >= 0).sum()
        log(
            f"ratings from {rating.min():g} to {rating.max():g}; {liked:.0%} of the rows are liked "
            f"(data.like_threshold {config.like_threshold:g})"
        )


def select_rows(
    tasks: dict[str, TaskRows],
    rows: Interactions,
    split: np.ndarray,
    texts: Texts,
    config: DataConfig,
    seed: int,
) -> dict[str, np.ndarray]:
    """ "<task>.<split>" -> ascending row ids (int64), drawn with the seed where fewer are wanted.

    Which rows a task can use: ctr those with a label, topk the liked ones, rating those whose
    rating rounds to 1..5, review_rating the same with a text, explain those whose text has a
    sentence to explain with. DataError if a split of a task comes out empty unasked, if stars are
    asked for and more than 1% of the ratings are none, or if ctr has one label alone to train or
    test on.
    """
    rated = (rows.rating >= 0.5) & (rows.rating < 5.5)  # NaN: False
    if {"rating", "review_rating"} & tasks.keys():
        _check_stars(rows.rating[~np.isnan(rows.rating)], rated.sum(), config)
    has_text = rows.text_bytes > 0
    can = {
        "ctr": rows.label >= 0,
        "topk": rows.label == 1,
        "rating": rated,
        "explain": has_text,
        "review_rating": has_text & rated,
    }
    chosen = {}
    for task, wanted in tasks.items():
        for value, name in enumerate(SPLITS):
            ids = np.flatnonzero(can[task] & (split == value))
            count = getattr(wanted, name)
            if task == "ctr" and name in ("train", "test") and count != 0 and len(ids):
                _check_both_labels(rows.label[ids], name, config)
            rng = np.random.default_rng([seed, zlib.crc32(f"{task}.{name}".encode())])
            if task == "explain":
                ids = _explainable(ids, count, texts, config, rng)
            elif count is not None and count < len(ids):
                ids = rng.choice(ids, size=count, replace=False)
            if not len(ids) and count != 0:
                raise DataError(
                    f"task {task!r} has no usable row in split {name!r} of {config.name}: "
                    f"{_NEEDS[task]}. Leave the task out, or give such data"
                )
            chosen[f"{task}.{name}"] = np.sort(ids).astype(np.int64)
    return chosen


def _check_stars(rating: np.ndarray, stars: int, config: DataConfig) -> None:
    """DataError for ratings (N,) on another scale: rows outside 1..5 would be left out unseen."""
    outside = len(rating) - stars
    if outside > _MOST_OUTSIDE * len(rating):
        raise DataError(
            f"ratings of {config.name} go from {rating.min():g} to {rating.max():g}, and "
            f"{outside:,} of {len(rating):,} do not round to 1..5, which the tasks rating and "
            "review_rating answer with: bring the file's ratings to 1..5 (from 1..10: halve them) "
            "and set data.like_threshold on that scale, or leave these tasks out"
        )


def _check_both_labels(labels: np.ndarray, split: str, config: DataConfig) -> None:
    if labels.min() == labels.max():
        raise DataError(
            f"task 'ctr' needs both labels, but all {len(labels):,} rows of split {split!r} of "
            f"{config.name} have label {labels[0]}: use topk for clicks alone; with ratings, set "
            "data.like_threshold between them"
        )


_MOST_OUTSIDE = 0.01  # of the ratings; above it the scale is another one
_NEEDS = {
    "ctr": "it needs labels or ratings",
    "topk": "it needs liked rows (label 1, or a rating from data.like_threshold up)",
    "rating": "it needs ratings that round to 1..5",
    "explain": "it needs review texts with a sentence of data.explain_min_words to "
    "data.explain_max_words words",
    "review_rating": "it needs review texts and ratings that round to 1..5",
}


def _explainable(ids, count, texts: Texts, config: DataConfig, rng) -> np.ndarray:
    """Rows with something to explain; in drawn order, until there are enough."""
    if count is not None:
        ids = rng.permutation(ids)
    found = []
    for row in ids.tolist():
        if count is not None and len(found) >= count:
            break
        if has_explanation(texts[row], config.explain_min_words, config.explain_max_words):
            found.append(row)
    return np.array(found, dtype=np.int64)


def candidate_lists(
    config: DataConfig,
    chosen: dict[str, np.ndarray],
    rows: Interactions,
    split: np.ndarray,
    seed: int,
) -> dict[str, np.ndarray]:
    """ "<split>.<list>.<part>" of the topk rows: the training list for train, the test lists for
    test, both for valid; empty without task topk."""
    if "topk.train" not in chosen:
        return {}
    liked_rows = rows.label == 1
    train_items = rows.item[split == TRAIN]
    names = {
        "train": [config.train_list],
        "valid": [config.train_list, *config.test_lists],
        "test": config.test_lists,
    }
    out = {}
    for name, wanted in names.items():
        known = liked_rows & (split == TRAIN) if name == "train" else liked_rows
        liked = LikedItems.of(rows.user[known], rows.item[known], len(rows.item_ids))
        for list_name in dict.fromkeys(wanted):
            made = build_list(
                list_name,
                name,
                chosen[f"topk.{name}"],
                rows.user,
                rows.item,
                liked,
                train_items,
                seed,
            )
            key = f"{name}.{list_name}"
            out[f"{key}.rows"] = made.rows
            out[f"{key}.items"] = made.items
            out[f"{key}.positive"] = made.positive
    return out


def _counts(rows: Interactions, split: np.ndarray, chosen: dict[str, np.ndarray]) -> dict:
    return rows.counts | {
        "splits": {name: int((split == value).sum()) for value, name in enumerate(SPLITS)},
        "texts": int((rows.text_bytes > 0).sum()),
        "titles": sum(1 for item in rows.item_ids if rows.titles.get(item)),
        "tasks": {key: len(ids) for key, ids in chosen.items()},
    }
