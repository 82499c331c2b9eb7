"""Quantized bases: torchao int8, bitsandbytes 8-bit and 4-bit, each where it is installed."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments

import ckf
from ckf.patch import patched_layers
from tests.test_patch import TASKS, logits
from tests.tiny import VOCABULARY, randomise_adapters, tokens

KINDS = ["torchao-int8", "bnb-8bit", "bnb-4bit"]
ROWS = [0, 1, 2, 0]


def quantization(kind):
    """The transformers setting of a kind; skips with the reason where its library is missing."""
    if kind == "torchao-int8":
        pytest.importorskip("torchao", reason="torchao is not installed")
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from transformers import BitsAndBytesConfig

    if kind == "bnb-8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")


@pytest.fixture(params=KINDS)
def load(request, tmp_path):
    """Loads the tiny model quantized, anew at each call."""
    setting = quantization(request.param)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,  # bitsandbytes' CPU kernel wants blocks of 64 inputs and 32 outputs
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")

    def load():
        options = {"quantization_config": setting, "device_map": {"": "cpu"}}
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base", **options).eval()

    return load


def patched(model):
    return ckf.patch_model(model, TASKS, r=4, lora_alpha=8)


def test_the_base_keeps_its_bits(load):
    base = logits(load(), tokens())
    model = patched(load())
    assert len(patched_layers(model)) == 14
    assert not any(layer.fuses() for layer in patched_layers(model).values())
    assert torch.equal(logits(model, tokens(), task_ids=ROWS), base)  # B is zero
    randomise_adapters(model)
    assert torch.equal(logits(model, tokens(), task_ids=[-1] * 4), base)
    assert not torch.equal(logits(model, tokens(), task_ids=ROWS), base)


def test_the_update_is_added_to_what_the_base_gives(load):
    model = patched(load())
    randomise_adapters(model)
    linear = model.model.layers[0].mlp.down_proj
    x = torch.randn(3, 128, requires_grad=True)
    with ckf.use_task(model, "topk"):
        y = linear(x)
        base = linear.base_layer(x)
    update = sum(
        2 * x @ linear.lora_A[e].T @ linear.lora_B[e].T for e in ("shared", "topk")
    )  # alpha / r is 2
    torch.testing.assert_close(y, base + update, rtol=1e-4, atol=1e-5)
    y.sum().backward()
    through_base = torch.autograd.grad(linear.base_layer(x).sum(), x)[0]
    through_update = torch.autograd.grad(update.sum(), x)[0]
    torch.testing.assert_close(x.grad, through_base + through_update, rtol=1e-4, atol=1e-5)


def test_one_step_then_save_and_load(load, tmp_path):
    model = patched(load())
    base = logits(model, tokens(), task_ids=[-1] * 4)
    adapters = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in adapters} == {torch.float32}
    optimizer = torch.optim.AdamW(adapters, lr=1e-2)
    losses = []
    model.train()
    for _ in range(3):
        loss = model(input_ids=tokens(), labels=tokens(), task_ids=ROWS).loss
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in adapters)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert torch.equal(logits(model.eval(), tokens(), task_ids=[-1] * 4), base)
    ckf.save_adapters(model, tmp_path / "a")
    expected = logits(model, tokens(), task_ids=ROWS)
    loaded = ckf.load_patched(load(), tmp_path / "a")
    assert torch.equal(logits(loaded, tokens(), task_ids=ROWS), expected)


def test_checkpointing_gives_equal_gradients(load):
    def gradients(checkpointing):
        model = patched(load()).train()
        randomise_adapters(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(input_ids=tokens(), labels=tokens(), task_ids=ROWS).loss.backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    assert all(map(torch.equal, gradients(False), gradients(True)))


def test_export_works_and_merge_refuses(load, tmp_path):
    model = patched(load())
    randomise_adapters(model)
    assert ckf.export_peft(model, "ctr", tmp_path / "ctr") == 8
    other = ckf.patch_model(load(), {"one": 8}, shared_r=0)
    ckf.import_peft(other, tmp_path / "ctr", "one")
    torch.testing.assert_close(
        logits(other, tokens(), task_ids=["one"] * 4),
        logits(model, tokens(), task_ids=["ctr"] * 4),
        rtol=2e-4,
        atol=2e-5,
    )
    with pytest.raises(ValueError, match="quantized .*; a merge would lose precision"):
        ckf.merge_task(model, "ctr")


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        row = tokens(8)[index]
        return {"input_ids": row, "labels": row, "task_ids": index % 3}


def train(model, folder):
    options = {"max_steps": 2, "use_cpu": True, "report_to": [], "save_strategy": "no"}
    arguments = TrainingArguments(folder, **options, per_device_train_batch_size=4)
    Trainer(model, arguments, train_dataset=Rows()).train()


def test_trainer_takes_the_patched_model_and_not_the_bare_one(load, tmp_path):
    bare = load()
    with pytest.raises(ValueError, match="purely quantized"):
        train(bare, tmp_path)
    model = patched(bare)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    train(model, tmp_path)
    assert all((before[n] != p).any() for n, p in model.named_parameters() if ".lora_B." in n)
    assert ckf.unpatch_model(model).is_quantized


def test_weights_that_only_look_plain_are_not_fused():
    """torchao's linears are nn.Linear whose weight is a tensor subclass."""
    pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = nn.Sequential(nn.Linear(64, 32))
    plain = ckf.patch_model(nn.Sequential(nn.Linear(64, 32)), ["a"])
    assert plain[0].fuses()
    quantize_(model, Int8WeightOnlyConfig())
    assert type(model[0]) is nn.Linear and model[0].weight.is_floating_point()
    x = torch.randn(3, 64)
    expected = model(x)
    ckf.patch_model(model, ["a"])
    assert torch.equal(model(x, task_ids=["a"] * 3), expected)
    with pytest.raises(ValueError, match="quantized or sharded weight"):
        ckf.merge_task(model, "a")
