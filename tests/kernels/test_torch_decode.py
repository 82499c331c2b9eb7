"""A few rows without gradients on the torch backend: the same results from stacks that are kept."""

import copy
from types import SimpleNamespace

import pytest
import torch

import ckf
from ckf.kernels import cuda, decode_cache, torch_backend, torch_runs
from ckf.kernels.decode_cache import DecodeCache
from ckf.kernels.group import GroupShape
from ckf.kernels.ops import multi_lora_group, run_group
from ckf.patch import patched_layers
from tests.kernels.cases import hard_gates, random_case
from tests.tiny import tiny_model


@pytest.fixture
def made(monkeypatch):
    """Counts how often experts are stacked."""
    count, original = [], torch_backend.stack_adapters
    monkeypatch.setattr(torch_backend, "stack_adapters", lambda *a: count.append(1) or original(*a))
    return count


def group(m=7, dtype=torch.float32, adapters=None, ids=None):
    """The arguments of run_group: three linears that share x, one of them the update alone."""
    sizes = ((1, 17), (2, 9), (3, 5))
    cases = [random_case(m=m, seed=s, n=n, ranks=[2, 3, 1, 4], ids=ids) for s, n in sizes]

    def cast(tensor, kind=dtype):
        return None if tensor is None else tensor.detach().to(kind)

    return [
        cast(cases[0].x),
        [cast(cases[0].weight), None, cast(cases[2].weight)],
        [cast(cases[0].bias), None, None],
        [[cast(t, adapters or dtype) for t in c.a] for c in cases],
        [[cast(t, adapters or dtype) for t in c.b] for c in cases],
        [c.gates.detach() for c in cases],
        cases[0].task_ids,
    ]


def decoded(arguments, cache):
    with torch.no_grad():
        return run_group(*arguments, 0.0, 0, "torch", decode_cache=cache)


def assert_right(arguments, cache):
    plain = multi_lora_group(*arguments, backend="torch")
    for got, expected in zip(decoded(arguments, cache), plain, strict=True):
        assert got.shape == expected.shape and got.dtype == expected.dtype
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("m", [0, 1, 7, 256])
@pytest.mark.parametrize(
    ("dtype", "adapters"),
    [
        (torch.float32, None),
        (torch.bfloat16, None),
        (torch.bfloat16, torch.float32),
        (torch.float64, None),
    ],
)
def test_equals_the_public_function(made, dtype, adapters, m):
    arguments, cache = group(m, dtype, adapters), DecodeCache()
    assert_right(arguments, cache)
    made.clear()
    decoded(arguments, cache)
    assert not made


def test_sequences_of_strided_rows():
    arguments = group(24)
    arguments[0] = arguments[0].view(4, 6, -1).transpose(0, 1)
    arguments[6] = arguments[6].view(4, 6).transpose(0, 1)
    assert_right(arguments, DecodeCache())


def test_every_change_is_seen(made):
    arguments, cache = group(), DecodeCache()
    assert_right(arguments, cache)
    arguments[3][1][2].mul_(2)  # A, in place
    assert_right(arguments, cache)
    arguments[4][2][0] = arguments[4][2][0] + 1  # B, replaced
    assert_right(arguments, cache)
    arguments[5][0].mul_(3)  # gates
    assert_right(arguments, cache)


def test_more_rows_are_not_kept(made):
    arguments, cache = group(torch_backend.DECODE_ROWS + 1), DecodeCache()
    assert_right(arguments, cache)
    assert not cache._kept


def test_gradients_go_the_plain_way():
    arguments, cache = group(), DecodeCache()
    arguments[3][0][0].requires_grad_()
    run_group(*arguments, 0.0, 0, "torch", decode_cache=cache)[0].sum().backward()
    assert not cache._kept and arguments[3][0][0].grad is not None


def test_few_rows_of_many_tasks_read_their_own_experts():
    tasks, k, n, rank = 200, 64, 96, 16
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    gates = hard_gates(tasks, [1.0] * (tasks + 1))
    ids = torch.tensor([150, -1, 3, 150])
    a = [normal(rank, k) for _ in range(tasks + 1)]
    b = [normal(n, rank) for _ in range(tasks + 1)]
    arguments = [normal(4, k), [normal(n, k)], [None], [a], [b], [gates], ids]
    cache = DecodeCache()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_runs, "PRODUCT_COST", 1e3)
        (y,) = decoded(arguments, cache)
        blocks = next(iter(cache._kept.values()))[1].blocks
        first = dict(blocks)
        decoded(arguments, cache)
    assert sorted(blocks) == [3, 150] and all(blocks[task] is first[task] for task in first)
    torch.testing.assert_close(
        y, multi_lora_group(*arguments, backend="torch")[0], rtol=1e-4, atol=1e-4
    )


def test_another_stream_waits_for_all_that_was_made(monkeypatch):
    """The event of a GPU's stream is recorded once; nothing may be stacked after it."""
    shape = GroupShape(((2, 3),), 0.0)
    a = [torch.empty(rank, 4, device="meta") for rank in (2, 3)]
    b = [torch.empty(5, rank, device="meta") for rank in (2, 3)]
    gates = [torch.empty(1, 2, device="meta")]
    made = torch_backend.DecodeExperts(shape, gates, a, b, torch.float32)
    assert {"stacks", "gates"} <= vars(made).keys()  # beside the CPU all of it is there at once

    class Stream:
        def __init__(self, number):
            self.cuda_stream, self.waited = number, []

        def record_event(self):
            return f"event of {self.cuda_stream}"

        def wait_event(self, event):
            self.waited.append(event)

    one, other = Stream(1), Stream(2)
    recorded = []
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda t, stream: recorded.append((t, stream))
    )
    current = {0: Stream(0), 1: one}  # by GPU; the process' own is the first
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=0: current[device])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(cuda, "_raw_stream", lambda index: current[index].cuda_stream)
    place = decode_cache.Made.here(SimpleNamespace(get_device=lambda: 1))
    place.wait(made)
    assert not recorded
    current[1] = other
    place.wait(made)
    assert (one.waited, other.waited) == ([], ["event of 1"])
    owned = [made.stacks[0], *made.stacks[1], made.gates.values, made.gates.mask]
    assert all(stream is other for _, stream in recorded)
    assert [id(t) for t, _ in recorded] == [id(t) for t in owned], "their memory could be reused"


def test_wrong_ids_are_refused_here_too():
    arguments, cache = group(), DecodeCache()
    arguments[6] = torch.full_like(arguments[6], 3)
    with pytest.raises(ValueError, match="task id 3 is out of range"):
        decoded(arguments, cache)


def test_an_infinite_expert_of_another_task_is_not_met():
    arguments, cache = group(), DecodeCache()
    arguments[3][0][2].fill_(float("inf"))  # the expert of task 1
    y = decoded(arguments, cache)[0]
    assert y[arguments[6] != 1].isfinite().all()
    assert not y[arguments[6] == 1].isfinite().any()


def test_a_model_keeps_stacks_only_in_eval_mode():
    model = ckf.patch_model(tiny_model("llama"), ["a", "b"], r=4)
    layers = list(patched_layers(model).values())
    ids = torch.arange(6).view(2, 3)

    def kept():
        return sum(bool(cache._kept) for layer in layers for cache in layer._decode)

    with torch.no_grad():
        model.train()(input_ids=ids, task_ids=["a", "b"])
        assert kept() == 0
        before = model.eval()(input_ids=ids, task_ids=["a", "b"]).logits
        assert kept() > 0
        for layer in layers:
            layer.lora_B["a"].add_(0.1)
        after = model(input_ids=ids, task_ids=["a", "b"]).logits
        fresh = torch.cat([model.train()(input_ids=ids, task_ids=["a", "b"]).logits])
    assert kept() == 0 and not torch.equal(before[0], after[0])
    torch.testing.assert_close(after, fresh)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_is_seen_in_eval_mode(fused):
    """A fused step changes parameters in place and leaves their version counters alone."""
    model = ckf.patch_model(tiny_model("llama"), ["a", "b"], r=4).eval()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.05, fused=fused)
    ids, tasks = torch.arange(6).view(2, 3), ["a", "b"]
    seen = []
    for _ in range(2):
        model(input_ids=ids, labels=ids, task_ids=tasks).loss.backward()
        optimizer.step()
        with torch.no_grad():
            kept = model(input_ids=ids, task_ids=tasks).logits
            fresh = copy.deepcopy(model)(input_ids=ids, task_ids=tasks).logits
        assert torch.equal(kept, fresh)
        seen.append(kept)
    assert not torch.equal(*seen)


def test_loading_adapters_forgets_what_was_kept(tmp_path):
    model = ckf.patch_model(tiny_model("llama"), ["a", "b"], r=4).eval()
    ckf.save_adapters(model, tmp_path)
    layers = list(patched_layers(model).values())
    with torch.no_grad():
        model(input_ids=torch.arange(6).view(2, 3), task_ids="a")
    assert any(layer._decode[1]._kept for layer in layers)
    ckf.load_adapters(model, tmp_path)
    assert all(not cache._kept for layer in layers for cache in layer._decode)
