"""patch_model on seven model families; PEFT is the judge of every row."""

import copy
import pickle
import re

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import T5Config, T5ForConditionalGeneration
from transformers.pytorch_utils import Conv1D

import ckf
from ckf.layers import MultiLoRALinear
from ckf.patch import patched_layers
from tests.tiny import FAMILIES, randomise_adapters, tiny_model, tokens

TASKS = ["ctr", "topk", "rating"]


def patched(family="llama", tasks=TASKS, **options):
    return ckf.patch_model(tiny_model(family), tasks, **({"r": 4, "lora_alpha": 8} | options))


def logits(model, ids, **kwargs):
    with torch.no_grad():
        return model(input_ids=ids, **kwargs).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_fresh_adapters_keep_the_bits_of_the_base(family):
    base = logits(tiny_model(family), tokens())
    model = patched(family)
    assert torch.equal(logits(model, tokens(), task_ids=["ctr", "topk", "rating", "ctr"]), base)
    randomise_adapters(model)
    assert torch.equal(logits(model, tokens(), task_ids=[-1] * 4), base)
    assert not torch.equal(logits(model, tokens(), task_ids=[0] * 4), base)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True}, {"shared_r": 0}, {"shared_r": 2, "tasks": {"ctr": 1, "topk": 8}}],
    ids=["plain", "rslora", "no-shared", "ranks"],
)
def test_mixed_rows_equal_peft_row_by_row(family, options, tmp_path):
    model = patched(family, **options)
    randomise_adapters(model)
    ckf.save_adapters(model, tmp_path / "adapters")
    names = list(model._ckf.settings.tasks)
    rows = [*names, names[0]]
    mixed = logits(model, tokens(len(rows)), task_ids=rows)
    for row, task in enumerate(rows):
        alone = peft_logits(family, tmp_path / "adapters", task, tokens(len(rows))[row : row + 1])
        torch.testing.assert_close(mixed[row : row + 1], alone, rtol=2e-4, atol=2e-5)


def peft_logits(family, path, task, ids):
    """One row by PEFT, with the task's shared and own adapters active."""
    experts = [e for e in ("shared", task) if (path / e).exists()]
    model = PeftModel.from_pretrained(tiny_model(family), path / experts[0], experts[0])
    for expert in experts[1:]:
        model.load_adapter(path / expert, expert)
    model.base_model.set_adapter(experts)
    return logits(model, ids)


def test_shared_and_task_modules_may_differ(tmp_path):
    model = patched(shared_modules=["k_proj", "v_proj", "o_proj"], task_modules=["q_proj"])
    randomise_adapters(model)
    layers = patched_layers(model)
    assert layers["model.layers.0.self_attn.q_proj"].experts == tuple(TASKS)
    assert layers["model.layers.0.self_attn.k_proj"].experts == ("shared",)
    ckf.save_adapters(model, tmp_path / "a")
    mixed = logits(model, tokens(3), task_ids=TASKS)
    for row, task in enumerate(TASKS):
        alone = peft_logits("llama", tmp_path / "a", task, tokens(3)[row : row + 1])
        torch.testing.assert_close(mixed[row : row + 1], alone, rtol=2e-4, atol=2e-5)


def test_per_token_ids_equal_rows_where_constant():
    model = patched()
    randomise_adapters(model)
    ids = tokens(3)
    per_row = logits(model, ids, task_ids=["ctr", "topk", "rating"])
    table = torch.tensor([[0], [1], [2]]).expand(3, 7)
    names = [[TASKS[t] for t in row] for row in table.tolist()]
    for form in (table, table.tolist(), table.numpy(), table.to(torch.int32), names):
        assert torch.equal(per_row, logits(model, ids, task_ids=form))
    half = torch.tensor([[0, 0, 0, 0, 1, 1, 1]])
    mixed = logits(model, ids[:1], task_ids=half)
    assert torch.allclose(mixed[0, :4], per_row[0, :4], atol=1e-6)
    assert not torch.allclose(mixed[0, 4:], per_row[0, 4:], atol=1e-3)


@pytest.mark.parametrize("grown", [False, True])
def test_per_token_ids_beside_a_cache(grown):
    """Of the new tokens, or of all; anything else would be a guess."""
    model = patched()
    randomise_adapters(model)
    ids, tasks = tokens(2), torch.tensor([[0, 0, 1, 1, 1, 2, 0], [2, 1, 1, 0, 0, 1, 2]])
    whole = logits(model, ids, task_ids=tasks)
    first = model(input_ids=ids[:, :4], task_ids=tasks[:, :4], use_cache=True)
    name = "cache" if "cache" in first.keys() else "past_key_values"
    cache = {name: first[name]}
    for wrong in (tasks[:, :4], tasks[:, :1], tasks[:, 3:], tasks[:, :0]):
        with pytest.raises(ValueError, match=r"or \(2, 3\) for one a token, or \(2, 7\) with"):
            model(input_ids=ids[:, 4:], task_ids=wrong, **cache)
    rest = logits(model, ids[:, 4:], task_ids=tasks if grown else tasks[:, 4:], **cache)
    torch.testing.assert_close(rest, whole[:, 4:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_missing_ids_raise_in_training_and_evaluation(training):
    model = patched().train(training)
    with pytest.raises(ValueError, match=r"got no task_ids; pass .*ctr, topk, rating"):
        model(input_ids=tokens())


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (["ctr", "news", "ctr", "ctr"], "unknown task 'news'; this model knows ctr, topk, rating"),
        ([0, 1, 2, 3], "task id 3 is out of range; expected 0 to 2"),
        ([0, 1, -2, 0], "task id -2 is out of range"),
        (torch.zeros(3, dtype=torch.int64), r"shape \(3,\) for inputs of 4 rows and 7 tokens"),
        (torch.zeros(4, 6, dtype=torch.int64), r"shape \(4, 6\)"),
        (torch.zeros(4), "task_ids are torch.float32"),
        ([0.9, 0, 0, 0], "task id 0.9 is a float; expected an int or one of ctr, topk, rating"),
        ([True, 0, 0, 0], "task id True is a bool"),
        ([None, 0, 0, 0], "task id None is a NoneType"),
        ([[0] * 7, [1] * 6, [0] * 7, [0] * 7], "rows of different lengths"),
        ([[0] * 7, 1, 1, 1], "rows of different lengths"),
    ],
)
def test_wrong_ids_name_the_fix(ids, message):
    with pytest.raises(ValueError, match=message):
        patched()(input_ids=tokens(), task_ids=ids)


def test_use_task_sets_the_default_and_ends():
    model = patched()
    randomise_adapters(model)
    expected = logits(model, tokens(), task_ids=["topk"] * 4)
    with ckf.use_task(model, "topk"):
        assert torch.equal(logits(model, tokens()), expected)
        assert not torch.equal(logits(model, tokens(), task_ids=["ctr"] * 4), expected)
    with pytest.raises(ValueError, match="no task_ids"):
        model(input_ids=tokens())
    with pytest.raises(ValueError, match="unknown task"), ckf.use_task(model, "news"):
        pass


def test_task_ids_resolves_names():
    assert ckf.task_ids(patched(), ["rating", "ctr"]).tolist() == [2, 0]


@pytest.mark.parametrize("family", FAMILIES)
def test_unpatch_restores_the_very_model(family):
    model = tiny_model(family)
    model.get_output_embeddings().weight.requires_grad_(False)
    modules = dict(model.named_modules())
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    attributes = set(model.__dict__)
    before = logits(model, tokens())
    ckf.patch_model(model, TASKS)
    randomise_adapters(model)
    assert ckf.unpatch_model(model) is model
    assert dict(model.named_modules()) == modules
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert set(model.__dict__) == attributes
    assert torch.equal(logits(model, tokens()), before)


def test_only_adapters_train_and_names_are_fixed():
    model = patched()
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(trainable) == 2 * 7 * 2 * 4  # layers x linears x (A, B) x (shared + 3 tasks)
    assert "model.layers.0.self_attn.q_proj.lora_A.shared" in trainable
    assert "model.layers.1.mlp.down_proj.lora_B.rating" in trainable


def test_task_gradients_are_the_tasks_own():
    model = patched()
    randomise_adapters(model)
    model(input_ids=tokens(2), labels=tokens(2), task_ids=["ctr", "topk"]).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.any() != name.endswith(".rating"), name


@pytest.mark.parametrize("per_layer", [False, True])
def test_learned_gate_starts_hard_and_trains(per_layer):
    hard, learned = patched(), patched(gate="learned", gate_per_layer=per_layer)
    for model in (hard, learned):
        torch.manual_seed(3)
        for layer in patched_layers(model).values():
            for expert in layer.experts:
                torch.nn.init.normal_(layer.lora_A[expert], std=0.2)
                torch.nn.init.normal_(layer.lora_B[expert], std=0.2)
    rows = ["ctr", "topk", "rating", "ctr"]
    expected = logits(hard, tokens(), task_ids=rows)
    torch.testing.assert_close(logits(learned, tokens(), task_ids=rows), expected)
    learned(input_ids=tokens(), labels=tokens(), task_ids=rows).loss.backward()
    gates = [p for n, p in learned.named_parameters() if "gate" in n.rsplit(".", 1)[-1]]
    gates = [p for p in gates if p.requires_grad]
    assert len(gates) == (14 if per_layer else 1)
    assert all((p.grad != 0).all() for p in gates)  # also where the gate is zero


DUPLICATES = [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]


@pytest.mark.parametrize("duplicate", DUPLICATES, ids=["deepcopy", "pickle"])
@pytest.mark.parametrize(
    "options", [{}, {"gate": "learned"}, {"gate": "learned", "gate_per_layer": True}]
)
def test_copies_run_their_own_weights(duplicate, options):
    model = patched(**options)
    randomise_adapters(model)
    logits(model, tokens(), task_ids=[0] * 4)  # what a call leaves behind is not copied along
    twin = duplicate(model)
    expected = logits(model, tokens(), task_ids=[0, 1, 2, 0])
    assert torch.equal(logits(twin, tokens(), task_ids=[0, 1, 2, 0]), expected)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(logits(twin, tokens(), task_ids=[0, 1, 2, 0]), expected)
    assert twin.forward.model is twin and twin.generate.model is twin
    assert twin.generate(tokens(1), task_ids=[1], max_new_tokens=2, pad_token_id=0).shape == (1, 9)


@pytest.mark.parametrize("duplicate", DUPLICATES, ids=["deepcopy", "pickle"])
def test_copies_share_nothing_and_train(duplicate):
    """Groups, gates and routers of a copy are its own; gradients go to it alone."""
    model = patched(gate="learned")
    randomise_adapters(model)
    twin = duplicate(model)
    own, layers = set(patched_layers(model).values()), list(patched_layers(twin).values())
    groups = [[layer, *layer._siblings] for layer in layers if layer._siblings]
    assert [len(g) for g in groups] == [3, 2, 3, 2]
    assert all(m in layers and m not in own for group in groups for m in group)
    assert all(layer._gate[0] is twin.ckf_gate for layer in layers)
    assert all(layer.router is twin._ckf.router is not model._ckf.router for layer in layers)
    with ckf.use_task(model, "ctr"), pytest.raises(ValueError, match="no task_ids"):
        twin(input_ids=tokens())
    twin(input_ids=tokens(), labels=tokens(), task_ids=[0, 1, 2, 0]).loss.backward()
    assert all(p.grad is not None for p in twin.parameters() if p.requires_grad)
    assert all(p.grad is None for p in model.parameters())
    assert ckf.is_patched(model) and not ckf.is_patched(ckf.unpatch_model(twin))


def test_training_after_inference_mode():
    model = patched()
    with torch.inference_mode():
        model(input_ids=tokens(), task_ids=[0] * 4)
    model(input_ids=tokens(), labels=tokens(), task_ids=[0] * 4).loss.backward()


def test_patching_inside_inference_mode_is_refused():
    model = tiny_model()
    with torch.inference_mode(), pytest.raises(ValueError, match="can never train"):
        ckf.patch_model(model, TASKS)
    assert not ckf.is_patched(model)


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_outputs_may_be_changed_in_place(backend):
    layers = [torch.nn.Linear(8, 16), torch.nn.ReLU(inplace=True), torch.nn.Linear(16, 4)]
    model = torch.nn.Sequential(*layers)
    x = torch.randn(2, 3, 8)
    plain = model(x)
    ckf.patch_model(model, ["a", "b"], target_modules=["0", "2"], r=4, backend=backend)
    with ckf.use_task(model, "a"):
        y = model(x)
        assert torch.equal(y, plain)
        y.sum().backward()
    assert model[2].lora_B["a"].grad.abs().sum() > 0


def test_scaling_is_float32_whatever_the_default_dtype():
    plain = patched(r=3, lora_alpha=4)
    torch.set_default_dtype(torch.bfloat16)
    try:
        other = patched(r=3, lora_alpha=4)
    finally:
        torch.set_default_dtype(torch.float32)
    gates = [m.model.layers[0].self_attn.q_proj.gates(torch.device("cpu")) for m in (plain, other)]
    assert torch.equal(*gates) and gates[0].max() == torch.tensor(4 / 3)


def test_sequential_models_and_conv1d_features():
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), Conv1D(4, 5))
    ckf.patch_model(model, ["a", "b"], r=2)
    randomise_adapters(model)
    x = torch.randn(3, 6)
    mixed = model(x, task_ids=["a", "b", -1])
    assert torch.allclose(mixed[:1], model(x[:1], task_ids=["a"]), atol=1e-6)
    assert mixed.shape == (3, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": []}, r"tasks is \[\]"),
        ({"tasks": "ctr"}, "tasks is 'ctr'"),
        ({"tasks": ["a", "a"]}, "name a task twice"),
        ({"tasks": ["shared"]}, "task name 'shared' is not allowed"),
        ({"tasks": ["../x"]}, "letters, digits"),
        ({"tasks": {"a": 0}}, "rank of a is 0"),
        ({"tasks": ["a"], "shared_r": -1}, "rank of shared_r is -1"),
        ({"tasks": ["a"], "gate": "soft"}, "gate is 'soft'"),
        ({"tasks": ["a"], "lora_dropout": 1.0}, "lora_dropout is 1.0"),
        ({"tasks": ["a"], "lora_dropout": "0.1"}, "lora_dropout is '0.1'; expected a number"),
        ({"tasks": ["a"], "lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"tasks": ["a"], "lora_alpha": 0}, "lora_alpha is 0; expected a finite number above 0"),
        ({"tasks": ["a"], "lora_alpha": True}, "lora_alpha is True"),
        ({"tasks": ["a"], "use_rslora": "no"}, "use_rslora is 'no'; expected True or False"),
        ({"tasks": ["a"], "use_rslora": 1}, "use_rslora is 1; expected True or False"),
        ({"tasks": ["a"], "gate_per_layer": "no"}, "gate_per_layer is 'no'"),
        ({"tasks": None}, "tasks is None"),
        ({"tasks": {"a", "b"}}, "tasks is .*their order numbers the tasks"),
        ({"tasks": frozenset(["a"])}, "tasks is frozenset"),
        ({"tasks": ["a"], "r": True}, "rank of shared_r is True"),
        ({"tasks": ["a"], "task_modules": []}, r"target_modules \[\] match no linear"),
        ({"tasks": (t for t in "ab")}, "tasks is <generator"),
        ({"tasks": np.array(["a", "b"])}, r"tasks is array\(.*expected a list of names"),
        ({"tasks": ["a"], "target_modules": None}, "target_modules is None; expected a list of"),
        ({"tasks": ["a"], "target_modules": 3}, "target_modules is 3"),
        ({"tasks": ["a"], "target_modules": [3]}, r"target_modules is \[3\]"),
        ({"tasks": ["a"], "target_modules": re.compile("q")}, r"target_modules is re.compile"),
        ({"tasks": ["a"], "backend": ["torch"]}, r"backend is \['torch'\]; expected one of auto"),
        ({"tasks": ["a"], "target_modules": "q_proj"}, "a string is a regular expression"),
        (
            {"tasks": ["a"], "target_modules": ["qq_proj"]},
            "match no linear; this model has .*q_proj",
        ),
        ({"tasks": ["a"], "target_modules": ["self_attn"]}, "is a LlamaAttention"),
        ({"tasks": ["a"], "backend": "fast"}, "expected one of auto"),
    ],
)
def test_mistakes_change_nothing(arguments, message):
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        ckf.patch_model(model, **arguments)
    assert not ckf.is_patched(model)
    assert all(p.requires_grad for p in model.parameters())


def test_patching_twice_raises():
    inside = tiny_model()
    ckf.patch_model(inside.model, TASKS)
    for model in (patched(), patched().model, inside):
        with pytest.raises(ValueError, match="patched already, or a part of it"):
            ckf.patch_model(model, TASKS)
    with pytest.raises(ValueError, match="not patched"):
        ckf.unpatch_model(tiny_model())


def test_models_that_take_no_patch_are_refused():
    adapted = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="carries PEFT adapters; fold them in"):
        ckf.patch_model(adapted, TASKS)
    merged = ckf.patch_model(adapted.merge_and_unload(), TASKS)
    assert logits(merged, tokens(), task_ids=[0] * 4).isfinite().all()
    with pytest.raises(ValueError, match="model is a str; expected a loaded torch module"):
        ckf.patch_model("org/base", TASKS)
    for wrap in (torch.compile, torch.nn.DataParallel):
        with pytest.raises(ValueError, match=r"is a \w+ around the model; patch the model itself"):
            ckf.patch_model(wrap(tiny_model()), TASKS)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    with pytest.raises(ValueError, match="T5ForConditionalGeneration has an encoder and a deco"):
        ckf.patch_model(T5ForConditionalGeneration(T5Config(vocab_size=64, **sizes)), TASKS)


def test_memory_that_runs_out_leaves_the_model_as_it_was(monkeypatch):
    model, calls = tiny_model(), []

    def reset(layer):
        calls.append(layer)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(MultiLoRALinear, "reset_parameters", reset)
        ckf.patch_model(model, TASKS, gate="learned")
    assert not patched_layers(model) and all(p.requires_grad for p in model.parameters())
    ckf.patch_model(model, TASKS)


def test_tasks_named_like_module_attributes():
    model = ckf.patch_model(tiny_model(), ["training", "forward", "keys"], r=2)
    randomise_adapters(model)
    assert logits(model, tokens(3), task_ids=["training", "forward", "keys"]).isfinite().all()
