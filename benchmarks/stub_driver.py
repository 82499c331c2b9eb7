"""Drivers for a GPU that is not there: Triton compiles for it as always, and nothing runs."""

import torch
from triton.backends.compiler import GPUTarget


class NamedDriver:
    """Names a GPU; its device number is its compute capability."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0


class StubDriver(NamedDriver):
    """Takes kernels and launches as a GPU's driver does, loads and runs nothing; counts."""

    def __init__(self, arch: int = 90) -> None:
        super().__init__(arch)
        self.count = 0
        self.utils = self

    def launched(self, grid: tuple[int, int, int], metadata, arguments: tuple) -> None:
        """What a launch hands over."""
        self.count += 1

    def launcher_cls(self, source, metadata):
        def launch(x, y, z, stream, function, packed, launch_metadata, enter, leave, *arguments):
            self.launched((x, y, z), metadata, arguments)

        return launch

    def get_device_properties(self, device: int) -> dict:
        return {"max_shared_mem": 232448}

    def load_binary(self, *_) -> tuple:
        return object(), object(), 32, 0, 1024

    def unload_module(self, _) -> None:
        pass


def stub_products(kernel: object = None) -> None:
    """From here on csrc's products take CPU tensors, and launch ``kernel``, or nothing."""
    from ckf.kernels import cuda, hopper

    class Nothing:
        def hopper_gemm(self, arguments: bytes, stream: int) -> None:
            pass

    cuda._DEVICE_TYPE = "cpu"
    extension = kernel or Nothing()
    cuda._load_extension = lambda: (extension, "")
    cuda._raw_stream = lambda index: 0
    torch.cuda.current_device = lambda: 0
    hopper._usable = lambda device: (True, "")
