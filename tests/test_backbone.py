"""Loading: a download's file is unpacked once; models that cannot read prompts are refused."""

import warnings

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    FalconH1Config,
    Gemma3nTextConfig,
    RwkvConfig,
)

from ckf import backbone
from ckf.config import ModelConfig
from tests.tiny import FAMILIES, tiny_model

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
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


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + bytes(40), b"<html>not found</html>"])
def test_a_damaged_file_is_one_clear_error(tmp_path, content):
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    with pytest.raises(ValueError, match="cannot load the model '.*model.gguf'"):
        backbone.load_backbone(ModelConfig(name=str(file)), torch.device("cpu"))


@pytest.mark.parametrize("family", FAMILIES)
def test_models_that_read_embeddings_as_tokens_pass(family):
    model = tiny_model(family).train()
    state = torch.get_rng_state()
    backbone.check_reads_embeddings(model)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def scales_tokens_alone():
    config = FalconH1Config(
        **SIZES, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
        embedding_multiplier=5.66, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8,
        mamba_d_state=8, mamba_n_groups=1,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def reads_padding():
    config = RwkvConfig(**SIZES, attention_hidden_size=32, context_length=64)
    return AutoModelForCausalLM.from_config(config)


def looks_tokens_up_again():
    config = Gemma3nTextConfig(
        **SIZES, intermediate_size=[48, 48], num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, vocab_size_per_layer_input=64, hidden_size_per_layer_input=8,
        num_kv_shared_layers=0, laurel_rank=4, layer_types=["full_attention"] * 2,
        activation_sparsity_pattern=[0.0, 0.0],
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if "correct_output_scale" in name:  # zeros at first
            torch.nn.init.normal_(parameter, 1.0, 0.1)
    return model


@pytest.mark.parametrize("make", [scales_tokens_alone, reads_padding, looks_tokens_up_again])
def test_models_that_do_not_are_refused(make):
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    name = type(model).__name__
    with pytest.raises(ValueError, match=f"{name} answers embeddings .* otherwise"):
        backbone.check_reads_embeddings(model)
    assert not model.training
