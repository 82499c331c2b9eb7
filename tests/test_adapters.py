"""Adapters on disk: PEFT files, all-or-nothing loading, the model card, refusals."""

import json
import shutil
import warnings

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import ckf
from tests.test_patch import TASKS, logits, patched
from tests.tiny import randomise_adapters, tiny_model, tokens


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


@pytest.mark.parametrize(
    "saved, own, words",
    [
        ({"lora_alpha": 32}, {"lora_alpha": 16}, "lora_alpha 32; .* patched with 16"),
        ({}, {"use_rslora": True}, "use_rslora False; .* patched with True"),
        ({"gate": "learned"}, {}, "gate 'learned'; .* patched with 'hard'"),
    ],
)
def test_other_scaling_or_gates_are_named(saved, own, words, tmp_path):
    """The same matrices would say something else."""
    ckf.save_adapters(patched(**saved), tmp_path / "a")
    model = patched(**own)
    before = adapter_values(model)
    with pytest.raises(ValueError, match=words):
        ckf.load_adapters(model, tmp_path / "a")
    assert all(torch.equal(before[n], v) for n, v in adapter_values(model).items())


def test_gates_that_the_model_lacks_are_named(tmp_path):
    model = patched(gate="learned")
    ckf.save_adapters(model, tmp_path / "a")
    file = tmp_path / "a" / "ckf_gate.safetensors"
    save_file(load_file(file) | {"other": torch.ones(1)}, file)
    with pytest.raises(ValueError, match="has other, which the patched model lacks"):
        ckf.load_adapters(model, tmp_path / "a")


def test_compiled_layers_are_saved_under_their_own_names(tmp_path):
    model = patched()
    randomise_adapters(model)
    expected = logits(model, tokens(), task_ids=[0, 1, 2, -1])
    model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    ckf.save_adapters(model, tmp_path / "a")
    loaded = ckf.load_patched(tiny_model(), tmp_path / "a")
    torch.testing.assert_close(logits(loaded, tokens(), task_ids=[0, 1, 2, -1]), expected)
    ckf.load_adapters(model, tmp_path / "a")


def test_saving_again_replaces_and_leaves_nothing_behind(tmp_path):
    model = patched()
    ckf.save_adapters(model, tmp_path / "a")
    randomise_adapters(model)
    ckf.save_adapters(model, tmp_path / "a")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == sorted(
        ["README.md", "ckf.json", "shared", *TASKS]
    )


def test_a_failed_save_keeps_the_old_adapters(tmp_path, monkeypatch):
    model = patched()
    ckf.save_adapters(model, tmp_path / "a")
    before = (tmp_path / "a/shared/adapter_model.safetensors").read_bytes()
    randomise_adapters(model)

    def full(*_args, **_kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("ckf.adapter_files.save_file", full)
    with pytest.raises(OSError, match="No space"):
        ckf.save_adapters(model, tmp_path / "a")
    assert (tmp_path / "a/shared/adapter_model.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_saving_over_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="holds other files"):
        ckf.save_adapters(patched(), tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "mine"


@pytest.mark.parametrize("linking", [True, False], ids=["links", "copies"])
def test_only_what_ckf_wrote_is_replaced(linking, tmp_path, monkeypatch):
    if not linking:
        monkeypatch.setattr("os.link", lambda *_, **__: (_ for _ in ()).throw(OSError("no links")))
    folder = tmp_path / "a"
    ckf.save_adapters(patched(gate="learned"), folder)
    others = ["optimizer.pt", "tokenizer/vocab.json", "ctr/notes.txt", "rating/notes.txt"]
    for name in others:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    (folder / "latest").symlink_to("optimizer.pt")
    (folder / "empty").mkdir()
    model = patched(tasks=["ctr", "new"])
    ckf.save_adapters(model, folder)
    assert all((folder / name).read_text() == name for name in (*others[1:], "optimizer.pt"))
    assert (folder / "latest").readlink().name == "optimizer.pt" and (folder / "empty").is_dir()
    assert not (folder / "topk").exists()  # nothing but the earlier save was in it
    assert [p.name for p in (folder / "rating").iterdir()] == ["notes.txt"]
    assert not (folder / "ckf_gate.safetensors").exists()
    ckf.load_adapters(model, folder)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


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
    with pytest.raises(
        ValueError, match=r"for tasks ctr, topk, rating; the model .* a, b .*lacks a, b; it has ctr"
    ):
        ckf.load_adapters(patched(tasks=["a", "b"]), tmp_path / "a")


def test_a_renamed_task_is_named(tmp_path):
    ckf.save_adapters(patched(), tmp_path / "a")
    with pytest.raises(ValueError, match=r"it lacks clicks; it has ctr besides.*import_peft"):
        ckf.load_adapters(patched(tasks=["clicks", "topk", "rating"]), tmp_path / "a")
    with pytest.raises(ValueError, match="the order differs"):
        ckf.load_adapters(patched(tasks=TASKS[::-1]), tmp_path / "a")


@pytest.mark.parametrize("options", [{}, {"gate": "learned", "gate_per_layer": True}])
def test_what_trains_and_is_not_saved_is_named(options, tmp_path):
    model = patched(**options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ckf.save_adapters(model, tmp_path / "a")
    model.get_input_embeddings().requires_grad_(True)
    with pytest.warns(UserWarning, match=r"embed_tokens.weight can train but .* not saved here"):
        ckf.save_adapters(model, tmp_path / "a")
    model.model.norm.requires_grad_(True)
    model.model.layers.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"embed_tokens.weight, model.layers.0.* more can train"):
        ckf.save_adapters(model, tmp_path / "a")


def test_integers_are_refused(tmp_path):
    model = patched()
    ckf.save_adapters(model, tmp_path / "a")
    file = tmp_path / "a/ctr/adapter_model.safetensors"
    save_file({k: t.to(torch.int32) for k, t in load_file(file).items()}, file)
    with pytest.raises(ValueError, match="is torch.int32; expected float16 to float64"):
        ckf.load_adapters(model, tmp_path / "a")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_dtypes_are_cast(dtype, tmp_path):
    model = patched()
    randomise_adapters(model)
    ckf.save_adapters(model, tmp_path / "a")
    file = tmp_path / "a/ctr/adapter_model.safetensors"
    rounded = {k: t.to(dtype) for k, t in load_file(file).items()}
    save_file(rounded, file)
    ckf.load_adapters(model, tmp_path / "a")
    own = model.model.layers[0].self_attn.q_proj.lora_A["ctr"]
    stored = rounded["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"]
    assert own.dtype == torch.float32 and torch.equal(own, stored.float())


@pytest.mark.parametrize("how", ["link", "folder link", "settings link", "task name"])
def test_nothing_is_read_outside_the_folder(how, tmp_path):
    model = patched()
    ckf.save_adapters(model, tmp_path / "a")
    ckf.save_adapters(model, tmp_path / "elsewhere")
    inside, outside = tmp_path / "a/ctr", tmp_path / "elsewhere/ctr"
    if how == "link":
        (inside / "adapter_model.safetensors").unlink()
        (inside / "adapter_model.safetensors").symlink_to(outside / "adapter_model.safetensors")
    elif how == "folder link":
        shutil.rmtree(inside)
        inside.symlink_to(outside)
    elif how == "settings link":
        (tmp_path / "a/ckf.json").unlink()
        (tmp_path / "a/ckf.json").symlink_to(tmp_path / "elsewhere/ckf.json")
    else:
        settings = json.loads((tmp_path / "a/ckf.json").read_text())
        settings["tasks"] = {"../elsewhere/ctr": 4, "topk": 4, "rating": 4}
        (tmp_path / "a/ckf.json").write_text(json.dumps(settings))
    message = "task name '../elsewhere/ctr'" if how == "task name" else "leads out of"
    with pytest.raises(ValueError, match=message):
        ckf.load_adapters(model, tmp_path / "a")
    with pytest.raises(ValueError, match=message):
        ckf.load_patched(tiny_model(), tmp_path / "a")


def test_a_hub_snapshot_may_link_to_its_own_blobs(tmp_path):
    model = patched()
    snapshot, blobs = (
        tmp_path / "models--me--mine/snapshots/0f",
        tmp_path / "models--me--mine/blobs",
    )
    ckf.save_adapters(model, snapshot)
    blobs.mkdir()
    for number, file in enumerate(sorted(f for f in snapshot.rglob("*") if f.is_file())):
        file.rename(blobs / str(number))
        file.symlink_to(blobs / str(number))
    ckf.load_adapters(model, snapshot)
    (tmp_path / "other").write_bytes((blobs / "0").read_bytes())
    (snapshot / "ckf.json").unlink()
    (snapshot / "ckf.json").symlink_to(tmp_path / "other")
    with pytest.raises(ValueError, match="leads out of"):
        ckf.load_adapters(model, snapshot)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tasks": {"ctr": 2, "topk": 8}, "shared_r": 3, "use_rslora": True, "lora_dropout": 0.1},
        {"gate": "learned", "gate_per_layer": True},
        {"shared_modules": ["k_proj", "v_proj"], "task_modules": r".*\.(q|o)_proj"},
        {"shared_r": 0, "target_modules": ("q_proj",)},
    ],
    ids=["plain", "ranks", "gates", "places", "no-shared"],
)
@pytest.mark.parametrize("by_name", [False, True])
def test_one_call_loads_base_and_adapters(options, by_name, tmp_path):
    model = patched(backend="torch", **options)
    randomise_adapters(model)
    ckf.save_adapters(model, tmp_path / "a")
    base = tiny_model()
    if by_name:
        base.save_pretrained(tmp_path / "base")
        base = str(tmp_path / "base")
    loaded = ckf.load_patched(base, tmp_path / "a", backend="torch")
    rows = [0, 1, -1, 0]
    expected = logits(model, tokens(), task_ids=rows)
    assert torch.equal(logits(loaded, tokens(), task_ids=rows), expected)
    assert not loaded.training and loaded._ckf.settings.backend == "torch"


def test_a_model_given_stays_unpatched_when_loading_fails(tmp_path):
    ckf.save_adapters(patched("opt"), tmp_path / "a")
    base = tiny_model()
    with pytest.raises(ValueError, match="lacks base_model.model.model.layers.0"):
        ckf.load_patched(base, tmp_path / "a")
    assert not ckf.is_patched(base)
    with pytest.raises(ValueError, match="dtype apply when a base is loaded by name"):
        ckf.load_patched(base, tmp_path / "a", dtype=torch.float16)
    with pytest.raises(ValueError, match="cannot load the base model"):
        ckf.load_patched(str(tmp_path / "nowhere"), tmp_path / "a")


def test_a_folder_nearby_and_swapped_arguments_are_named(tmp_path):
    model = patched()
    model.save_pretrained(tmp_path / "out")
    with pytest.raises(ValueError, match="its adapters are in .*out/adapters: give that"):
        ckf.load_patched(tiny_model(), tmp_path / "out")
    with pytest.raises(ValueError, match=r"path is a LlamaForCausalLM; .*load_patched\(base, path"):
        ckf.load_patched(str(tmp_path / "out/adapters"), tiny_model())
    assert ckf.is_patched(ckf.load_patched(tiny_model(), tmp_path / "out/adapters"))


def test_a_task_added_later_keeps_the_others(tmp_path):
    """The way that the README gives."""
    model = patched()
    randomise_adapters(model)
    expected = logits(model, tokens(), task_ids=[0, 1, 2, 0])
    ckf.save_adapters(model, tmp_path / "a")
    ckf.patch_model(ckf.unpatch_model(model), [*TASKS, "new"], r=4, lora_alpha=8)
    for adapter in ("shared", *TASKS):
        ckf.import_peft(model, tmp_path / "a" / adapter, adapter)
    found = logits(model, tokens(), task_ids=[0, 1, 2, 0])
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-5)


def test_the_card_says_what_lies_there(tmp_path):
    model = patched(tasks={"ctr": 2, "topk": 8}, shared_r=3)
    model.config._name_or_path = "org/base-7b"
    ckf.save_adapters(model, tmp_path / "a")
    card = ModelCard.load(tmp_path / "a/README.md")
    assert card.data.base_model == "org/base-7b" and card.data.library_name == "peft"
    assert {"lora", "peft", "ckf"} <= set(card.data.tags)
    for part in ("| `shared` | all rows | 3 |", "| `topk` | `topk` rows | 8 |", "hard:"):
        assert part in card.text
    assert 'ckf.load_patched("org/base-7b", "FOLDER")' in card.text
    model.config._name_or_path = str(tmp_path)  # a folder is no name on the hub
    ckf.save_adapters(model, tmp_path / "a")
    assert ModelCard.load(tmp_path / "a/README.md").data.base_model is None


def test_adapters_without_values_are_refused(tmp_path):
    with torch.device("meta"):
        empty = tiny_model()
    ckf.patch_model(empty, TASKS, r=4, lora_alpha=8)
    with pytest.raises(ValueError, match="meta device and have no values"):
        ckf.save_adapters(empty, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    ckf.save_adapters(patched(), tmp_path / "a")
    with pytest.raises(ValueError, match="meta device, where a copy is lost"):
        ckf.load_adapters(empty, tmp_path / "a")


@pytest.fixture
def one_rank():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_sharded_adapters_are_saved_whole(one_rank, tmp_path):
    model = patched()
    randomise_adapters(model)
    expected = adapter_values(model)
    mesh = init_device_mesh("cpu", (1,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    assert isinstance(model.model.layers[0].self_attn.q_proj.lora_A["ctr"], DTensor)
    ckf.save_adapters(model, tmp_path / "a")
    ckf.export_peft(model, "ctr", tmp_path / "ctr")
    plain = patched()
    ckf.load_adapters(plain, tmp_path / "a")
    assert all(torch.equal(expected[n], v) for n, v in adapter_values(plain).items())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    ckf.load_adapters(model, tmp_path / "a")
    found = {n: v.full_tensor() for n, v in adapter_values(model).items()}
    assert all(torch.equal(expected[n], v) for n, v in found.items())
    ckf.export_peft(plain, "ctr", tmp_path / "plain")
    whole = load_file(tmp_path / "ctr/adapter_model.safetensors")
    other = load_file(tmp_path / "plain/adapter_model.safetensors")
    assert all(torch.equal(whole[k], other[k]) for k in other) and whole.keys() == other.keys()
