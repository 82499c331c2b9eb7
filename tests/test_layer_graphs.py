"""Decoder layers as CUDA graphs give what they give without, whatever batch comes.

The graphs need a GPU (test_layer_graphs_gpu.py); here a stand-in runs again what was captured,
reading and writing the same memory as a replay.
"""

import copy
import itertools
import pickle
import sys

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import DataCollatorWithFlattening
from transformers.models.llama import modeling_llama

import ckf
from ckf import layer_graphs
from ckf import packed_attention as attention
from ckf.layer_graphs import LayerGraphs, Sizes
from ckf.liger import using_liger
from ckf.packed_attention import PACKED_ATTENTION
from tests.ckf_fixtures import STEPS
from tests.layer_graph_cases import TASKS, batch_of, step
from tests.test_packing import patched
from tests.test_train import run_again, trained_tensors
from tests.tiny import tiny_model
from tests.tiny import tokens as random_tokens


def varlen_of_pytorch(query, key, value, starts, _, longest, __, scale=None, window_size=(-1, -1)):
    """Row by row; rows may be empty, and shorter than the longest, as in the real one."""
    outputs = []
    for first, stop in itertools.pairwise(starts.tolist()):
        q, k, v = (x[first:stop].transpose(0, 1) for x in (query, key, value))
        assert stop - first <= longest
        back = torch.arange(stop - first).unsqueeze(1) - torch.arange(stop - first)
        seen = (back >= 0) & ((back <= window_size[0]) | (window_size[0] < 0))
        outputs.append(scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale))
    return torch.cat(outputs, dim=1).transpose(0, 1)


@pytest.fixture
def one_kernel(monkeypatch):
    monkeypatch.setattr(layer_graphs, "_TOKENS", 4)
    monkeypatch.setattr(attention, "varlen_attn", varlen_of_pytorch)
    monkeypatch.setattr(attention, "VARLEN_DEVICE", "cpu")
    monkeypatch.setattr(attention, "_VARLEN_DTYPES", (torch.float32, torch.float64))
    attention._tried_varlen.cache_clear()
    yield
    attention._tried_varlen.cache_clear()


class Rerun:
    """What a pair of graphs does, by running again: memory is read and written as in a replay."""

    def __init__(self, stage: dict) -> None:
        self.stage = stage

    def _again(self, function, *arguments):
        graphs = self.stage["graphs"]
        with torch.enable_grad(), graphs.router.following(graphs.route):
            return function(*arguments)

    def forward(self, run):
        self.run, self.output = run, run()
        return self.output

    def backward(self, gradients, output):
        self.gradients, self.found = gradients, gradients(output)
        return self.found

    def replay_forward(self):
        for gradient in self.found:  # the pool is shared: they may lie on what a forward writes
            if gradient is not None:
                gradient.fill_(float("nan"))
        with torch.no_grad():
            self.output.copy_(self._again(self.run))

    def replay_backward(self):
        fresh = self._again(lambda: self.gradients(self.run()))
        for kept, new in zip(self.found, fresh, strict=True):
            if kept is not None:
                kept.copy_(new)


def model_of(family="llama", **options):
    model = patched(family, PACKED_ATTENTION, **options).train()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.requires_grad)
    return model


def graphed(model) -> LayerGraphs:
    stage = {}
    stage["graphs"] = LayerGraphs(model, lambda: Rerun(stage))
    return stage["graphs"]


def assert_same(found, wanted):
    assert found[0] == pytest.approx(wanted[0], rel=1e-5)
    assert found[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


BATCHES = [(4, 7, 5), (7, 4, 5), (6, 3, 5), (9, 9), (5, 5, 5, 5), (2, 3), (30, 200, 9), (4, 7, 5)]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.3}, {"gate": "learned"}])
def test_steps_are_those_without_graphs(one_kernel, family, options):
    model = model_of(family, **options)
    graphs = graphed(model)
    found = [step(model, batch_of(b, i), i) for i, b in enumerate(BATCHES)]
    assert graphs.captures >= 2 and graphs.generation >= 5 and not graphs.off
    graphs.remove()
    assert not any("forward" in layer.module.__dict__ for layer in graphs.layers)
    for i, lengths in enumerate(BATCHES):
        assert_same(found[i], step(model, batch_of(lengths, i), i))


def test_optimizer_steps_are_those_without_graphs(one_kernel):
    """Adapters change in place between replays; gradients add up over batches of a step."""
    ends = []
    for with_graphs in (True, False):
        model = model_of()
        graphs = graphed(model) if with_graphs else None
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        presence = ckf.TaskPresence(model)
        presence.attach(optimizer)
        for i in range(6):
            optimizer.zero_grad()
            for part in range(1 + i % 3):
                model(**batch_of((4, 7, 5), i + part)).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        assert graphs is None or graphs.generation > 6
        ends.append({n: p.detach().clone() for n, p in model.named_parameters()})
    for name, value in ends[1].items():
        torch.testing.assert_close(ends[0][name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_embeddings_that_train(one_kernel):
    """The meta-network's vectors are inputs of the first layer: their gradient comes through."""
    model = model_of()
    batches = [batch_of(lengths, 3) for lengths in BATCHES[:4]]

    def gradients():
        found = []
        for batch in batches:
            embeds = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
            own = {k: v for k, v in batch.items() if k != "input_ids"}
            model(inputs_embeds=embeds, **own).loss.backward()
            found.append(embeds.grad)
        return found

    graphs = graphed(model)
    found = gradients()
    assert graphs.captures and graphs.generation >= 3
    graphs.remove()
    for own, wanted in zip(found, gradients(), strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-4, atol=1e-7)


def test_backward_after_a_later_forward_is_refused(one_kernel):
    model = model_of()
    graphed(model)
    for _ in range(2):
        step(model, batch_of((4, 7, 5)))
    first = model(**batch_of((4, 7, 5))).loss
    model(**batch_of((5, 6, 5))).loss.backward()
    with pytest.raises(RuntimeError, match="call backward before the next forward"):
        first.backward()


def test_a_second_backward_is_refused(one_kernel):
    model = model_of()
    graphs = graphed(model)
    for _ in range(2):
        step(model, batch_of((4, 7, 5)))
    loss = model(**batch_of((4, 7, 5))).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        loss.backward()
    loss = model(**batch_of((4, 7, 5))).loss
    graphs.remove()
    with pytest.raises(RuntimeError, match=r"or remove\(\)"):
        loss.backward()


def test_a_model_that_is_moved_to_where_it_lies(one_kernel):
    """Gates are made anew; the graphs read those of their capture, which must stay."""
    model = model_of()
    graphs = graphed(model)
    found = [step(model, batch_of((4, 7, 5))) for _ in range(2)]
    linear = model.model.layers[0].mlp.down_proj
    gates = linear._constant
    model.to("cpu")
    assert linear._constant is not gates
    assert any(own is gates for own, _ in graphs.layers[0].held)
    assert_same(step(model, batch_of((4, 7, 5))), found[0])


def test_autocast_and_recomputation_are_said(one_kernel, caplog):
    model = model_of()
    graphs = graphed(model)
    with torch.autocast("cpu", torch.bfloat16):
        step(model, batch_of((4, 7, 5)))
    assert graphs.off and "the model runs under autocast" in caplog.text
    graphs.remove()
    graphs = graphed(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    step(model, batch_of((4, 7, 5)))
    assert graphs.off and "recomputed in the backward pass" in caplog.text


def test_layers_in_which_nothing_trains(one_kernel, caplog):
    model = tiny_model("llama")
    model.set_attn_implementation(PACKED_ATTENTION)
    ckf.patch_model(model, TASKS, target_modules=r"model\.layers\.1\..*proj").train()
    graphs = graphed(model)
    batch = batch_of((4, 7, 5))
    first, second = step(model, batch), step(model, batch)
    assert graphs.off and "nothing trains in a decoder layer" in caplog.text
    assert_same(second, first)


def test_batches_of_a_task_collator(one_kernel):
    """As docs/distributed.md has it."""
    model = model_of()
    collator = ckf.TaskCollator(model, DataCollatorWithFlattening())
    words = random_tokens(3, 8).tolist()
    batches = [
        collator(
            [
                {"input_ids": row[:n], "labels": row[:n], "task": task}
                for row, n, task in zip(words, lengths, TASKS, strict=True)
            ]
        )
        for lengths in ((4, 7, 5), (6, 4, 6), (5, 5, 8))
    ]
    graphs = graphed(model)
    found = [step(model, batch) for batch in batches]
    assert graphs.captures == 1 and not graphs.off
    graphs.remove()
    for own, batch in zip(found, batches, strict=True):
        assert_same(own, step(model, batch))


def test_attention_with_dropout_is_refused(one_kernel):
    model = model_of()
    model.config.attention_dropout = 0.1
    with pytest.raises(ValueError, match="attention has dropout"):
        graphed(model)


def test_passes_without_gradients_and_padded_ones_run_as_ever(one_kernel):
    model = model_of()
    batch = batch_of((4, 7, 5))
    with torch.no_grad():
        wanted = model(**batch).logits
    graphs = graphed(model)
    for _ in range(3):
        step(model, batch)
    generation, loss = graphs.generation, model(**batch).loss
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, wanted)
    model.eval()
    torch.testing.assert_close(model(**batch).logits, wanted)
    model.train()
    loss.backward()  # what came between took no memory of it
    padded = {"input_ids": random_tokens(2, 6), "task_ids": torch.tensor([0, 1])}
    model(**padded, labels=padded["input_ids"]).loss.backward()
    assert graphs.generation == generation + 1


@pytest.mark.parametrize("how", ["data", "parameter", "same memory", "frozen"])
def test_adapters_that_are_replaced_are_captured_anew(one_kernel, how):
    model = model_of()
    graphs = graphed(model)
    batch = batch_of((4, 7, 5))
    for _ in range(3):
        step(model, batch)
    layer = model.model.layers[1].mlp.down_proj
    for holder in (layer.lora_A, layer.lora_B):
        old = holder[TASKS[0]]
        if how == "data":
            old.data = 1.5 * old.data
        elif how == "frozen":
            old.requires_grad_(False)
        else:
            value = old.detach() if how == "same memory" else 1.5 * old.detach()
            holder._parameters[TASKS[0]] = torch.nn.Parameter(value)
    found = step(model, batch)
    assert graphs.captures == 2
    graphs.remove()
    assert_same(found, step(model, batch))


def test_copies_run_as_ever(one_kernel):
    model, batch = model_of(), batch_of((4, 7, 5))
    graphs = graphed(model)
    found = [step(model, batch) for _ in range(3)]
    model.zero_grad()
    other, generation = copy.deepcopy(model), graphs.generation
    assert_same(step(other, batch), found[0])
    assert graphs.generation == generation and graphs.captures == 1
    with pytest.raises(ValueError, match="remove\\(\\) them to pickle it"):
        pickle.dumps(model.model.layers[1])


def test_layers_become_what_they_were(one_kernel):
    """Once more, wrapped before, unpatched."""
    model, batch = model_of(), batch_of((4, 7, 5))
    first = model.model.layers[0]
    wrapped = first.forward
    first.forward = lambda *args, **kwargs: wrapped(*args, **kwargs)
    own = first.forward
    graphs = graphed(model)
    with pytest.raises(ValueError, match="call its remove"):
        graphed(model)
    found = [step(model, batch) for _ in range(3)]
    graphs.remove()
    graphs.remove()
    assert first.forward is own and "forward" not in vars(model.model.layers[1])
    assert_same(step(model, batch), found[0])
    graphs = graphed(model)
    step(model, batch)
    ckf.unpatch_model(model)
    assert torch.isfinite(model(batch["input_ids"]).logits).all()
    graphs.remove()


def test_a_capture_that_fails_leaves_training_as_it_was(one_kernel, caplog):
    class Failing(Rerun):
        def backward(self, gradients, output):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")

    model = model_of()
    graphs = LayerGraphs(model, lambda: Failing({}))
    batch = batch_of((4, 7, 5))
    first, second, third = (step(model, batch) for _ in range(3))
    assert_same(second, first)
    assert_same(third, first)
    assert graphs.off and caplog.text.count("goes on without CUDA graphs") == 1
    assert "Tried to allocate 2 GiB" in caplog.text


def test_what_has_no_place_for_each_token_is_refused(one_kernel, caplog):
    model = model_of()
    graphs = graphed(model)
    batch = batch_of((4, 7, 5))
    starts = batch["packed_rows"].starts
    losses = [step(model, batch | {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts})[0]] * 2
    assert graphs.off and "tensor of shape (4,)" in caplog.text
    graphs.remove()
    assert losses[0] == pytest.approx(step(model, batch)[0])


def test_an_argument_that_changes_is_said_once(one_kernel, caplog):
    model = model_of()
    graphs = graphed(model)
    found = [step(model, batch_of((4, 7, 5)) | {"max_length_q": n}) for n in (7, 7, 8, 9)]
    assert caplog.text.count("is handed another int (8, not 7)") == 1
    assert "(9, not 7)" not in caplog.text and graphs.captures == 1
    graphs.remove()
    for own in found:
        assert_same(own, step(model, batch_of((4, 7, 5))))


def test_where_they_cannot_run():
    with pytest.raises(ValueError, match="the model is on cpu"):
        LayerGraphs(patched("llama", PACKED_ATTENTION))


def test_sizes_hold_what_they_were_made_for():
    sizes = Sizes(0, 0, 0)
    for batch in (Sizes(16, 3, 7), Sizes(5000, 40, 300), Sizes(4900, 60, 120), Sizes(1, 1, 1)):
        sizes = sizes.and_more(batch)
        assert sizes.holds(batch)
        for tokens in range(sizes.tokens // 2, sizes.tokens + 1, 97):
            assert sizes.holds(Sizes(tokens, batch.rows, batch.longest))
        assert not sizes.holds(Sizes(sizes.tokens + 1, 1, 1))
        assert not sizes.holds(Sizes(sizes.tokens, 1, sizes.longest + 1))


# ---- a run of ckf train


def test_a_run_trains_as_without_graphs(one_kernel, small_run, prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(LayerGraphs, "_cuda_captures", lambda self: lambda: Rerun({"graphs": self}))
    monkeypatch.setattr(LayerGraphs, "_warm_up", lambda self: None)
    made, init = [], LayerGraphs.__init__
    monkeypatch.setattr(
        LayerGraphs, "__init__", lambda self, *args: (made.append(self), init(self, *args))[1]
    )
    model, ends = small_run.assembly.config.model.name, []
    for wanted in ("auto", False):
        folder = tmp_path / str(wanted)
        run_again(model, prepared, folder, train__cuda_graphs=wanted)
        ends.append(trained_tensors(folder))
    (graphs,) = made
    assert graphs.generation >= STEPS - 3 and not graphs.off
    assert not any("forward" in layer.module.__dict__ for layer in graphs.layers)
    for name, value in ends[1].items():
        torch.testing.assert_close(ends[0][name], value, rtol=1e-3, atol=1e-5, msg=name)


def test_graphs_asked_for_where_they_cannot_be(small_run, prepared, tmp_path):
    model = small_run.assembly.config.model.name
    with pytest.raises(ValueError, match="train.cuda_graphs is true, but .* the model is on cpu"):
        run_again(model, prepared, tmp_path / "run", train__cuda_graphs=True)


# ---- Liger's kernels


def test_liger_leaves_the_model_as_it_was(monkeypatch):
    pytest.importorskip("liger_kernel")
    model = model_of()
    batch = batch_of((4, 7, 5))
    before = [set(vars(module)) for module in model.modules()]
    functions, loss = dict(vars(modeling_llama)), step(model, batch)[0]
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    with using_liger(model):
        assert "forward" in vars(model.model.norm)
        assert modeling_llama.apply_rotary_pos_emb is not functions["apply_rotary_pos_emb"]
    monkeypatch.undo()
    assert [set(vars(module)) for module in model.modules()] == before
    assert dict(vars(modeling_llama)) == functions and step(model, batch)[0] == loss


def test_liger_where_it_cannot_be(monkeypatch):
    pytest.importorskip("liger_kernel")
    with (
        pytest.raises(ValueError, match="this one is on cpu; leave it out"),
        using_liger(model_of()),
    ):
        pass
    model = patched("gpt2")
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    with pytest.raises(ValueError, match="do not know gpt2 models"), using_liger(model):
        pass
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", None)
    with pytest.raises(ValueError, match="pip install liger-kernel"), using_liger(model):
        pass
