"""Kernels of LoRA servers (forward only) and Unsloth's, where they are installed.

Their interfaces change from version to version: whatever does not fit raises and is recorded as
the reason, and what runs must pass the gate. One adapter a row, so shared and task LoRA are
concatenated; routing metadata is made before the clock starts.
"""

import dataclasses
import importlib
import inspect

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.peers.base import Provider
from benchmarks.peers.dense import SortedRows
from benchmarks.problems import SCALING, Case, Problem


def _import(*names: str):
    """The first module that imports; ImportError with every reason otherwise."""
    reasons = []
    for name in names:
        try:
            return importlib.import_module(name)
        except Exception as error:  # such packages fail at import in many ways
            reasons.append(f"{name}: {type(error).__name__}: {error}"[:160])
    raise ImportError("; ".join(reasons))


def _joined(one, tasks: int) -> tuple[Tensor, Tensor]:
    """A (T, 2 r, k) and B (T, n, 2 r): shared and task LoRA of every task side by side."""
    a = torch.stack([torch.cat([one.a[0], one.a[1 + t]]) for t in range(tasks)])
    b = torch.stack([torch.cat([one.b[0], one.b[1 + t]], dim=1) for t in range(tasks)])
    dtype = one.weight.dtype
    return a.to(dtype).contiguous(), b.to(dtype).contiguous()


class Server(Provider):
    """Forward on a GPU only."""

    modules: tuple[str, ...] = ()

    @classmethod
    def refusal(cls, case: Case, device: torch.device) -> str | None:
        if case.step == "train":
            return "forward only"
        if device.type != "cuda":
            return "needs a GPU"
        try:
            _import(*cls.modules)
        except ImportError as error:
            return f"not installed ({error})"
        return None


class VLLM(Server):
    """``lora_shrink`` and ``lora_expand``, tuned where VLLM_TUNED_CONFIG_FOLDER holds settings."""

    name, label, peer = "vllm", "vLLM", "P10"
    modules = ("vllm.lora.ops.triton_ops",)

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.ops = _import(*self.modules)
        case, device = problem.case, problem.ids.device
        self.routing = self.ops.LoRAKernelMeta.make(case.tasks, case.m, device=device)
        self.route()
        self.weights = [_joined(one, case.tasks) for one in problem.linears]
        width = 2 * case.rank
        self.buffer = torch.empty(1, case.m, width, dtype=torch.float32, device=device)

    def route(self) -> None:
        self.routing.prepare_tensors(self.problem.ids.to(torch.int32))
        rows, meta_args = self.problem.case.m, self.routing.meta_args
        takes = len(inspect.signature(meta_args).parameters)
        self.meta = meta_args(rows, False) if takes > 1 else meta_args(rows)

    def forward(self) -> list[Tensor]:
        ys = []
        for one, (a, b) in zip(self.problem.linears, self.weights, strict=True):
            x = self.problem.xs[one.group]
            y = F.linear(x, one.weight)
            self.buffer.zero_()  # split-k shrinks add to it
            self.ops.lora_shrink(x, [a], self.buffer, *self.meta, SCALING)
            self.ops.lora_expand(self.buffer, [b], y, *self.meta, offset_start=0, add_inputs=True)
            ys.append(y)
        return ys


class SGLang(Server):
    """``csgmv``: chunked shrink and expand."""

    name, label, peer = "sglang", "SGLang csgmv", "P10"
    modules = ("sglang.srt.lora.triton_ops",)
    chunk = 16

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.ops = _import(*self.modules)
        self.kind = _import("sglang.srt.lora.utils").LoRABatchInfo
        self.route()
        case = problem.case
        self.weights = [_joined(one, case.tasks) for one in problem.linears]
        device = problem.ids.device
        self.slices = [
            torch.tensor([0, one.weight.shape[0]], dtype=torch.int32, device=device)
            for one in problem.linears
        ]

    def route(self) -> None:
        fields, values = dataclasses.fields(self.kind), self._routing()
        missing = [
            f.name
            for f in fields
            if f.name not in values
            and f.default is dataclasses.MISSING
            and f.default_factory is dataclasses.MISSING
        ]
        names = {f.name for f in fields}
        known = {k: v for k, v in values.items() if k in names}
        self.info = self.kind(**known, **dict.fromkeys(missing))

    def _routing(self) -> dict:
        """Rows sorted by task, each task's rows cut into chunks."""
        ids, case = self.problem.ids.cpu(), self.problem.case
        device, width = self.problem.ids.device, 2 * case.rank
        starts, owners = [0], []
        for task, rows in enumerate(torch.bincount(ids, minlength=case.tasks).tolist()):
            for first in range(0, rows, self.chunk):
                owners.append(task)
                starts.append(starts[-1] + min(self.chunk, rows - first))

        def ints(values, dtype=torch.int32):
            return torch.as_tensor(values).to(device=device, dtype=dtype)

        return {
            "bs": case.m,
            "num_segments": len(owners),
            "max_len": self.chunk,
            "use_cuda_graph": False,
            "seg_lens": None,
            "seg_indptr": ints(starts),
            "weight_indices": ints(owners),
            "lora_ranks": ints([width] * case.tasks, torch.int64),
            "scalings": torch.full((case.tasks,), SCALING, device=device),
            "permutation": ints(torch.argsort(ids, stable=True)),
        }

    def forward(self) -> list[Tensor]:
        ys = []
        for one, (a, b), slices in zip(
            self.problem.linears, self.weights, self.slices, strict=True
        ):
            x = self.problem.xs[one.group]
            y = F.linear(x, one.weight)
            h = self.ops.chunked_sgmv_lora_shrink_forward(x, a, self.info, 1)
            # by position: the names of the arguments differ between versions
            expand = self.ops.chunked_sgmv_lora_expand_forward
            ys.append(expand(h, b, self.info, slices, one.weight.shape[0], y))
        return ys


class Unsloth(SortedRows):
    """Unsloth's function for one adapter, shared and task LoRA joined, looped over the tasks."""

    name, label, peer = "unsloth", "Unsloth, loop over tasks", "P12"
    captures = False

    @classmethod
    def refusal(cls, case: Case, device: torch.device) -> str | None:
        if device.type != "cuda":
            return "needs a GPU"
        if case.dropout:
            return "dropout is not part of this peer"
        try:
            _import("unsloth.kernels.fast_lora")
        except ImportError as error:
            return f"not installed ({error})"
        return None

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.function = _import("unsloth.kernels.fast_lora").LoRA_W
        self.rows = self.counts.tolist()

    def forward(self) -> list[Tensor]:
        xs, ys = self.sorted_inputs(), []
        for one in self.problem.linears:
            parts = []
            for task, x in enumerate(xs[one.group].split(self.rows)):
                if x.shape[0] == 0:
                    continue
                a = torch.cat([one.a[0], one.a[1 + task]])
                b = torch.cat([one.b[0], one.b[1 + task]], dim=1)
                y = self.function.apply(x.unsqueeze(0), one.weight, None, a, b, SCALING)
                parts.append(y.squeeze(0))
            ys.append(self.restored(torch.cat(parts)))
        return ys
