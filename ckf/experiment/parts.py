"""What all cells share: prepared data, CF vectors per CF setting, one loaded base model."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from safetensors import SafetensorError

from ckf.base_model import Base
from ckf.cf import CFVectors, fit_cf
from ckf.cf.blend import REGRESSION
from ckf.config import RunConfig, TaskRows
from ckf.data.config import LISTS
from ckf.data.prepared import MANIFEST, PreparedData, file_sha256, load_prepared

Log = Callable[[str], None]
SHARED_FOLDERS = ("data", "cf", "prompts")
# files from before these settings keep their names
_LATER = ("titles", "history", "held_out", "fold_users", "fold_items")


def shared_data(
    config: RunConfig, out: Path, path: str | None, prepared: str | None, log: Log
) -> PreparedData:
    """The experiment's prepared data, in ``out``/data.

    prepared: a folder made by ``ckf prepare``, or one of ``ckf experiment --prepare-only``, whose
    CF vectors and prompts come along.
    """
    target = out / "data"
    if prepared is not None and not target.exists():
        source = Path(prepared)
        if (source / MANIFEST).is_file():
            load_prepared(source)
            _copy(source, target)
        else:
            load_prepared(source / "data")
            for name in reversed(SHARED_FOLDERS):  # data last: its presence says all is there
                if (source / name).is_dir():
                    _copy(source / name, out / name)
    if prepared is not None or (target.exists() and path is None):
        return load_prepared(target)
    from ckf.data.prepare import prepare

    return prepare(config.data, config.tasks, path, target, config.seed, log)


def limited(data: PreparedData, tasks: dict[str, TaskRows], seed: int) -> PreparedData:
    """The data with at most the rows per task and split that ``tasks`` asks for, drawn by the seed.

    For the reduced experiment on data prepared in full: one prepared folder serves both. So train
    lists that the folder lacks are cut from longer ones.
    """
    rows = dict(data._rows)
    for place, (task, wanted) in enumerate(sorted(tasks.items())):
        for number, split in enumerate(("train", "valid", "test")):
            own, count = data.rows(task, split), getattr(wanted, split)
            if count is not None and count < len(own):
                rng = np.random.default_rng([seed, place, number])
                rows[f"{task}.{split}"] = np.sort(rng.choice(own, count, replace=False))
    return replace(data, _rows=rows, _candidates=data._candidates | _shorter_lists(data))


def _shorter_lists(data: PreparedData) -> dict[str, np.ndarray]:
    """Uniform train lists that the data lack, cut from the longest that they have."""
    sizes = {name: count for name, (count, kind) in LISTS.items() if kind == "uniform"}
    there = [name for name in sizes if f"train.{name}.rows" in data._candidates]
    made = {}
    for name in sorted({*sizes} - {*there}):
        longer = max(there, key=sizes.__getitem__, default=name)
        if sizes[longer] <= sizes[name]:
            continue
        lists = data.candidates("train", longer)
        lot = np.random.default_rng(sizes[name]).random(lists.items.shape)
        np.put_along_axis(lot, lists.positive[:, None], -1, axis=1)  # the positive always stays
        kept = np.sort(np.argsort(lot, axis=1)[:, : sizes[name] + 1], axis=1)  # (P, C)
        made[f"train.{name}.rows"] = lists.rows
        made[f"train.{name}.items"] = np.take_along_axis(lists.items, kept, axis=1)
        made[f"train.{name}.positive"] = (kept == lists.positive[:, None]).argmax(1)
    return made


def counted(config: RunConfig, data: PreparedData) -> RunConfig:
    """The config with the train rows that are there, where it asks for all or for more."""
    tasks = {
        task: replace(wanted, train=len(data.rows(task, "train")))
        for task, wanted in config.tasks.items()
    }
    return replace(config, tasks=tasks)


def shared_vectors(config: RunConfig, out: Path, data: PreparedData, base: Base, log: Log) -> Path:
    """The file of the CF vectors of these settings, fitted where it is not there yet."""
    own = asdict(config.cf) | {"beside": [], "seed": config.seed}  # other models change nothing
    if config.cf.blend:
        own["regression"] = REGRESSION
    for later in _LATER:
        if not own[later]:
            del own[later]
    settings = json.dumps(own, sort_keys=True)
    settings += json.dumps(data.manifest["files"], sort_keys=True)
    if config.cf.titles:
        settings += base.fingerprint(config) + config.prompt.item_word
    key = hashlib.sha256(settings.encode()).hexdigest()[:16]
    file = out / "cf" / f"{config.cf.kind}-{key}.safetensors"
    about, sources = file.with_suffix(".json"), _sources(config)
    if _whole(file, about, sources):
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    lines: list[str] = []

    def note(line: str) -> None:
        lines.append(line)
        log(line)

    titles = base.titles(config, data) if config.cf.titles else None
    log(f"fitting CF vectors ({config.cf.kind})")
    vectors = fit_cf(replace(config.cf, seed=config.seed), data, note, titles)
    temporary = file.with_name(file.name + ".part")
    vectors.save(temporary)
    temporary.replace(file)
    record = {
        "sha256": file_sha256(file),
        "sources": sources,
        "seconds": round(time.perf_counter() - start, 1),
        "log": lines,
    }
    about.write_text(json.dumps(record, indent=1) + "\n")
    return file


def read_vectors(file: Path) -> CFVectors:
    """CF vectors; ValueError for a damaged file."""
    try:
        return CFVectors.load(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} is missing or damaged ({error}); remove it") from error


def link(target: Path, at: Path) -> None:
    """A relative link, so that the experiment's folder can be moved.

    Raises ValueError where there is one to another place.
    """
    wanted = Path("../../..") / target
    if at.is_symlink() and at.readlink() != wanted:
        raise ValueError(
            f"{at.parent} was begun with {at.readlink().name}, which is {wanted.name} by now: "
            "remove that folder, and the cell starts anew"
        )
    if not at.is_symlink() and not at.exists():
        at.symlink_to(wanted, target_is_directory=target.suffix == "")


def _sources(config: RunConfig) -> dict[str, str]:
    """sha256 of the user's own vector files, where they are at hand."""
    cf = config.cf
    if cf.kind != "file":
        return {}
    paths = [Path(path) for path in (cf.users, cf.items, *cf.fold_users, *cf.fold_items)]
    return {str(path): file_sha256(path) for path in paths if path.is_file()}


def _whole(file: Path, about: Path, sources: dict[str, str]) -> bool:
    try:
        record = json.loads(about.read_text())
        same = all(record["sources"].get(name) == sha for name, sha in sources.items())
        return same and record["sha256"] == file_sha256(file)
    except (OSError, ValueError, KeyError):
        return False


def _copy(source: Path, target: Path) -> None:
    if target.exists():
        return
    part = target.with_name(target.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(source, part)
    part.rename(target)
