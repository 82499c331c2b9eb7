"""What routing costs the host, and that it never waits for a device."""

import time

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import ckf
from ckf.patch import patched_layers
from tests.tiny import randomise_adapters

TASKS = ["ctr", "topk"]


def deep_model(**options):
    """224 linears in 32 layers, each as small as can be: q, k, v grouped, and gate, up."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64}
    torch.manual_seed(0)
    model = ckf.patch_model(
        AutoModelForCausalLM.from_config(LlamaConfig(**sizes, **heads)), TASKS, r=2, **options
    )
    randomise_adapters(model)
    return model


def inputs_of(layers, device="cpu"):
    """A tensor for each layer; siblings share one."""
    inputs = {}
    for layer in layers:
        if layer not in inputs:
            x = torch.randn(2, 4, layer.in_features, device=device)
            inputs |= {member: x for member in (layer, *layer._siblings)}
    return inputs


def route_once(model, layers, inputs, ids) -> float:
    """CPU seconds of all that one forward pass asks of routing, layer by layer, in training."""
    tokens = {"input_ids": torch.ones(2, 4, dtype=torch.int64), "use_cache": False}
    forward, router = model.forward, model._ckf.router
    start = time.thread_time()
    named = forward._named((), tokens)
    forward.check_packing(model, named, ids)
    shape, device, past = forward._sizes(named)
    with router.following(router.make_route(ids, shape, device, True, past)):
        for layer in layers:
            x, route = inputs[layer], layer.router.route
            if route.take(x, layer.index) is None:
                route.ids_for(x)
                route.seed_for(x, layer._leader)
                siblings = [sibling.index for sibling in layer._siblings]
                route.keep(x, siblings, [x] * len(siblings))
    return time.thread_time() - start


def test_routing_224_linears_takes_the_host_under_a_millisecond():
    """The least of many: whatever else runs on the machine only adds."""
    model = deep_model()
    layers = list(patched_layers(model).values())
    assert len(layers) == 224
    inputs, ids, took = inputs_of(layers), torch.tensor([0, 1]), []
    for _ in range(2000):
        took.append(route_once(model, layers, inputs, ids))
        if min(took) < 1e-3 and len(took) >= 20:
            break
    assert min(took) < 1e-3


def test_routing_never_reads_ids_that_lie_on_a_device():
    """Tensors on the meta device have no values: to read one raises."""
    model = deep_model()
    router, presence = model._ckf.router, ckf.TaskPresence(model)
    for ids in (torch.tensor([0, -1]), torch.tensor([[0, 0, 1], [1, 1, -1]])):
        ids = ids.to("meta")
        with pytest.raises(RuntimeError):
            ids.max().item()
        route = router.make_route(ids, (2, 3), ids.device, True)
        x = torch.empty(2, 3, 16, device="meta")
        assert route.ids_for(x).shape == (2, 3) and not route.base_only
        assert isinstance(route.seed_for(x, 0), int)
        presence.observe(ids)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.1}, {"gate": "learned"}])
def test_a_step_of_all_layers_never_waits_for_the_gpu(options):
    model = deep_model(**options).cuda().train()
    layers = list(patched_layers(model).values())
    inputs, ids = inputs_of(layers, "cuda"), torch.tensor([0, 1], device="cuda")
    router = model._ckf.router

    def step():
        with router.following(router.make_route(ids, (2, 4), ids.device, True)):
            sum(layer(inputs[layer]).sum() for layer in layers).backward()

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
