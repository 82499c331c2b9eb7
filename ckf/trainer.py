"""transformers.Trainer for a patched model: small checkpoints, resume, absent tasks at rest."""

from pathlib import Path

from transformers import Trainer

from ckf.adapters import load_adapters, save_adapters
from ckf.calls import ADAPTERS_FOLDER
from ckf.presence import TaskPresence


class MultiLoRAMixin:
    """For any Trainer class: ``class MyTrainer(MultiLoRAMixin, SFTTrainer): ...``.

    The model is what ``ckf.patch_model`` returned, before any wrapper. Checkpoints and
    ``save_model`` hold ``adapters/`` (see :mod:`ckf.adapters`) and the optimizer, never the base;
    resuming and the best model are read from there; tasks without rows in a step do not move.
    """

    _presence: TaskPresence | None = None

    def create_optimizer(self, *args, **kwargs):
        optimizer = super().create_optimizer(*args, **kwargs)
        presence = TaskPresence(self.model)
        if self._presence is None or self._presence.router is not presence.router:
            self._presence = presence  # model_init makes a new model for each training
        self._presence.attach(optimizer)
        return optimizer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not self.is_fsdp_enabled:
            return super().save_model(output_dir, _internal_call)
        save_adapters(self.model, Path(output_dir or self.args.output_dir) / ADAPTERS_FOLDER)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        load_adapters(self.model, Path(resume_from_checkpoint) / ADAPTERS_FOLDER)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)


class MultiLoRATrainer(MultiLoRAMixin, Trainer):
    """``transformers.Trainer`` in which a patched model needs nothing else.

    Batches come from :class:`ckf.TaskCollator`, or have an integer column ``task_ids``.
    """
