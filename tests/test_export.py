"""Export, import and merge: PEFT judges by its logits, vLLM's rules are stated here."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import ckf
from ckf.export import SERVED_RANKS, serving_command
from ckf.layers import MultiLoRALinear
from tests.test_patch import TASKS, logits, patched
from tests.tiny import FAMILIES, randomise_adapters, tiny_model, tokens

CLOSE = {"rtol": 2e-4, "atol": 2e-5}
RANKS = {"tasks": {"ctr": 2, "topk": 5, "rating": 3}, "shared_r": 6}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True}, RANKS, {"gate": "learned"}],
    ids=["plain", "rslora", "ranks", "learned"],
)
def test_export_is_one_ordinary_lora(family, options, tmp_path):
    model = patched(family, **options)
    randomise_adapters(model)
    expected = logits(model, tokens(), task_ids=["topk"] * 4)
    rank = ckf.export_peft(model, "topk", tmp_path / "topk")
    config = json.loads((tmp_path / "topk/adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"] == rank and not config["use_rslora"]
    judged = PeftModel.from_pretrained(tiny_model(family), tmp_path / "topk")
    torch.testing.assert_close(logits(judged, tokens()), expected, **CLOSE)


@pytest.mark.parametrize(
    "options",
    [
        {"gate": "learned", "gate_per_layer": True, "use_rslora": True},
        {"shared_r": 0, "use_rslora": True},
        {**RANKS, "shared_modules": ["k_proj", "v_proj"], "task_modules": ["q_proj", "v_proj"]},
    ],
    ids=["gates", "no-shared", "places"],
)
def test_export_pads_to_one_rank(options, tmp_path):
    model = patched(**options)
    randomise_adapters(model)
    for task in model._ckf.settings.tasks:
        expected = logits(model, tokens(), task_ids=[task] * 4)
        rank = ckf.export_peft(model, task, tmp_path / task)
        judged = PeftModel.from_pretrained(tiny_model(), tmp_path / task)
        torch.testing.assert_close(logits(judged, tokens()), expected, **CLOSE)
        tensors = load_file(tmp_path / task / "adapter_model.safetensors")
        assert {t.shape[0] for n, t in tensors.items() if "lora_A" in n} == {rank}


def test_export_over_an_adapter_leaves_other_files(tmp_path):
    model, names = patched(), ("optimizer.pt", "tokenizer.json", "README.md")
    randomise_adapters(model)
    ckf.export_peft(model, "ctr", tmp_path / "one")
    for name in names:
        (tmp_path / "one" / name).write_text(name)
    before = (tmp_path / "one/adapter_model.safetensors").read_bytes()
    ckf.export_peft(model, "topk", tmp_path / "one")
    assert (tmp_path / "one/adapter_model.safetensors").read_bytes() != before
    assert all((tmp_path / "one" / name).read_text() == name for name in names)


def vllm_refusals(folder, base_linears, max_lora_rank):
    """What vLLM's LoRA loader would object to; its rules as of 0.33, and of 0.6 where stricter."""
    config = json.loads((folder / "adapter_config.json").read_text())
    found = [f"no {k}" for k in ("r", "lora_alpha", "target_modules") if k not in config]
    found += [k for k in ("r", "lora_alpha") if not isinstance(config[k], int) or config[k] < 1]
    found += ["rank"] * (config["r"] > max_lora_rank)
    found += ["bias"] * (config.get("bias", "none") != "none")
    refused = ("modules_to_save", "use_dora", "lora_bias", "alora_invocation_tokens")
    refused += ("layer_replication", "use_bdlora", "use_qalora", "rank_pattern", "alpha_pattern")
    found += [name for name in refused if config.get(name)]
    found += ["init"] * isinstance(config.get("init_lora_weights", True), str)
    tensors = load_file(folder / "adapter_model.safetensors")
    for name, tensor in tensors.items():
        module, side, leaf = name.removeprefix("base_model.model.").rsplit(".", 2)
        if side not in ("lora_A", "lora_B") or leaf != "weight":
            found.append(f"name {name}")
        if module.rsplit(".", 1)[-1] not in base_linears:
            found.append(f"module {module}")
        if tensor.shape[0 if side == "lora_A" else 1] != config["r"]:
            found.append(f"rank of {name}")
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{}, RANKS, {"gate": "learned", "use_rslora": True}])
def test_export_passes_vllms_rules(family, options, tmp_path):
    model = patched(family, **options)
    linears = {
        n.rsplit(".", 1)[-1]
        for n, m in tiny_model(family).named_modules()
        if type(m).__name__ in ("Linear", "Conv1D")
    }
    rank = ckf.export_peft(model, "ctr", tmp_path / "ctr")
    room = next(r for r in SERVED_RANKS if r >= rank)
    assert vllm_refusals(tmp_path / "ctr", linears, room) == []
    assert "rank" in vllm_refusals(tmp_path / "ctr", linears, rank - 1)
    assert "module model.layers.0.self_attn.q_proj" in vllm_refusals(
        tmp_path / "ctr", linears - {"q_proj"}, room
    ) or family in ("gpt2", "opt")


def test_the_serving_command_has_room_for_the_rank(tmp_path):
    folders = {"ctr": tmp_path / "ctr", "topk": tmp_path / "topk"}
    assert serving_command("org/base", folders, 24) == (
        "vllm serve org/base --enable-lora --max-lora-rank 32 --max-loras 2 "
        f"--lora-modules ctr={tmp_path}/ctr topk={tmp_path}/topk"
    )
    assert "--max-lora-rank 512 " in serving_command(None, folders, 512)
    assert "use ckf.merge_task" in serving_command(None, folders, 513)


def peft_adapter(path, family="llama", seed=7, **options):
    """A random PEFT adapter on disk, and the logits PEFT gives with it."""
    torch.manual_seed(seed)
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **options})
    model = get_peft_model(tiny_model(family), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
    model.save_pretrained(path)
    return logits(PeftModel.from_pretrained(tiny_model(family), path), tokens())


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"r": 3, "lora_alpha": 5},
        {"r": 2, "lora_alpha": 7, "use_rslora": True},
        {"rank_pattern": {"layers.0.*": 2, "h.0.*": 2}, "alpha_pattern": {r".*\.1\..*": 3}},
    ],
    ids=["same", "smaller", "rslora", "patterns"],
)
@pytest.mark.parametrize("own", [{}, {"use_rslora": True}], ids=["own-plain", "own-rslora"])
def test_import_adds_what_peft_adds(family, options, own, tmp_path):
    fan = {"fan_in_fan_out": True} if family == "gpt2" else {}
    expected = peft_adapter(tmp_path / "p", family, **options, **fan)
    base = logits(tiny_model(family), tokens())
    for adapter, task in (("shared", "topk"), ("ctr", "ctr")):
        model = patched(family, **own)
        ckf.import_peft(model, tmp_path / "p", adapter)
        torch.testing.assert_close(logits(model, tokens(), task_ids=[task] * 4), expected, **CLOSE)
        if adapter == "ctr":
            assert torch.equal(logits(model, tokens(), task_ids=["topk"] * 4), base)


def test_import_replaces_what_was_there_and_stays_trainable(tmp_path):
    expected = peft_adapter(tmp_path / "p", r=2, target_modules=["q_proj", "down_proj"])
    model = patched(shared_r=0)
    randomise_adapters(model)
    ckf.import_peft(model, tmp_path / "p", "ctr")
    torch.testing.assert_close(logits(model, tokens(), task_ids=["ctr"] * 4), expected, **CLOSE)
    model(input_ids=tokens(), labels=tokens(), task_ids=["ctr"] * 4).loss.backward()
    layer = model.model.layers[0].self_attn
    for linear in (layer.q_proj, layer.k_proj):  # filled up to rank 4; not in the file at all
        assert (linear.lora_B["ctr"].grad.abs().sum(0) > 0).all()


def test_exports_and_saved_folders_import_again(tmp_path):
    model = patched(**RANKS)
    randomise_adapters(model)
    expected = logits(model, tokens(), task_ids=["topk"] * 4)
    rank = ckf.export_peft(model, "topk", tmp_path / "one")
    other = patched(tasks={"new": rank}, shared_r=0)
    ckf.import_peft(other, tmp_path / "one", "new")
    torch.testing.assert_close(logits(other, tokens(), task_ids=["new"] * 4), expected, **CLOSE)
    ckf.save_adapters(model, tmp_path / "all")
    renamed = patched(tasks={"choose": 5}, shared_r=6)
    ckf.import_peft(renamed, tmp_path / "all/shared", "shared")
    ckf.import_peft(renamed, tmp_path / "all/topk", "choose")
    # the other model has more rank columns, whose zeros are summed in another order
    torch.testing.assert_close(
        logits(renamed, tokens(), task_ids=["choose"] * 4), expected, **CLOSE
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"r": 8},
            r'q_proj has rank 8; the model\'s ctr LoRA has 4: patch it with tasks={"ctr": 8',
        ),
        ({"use_dora": True}, "use_dora is True"),
        ({"bias": "lora_only"}, "bias is 'lora_only'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices is"),
        (
            {"target_modules": ["q_proj", "o_proj"]},
            r"o_proj \(in all o_proj\), which carries no ctr",
        ),
        (
            {"target_modules": ["embed_tokens"]},
            "embed_tokens.lora_embedding_A: a LoRA on an embedding, and .* linears only",
        ),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
    ],
)
def test_import_refuses_and_changes_nothing(options, message, tmp_path):
    peft_adapter(tmp_path / "p", **{"target_modules": ["q_proj"], **options})
    model = patched(target_modules=["q_proj", "k_proj"])
    randomise_adapters(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        ckf.import_peft(model, tmp_path / "p", "ctr")
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


@pytest.mark.parametrize("damage", ["adapter", "half", "shape", "pickle", "config", "kind", "link"])
def test_import_names_the_damage(damage, tmp_path):
    peft_adapter(tmp_path / "p")
    model, adapter = patched(), "ctr"
    file, settings = tmp_path / "p/adapter_model.safetensors", tmp_path / "p/adapter_config.json"
    tensors, config = load_file(file), json.loads(settings.read_text())
    first = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    if damage == "adapter":
        adapter, message = "news", "adapter is 'news'; this model has shared, ctr, topk, rating"
    elif damage == "half":
        del tensors[first + "B.weight"]
        message = "only one of lora_A and lora_B for model.layers.0.self_attn.q_proj"
    elif damage == "shape":
        tensors[first + "A.weight"] = torch.zeros(4, 5)
        message = r"lora_A of model.layers.0.self_attn.q_proj is torch.float32 \(4, 5\)"
    elif damage == "pickle":
        message = "is a pickle, which ckf never reads"
    elif damage == "link":
        message = "leads out of"
    else:
        config |= {"peft_type": "IA3"} if damage == "kind" else {"r": None}
        settings.write_text(json.dumps(config))
        message = "peft_type is 'IA3'" if damage == "kind" else "lacks a whole number r"
    save_file(tensors, file)
    if damage == "pickle":
        file.rename(file.with_suffix(".bin"))
    elif damage == "link":
        file.rename(tmp_path / "away")
        file.symlink_to(tmp_path / "away")
    with pytest.raises(ValueError, match=message):
        ckf.import_peft(model, tmp_path / "p", adapter)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("gate", ["hard", "learned"])
def test_merge_equals_the_task(family, gate):
    model = patched(family, gate=gate)
    randomise_adapters(model)
    expected = logits(model, tokens(), task_ids=["topk"] * 4)
    merged = ckf.merge_task(model, "topk")
    assert not any(isinstance(m, MultiLoRALinear) for m in merged.modules())
    torch.testing.assert_close(logits(merged, tokens()), expected, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_rounds_once(dtype):
    model = ckf.patch_model(tiny_model().to(dtype), TASKS, r=4, lora_alpha=8)
    randomise_adapters(model)
    layer = model.model.layers[1].mlp.down_proj
    exact = layer.base_layer.weight.double()
    for expert in ("shared", "rating"):
        exact = exact + 2 * layer.lora_B[expert].double() @ layer.lora_A[expert].double()
    ckf.merge_task(model, "rating")
    merged = model.model.layers[1].mlp.down_proj.weight
    assert merged.dtype == dtype and torch.equal(merged, exact.to(dtype))


@pytest.mark.parametrize("kind", ["tied", "float8", "meta"])
def test_merge_refuses_and_changes_nothing(kind):
    model = patched()
    randomise_adapters(model)
    attention = model.model.layers[0].self_attn
    if kind == "tied":
        attention.k_proj.base_layer.weight = attention.v_proj.base_layer.weight
        message = "shares its weight"
    elif kind == "float8":
        attention.k_proj.base_layer.weight.data = attention.k_proj.base_layer.weight.to(
            torch.float8_e4m3fn
        )
        message = "quantized weight .*float8"
    else:
        attention.k_proj.base_layer.to("meta")
        message = "offloaded or on the meta device"
    before = attention.q_proj.base_layer.weight.clone()
    with pytest.raises(ValueError, match=message):
        ckf.merge_task(model, "ctr")
    assert ckf.is_patched(model) and torch.equal(attention.q_proj.base_layer.weight, before)


def test_merge_refuses_a_weight_made_anew_at_every_call():
    model = tiny_model()
    torch.nn.utils.parametrizations.weight_norm(model.model.layers[0].self_attn.q_proj)
    ckf.patch_model(model, TASKS, r=4)
    with pytest.raises(ValueError, match="q_proj makes its weight anew at every call"):
        ckf.merge_task(model, "ctr")


def test_merge_refuses_the_tied_output_layer():
    base = tiny_model("gpt2")
    assert base.lm_head.weight is base.transformer.wte.weight
    model = ckf.patch_model(base, TASKS, r=4, target_modules=["lm_head"])
    with pytest.raises(ValueError, match=r"lm_head shares its weight with .*wte"):
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
