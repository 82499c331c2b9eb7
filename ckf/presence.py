"""A task without rows in a step must not move.

Its gradients are zero, but an optimizer with momentum or weight decay would move it all the same.
:class:`TaskPresence` notes the tasks seen since the last step and, just before the step, takes the
gradients of the absent ones away; optimizers skip parameters whose gradient is None.
"""

import torch
from torch import Tensor, nn

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

    def observe(self, task_ids: Tensor) -> None:
        """Note the ids of a forward pass that will be trained on; -1 and any shape are fine."""
        names = torch.arange(len(self.tasks), device=task_ids.device)
        seen = (task_ids.reshape(-1, 1) == names).any(0)
        self._seen = seen if self._seen is None else self._seen | seen

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Before each of its steps, absent tasks lose their gradients."""
        optimizer.register_step_pre_hook(lambda *_: self.before_step())

    def before_step(self) -> None:
        if self._seen is None:
            return
        seen = self._seen.int()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(seen, torch.distributed.ReduceOp.MAX)
        for task, present in zip(self.tasks, seen.tolist(), strict=True):
            if not present:
                for parameter in self._parameters[task]:
                    parameter.grad = None
        self._seen = None
