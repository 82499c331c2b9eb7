"""Gradient checkpointing: gradients bit-equal to none, however it was switched on."""

import threading

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import ckf
from ckf.routing import RoutedCheckpoint
from tests.test_patch import TASKS, patched
from tests.tiny import FAMILIES, randomise_adapters, tiny_model, tokens


def enable(model, reentrant, **options):
    newer = hasattr(model, "activation_checkpointing_enable")  # transformers from 5.24
    name = "activation_checkpointing" if newer else "gradient_checkpointing"
    getattr(model, f"{name}_enable")({"use_reentrant": reentrant}, **options)


def gradients(family="llama", before=None, after=None, elsewhere=False, task=None):
    """Of two forward passes and one backward: dropout on, siblings grouped.

    before, after: switch checkpointing on in the model before or after it is patched.
    elsewhere: backward in another thread. task: of all rows, by ``use_task``.
    """
    model = tiny_model(family).train()
    if before:
        before(model)
    ckf.patch_model(model, TASKS, r=4, lora_alpha=8, lora_dropout=0.3)
    randomise_adapters(model)
    if after:
        after(model)
    torch.manual_seed(5)
    failed = []

    def run():
        first, second = ([0, 1, 2, -1], [2, 2, 0, 1]) if task is None else (None, None)
        losses = model(input_ids=tokens(), labels=tokens(), task_ids=first).loss
        losses = losses + model(input_ids=tokens(seed=9), labels=tokens(), task_ids=second).loss

        def backward():
            try:
                losses.backward()
            except Exception as error:
                failed.append(error)

        if elsewhere:
            thread = threading.Thread(target=backward)
            thread.start()
            thread.join()
        else:
            backward()

    if task is None:
        run()
    else:
        with ckf.use_task(model, task):
            run()
    if failed:
        raise failed[0]
    return [p.grad for p in model.parameters() if p.requires_grad]


def same(one, other):
    return all(torch.equal(p, q) for p, q in zip(one, other, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_those_without(family, reentrant):
    plain = gradients(family)
    assert same(plain, gradients(family, after=lambda m: enable(m, reentrant)))
    assert same(plain, gradients(family, after=lambda m: enable(m, reentrant), elsewhere=True))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("task", [None, "ctr"])
def test_it_may_be_on_before_the_patch(reentrant, task):
    recomputed = gradients(before=lambda m: enable(m, reentrant), task=task, elsewhere=not task)
    assert same(gradients(task=task), recomputed)


def wrap_layers(model):
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = checkpoint_wrapper(layer)


@pytest.mark.parametrize("task", [None, "ctr"])
@pytest.mark.parametrize(
    "switch",
    [lambda m: enable(m.model, False), lambda m: enable(m.model, True), wrap_layers],
    ids=["inner", "inner-reentrant", "wrapper"],
)
def test_a_checkpoint_without_tasks_raises_instead_of_guessing(switch, task):
    with pytest.raises(ValueError, match="knows no tasks .*gradient_checkpointing_enable"):
        gradients(after=switch, task=task)


def test_switching_it_on_and_off_and_unpatching_leaves_no_trace():
    model = tiny_model()
    enable(model, False)
    own = model.model.layers[0]._gradient_checkpointing_func
    ckf.patch_model(model, TASKS)
    assert isinstance(model.model.layers[0]._gradient_checkpointing_func, RoutedCheckpoint)
    ckf.unpatch_model(model)
    assert model.model.layers[0]._gradient_checkpointing_func is own
    model = patched()
    enable(model, False)
    model = ckf.unpatch_model(model).train()
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    functions = [m.__dict__.get("_gradient_checkpointing_func") for m in model.modules()]
    assert not any(isinstance(f, RoutedCheckpoint) for f in functions)


@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_that_train_in_a_model_that_does_not_recompute_their_dropout(reentrant):
    """Their seed is drawn late, yet before what the checkpoint draws again."""
    found = []
    for checkpointed in (False, True):
        model = ckf.patch_model(tiny_model("gpt2"), TASKS, r=4, lora_dropout=0.3)
        randomise_adapters(model)
        if checkpointed:
            enable(model, reentrant)
        model.transformer.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.3
        torch.manual_seed(5)
        model(input_ids=tokens(), labels=tokens(), task_ids=[0, 1, 2, -1]).loss.backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
