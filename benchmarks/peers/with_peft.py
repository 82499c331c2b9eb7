"""Peers built on PEFT: switching adapters in a loop, all adapters masked, one big masked LoRA."""

import contextlib
import warnings
from typing import ClassVar

import torch
from torch import Tensor, nn

from benchmarks.peers.base import Provider
from benchmarks.peers.dense import SortedRows
from benchmarks.problems import SCALING, Case, Problem

SHARED = "shared"
GRAPHS = 64  # that torch.compile may make of one function before it gives up


class Linears(nn.Module):
    """The linears of a problem as a model: one input tensor a group, one output a linear."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.groups = [one.group for one in problem.linears]
        for index, one in enumerate(problem.linears):
            n, k = one.weight.shape
            linear = nn.Linear(k, n, bias=False, device="meta")
            linear.weight = nn.Parameter(one.weight, requires_grad=False)
            setattr(self, f"linear_{index}", linear)

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        return [getattr(self, f"linear_{i}")(xs[g]) for i, g in enumerate(self.groups)]


class PeftProvider(Provider):
    """PEFT around :class:`Linears`.

    Adapters wider than the base (float32 on bfloat16) run under autocast with PEFT's own cast of
    the input turned off: PEFT's fastest way to keep them.
    """

    most_tasks: ClassVar[int] = 64

    @classmethod
    def refusal(cls, case: Case, device: torch.device) -> str | None:
        try:
            import peft  # noqa: F401
        except ImportError:
            return "peft is not installed"
        if case.tasks > cls.most_tasks:
            return f"{case.tasks} tasks; over {cls.most_tasks} this takes too long to be of use"
        return None

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        from peft import LoraConfig, get_peft_model
        from peft.helpers import disable_input_dtype_casting
        from peft.tuners.lora import LoraLayer

        case = problem.case
        ranks = self.adapter_ranks()

        def config(rank: int) -> LoraConfig:
            return LoraConfig(
                r=rank,
                lora_alpha=rank * SCALING,
                lora_dropout=case.dropout,
                target_modules=r"linear_\d+",
                init_lora_weights=False,
            )

        names = list(ranks)
        options = {"autocast_adapter_dtype": False}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a bare module has no config to read
            self.model = get_peft_model(Linears(problem), config(ranks[names[0]]), names[0])
            for name in names[1:]:
                self.model.add_adapter(name, config(ranks[name]), **options)
        self.layers = [m for m in self.model.modules() if isinstance(m, LoraLayer)]
        self._fill()
        self.model.base_model.set_adapter(names)
        self.model.train()
        dtype, adapters = getattr(torch, case.dtype), getattr(torch, case.adapters)
        self.autocast = dtype if dtype != adapters else None
        if self.autocast is not None:
            self.scope = contextlib.ExitStack()  # kept: the cast stays off as long as this lives
            self.scope.enter_context(disable_input_dtype_casting(self.model))

    def adapter_ranks(self) -> dict[str, int]:
        """Rank by adapter name."""
        case = self.problem.case
        return {SHARED: case.rank} | {f"task_{t}": case.rank for t in range(case.tasks)}

    def expert_tensors(self, name: str, one) -> tuple[Tensor, Tensor]:
        """A and B of an adapter for one linear of the problem."""
        expert = 0 if name == SHARED else 1 + int(name.split("_")[1])
        return one.a[expert], one.b[expert]

    def _fill(self) -> None:
        for layer, one in zip(self.layers, self.problem.linears, strict=True):
            for name in self.adapter_ranks():
                a, b = (t.detach().clone() for t in self.expert_tensors(name, one))
                layer.lora_A[name].weight = nn.Parameter(a)
                layer.lora_B[name].weight = nn.Parameter(b)

    def run(self, xs: list[Tensor]) -> list[Tensor]:
        if self.autocast is None:
            return self.model(xs)
        with torch.autocast(xs[0].device.type, dtype=self.autocast):
            return self.model(xs)

    def forward(self) -> list[Tensor]:
        return self.run(self.problem.xs)

    def leaves(self) -> list[Tensor]:
        names = list(self.adapter_ranks())
        leaves = list(self.problem.xs)
        for layer in self.layers:
            for half in (layer.lora_A, layer.lora_B):
                leaves += [half[name].weight for name in names]
        return leaves

    def parameters(self) -> list[Tensor]:
        return list(self.model.parameters())


class PeftMasks(PeftProvider):
    """All adapters active; a hook on each task's A zeroes the rows of other tasks."""

    name, label, peer = "peft-masks", "PEFT, row masks", "P2"

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.route()

        def hook(task: int):
            return lambda module, args, output: output * self.masks[task]

        for task in range(problem.case.tasks):
            for layer in self.layers:
                layer.lora_A[f"task_{task}"].register_forward_hook(hook(task))

    def route(self) -> None:
        dtype, tasks = getattr(torch, self.problem.case.dtype), range(self.problem.case.tasks)
        self.masks = [(self.problem.ids == t).to(dtype).unsqueeze(1) for t in tasks]  # (m, 1) each


class PeftBig(PeftProvider):
    """One adapter of rank r_s + T r_t; a hook zeroes the columns that a row does not own."""

    name, label, peer = "peft-big", "PEFT, one big LoRA", "P3"
    most_tasks = 1024

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        dtype = getattr(torch, problem.case.dtype)
        self.live = (problem.gates != 0).to(dtype).repeat_interleave(problem.case.rank, 1)
        self.route()
        for layer in self.layers:
            layer.lora_A["all"].register_forward_hook(
                lambda module, args, output: output * self.mask
            )

    def route(self) -> None:
        self.mask = self.live.index_select(0, self.problem.ids)  # (m, R)

    def adapter_ranks(self) -> dict[str, int]:
        return {"all": self.problem.case.total_rank}

    def expert_tensors(self, name: str, one) -> tuple[Tensor, Tensor]:
        return torch.cat(one.a), torch.cat(one.b, dim=1)

    def gradients(self, grads: list[Tensor]) -> list[Tensor]:
        count, rank = len(self.problem.xs), self.problem.case.rank
        result = list(grads[:count])
        for i in range(count, len(grads), 2):
            result += [*grads[i].split(rank), *grads[i + 1].split(rank, 1)]
        return result


class Compiled:
    """A provider built on PEFT, under torch.compile."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        # one graph a task where a loop switches adapters, for each copy of the tensors
        torch._dynamo.config.recompile_limit = GRAPHS
        self.compiled = torch.compile(super().run, dynamic=False)

    def run(self, xs: list[Tensor]) -> list[Tensor]:
        return self.compiled(xs)


class PeftMasksCompiled(Compiled, PeftMasks):
    name, label = "peft-masks-compiled", "PEFT, row masks, compiled"


class PeftBigCompiled(Compiled, PeftBig):
    name, label = "peft-big-compiled", "PEFT, one big LoRA, compiled"


class PeftLoop(PeftProvider, SortedRows):
    """Rows sorted by task; for each task ``set_adapter``, forward and backward."""

    name, label, peer = "peft-loop", "PEFT, loop over tasks", "P1"

    def __init__(self, problem: Problem) -> None:
        SortedRows.__init__(self, problem)
        PeftProvider.__init__(self, problem)
        self.present = [t for t, rows in enumerate(self.counts) if rows]
        if self.presorted:
            parts = self._split(self.xs)
            train = problem.case.step == "train"
            self.parts = [[x.detach().requires_grad_(train) for x in xs] for xs in parts]
            self.dy_parts = self._split(self.dys)

    def route(self) -> None:
        super().route()
        self.counts = self.counts.tolist()

    def _split(self, tensors: list[Tensor]) -> list[list[Tensor]]:
        """For each task the rows of every tensor."""
        pieces = [t.split(self.counts) for t in tensors]
        return [list(of_task) for of_task in zip(*pieces, strict=True)]

    def _inputs(self) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
        if self.presorted:
            return self.parts, self.dy_parts
        train = self.problem.case.step == "train"
        order = self.order
        xs = self._split([x.detach().index_select(0, order) for x in self.problem.xs])
        xs = [[x.requires_grad_(train) for x in of_task] for of_task in xs]
        return xs, self._split([dy.index_select(0, order) for dy in self.problem.dys])

    def switch(self, task: int) -> None:
        self.model.base_model.set_adapter([SHARED, f"task_{task}"])

    def forward(self) -> list[Tensor]:
        parts, _ = self._inputs()
        outputs = []
        for task in self.present:
            self.switch(task)
            outputs.append(self.run(parts[task]))
        return self._joined(outputs)

    def _joined(self, pieces: list[list[Tensor]]) -> list[Tensor]:
        """Rows of all tasks, one tensor a linear (or group); unsorted only if that is timed."""
        whole = [torch.cat(of_all) for of_all in zip(*pieces, strict=True)]
        return whole if self.presorted else [t.index_select(0, self.inverse) for t in whole]

    def train(self) -> tuple[list[Tensor], list[Tensor]]:
        """The tasks' gradients are added as ``backward`` would, without its hidden state."""
        parts, dys = self._inputs()
        names, outputs, dxs = list(self.adapter_ranks()), [], []
        totals: dict[tuple[int, str, str], Tensor] = {}
        for task in self.present:
            self.switch(task)
            active = [SHARED, f"task_{task}"]
            keys = [(i, h, n) for i in range(len(self.layers)) for h in "AB" for n in active]
            weights = [self._weight(*key) for key in keys]
            ys = self.run(parts[task])
            grads = torch.autograd.grad(ys, [*parts[task], *weights], dys[task])
            outputs.append([y.detach() for y in ys])
            dxs.append(list(grads[: len(parts[task])]))
            for key, grad in zip(keys, grads[len(parts[task]) :], strict=True):
                totals[key] = totals[key].add_(grad) if key in totals else grad
        gradients = []
        for i in range(len(self.layers)):
            for h in "AB":
                for n in names:
                    known = totals.get((i, h, n))
                    gradients.append(torch.zeros_like(self._weight(i, h, n)) if known is None
                                     else known)  # fmt: skip
        return self._joined(outputs), [*self._joined(dxs), *gradients]

    def _weight(self, index: int, half: str, name: str) -> Tensor:
        return getattr(self.layers[index], f"lora_{half}")[name].weight

    def saved_forward(self) -> object:
        """Of the largest task: the loop lets go of each before the next."""
        task = max(self.present, key=self.counts.__getitem__)
        self.switch(task)
        return self.run(self._inputs()[0][task])

    outputs, gradients = SortedRows.outputs, SortedRows.gradients


class PeftLoopByHand(PeftLoop):
    """The same, the active adapters set on the layers directly."""

    name, label = "peft-loop-by-hand", "PEFT, loop, switch by hand"

    def switch(self, task: int) -> None:
        for layer in self.layers:
            layer._active_adapter = [SHARED, f"task_{task}"]


class PeftLoopCompiled(Compiled, PeftLoopByHand):
    name, label = "peft-loop-compiled", "PEFT, loop, compiled"


class PeftMixed(PeftProvider):
    """PEFT's mixed-batch inference (``adapter_names``); shared and task LoRA joined per task."""

    name, label, peer = "peft-mixed", "PEFT, mixed batch", "P1"
    captures = False  # reads lists of rows on the host
    most_tasks = 32

    @classmethod
    def refusal(cls, case: Case, device: torch.device) -> str | None:
        if case.step == "train":
            return "forward only"
        if case.m > 256:
            return f"{case.m} rows; takes one name a row, from the host"
        return super().refusal(case, device)

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.names = [f"task_{t}" for t in problem.ids.tolist()]
        self.model.eval()

    def adapter_ranks(self) -> dict[str, int]:
        case = self.problem.case
        return {f"task_{t}": 2 * case.rank for t in range(case.tasks)}

    def expert_tensors(self, name: str, one) -> tuple[Tensor, Tensor]:
        task = 1 + int(name.split("_")[1])
        a, b = (one.a[0], one.a[task]), (one.b[0], one.b[task])
        return torch.cat(a), torch.cat(b, dim=1)

    def run(self, xs: list[Tensor]) -> list[Tensor]:
        """The layers are called themselves: the model's forward takes no names for a list."""
        layers, groups = self.layers, self.model.base_model.model.groups
        scope = contextlib.nullcontext()
        if self.autocast is not None:
            scope = torch.autocast(xs[0].device.type, dtype=self.autocast)
        with scope:
            return [
                layer(xs[g], adapter_names=self.names)
                for layer, g in zip(layers, groups, strict=True)
            ]
