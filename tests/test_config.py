"""Settings: every mistake is named with its key, the value met and what was expected."""

from pathlib import Path

import pytest
import yaml

from ckf.config_files import (
    config_from_dict,
    config_to_dict,
    load_config,
    own_configs,
    write_config,
)
from tests.ckf_fixtures import settings

MODEL = Path("a-model")
CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


def build(**changes):
    return config_from_dict(settings(MODEL, **changes))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(settings(MODEL), sort_keys=False))
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_that_comes_along_is_valid(path):
    config = load_config(path)
    assert config.name == path.stem


def test_configs_that_come_along_go_by_name(tmp_path, monkeypatch):
    assert "demo" in {p.stem for p in CONFIGS}
    assert list(own_configs()) == [p.stem for p in CONFIGS]
    monkeypatch.chdir(tmp_path)
    assert load_config("demo", ["train.steps=3"]).train.steps == 3
    with pytest.raises(
        ValueError, match=r"config configs/demo.yaml: .*ckf brings .*demo, .*: name"
    ):
        load_config("configs/demo.yaml")
    (tmp_path / "demo").mkdir()
    assert load_config("demo").name == "demo"
    (tmp_path / "demo").rmdir()
    (tmp_path / "demo").write_text("name: mine\n")  # one's own file comes first
    with pytest.raises(ValueError, match="data is missing"):
        load_config("demo")


def test_resolved_settings_read_back_equal(tmp_path):
    config = build(train__packing=False, lora__ranks={"ctr": 3}, lora__target_modules=["q_proj"])
    write_config(config, tmp_path / "config.yaml")
    again = load_config(tmp_path / "config.yaml")
    assert again == config
    assert list(again.tasks) == list(config.tasks)  # their order gives the task ids
    assert config_to_dict(again)["lora"]["ranks"] == {"ctr": 3}


def test_defaults_fill_what_is_left_out():
    config = config_from_dict(
        {
            "name": "x",
            "model": {"name": "m"},
            "data": {"name": "d", "format": "movielens-100k"},
            "tasks": {"ctr": None},
        }
    )
    assert (config.seed, config.lora.gate, config.metanet.kind) == (0, "hard", "meta")
    assert config.tasks["ctr"].train is None


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"train__stepz": 3}, ("train.stepz", "'steps'")),
        ({"promt": {}}, ("promt", "'prompt'")),
        ({"data__split__tset": 0.1}, ("data.split.tset", "'test'")),
        ({"tasks__ctr__trian": 5}, ("tasks.ctr.trian", "'train'")),
        ({"tasks": {"crt": None}}, ("'crt'", "'ctr'")),
        ({"lora__ranks": {"topkk": 3}}, ("'topkk'", "'topk'")),
        ({"lora__gate": "lerned"}, ("lora.gate", "'learned'")),
        ({"lora__backend": "tritn"}, ("lora.backend", "'triton'")),
        ({"metanet__kind": "mete"}, ("metanet.kind", "'meta'")),
        ({"prompt__rank_by": "titel"}, ("prompt.rank_by", "'title'")),
        ({"train__schedule": "join"}, ("train.schedule", "'joint'")),
        ({"model__dtype": "bfloat"}, ("model.dtype", "'bfloat16'")),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_a_misspelt_word_is_named_with_the_nearest(changes, words):
    with pytest.raises(ValueError) as error:
        build(**changes)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"train__steps": "many"}, ("train.steps", "'many'", "int")),
        ({"train__steps": 2.5}, ("train.steps", "2.5")),
        ({"train__steps": True}, ("train.steps", "True")),
        ({"train__lr": "fast"}, ("train.lr", "'fast'", "float")),
        ({"train": [1]}, ("train", "[1]", "group of settings")),
        ({"tasks": ["ctr"]}, ("tasks", "['ctr']")),
        ({"tasks": {}}, ("tasks", "ctr")),
        ({"tasks__ctr": 5}, ("tasks.ctr", "5")),
        ({"model__name": 7}, ("model.name", "7")),
        ({"train__packing": "sometimes"}, ("train.packing", "'sometimes'")),
        ({"lora__target_modules": 3}, ("lora.target_modules", "3")),
        ({"data__test_lists": [3]}, ("data.test_lists", "3")),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_a_value_of_the_wrong_kind_is_named(changes, words):
    with pytest.raises(ValueError) as error:
        build(**changes)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    "key, value",
    [
        ("seed", -1),
        ("seed", 2**32),
        ("train__steps", 0),
        ("train__steps", -4),
        ("train__batch_size", 0),
        ("train__accumulation", 0),
        ("train__save_every", 0),
        ("train__log_every", 0),
        ("train__lr", 0.0),
        ("train__lr", -1e-3),
        ("train__lr", float("nan")),
        ("train__lr", float("inf")),
        ("train__vector_lr", 0.0),
        ("train__weight_decay", -0.1),
        ("train__warmup", -0.1),
        ("train__warmup", 1.5),
        ("train__max_grad_norm", -1.0),
        ("train__temperature", 0.0),
        ("train__temperature", -1.0),
        ("train__curriculum_middle", -0.1),
        ("train__curriculum_middle", 1.1),
        ("train__curriculum_sharpness", 0.0),
        ("train__workers", -1),
        ("prompt__history_titles", -1),
        ("prompt__max_tokens", 0),
        ("prompt__max_answer_tokens", 1),
        ("metanet__hidden", 0),
        ("evaluate__batch_tokens", 0),
        ("evaluate__bootstrap", -1),
        ("lora__r", 0),
        ("lora__shared_r", -1),
        ("lora__lora_alpha", 0.0),
        ("lora__lora_dropout", 1.0),
        ("lora__lora_dropout", -0.1),
        ("lora__ranks", {"ctr": 0}),
    ],
)
def test_an_impossible_number_is_named_with_what_is_possible(key, value):
    with pytest.raises(ValueError) as error:
        build(**{key: value})
    assert key.replace("__", ".") in str(error.value)
    shown = value["ctr"] if isinstance(value, dict) else value
    assert str(shown) in str(error.value) and "expected" in str(error.value)


def test_the_ends_of_the_ranges_are_allowed():
    build(
        train__steps=1, train__warmup=0.0, train__curriculum_middle=1.0, train__workers=0,
        train__weight_decay=0.0, train__max_grad_norm=0.0, prompt__history_titles=0,
        evaluate__bootstrap=0, lora__shared_r=0, lora__lora_dropout=0.0, seed=2**32 - 1,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["a/b", "/tmp/a", "..", ".", "", "a\\b", "a\0"])
def test_a_name_is_that_of_one_folder(name):
    with pytest.raises(ValueError, match="name is .*; expected the name of one folder"):
        build(name=name)
    assert build(name="été 2.5").name == "été 2.5"


def test_more_titles_than_the_data_keep_is_an_error():
    with pytest.raises(ValueError, match="history_titles is 7.*data.history = 6"):
        build(prompt__history_titles=7)


def test_letters_name_at_most_26_candidates():
    for changes in (
        {"data__test_lists": ["uniform9", "uniform99"]},
        {"data__train_list": "popular99"},
    ):
        with pytest.raises(ValueError, match="99 has 100 candidates.*26.*rank_by: title"):
            build(**changes)
        build(**changes, prompt__rank_by="title")
        build(**changes, tasks={"ctr": None})  # nobody reads the lists


def test_letters_that_training_never_shows_are_an_error():
    changes = {"data__test_lists": ["uniform9", "uniform19"]}
    with pytest.raises(ValueError, match="uniform9 shows 10, so 10 of.*train_list: uniform19"):
        build(**changes)
    build(**changes, data__train_list="uniform19")
    build(**changes, prompt__rank_by="title")
    build(**changes, tasks={"ctr": None})


def test_overrides_reach_into_groups(file):
    config = load_config(
        file, ["train.steps=3", "train.lr=1e-4", "data.split.test=0.3", "tasks.ctr.train=null"]
    )
    assert (config.train.steps, config.train.lr) == (3, 1e-4)
    assert (config.data.split.test, config.tasks["ctr"].train) == (0.3, None)
    assert load_config(file, ["lora.target_modules=[q_proj]"]).lora.target_modules == ["q_proj"]


def test_an_override_reaches_into_an_empty_group(file):
    file.write_text(yaml.safe_dump(settings(MODEL) | {"lora": None}))
    assert load_config(file, ["lora.r=3"]).lora.r == 3


@pytest.mark.parametrize(
    "override, words",
    [
        ("train.steps", ("'train.steps'", "'='", "train.steps=20")),
        ("train.steps=many", ("train.steps", "'many'")),
        ("train.stepz=3", ("train.stepz", "'steps'")),
        ("name.x=3", ("name.x", "not a group")),
        ("data.test_lists=[a", ("data.test_lists=[a", "YAML")),
    ],
)
def test_a_bad_override_is_named(file, override, words):
    with pytest.raises(ValueError) as error:
        load_config(file, [override])
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    "content, words",
    [
        (None, "cannot read"),
        (b"a: [1\nb: {", "not valid YAML"),
        (b"", "holds no settings"),
        (b"- 1\n- 2\n", "holds no settings"),
        (b"\xff\xfe\x00", "cannot read"),
        (b"name: x\n", "data is missing"),
    ],
)
def test_a_file_that_is_no_config_is_named(tmp_path, content, words):
    path = tmp_path / "odd.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=words) as error:
        load_config(path)
    assert "odd.yaml" in str(error.value) or "missing" in words


def test_the_page_of_settings_is_what_the_command_prints(capsys):
    from ckf.cli import main

    assert main(["settings"]) == 0
    said = capsys.readouterr().out
    page = Path(__file__).parent.parent / "docs" / "settings.md"
    assert said == page.read_text(encoding="utf-8"), "ckf settings > docs/settings.md"
    for key in ("tasks.TASK.train", "data.split.kind", "cf.held_out", "train.curriculum_middle"):
        assert f"| `{key}` |" in said
    assert "| `train.lr` | number | `0.001` |" in said and "| `model.name` | text |  |" in said
