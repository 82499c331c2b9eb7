"""The folder of a run: its settings, whose it is, and who may write there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import yaml

from ckf.config import RunConfig
from ckf.config_files import load_config, write_config
from ckf.processes import is_main_process
from ckf.train import METANET_FILE

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

CONFIG, VECTORS, ABOUT, METRICS = "config.yaml", "cf.safetensors", "run.json", "metrics.json"
_OWN_NAMES = {CONFIG, VECTORS, ABOUT, METRICS, METANET_FILE, "data", "adapters", "checkpoints"} | {
    "train_log.jsonl",
    "predictions",
    "report.html",
    "export",
}
Log = Callable[[str], None]


def opened_config(folder: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """A run's settings with ``evaluate.key=value`` in place of its own; ValueError for others."""
    for override in overrides:
        if not override.startswith("evaluate."):
            raise ValueError(
                f"--set {override!r}: of a finished run only evaluate.* may change, for example "
                "evaluate.batch_tokens=1024; train another run for the rest"
            )
    file = folder / CONFIG
    config = load_config(file, list(overrides))
    if "held_out" not in (yaml.safe_load(file.read_text("utf-8")).get("cf") or {}):
        config = replace(config, cf=replace(config.cf, held_out=False))  # a run of before it
    return config


def _differences(there: RunConfig, config: RunConfig) -> str:
    return "; ".join(_different(asdict(there), asdict(config))) or "the tasks' order"


def _different(there: dict, here: dict, name: str = "") -> list[str]:
    """What differs, with dots between the levels: "cf.dim: 8, not 16"."""
    found = []
    for key in sorted(there.keys() | here.keys()):
        one, two = there.get(key), here.get(key)
        if isinstance(one, dict) and isinstance(two, dict):
            found += _different(one, two, f"{name}{key}.")
        elif one != two:
            found.append(f"{name}{key}: {one!r}, not {two!r}")
    return found


def start_run(config: RunConfig, folder: Path, fix: str = "or give another --out") -> bool:
    """Make the run's folder, True, or check that it holds a run with these very settings, False.

    fix: what the command that asks has besides, for its error.
    """
    file = folder / CONFIG
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give the run a folder by another --out")
    if file.exists():
        there = opened_config(folder)
        if there != config or list(there.tasks) != list(config.tasks):  # the order gives the ids
            raise ValueError(
                f"{folder} holds a run with other settings ({_differences(there, config)}); set "
                f"them, {fix}"
            )
        return False
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} exists and holds other files; give another --out")
    folder.mkdir(parents=True, exist_ok=True)
    _write(config, file)
    return True


def _write(config: RunConfig, file: Path) -> None:
    temporary = file.with_name(file.name + ".part")
    write_config(config, temporary)
    temporary.replace(file)


def take_settings(config: RunConfig, folder: Path, log: Log) -> None:
    """Let the run of a folder, if there is one, go on with other settings where nothing is lost.

    A run that is not trained yet takes all but those of its data, and its CF vectors are fitted
    anew where they may be others; any run takes its model's new place, where nothing is left at
    the old one. Other runs stay as they are, and `start_run` refuses the settings.
    """
    if not (folder / CONFIG).is_file():
        return
    there = opened_config(folder)
    if there == config or list(there.tasks) != list(config.tasks):
        return
    moved = _is_the_same_moved(there, config)
    trained = (folder / "checkpoints").exists() or (folder / ABOUT).exists()
    data = all(getattr(there, name) == getattr(config, name) for name in ("data", "tasks", "seed"))
    if not moved and (trained or not data):
        return
    log(f"{folder} takes new settings ({_differences(there, config)})")
    fitted = all(
        getattr(there, name) == getattr(config, name) for name in ("cf", "model", "prompt")
    )
    if not moved and not fitted:
        (folder / VECTORS).unlink(missing_ok=True)
    _write(config, folder / CONFIG)


def _is_the_same_moved(there: RunConfig, config: RunConfig) -> bool:
    """Whether the settings differ in the model's folder alone, which is gone from its old place."""
    old, new = Path(there.model.name), Path(config.model.name)
    if not old.is_absolute() or old.exists() or not new.exists():
        return False
    return replace(there, model=replace(there.model, name=config.model.name)) == config


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """No second command trains in the folder meanwhile; one that is killed leaves nothing behind.

    Raises:
        ValueError: another process trains there.
    """
    if fcntl is None or not is_main_process():
        yield
        return
    held = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"another process is training in {folder}: wait for it, or give another --out"
            ) from error
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(held)


def remove_run(folder: Path) -> None:
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} is not a run (no {CONFIG}), so --overwrite leaves it alone")
    names = {p.name for p in folder.iterdir() if p.suffix != ".part" and p.name[0] != "."}
    foreign = sorted(names - _OWN_NAMES)
    if foreign:
        raise ValueError(
            f"{folder} also holds {', '.join(foreign[:5])}, which no run writes, so --overwrite "
            "leaves it alone; give another --out, or move them away"
        )
    shutil.rmtree(folder)


def run_folder(folder: str | Path) -> Path:
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} is not a run: it has no {CONFIG}; make one with: ckf train")
    return folder
