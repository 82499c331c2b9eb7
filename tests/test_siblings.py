"""Linears that are fed the same tensor: one shrink, one dropout mask, the same results."""

import pytest
import torch

import ckf
from ckf import layers
from ckf.patch import patched_layers
from tests.test_patch import logits, patched
from tests.tiny import randomise_adapters, tokens


def test_siblings_share_one_dropout_mask():
    model = patched(lora_dropout=0.5).train()
    seeds = []
    for name, layer in patched_layers(model).items():
        layer.register_forward_pre_hook(
            lambda layer, args, name=name: seeds.append(
                (name, layer.router.route.seed_for(args[0], layer.index))
            )
        )
    model(input_ids=tokens(), task_ids=[0] * 4)
    by_name = dict(seeds)
    attention = "model.layers.0.self_attn."
    assert by_name[attention + "q_proj"] == by_name[attention + "v_proj"]
    assert by_name[attention + "o_proj"] != by_name[attention + "q_proj"]
    assert by_name["model.layers.0.mlp.gate_proj"] == by_name["model.layers.0.mlp.up_proj"]
    assert len(set(by_name.values())) == 8  # four inputs in each of two layers


@pytest.mark.parametrize(
    ("family", "groups"),
    [
        ("llama", [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]]),
        ("phi", [["q_proj", "k_proj", "v_proj", "fc1"]]),
        ("opt", [["q_proj", "k_proj", "v_proj"]]),
        ("gpt2", []),
    ],
)
def test_layers_fed_the_same_tensor_form_groups(family, groups):
    model = patched(family)
    names = {layer: name.rsplit(".", 1)[-1] for name, layer in patched_layers(model).items()}
    found = [[names[m] for m in (layer, *layer._siblings)] for layer in names if layer._siblings]
    assert sorted(map(sorted, found)) == sorted(sorted(g) for g in groups * 2)  # two layers


class Under(torch.nn.Module):
    """A layer called under a context of its own."""

    def __init__(self, layer, context):
        super().__init__()
        self.layer, self.context = layer, context

    def forward(self, x):
        with self.context():
            return self.layer(x)


@pytest.mark.parametrize(
    "context", [torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)], ids=["grad", "cast"]
)
@pytest.mark.parametrize("compiled", [False, True])
def test_siblings_of_a_layer_under_another_mode_compute_their_own(context, compiled):
    def outputs(grouped):
        model = patched()
        randomise_adapters(model)
        attention = model.model.layers[0].self_attn
        attention.q_proj = Under(attention.q_proj, context)
        if not grouped:
            attention.q_proj.layer.join([])
        x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(3))

        def run(x, ids):
            with model._ckf.router.following(
                model._ckf.router.make_route(ids, (2, 3), "cpu", True)
            ):
                q, k = attention.q_proj(x), attention.k_proj(x)
            return q, k

        torch._dynamo.reset()
        run = torch.compile(run, fullgraph=True, backend="eager") if compiled else run
        q, k = run(x, torch.tensor([0, 1]))
        k.float().pow(2).sum().backward()
        return q, k, *(p.grad for p in attention.k_proj.parameters() if p.requires_grad)

    for ours, alone in zip(outputs(True), outputs(False), strict=True):
        assert (ours is None) == (alone is None)
        if ours is not None:
            assert ours.dtype == alone.dtype and torch.equal(ours, alone)


def test_layers_that_train_in_a_model_that_does_not_drop_afresh():
    """Monte Carlo dropout; in eval nothing is drawn, so that sampling goes as in the base."""
    model = patched(lora_dropout=0.5)
    randomise_adapters(model)
    ids = {"task_ids": [0, 1, 2, 0]}
    before = torch.get_rng_state()
    logits(model, tokens(), **ids)
    assert torch.equal(torch.get_rng_state(), before)
    for layer in patched_layers(model).values():
        layer.train()
    first, second = logits(model, tokens(), **ids), logits(model, tokens(), **ids)
    assert not torch.equal(first, second)
    torch.set_rng_state(before)
    assert torch.equal(logits(model, tokens(), **ids), first)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_groups_change_nothing(dropout):
    def gradients(grouped):
        model = patched(lora_dropout=dropout).train()
        randomise_adapters(model)
        if not grouped:
            for layer in patched_layers(model).values():
                layer.join([])
        torch.manual_seed(5)
        out = model(input_ids=tokens(), labels=tokens(), task_ids=[0, 1, 2, -1])
        out.loss.backward()
        return [out.logits, *(p.grad for p in model.parameters() if p.requires_grad)]

    for together, alone in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-6)


def test_a_sibling_fed_something_else_computes_alone():
    model = patched()
    randomise_adapters(model)
    attention = model.model.layers[0].self_attn
    x = torch.randn(1, 3, 32)
    with ckf.use_task(model, "ctr"):
        alone = attention.k_proj(x * 2)
    route = model._ckf.router.make_route("ctr", (1, 3), x.device, False)
    with model._ckf.router.following(route):
        attention.q_proj(x)
        assert torch.allclose(attention.k_proj(x * 2), alone)
        attention.q_proj(x)
        x.mul_(2)  # the same tensor, changed
        assert torch.allclose(attention.k_proj(x), alone)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_siblings_are_computed_together_without_gradients(mode, monkeypatch):
    model = patched().eval()
    randomise_adapters(model)
    calls, run = [], layers.run_group
    monkeypatch.setattr(layers, "run_group", lambda *a: calls.append(len(a[1])) or run(*a))
    with mode():
        grouped = model(input_ids=tokens(), task_ids=[0, 1, 2, -1]).logits
    assert sorted(calls) == sorted([3, 1, 2, 1] * 2)
    for layer in patched_layers(model).values():
        layer.join([])
    with mode():
        alone = model(input_ids=tokens(), task_ids=[0, 1, 2, -1]).logits
    torch.testing.assert_close(grouped, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_hook_that_changes_the_shared_input(mode):
    model = patched().eval()
    randomise_adapters(model)
    attention = model.model.layers[0].self_attn

    def double(_, args):
        args[0].mul_(2)

    attention.k_proj.register_forward_pre_hook(double)
    with mode():
        ours = model(input_ids=tokens(), task_ids=[0, 1, 2, -1]).logits
        attention.q_proj.join([])
        alone = model(input_ids=tokens(), task_ids=[0, 1, 2, -1]).logits
    assert torch.equal(ours, alone)


def test_an_output_of_inference_mode_is_not_handed_out_of_it():
    model = patched().eval()
    attention, router = model.model.layers[0].self_attn, model._ckf.router
    x = torch.randn(2, 3, 32)
    with router.following(router.make_route([0, 1], (2, 3), "cpu", False)), torch.no_grad():
        with torch.inference_mode():
            attention.q_proj(x)
        assert not attention.k_proj(x).is_inference()
