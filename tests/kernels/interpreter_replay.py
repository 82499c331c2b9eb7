"""Repeated passes, in Triton's interpreter: written down from other inputs, the same bits.

Run by test_triton_interpreter.py. Tests of the other suites run again here, and every pass of
theirs is computed as it is, then written down from tensors in other memory with other values, then
repeated from its own; kernels get addresses alone, as on a GPU. Fresh memory holds NaN, the arena
as well.
"""

import ctypes
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from triton.runtime.interpreter import InterpretedFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from ckf.kernels import replay, triton_backend
from ckf.kernels.launch import PLANS
from ckf.kernels.replay_recorder import Recorder
from tests.kernels.cases import random_case
from tests.kernels.interpreter_hopper import of_group, take_products
from tests.kernels.interpreter_slots import (  # noqa: F401
    assert_within_rounding,
    test_a_bias_may_be_strided,
    test_group_with_slots,
    test_plans_match_reference,
    test_rows_of_the_base_alone,
    triton_with,
)
from tests.kernels.interpreter_suite import (  # noqa: F401
    cast,
    poisoned_memory,
    test_base_gradients,
    test_empty_and_single_rows,
    test_expanded_output_gradient,
    test_float32_adapters_on_a_16_bit_base,
    test_group_of_unlike_linears,
    test_matches_reference,
    test_strided_inputs,
)
from tests.kernels.test_cuda_hopper_host import Host, library  # noqa: F401

passes: list[str] = []  # that were repeated


class NotedKernel:
    """An interpreted kernel that is launched as a remembered one: noted, and from addresses."""

    def __init__(self, kernel: InterpretedFunction) -> None:
        self.kernel = kernel

    def __getitem__(self, grid):
        def launch(**arguments) -> None:
            def send(*values) -> None:
                found = map(_as_given, values, arguments.values())
                with _disable_current_modes():  # a GPU's launch is no torch op
                    self.kernel[grid](**dict(zip(arguments, found, strict=True)))

            replay.note(send, list(arguments.values()))
            send(*arguments.values())

        return launch


def _as_given(value, example):
    """The tensor at an address, laid out as the example; anything else as it is."""
    if isinstance(value, tuple):
        return tuple(map(_as_given, value, example))
    if isinstance(example, TensorDescriptor) and not isinstance(value.base, Tensor):
        base = _as_given(value.base.data_ptr(), example.base)
        return TensorDescriptor(base, value.shape, value.strides, value.block_shape)
    if not isinstance(example, Tensor) or isinstance(value, Tensor) or example.numel() == 0:
        return example if isinstance(example, Tensor) and example.numel() == 0 else value
    last = sum((n - 1) * step for n, step in zip(example.shape, example.stride(), strict=True))
    memory = (ctypes.c_byte * ((last + 1) * example.itemsize)).from_address(value)
    flat = torch.frombuffer(memory, dtype=example.dtype)
    return flat.as_strided(example.shape, example.stride())


def elsewhere(tensor: Tensor | None) -> Tensor | None:
    """Laid out alike in other memory; floats and task ids in another order, slots as they are."""
    if tensor is None:
        return None
    other = torch.empty(0, dtype=tensor.dtype)
    other.set_(
        tensor.untyped_storage().clone(), tensor.storage_offset(), tensor.shape, tensor.stride()
    )
    moved = tensor.is_floating_point() or tensor.dtype == torch.int64
    if moved and tensor.dim() and 0 not in tensor.stride():
        other.copy_(tensor.flip(0))
    return other


def thrice(make, static, tensors):
    """The pass as it is; the same repeated, written down from other inputs."""
    expected = make(static, tensors)
    inputs = [elsewhere(tensor) for tensor in tensors]
    recorder = replay._local.recorder = Recorder(inputs)
    try:
        with recorder:
            outputs = make(static, inputs)
    finally:
        replay._local.recorder = None
    recording = recorder.recording(outputs)
    assert recording is not None, recorder.failed
    passes.append(make.__name__)
    addresses = [0 if t is None else t.data_ptr() for t in tensors]
    found = recording.repeat(tensors, addresses)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape and one.stride() == other.stride()
        assert torch.equal(one.nan_to_num(nan=7.0), other.nan_to_num(nan=7.0))
    return found


@pytest.fixture(autouse=True)
def every_pass_is_repeated():
    with pytest.MonkeyPatch.context() as patch:
        for name, module in list(sys.modules.items()):
            if name.startswith("ckf.kernels.triton_"):
                for own, kernel in list(vars(module).items()):
                    if own.endswith("_kernel"):
                        patch.setattr(module, own, NotedKernel(kernel))
        patch.setattr(triton_backend, "_REPEATS", True)
        patch.setattr(triton_backend, "replayed", thrice)
        passes.clear()
        yield
    assert passes


@settings(max_examples=20, deadline=None, derandomize=True)
@given(data=st.data())
def test_random_mixes(data):
    """Ranks of zero, gathered columns, rows in any order, learned gates."""
    tasks = data.draw(st.sampled_from([1, 2, 5, 9]), "tasks")
    rank = st.integers(0, data.draw(st.sampled_from([3, 20]), "largest rank"))
    soft = data.draw(st.booleans(), "soft")
    case = random_case(
        m=data.draw(st.integers(0, 40), "m"),
        k=data.draw(st.sampled_from([1, 16, 41]), "k"),
        n=data.draw(st.sampled_from([1, 24, 37]), "n"),
        tasks=tasks,
        ranks=data.draw(st.lists(rank, min_size=tasks + 1, max_size=tasks + 1), "ranks"),
        soft=soft,
        bias=data.draw(st.booleans(), "bias"),
        dropout_p=data.draw(st.sampled_from([0.0, 0.25]), "dropout_p"),
        seed=data.draw(st.integers(0, 1000), "seed"),
    )
    case = cast(case, data.draw(st.sampled_from([torch.float32, torch.float16]), "dtype"))
    plan = data.draw(st.sampled_from(PLANS), "plan")
    compact = not soft and data.draw(st.booleans(), "slots")
    assert_within_rounding(triton_with(plan, compact), case)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("experts", [3, 6, 7])
def test_products_of_csrc(experts, dropout_p, library, monkeypatch):  # noqa: F811
    take_products(Host(library), monkeypatch)
    of_group(experts, (40, 24, 16), dropout_p)
    assert passes == ["_forward", "_backward"]
