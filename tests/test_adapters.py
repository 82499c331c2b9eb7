"""Adapters on disk: PEFT files, all-or-nothing loading, export, refusals."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

import ckf
from tests.test_patch import TASKS, logits, patched
from tests.tiny import FAMILIES, randomise_adapters, tiny_model, tokens


def adapter_values(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("options", [{}, {"gate": "learned"}, {"shared_r": 0}])
def test_round_trip(options, tmp_path):
    model, other = patched(**options), patched(**options)
    randomise_adapters(model)
    ckf.save_adapters(model, tmp_path / "a")
    ckf.load_adapters(other, tmp_path / "a")
    expected, values = adapter_values(model), adapter_values(other)
    assert expected.keys() == values.keys()
    assert all(torch.equal(expected[n], values[n]) for n in expected)


def test_saving_again_replaces_and_leaves_nothing_behind(tmp_path):
    model = patched()
    ckf.save_adapters(model, tmp_path / "a")
    randomise_adapters(model)
    ckf.save_adapters(model, tmp_path / "a")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == sorted(
        ["ckf.json", "shared", *TASKS]
    )


def test_a_failed_save_keeps_the_old_adapters(tmp_path, monkeypatch):
    model = patched()
    ckf.save_adapters(model, tmp_path / "a")
    before = (tmp_path / "a/shared/adapter_model.safetensors").read_bytes()
    randomise_adapters(model)

    def full(*_args, **_kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("ckf.adapters.save_file", full)
    with pytest.raises(OSError, match="No space"):
        ckf.save_adapters(model, tmp_path / "a")
    assert (tmp_path / "a/shared/adapter_model.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_saving_over_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="holds other files"):
        ckf.save_adapters(patched(), tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "mine"


@pytest.mark.parametrize("damage", ["missing", "garbage", "shape", "key", "extra", "settings"])
def test_a_wrong_file_changes_nothing(damage, tmp_path):
    model = patched()
    ckf.save_adapters(model, tmp_path / "a")
    file = tmp_path / "a/rating/adapter_model.safetensors"
    tensors = load_file(file)
    key = min(tensors)
    if damage == "missing":
        file.unlink()
    elif damage == "garbage":
        file.write_bytes(b"not safetensors")
    elif damage == "settings":
        (tmp_path / "a/ckf.json").write_text("{")
    else:
        if damage == "shape":
            tensors[key] = torch.zeros(3, 3)
        elif damage == "key":
            del tensors[key]
        else:
            tensors["surprise"] = torch.zeros(1)
        save_file(tensors, file)
    randomise_adapters(model)
    before = adapter_values(model)
    with pytest.raises(ValueError, match=str(tmp_path)):
        ckf.load_adapters(model, tmp_path / "a")
    assert all(torch.equal(before[n], v) for n, v in adapter_values(model).items())


def test_other_tasks_are_refused_by_name(tmp_path):
    ckf.save_adapters(patched(), tmp_path / "a")
    with pytest.raises(ValueError, match="for tasks ctr, topk, rating; the model .* a, b"):
        ckf.load_adapters(patched(tasks=["a", "b"]), tmp_path / "a")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"tasks": {"ctr": 2, "topk": 5, "rating": 3}, "shared_r": 6},
        {"gate": "learned"},
    ],
    ids=["plain", "rslora", "ranks", "learned"],
)
def test_export_is_one_ordinary_lora(family, options, tmp_path):
    model = patched(family, **options)
    randomise_adapters(model)
    expected = logits(model, tokens(), task_ids=["topk"] * 4)
    ckf.export_peft(model, "topk", tmp_path / "topk")
    config = json.loads((tmp_path / "topk/adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"] and not config["use_rslora"]
    judged = PeftModel.from_pretrained(tiny_model(family), tmp_path / "topk")
    torch.testing.assert_close(logits(judged, tokens()), expected, rtol=2e-4, atol=2e-5)


def test_export_pads_where_shared_and_task_differ(tmp_path):
    model = patched(shared_modules=["k_proj", "v_proj"], task_modules=["q_proj", "v_proj"])
    randomise_adapters(model)
    expected = logits(model, tokens(), task_ids=["ctr"] * 4)
    ckf.export_peft(model, "ctr", tmp_path / "ctr")
    judged = PeftModel.from_pretrained(tiny_model(), tmp_path / "ctr")
    torch.testing.assert_close(logits(judged, tokens()), expected, rtol=2e-4, atol=2e-5)
    ranks = {
        t.shape[0]
        for n, t in load_file(tmp_path / "ctr/adapter_model.safetensors").items()
        if "lora_A" in n
    }
    assert ranks == {8}


def test_merge_refuses_a_tied_weight():
    model = patched()
    layer = model.model.layers[0].self_attn
    layer.k_proj.base_layer.weight = layer.v_proj.base_layer.weight
    with pytest.raises(ValueError, match="shares its weight"):
        ckf.merge_task(model, "ctr")


def test_unknown_task_is_refused_everywhere(tmp_path):
    model = patched()
    for call in (
        lambda: ckf.export_peft(model, "news", tmp_path / "x"),
        lambda: ckf.merge_task(model, "news"),
    ):
        with pytest.raises(ValueError, match="unknown task 'news'"):
            call()
    assert not (tmp_path / "x").exists()
