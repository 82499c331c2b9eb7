"""How calls reach the CPU kernels: what is kept, what is refused, who sees them."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import ckf
from ckf.kernels import compact_slots, cpu, multi_lora_group, multi_lora_linear, ops
from ckf.kernels.config import check_backend, choose_backend
from ckf.kernels.decode_cache import DecodeCache
from ckf.kernels.dispatch import Call
from ckf.kernels.group import GroupShape
from tests.kernels.cases import random_case
from tests.kernels.cpu_cases import built, by_cpu, constant, group, instructions  # noqa: F401
from tests.tiny import tiny_model


@pytest.mark.parametrize("m", [1, 7, 300])
def test_decoding_keeps_what_it_made_and_sees_changes(instructions, m):  # noqa: F811
    arguments, _ = group(m=m)
    cache = DecodeCache()

    def decoded():
        with torch.no_grad():
            return ops.run_group(*arguments, 0.0, 0, "cpu", decode_cache=cache)

    def assert_right():
        plain = multi_lora_group(*arguments, backend="torch")
        for got, expected in zip(decoded(), plain, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)

    assert_right()
    (kept,) = cache._kept
    first = cache._kept[kept][1]
    assert_right()
    assert cache._kept[kept][1] is first
    with torch.no_grad():
        arguments[4][1][0].mul_(-2)  # a B
    assert_right()
    assert cache._kept[kept][1] is not first


def test_wrong_ids_are_refused_before_the_base_is_computed(monkeypatch):
    case = constant(random_case())
    monkeypatch.setattr(cpu.F, "linear", None)
    for wrong in (3, -2, 2**40, -(2**62)):
        case.task_ids[5] = wrong
        for backend in ("cpu", "auto"):
            with pytest.raises(
                ValueError, match=f"task id {wrong} is out of range; expected 0 to 2"
            ):
                multi_lora_linear(*case.arguments(), backend=backend)


def test_what_it_does_not_compute():
    """By name it raises; "auto" takes PyTorch's products."""
    for case, why in (
        (random_case(soft=True), "gates need a gradient"),
        (random_case(dtype=torch.float64), "dtype torch.float64; the CPU kernels take float32"),
        (random_case().to(torch.bfloat16), "dtype torch.bfloat16"),
    ):
        with pytest.raises(ValueError, match=why):
            by_cpu(*case.arguments())
        train = Call(13, 24, 17, 16, True, False, 16, case.gates.requires_grad)
        assert choose_backend("auto", case.x, train).backend == "torch"
        multi_lora_linear(*case.arguments())
    assert choose_backend("auto", random_case().x, train._replace(learned=False)).backend == "cpu"


def test_without_the_extension(monkeypatch):
    """As on a machine without a compiler."""
    monkeypatch.setattr(cpu, "available", lambda: (False, "the extension ckf._cpu is not built"))
    case = random_case()
    y = multi_lora_linear(*case.arguments())
    assert torch.equal(y, multi_lora_linear(*case.arguments(), backend="torch"))
    with pytest.raises(ValueError, match="'cpu' cannot run here: the extension ckf._cpu is not"):
        check_backend("cpu")
    with pytest.raises(ValueError, match="cannot compute this call: the extension ckf._cpu is not"):
        by_cpu(*case.arguments())


def experts(case) -> cpu.Experts:
    ranks = tuple(t.shape[0] for t in case.a)
    return cpu.Experts(GroupShape((ranks,), 0.0), [case.gates], case.a, case.b)


def test_wrong_tensors_never_reach_the_kernels():
    case = constant(random_case(ranks=[4, 4, 3, 4]))
    x, ids = case.x.detach(), case.task_ids
    right = experts(case)
    run = partial(right.forward, weights=[case.weight], biases=[None])
    for call, message in (
        (lambda: experts(replace(case, a=[t[:, 1:] for t in case.a[:1]] + case.a[1:])), "a is"),
        (lambda: experts(replace(case, b=[t[:5] for t in case.b[:1]] + case.b[1:])), "b is"),
        (lambda: experts(replace(case, b=[case.b[0].to("meta"), *case.b[1:]])), "on meta"),
        (lambda: experts(replace(case, gates=case.gates[:, :3])), "gates is"),
        (lambda: run(x, x[:, 1:], task_ids=ids, h=None), "x is"),
        (lambda: run(x, x, task_ids=ids[1:], h=None), "task_ids is"),
        (
            lambda: run(x, x, task_ids=ids, h=torch.empty(13, 7)),
            "7 columns; a task's experts have 8",
        ),
        (lambda: right.backward([torch.ones(12, 17)], x, x, ids, None, None, [None]), "dy is"),
        (lambda: right.backward([torch.ones(13, 17)], x, x[1:], ids, None, None, [None]), "h is"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_slots_that_are_too_narrow_are_refused():
    case = constant(random_case())
    slots, _ = compact_slots([(case.gates != 0).tolist()], [[4] * 4])
    for wrong in (0, 7):
        with pytest.raises(ValueError, match="slots reach 7; expected less than"):
            by_cpu(*case.arguments(), slots=(slots, wrong))
    right = experts(case)  # and where nobody looked at the slots
    with pytest.raises(ValueError, match="0 columns; a task's experts have 8"):
        h, dy = torch.empty(13, 0), torch.ones(13, 17)
        right.backward([dy], case.x.detach(), h, case.task_ids, None, None, [torch.zeros(17 * 16)])


def test_saved_tensors_that_come_back_changed():
    case = random_case(m=40)
    for changed in (torch.Tensor.bfloat16, lambda t: t.t().contiguous().t()):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, changed):
            y = by_cpu(*case.arguments())
        with pytest.raises((ValueError, RuntimeError)):  # never memory read as what it is not
            torch.autograd.grad(y.sum(), case.a)


def test_who_only_sees_ops_sees_the_update():
    """Of a model in evaluation, whose adapters are kept from call to call."""
    model = ckf.patch_model(tiny_model("llama"), tasks=["a", "b"], r=4).eval()
    layer = next(m for m in model.modules() if isinstance(m, ckf.layers.MultiLoRALinear))
    for b in layer.lora_B.values():
        torch.nn.init.normal_(b)
    x = torch.randn(3, 5, layer.in_features)
    with torch.no_grad(), ckf.use_task(model, "a"):
        expected = layer(x)
        assert torch.equal(expected, layer(x))
        assert not torch.allclose(expected, layer.base_layer(x))
        torch.testing.assert_close(layer(torch._neg_view(-x)), expected)
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with torch.no_grad(), ckf.use_task(model, "a"), Watch():
        layer(x)
    assert "ckf.multi_lora.default" in seen


class Marked(torch.nn.Parameter):
    """A subclass that is a plain tensor all the same."""


def test_adapters_of_a_subclass():
    case = constant(random_case())
    marked = replace(case, a=[Marked(t.detach()) for t in case.a])
    assert type(marked.a[0]) is Marked
    assert torch.equal(by_cpu(*marked.arguments()), by_cpu(*case.arguments()))


def test_adapters_replaced_or_made_in_inference_mode():
    case = constant(random_case(m=9))
    cache = DecodeCache()
    arguments = [
        case.x,
        [case.weight],
        [case.bias],
        [case.a],
        [case.b],
        [case.gates],
        case.task_ids,
    ]

    def assert_right():
        with torch.no_grad():
            (y,) = ops.run_group(*arguments, 0.0, 0, "cpu", decode_cache=cache)
            torch.testing.assert_close(y, multi_lora_group(*arguments, backend="torch")[0])

    assert_right()
    case.b[1].data = torch.randn(17, 4)
    assert_right()
    with torch.inference_mode():
        arguments[4] = [[t * 2 for t in case.b]]
        assert_right()


def test_a_patched_model_takes_it(monkeypatch):
    model = ckf.patch_model(tiny_model("llama"), tasks=["a", "b"], r=4)
    ids = torch.randint(0, 50, (2, 6))
    calls, forward = [], cpu.Experts.forward
    monkeypatch.setattr(
        cpu.Experts, "forward", lambda self, *a: calls.append(1) or forward(self, *a)
    )
    model(input_ids=ids, labels=ids, task_ids=["a", "b"]).loss.backward()
    assert calls
