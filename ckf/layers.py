"""MultiLoRALinear: a frozen linear with a shared LoRA and one LoRA per task."""

import math
from collections.abc import Iterable
from functools import lru_cache

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ckf.kernels.decode_cache import DecodeCache
from ckf.kernels.ops import run_group
from ckf.kernels.slots import compact_slots
from ckf.routing import Route, Router, outside_the_graph

SHARED = "shared"


class ExpertParameters(nn.Module):
    """Parameters by adapter name; any name works, also one that nn.Module uses itself."""

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        super().__init__()
        self._parameters.update(parameters)

    def __getitem__(self, name: str) -> nn.Parameter:
        return self._parameters[name]

    def values(self) -> list[nn.Parameter]:
        """All of them, in the order of the experts."""
        return list(self._parameters.values())

    def train(self, mode: bool = True) -> "ExpertParameters":
        """As nn.Module's, for containers whose adapter may itself be called "training"."""
        self.__dict__["training"] = mode
        return self


def adapter_device(base_layer: nn.Module) -> torch.device:
    """Where a layer's adapters live: beside its weight, or where an offloaded one is run."""
    device = next(base_layer.parameters()).device
    runs_on = getattr(getattr(base_layer, "_hf_hook", None), "execution_device", None)
    return device if device.type != "meta" or runs_on is None else torch.device(runs_on)


class TaskGate(nn.Module):
    """Trainable gates (T, E) over all experts, starting at the hard gate.

    The gate is linear in its parameter, so it starts exactly at the hard gate (1 for the shared
    expert and the task's own, 0 elsewhere) and an expert at 0 still gets its exact gradient. LoRA
    scaling is applied on top.
    """

    def __init__(self, tasks: tuple[str, ...], experts: tuple[str, ...], device=None) -> None:
        super().__init__()
        self.tasks, self.experts = tasks, experts
        self.gate = nn.Parameter(torch.empty(len(tasks), len(experts), device=device))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The hard gate."""
        self.gate.copy_(torch.tensor(_hard_gate(self.tasks, self.experts)))


def _hard_gate(tasks: Iterable[str], experts: Iterable[str]) -> list[list[float]]:
    return [[float(expert in (SHARED, task)) for expert in experts] for task in tasks]


def _slots(layers: list["MultiLoRALinear"], device: torch.device) -> tuple[Tensor | None, int]:
    """Slots and width of the compact H of these layers; hard gates only."""
    if any(layer._gate[0] is not None for layer in layers):
        return None, 0
    ranks = tuple(tuple(layer.lora_A[e].shape[0] for e in layer.experts) for layer in layers)
    slots, width = _hard_slots(layers[0].router.tasks, tuple(la.experts for la in layers), ranks)
    return slots.to(device), width


@lru_cache(maxsize=64)  # the same for every decoder layer
def _hard_slots(tasks, experts, ranks) -> tuple[Tensor, int]:
    return compact_slots([_hard_gate(tasks, own) for own in experts], ranks)


def _refuse_recomputation() -> None:
    """Within a backward pass, layers called for themselves are recomputed for lost task ids."""
    if torch._C._current_graph_task_id() != -1:
        raise ValueError(
            "a checkpoint that knows no tasks recomputes a patched layer; switch it on with "
            "model.gradient_checkpointing_enable(), on the patched model itself, in place of "
            "torch.utils.checkpoint or a checkpoint wrapper (accelerate's "
            "fsdp_activation_checkpointing)"
        )


class MultiLoRALinear(nn.Module):
    """``base_layer`` plus the LoRAs of each row's task, routed by the model's task ids.

    Args:
        base_layer: the frozen linear; ``nn.Linear`` and ``Conv1D`` run fused, any other module
            (quantized, hooked) is called and the update added out of place.
        in_features, out_features: k and n.
        ranks: rank per expert present here, ``"shared"`` first.
        scaling: LoRA scaling per expert.
        index: this layer's number in the model; makes its dropout seed its own.
        gate: learned gates, or None for the hard gate.
        name: the layer's name in the model, for messages.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        router: Router,
        in_features: int,
        out_features: int,
        ranks: dict[str, int],
        scaling: dict[str, float],
        index: int,
        dropout: float = 0.0,
        backend: str = "auto",
        gate: TaskGate | None = None,
        name: str = "",
    ) -> None:
        super().__init__()
        self.name = name
        self.base_layer = base_layer
        self.in_features, self.out_features = in_features, out_features
        self.router, self.index = router, index
        self.experts = tuple(ranks)
        self.scaling = dict(scaling)
        self.dropout, self.backend = dropout, backend
        self._gate = [gate]  # in a list: the gate is registered once, on the model
        self._siblings: list[MultiLoRALinear] = []
        self._decode = (DecodeCache(), DecodeCache())  # alone, and with the siblings
        self._leader = index  # of the group, whose dropout seed all of it draws from
        weight = next(base_layer.parameters())
        wide = weight.dtype in (torch.float32, torch.float64)
        device = adapter_device(base_layer)
        options = {"device": device, "dtype": weight.dtype if wide else torch.float32}
        a = {e: nn.Parameter(torch.empty(r, in_features, **options)) for e, r in ranks.items()}
        b = {e: nn.Parameter(torch.zeros(out_features, r, **options)) for e, r in ranks.items()}
        self.lora_A, self.lora_B = ExpertParameters(a), ExpertParameters(b)
        self.reset_parameters()
        self._prepare(device)

    def _apply(self, fn, recurse: bool = True) -> "MultiLoRALinear":
        super()._apply(fn, recurse)
        self.forget_decoding()
        self._prepare(adapter_device(self.base_layer))
        return self

    @torch.inference_mode(False)  # training may use the same tensors later
    def _prepare(self, device: torch.device) -> None:
        """What every call needs and no call changes: gate constants, and slots of the compact H."""
        self._constant = self._gate_constant().to(device)
        groups = [[self], [self, *self._siblings]] if self._siblings else [[self]]
        self._slots = {len(layers): _slots(layers, device) for layers in groups}

    def train(self, mode: bool = True) -> "MultiLoRALinear":
        """As nn.Module's; training may change adapters in ways that no counter shows."""
        self.forget_decoding()
        return super().train(mode)

    def forget_decoding(self) -> None:
        """After a change of the adapters that their version counters may not show."""
        for cache in self._decode:
            cache.clear()

    def __getattr__(self, name: str):
        if name in ("weight", "bias"):
            raise AttributeError(
                f"the {name} of a patched layer ({self.name}) was asked for: a model that "
                "reads it computes around the LoRAs; leave this layer out, by naming others in "
                f"target_modules (base_layer.{name} is the frozen one)"
            )
        return super().__getattr__(name)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_decode": (DecodeCache(), DecodeCache())}

    def reset_parameters(self) -> None:
        """A uniform as nn.Linear's weight, B zero: a fresh adapter changes nothing."""
        for expert in self.experts:
            nn.init.kaiming_uniform_(self.lora_A[expert], a=math.sqrt(5))
            nn.init.zeros_(self.lora_B[expert])

    def forward(self, x: Tensor) -> Tensor:
        """x (..., k) to (..., n)."""
        route = self.router.route
        if route is None:
            if torch.compiler.is_compiling():
                return outside_the_graph(self, x)
            _refuse_recomputation()
            shape = (1, x.shape[:-1].numel())
            route = self.router.make_route(None, shape, x.device, self.training)
        if route.base_only and not (self.training and torch.is_grad_enabled()):
            return self.base_layer(x)  # else other ranks wait for this one's (zero) gradients
        ready = route.take(x, self.index)
        if ready is not None:
            return ready
        layers = self._group(x, route)
        bases = [layer._fused_base(x) for layer in layers]
        if any(weight is None for weight, _ in bases):
            layers, bases = [self], bases[:1]
        if bases[0][0] is None:
            base = self.base_layer(x)
            return base + self._run(x.to(base.dtype), layers, bases, route, x)[0]
        outputs = self._run(x, layers, bases, route, x)
        if len(layers) > 1:
            route.keep(x, [layer.index for layer in layers[1:]], outputs[1:])
        return outputs[0]

    def own_gate(self, gate: TaskGate) -> None:
        """Take learned gates that belong to this layer alone."""
        self.ckf_gate = gate
        self._gate[0] = gate
        self._prepare(gate.gate.device)

    def join(self, siblings: list["MultiLoRALinear"]) -> None:
        """Layers that are fed the same tensor after this one; it computes them all at once."""
        self._siblings = siblings
        for layer in siblings:
            layer._leader = self.index
        self._prepare(self._constant.device)

    def _group(self, x: Tensor, route: Route) -> list["MultiLoRALinear"]:
        """This layer, and its siblings where they may be computed together with it.

        Tensors made in inference mode count no changes: that the model makes none to x between two
        siblings' calls was seen when the group was found; of a sibling's hooks it was not.
        Not in a checkpoint under torch.compile: it forbids what outlives a call.
        """
        if not self._siblings:
            return [self]
        if torch.compiler.is_compiling():
            alone = not route.may_hold
        else:
            alone = x.is_inference() and any(la._forward_pre_hooks for la in self._siblings)
        if alone:
            return [self]
        mixed = any(layer.training != self.training for layer in self._siblings)
        return [self] if mixed else [self, *self._siblings]

    def _run(self, inputs: Tensor, layers, bases, route: Route, x: Tensor) -> tuple[Tensor, ...]:
        """The layers' outputs; ``x`` is the tensor as it came, whose identity seeds the dropout."""
        a = [layer._modules["lora_A"].values() for layer in layers]
        b = [layer._modules["lora_B"].values() for layer in layers]
        device = a[0][0].device
        if device != x.device:
            raise ValueError(
                f"a patched layer's adapters are on {device} and its input on {x.device}; move the "
                "whole model, or offload with device_map before ckf.patch_model (after it: "
                'dispatch_model(..., preload_module_classes=["MultiLoRALinear"]))'
            )
        dropout = self.dropout if self.training else 0.0
        if self._constant.device != device and not torch.compiler.is_compiling():
            for layer in layers:
                layer._prepare(device)
        slots, width = self._slots[len(layers)]
        keeps = not self.training and self._gate[0] is None
        return run_group(
            inputs,
            [weight for weight, _ in bases],
            [bias for _, bias in bases],
            a,
            b,
            [layer.gates(device) for layer in layers],
            route.ids_for(x, self.name),
            dropout,
            route.seed_for(x, self._leader) if dropout > 0 else 0,
            self.backend,
            slots,
            width,
            # torch 2.11 traces no tuple[bool]; learned gates are a fresh tensor at every call
            self._decode[int(len(layers) > 1)] if keeps else None,
        )

    def gates(self, device: torch.device) -> Tensor:
        """(T, E) float32 over this layer's experts, scaling included."""
        constant, learned = self._constant, self._gate[0]
        if constant.device != device:
            constant = constant.to(device)
        if learned is None:
            return constant
        gate = learned.gate.float()
        if self.experts != learned.experts:
            columns = [learned.experts.index(e) for e in self.experts]
            gate = torch.stack([gate[:, c] for c in columns], dim=1)
        return gate.to(device) * constant

    def _gate_constant(self) -> Tensor:
        """Scaling (E,); with the hard gate, the whole matrix (T, E)."""
        scaling = torch.tensor([self.scaling[e] for e in self.experts], dtype=torch.float32)
        if self._gate[0] is None:
            hard = _hard_gate(self.router.tasks, self.experts)
            scaling = torch.tensor(hard, dtype=torch.float32) * scaling
        return scaling

    def fuses(self) -> bool:
        """Whether the base is a plain linear: not quantized, sharded by tensors, or hooked."""
        base = self._modules["base_layer"]  # nn.Module's own lookup takes longer than the rest
        if type(base) is not nn.Linear and type(base) is not Conv1D:
            return False
        if base._forward_hooks or base._forward_pre_hooks or "forward" in base.__dict__:
            return False
        weight = base._parameters["weight"]
        return type(weight) is nn.Parameter or not hasattr(weight, "__tensor_flatten__")

    def _fused_base(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Weight (n, k) and bias where the base may be computed with the update, else None."""
        if not self.fuses():
            return None, None
        base = self._modules["base_layer"]
        weight, bias = base._parameters["weight"], base._parameters["bias"]
        if weight.device != x.device:
            return None, None
        if weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
            return None, None
        return weight if type(base) is nn.Linear else weight.t(), bias

    def _replicate_for_data_parallel(self):
        raise ValueError(
            "torch.nn.DataParallel (Trainer's choice for several GPUs in one process) splits a "
            "batch without its tasks; start one process a GPU with torchrun or accelerate launch, "
            "or show one GPU with CUDA_VISIBLE_DEVICES"
        )

    def extra_repr(self) -> str:
        ranks = ", ".join(f"{e}: {self.lora_A[e].shape[0]}" for e in self.experts)
        return f"ranks={{{ranks}}}, dropout={self.dropout}, backend={self.backend!r}"
