"""The command line: what works, and every mistake as one message and exit code 2."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ckf.cli import main
from tests.ckf_fixtures import TASKS, settings

ROOT = Path(__file__).parent.parent


@pytest.fixture
def config_file(small_model, tmp_path):
    """Writes the small settings with changes into a file, gives its path."""

    def write(**changes):
        file = tmp_path / "small.yaml"
        file.write_text(yaml.safe_dump(settings(small_model, **changes), sort_keys=False))
        return str(file)

    return write


@pytest.fixture
def fails(capsys):
    """Runs a command that must fail with code 2 and one message; gives the message."""

    def run(*arguments):
        capsys.readouterr()
        assert main([str(a) for a in arguments]) == 2
        error = capsys.readouterr().err
        message = error[error.index("ckf: ") :]
        assert "Traceback" not in error and message.count("ckf: ") == 1
        return message

    return run


def test_train_evaluate_report_and_export(config_file, raw_data, tmp_path, capsys):
    out = tmp_path / "run"
    config = config_file(train__steps=2, evaluate__untrained=False)
    assert main(["train", config, "--data", str(raw_data), "--out", str(out)]) == 0
    assert "report:" in capsys.readouterr().out
    first = json.loads((out / "metrics.json").read_text())
    assert (out / "report.html").stat().st_size > 1000
    assert {p.stem for p in (out / "predictions").iterdir()} == set(TASKS)

    assert main(["evaluate", str(out)]) == 0
    again = json.loads((out / "metrics.json").read_text())
    assert again["test"] == first["test"] and again["baselines"] == first["baselines"]

    capsys.readouterr()
    assert main(["evaluate", str(out), "--baselines"]) == 0
    assert json.loads(capsys.readouterr().out) == first["baselines"]

    (out / "report.html").unlink()
    assert main(["report", str(out)]) == 0 and (out / "report.html").exists()

    assert main(["export", str(out), "--task", "ctr"]) == 0
    assert (out / "export" / "ctr" / "adapter_model.safetensors").exists()
    assert not (out / "export" / "topk").exists()
    assert "without the CF vectors in the prompt;" in capsys.readouterr().out

    assert main(["train", str(out / "config.yaml")]) == 0  # a finished run, by its own config
    assert "trained already" in capsys.readouterr().out


def test_prepared_data_train_without_the_raw_files(config_file, raw_data, tmp_path):
    config = config_file(train__steps=1)
    data, out = tmp_path / "prepared", tmp_path / "run"
    assert main(["prepare", config, "--data", str(raw_data), "--out", str(data)]) == 0
    command = ["train", config, "--prepared", str(data), "--out", str(out), "--no-evaluate"]
    assert main(command) == 0
    assert (out / "run.json").exists() and not (out / "metrics.json").exists()


def test_the_run_is_named_after_its_config(config_file, raw_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["train", config_file(), "--data", str(raw_data), "--no-evaluate"]
    assert main([*command, "--set", "train.steps=1"]) == 0
    saved = yaml.safe_load((tmp_path / "runs" / "small" / "config.yaml").read_text())
    assert saved["train"]["steps"] == 1 and saved["train"]["batch_size"] == 10


def test_info_tells_versions_and_backends(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for word in ("ckf ", "torch ", "GPU", "backend torch: usable", "backend cuda: ", "CUDA ext"):
        assert word in out
    assert "csrc's product for Hopper (plan gemm): " in out


@pytest.mark.parametrize(
    "changes, options, words",
    [
        ({"train__stepz": 3}, [], ("train.stepz", "'steps'")),
        ({"tasks": {"clicks": None}}, [], ("'clicks'", "ctr")),
        ({"train__steps": "many"}, [], ("train.steps", "'many'", "int")),
        ({"train__lr": 0}, [], ("train.lr is 0", "above 0")),
        ({}, ["--set", "train.steps"], ("'train.steps'", "'='")),
        ({}, ["--set", "train.stepz=1"], ("train.stepz", "'steps'")),
        ({}, ["--set", "data.test_lists=[a"], ("YAML",)),
        ({}, ["--data", "nowhere"], ("nowhere does not exist",)),
        ({}, [], ("no data", "--data")),
        ({}, ["--prepared", "nowhere"], ("nowhere is not a prepared data folder",)),
        ({}, ["--device", "gpu9"], ("'gpu9'", "cpu, cuda")),
        ({"prompt__history_titles": 9}, [], ("history_titles is 9", "data.history")),
        ({"data__test_lists": ["uniform99"]}, [], ("100 candidates", "rank_by: title")),
        ({"data__test_lists": ["uniform7"]}, [], ("uniform7", "uniform9")),
        ({"data__columns": {"user": "customer"}}, [], ("data.columns lacks", "item")),
    ],
    ids=lambda v: str(v)[:30] if isinstance(v, dict | list) else "",
)
def test_a_mistake_is_one_message_and_leaves_nothing(
    config_file, fails, tmp_path, monkeypatch, changes, options, words
):
    monkeypatch.chdir(tmp_path)
    message = fails("train", config_file(**changes), "--out", "run", *options)
    for word in words:
        assert word in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"tasks__ctr__test": 0}, ("test split has no rows for ctr",)),
        ({"data__split": {"kind": "leave_last_out"}, "tasks__ctr__train": 0}, ("train split",)),
        ({"data__columns__text": "comment"}, ("no column 'comment'", "review")),
        ({"data__format": "movielens-100k", "data__columns": None}, ("u.data",)),
        ({"data__test_lists": ["uniform19", "popular99"], "prompt__rank_by": "title"}, ("liked",)),
    ],
    ids=lambda v: str(v)[:30] if isinstance(v, dict) else "",
)
def test_data_that_do_not_fit_are_one_message_and_leave_nothing(
    config_file, fails, raw_data, tmp_path, changes, words
):
    out = tmp_path / "run"
    message = fails("train", config_file(**changes), "--out", out, "--data", raw_data)
    for word in words:
        assert word in message
    assert not out.exists()


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"prompt__max_tokens": 300}, ("prompt.max_tokens is 300", "256")),
        ({"prompt__max_tokens": 40}, ("prompt.max_tokens is 40", "raise it")),
        ({"lora__target_modules": ["q_prj"]}, ("q_prj", "q_proj")),
        ({"lora__target_modules": "q_proj("}, ("'q_proj('", "regular expression")),
        ({"lora__backend": "cuda"}, ("cuda",)),
        ({"model__name": "./nowhere"}, ("'./nowhere'", "no such folder")),
        ({"model__name": "no.gguf"}, ("'no.gguf'", "no such file")),
        ({"cf": {"kind": "file", "users": "u.npy", "items": "i.npy"}}, ("u.npy",)),
    ],
    ids=lambda v: str(v)[:30] if isinstance(v, dict) else "",
)
def test_a_model_that_does_not_fit_is_one_message(
    config_file, fails, prepared, tmp_path, changes, words
):
    out = tmp_path / "run"
    message = fails("train", config_file(**changes), "--out", out, "--prepared", prepared)
    for word in words:
        assert word in message
    assert not (out / "run.json").exists() and not (out / "adapters").exists()


@pytest.mark.parametrize("content", [None, "a: [1\nb: {", ""])
def test_a_config_that_is_none_is_one_message(fails, tmp_path, content):
    file = tmp_path / "odd.yaml"
    if content is not None:
        file.write_text(content)
    assert "odd.yaml" in fails("train", file, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_something_else_is_left_alone(config_file, fails, raw_data, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    command = ["train", config_file(), "--data", raw_data, "--out", out]
    assert "holds other files" in fails(*command)
    assert "is not a run" in fails(*command, "--overwrite")
    assert [p.name for p in out.iterdir()] == ["thesis.tex"]


def test_a_run_with_other_settings_is_left_alone(config_file, fails, run_copy):
    before = {p.name for p in run_copy.iterdir()}
    message = fails("train", config_file(), "--out", run_copy, "--set", "train.steps=9")
    assert "other settings" in message and "--overwrite" in message
    assert {p.name for p in run_copy.iterdir()} == before


@pytest.mark.parametrize("command", ["evaluate", "report", "export"])
def test_a_folder_that_is_no_run_is_one_message(fails, tmp_path, command):
    assert str(tmp_path) in fails(command, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_evaluate_and_export_take_the_model_from_elsewhere(small_model, run_copy, fails, tmp_path):
    file = run_copy / "config.yaml"
    file.write_text(file.read_text().replace(str(small_model), str(tmp_path / "gone")))
    for command in ("evaluate", "export"):
        assert "gone" in fails(command, run_copy)
    cheap = ["--set", "evaluate.untrained=false", "--set", "evaluate.bootstrap=2"]
    assert main(["evaluate", str(run_copy), "--model", str(small_model), *cheap]) == 0
    assert "untrained" not in json.loads((run_copy / "metrics.json").read_text())
    assert main(["export", str(run_copy), "--model", str(small_model), "--task", "ctr"]) == 0
    assert "train.steps" in fails("evaluate", run_copy, "--set", "train.steps=3")


def test_exporting_an_unknown_task_names_the_known(fails, run_copy):
    message = fails("export", run_copy, "--task", "clicks")
    assert "'clicks'" in message and "review_rating" in message


def test_an_interruption_says_how_to_go_on(config_file, prepared, monkeypatch, tmp_path, capsys):
    def stop(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("ckf.run.train", stop)
    command = ["train", config_file(), "--prepared", str(prepared), "--out", str(tmp_path / "run")]
    assert main(command) == 130
    assert "goes on from the last checkpoint" in capsys.readouterr().err


def test_an_unknown_model_name_without_a_network_is_one_message(config_file, prepared, tmp_path):
    """A fresh process, as a user has it: no stack trace, exit code 2."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    config = config_file(model__name="nobody/no-such-model")
    done = subprocess.run(
        [sys.executable, "-m", "ckf.cli", "train", config]
        + ["--prepared", str(prepared), "--out", str(tmp_path / "run")],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "cannot load the model 'nobody/no-such-model'" in done.stderr
    assert "a folder with config.json, a .gguf file" in done.stderr


def test_a_command_is_needed(capsys):
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2 and "COMMAND" in capsys.readouterr().err


def test_a_reader_that_has_enough_is_told_nothing():
    """As in ckf settings | head -1."""
    run = subprocess.Popen(
        [sys.executable, "-m", "ckf.cli", "settings"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    run.stdout.close()  # while Python still starts
    said = run.stderr.read()
    assert run.wait() == 141 and "ipe" not in said, said
