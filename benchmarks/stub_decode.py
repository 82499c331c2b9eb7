"""csrc's decode kernels without a GPU: the bridge takes CPU tensors to a stand-in."""

from collections.abc import Callable

import torch

from ckf.kernels import cuda


class StubDecode:
    """Takes launches as ``ckf._C.MultiLoraDecode`` does, and runs nothing."""

    def __init__(self, **static) -> None:
        pass

    def __call__(self, *arguments) -> None:
        pass

    def linears(self, *arguments) -> bool:
        return True


def stub_cuda(
    kernel: type = StubDecode, put: Callable[[object, str, object], None] = setattr, stream: int = 0
) -> None:
    """From here on ``ckf.kernels.cuda`` launches ``kernel`` on CPU tensors, on this stream.

    put: sets an attribute; a test's is taken back at its end.
    """

    class Extension:
        MultiLoraDecode = kernel

    put(cuda, "_DEVICE_TYPE", "cpu")
    put(cuda, "_load_extension", lambda: (Extension, ""))
    put(cuda, "_raw_stream", lambda index: stream)
    put(torch.cuda, "current_device", lambda: 0)
