"""What patch_model finds to patch, what it leaves out and says so, what it refuses by name."""

import warnings

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    ViTConfig,
    ViTModel,
)

import ckf
from ckf.patch import patched_layers
from tests.test_patch import TASKS
from tests.tiny import randomise_adapters, tiny_model


class OtherLinear(nn.Module):
    """Looks like a linear, and derives from none."""

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features = 4, 4
        self.packed = nn.Parameter(torch.zeros(4, 4))


@pytest.mark.parametrize("gate", ["hard", "learned"])
@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.ReLU()), "Sequential has no linear to patch"),
        (nn.Sequential(OtherLinear()), "Sequential has no linear to patch"),
        (nn.Linear(3, 4), r"the model is itself a Linear.*nn.Sequential\(model\)"),
    ],
    ids=["none", "other kinds", "itself"],
)
def test_nothing_to_patch_is_an_error(model, message, gate):
    with pytest.raises(ValueError, match=message):
        ckf.patch_model(model, TASKS, gate=gate)
    assert not ckf.is_patched(model) and all(p.requires_grad for p in model.parameters())


def test_what_looks_like_a_linear_and_stays_out_is_named_once():
    model = nn.Sequential(nn.Linear(4, 4), OtherLinear())
    with pytest.warns(UserWarning, match=r"no LoRA for 1 \(OtherLinear\): .*nn.Linear") as said:
        ckf.patch_model(model, TASKS)
    assert len(said) == 1 and list(patched_layers(model)) == ["0"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ckf.patch_model(ckf.unpatch_model(model), TASKS, target_modules=["0"])
        ckf.patch_model(tiny_model(), TASKS)


@pytest.mark.parametrize("where", ["target_modules", "shared_modules", "task_modules"])
@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["q_proj", "v_porj"], "names 'v_porj', which matches no linear.*did you mean v_proj"),
        (["q_proj", "zzz"], "names 'zzz', which matches no linear of this model; it has down_proj"),
    ],
)
def test_every_entry_of_a_list_matches_something(where, names, message):
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        ckf.patch_model(model, TASKS, **{where: names})
    assert not ckf.is_patched(model)


@pytest.mark.parametrize("targets", ["all-linear", ["a"], ["b"], "[ab]"])
def test_a_linear_under_two_names_is_refused(targets):
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "c": nn.Linear(8, 8)})
    model["b"] = model["a"]
    with pytest.raises(ValueError, match="a and b are one linear under 2 names"):
        ckf.patch_model(model, TASKS, target_modules=targets)
    ckf.patch_model(model, TASKS, target_modules=["c"])


def test_a_block_under_two_names_is_patched_once():
    block = nn.Sequential(nn.Linear(8, 8))
    model = ckf.patch_model(nn.Sequential(block, nn.ReLU(), block), TASKS, r=2)
    assert list(patched_layers(model)) == ["0.0"] and model[2][0] is model[0][0]
    assert model(torch.randn(3, 8), task_ids=TASKS).shape == (3, 8)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_classification_head_is_an_output_layer(family):
    config = tiny_model(family).config
    model = AutoModelForSequenceClassification.from_config(config)
    heads = ("lm_head", "score", "classifier")
    ckf.patch_model(model, TASKS, r=2)
    assert patched_layers(model) and not any(n.startswith(heads) for n in patched_layers(model))
    ckf.patch_model(ckf.unpatch_model(model), TASKS, target_modules=["score"])
    assert list(patched_layers(model)) == ["score"]


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(2, 4, 4))


def test_targeted_moe_parameters_raise():
    model = nn.ModuleDict({"experts": Experts(), "proj": nn.Linear(4, 4)})
    with pytest.raises(ValueError, match="expert weights in one 3-D parameter"):
        ckf.patch_model(model, ["a"])
    ckf.patch_model(model, ["a"], target_modules=["proj"])


def test_three_dimensions_alone_are_no_experts():
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    vit = ViTModel(ViTConfig(hidden_size=32, image_size=8, patch_size=4, **sizes))
    assert ckf.is_patched(ckf.patch_model(vit, TASKS, r=2))  # cls_token (1, 1, 32)
    model = nn.Sequential(nn.Linear(4, 4), nn.Bilinear(4, 4, 4))
    assert list(patched_layers(ckf.patch_model(model, TASKS, r=2))) == ["0"]


def test_attention_that_reads_its_own_linear_is_left_out_and_named():
    def block():
        return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

    with pytest.warns(UserWarning, match="no LoRA for self_attn.out_proj: nn.MultiheadAttention"):
        model = ckf.patch_model(block(), TASKS, r=2)
    assert list(patched_layers(model)) == ["linear1", "linear2"]
    randomise_adapters(model)
    assert model.train()(torch.randn(3, 2, 8), task_ids=TASKS).shape == (3, 2, 8)
    with pytest.raises(ValueError, match="target self_attn.out_proj belongs to nn.MultiheadAtt"):
        ckf.patch_model(block(), TASKS, target_modules=["out_proj", "linear1"])


class ReadsWeights(nn.Module):
    """As Mamba's step size does in some versions of transformers."""

    def __init__(self):
        super().__init__()
        self.mixer = nn.ModuleDict({"dt_proj": nn.Linear(8, 8)})

    def forward(self, x):
        return x @ self.mixer["dt_proj"].weight.t()


def test_a_weight_that_a_model_reads_itself_is_named():
    model = ckf.patch_model(ReadsWeights(), TASKS, r=2)
    message = r"the weight of a patched layer \(mixer.dt_proj\).*target_modules"
    with pytest.raises(AttributeError, match=message):
        model(torch.ones(3, 2, 8), task_ids=TASKS)
    layer = model.mixer["dt_proj"]
    assert not hasattr(layer, "weight") and not hasattr(layer, "bias") and layer.base_layer
    with pytest.raises(AttributeError, match="has no attribute 'wieght'"):
        _ = layer.wieght
