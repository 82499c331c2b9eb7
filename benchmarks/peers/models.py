"""Whole models: ckf, PEFT in its ways, one unrouted LoRA, the frozen base.

All share the frozen weights of one base; each has its own adapters. Those wider than the base run
under autocast in PEFT, its input cast turned off, as in with_peft.py.
"""

import contextlib
import warnings
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

import ckf
from benchmarks.harness import version_of
from benchmarks.models import SCALING, Batch, batch_loss, expert_names, sharing_copy
from ckf.layer_graphs import LayerGraphs

Adapters = dict[tuple[str, str, str], Tensor]


class ModelProvider:
    """A model with adapters and one way to route rows to them.

    loops: the step runs task by task, on a batch for each. layouts: None for all. checked_in: dtype
    of the small model that it must get right; None: it runs on none. first_steps: before the one
    that is compared at full size. counts_bytes: what a step keeps is allocated by the step.
    """

    name: ClassVar[str]
    peer: ClassVar[str] = ""
    loops: ClassVar[bool] = False
    captures: ClassVar[bool] = True
    layouts: ClassVar[tuple[str, ...] | None] = None
    checked_in: ClassVar[torch.dtype | None] = torch.float64
    first_steps: ClassVar[int] = 0
    counts_bytes: ClassVar[bool] = True

    def __init__(self, base: nn.Module, adapters: Adapters, tasks: int) -> None:
        self.base, self.tasks = sharing_copy(base), tasks
        self.rank = next(iter(adapters.values())).shape[0]
        self.build(adapters)

    def build(self, adapters: Adapters) -> None:
        raise NotImplementedError

    def loss(self, batch: Batch) -> Tensor:
        raise NotImplementedError

    def decode(self, task_ids: Tensor, **inputs) -> Tensor:
        """Logits of one new token a row."""
        raise NotImplementedError

    def parameters(self) -> list[Tensor]:
        """The trainable ones."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def backward(self, batches: list[Batch]) -> Tensor:
        """Loss of a step; gradients land in ``.grad``. One batch, or one a task if it loops."""
        loss = 0.0
        for batch in batches:
            part = self.loss(batch)
            part.backward()
            loss = loss + part.detach()
        return loss

    def gradients(self) -> Adapters:
        """By (linear, half, expert), zero where a parameter got none."""
        raise NotImplementedError

    def failure(self) -> str | None:
        """Why the step before was not of the kind that is to be timed."""
        return None


class FrozenModel(ModelProvider):
    """Forward and backward of the base alone, down to its embeddings."""

    name, peer = "frozen", "P0"

    def build(self, adapters: Adapters) -> None:
        self.model = self.base

    def loss(self, batch: Batch) -> Tensor:
        embeds = self.model.get_input_embeddings()(batch.input_ids).requires_grad_()
        return batch_loss(self.model, batch, inputs_embeds=embeds)

    def decode(self, task_ids: Tensor, **inputs) -> Tensor:
        return self.model(**inputs).logits

    def gradients(self) -> Adapters:
        return {}


class OursModel(ModelProvider):
    """``ckf.patch_model``."""

    name, backend = "ckf", "auto"

    def build(self, adapters: Adapters) -> None:
        tasks = expert_names(self.tasks)[1:]
        self.model = ckf.patch_model(
            self.base, tasks, r=self.rank, lora_alpha=SCALING * self.rank, backend=self.backend
        ).train()
        self.named = {}
        for name, parameter in self.model.named_parameters():
            if ".lora_" in name:
                linear, rest = name.split(".lora_")
                half, expert = rest.split(".")
                parameter.data = adapters[linear, half, expert].clone()
                self.named[linear, half, expert] = parameter

    def loss(self, batch: Batch) -> Tensor:
        return batch_loss(self.model, batch, task_ids=batch.task_ids)

    def decode(self, task_ids: Tensor, **inputs) -> Tensor:
        return self.model(task_ids=task_ids, **inputs).logits

    def gradients(self) -> Adapters:
        return {key: _gradient(p) for key, p in self.named.items()}


def ours_with(backend: str) -> type[OursModel]:
    """The same by one backend of kernels, which take no float64, one of them no float32."""
    checked_in = torch.bfloat16 if backend == "cuda:linear" else torch.float32
    own = {"name": f"ckf-{backend}", "backend": backend, "checked_in": checked_in}
    return type("OursModel", (OursModel,), own)


class OursGraphsModel(OursModel):
    """The same with each decoder layer as two CUDA graphs, as ``ckf train`` runs it. Its attention
    takes 16 bits alone; the first step is noted, the second captures and replays. What a step
    keeps lies in the graphs' memory from then on."""

    name, layouts, checked_in = "ckf-graphs", ("packed", "labels"), None
    first_steps, counts_bytes = 1, False

    def build(self, adapters: Adapters) -> None:
        super().build(adapters)
        self.graphs = LayerGraphs(self.model)

    def failure(self) -> str | None:
        if self.graphs.off:
            return "CUDA graphs were given up"
        return None if self.graphs.mode == "replaying" else "no CUDA graph was replayed"


class PeftModelProvider(ModelProvider):
    """PEFT around the base; subclasses say which adapters and how rows find theirs."""

    def adapter_ranks(self) -> dict[str, int]:
        return dict.fromkeys(expert_names(self.tasks), self.rank)

    def parts(self, adapter: str) -> list[str]:
        """The experts that an adapter holds, side by side."""
        return [adapter]

    def build(self, adapters: Adapters) -> None:
        from peft import LoraConfig, get_peft_model
        from peft.helpers import disable_input_dtype_casting
        from peft.tuners.lora import LoraLayer

        linears = sorted({linear for linear, _, _ in adapters})
        ranks = self.adapter_ranks()

        def config(rank: int) -> LoraConfig:
            alpha = rank * SCALING
            return LoraConfig(
                r=rank, lora_alpha=alpha, target_modules=linears, init_lora_weights=False
            )

        names = list(ranks)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # on the meta device: ``_fill`` brings the values
            options = {"autocast_adapter_dtype": False, "low_cpu_mem_usage": True}
            self.model = get_peft_model(self.base, config(ranks[names[0]]), names[0], **options)
            for name in names[1:]:
                self.model.add_adapter(name, config(ranks[name]), **options)
        self.layers = {}
        for linear in linears:
            layer = self.model.base_model.model.get_submodule(linear)
            assert isinstance(layer, LoraLayer)
            self.layers[linear] = layer
            for name in names:
                self._fill(layer, linear, name, adapters)
        self.model.base_model.set_adapter(names)
        self.model.train()
        base, own = next(self.base.parameters()).dtype, next(iter(adapters.values())).dtype
        self.autocast = base if base != own else None
        if self.autocast is not None:
            self.scope = contextlib.ExitStack()
            self.scope.enter_context(disable_input_dtype_casting(self.model))

    def _fill(self, layer, linear: str, name: str, adapters: Adapters) -> None:
        a = torch.cat([adapters[linear, "A", e] for e in self.parts(name)])
        b = torch.cat([adapters[linear, "B", e] for e in self.parts(name)], dim=1)
        layer.lora_A[name].weight = nn.Parameter(a)
        layer.lora_B[name].weight = nn.Parameter(b)

    def call(self, **inputs):
        if self.autocast is None:
            return self.model(**inputs)
        device = next(self.model.parameters()).device
        with torch.autocast(device.type, dtype=self.autocast):
            return self.model(**inputs)

    def loss(self, batch: Batch) -> Tensor:
        return batch_loss(self.call, batch)

    def gradients(self) -> Adapters:
        result = {}
        for linear, layer in self.layers.items():
            for name in self.adapter_ranks():
                parts = self.parts(name)
                a = _gradient(layer.lora_A[name].weight).split(self.rank)
                b = _gradient(layer.lora_B[name].weight).split(self.rank, 1)
                for expert, own_a, own_b in zip(parts, a, b, strict=True):
                    result[linear, "A", expert] = own_a
                    result[linear, "B", expert] = own_b
        return result


class SingleModel(PeftModelProvider):
    """One LoRA of rank 2 r for all rows: shared and task 0's, unrouted."""

    name, peer = "single", "P0"

    def adapter_ranks(self) -> dict[str, int]:
        return {"one": 2 * self.rank}

    def parts(self, adapter: str) -> list[str]:
        return ["shared", "task_0"]

    def decode(self, task_ids: Tensor, **inputs) -> Tensor:
        return self.call(**inputs).logits


class LoopModel(PeftModelProvider):
    """A batch a task: ``set_adapter``, forward, backward."""

    name, peer, loops = "peft-loop", "P1", True

    def loss(self, batch: Batch) -> Tensor:
        self.switch(int(batch.task_ids.flatten()[0]))
        return super().loss(batch)

    def switch(self, task: int) -> None:
        self.model.base_model.set_adapter(["shared", f"task_{task}"])

    def parameters(self) -> list[Tensor]:
        """All adapters; ``set_adapter`` turns ``requires_grad`` of the others off in between."""
        return [p for name, p in self.model.named_parameters() if ".lora_" in name]


class LoopByHandModel(LoopModel):
    """The same, the active adapters set on the layers directly."""

    name = "peft-loop-by-hand"

    def switch(self, task: int) -> None:
        for layer in self.layers.values():
            layer._active_adapter = ["shared", f"task_{task}"]


class MasksModel(PeftModelProvider):
    """All adapters active; a hook on each task's A zeroes the rows of other tasks."""

    name, peer = "peft-masks", "P2"

    def build(self, adapters: Adapters) -> None:
        super().build(adapters)
        self.masks: list[Tensor] = []

        def hook(task: int):
            return lambda module, args, output: output * self.masks[task]

        for layer in self.layers.values():
            for task in range(self.tasks):
                layer.lora_A[f"task_{task}"].register_forward_hook(hook(task))

    def set_masks(self, task_ids: Tensor) -> None:
        """(B, 1, 1) for ids (B,), (1, N, 1) for ids (1, N)."""
        ids = task_ids.view(-1, 1, 1) if task_ids.dim() == 1 else task_ids.unsqueeze(2)
        dtype = next(self.base.parameters()).dtype
        self.masks = [(ids == task).to(dtype) for task in range(self.tasks)]

    def loss(self, batch: Batch) -> Tensor:
        self.set_masks(batch.task_ids)
        return super().loss(batch)

    def decode(self, task_ids: Tensor, **inputs) -> Tensor:
        self.set_masks(task_ids)
        return self.call(**inputs).logits


class BigModel(PeftModelProvider):
    """One adapter of rank r_s + T r_t; a hook zeroes the columns that a row does not own."""

    name, peer = "peft-big", "P3"

    def adapter_ranks(self) -> dict[str, int]:
        return {"all": self.rank * (1 + self.tasks)}

    def parts(self, adapter: str) -> list[str]:
        return expert_names(self.tasks)

    def build(self, adapters: Adapters) -> None:
        super().build(adapters)
        self.mask = None
        owners = torch.arange(-1, self.tasks).repeat_interleave(self.rank)
        self.owners = owners.to(next(self.base.parameters()).device)  # (R,), -1: shared
        for layer in self.layers.values():
            layer.lora_A["all"].register_forward_hook(
                lambda module, args, output: output * self.mask
            )

    def set_mask(self, task_ids: Tensor) -> None:
        """(B, 1, R) or (1, N, R)."""
        ids = task_ids.view(-1, 1, 1) if task_ids.dim() == 1 else task_ids.unsqueeze(2)
        live = (self.owners == -1) | (self.owners == ids)
        self.mask = live.to(next(self.base.parameters()).dtype)

    def loss(self, batch: Batch) -> Tensor:
        self.set_mask(batch.task_ids)
        return super().loss(batch)

    def decode(self, task_ids: Tensor, **inputs) -> Tensor:
        self.set_mask(task_ids)
        return self.call(**inputs).logits


class BigCompiledModel(BigModel):
    """The same, every decoder layer compiled."""

    name, layouts = "peft-big-compiled", ("labels",)

    def build(self, adapters: Adapters) -> None:
        super().build(adapters)
        for layer in self.base.model.layers:
            layer.compile(dynamic=False)


class MixedModel(PeftModelProvider):
    """PEFT's mixed-batch inference; shared and task LoRA joined per task. Decoding only."""

    name, peer, captures = "peft-mixed", "P1", False

    def adapter_ranks(self) -> dict[str, int]:
        return dict.fromkeys(expert_names(self.tasks)[1:], 2 * self.rank)

    def parts(self, adapter: str) -> list[str]:
        return ["shared", adapter]

    def build(self, adapters: Adapters) -> None:
        super().build(adapters)
        self.model.eval()

    def decode(self, task_ids: Tensor, **inputs) -> Tensor:
        names = [f"task_{t}" for t in task_ids.tolist()]
        return self.call(adapter_names=names, **inputs).logits


def runnable(
    kinds: Sequence[type[ModelProvider]],
) -> tuple[list[type[ModelProvider]], dict[str, str]]:
    """(those whose packages are installed, the others' names to the reason)."""
    if version_of("peft") is not None:
        return list(kinds), {}
    missing = [kind for kind in kinds if issubclass(kind, PeftModelProvider)]
    reasons = {kind.name: "peft is not installed" for kind in missing}
    return [kind for kind in kinds if kind not in missing], reasons


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
