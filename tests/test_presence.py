"""A task without rows in a step does not move, whatever the optimizer remembers or decays."""

import copy
import pickle

import pytest
import torch

import ckf
from ckf.patch import patched_layers
from ckf.presence import TaskPresence
from tests.tiny import randomise_adapters, tiny_model, tokens

TASKS = ("ctr", "topk", "rating")


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)


def fused(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1, fused=True)


def each(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1, foreach=True)


def momentum(parameters):
    return torch.optim.SGD(parameters, lr=1e-2, momentum=0.9, weight_decay=0.1)


class Setup:
    """A patched model with random adapters, an optimizer, and perhaps presence."""

    def __init__(self, make=adamw, watched=True, **options):
        self.model = ckf.patch_model(tiny_model(), list(TASKS), r=2, lora_alpha=4, **options)
        randomise_adapters(self.model)
        self.optimizer = make([p for p in self.model.parameters() if p.requires_grad])
        self.presence = TaskPresence(self.model)
        if watched:
            self.presence.attach(self.optimizer)

    def forward_backward(self, ids):
        x = tokens(len(ids))
        logits = self.model(input_ids=x, task_ids=torch.tensor(ids)).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), x.flatten()).backward()

    def step(self, *micro_batches):
        """One optimizer step; tasks whose adapters moved, and whether the shared one did."""
        before = self.adapters()
        for ids in micro_batches:
            self.forward_backward(ids)
        self.optimizer.step()
        self.optimizer.zero_grad()
        after = self.adapters()
        return {e for e, own in before.items() if any(map(differ, own, after[e]))}

    def adapters(self):
        layers = patched_layers(self.model).values()
        return {
            expert: [p[expert].detach().clone() for m in layers for p in (m.lora_A, m.lora_B)]
            for expert in ("shared", *TASKS)
        }


def differ(a, b):
    return not torch.equal(a, b)


@pytest.mark.parametrize("make", [adamw, fused, each, momentum])
def test_an_absent_task_does_not_move_and_the_others_do(make):
    setup = Setup(make)
    assert setup.step([0, 1, 2, 0]) == {"shared", "ctr", "topk", "rating"}  # fills the momentum
    assert setup.step([0, 2, 2, 0]) == {"shared", "ctr", "rating"}
    assert setup.step([1, 1]) == {"shared", "topk"}
    assert setup.step([0, 1, 2]) == {"shared", "ctr", "topk", "rating"}


@pytest.mark.parametrize("make", [adamw, momentum])
def test_without_presence_it_would_move(make):
    setup = Setup(make, watched=False)
    setup.step([0, 1, 2, 0])
    assert "topk" in setup.step([0, 2, 2, 0])


def test_clipping_measures_the_tasks_present_and_leaves_the_absent_at_rest():
    """Absent tasks have gradients of zero until the step: they add nothing to the norm."""
    setup = Setup()
    setup.step([0, 1, 2])
    before = setup.adapters()["topk"]
    setup.forward_backward([0, 2])
    grads = {n: p.grad for n, p in setup.model.named_parameters() if p.grad is not None}
    present = [g.clone() for n, g in grads.items() if not n.endswith(".topk")]
    norm = torch.nn.utils.clip_grad_norm_(list(setup.model.parameters()), 1e-3)
    torch.testing.assert_close(norm, torch.stack([g.norm() for g in present]).norm())
    setup.optimizer.step()
    assert not any(map(differ, before, setup.adapters()["topk"]))


def test_tasks_of_all_micro_steps_count():
    setup = Setup()
    setup.step([0, 1, 2])
    assert setup.step([0, 0], [2, 2]) == {"shared", "ctr", "rating"}
    assert setup.step([0, 0], [0, 0]) == {"shared", "ctr"}  # nothing is left from the step before


def test_rows_of_the_base_alone_are_rows_of_no_task():
    setup = Setup()
    setup.step([0, 1, 2])
    assert setup.step([-1, 0]) == {"shared", "ctr"}


@pytest.mark.parametrize("ids", [["ctr", "rating"], torch.tensor([[0] * 7, [2] * 7])])
def test_forward_passes_are_noted_with_names_and_an_id_a_token(ids):
    setup = Setup()
    with torch.no_grad():
        setup.model(input_ids=tokens(1), task_ids=["topk"])  # not trained on
    assert setup.presence._seen is None
    setup.model(input_ids=tokens(2), task_ids=ids)
    assert setup.presence._seen.tolist() == [True, False, True]
    with ckf.use_task(setup.model, "topk"):
        setup.model(input_ids=tokens(1))
    assert setup.presence._seen.tolist() == [True, True, True]


@pytest.mark.parametrize("ids", [[0, 2], [2, 0]])
def test_compiled_forward_passes_are_noted(ids):
    setup = Setup()
    compiled = torch.compile(setup.model, backend="eager", fullgraph=True)
    for _ in range(2):  # traced, then run
        compiled(input_ids=tokens(2), task_ids=torch.tensor(ids), use_cache=False)
        assert setup.presence._seen.tolist() == [True, False, True]
        setup.presence.before_step()


def test_ids_may_be_one_a_token():
    presence = TaskPresence(ckf.patch_model(tiny_model(), list(TASKS), r=2))
    presence.observe(torch.tensor([[0, 0, -1], [2, 2, 2]]))
    assert presence._seen.tolist() == [True, False, True]


def test_an_absence_leaves_the_optimizers_memory_as_it_was():
    setup = Setup()
    setup.step([0, 1, 2])
    layer = next(iter(patched_layers(setup.model).values()))
    state = setup.optimizer.state[layer.lora_B["topk"]]
    before = {k: v.clone() for k, v in state.items()}
    setup.step([0, 2])
    assert all(torch.equal(state[k], v) for k, v in before.items())
    setup.step([1, 2])
    assert state["step"] == before["step"] + 1


@pytest.mark.parametrize("per_layer", [False, True])
def test_the_learned_gates_of_an_absent_task_do_not_move(per_layer):
    setup = Setup(gate="learned", gate_per_layer=per_layer)
    gates = [p for n, p in setup.model.named_parameters() if "ckf_gate" in n]
    assert len(gates) == (len(patched_layers(setup.model)) if per_layer else 1)
    setup.step([0, 1, 2])
    before = [g.detach().clone() for g in gates]
    setup.step([0, 2, 2])
    for gate, old in zip(gates, before, strict=True):
        assert torch.equal(gate[1], old[1])
        assert differ(gate[0], old[0]) and differ(gate[2], old[2])


def test_a_step_without_a_forward_pass_takes_nothing_away():
    setup = Setup()
    setup.forward_backward([0, 1, 2])
    setup.presence.before_step()
    assert all(p.grad is not None for p in setup.model.parameters() if p.requires_grad)
    setup.presence.before_step()
    assert all(p.grad is not None for p in setup.model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    "duplicate", [None, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_unpatching_ends_it(duplicate):
    setup = Setup()
    setup.step([0, 1, 2])
    model = setup.model if duplicate is None else duplicate(setup.model)
    setup.optimizer.zero_grad()
    ckf.unpatch_model(model)
    assert not model._forward_pre_hooks and not model._forward_pre_hooks_with_kwargs
    ckf.patch_model(model, ["a", "b", "c", "d"], r=2)
    model(input_ids=tokens(2), task_ids=["d", "b"]).logits.sum().backward()
    if duplicate is None:
        assert not setup.optimizer._optimizer_step_pre_hooks
        assert not setup.optimizer._optimizer_step_post_hooks
    else:  # the model it was copied from is watched as before
        assert setup.step([0, 0]) == {"shared", "ctr"}


def test_one_optimizer_is_watched_once():
    setup = Setup(gate="learned")
    setup.presence.attach(setup.optimizer)
    assert (
        len(setup.model._forward_pre_hooks) == len(setup.optimizer._optimizer_step_pre_hooks) == 1
    )


def test_an_optimizer_of_another_model_is_refused():
    model, other = (Setup(watched=False).model for _ in range(2))
    presence = TaskPresence(model)
    with pytest.raises(ValueError, match="steps nothing of the model; make it from"):
        presence.attach(torch.optim.SGD(other.parameters(), 0.1))
    with pytest.raises(ValueError, match="was given a str; expected a torch.optim.Optimizer"):
        presence.attach("adamw")
    assert presence._notes is None
