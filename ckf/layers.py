"""MultiLoRALinear: a frozen linear with a shared LoRA and one LoRA per task."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ckf.kernels.ops import run_group
from ckf.routing import Route, Router

SHARED = "shared"


class ExpertParameters(nn.Module):
    """Parameters by adapter name; any name works, also one that nn.Module uses itself."""

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        super().__init__()
        self._parameters.update(parameters)

    def __getitem__(self, name: str) -> nn.Parameter:
        return self._parameters[name]

    def train(self, mode: bool = True) -> "ExpertParameters":
        """As nn.Module's, for containers whose adapter may itself be called "training"."""
        self.__dict__["training"] = mode
        return self


class TaskGate(nn.Module):
    """Trainable gates (T, E) over all experts, starting at the hard gate.

    The gate is linear in its parameter, so it starts exactly at the hard gate (1 for the shared
    expert and the task's own, 0 elsewhere) and an expert at 0 still gets its exact gradient. LoRA
    scaling is applied on top.
    """

    def __init__(self, tasks: tuple[str, ...], experts: tuple[str, ...], device=None) -> None:
        super().__init__()
        self.experts = experts
        self.gate = nn.Parameter(torch.tensor(_hard_gate(tasks, experts), device=device))


def _hard_gate(tasks: Iterable[str], experts: Iterable[str]) -> list[list[float]]:
    return [[float(expert in (SHARED, task)) for expert in experts] for task in tasks]


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
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = in_features, out_features
        self.router, self.index = router, index
        self.experts = tuple(ranks)
        self.scaling = dict(scaling)
        self.dropout, self.backend = dropout, backend
        self._gate = [gate]  # in a list: the gate is registered once, on the model
        self._siblings: list[MultiLoRALinear] = []
        self._constants: dict[torch.device, Tensor] = {}  # gates and scaling, by device
        weight = next(base_layer.parameters())
        wide = weight.dtype in (torch.float32, torch.float64)
        options = {"device": weight.device, "dtype": weight.dtype if wide else torch.float32}
        a = {e: nn.Parameter(torch.empty(r, in_features, **options)) for e, r in ranks.items()}
        b = {e: nn.Parameter(torch.zeros(out_features, r, **options)) for e, r in ranks.items()}
        self.lora_A, self.lora_B = ExpertParameters(a), ExpertParameters(b)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A uniform as nn.Linear's weight, B zero: a fresh adapter changes nothing."""
        for expert in self.experts:
            nn.init.kaiming_uniform_(self.lora_A[expert], a=math.sqrt(5))
            nn.init.zeros_(self.lora_B[expert])

    def forward(self, x: Tensor) -> Tensor:
        """x (..., k) to (..., n)."""
        route = self.router.route
        if route is None:
            shape = (x.shape[:-1].numel(), 1)
            route = self.router.make_route(None, shape, x.device, self.training)
        if route.base_only:
            return self.base_layer(x)
        ready = route.take(x, self.index)
        if ready is not None:
            return ready
        layers = self._group(x)
        bases = [layer._fused_base(x) for layer in layers]
        if any(weight is None for weight, _ in bases):
            layers, bases = [self], bases[:1]
        if bases[0][0] is None:
            base = self.base_layer(x)
            return base + self._run(x.to(base.dtype), layers, bases, route, x)[0]
        outputs = self._run(x, layers, bases, route, x)
        for layer, y in zip(layers[1:], outputs[1:], strict=True):
            route.keep(x, layer.index, y)
        return outputs[0]

    def join(self, siblings: list["MultiLoRALinear"]) -> None:
        """Layers that are fed the same tensor after this one; it computes them all at once."""
        self._siblings = siblings

    def _group(self, x: Tensor) -> list["MultiLoRALinear"]:
        """This layer, and its siblings where they may be computed together with it.

        Not in inference mode: a change of x between two siblings' calls would go unseen there.
        """
        alone = x.is_inference() or torch.compiler.is_compiling()
        if alone or any(layer.training != self.training for layer in self._siblings):
            return [self]
        return [self, *self._siblings]

    def _run(self, inputs: Tensor, layers, bases, route: Route, x: Tensor) -> tuple[Tensor, ...]:
        """The layers' outputs; ``x`` is the tensor as it came, whose identity seeds the dropout."""
        dropout = self.dropout if self.training else 0.0
        return run_group(
            inputs,
            [weight for weight, _ in bases],
            [bias for _, bias in bases],
            [[layer.lora_A[e] for e in layer.experts] for layer in layers],
            [[layer.lora_B[e] for e in layer.experts] for layer in layers],
            [layer.gates(x.device) for layer in layers],
            route.ids_for(x),
            dropout,
            route.seed_for(x, self.index) if dropout > 0 else 0,
            self.backend,
        )

    def gates(self, device: torch.device) -> Tensor:
        """(T, E) float32 over this layer's experts, scaling included."""
        learned = self._gate[0]
        if device not in self._constants:
            with torch.inference_mode(False):  # training may use the same tensor later
                self._constants[device] = self._gate_constant().to(device)
        constant = self._constants[device]
        if learned is None:
            return constant
        gate = learned.gate.float()
        if self.experts != learned.experts:
            columns = [learned.experts.index(e) for e in self.experts]
            gate = torch.stack([gate[:, c] for c in columns], dim=1)
        return gate.to(device) * constant

    def _gate_constant(self) -> Tensor:
        """Scaling (E,); with the hard gate, the whole matrix (T, E)."""
        scaling = torch.tensor([self.scaling[e] for e in self.experts])
        if self._gate[0] is not None:
            return scaling
        return torch.tensor(_hard_gate(self.router.tasks, self.experts)) * scaling

    def _fused_base(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Weight (n, k) and bias where the base may be computed with the update, else None."""
        base = self.base_layer
        hooked = base._forward_hooks or base._forward_pre_hooks or "forward" in base.__dict__
        if hooked or (type(base) is not nn.Linear and type(base) is not Conv1D):
            return None, None
        if x.dtype != base.weight.dtype and not torch.is_autocast_enabled(x.device.type):
            return None, None
        weight = base.weight if type(base) is nn.Linear else base.weight.t()
        return weight, base.bias

    def extra_repr(self) -> str:
        ranks = ", ".join(f"{e}: {self.lora_A[e].shape[0]}" for e in self.experts)
        return f"ranks={{{ranks}}}, dropout={self.dropout}, backend={self.backend!r}"
