"""Decoder layers as CUDA graphs, and with Liger's kernels, give what they give without."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import ckf
from ckf.layer_graphs import LayerGraphs
from ckf.liger import using_liger
from ckf.packed_attention import PACKED_ATTENTION
from tests.layer_graph_cases import TASKS, batch_of, step
from tests.tiny import VOCABULARY, randomise_adapters

pytestmark = pytest.mark.gpu


def model_on_gpu():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=384, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).to("cuda", torch.bfloat16)
    model.set_attn_implementation(PACKED_ATTENTION)
    ckf.patch_model(model, TASKS, r=16, lora_alpha=16, lora_dropout=0.1)
    randomise_adapters(model, scale=0.05)
    return model.train()


def replays(graphs):
    return graphs.generation - graphs.captures


def on_gpu(batch):
    return {k: v.to("cuda") if hasattr(v, "to") else v for k, v in batch.items()}


GPU_BATCHES = [[20 + (7 * i + 13 * b) % 60 for i in range(24 + b % 3)] for b in range(6)]


def test_graphs_on_a_gpu_are_the_steps_without():
    model = model_on_gpu()
    graphs = LayerGraphs(model)
    batches = [on_gpu(batch_of(lengths, i)) for i, lengths in enumerate(GPU_BATCHES)]
    rounds = [[step(model, batch, i) for i, batch in enumerate(batches)] for _ in range(3)]
    assert not graphs.off and graphs.captures <= 3
    assert replays(graphs) == 3 * len(batches) - 1  # all but the first
    for found, again in zip(*rounds[1:], strict=True):
        assert found[0] == again[0]
        assert all(torch.equal(again[1][name], g) for name, g in found[1].items())
    larger, small = (on_gpu(batch_of(lengths)) for lengths in ([90] * 30, [5, 9]))
    captures, before = graphs.captures, replays(graphs)
    rounds[1] += [step(model, larger), step(model, small)]
    assert (graphs.captures, replays(graphs)) == (captures + 1, before + 1)
    graphs.remove()
    for i, batch in enumerate([*batches, larger, small]):
        loss, wanted = step(model, batch, i if i < len(batches) else 0)
        found = rounds[1][i]
        assert found[0] == pytest.approx(loss, rel=2e-2)
        norm = torch.stack([g.norm() for g in wanted.values()]).norm()
        off = torch.stack([(found[1][n] - g).norm() for n, g in wanted.items()]).norm()
        assert off < 3e-2 * norm, i


def test_gradients_add_up_over_the_parts_of_a_batch():
    model = model_on_gpu()
    graphs = LayerGraphs(model)
    parts = [on_gpu(batch_of(lengths, i)) for i, lengths in enumerate(GPU_BATCHES)]

    def add_up():
        model.zero_grad()
        for i, part in enumerate(parts):
            torch.manual_seed(i)
            model(**part).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    add_up()
    found = add_up()
    assert not graphs.off and replays(graphs) == 2 * len(parts) - 1
    graphs.remove()
    wanted = add_up()
    norm = torch.stack([g.norm() for g in wanted.values()]).norm()
    off = torch.stack([(found[n] - g).norm() for n, g in wanted.items()]).norm()
    assert off < 3e-2 * norm


def test_training_with_graphs_on_a_gpu():
    ends = []
    for with_graphs in (True, False):
        model = model_on_gpu()
        graphs = LayerGraphs(model) if with_graphs else None
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        losses = []
        for i in range(30):
            optimizer.zero_grad()
            torch.manual_seed(i)
            loss = model(**on_gpu(batch_of(GPU_BATCHES[0], 0))).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        ends.append(torch.stack(losses).tolist())
        assert graphs is None or (graphs.captures == 1 and replays(graphs) == 29)
    assert ends[0][-1] < ends[0][0] - 0.5
    assert ends[0][-1] == pytest.approx(ends[1][-1], rel=0.1)


def test_liger_on_a_gpu_changes_rounding_alone():
    pytest.importorskip("liger_kernel")
    model = model_on_gpu()
    batch = on_gpu(batch_of(GPU_BATCHES[0]))
    loss, wanted = step(model, batch)
    with using_liger(model):
        found = step(model, batch)
        graphs = LayerGraphs(model)
        captured = [step(model, batch) for _ in range(3)][-1]
        assert replays(graphs) == 2
        graphs.remove()
    for own in (found, captured):
        assert own[0] == pytest.approx(loss, rel=2e-2)
        norm = torch.stack([g.norm() for g in wanted.values()]).norm()
        off = torch.stack([(own[1][n] - g).norm() for n, g in wanted.items()]).norm()
        assert off < 5e-2 * norm
    assert step(model, batch)[0] == loss
