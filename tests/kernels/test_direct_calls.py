"""The ops' functions, called past the dispatcher, and when they must not be.

The dispatcher turns lazy negatives, zeros without memory and subclasses that unwrap themselves into
plain tensors, and is what modes, tracers and transforms listen to.
"""

import warnings
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from ckf.kernels import multi_lora_linear, ops
from ckf.kernels.config import usable_backends
from ckf.kernels.reference import multi_lora_reference
from tests.kernels.cases import random_case

BACKENDS = [name for name in ("torch", "cpu") if usable_backends()[name][0]]


class Unwrapping(Tensor):
    """A wrapper without memory of its own whose every op is one of what it holds, as an
    AsyncCollectiveTensor's."""

    @staticmethod
    def __new__(cls, inner: Tensor):
        own = Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=inner.device
        )
        own.inner = inner
        return own

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        def plain(leaf):
            return leaf.inner if isinstance(leaf, Unwrapping) else leaf

        return func(*tree_map(plain, args), **tree_map(plain, kwargs or {}))


def gradients(function, case, dy) -> list[Tensor]:
    return list(torch.autograd.grad(function(*case.arguments()), case.leaves(), dy))


DYS = {
    "plain": torch.clone,
    "negative": lambda dy: torch._neg_view(-dy),
    "imaginary": lambda dy: torch.complex(torch.zeros_like(dy), -dy).conj().imag,
    "subclass": Unwrapping,
}


@pytest.mark.parametrize("n", [1, 17])
@pytest.mark.parametrize("kind", DYS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_every_kind_of_output_gradient(backend, kind, n):
    case = random_case(n=n)
    dy = torch.randn(13, n)
    ours = gradients(partial(multi_lora_linear, backend=backend), case, DYS[kind](dy))
    for one, wanted in zip(ours, gradients(multi_lora_reference, case, dy), strict=True):
        torch.testing.assert_close(one, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_output_gradient_of_zeros_without_memory(backend):
    case = random_case()
    dy = torch._efficientzerotensor((13, 17))
    assert not any(
        g.any() for g in gradients(partial(multi_lora_linear, backend=backend), case, dy)
    )


@pytest.mark.parametrize("change", [Unwrapping, lambda t: torch._neg_view(-t)])
@pytest.mark.parametrize("name", ["x", "weight", "a", "b", "gates", "task_ids"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_of_other_kinds(backend, name, change):
    if name == "task_ids":
        change = Unwrapping
    case = random_case()
    wanted = multi_lora_reference(*case.arguments())
    own = getattr(case, name)
    changed = [change(t.detach()) for t in own] if type(own) is list else change(own.detach())
    setattr(case, name, changed)
    group = case.x, [case.weight], [case.bias], [case.a], [case.b], [case.gates], case.task_ids
    with torch.no_grad():
        found = ops.run_group(*group, 0.0, 0, backend)[0]
    torch.testing.assert_close(found, wanted.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_make_fx_sees_the_op(backend, pre_dispatch):
    case = random_case()

    def function(x):
        with torch.no_grad():
            return multi_lora_linear(x, *case.arguments()[1:], backend=backend)

    graph = make_fx(function, pre_dispatch=pre_dispatch)(case.x.detach())
    assert any("ckf.multi_lora" in str(node.target) for node in graph.graph.nodes)
    torch.testing.assert_close(graph(case.x.detach()), function(case.x.detach()))


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tracer_never_loses_the_update(backend, trains):
    """torch.jit.trace cannot take the op, and says so."""
    case = random_case()
    case.a, case.b = ([t.detach() for t in own] for own in (case.a, case.b))
    case.x = case.x.detach().requires_grad_(trains)

    def function(x):
        return multi_lora_linear(x, *case.arguments()[1:], backend=backend)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            traced = torch.jit.trace(function, case.x, check_trace=False)
        except RuntimeError as error:
            assert "Tensor?" in str(error)
            return
    torch.testing.assert_close(traced(case.x), function(case.x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_function_mode_sees_one_op_a_pass(backend):
    class Listening(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            heard.append(str(func))
            return func(*args, **(kwargs or {}))

    heard, case = [], random_case()
    with Listening():
        multi_lora_linear(*case.arguments(), backend=backend)
    assert sum("ckf.multi_lora" in name for name in heard) == 1
    assert not any("linear" in name.replace("multi_lora_linear", "") for name in heard)
