"""Who listens to torch's dispatcher: whether work may be done past the registered ops."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ckf.kernels.replay import PLAIN

# of make_fx(pre_dispatch=True)
_pre_dispatch_modes = getattr(torch._ops, "_len_torch_dispatch_stack_pre_dispatch", lambda: 0)


def is_plain(x: Tensor) -> bool:
    """Not for what only sees registered ops: modes, transforms, compilers, tracers."""
    if type(x) is not Tensor or torch.compiler.is_compiling():
        return False
    if x.is_neg() or x._is_zerotensor():
        return False
    if torch._C._get_tracing_state() is not None or _pre_dispatch_modes():
        return False
    modes, transform = torch._C._len_torch_dispatch_stack(), torch._C._functorch
    return modes == 0 and transform.peek_interpreter_stack() is None


def may_call_directly(x, tensors: Sequence[Tensor | None], new: Sequence[Tensor | None]) -> bool:
    """Whether an op's function may be called past the dispatcher.

    That turns subclasses, lazy negatives and zeros without memory into plain tensors, and is what
    modes listen to, those of functions too.

    Args:
        tensors: all but x; ``new``: those of them that were not asked before, as a forward's
            tensors in its backward.
    """
    if not is_plain(x) or torch._C._len_torch_function_stack():
        return False
    if not PLAIN.issuperset(map(type, tensors)):
        return False
    return not any([t is not None and (t.is_neg() or t._is_zerotensor()) for t in new])
