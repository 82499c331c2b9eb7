"""Launches that do not ask Triton anew which binary to run.

``kernel[grid](...)`` binds, specialises and looks up in Python at every launch: 20 to 50 us for two
dozen arguments, where handing a known binary to the driver takes 3. A decoder layer's training step
has 56 launches, so that for small models the host, not the GPU, may set the pace. Here the
binaries are remembered by what Triton specialises on; ``CompiledKernel.__getitem__`` runs them, on
the current stream and with launch hooks, as Triton itself. Not asked again after a kernel's first
launch: Triton's pre-run hooks, its debug knobs, and whether globals of the kernel have changed.

Kernels so launched follow the naming of this package: pointers (a tensor, None, or a tuple of
tensors) begin with ``p_``, tensor descriptors with ``d_``; what is neither, nor a constexpr, is an
int or a float.
"""

from collections.abc import Callable
from operator import itemgetter

import torch
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from ckf.kernels import replay
from ckf.kernels.replay import ALIGNMENT  # for Triton also the divisor of ints

REMEMBER = True  # False: every launch goes through Triton, as the compile tests need


def remembered(kernel: JITFunction) -> "RememberedKernel":
    """A ``triton.jit`` kernel launched in the same words, ``kernel[grid](...)``, all by keyword.

    The kernel itself in Triton's interpreter, and on ROCm, where the sizes of tensors count too.
    """
    plain = torch.version.hip is not None or not isinstance(kernel, JITFunction)
    return kernel if plain else RememberedKernel(kernel)


class RememberedKernel:
    """A kernel and its binaries, by device, constants and kinds of arguments."""

    def __init__(self, kernel: JITFunction) -> None:
        self.kernel = kernel
        self._binaries: dict[tuple, CompiledKernel] = {}
        constants = [p.name for p in kernel.params if p.is_constexpr]
        runtime = [p for p in kernel.params if not p.is_constexpr]
        pointers = [p.name for p in runtime if p.name.startswith("p_")]
        descriptors = [p.name for p in runtime if p.name.startswith("d_")]
        numbers = [p for p in runtime if not p.name.startswith(("p_", "d_"))]
        plain = [p.name for p in numbers if p.do_not_specialize]
        special = [p.name for p in numbers if not p.do_not_specialize]
        self._values = _getter([p.name for p in kernel.params])
        groups = constants, pointers, descriptors, plain, special
        self._groups = tuple(_getter(names) for names in groups)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        """``grid``: one to three numbers of programs."""

        def launch(**arguments) -> None:
            key, values = self.bind(**arguments)
            binary = self._binaries.get(key)
            if binary is not None and REMEMBER:
                send = binary[(*grid, 1, 1)[:3]]
                replay.note(send, values)
                send(*values)
                return
            binary = self.kernel[grid](**arguments)
            if isinstance(binary, CompiledKernel) and REMEMBER:
                self._binaries[key] = binary
                replay.note(binary[(*grid, 1, 1)[:3]], values)
            else:
                replay.not_repeatable("Triton itself was asked for a kernel")

        return launch

    def bind(self, num_warps: int = 4, num_stages: int = 3, **arguments) -> tuple[tuple, tuple]:
        """A key, and the kernel's arguments in order.

        Keys are equal only where Triton would take the same binary.
        """
        constants, pointers, descriptors, plain, special = [get(arguments) for get in self._groups]
        return (
            _device(descriptors[0].base if descriptors else pointers[0]),
            num_warps,
            num_stages,
            constants,
            tuple(map(type, constants)),  # 1 and True are equal
            tuple(map(_pointer, pointers)),
            tuple(map(_descriptor, descriptors)),
            tuple(map(_width, plain)),
            tuple([(_width(v), v == 1, v % ALIGNMENT == 0) for v in special]),
        ), self._values(arguments)


def _getter(names: list[str]) -> Callable[[dict], tuple]:
    """Takes these values from the arguments, as a tuple; KeyError for one that is missing."""
    if len(names) < 2:  # itemgetter gives one value bare
        return lambda arguments: tuple([arguments[name] for name in names])
    return itemgetter(*names)


def _pointer(value):
    """Type and alignment of a tensor, or of each of a tuple."""
    if value is None:
        return None
    if type(value) is tuple:
        return tuple([t.dtype if t.data_ptr() % ALIGNMENT == 0 else (t.dtype,) for t in value])
    return value.dtype if value.data_ptr() % ALIGNMENT == 0 else (value.dtype,)


def _descriptor(value: TensorDescriptor) -> tuple:
    """Shapes and strides are of its run, not of the binary."""
    return value.base.dtype, tuple(value.block_shape), value.padding


def _width(value: int | float) -> int:
    """Bits of the signed integer that holds an int; 65 where it takes an unsigned one."""
    if type(value) is not int:
        return 0
    if -(2**31) <= value < 2**31:
        return 32
    return 64 if value < 2**63 else 65


def _device(value) -> int:
    return (value[0] if type(value) is tuple else value).get_device()
