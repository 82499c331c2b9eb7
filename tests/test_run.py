"""A run from its folder: answers to requests, what is overwritten, and errors that help."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch

import ckf
from ckf.config_files import write_config
from ckf.run import Run, load_run, train_run
from ckf.run_folder import alone_in, opened_config, start_run, take_settings
from tests.ckf_fixtures import STEPS, quiet, read_log, settings, small_config

# ---- predict


REQUESTS = [
    {"task": "ctr", "user": "u3", "item": "i7"},
    {"task": "explain", "user": "u4", "item": "i9"},
    {"task": "topk", "user": "u5", "candidates": ["i1", "i8", "i20", "i33"]},
    {"task": "rating", "user": "u6", "item": "i2"},
    {"task": "ctr", "user": "nobody", "item": "i7", "history": ["i5", "i9"]},
    {"task": "review_rating", "user": "u7", "item": "i3", "review": "I hate this album."},
    {"task": "explain", "user": "nobody", "item": "i1", "history": []},
    {"task": "topk", "user": "nobody", "candidates": ["i1", "i2"], "history": ["i3"]},
]


def assert_same_reply(a, b):
    assert a.keys() == b.keys()
    for key, value in a.items():
        if key in ("text", "ranking"):
            assert value == b[key]
        else:
            np.testing.assert_allclose(value, b[key], rtol=1e-4, atol=1e-5)


def test_mixed_requests_get_what_each_gets_alone(small_run):
    replies = small_run.predict(REQUESTS)
    for request, reply in zip(REQUESTS, replies, strict=True):
        assert_same_reply(reply, small_run.predict([request])[0])
    for reply, backwards in zip(replies, small_run.predict(REQUESTS[::-1])[::-1], strict=True):
        assert_same_reply(reply, backwards)


def test_replies_have_their_shape(small_run):
    replies = small_run.predict(REQUESTS)
    assert set(replies[0]) == {"score", "probability"}
    assert replies[0]["probability"] == pytest.approx(1 / (1 + np.exp(-replies[0]["score"])))
    assert isinstance(replies[1]["text"], str)
    assert sorted(replies[2]["ranking"]) == sorted(REQUESTS[2]["candidates"])
    assert replies[2]["scores"] == sorted(replies[2]["scores"], reverse=True)
    assert 1 <= replies[3]["rating"] <= 5 and 1 <= replies[5]["rating"] <= 5
    assert small_run.predict([]) == []
    json.dumps(replies)  # plain values


def test_answers_are_those_of_the_evaluation(small_run):
    """A test row asked with its own history, or its time, has the score of the evaluation."""
    data = small_run.assembly.data
    frame = pl.read_parquet(small_run.folder / "predictions" / "ctr.parquet")
    for place in range(5):
        row = int(frame["row"][place])
        history = [data.item_ids[i] for i in data.history[row] if i >= 0]
        request = {"task": "ctr", "user": frame["user"][place], "item": frame["item"][place]}
        asked = [request | {"history": history}, request | {"time": int(data.time[row])}]
        for reply in small_run.predict(asked):
            assert reply["score"] == pytest.approx(frame["score"][place], abs=1e-4)


def test_a_known_user_is_asked_with_all_liked_items_but_those_asked_about(small_run):
    """Else a liked item is told by its own place in the history."""
    data = small_run.assembly.data
    user = data.user_ids.index("u3")
    liked = data.item[np.flatnonzero((data.user == user) & (data.label == 1))]
    own, two = data.item_ids[liked[-1]], [data.item_ids[i] for i in liked[-2:]]
    for request, asked in (
        (REQUESTS[0], [REQUESTS[0]["item"]]),
        (REQUESTS[0] | {"item": own}, [own]),
        ({"task": "topk", "user": "u3", "candidates": two}, two),
    ):
        history = [name for name in (data.item_ids[i] for i in liked) if name not in asked][-6:]
        plain = small_run.predict([request | {"user": "u3"}])[0]
        given = request | {"user": "u3", "history": history}
        assert_same_reply(plain, small_run.predict([given])[0])
    other = small_run.predict([given | {"history": history[:1]}])[0]
    assert other["scores"] != plain["scores"]


def test_a_request_looks_at_the_rows_of_its_user_alone(small_run, monkeypatch):
    """A shop has millions of rows and users: neither is gone through for every request."""
    run = Run(small_run.folder, small_run.assembly)
    data, plain = run.assembly.data, small_run.predict(REQUESTS)
    run.predict(REQUESTS[:1])

    class Touched(np.ndarray):
        def __getitem__(self, rows):
            seen.append(len(np.arange(len(self))[rows]))
            return np.asarray(self)[rows]

        def __eq__(self, _other):
            raise AssertionError("all rows compared")

    seen: list[int] = []
    monkeypatch.setattr(data, "user_ids", None)  # read once, when the first request came
    monkeypatch.setattr(data, "user", data.user.view(Touched))
    monkeypatch.setattr(data, "label", data.label.view(Touched))
    for reply, expected in zip(run.predict(REQUESTS), plain, strict=True):
        assert_same_reply(reply, expected)
    assert seen == [16] * 5  # five known users of 16 rows each


def test_no_request_keeps_logits_over_the_vocabulary(small_run, monkeypatch):
    kept = []
    plain = Run._reply
    monkeypatch.setattr(Run, "_reply", lambda *a: kept.append(a[2].shape) or plain(*a))
    small_run.predict(REQUESTS)
    assert kept == [(2,), (26,), (5,), (2,), (5,), (26,)]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"task": "click"}, ("'click'", "ctr")),
        ({"item": "i999"}, ("'i999'", "40 items")),
        ({"history": ["i1", "zz"]}, ("'zz'",)),
        ({"time": "now"}, ("time is 'now'", "seconds")),
        ({"history": "172"}, ("history is '172'", "list of item ids")),
        ({"histroy": ["i1"]}, ("'histroy'", "did you mean 'history'")),
        ({"task": "topk", "candidates": ["i1", "i2", "i1"]}, ("name an item twice",)),
        ({"task": "topk", "candidates": "i1"}, ("candidates is 'i1'",)),
        ({"user": "nobody"}, ("'nobody'", "history")),
        ({"item": None}, ("item",)),
        ({"task": "topk"}, ("candidates",)),
        ({"task": "topk", "candidates": ["i1"]}, ("1 candidates", "2 to 26")),
        ({"task": "topk", "candidates": [f"i{k}" for k in range(27)]}, ("27 candidates", "26")),
        ({"task": "review_rating"}, ("review",)),
        ({"task": "topk", "candidates": [f"i{k}" for k in range(26)]}, ("prompt.max_tokens",)),
    ],
)
def test_errors_name_the_request(small_run, change, words):
    bad = {k: v for k, v in (REQUESTS[0] | change).items() if v is not None}
    with pytest.raises(ValueError) as error:
        small_run.predict([REQUESTS[3], bad])
    assert "request 1" in str(error.value)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("bad", ["ctr", {"user": "u1", "item": "i1"}, None])
def test_what_is_no_request_is_named(small_run, bad):
    with pytest.raises(ValueError, match="request 0 lacks 'task'"):
        small_run.predict([bad])


def test_a_failed_pass_leaves_nothing_switched_off(small_run, monkeypatch):
    def broken(*_args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(small_run.assembly.model, "logits", broken)
    with pytest.raises(RuntimeError) as kept:  # keeps the frames of the failed pass alive
        small_run.predict(REQUESTS[:1])
    assert kept.traceback and not torch.is_inference_mode_enabled()
    small_run.assembly.model.train()
    with pytest.raises(RuntimeError):
        small_run.predict(REQUESTS[:1])
    assert small_run.assembly.model.training
    small_run.assembly.model.eval()


# ---- folders


def test_a_finished_run_is_not_trained_again(small_model, run_copy):
    lines = []
    train_run(small_config(small_model), run_copy, device="cpu", log=lines.append)
    assert any("trained already" in line for line in lines)
    assert len(read_log(run_copy)) == STEPS


def test_a_run_of_before_held_out_vectors_stays_as_it_was(small_model, run_copy):
    file = run_copy / "config.yaml"
    lines = file.read_text().splitlines()
    assert sum("held_out" in line for line in lines) == 1
    file.write_text("\n".join(line for line in lines if "held_out" not in line) + "\n")
    assert opened_config(run_copy).cf.held_out is False
    with pytest.raises(ValueError, match=r"other settings \(cf\.held_out: False, not True\)"):
        train_run(small_config(small_model), run_copy, log=quiet)
    config = small_config(small_model)
    config = replace(config, cf=replace(config.cf, held_out=False))
    lines = []
    train_run(config, run_copy, device="cpu", log=lines.append)
    assert any("trained already" in line for line in lines)


def test_a_run_with_other_settings_is_refused(small_model, run_copy):
    before = sorted(p.name for p in run_copy.iterdir())
    for changes in ({"train__steps": 9}, {"seed": 1}):
        with pytest.raises(ValueError, match="holds a run with other settings.*--overwrite"):
            train_run(small_config(small_model, **changes), run_copy, log=quiet)
        with pytest.raises(ValueError, match="other settings.*set them, or give another --out$"):
            start_run(small_config(small_model, **changes), run_copy)  # as an experiment does
    values = settings(small_model)
    values["tasks"] = dict(reversed(values["tasks"].items()))  # the order gives the task ids
    with pytest.raises(ValueError, match="other settings"):
        train_run(ckf.config_files.config_from_dict(values), run_copy, log=quiet)
    assert sorted(p.name for p in run_copy.iterdir()) == before


def test_a_run_that_was_not_trained_takes_mended_settings(small_model, raw_data, tmp_path):
    """A wrong setting that shows after the data are prepared costs neither them nor the CF fit."""
    wrong = small_config(small_model, lora__target_modules=["q_prj"])
    with pytest.raises(ValueError, match="match no linear"):
        train_run(wrong, tmp_path / "run", str(raw_data), device="cpu", log=quiet)
    made = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*.safetensors")}
    assert any(p.name == "cf.safetensors" for p in made) and len(made) > 3
    lines = []
    config = small_config(small_model, train__steps=1)
    train_run(config, tmp_path / "run", device="cpu", log=lines.append)
    assert any("takes new settings (lora.target_modules" in line for line in lines)
    assert all(p.stat().st_mtime_ns == time for p, time in made.items())
    with pytest.raises(ValueError, match="holds a run with other settings"):  # trained now
        train_run(small_config(small_model), tmp_path / "run", log=quiet)


def test_an_untrained_run_keeps_its_data_and_refits_other_vectors(small_model, run_copy):
    shutil.rmtree(run_copy / "checkpoints", ignore_errors=True)
    (run_copy / "run.json").unlink()
    config = small_config(small_model)
    take_settings(replace(config, cf=replace(config.cf, dim=3)), run_copy, quiet)
    assert not (run_copy / "cf.safetensors").exists()
    with pytest.raises(ValueError, match="other settings"):
        train_run(replace(config, seed=5), run_copy, log=quiet)


def test_a_model_that_moved_is_found_at_its_new_place(small_model, run_copy, tmp_path):
    config = small_config(small_model)
    gone = replace(config, model=replace(config.model, name=str(tmp_path / "gone")))
    write_config(gone, run_copy / "config.yaml")
    lines = []
    train_run(config, run_copy, device="cpu", log=lines.append)
    assert any("takes new settings (model.name" in line for line in lines)


def test_one_process_trains_in_a_folder(small_model, raw_data, tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from ckf.run_folder import alone_in\n"
        "with alone_in(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    )
    folder = tmp_path / "run"
    folder.mkdir()
    other = subprocess.Popen([sys.executable, "-c", code, folder], stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match="another process is training in"), alone_in(folder):
            pass
    finally:
        other.kill()
        other.wait()
    with alone_in(folder):  # the lock ends with the process
        pass


def test_overwriting_trains_anew(small_model, raw_data, run_copy):
    (run_copy / "metrics.json").write_text("{}")
    config = small_config(small_model, train__steps=1)
    run = train_run(config, run_copy, str(raw_data), device="cpu", overwrite=True, log=quiet)
    assert len(read_log(run.folder)) == 1 and not (run_copy / "metrics.json").exists()


@pytest.mark.parametrize("with_config", [True, False])
def test_overwriting_leaves_alone_what_no_run_wrote(small_model, tmp_path, with_config):
    (tmp_path / "thesis.tex").write_text("years of work")
    if with_config:
        (tmp_path / "config.yaml").write_text("name: mine\n")
    with pytest.raises(ValueError, match="--overwrite leaves it alone" if with_config else "not a"):
        train_run(small_config(small_model), tmp_path, overwrite=True, log=quiet)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_folder_with_other_files_is_refused(small_model, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other files; give another --out"):
        train_run(small_config(small_model), tmp_path, log=quiet)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_a_file_where_the_folder_should_be_is_refused(small_model, tmp_path):
    file = tmp_path / "run"
    file.write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="is a file"):
            train_run(small_config(small_model), file, overwrite=overwrite, log=quiet)
    assert file.read_text() == "mine"


@pytest.mark.parametrize("path", ["nowhere", None])
def test_missing_data_leave_nothing_behind(small_model, tmp_path, path):
    folder = tmp_path / "run"
    path = str(tmp_path / path) if path else None
    with pytest.raises(ValueError, match="nowhere does not exist" if path else "no data"):
        train_run(small_config(small_model), folder, path, log=quiet)
    assert not folder.exists()


def test_an_empty_split_is_named_and_leaves_nothing_behind(small_model, raw_data, tmp_path):
    config = small_config(small_model, tasks__ctr={"train": 80, "valid": 10, "test": 0})
    with pytest.raises(ValueError, match="the test split has no rows for ctr"):
        train_run(config, tmp_path / "run", str(raw_data), log=quiet)
    assert list(tmp_path.iterdir()) == []


def test_float16_is_refused_before_training(small_model, prepared, tmp_path):
    config = small_config(small_model, model__dtype="float16")
    with pytest.raises(ValueError, match="model.dtype is float16.* expected auto, float32 or bf"):
        train_run(config, tmp_path / "run", prepared=str(prepared), log=quiet)
    assert list(tmp_path.iterdir()) == []


def test_a_prompt_longer_than_the_models_window_is_named(small_model, prepared, tmp_path):
    config = small_config(small_model, prompt__max_tokens=300)
    with pytest.raises(ValueError, match="max_tokens is 300.* at most 256 tokens; lower it"):
        train_run(config, tmp_path / "run", prepared=str(prepared), log=quiet)


def test_a_prompt_without_room_is_named_before_training(
    small_model, prepared, tmp_path, monkeypatch
):
    monkeypatch.setattr("ckf.run.train", None)
    tasks = {"topk": {"train": 40, "valid": 10, "test": 12}}
    config = small_config(small_model, tasks=tasks, prompt__max_tokens=60)
    with pytest.raises(ValueError, match="topk prompt needs .* prompt.max_tokens is 60"):
        train_run(config, tmp_path / "run", prepared=str(prepared), device="cpu", log=quiet)


def test_prepared_data_lacking_a_task_are_named(small_model, small_run, raw_data, tmp_path):
    from ckf.data.prepare import prepare

    config = small_config(small_model, tasks={"ctr": None})
    prepare(config.data, config.tasks, str(raw_data), tmp_path / "data", 0, quiet)
    with pytest.raises(ValueError, match="no rows for task 'topk'.*add the task"):
        train_run(
            small_config(small_model), tmp_path / "run", prepared=str(tmp_path / "data"), log=quiet
        )
    assert not (tmp_path / "run").exists()


def test_opening_what_is_no_run_is_an_error(tmp_path, run_copy):
    with pytest.raises(ValueError, match="is not a run: it has no config.yaml"):
        load_run(tmp_path / "nowhere")
    (run_copy / "run.json").unlink()
    with pytest.raises(ValueError, match="not trained to the end; go on with: ckf train"):
        load_run(run_copy)


@pytest.mark.parametrize(
    "name, words",
    [
        ("cf.safetensors", "cf.safetensors is missing or damaged"),
        ("data/interactions.safetensors", "sha256"),
        ("adapters/ctr/adapter_model.safetensors", "not a readable safetensors file"),
        ("run.json", "run.json is missing or broken"),
        ("config.yaml", "the setting data is missing"),
    ],
)
def test_damaged_files_are_named(run_copy, name, words):
    file = run_copy / name
    os.truncate(file, len("name:") if name == "config.yaml" else file.stat().st_size // 2)
    with pytest.raises(ValueError, match=words):
        load_run(run_copy).evaluate(quiet)


def test_a_damaged_run_json_is_named_once(run_copy):
    (run_copy / "run.json").write_text("{")
    with pytest.raises(ValueError, match="run.json is missing or broken") as error:
        load_run(run_copy)
    assert str(error.value).count("train the run again") == 1


def test_a_run_opens_where_its_model_lies_elsewhere(small_run, small_model, run_copy, tmp_path):
    file = run_copy / "config.yaml"
    saved = file.read_text().replace(str(small_model), str(tmp_path / "gone"))
    file.write_text(saved)
    with pytest.raises(ValueError, match="gone', but there is no such folder; .*--model FOLDER"):
        load_run(run_copy)
    run = load_run(run_copy, model=str(small_model))
    for request, reply in zip(REQUESTS, run.predict(REQUESTS), strict=True):
        assert_same_reply(reply, small_run.predict([request])[0])
    assert file.read_text() == saved


def test_an_opened_run_takes_other_settings_of_its_evaluation_alone(run_copy):
    run = load_run(run_copy, overrides=["evaluate.batch_tokens=64"])
    assert run.config.evaluate.batch_tokens == 64 and run.config.evaluate.bootstrap == 20
    for wrong in ("train.steps=3", "evaluate=3"):
        with pytest.raises(ValueError, match=f"'{wrong}': of a finished run only evaluate"):
            load_run(run_copy, overrides=[wrong])


def test_load_run_is_a_name_of_the_package(run_copy):
    assert ckf.load_run(run_copy).config.name == "small"
