"""Several things at once: threads, models, trainings, data workers."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import ckf
from tests.test_train import assert_same_bits, read_log, run_again
from tests.tiny import randomise_adapters, tiny_model, tokens

TASKS = ["ctr", "topk", "rating"]


def patched(seed: int = 0, tasks=TASKS, **options):
    model = ckf.patch_model(tiny_model(seed=seed), list(tasks), r=2, lora_alpha=8, **options)
    randomise_adapters(model, seed + 2)
    return model.eval()


def together(jobs: list) -> list:
    """The results of functions that start at one moment, each in a thread of its own."""
    gate = threading.Barrier(len(jobs))

    def run(job):
        gate.wait(30)
        return job()

    with ThreadPoolExecutor(len(jobs)) as pool:
        return [done.result(120) for done in [pool.submit(run, job) for job in jobs]]


@pytest.mark.parametrize("gate", ["hard", "learned"])
def test_threads_with_their_own_tasks_get_what_each_gets_alone(gate):
    model, x = patched(gate=gate), tokens()
    ids = [["ctr"] * 4, ["topk"] * 4, [-1] * 4, ["rating", "ctr", "topk", "ctr"]]

    def forward(own):
        with torch.no_grad():
            return [model(input_ids=x, task_ids=own).logits for _ in range(8)]

    alone = [forward(own) for own in ids]
    for own, threaded in zip(
        alone, together([lambda own=own: forward(own) for own in ids]), strict=True
    ):
        assert all(torch.equal(a, b) for a, b in zip(own, threaded, strict=True))
    assert not torch.equal(alone[0][0], alone[1][0])  # the tasks do differ


def test_threads_that_train_one_model_get_the_gradients_of_each_alone():
    model, x = patched().train(), tokens()
    leaves = [p for n, p in model.named_parameters() if "lora_" in n]

    def gradients(task):
        found = []
        for _ in range(4):
            loss = model(input_ids=x, labels=x, task_ids=[task] * 4).loss
            found.append(torch.autograd.grad(loss, leaves))
        return found

    alone = [gradients(task) for task in TASKS]
    for own, threaded in zip(
        alone, together([lambda t=t: gradients(t) for t in TASKS]), strict=True
    ):
        for a, b in zip(own, threaded, strict=True):
            assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def test_a_default_task_holds_in_its_own_thread_alone():
    model, x = patched(), tokens()
    with ckf.use_task(model, "ctr"):
        with pytest.raises(ValueError, match="task_ids"):
            together([lambda: model(input_ids=x)])
        with torch.no_grad():
            inside = model(input_ids=x).logits
            assert torch.equal(inside, model(input_ids=x, task_ids=["ctr"] * 4).logits)


def test_two_models_patched_at_once_know_nothing_of_each_other():
    x = tokens()
    first, second = patched(0), patched(1, ["explain", "ctr"])
    with torch.no_grad():
        alone = [
            patched(0)(input_ids=x, task_ids=["topk"] * 4).logits,
            patched(1, ["explain", "ctr"])(input_ids=x, task_ids=["explain"] * 4).logits,
        ]
        with ckf.use_task(first, "topk"), ckf.use_task(second, "explain"):
            both = [first(input_ids=x).logits, second(input_ids=x).logits]
    assert all(torch.equal(a, b) for a, b in zip(alone, both, strict=True))
    threaded = together(
        [
            lambda: first(input_ids=x, task_ids=["topk"] * 4).logits.detach(),
            lambda: second(input_ids=x, task_ids=["explain"] * 4).logits.detach(),
        ]
    )
    assert all(torch.equal(a, b) for a, b in zip(alone, threaded, strict=True))
    ckf.unpatch_model(first)
    with torch.no_grad():
        assert torch.equal(second(input_ids=x, task_ids=["explain"] * 4).logits, alone[1])


def test_one_training_after_the_other_gives_the_same_bits(small_model, prepared, tmp_path):
    """The first leaves nothing behind in the process."""
    changes = {"train__steps": 3}
    runs = [run_again(small_model, prepared, tmp_path / name, **changes) for name in "ab"]
    assert_same_bits(runs[0].folder, runs[1].folder)
    assert [x["loss"] for x in read_log(runs[0].folder)] == [
        x["loss"] for x in read_log(runs[1].folder)
    ]


def test_two_trainings_in_threads_each_end_as_alone(small_model, prepared, tmp_path):
    """One waits for the other: they would share random numbers and accelerate's state."""

    def train(name: str, tasks: list[str]):
        return run_again(
            small_model, prepared, tmp_path / name, train__steps=4, tasks={t: {} for t in tasks}
        )

    jobs = {"a": ["ctr", "topk"], "b": ["topk", "ctr"]}
    runs = together([lambda n=name, t=tasks: train(n, t) for name, tasks in jobs.items()])
    for run, (name, tasks) in zip(runs, jobs.items(), strict=True):
        losses = [line["loss"] for line in read_log(run.folder)]
        assert len(losses) == 4 and all(math.isfinite(loss) for loss in losses)
        trained = run.assembly.model.state_dict()
        alone = train(f"{name}-alone", tasks).assembly.model.state_dict()
        assert all(torch.equal(trained[n], alone[n]) for n in trained)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_data_workers_make_the_same_batches(small_run, context):
    stream = small_run_stream(small_run)
    loader = DataLoader(
        stream,
        batch_size=stream.per_step,
        collate_fn=stream.collate,
        num_workers=2,
        multiprocessing_context=context,
    )
    made, count = [stream.collate([stream[p] for p in range(10)])], 0
    for batch in loader:
        made.append(batch)
        count += 1
        if count == 1:
            break
    assert made[0].keys() == made[1].keys()
    rows, others = (batch.pop("packed_rows") for batch in made)
    assert torch.equal(rows.gather, others.gather) and torch.equal(rows.scatter, others.scatter)
    assert rows.groups == others.groups
    for key, value in made[0].items():
        same = torch.equal if isinstance(value, torch.Tensor) else lambda a, b: a == b
        assert same(value, made[1][key]), key


def small_run_stream(run) -> Dataset:
    from ckf.train import TrainStream

    return TrainStream(run.assembly)
