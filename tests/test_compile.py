"""torch.compile(fullgraph=True): one graph for all mixes of tasks, the same values."""

from contextlib import nullcontext

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import CompileConfig

import ckf
from ckf.kernels import cpu, multi_lora_group, multi_lora_linear
from tests.kernels.cases import random_case
from tests.tiny import VOCABULARY, randomise_adapters, tiny_model

MIXES = [[0, 1, 2, -1], [0, 0, 0, 0], [2, 1, 1, 2]]
# Nothing is rounded differently but sums whose order the compiler may change.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function):
    """The function under torch.compile, and the counter of the graphs made for it."""
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(function, fullgraph=True, backend=counter), counter


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_linear(dropout_p, soft):
    case = random_case(m=64, soft=soft, dropout_p=dropout_p)
    fast, counter = compiled(multi_lora_linear)
    dy = torch.randn(64, 17)
    for mix in MIXES:
        case.task_ids = torch.tensor(mix).repeat_interleave(16)
        case.seed = torch.tensor([sum(mix)])
        expected = multi_lora_linear(*case.arguments())
        y = fast(*case.arguments())
        assert torch.equal(y, expected)
        gradients = torch.autograd.grad(y, case.leaves(), dy)
        for ours, plain in zip(
            gradients, torch.autograd.grad(expected, case.leaves(), dy), strict=True
        ):
            assert torch.equal(ours, plain)
    assert counter.frame_count == 1


def test_ids_out_of_range_raise_from_compiled_code():
    case = random_case(m=8)
    fast, _ = compiled(multi_lora_linear)
    fast(*case.arguments())
    case.task_ids = torch.full((8,), 3)
    with pytest.raises(ValueError, match="task id 3 is out of range; expected 0 to 2"):
        fast(*case.arguments())


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_ops_pass_the_library_checks(dropout_p, backend):
    """Schema, fake tensors and AOT dispatch, as torch.library sees them."""
    if backend == "cpu" and not cpu.available()[0]:
        pytest.skip(cpu.available()[1])
    case = random_case(m=6, dropout_p=dropout_p)
    seed = torch.tensor([case.seed]) if dropout_p else None
    lists = [[case.weight], [case.bias], [case.gates], case.a, case.b]
    detached = [[t.detach() for t in tensors] for tensors in lists]
    static = (0, dropout_p, False, backend, "expand")
    arguments = (case.x.detach(), *detached, case.task_ids, seed, None, *static)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(torch.ops.ckf.multi_lora, arguments, test_utils=checks)
    *_, saved = torch.ops.ckf.multi_lora(*arguments)
    needs = [True, False, False, False, *[True] * (2 * len(case.a))]
    backward = ([torch.randn(6, 17)], arguments[0], saved, *arguments[1:], needs)
    torch.library.opcheck(torch.ops.ckf.multi_lora_backward, backward, test_utils=checks)


def step(model, run, ids, tokens):
    model.zero_grad()
    torch.manual_seed(5)  # of the dropout masks
    out = run(input_ids=tokens, labels=tokens, task_ids=ids, use_cache=False)
    out.loss.backward()
    return [out.logits.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("options", ["hard", "learned", "dropout", "checkpoint", "modules"])
def test_training_a_model(options):
    model = tiny_model("llama").train()
    settings = {
        "learned": {"gate": "learned"},
        "dropout": {"lora_dropout": 0.2},
        "checkpoint": {"lora_dropout": 0.2},
        "modules": {"shared_modules": ["k_proj", "v_proj"], "task_modules": ["q_proj"]},
    }
    ckf.patch_model(model, ["a", "b", "c"], r=4, **settings.get(options, {}))
    randomise_adapters(model)
    if options == "checkpoint":
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.disable_input_require_grads()  # its hook is what fullgraph refuses, not the model
    fast, counter = compiled(model)
    tokens = torch.randint(0, VOCABULARY, (4, 6))
    for mix in MIXES:
        ids = torch.tensor(mix)
        ours = [t.clone() for t in step(model, fast, ids, tokens)]
        for got, plain in zip(ours, step(model, model, ids, tokens), strict=True):
            torch.testing.assert_close(got, plain, **CLOSE)
    assert counter.frame_count == 1


def test_sizes_become_symbols():
    """One graph for the first size, one for any number of rows, one for any length as well."""
    model = ckf.patch_model(tiny_model("llama").train(), ["a", "b", "c"], r=4)
    randomise_adapters(model)
    fast, counter = compiled(model)
    graphs = []
    for rows, length in [(2, 6), (3, 6), (5, 6), (5, 7), (4, 9), (7, 5)]:
        tokens, ids = torch.randint(0, VOCABULARY, (rows, length)), torch.arange(rows) % 3
        ours = [t.clone() for t in step(model, fast, ids, tokens)]
        for got, plain in zip(ours, step(model, model, ids, tokens), strict=True):
            torch.testing.assert_close(got, plain, **CLOSE)
        graphs.append(counter.frame_count)
    assert graphs == [1, 2, 2, 3, 3, 3]


def test_siblings_stay_one_group():
    """q, k and v are one op in the graph, gate and up another."""
    model = tiny_model("llama")
    ckf.patch_model(model, ["a", "b"], r=4)
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph

    run = torch.compile(model, fullgraph=True, backend=keep)
    with torch.no_grad():
        run(input_ids=torch.zeros(1, 3, dtype=torch.int64), task_ids=torch.tensor([0]))
    ops = [n for n in graphs[0].graph.nodes if "multi_lora" in str(n.target)]
    assert len(ops) == 2 * 4  # layers of q k v, o, gate up, down


def test_a_group_alone():
    first, second = random_case(m=20, seed=1), random_case(m=20, seed=2, n=9)

    def group(x, ids):
        weights, biases = [first.weight, second.weight], [first.bias, second.bias]
        experts = [[first.a, second.a], [first.b, second.b]]
        return multi_lora_group(x, weights, biases, *experts, first.gates, ids)

    fast, counter = compiled(group)
    for seed in range(3):
        ids = torch.randint(-1, 3, (20,), generator=torch.Generator().manual_seed(seed))
        for got, plain in zip(fast(first.x, ids), group(first.x, ids), strict=True):
            assert torch.equal(got, plain)
    assert counter.frame_count == 1


def test_names_need_a_tensor():
    model = ckf.patch_model(tiny_model("llama"), ["a", "b"], r=4)
    fast = torch.compile(model, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=r"ckf\.task_ids\(model"):
        fast(input_ids=torch.zeros(1, 3, dtype=torch.int64), task_ids=["a"])


class Broken(torch.nn.Module):
    """The compiler has to begin a second graph half-way."""

    def __init__(self):
        super().__init__()
        self.embed, self.a = torch.nn.Embedding(VOCABULARY, 16), torch.nn.Linear(16, 16)
        self.b = torch.nn.Linear(16, 4)

    def forward(self, input_ids):
        h = self.a(self.embed(input_ids))
        torch._dynamo.graph_break()
        return self.b(h)


@pytest.mark.parametrize("default", [False, True])
@pytest.mark.parametrize("named", [False, True])
def test_a_broken_graph_takes_the_ids_all_the_same(named, default):
    model = ckf.patch_model(Broken(), ["a", "b", "c"], r=4)
    randomise_adapters(model)
    tokens, run = torch.randint(0, VOCABULARY, (4, 6)), torch.compile(model, backend="eager")
    with ckf.use_task(model, "b") if default else nullcontext():
        for mix in MIXES:
            ids = (
                [("a", "b", "c")[i] for i in mix] if named and -1 not in mix else torch.tensor(mix)
            )
            with pytest.warns(UserWarning, match=r"several graphs.* pass ckf\.task_ids\(model"):
                y = run(tokens, task_ids=ids)
            torch.testing.assert_close(y, model(tokens, task_ids=ids), **CLOSE)
    with pytest.raises(ValueError, match="got no task_ids"):
        run(tokens)


def test_names_without_fullgraph():
    model = ckf.patch_model(tiny_model("llama"), ["a", "b"], r=4)
    randomise_adapters(model)
    tokens = torch.randint(0, VOCABULARY, (2, 5))
    with pytest.warns(UserWarning, match="outside of them"):
        logits = torch.compile(model, backend="eager")(tokens, task_ids=["a", "b"]).logits
    torch.testing.assert_close(logits, model(tokens, task_ids=["a", "b"]).logits, **CLOSE)


@pytest.mark.parametrize("ids", [torch.tensor([[0, 0, 1]]), "b"], ids=["a-token", "one"])
def test_generation_goes_on_with_the_prompts_last_task(ids):
    model = ckf.patch_model(tiny_model("llama"), ["a", "b"], r=4)
    randomise_adapters(model)
    prompt = torch.tensor([[5, 9, 7]])
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    expected = model.generate(prompt, task_ids=ids, **options)
    model.compile(backend="eager", fullgraph=True)
    assert torch.equal(model.generate(prompt, task_ids=ids, **options), expected)


def test_generation_with_a_static_cache():
    """transformers compiles it by itself on a GPU: one graph a kind of pass for every mix."""
    model = ckf.patch_model(tiny_model("llama"), ["a", "b"], r=4).eval()
    randomise_adapters(model)
    tokens = torch.randint(1, VOCABULARY, (3, 7))
    counter = CompileCounterWithBackend("eager")
    # transformers passes a mode, which this backend has no word for
    compiles = CompileConfig(backend=lambda graph, inputs, **_: counter(graph, inputs))
    compiles.fullgraph = True
    compiles._compile_all_devices = True
    options = {"max_new_tokens": 6, "pad_token_id": 0, "do_sample": False}
    static = {"cache_implementation": "static", "compile_config": compiles}
    found = set()
    for ids in (["a", "b", "a"], ["b", "a", -1], "b"):
        alone = model.generate(tokens, task_ids=ids, **options)
        assert torch.equal(model.generate(tokens, task_ids=ids, **options, **static), alone)
        found.add(tuple(alone.flatten().tolist()))
        if isinstance(ids, list):
            first = counter.frame_count
            assert first
    assert len(found) == 3 and counter.frame_count <= first + 1  # one task for all: another graph
