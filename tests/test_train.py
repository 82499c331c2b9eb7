"""Training: what is shown when, what is kept, and going on after an interruption."""

import io
import json
import pickle
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

import ckf
import ckf.batches
import ckf.train
from ckf.config import TrainConfig
from ckf.metanet import MetaNetwork
from ckf.run import train_run
from ckf.train import (
    CKFTrainer,
    TrainStream,
    _groups,
    last_checkpoint,
    load_trained,
    text_share,
)
from tests.ckf_fixtures import STEPS, TASKS, quiet, read_log, small_config
from tests.tiny import tiny_model


def run_again(model, prepared, folder, **changes):
    """Train a run with some settings changed, from data prepared before."""
    config = small_config(model, **changes)
    return train_run(config, folder, prepared=str(prepared), device="cpu", log=quiet)


def trained_tensors(folder):
    """Every trained tensor of a run or a checkpoint, by file and name."""
    files = [*sorted((folder / "adapters").rglob("*.safetensors")), folder / "metanet.safetensors"]
    found = {f"{f.relative_to(folder)} {k}": v for f in files for k, v in load_file(f).items()}
    assert len(found) > 20
    return found


def assert_same_bits(a, b):
    a, b = trained_tensors(a), trained_tensors(b)
    assert a.keys() == b.keys()
    assert [k for k in a if not torch.equal(a[k], b[k])] == []


# ---- the curriculum and the stream


def test_the_share_of_text_falls_from_one_to_zero():
    config = TrainConfig()
    shares = [text_share(config, step / 100) for step in range(101)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.99 and shares[-1] < 1e-5
    assert shares[30] == pytest.approx(0.5)
    assert text_share(TrainConfig(curriculum_middle=0.6), 0.6) == pytest.approx(0.5)
    assert text_share(TrainConfig(curriculum_sharpness=1e6), 1.0) == pytest.approx(0, abs=1e-9)
    assert text_share(TrainConfig(schedule="joint"), 0.0) == 0.0


@pytest.fixture(scope="module")
def long_stream(small_run):
    """The stream of a run of 60 steps over the small run's parts."""
    return stream_of(small_run.assembly, train__steps=60)


def stream_of(assembly, **changes):
    from dataclasses import replace

    config = small_config(assembly.config.model.name, **changes)
    return TrainStream(replace(assembly, config=config))


def test_text_rows_give_way_to_vectors(long_stream):
    entries = [long_stream[p] for p in range(len(long_stream))]
    assert len(entries) == 60 * 10
    as_text = [not vectors for _, vectors in entries]
    assert sum(as_text[:60]) >= 57 and sum(as_text[-300:]) <= 3
    middle = as_text[120:240]
    assert 0.3 < sum(middle) / len(middle) < 0.7


def test_every_entry_is_drawn_without_state(long_stream, small_run):
    entries = [long_stream[p] for p in range(len(long_stream))]
    assert [long_stream[p] for p in reversed(range(len(entries)))] == entries[::-1]
    again = stream_of(small_run.assembly, train__steps=60)
    assert [again[p] for p in range(len(again))] == entries
    other = stream_of(small_run.assembly, train__steps=60, seed=1)
    assert [other[p] for p in range(len(other))] != entries


def test_joint_never_shows_text(small_run):
    stream = stream_of(small_run.assembly, train__schedule="joint")
    assert all(stream[p][1] for p in range(len(stream)))


def test_every_task_is_in_every_batch(long_stream):
    for start in range(0, len(long_stream), 10):
        tasks = Counter(long_stream[p][0].task for p in range(start, start + 10))
        assert set(tasks) == set(TASKS)
    counts = Counter(long_stream[p][0].task for p in range(len(long_stream)))
    assert counts["ctr"] == pytest.approx(200, abs=2)  # 80 of 240 rows


def test_a_batch_has_the_rows_of_a_task_next_to_each_other(long_stream):
    batch = long_stream.collate([long_stream[p] for p in range(10)])
    tasks = batch["row_tasks"].tolist()
    assert tasks == sorted(tasks) and set(tasks) == set(range(5))


def test_a_task_without_train_rows_is_an_error(small_run, monkeypatch):
    data = small_run.assembly.data
    monkeypatch.setitem(data._rows, "rating.train", np.zeros(0, np.int64))
    with pytest.raises(ValueError, match="no train rows for rating; leave the task out"):
        TrainStream(small_run.assembly)


def test_what_travels_to_loader_processes_has_no_model_and_no_object_a_row(small_run):
    """Started by spawn or forkserver, each would get a copy of the language model."""
    kinds = Counter()

    class Watched(pickle.Pickler):
        def reducer_override(self, thing):
            kinds.update([type(thing)])
            return NotImplemented

    Watched(io.BytesIO()).dump(TrainStream(small_run.assembly))
    assert kinds[ckf.batches.Collator] and kinds[ckf.batches.Example] == 0
    assert not [kind for kind in kinds if issubclass(kind, torch.nn.Module | torch.nn.Parameter)]


# ---- a whole training


def test_training_lowers_the_held_out_loss_of_every_task(small_metrics):
    losses = small_metrics["held_out_loss"]
    gains = {task: losses["before"][task] - losses["after"][task] for task in TASKS}
    assert min(gains.values()) > 0 and sum(gains.values()) > 0.5 * len(gains), gains


def test_the_log_has_every_step_once(small_run):
    lines = read_log(small_run.folder)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for line in lines:
        assert {"loss", "lr", "text_share", "tokens_per_second", *(f"loss/{t}" for t in TASKS)} <= {
            *line
        }
    assert lines[0]["text_share"] > 0.9 and lines[-1]["text_share"] < 0.01
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_checkpoints_hold_what_is_trained_and_never_the_base(small_run):
    folder = last_checkpoint(small_run.folder / "checkpoints")
    assert folder.name == f"checkpoint-{STEPS}"
    checkpoint, whole = trained_tensors(folder), trained_tensors(small_run.folder)
    assert checkpoint.keys() == whole.keys()
    changed = {k.split()[1] for k in whole if not torch.equal(checkpoint[k], whole[k])}
    assert changed == {"no_user", "no_item"}  # no row was without a vector: MetaNetwork.settle
    for who in ("user", "item"):
        bias = whole[f"metanet.safetensors {who}_out.bias"]
        assert torch.equal(whole[f"metanet.safetensors no_{who}"], bias)
    shapes = [v.shape for f in folder.rglob("*.safetensors") for v in load_file(f).values()]
    vocabulary = small_run.assembly.model.backbone.config.vocab_size
    assert shapes and all(vocabulary not in shape for shape in shapes)
    assert "model.safetensors" not in {f.name for f in folder.rglob("*")}


def test_the_optimizer_has_both_learning_rates(small_run, tmp_path):
    stream = TrainStream(small_run.assembly)
    trainer = CKFTrainer(small_run.assembly, stream, tmp_path, torch.device("cpu"))
    lora, vector = trainer.create_optimizer().param_groups
    names = {id(p): n for n, p in small_run.assembly.model.named_parameters()}
    assert all("lora_" in names[id(p)] for p in lora["params"])
    assert all("metanet" in names[id(p)] for p in vector["params"])
    count = len(lora["params"]) + len(vector["params"])
    assert count == sum(p.requires_grad for p in small_run.assembly.model.parameters())


def test_the_same_settings_give_the_same_bits(small_run, small_model, prepared, tmp_path):
    again = run_again(small_model, prepared, tmp_path / "again")
    assert_same_bits(again.folder, small_run.folder)


def test_checkpointed_activations_give_the_same_bits(small_run, small_model, prepared, tmp_path):
    made = run_again(small_model, prepared, tmp_path / "run", train__gradient_checkpointing=True)
    assert_same_bits(made.folder, small_run.folder)


def test_loader_processes_give_the_same_bits(small_run, small_model, prepared, tmp_path):
    made = run_again(small_model, prepared, tmp_path / "run", train__workers=1)
    assert_same_bits(made.folder, small_run.folder)


def test_a_bfloat16_base_trains_float32_adapters(small_model, prepared, tmp_path):
    made = run_again(
        small_model, prepared, tmp_path / "run", model__dtype="bfloat16", train__steps=3
    )
    assert made.assembly.model.backbone.dtype == torch.bfloat16
    assert {v.dtype for v in trained_tensors(made.folder).values()} == {torch.float32}
    assert read_log(made.folder)[-1]["loss"] < 8


def test_accumulated_micro_batches_train(small_model, prepared, tmp_path):
    made = run_again(
        small_model, prepared, tmp_path / "run", train__batch_size=5, train__accumulation=2,
        train__steps=4, train__log_every=2,
    )  # fmt: skip
    lines = read_log(made.folder)
    assert [line["step"] for line in lines] == [1, 2, 4]
    for line in lines:  # the loss is a mean over micro-batches and steps, as those of the tasks
        tasks = [line[f"loss/{t}"] for t in TASKS]
        assert min(tasks) < line["loss"] < max(tasks)


def test_padded_training_follows_packed_training(small_run, small_model, prepared, tmp_path):
    changes = {"lora__lora_dropout": 0.0, "train__steps": 4}
    packed = run_again(small_model, prepared, tmp_path / "packed", **changes)
    padded = run_again(small_model, prepared, tmp_path / "padded", train__packing=False, **changes)
    assert packed.assembly.packed and not padded.assembly.packed
    for a, b in zip(read_log(packed.folder), read_log(padded.folder), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)


@pytest.mark.parametrize("kind", ["constant", "mlp", "linear", "none"])
def test_other_maps_train(small_model, prepared, tmp_path, kind):
    changes = {"metanet__kind": kind, "train__steps": 2, "train__schedule": "joint"}
    made = run_again(small_model, prepared, tmp_path / "run", **changes)
    assert (made.folder / "metanet.safetensors").exists() == (kind != "none")
    assert made.assembly.uses_vectors == (kind != "none")
    load_trained(made.assembly, made.folder)


# ---- what stops training


@pytest.mark.parametrize("log_every", [1, 50])
def test_training_stops_where_something_is_not_finite(small_model, prepared, tmp_path, log_every):
    folder = tmp_path / "run"
    with pytest.raises(ValueError, match="not finite at step .*lower train.lr"):
        run_again(
            small_model, prepared, folder, train__lr=1e30, train__vector_lr=1e30,
            train__max_grad_norm=0.0, train__save_every=1, train__warmup=0.0,
            train__log_every=log_every,
        )  # fmt: skip
    for line in (folder / "train_log.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)  # no NaN in the log
    kept = last_checkpoint(folder / "checkpoints")
    assert kept.name == "checkpoint-1"
    assert all(v.isfinite().all() for v in trained_tensors(kept).values())
    assert not (folder / "run.json").exists()


class Stop(TrainerCallback):
    """Ctrl-C at the end of a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.fixture
def interrupt(monkeypatch, small_model, prepared):
    """A function that trains the small run into a folder, killed at a step."""

    def train_until(folder, step, **changes):
        class Killed(CKFTrainer):
            def __init__(self, *args):
                super().__init__(*args)
                self.add_callback(Stop(step))

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(ckf.train, "CKFTrainer", Killed)
            run_again(small_model, prepared, folder, **changes)
        assert not (folder / "run.json").exists() and not (folder / "adapters").exists()
        return folder

    return train_until


def assert_goes_on(folder, small_run, model, prepared, **changes):
    resumed = run_again(model, prepared, folder, **changes)
    assert_same_bits(resumed.folder, small_run.folder)
    steps = [line["step"] for line in read_log(folder)]
    assert steps == list(range(1, STEPS + 1))
    a, b = read_log(folder), read_log(small_run.folder)
    assert [line["loss"] for line in a] == [line["loss"] for line in b]


@pytest.mark.parametrize("step", [2, 6])
def test_an_interrupted_run_ends_in_the_same_bits(
    interrupt, small_run, small_model, prepared, tmp_path, step
):
    folder = interrupt(tmp_path / "run", step)
    assert (last_checkpoint(folder / "checkpoints") is not None) == (step > 4)
    assert_goes_on(folder, small_run, small_model, prepared)


def test_an_interrupted_run_with_learned_gates_ends_in_the_same_bits(
    interrupt, small_model, prepared, tmp_path
):
    changes = {"lora__gate": "learned", "train__weight_decay": 0.1}
    whole = run_again(small_model, prepared, tmp_path / "whole", **changes)
    folder = interrupt(tmp_path / "run", 6, **changes)
    resumed = run_again(small_model, prepared, folder, **changes)
    assert any("ckf_gate" in key for key in trained_tensors(whole.folder))
    assert_same_bits(resumed.folder, whole.folder)


def test_only_matrices_decay():
    metanet = MetaNetwork(4, 8, 0.1, "constant", matches=True)
    decays, rest = _groups(metanet, 1e-3, 0.1)
    names = {id(p): n for n, p in metanet.named_parameters()}
    assert {names[id(p)] for p in decays["params"]} == {
        "user_out.weight", "item_out.weight", "match_out.weight"
    }  # fmt: skip
    assert len(decays["params"]) + len(rest["params"]) == len(names)
    assert (decays["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    model = ckf.patch_model(tiny_model(), ["ctr"], r=2, gate="learned")
    decays, rest = _groups(model, 1e-3, 0.1)
    gates = [p for n, p in model.named_parameters() if "ckf_gate" in n]
    assert gates and {id(p) for p in gates} == {id(p) for p in rest["params"]}
    assert len(decays["params"]) == 2 * 7 * 2 * 2  # layers, linears, LoRAs, A and B
    (whole,) = _groups(model, 1e-3, 0.0)
    assert len(whole["params"]) == len(decays["params"]) + len(gates)


@pytest.mark.parametrize("harm", ["missing", "cut", "other step", "empty"])
def test_a_half_written_checkpoint_is_skipped(
    interrupt, small_run, small_model, prepared, tmp_path, harm
):
    folder = interrupt(tmp_path / "run", 6)
    whole = folder / "checkpoints" / "checkpoint-4"
    broken = shutil.copytree(whole, whole.with_name("checkpoint-5"))
    state = broken / "trainer_state.json"
    text = state.read_text().replace('"global_step": 4', '"global_step": 5')
    damage = {"cut": text[: len(text) // 2], "other step": state.read_text(), "empty": ""}
    if harm == "missing":
        state.unlink()
    else:
        state.write_text(damage[harm])
    assert last_checkpoint(folder / "checkpoints") == whole and not broken.exists()
    shutil.copytree(whole, whole.with_name("checkpoint-7")).joinpath("trainer_state.json").unlink()
    assert_goes_on(folder, small_run, small_model, prepared)


def test_without_a_whole_checkpoint_training_starts_anew(
    interrupt, small_run, small_model, prepared, tmp_path
):
    folder = interrupt(tmp_path / "run", 6)
    (folder / "checkpoints" / "checkpoint-4" / "trainer_state.json").unlink()
    assert_goes_on(folder, small_run, small_model, prepared)


def test_seconds_go_on_where_they_were(interrupt, small_model, prepared, tmp_path):
    folder = interrupt(tmp_path / "run", 6)
    lines = read_log(folder)
    assert all(line["seconds"] > 0 for line in lines)
    lines[-1]["seconds"] = lines[3]["seconds"] = 500.0  # of the last step and of checkpoint-4
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "train_log.jsonl").write_text(text)
    run_again(small_model, prepared, folder)
    about = json.loads((folder / "run.json").read_text())
    later = [line["seconds"] for line in read_log(folder)[4:]]
    assert 500 < later[0] <= later[-1] <= about["seconds"]["train"] < 560


def test_a_line_of_the_log_cut_short_is_dropped(
    interrupt, small_run, small_model, prepared, tmp_path
):
    folder = interrupt(tmp_path / "run", 6)
    with open(folder / "train_log.jsonl", "a") as file:
        file.write('{"step": 6, "lo')
    assert_goes_on(folder, small_run, small_model, prepared)


def test_a_kill_between_the_last_step_and_the_end_is_made_good(
    small_run, small_model, prepared, run_copy
):
    (run_copy / "run.json").unlink()
    (run_copy / "metanet.safetensors").unlink()
    assert_goes_on(run_copy, small_run, small_model, prepared)
    assert json.loads((run_copy / "run.json").read_text())["name"] == "small"


# ---- reading back


@pytest.mark.parametrize("content", [None, b"", b"no tensors at all", "cut"])
def test_a_damaged_meta_network_is_an_error(small_run, run_copy, content):
    file = run_copy / "metanet.safetensors"
    whole = file.read_bytes()
    file.unlink()
    if content is not None:
        file.write_bytes(whole[: len(whole) // 2] if content == "cut" else content)
    with pytest.raises(ValueError, match="metanet.safetensors is missing or damaged"):
        load_trained(small_run.assembly, run_copy)


def test_a_meta_network_of_an_earlier_version_is_read_as_it_was(
    small_run, small_model, prepared, tmp_path, run_copy
):
    file = run_copy / "metanet.safetensors"
    tensors = load_file(file)
    added = ("no_user", "no_item", "gain")
    save_file({k: v for k, v in tensors.items() if k not in added}, file)
    try:
        load_trained(small_run.assembly, run_copy)
        metanet = small_run.assembly.model.metanet
        assert torch.equal(metanet.no_user, metanet.user_out.bias)
        assert torch.equal(metanet.no_item, metanet.item_out.bias) and metanet.gain == 1
    finally:
        load_trained(small_run.assembly, small_run.folder)


def test_a_meta_network_of_another_width_is_an_error(
    small_run, small_model, prepared, tmp_path, run_copy
):
    other = run_again(small_model, prepared, tmp_path / "other", metanet__hidden=4, train__steps=1)
    shutil.copy(other.folder / "metanet.safetensors", run_copy / "metanet.safetensors")
    before = {k: v.clone() for k, v in small_run.assembly.model.state_dict().items()}
    with pytest.raises(ValueError, match=r"make_map.0.bias of shape \(4,\).* expects \(8,\)"):
        load_trained(small_run.assembly, run_copy)
    after = small_run.assembly.model.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
