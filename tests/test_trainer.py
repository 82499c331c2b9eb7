"""transformers.Trainer and accelerate with a patched model: one line more, the rest as it was."""

import copy

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

import ckf
from ckf.patch import patched_layers
from ckf.trainer import MultiLoRATrainer
from tests.test_packing import padding
from tests.tiny import randomise_adapters, tiny_model, tokens

TASKS = ["ctr", "topk", "rating"]
ROWS = 16


def patched(**options):
    model = ckf.patch_model(tiny_model(), TASKS, r=2, lora_alpha=4, **options)
    randomise_adapters(model, scale=0.1)
    return model


def dataset(key="task_ids", tasks=TASKS, rows=ROWS):
    lengths = [5 + i % 3 for i in range(rows)]
    ids = tokens(rows, 7, seed=3).tolist()
    return [
        {"input_ids": r[:n], "attention_mask": [1] * n, "labels": r[:n], key: tasks[i % len(tasks)]}
        for i, (r, n) in enumerate(zip(ids, lengths, strict=True))
    ]


def arguments(folder, **changes):
    values = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "save_steps": 2,
        "logging_steps": 1,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
    }
    return TrainingArguments(**{**values, **changes})


def make_trainer(folder, model=None, rows=None, kind=MultiLoRATrainer, collator=None, **changes):
    model = patched() if model is None else model
    return kind(
        model=model,
        args=arguments(folder, **changes),
        train_dataset=dataset() if rows is None else rows,
        eval_dataset=dataset(),
        data_collator=collator or padding(model),
    )


def adapters(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}


def moved(before, after):
    """The experts that moved."""
    return {n.rsplit(".", 1)[-1] for n, p in before.items() if not torch.equal(p, after[n])}


def routed_ids(model):
    """A list that collects the task ids of every forward pass."""
    met = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: met.append(kwargs.get("task_ids")), with_kwargs=True
    )
    return met


# ---- task ids survive


@pytest.mark.parametrize("remove", [True, False])
@pytest.mark.parametrize("kind", [Trainer, MultiLoRATrainer])
def test_task_ids_reach_the_model(tmp_path, kind, remove):
    trainer = make_trainer(tmp_path, kind=kind, remove_unused_columns=remove, save_strategy="no")
    met = routed_ids(trainer.model)
    trainer.train()
    assert len(met) == 4 and {tuple(ids.shape) for ids in met} == {(4,)}
    assert {int(i) for ids in met for i in ids} == {0, 1, 2}
    assert trainer.state.log_history[0]["loss"] > 0


def test_integer_ids_need_no_collator_of_ours(tmp_path):
    model = patched()
    rows = [{**row, "task_ids": i % 3} for i, row in enumerate(dataset())]
    trainer = make_trainer(
        tmp_path, model, rows, collator=padding(model).collator, save_strategy="no"
    )
    met = routed_ids(model)
    trainer.train()
    assert {int(i) for ids in met for i in ids} == {0, 1, 2}


def test_other_columns_need_remove_unused_columns_false(tmp_path):
    rows = dataset("task")
    with pytest.raises(ValueError, match="no task among its keys .*remove_unused_columns=False"):
        make_trainer(tmp_path, rows=rows).train()
    make_trainer(tmp_path, rows=rows, remove_unused_columns=False, max_steps=1).train()


@pytest.mark.parametrize("packs", [False, "sdpa", "ckf_packed"])
def test_evaluation_and_prediction_use_the_ids(tmp_path, packs):
    model = patched()
    model.set_attn_implementation(packs or "sdpa")
    flatten = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    collator = ckf.TaskCollator(model, flatten) if packs else None
    size = {"per_device_eval_batch_size": 1}
    trainer = make_trainer(tmp_path, model, collator=collator, **size)
    losses = []
    for row in dataset():
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            losses.append(model(input_ids=ids, labels=ids, task_ids=[row["task_ids"]]).loss)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(sum(losses) / ROWS), rel=1e-5)
    predictions = trainer.predict(dataset()[:3]).predictions
    expected = model(input_ids=ids, task_ids=[row["task_ids"]]).logits
    assert predictions.shape[0] == 3
    row = dataset()[1]
    ids = torch.tensor([row["input_ids"]])
    expected = model(input_ids=ids, task_ids=[row["task_ids"]]).logits[0].detach()
    own = torch.from_numpy(predictions[1, : expected.shape[0]])
    torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "ckf_packed"])
def test_packed_training_equals_padded_training(tmp_path, attention):
    def train(make_collator):
        model = patched()
        model.set_attn_implementation(attention)
        trainer = make_trainer(tmp_path, model, collator=make_collator(model), save_strategy="no")
        trainer.train()
        return adapters(model), [line["loss"] for line in trainer.state.log_history[:4]]

    flatten = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    padded, losses = train(padding)
    packed, same = train(lambda model: ckf.TaskCollator(model, flatten))
    assert same == pytest.approx(losses, rel=1e-4)
    for name, value in padded.items():  # Adam turns a gradient near zero into a step of any sign
        assert (packed[name] - value).norm() < 1e-2 * value.norm(), name


def test_accumulation_equals_one_batch(tmp_path):
    def train(size, accumulation):
        model = patched()
        trainer = make_trainer(
            tmp_path,
            model,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            save_strategy="no",
            optim="sgd",
            max_grad_norm=0.0,
        )
        trainer.train()
        return adapters(model)

    whole, parts = train(8, 1), train(2, 4)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-3, atol=1e-5)


# ---- absent tasks


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_task_without_rows_does_not_move(tmp_path, accumulation):
    model = patched()
    before = adapters(model)
    options = {"gradient_accumulation_steps": accumulation, "save_strategy": "no"}
    make_trainer(tmp_path, model, dataset(tasks=["ctr", "rating"]), **options).train()
    assert moved(before, adapters(model)) == {"shared", "ctr", "rating"}


def test_with_a_plain_trainer_one_line_does_it(tmp_path):
    model = patched()
    before = adapters(model)
    trainer = make_trainer(tmp_path, model, dataset(tasks=["ctr"]), Trainer, save_strategy="no")
    ckf.TaskPresence(model).attach(trainer.create_optimizer())
    trainer.train()
    assert moved(before, adapters(model)) == {"shared", "ctr"}
    trainer = make_trainer(tmp_path, model, dataset(tasks=["ctr"]), Trainer, save_strategy="no")
    trainer.train()  # without the line, decay moves them all
    assert moved(before, adapters(model)) == {"shared", *TASKS}


def test_every_training_of_model_init_protects_them(tmp_path):
    """A new model and a new optimizer each time."""
    trainer = MultiLoRATrainer(
        model_init=lambda: patched(),
        args=arguments(tmp_path, save_strategy="no"),
        train_dataset=dataset(tasks=["ctr"]),
        data_collator=padding(patched()),
    )
    for _ in range(2):
        trainer.train()
        assert moved(adapters(patched()), adapters(trainer.model)) == {"shared", "ctr"}
    trainer.optimizer = None  # another optimizer for the same model
    before = adapters(trainer.model)
    trainer.create_optimizer()
    assert len(trainer.model._forward_pre_hooks) == 1
    trainer.model(input_ids=tokens(2), task_ids=["rating"] * 2).logits.sum().backward()
    trainer.optimizer.step()
    assert moved(before, adapters(trainer.model)) == {"shared", "rating"}


# ---- checkpoints


def contents(folder):
    return sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file())


@pytest.mark.parametrize("kind", [Trainer, MultiLoRATrainer])
def test_checkpoints_hold_adapters_and_never_the_base(tmp_path, kind):
    trainer = make_trainer(tmp_path / "run", kind=kind)
    trainer.train()
    trainer.save_model()
    trainer.save_model()  # once more, over what is there
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-4"):
        weights = [f for f in contents(folder) if f.endswith((".safetensors", ".bin"))]
        weights = [f for f in weights if "checkpoint" not in f and f != "training_args.bin"]
        experts = ("ctr", "rating", "shared", "topk")
        assert weights == [f"adapters/{e}/adapter_model.safetensors" for e in experts]
        twin = patched()
        ckf.load_adapters(twin, folder / "adapters")
        own = adapters(trainer.model)
        assert all(torch.equal(p, own[n]) for n, p in adapters(twin).items())
    assert (tmp_path / "run" / "checkpoint-2").exists()
    saved = torch.load(tmp_path / "run" / "checkpoint-4" / "optimizer.pt")["state"]
    assert len(saved) == len(adapters(trainer.model))


@pytest.mark.parametrize("gate", ["hard", "learned"])
def test_a_resumed_training_ends_in_the_same_bits(tmp_path, gate):
    def train(folder, **options):
        model = patched(gate=gate, lora_dropout=0.1)
        trainer = make_trainer(folder, model)
        trainer.train(**options)
        return {n: p for n, p in model.named_parameters() if p.requires_grad}

    whole = train(tmp_path / "run")
    resumed = train(tmp_path / "run", resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert [n for n, p in whole.items() if not torch.equal(p, resumed[n])] == []


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    trainer = make_trainer(
        tmp_path, load_best_model_at_end=True, eval_strategy="steps", eval_steps=2,
        metric_for_best_model="eval_loss", greater_is_better=True, learning_rate=1e-3,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")  # the loss falls
    saved = load_file(tmp_path / "checkpoint-2/adapters/ctr/adapter_model.safetensors")
    own = patched_layers(trainer.model)["model.layers.0.self_attn.q_proj"].lora_A["ctr"]
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert torch.equal(saved[name], own.detach())


def test_save_pretrained_saves_adapters_until_unpatched(tmp_path):
    model = patched()
    model.save_pretrained(tmp_path / "patched")
    assert {f.split("/")[0] for f in contents(tmp_path / "patched")} == {"adapters"}
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other").exists()
    with pytest.raises(ValueError, match="cannot take push_to_hub; call ckf.save_adapters"):
        model.save_pretrained(tmp_path / "hub", push_to_hub=True)
    ckf.unpatch_model(model).save_pretrained(tmp_path / "base")
    assert "model.safetensors" in contents(tmp_path / "base")


# ---- accelerate


@pytest.fixture
def fresh_accelerate():
    """accelerate keeps its settings for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_an_accelerate_loop(tmp_path, precision, fresh_accelerate):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, mixed_precision=precision)
    model = patched()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    loader = DataLoader(dataset(tasks=["ctr", "topk"]), batch_size=4, collate_fn=padding(model))
    before = adapters(model)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    ckf.TaskPresence(model).attach(optimizer)
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
    inner = accelerator.unwrap_model(model)
    assert moved(before, adapters(inner)) == {"shared", "ctr", "topk"}
    inner.save_pretrained(
        tmp_path,
        is_main_process=accelerator.is_main_process,
        save_function=accelerator.save,
        state_dict=accelerator.get_state_dict(model),
    )
    twin = copy.deepcopy(inner)
    randomise_adapters(twin)
    ckf.load_adapters(twin, tmp_path / "adapters")
    assert not moved(adapters(inner), adapters(twin))


def test_data_parallel_is_refused_with_the_fix():
    model = patched()
    with pytest.raises(ValueError, match="start one process a GPU with torchrun"):
        for module in model.modules():
            module._replicate_for_data_parallel()
