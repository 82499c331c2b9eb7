"""Adapters, prepared folders and configs from strangers: checked whole, or refused."""

import contextlib
import hashlib
import json
import os
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import ckf
from ckf.adapters import load_patched, read_settings
from ckf.config_files import load_config
from ckf.data.errors import DataError
from ckf.data.prepared import load_prepared
from ckf.export import import_peft
from tests import ckf_fixtures
from tests.data import samples
from tests.hardening.strangers import damage, fuzzed
from tests.tiny import randomise_adapters, tiny_model

ROOT = Path(__file__).parents[2]


def patched():
    return ckf.patch_model(tiny_model(), ["ctr", "topk"], r=2, target_modules=["q_proj", "v_proj"])


@pytest.fixture
def saved(tmp_path):
    model = patched()
    randomise_adapters(model)
    ckf.save_adapters(model, tmp_path / "saved")
    return tmp_path / "saved"


def adapter_values(model) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}


def assert_unchanged_or_whole(model, before, load) -> bool:
    """Load; a refusal leaves every adapter as it was. True if it was read."""
    try:
        load()
    except ValueError as error:
        after = adapter_values(model)
        assert str(error) and all(torch.equal(before[n], after[n]) for n in before)
        return False
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in before:
                parameter.copy_(before[name])
    return True


# ---- adapters


@pytest.mark.parametrize("name", ["ctr/adapter_model.safetensors", "ckf.json"])
def test_damaged_adapters_change_nothing(name, saved):
    model, file = patched(), saved / name
    valid, before = file.read_bytes(), adapter_values(model)

    @settings(fuzzed, max_examples=300)
    @given(damage())
    def run(harm):
        file.write_bytes(harm(valid))
        assert_unchanged_or_whole(model, before, lambda: ckf.load_adapters(model, saved))

    run()


def test_a_damaged_foreign_adapter_changes_nothing(saved):
    model, folder = patched(), saved / "ctr"
    before = adapter_values(model)
    files = [folder / "adapter_model.safetensors", folder / "adapter_config.json"]
    valid = [file.read_bytes() for file in files]

    @settings(fuzzed, max_examples=300)
    @given(st.integers(0, 1), damage())
    def run(which, harm):
        files[which].write_bytes(harm(valid[which]))
        try:
            assert_unchanged_or_whole(model, before, lambda: import_peft(model, folder, "topk"))
        finally:
            files[which].write_bytes(valid[which])

    run()


def header_of(dtype="F32", shape=(2, 32), offsets=(0, 256), **more) -> dict:
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    return {key: {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}, **more}


@pytest.mark.parametrize(
    "header",
    [
        header_of(shape=(2**40, 2**40)),
        header_of(shape=(2, 2**62), offsets=(0, 2**63)),
        header_of(offsets=(0, 2**50)),
        header_of(offsets=(128, 0)),
        header_of(dtype="I64", shape=(1, 32)),
        header_of(dtype="BOOL", shape=(8, 32)),
        header_of(dtype="F8_E5M2", shape=(8, 32)),
        header_of(dtype="NONE"),
        header_of(shape=(32, 2)),
        {"../../x": header_of().popitem()[1]},
        {"": header_of().popitem()[1]},
        [],
    ],
)
def test_headers_that_lie_are_refused(header, saved):
    model = patched()
    before = adapter_values(model)
    text = json.dumps(header).encode()
    file = saved / "ctr" / "adapter_model.safetensors"
    for size in (len(text), 2**62, 0):
        file.write_bytes(struct.pack("<Q", size) + text + bytes(256))
        assert not assert_unchanged_or_whole(model, before, lambda: ckf.load_adapters(model, saved))


@pytest.mark.parametrize(
    "task", ["../x", "/etc", "a/b", "a\\b", "..", ".", "", "x\0y", "shared", "lora", "ctr\n"]
)
def test_names_of_adapters_cannot_leave_the_folder(task, saved):
    with pytest.raises(ValueError):
        ckf.patch_model(tiny_model(), [task])
    about = json.loads((saved / "ckf.json").read_text())
    about["tasks"] = {task: 2}
    (saved / "ckf.json").write_text(json.dumps(about))
    with pytest.raises(ValueError):
        read_settings(saved)


@pytest.mark.parametrize("name", ["ctr", "ctr/adapter_model.safetensors", "ckf.json"])
def test_links_out_of_the_folder_are_not_followed(name, saved, tmp_path):
    (saved / name).rename(tmp_path / "elsewhere")
    (saved / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="leads out of"):
        ckf.load_adapters(patched(), saved)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["pipe", "device", "circle"])
@pytest.mark.parametrize("name", ["ckf.json", "ctr/adapter_model.safetensors"])
def test_what_has_no_end_is_never_read(name, kind, saved):
    """Opening a pipe waits for its writer; a zero device fills the memory."""
    file = saved / name
    file.unlink()
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "device":
        file.symlink_to("/dev/zero")
    else:
        file.symlink_to(file.name)
    for load in (ckf.load_adapters, load_patched):
        model = tiny_model() if load is load_patched else patched()
        with pytest.raises(ValueError, match=r"is a pipe or|leads out of|cannot be found"):
            load(model, saved)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tasks", {"ctr": 10**12, "topk": 2}),  # terabytes, were it believed
        ("shared_r", 10**12),
        ("tasks", {"ctr": "2", "topk": 2}),
        ("tasks", ["ctr"]),
        ("lora_alpha", "16"),
        ("lora_dropout", None),
        ("lora_alpha", 1e999),
        pytest.param("lora_alpha", 10**400, id="a huge alpha"),
        ("use_rslora", "no"),
        ("backend", ["auto"]),
        ("backend", "os.system"),
        ("shared_modules", 5),
        ("task_modules", [["q_proj"]]),
        ("task_modules", "(("),
        ("task_modules", "(" * 5000),
    ],
)
def test_settings_of_strangers_are_checked_before_the_model_is_touched(key, value, saved):
    about = json.loads((saved / "ckf.json").read_text())
    about[key] = value
    (saved / "ckf.json").write_text(json.dumps(about))
    base = tiny_model()
    names = [n for n, _ in base.named_modules()]
    with pytest.raises(ValueError):
        load_patched(base, saved)
    assert [n for n, _ in base.named_modules()] == names


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("r", 0),
        ("r", -1),
        ("r", "2"),
        ("r", 10**12),
        pytest.param("r", 10**400, id="a huge r"),
        ("r", 2.0),
        ("lora_alpha", 1e999),
        pytest.param("lora_alpha", 10**400, id="a huge alpha"),
        ("use_rslora", "no"),
        ("rank_pattern", ["q_proj"]),
        ("rank_pattern", {"((": 2}),
        ("rank_pattern", {"q_proj": "2"}),
        ("alpha_pattern", {"q_proj": None}),
        ("alpha_pattern", {"q_proj": 1e999}),
        pytest.param("alpha_pattern", {"q_proj": 10**400}, id="a huge pattern"),
        ("alpha_pattern", {"(" * 5000: 1}),
    ],
)
def test_peft_settings_of_strangers_are_checked(key, value, saved):
    file = saved / "ctr" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    model = patched()
    before = adapter_values(model)
    assert not assert_unchanged_or_whole(
        model, before, lambda: import_peft(model, saved / "ctr", "topk")
    )


def test_a_pickle_is_never_read(saved):
    file = saved / "ctr" / "adapter_model.safetensors"
    file.unlink()
    (saved / "ctr" / "adapter_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(ValueError, match="is a pickle, which ckf never reads"):
        ckf.load_adapters(patched(), saved)


# ---- prepared folders


@pytest.fixture
def folder(tmp_path):
    raw = samples.amazon(tmp_path / "raw", samples.events())  # with texts
    samples.prepared(raw, tmp_path / "out", format="amazon")
    return tmp_path / "out"


def sign(folder: Path, name: str) -> None:
    """The manifest of somebody who means it: the checksum fits the changed file."""
    about = json.loads((folder / "manifest.json").read_text())
    about["files"][name]["sha256"] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(about))


FILES = ["interactions", "tasks", "candidates", "texts"]


@pytest.mark.parametrize("name", ["names.json", *(f"{f}.safetensors" for f in FILES)])
def test_damaged_prepared_files_with_right_checksums_are_refused(name, folder):
    file = folder / name
    valid = file.read_bytes()

    @settings(fuzzed, max_examples=100)
    @given(damage())
    def run(harm):
        file.write_bytes(harm(valid))
        sign(folder, name)
        with contextlib.suppress(DataError):  # at once, or where another name stands in the file
            data = load_prepared(folder)
            for task in ("ctr", "topk"):  # what was accepted can be used
                for row in data.rows(task, "train"):
                    assert data.title(data.item[row]) and data.user_ids[data.user[row]] is not None
                    data.text(int(row))
            data.titles[data.candidates("test", "uniform9").items.max()]

    try:
        run()
    finally:
        file.write_bytes(valid)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("interactions", "item", 10**6),
        ("interactions", "user", -1),
        ("interactions", "split", 3),
        ("interactions", "history", -2),
        ("tasks", "ctr.train", 10**6),
        ("candidates", "test.uniform9.items", 10**6),
        ("candidates", "test.uniform9.positive", 10),
        ("candidates", "test.uniform9.rows", -1),
    ],
)
def test_indices_out_of_range_are_refused(name, key, value, folder):
    file = folder / f"{name}.safetensors"
    arrays = load_file(file)
    arrays[key].flat[0] = value
    save_file(arrays, file)
    sign(folder, file.name)
    with pytest.raises(DataError, match=f"{re.escape(key)} is .*delete .* prepare it again"):
        load_prepared(folder)


def test_arrays_of_another_kind_are_refused(folder):
    file = folder / "interactions.safetensors"
    valid = load_file(file)
    for change in (
        {"user": valid["user"].astype(np.int64)},
        {"time": valid["time"][:-1]},
        {"history": valid["history"][:, 0].copy()},
        {"user": valid["user"][::-1].copy()},  # a user's rows are found by their order
        {"extra": valid["time"]},
    ):
        save_file(valid | change, file)
        sign(folder, file.name)
        with pytest.raises(DataError, match="damaged or not ckf's"):
            load_prepared(folder)


@pytest.mark.parametrize(
    "manifest", [[], {}, {"format": 1}, {"format": 1, "settings": {"data": []}, "files": 3}, "["]
)
def test_manifests_of_another_kind_are_refused(manifest, folder):
    text = manifest * 10**5 if isinstance(manifest, str) else json.dumps(manifest)
    (folder / "manifest.json").write_text(text)
    with pytest.raises(DataError):
        load_prepared(folder)


# ---- configs


def test_damaged_configs_are_read_or_refused(tmp_path):
    file = tmp_path / "config.yaml"
    valid = yaml.safe_dump(ckf_fixtures.settings(Path("m")), sort_keys=False).encode()

    @settings(fuzzed, max_examples=100)
    @given(damage())
    def run(harm):
        file.write_bytes(harm(valid))
        try:
            load_config(file)
        except ValueError as error:
            assert str(error)

    run()


@pytest.mark.parametrize("tag", ["object/apply:os.system ['touch ran']", "name:os.system", "tuple"])
def test_configs_run_no_code(tag, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(f"name: !!python/{tag}\n")
    with pytest.raises(ValueError, match="is not valid YAML"):
        load_config(tmp_path / "config.yaml")
    assert not (tmp_path / "ran").exists()


def test_a_config_that_stands_for_gigabytes_is_refused(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    (tmp_path / "bomb.yaml").write_text("\n".join(lines))
    with pytest.raises(ValueError, match="stands for more than 10000 settings"):
        load_config(tmp_path / "bomb.yaml")
    (tmp_path / "loop.yaml").write_text("tasks: &a [*a]\n")
    with pytest.raises(ValueError, match="stands for more than"):
        load_config(tmp_path / "loop.yaml")
    (tmp_path / "deep.yaml").write_text("[" * 5000)
    with pytest.raises(ValueError, match="is not valid YAML"):
        load_config(tmp_path / "deep.yaml")


# ---- the source itself

FORBIDDEN = {
    r"\bpickle\.\w|import pickle|cloudpickle|joblib|shelve|marshal": "pickles run code",
    r"torch\.load\((?!.*weights_only=True)": "torch.load reads pickles unless weights_only=True",
    r"np\.load\((?!.*allow_pickle=False)": "np.load reads pickles unless allow_pickle=False",
    r"allow_pickle\s*=\s*True|weights_only\s*=\s*False": "pickles run code",
    r"trust_remote_code": "it runs code from a hub",
    r"yaml\.(load|full_load|unsafe_load|Loader|UnsafeLoader)\b": "yaml.safe_load only",
    r"(?<![\w.])(eval|exec|__import__)\(": "files are never evaluated",
    r"shell\s*=\s*True|os\.system|os\.popen": "commands are lists, never shell text",
    r"extractall\(|unpack_archive": "archives are read member by member",
}


@pytest.mark.parametrize("pattern", FORBIDDEN, ids=FORBIDDEN.get)
def test_no_source_line_can_run_a_file(pattern):
    files = [*(ROOT / "ckf").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py"), ROOT / "setup.py"]
    assert len(files) > 50
    found = [
        f"{file.relative_to(ROOT)}:{number}: {line.strip()}"
        for file in files
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(pattern, line)
    ]
    assert not found, f"{FORBIDDEN[pattern]}: {found}"
