"""Calls like an earlier one ask nothing anew, and whatever differs is asked."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ckf.kernels import config, cpu, decode, decode_cache, ops, torch_backend
from ckf.kernels.decode_cache import MOST_WAYS, DecodeCache
from ckf.kernels.dispatch import Choice
from ckf.kernels.ops import multi_lora_group, run_group
from tests.kernels.test_decode import PlainGroup
from tests.kernels.test_torch_decode import group


@pytest.fixture(params=["torch", "cpu", "cuda"])
def backend(request, monkeypatch):
    """By name; with the decode kernel's formula in place of "cuda"."""
    if request.param == "cuda":
        monkeypatch.setattr(decode, "DecodeGroup", PlainGroup)
        monkeypatch.setattr(decode, "MAX_LINEARS", 2)
        choose = ops.choose_backend
        chosen = Choice("cuda", "stubbed", "update")
        monkeypatch.setattr(
            ops, "choose_backend", lambda name, *a: chosen if name == "cuda" else choose(name, *a)
        )
    return request.param


# the decode kernel is forward only, and its ids lie on a GPU
COMPUTE_ON_A_CPU = pytest.mark.parametrize("backend", ["torch", "cpu"], indirect=True)


@pytest.fixture
def asked(monkeypatch):
    """Counts how often a backend is chosen."""
    count, choose = [], ops.choose_backend
    monkeypatch.setattr(ops, "choose_backend", lambda *a: count.append(1) or choose(*a))
    return count


def call(arguments, backend, cache):
    with torch.no_grad():
        return run_group(*arguments, 0.0, 0, backend, decode_cache=cache)


def assert_right(arguments, backend, cache):
    found = call(arguments, backend, cache)
    for got, expected in zip(found, multi_lora_group(*arguments, backend="torch"), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_asked_once_for_each_kind_of_call(backend, asked):
    cache, arguments = DecodeCache(), group(6)
    for _ in range(3):
        call(arguments, backend, cache)
    assert len(asked) == 1
    fewer = [arguments[0][:4], *arguments[1:6], arguments[6][:4]]
    sequences = [arguments[0].view(2, 3, -1), *arguments[1:6], arguments[6].view(2, 3)]
    for other in (fewer, sequences):
        before = len(asked)
        for _ in range(2):
            assert_right(other, backend, cache)
        # once by the cache's owner, and each time by the public function that judges
        assert len(asked) - before == 1 + 2


def test_changed_experts_are_asked_for_anew(backend, asked):
    cache, arguments = DecodeCache(), group(6)
    call(arguments, backend, cache)
    arguments[3][1][2].mul_(2)  # in place
    assert_right(arguments, backend, cache)
    k, n = arguments[0].shape[1], arguments[1][0].shape[0]
    for side, wider in ((3, (5, k)), (4, (n, 5))):  # replaced, of another rank
        arguments[side][0] = [torch.randn(wider), *arguments[side][0][1:]]
    assert_right(arguments, backend, cache)
    assert_right(arguments, backend, cache)


def test_experts_cut_to_another_rank_in_the_same_memory(backend):
    """Neither addresses nor version counters change."""
    cache, arguments = DecodeCache(), group(6)
    call(arguments, backend, cache)
    a, b = arguments[3][0][0], arguments[4][0][0]
    a.data, b.data = a.data[:1], b.data[:, :1]
    assert_right(arguments, backend, cache)
    a, b = arguments[3][2][1], arguments[4][2][1]
    arguments[3][2][1], arguments[4][2][1] = a[:2], b[:, :2]
    assert_right(arguments, backend, cache)


def test_a_change_while_experts_are_read_is_seen_by_the_next_call(backend, monkeypatch):
    cache, arguments = DecodeCache(), group(6)
    own = {
        "torch": (torch_backend, "DecodeExperts"),
        "cpu": (cpu, "transposed_experts"),
        "cuda": (decode, "prepare"),
    }
    module, name = own[backend]
    make = getattr(module, name)

    def and_then_trained(*inputs):
        made = make(*inputs)
        monkeypatch.setattr(module, name, make)
        arguments[4][0][0].mul_(3)  # another thread's step
        return made

    monkeypatch.setattr(module, name, and_then_trained)
    call(arguments, backend, cache)
    monkeypatch.setattr(module, name, make)
    assert_right(arguments, backend, cache)


@COMPUTE_ON_A_CPU
def test_a_transform_around_a_known_call(backend):
    """Its tensors have no memory to ask for addresses."""
    cache, arguments = DecodeCache(), group(6)
    call(arguments, backend, cache)

    def loss(experts):
        with torch.no_grad():
            known = run_group(
                *arguments[:3], experts, *arguments[4:], 0.0, 0, backend, decode_cache=cache
            )
        return known[0].sum() + sum((t**2).sum() for own in experts for t in own)

    gradients = torch.func.grad(loss)(arguments[3])
    torch.testing.assert_close(gradients[0][0], 2 * arguments[3][0][0])


def test_a_new_table_is_asked(asked):
    cache, arguments = DecodeCache(), group(6)
    for _ in range(2):
        call(arguments, "auto", cache)
    assert len(asked) == 1
    config.forget_choices()
    call(arguments, "auto", cache)
    assert len(asked) == 2


def test_a_graph_keeps_what_its_replays_read_and_no_more(backend, monkeypatch):
    cache, arguments = DecodeCache(), group(6)
    call(arguments, backend, cache)
    for module in (decode_cache, ops):
        monkeypatch.setattr(module, "capturing", lambda _: True)
    for _ in range(2):
        assert_right(arguments, backend, cache)
    assert len(cache._captured) == (backend != "torch")  # whose graphs make their own stacks


@COMPUTE_ON_A_CPU
def test_wrong_ids_are_found_in_a_known_call(backend):
    cache, arguments = DecodeCache(), group(6)
    call(arguments, backend, cache)
    arguments[6] = arguments[6].clone()
    arguments[6][2] = 3
    with pytest.raises(ValueError, match="task id 3 is out of range"):
        call(arguments, backend, cache)


@COMPUTE_ON_A_CPU
def test_gradients_are_never_lost(backend):
    cache, arguments = DecodeCache(), group(6)
    call(arguments, backend, cache)
    arguments[3][0][0].requires_grad_()
    run_group(*arguments, 0.0, 0, backend, decode_cache=cache)[0].sum().backward()
    assert arguments[3][0][0].grad is not None


def test_modes_and_autocast_go_the_long_way(asked):
    class Dispatch(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            Dispatch.seen += "multi_lora" in str(func)
            return func(*args, **(kwargs or {}))

    cache, arguments = DecodeCache(), group(6)
    call(arguments, "torch", cache)
    with Dispatch():
        assert_right(arguments, "torch", cache)
    assert Dispatch.seen
    with torch.autocast("cpu", torch.bfloat16):
        found = call(arguments, "torch", cache)
        assert all(y.dtype == torch.bfloat16 for y in found)
    assert_right(arguments, "torch", cache)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(ValueError, match="forward-mode"):
        call(arguments, "torch", cache)


def test_dropout_is_not_forgotten():
    cache, arguments = DecodeCache(), group(6)
    call(arguments, "torch", cache)
    with torch.no_grad():
        dropped = run_group(*arguments, 0.5, 3, "torch", decode_cache=cache)
    assert not torch.equal(dropped[0], call(arguments, "torch", cache)[0])


def test_lengths_of_prompts_do_not_pile_up():
    cache = DecodeCache()
    arguments = group(MOST_WAYS + 40)
    for m in range(1, MOST_WAYS + 40):
        own = [arguments[0][:m], *arguments[1:6], arguments[6][:m]]
        with torch.no_grad():
            run_group(*own, 0.0, 0, "cpu", decode_cache=cache)
    assert 0 < len(cache._ways) <= MOST_WAYS
