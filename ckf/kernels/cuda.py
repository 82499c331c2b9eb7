"""The bridge to the CUDA extension ``ckf._C``: what raw pointers cannot check is checked here.

Importing this module needs neither a GPU nor the extension, and asks the hardware nothing.
"""

from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from ckf.kernels.extension import extension_info, load_extension

MAX_ROWS = 256  # the kernel reads A once for every few rows: past this, matrix products win
# The kernels that compute the base as well, CkfDecodeForm in csrc/launchers.h: the number, the most
# rows, the most rank columns of a linear.
FORMS = {"loads": (1, 16, 256), "wgmma": (2, 64, 128)}
MAX_LINEAR_ROWS = 64
MAX_RANK = 16384  # R, over all linears of a group
MAX_LINEARS = 8  # kCkfMostLinears in csrc/launchers.h
EARLY = 2  # of overlap
_MAX_SIZE = 1 << 30
_DEVICE_TYPE = "cuda"
# A subclass (DTensor, FakeTensor) may have no memory of its own, or another's shape.
_PLAIN = (Tensor, torch.nn.Parameter)
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # CkfDtype in csrc/launchers.h


def available(device: torch.device | int | None = None) -> tuple[bool, str]:
    """Whether the CUDA kernels can run on a device (None: the current one), and if not, why."""
    extension, reason = _load_extension()
    if extension is None:
        return False, reason
    if torch.version.hip is not None:
        return False, "torch is built for ROCm; the kernels are CUDA code"
    if not torch.cuda.is_available():
        return False, "torch sees no CUDA device"
    capability = torch.cuda.get_device_capability(device)
    archs = _built_for(extension)
    if not _covers(archs, capability):
        name = f"sm_{capability[0]}{capability[1]}"
        return False, (
            f"ckf._C was built for {', '.join(archs)}, the device is {name}; "
            f"rebuild with CKF_CUDA_ARCHS={name}"
        )
    return True, f"ckf._C for {', '.join(archs)}"


@lru_cache(maxsize=4)  # asked at every call by name, and it is JSON
def _built_for(extension: ModuleType) -> tuple[str, ...]:
    return tuple(extension.build_info()["archs"])


def build_info() -> dict:
    """What the extension was built from: archs, nvcc, host compiler, hash of the sources.

    Without an extension: ``{"built": False, "reason": ...}``.
    """
    return extension_info(*_load_extension())


def most_linear_rank(rows: int) -> int:
    """Rank columns of a linear that one of those kernels takes with so many rows; 0: too many."""
    found = 0
    for _, most_rows, most_rank in FORMS.values():  # a loop that torch.compile reads
        if rows <= most_rows and most_rank > found:
            found = most_rank
    return found


class DecodeGroup:
    """The adapters of linears that share x, checked once, so that a call checks y, x and ids alone.

    Calling it adds the gated low-rank update to every y in place, in one launch:
    ``ys[l][i] += sum_c column_gates[task_ids[i], c] * (a[c] . x[i]) * bs[l][c]`` over l's columns,
    summed in float32 and rounded once. Columns with gate 0 are left out by selection. Same inputs,
    same bits, whatever the other rows and linears are. Values changed in place later are seen; for
    a tensor that was replaced make a new group.

    Args:
        a: (R, k) contiguous; the A of all experts of the first linear one below the other, then the
            second's, and so on. float32, float16 or bfloat16.
        bs: at most 8 contiguous (R_l, n_l) of a's dtype, each linear's transposed B likewise; R is
            the sum of the R_l.
        column_gates: (T, R) float32 contiguous, the gate of the expert that owns column c.

    Raises:
        ValueError: tensors that do not fit.
    """

    def __init__(self, a: Tensor, bs: Sequence[Tensor], column_gates: Tensor) -> None:
        if not 1 <= len(bs) <= MAX_LINEARS:
            raise ValueError(f"bs has {len(bs)} entries; expected 1 to {MAX_LINEARS} linears")
        dtype = a.dtype if isinstance(a, Tensor) else None
        device = a.device if isinstance(a, Tensor) else None
        _check_matrix("a", a, dtype, device)
        if device.type != _DEVICE_TYPE:
            raise ValueError(
                f"a is on {device}; expected a CUDA tensor; move it, or use the 'torch' backend"
            )
        if dtype not in _DTYPES:
            raise ValueError(f"a is {dtype}; expected one of {', '.join(map(str, _DTYPES))}")
        for i, b in enumerate(bs):
            _check_matrix(f"bs[{i}]", b, dtype, device)
        _check_matrix("column_gates", column_gates, torch.float32, device)
        self.rank, self.k = a.shape
        self.tasks = column_gates.shape[0]
        self.widths = [b.shape[1] for b in bs]
        ranks = [b.shape[0] for b in bs]
        if sum(ranks) != self.rank or column_gates.shape[1] != self.rank:
            raise ValueError(
                f"a has {self.rank} columns, column_gates {column_gates.shape[1]}, bs "
                f"{' + '.join(map(str, ranks))}; expected the same R"
            )
        if self.rank > MAX_RANK or max(self.k, self.tasks, *self.widths) > _MAX_SIZE:
            raise ValueError(
                f"R={self.rank}, k={self.k}, n={self.widths}, T={self.tasks}; expected R at most "
                f"{MAX_RANK} and the others at most {_MAX_SIZE}; use the 'torch' backend"
            )
        self.dtype, self.device, self.index = dtype, device, device.index or 0
        # Aliases of their own: the memory lives as long as the pointers taken from it.
        self._tensors = (a.detach(), [b.detach() for b in bs], column_gates.detach())
        self._launch = None

    def __call__(
        self, ys: Sequence[Tensor], x: Tensor, task_ids: Tensor, overlap: bool | int = False
    ) -> None:
        """Add the update to ys in place.

        Args:
            ys: (m, n_l) of a's dtype, m at most 256, rows may be strided; or (..., n_l) contiguous.
            x: (m, k) of a's dtype, rows may be strided; or (..., k) contiguous.
            task_ids: int64 of x's leading shape, contiguous. -1 leaves the row as it is; any other
                id outside [0, T) makes it NaN.
            overlap: launch before the kernel ahead on the stream ends (sm_90 and later). Nothing is
                read until that one is complete, so the result is the same whatever it wrote. With
                ``EARLY`` this holds for ys alone, and no tensor but ys may have been written by
                the kernel ahead.

        Raises:
            ValueError: tensors that do not fit (nothing is launched).
            RuntimeError: no extension, or CUDA refused the launch.
        """
        x_stride = _check_batch("x", x, None, self.k, self.dtype, self.device)
        lead = x.shape[:-1]
        m = lead.numel()
        if m > MAX_ROWS:
            raise ValueError(f"m is {m}; expected at most {MAX_ROWS} rows; use the 'torch' backend")
        if len(ys) != len(self.widths):
            raise ValueError(f"ys has {len(ys)} entries; expected {len(self.widths)}, as bs has")
        pointers, strides = [], []
        for y, n in zip(ys, self.widths, strict=True):
            stride = _check_batch("y", y, lead, n, self.dtype, self.device)
            if m > 1 and stride < n:
                raise ValueError(
                    f"y has strides {y.stride()} for shape {tuple(y.shape)}: its rows overlap; "
                    "expected a tensor that can be written; call .contiguous()"
                )
            pointers.append(y.data_ptr())
            strides.append(stride)
        _check_whole("task_ids", task_ids, lead, torch.int64, self.device)
        launch = self._launch or self._prepare()
        if m == 0:
            return
        arguments = (pointers, strides, x.data_ptr(), x_stride, task_ids.data_ptr(), m, overlap)
        self._on_device(launch, *arguments)
        torch.autograd.graph.increment_version([y for y in ys if not y.is_inference()])

    def linears(
        self,
        x: Tensor,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        task_ids: Tensor,
        form: str | None = None,
    ) -> list[Tensor] | None:
        """The outputs of the frozen linears with their update, base included, in one launch.

        ``ys[l][i] = weights[l] @ x[i] + biases[l] + what a call adds``, summed in float32 and
        rounded once. Same inputs, same bits, whatever the other rows and linears are, where a form
        is named; which one None takes goes by all linears' n and by m.

        Args:
            x: (m, k) of a's dtype, rows may be strided; or (..., k) contiguous.
            weights: (n_l, k) of a's dtype; rows may be strided.
            biases: (n_l,) or None.
            task_ids: as in a call, but that -1 gives the base alone.
            form: None: "wgmma" (tile copies, products of warpgroups; sm_90a) where the device runs
                all of n at once, else "loads". Or one of them.

        Returns:
            New tensors (..., n_l). None, and nothing was launched, where that kernel is not for it:
            more rows or rank columns than ``FORMS`` says, more than 16 rows where the device does
            not run all of n at once or is not sm_90a, float32,
            k no multiple of eight, rows not aligned to 16 bytes, weights of another kind than a
            plain tensor of this dtype, or a GPU without clusters of eight blocks (before sm_90).

        Raises:
            ValueError, RuntimeError: as in a call.
        """
        x_stride = _check_batch("x", x, None, self.k, self.dtype, self.device)
        lead = x.shape[:-1]
        m = lead.numel()
        _check_whole("task_ids", task_ids, lead, torch.int64, self.device)
        if form is not None and form not in FORMS:
            raise ValueError(f"form is {form!r}; expected None or one of {', '.join(FORMS)}")
        if m > MAX_LINEAR_ROWS or len(weights) != len(self.widths):
            return None
        strides, kind = [], (self.dtype, self.device)
        try:
            for weight, bias, n in zip(weights, biases, self.widths, strict=True):
                strides.append(_check_rows("weight", weight, n, self.k, *kind))
                if bias is not None:
                    _check_whole("bias", bias, (n,), *kind)
        except ValueError:  # quantized, or elsewhere: its own module knows what to do
            return None
        pointers = [weight.data_ptr() for weight in weights]
        offsets = [0 if bias is None else bias.data_ptr() for bias in biases]
        launch = (self._launch or self._prepare()).linears
        ys = [x.new_empty(*lead, n) for n in self.widths]
        outputs = [y.data_ptr() for y in ys]
        arguments = (outputs, pointers, strides, offsets, x.data_ptr(), x_stride)
        number = 0 if form is None else FORMS[form][0]
        done = self._on_device(launch, *arguments, task_ids.data_ptr(), m, number)
        return ys if done else None

    def _on_device(self, launch, *arguments):
        """Launches on the current stream of the group's device."""
        if torch.cuda.current_device() == self.index:  # a guard costs more than all checks of a y
            return launch(*arguments, _raw_stream(self.index))
        with torch.cuda.device(self.index):
            return launch(*arguments, _raw_stream(self.index))

    def kept(self) -> list[Tensor]:
        """The tensors whose memory it reads."""
        a, bs, gates = self._tensors
        return [a, *bs, gates]

    def _prepare(self):
        extension, reason = _load_extension()
        if extension is None:
            raise RuntimeError(f"multi_lora_decode: {reason}")
        a, bs, gates = self._tensors
        self._launch = extension.MultiLoraDecode(
            a=a.data_ptr(),
            b=[b.data_ptr() for b in bs],
            n=self.widths,
            rank=[b.shape[0] for b in bs],
            gates=gates.data_ptr(),
            k=self.k,
            tasks=self.tasks,
            dtype=_DTYPES[self.dtype],
            device=self.index,
        )
        return self._launch


def multi_lora_decode_group(
    ys: Sequence[Tensor],
    x: Tensor,
    a: Tensor,
    bs: Sequence[Tensor],
    column_gates: Tensor,
    task_ids: Tensor,
    overlap: bool | int = False,
) -> None:
    """The update of all linears that share x, in one launch; see :class:`DecodeGroup`, which a
    caller with the same a, bs and column_gates at every step makes once."""
    DecodeGroup(a, bs, column_gates)(ys, x, task_ids, overlap)


def multi_lora_decode(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, column_gates: Tensor, task_ids: Tensor
) -> None:
    """:func:`multi_lora_decode_group` for one linear."""
    DecodeGroup(a, [b], column_gates)([y], x, task_ids)


def _load_extension() -> tuple[ModuleType | None, str]:
    return load_extension("_C", "with nvcc on PATH run CKF_BUILD_CUDA=1 pip install -e .")


def _covers(archs: Sequence[str], capability: tuple[int, int]) -> bool:
    """A cubin runs on its major version from its minor up (an 'a' one on its own device alone);
    PTX ('compute_') runs on everything newer."""
    for arch in archs:
        kind, _, number = arch.partition("_")
        major, minor = int(number.rstrip("af")[:-1]), int(number.rstrip("af")[-1])
        if number.endswith("a"):
            fits = capability == (major, minor)
        elif kind == "compute":
            fits = capability >= (major, minor)
        else:
            fits = capability[0] == major and capability[1] >= minor
        if fits:
            return True
    return False


def _raw_stream(index: int) -> int:
    """The current stream of a device; without torch's Stream object where torch can."""
    current = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    return current(index) if current else torch.cuda.current_stream(index).cuda_stream


def _check_plain(name: str, tensor: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    """ValueError unless the tensor owns strided memory of this dtype on this device."""
    if type(tensor) not in _PLAIN:
        raise ValueError(f"{name} is a {type(tensor).__name__}; expected a torch.Tensor")
    if tensor.device != device or tensor.layout is not torch.strided:
        raise ValueError(
            f"{name} is a {tensor.layout} tensor on {tensor.device}; expected a strided tensor on "
            f"{device}, where a is; move it, or use the 'torch' backend"
        )
    if tensor.dtype is not dtype:
        raise ValueError(f"{name} is {tensor.dtype}; expected {dtype}; convert it")


def _check_matrix(name: str, tensor: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    _check_plain(name, tensor, dtype, device)
    if tensor.dim() != 2:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected 2 dimensions")
    if not tensor.is_contiguous():
        raise ValueError(
            f"{name} has strides {tensor.stride()}; expected a contiguous tensor; "
            "call .contiguous()"
        )


def _check_rows(
    name: str,
    tensor: Tensor,
    m: int | None,
    n: int,
    dtype: torch.dtype,
    device: torch.device,
) -> int:
    """The row stride of an (m, n) tensor, m None: any, whose rows are contiguous."""
    _check_plain(name, tensor, dtype, device)
    shape = tensor.shape
    if len(shape) != 2 or shape[1] != n or (m is not None and shape[0] != m):
        raise ValueError(
            f"{name} has shape {tuple(shape)}; expected ({'m' if m is None else m}, {n})"
        )
    strides = tensor.stride()
    if strides[1] != 1 and n > 1:
        raise ValueError(
            f"{name} has strides {strides}; expected its last dimension contiguous; "
            "call .contiguous()"
        )
    return strides[0]


def _check_batch(
    name: str,
    tensor: Tensor,
    lead: torch.Size | None,
    n: int,
    dtype: torch.dtype,
    device: torch.device,
) -> int:
    """The row stride of a (*lead, n) tensor, lead None: any, whose rows are contiguous; with other
    than one leading dimension all of it is."""
    if not isinstance(tensor, Tensor) or tensor.dim() == 2:
        m = None if lead is None else lead.numel()
        return _check_rows(name, tensor, m, n, dtype, device)
    _check_plain(name, tensor, dtype, device)
    shape = tensor.shape
    if len(shape) == 0 or shape[-1] != n or (lead is not None and shape[:-1] != lead):
        words = "..." if lead is None else ", ".join(map(str, lead))
        raise ValueError(f"{name} has shape {tuple(shape)}; expected ({words}, {n})")
    if not tensor.is_contiguous():
        raise ValueError(
            f"{name} has strides {tensor.stride()}; expected a contiguous tensor, or two "
            "dimensions; call .contiguous()"
        )
    return n


def _check_whole(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    _check_plain(name, tensor, dtype, device)
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {tuple(shape)}")
    if not tensor.is_contiguous():
        raise ValueError(
            f"{name} has strides {tensor.stride()}; expected a contiguous tensor; "
            "call .contiguous()"
        )
