"""Launches that do not ask Triton anew which binary to run.

``kernel[grid](...)`` binds, specialises and looks up in Python at every launch: 20 to 50 us for two
dozen arguments, where handing a known binary to the driver takes 3. A decoder layer's training step
has some 60 launches, so that for small models the host, not the GPU, would set the pace. Here the
binaries are remembered by what Triton specialises on; ``CompiledKernel.__getitem__`` runs them, on
the current stream and with launch hooks, as Triton itself. Not asked again after a kernel's first
launch: Triton's pre-run hooks, its debug knobs, and whether globals of the kernel have changed.

Kernels so launched follow the naming of this package: pointers (a tensor, None, or a tuple of
tensors) begin with ``p_``; what is neither a pointer nor a constexpr is an int or a float.
"""

from collections.abc import Callable

import torch
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

REMEMBER = True  # False: every launch goes through Triton, as the compile tests need
ALIGNMENT = 16  # bytes of addresses, and the divisor of ints, that Triton specialises on


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
        self.bind = _binder(kernel)
        self._binaries: dict[tuple, CompiledKernel] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        """``grid``: one to three numbers of programs."""

        def launch(**arguments) -> None:
            key, values = self.bind(**arguments)
            binary = self._binaries.get(key)
            if binary is not None and REMEMBER:
                binary[(*grid, 1, 1)[:3]](*values)
                return
            binary = self.kernel[grid](**arguments)
            if isinstance(binary, CompiledKernel):
                self._binaries[key] = binary

        return launch


def _binder(kernel: JITFunction) -> Callable[..., tuple[tuple, tuple]]:
    """A function of the kernel's arguments: a key, and the arguments in order.

    Keys are equal only where Triton would take the same binary. Written out for each kernel, as
    Triton does too: a loop over the arguments would take half the time of the launch.
    """
    names = [p.name for p in kernel.params]
    parts = ["num_warps", "num_stages"]
    for p in kernel.params:
        if p.is_constexpr:
            parts += [f"{p.name}.__class__", p.name]  # 1 and True are equal
        elif p.name.startswith("p_"):
            parts.append(f"pointer({p.name}) if {p.name} is not None else None")
        else:
            parts.append(f"{p.name}.__class__")
            parts += [f"{-(2**31)} <= {p.name} < {2**31}", f"{p.name} < {2**63}"]  # its bits
            if not p.do_not_specialize:
                parts += [f"{p.name} == 1", f"{p.name} % {ALIGNMENT} == 0"]
    source = f"""
def bind(*, {", ".join(names)}, num_warps=4, num_stages=3):
    return (device({names[0]}), {", ".join(parts)}), ({", ".join(names)},)
"""
    space = {"pointer": _pointer, "device": _device}
    exec(source, space)
    return space["bind"]


def _pointer(value):
    """Type and alignment of a tensor, or of each of a tuple."""
    if type(value) is tuple:
        return tuple([t.dtype if t.data_ptr() % ALIGNMENT == 0 else (t.dtype,) for t in value])
    return value.dtype if value.data_ptr() % ALIGNMENT == 0 else (value.dtype,)


def _device(value) -> int:
    return (value[0] if type(value) is tuple else value).get_device()
