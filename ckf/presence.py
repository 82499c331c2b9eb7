"""A task without rows in a step must not move.

Its gradients are zero, but an optimizer with momentum or weight decay would move it all the same.
:class:`TaskPresence` notes the tasks seen since the last step and, just before the step, takes the
gradients of the absent ones away; optimizers skip parameters whose gradient is None. Learned gates
have a row per task in one parameter: rows of absent tasks are put back after the step.
"""

import torch
from torch import Tensor, nn

from ckf.layers import TaskGate
from ckf.patch import patch_state, patched_layers


class TaskPresence:
    """Watches a patched model's tasks; attach it to every optimizer that steps them.

    The tasks are counted on the device; the one copy to the host is made at the step, outside any
    layer. Under torch.distributed a task counts as present when any rank has rows of it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.tasks = patch_state(model).router.tasks
        self._seen: Tensor | None = None
        self._parameters = {
            task: [
                parameters[task]
                for layer in patched_layers(model).values()
                if task in layer.experts
                for parameters in (layer.lora_A, layer.lora_B)
            ]
            for task in self.tasks
        }
        self._gates = [m.gate for m in model.modules() if isinstance(m, TaskGate)]
        self._kept: list[tuple[Tensor, Tensor, Tensor]] = []  # gate, its absent rows, their values

    def observe(self, task_ids: Tensor) -> None:
        """Note the ids of a forward pass that will be trained on; -1 and any shape are fine."""
        names = torch.arange(len(self.tasks), device=task_ids.device)
        seen = (task_ids.reshape(-1, 1) == names).any(0)
        self._seen = seen if self._seen is None else self._seen | seen

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Around each of its steps: absent tasks lose their gradients and keep their gates."""
        optimizer.register_step_pre_hook(lambda *_: self.before_step())
        optimizer.register_step_post_hook(lambda *_: self.after_step())

    def before_step(self) -> None:
        if self._seen is None:
            return
        seen = self._seen.int()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(seen, torch.distributed.ReduceOp.MAX)
        absent = [index for index, present in enumerate(seen.tolist()) if not present]
        for index in absent:
            for parameter in self._parameters[self.tasks[index]]:
                parameter.grad = None
        for gate in self._gates:
            rows = torch.tensor(absent, dtype=torch.int64, device=gate.device)
            self._kept.append((gate, rows, gate.detach()[rows]))
        self._seen = None

    @torch.no_grad()
    def after_step(self) -> None:
        for gate, absent, values in self._kept:
            gate[absent] = values
        self._kept = []
