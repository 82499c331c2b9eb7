"""A task without rows in a step must not move.

Its gradients are zero, but an optimizer with momentum or weight decay would move it all the same.
:class:`TaskPresence` notes the tasks seen since the last step and, just before the step, takes the
gradients of the absent ones away; optimizers skip parameters whose gradient is None. Learned gates
have a row per task in one parameter: rows of absent tasks are put back after the step.

It holds modules, not parameters: FSDP2 puts new parameters in their place.
"""

import weakref

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.utils.hooks import RemovableHandle

from ckf.layers import TaskGate
from ckf.patch import patch_state, patched_layers
from ckf.routing import TaskIds


class TaskPresence:
    """Watches a patched model's tasks; attach it to every optimizer that steps them.

    ``ckf.TaskPresence(model).attach(optimizer)`` is all: forward passes with gradients enabled are
    noted from then on, over all micro-steps of a step. Under torch.distributed a task counts as
    present when any rank has rows of it, and every rank has to step. The one copy to the host is
    made at the step.

    Args:
        model: the patched model, or a module that contains it, such as a DDP wrapper.

    Not for optimizers that keep parameters in flat buffers of their own (DeepSpeed ZeRO, FSDP1).
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = _patched_inside(model)
        self.router = patch_state(self.model).router
        self.tasks = self.router.tasks
        self._seen: Tensor | None = None
        self._layers = list(patched_layers(self.model).values())
        self._gates = [m for m in self.model.modules() if isinstance(m, TaskGate)]
        self._kept: list[tuple[Tensor, Tensor, Tensor]] = []  # gate, absent rows, values before
        self._notes: RemovableHandle | None = None
        self._steps: list[tuple[weakref.ref, RemovableHandle, RemovableHandle]] = []

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_steps": []}  # a copy has no optimizer yet

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Note forward passes; around each step, keep the absent tasks where they are.

        Before the first forward pass that a step is taken for; a second time changes nothing.

        Raises:
            ValueError: no optimizer of PyTorch's, or one that steps nothing of this model.
        """
        optimizer = getattr(optimizer, "optimizer", optimizer)  # what accelerate wraps
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ValueError(
                f"TaskPresence was given a {type(optimizer).__name__}; expected a "
                "torch.optim.Optimizer"
            )
        own = {id(parameter) for parameter in self.model.parameters()}
        if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
            raise ValueError(
                "this optimizer steps nothing of the model; make it from model.parameters() of "
                "this very model, after ckf.patch_model (ckf.load_patched makes a new one)"
            )
        if self._notes is None:
            hook = self._before_forward
            self._notes = self.model.register_forward_pre_hook(hook, with_kwargs=True)
        if not any(known() is optimizer for known, *_ in self._steps):
            before = optimizer.register_step_pre_hook(lambda *_: self.before_step())
            after = optimizer.register_step_post_hook(lambda *_: self.after_step())
            self._steps.append((weakref.ref(optimizer), before, after))

    def detach(self) -> None:
        """Leave the model and every optimizer alone again; ``ckf.unpatch_model`` does it."""
        if self._notes is not None:
            self._notes.remove()
        for _, before, after in self._steps:
            before.remove()
            after.remove()
        self._notes, self._seen, self._steps = None, None, []

    def observe(self, task_ids: TaskIds) -> None:
        """Note the ids of a forward pass that will be trained on; -1 and any shape are fine."""
        ids = self.router.tensor(task_ids)
        names = torch.arange(len(self.tasks), device=ids.device)
        seen = (ids.reshape(-1, 1) == names).any(0)
        self._seen = seen if self._seen is None else self._seen.to(seen.device) | seen

    def _before_forward(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        task_ids = kwargs.get("task_ids")
        task_ids = self.router.default_task if task_ids is None else task_ids
        if task_ids is not None and torch.is_grad_enabled():
            self.observe(task_ids)

    def before_step(self) -> None:
        absent = self._absent()
        for layer in self._layers:
            for task in {self.tasks[index] for index in absent}.intersection(layer.experts):
                layer.lora_A[task].grad = layer.lora_B[task].grad = None
        for module in self._gates if absent else []:
            gate = module.gate
            rows = torch.zeros(len(self.tasks), 1, dtype=torch.bool)
            rows[absent] = True
            rows = rows.to(gate.device)
            if isinstance(gate, DTensor):
                whole = [Replicate()] * gate.device_mesh.ndim
                rows = DTensor.from_local(rows, gate.device_mesh, whole, run_check=False)
            self._kept.append((gate, rows, gate.detach().clone()))
        self._seen = None

    def _absent(self) -> list[int]:
        """Tasks that no rank has seen since the last step; none where nothing was noted."""
        parallel = dist.is_available() and dist.is_initialized()
        seen = self._seen
        if not parallel and seen is None:
            return []
        if seen is None:
            seen = torch.zeros(len(self.tasks), dtype=torch.bool)
        if parallel:  # a rank without a forward pass takes part as well
            device = self._layers[0].lora_A[self._layers[0].experts[0]].device
            counts = torch.cat([seen, torch.tensor([self._seen is not None]).to(seen)]).int()
            counts = counts.to(device)
            dist.all_reduce(counts, dist.ReduceOp.MAX)
            *seen, noted = counts.tolist()
            return [i for i, present in enumerate(seen) if not present] if noted else []
        return [i for i, present in enumerate(seen.tolist()) if not present]

    @torch.no_grad()
    def after_step(self) -> None:
        for gate, absent, values in self._kept:
            gate.copy_(torch.where(absent, values, gate))
        self._kept = []


def _patched_inside(model: nn.Module) -> nn.Module:
    """The module itself, or the one patched module that it contains."""
    found = [m for m in model.modules() if "_ckf" in m.__dict__]
    return found[0] if found else model
