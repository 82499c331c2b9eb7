"""A download's file is unpacked once; the same weights and tokens come back from the folder."""

import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ckf import backbone

GGUF = {"gguf_file": "model.gguf"}


@pytest.fixture
def loads(small_model, monkeypatch):
    """Calls of the loader, which takes small_model for any GGUF file."""
    calls = []

    def load(folder, options, dtype):
        calls.append((folder, options, dtype))
        model = AutoModelForCausalLM.from_pretrained(small_model, dtype=dtype)
        return model, AutoTokenizer.from_pretrained(small_model)

    monkeypatch.setattr(backbone, "_load", load)
    return calls


@pytest.mark.parametrize("broken", [False, True])
def test_a_file_is_unpacked_once_with_the_same_weights_and_tokens(
    small_model, loads, tmp_path, broken
):
    if broken:
        (tmp_path / "float32").mkdir()
        (tmp_path / "float32" / "model.safetensors").write_bytes(b"cut")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folder, options = backbone.unpacked(tmp_path, GGUF)
        assert backbone.unpacked(tmp_path, GGUF) == (folder, options)
    assert loads == [(tmp_path, GGUF, torch.float32)]
    assert options == {} and [p.name for p in tmp_path.iterdir()] == ["float32"]
    own = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    wanted = AutoModelForCausalLM.from_pretrained(small_model, dtype=torch.float32).state_dict()
    assert own.keys() == wanted.keys()
    assert all(torch.equal(own[name], wanted[name]) for name in own)
    text = "Did the user like it? Yes"
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in (folder, small_model)]
    assert tokenizers[0](text) == tokenizers[1](text)


def test_a_folder_that_cannot_be_written_costs_a_warning(loads, tmp_path):
    with pytest.warns(UserWarning, match="cannot keep the model unpacked.*CKF_CACHE"):
        folder, options = backbone.unpacked(tmp_path / "gone", GGUF)
    assert (folder, options) == (str(tmp_path / "gone"), GGUF)


def test_another_process_that_was_faster_is_no_error(loads, tmp_path, monkeypatch):
    def lost_the_race(source, target):
        target.mkdir()
        (target / "config.json").write_text("{}")
        raise OSError("not empty")

    monkeypatch.setattr(backbone.os, "replace", lost_the_race)
    assert backbone.unpacked(tmp_path, GGUF) == (str(tmp_path / "float32"), {})
