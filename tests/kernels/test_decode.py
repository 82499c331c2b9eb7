"""The "cuda" backend around its kernel: what it stacks, what it keeps, what it makes again.

The kernel is replaced by its formula here; test_cuda_host.py runs the kernel's own source.
"""

import copy
from types import SimpleNamespace

import pytest
import torch

from ckf.kernels import decode
from ckf.kernels import group as group_module
from ckf.kernels.decode_cache import DecodeCache
from ckf.kernels.group import GroupShape
from ckf.kernels.reference import multi_lora_reference
from ckf.kernels.stacks import Stacks
from ckf.kernels.torch_backend import forward_pass
from tests.kernels.cases import random_case


class PlainGroup:
    """DecodeGroup's contract in plain PyTorch; counts how often it is made."""

    made = whole = 0

    def __init__(self, a, bs, column_gates):
        type(self).made += 1
        assert all(t.is_contiguous() for t in (a, *bs, column_gates)) and len(bs) <= 2
        self.a, self.bs, self.gates = a.clone(), [b.clone() for b in bs], column_gates.clone()
        self.widths = [b.shape[1] for b in bs]

    def linears(self, x, weights, biases, ids):
        """Not for linears of width 9, as the kernel is not for some."""
        assert all(w.shape == (n, x.shape[-1]) for w, n in zip(weights, self.widths, strict=True))
        if 9 in self.widths:
            return None
        type(self).whole += 1
        pairs = zip(weights, biases, strict=True)
        ys = [torch.nn.functional.linear(x, w, bias) for w, bias in pairs]
        self(ys, x, ids)
        return ys

    def __call__(self, ys, x, ids):
        ids, x = ids.reshape(-1), x.reshape(-1, x.shape[-1])
        ys = [y.view(len(ids), -1) for y in ys]
        gates = torch.where((ids >= 0).unsqueeze(1), self.gates[ids.clamp(min=0)], 0)
        h = (x @ self.a.t() * gates).split([b.shape[0] for b in self.bs], 1)
        for y, h_l, b in zip(ys, h, self.bs, strict=True):
            y += h_l @ b


@pytest.fixture(autouse=True)
def plain_group(monkeypatch):
    monkeypatch.setattr(decode, "DecodeGroup", PlainGroup)
    monkeypatch.setattr(decode, "MAX_LINEARS", 2)  # three linears take two launches
    PlainGroup.made = PlainGroup.whole = 0


@pytest.fixture
def group():
    """Three linears that share x; the arguments of forward_pass but shape and x."""
    cases = [random_case(seed=s, n=n, ranks=[2, 3, 1, 4]) for s, n in ((1, 17), (2, 9), (3, 5))]
    x, ids = cases[0].x.detach(), cases[0].task_ids
    shape = GroupShape(((2, 3, 1, 4),) * 3, 0.0)
    rest = [
        [c.weight for c in cases],
        [c.bias for c in cases],
        [c.gates for c in cases],
        [t.detach() for c in cases for t in c.a],
        [t.detach() for c in cases for t in c.b],
    ]
    return shape, x, rest, ids


def run(group, cache=None):
    shape, x, rest, ids = group
    if cache is None:
        return decode.forward_pass(shape, x, *rest, ids)
    weights, biases, *experts = rest
    made = cache.get(decode.prepare, shape, *experts, x.dtype)
    return decode.decode_pass(made, x, weights, biases, ids)


def expected(group):
    shape, x, rest, ids = group
    return forward_pass(shape, x, *rest, ids, None, False, None, 0)[0]


def assert_right(outputs, group):
    for got, plain in zip(outputs, expected(group), strict=True):
        torch.testing.assert_close(got, plain)


def test_a_group_equals_the_torch_backend(group):
    assert_right(run(group), group)


def test_bases_inside_the_launch_where_its_kernel_can(group):
    """Of three linears the first two are one group, which it is not for."""
    shape, x, rest, ids = group
    decode._say_once.cache_clear()
    with pytest.warns(UserWarning, match="cuBLAS computes the bases") as said:
        for _ in range(2):
            outputs = decode.forward_pass(shape, x, *rest, ids, plan="linear")
            assert_right(outputs, group)
    assert PlainGroup.whole == 2 and len(said) == 1
    sequences = (x[:12].view(3, 4, -1), *rest, ids[:12].view(3, 4))
    outputs = decode.forward_pass(shape, *sequences, plan="linear")
    assert outputs[2].shape == (3, 4, 5)


def test_an_update_without_a_base_is_no_linear(group):
    shape, x, rest, ids = group
    rest[0][2] = None
    rest[1][2] = None
    outputs = decode.forward_pass(shape, x, *rest, ids, plan="linear")
    assert_right(outputs, (shape, x, rest, ids))
    assert PlainGroup.whole == 0


def test_one_linear_equals_the_reference():
    case = random_case()
    arguments = [t for t in case.arguments()[1:6]]
    weight, bias, a, b, gates = arguments
    shape = GroupShape(((4, 4, 4, 4),), 0.0)
    x = case.x.detach()
    (y,) = decode.forward_pass(
        shape, x, [weight], [bias], [gates], [t.detach() for t in a], [t.detach() for t in b],
        case.task_ids,
    )  # fmt: skip
    torch.testing.assert_close(y, multi_lora_reference(*case.arguments()).detach())


def test_an_update_alone_and_a_batch_of_sequences(group):
    shape, x, rest, ids = group
    rest[0][1] = rest[1][1] = None
    x, ids = torch.cat([x, x])[:24].view(4, 6, -1).transpose(0, 1), ids.repeat(2)[:24].view(6, 4)
    outputs = run((shape, x, rest, ids))
    assert outputs[1].shape == (6, 4, 9)
    assert_right(outputs, (shape, x, rest, ids))


def test_the_cache_stacks_once_and_sees_every_change(group):
    cache, (_, _, rest, _) = DecodeCache(), group
    for _ in range(3):
        assert_right(run(group, cache), group)
    assert PlainGroup.made == 2  # two launches, prepared once
    rest[3][1].mul_(2)  # a, in place
    assert_right(run(group, cache), group)
    rest[4][5] = rest[4][5] + 1  # b, replaced
    assert_right(run(group, cache), group)
    rest[2][2].zero_()  # gates
    assert_right(run(group, cache), group)
    assert PlainGroup.made == 8
    rest[3][1].data.mul_(2)  # unseen, as documented
    cache.clear()
    assert_right(run(group, cache), group)


def test_inference_tensors_are_never_kept(group):
    cache, rest = DecodeCache(), group[2]
    with torch.inference_mode():
        rest[3] = [t.clone() for t in rest[3]]
        first = run(group, cache)
        rest[3][0].add_(1)
        again = run(group, cache)
        assert_right(again, group)
        assert not torch.equal(first[0], again[0])


def test_calls_that_keep_nothing_are_stacked_by_one_launch_where_that_runs(monkeypatch):
    """On a GPU: tried once, and not while a graph is captured."""
    x = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 3))
    state = {"capturing": True, "reason": None, "tried": 0}

    def tried(_):
        state["tried"] += 1
        return state["reason"]

    known = {}
    monkeypatch.setattr(group_module, "_WHY_NO_TRITON", known)
    monkeypatch.setattr(group_module, "_launch_one", tried)
    monkeypatch.setattr(decode, "capturing", lambda _: state["capturing"])
    assert decode._stack_at_once(x) == Stacks.of and state["tried"] == 0
    state["capturing"] = False
    kernel = decode._stack_at_once(x)
    assert kernel.__module__ == "ckf.kernels.triton_stack"
    state["capturing"] = True  # known by now
    assert decode._stack_at_once(x) is kernel and state["tried"] == 1
    known.clear()
    state |= {"capturing": False, "reason": "no C compiler"}
    assert [decode._stack_at_once(x) for _ in range(2)] == [Stacks.of] * 2 and state["tried"] == 2
    assert decode._stack_at_once(torch.ones(1)) == Stacks.of


def test_why_no_triton_kernel_runs_is_kept(monkeypatch):
    import ckf.kernels.triton_drop as module

    def refuses(*_):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(module, "drop", refuses)
    monkeypatch.setattr(group_module, "_WHY_NO_TRITON", {})
    group_module.kernel_draws.cache_clear()
    device = torch.device("cpu")
    try:
        with pytest.warns(UserWarning, match="Failed to find C compiler.; PyTorch's integer"):
            assert not group_module.kernel_draws(device)
        assert group_module.why_no_triton(device) == "Failed to find C compiler"
    finally:
        group_module.kernel_draws.cache_clear()


def test_layers_keep_their_own_caches():
    import ckf
    from ckf.patch import patched_layers
    from tests.tiny import tiny_model

    model = ckf.patch_model(tiny_model("llama"), ["a", "b"], r=4)
    layer = next(iter(patched_layers(model).values()))
    layer._decode[0]._kept["make"] = (("key",), None, ())
    twin = copy.deepcopy(layer)
    assert layer._decode[0]._kept and not twin._decode[0]._kept
    model.eval()
    assert not layer._decode[0]._kept
