"""ckf: Multi-LoRA kernels, a model patcher, and Collaborative Knowledge Fusion for LLMs."""

from ckf.adapters import load_adapters, load_patched, save_adapters
from ckf.collate import TaskCollator
from ckf.export import export_peft, import_peft, merge_task
from ckf.layer_graphs import LayerGraphs
from ckf.patch import (
    is_patched,
    patch_model,
    reset_adapters,
    task_ids,
    unpatch_model,
    use_task,
)
from ckf.presence import TaskPresence

__version__ = "0.1.0"

__all__ = [
    "LayerGraphs",
    "MultiLoRATrainer",
    "TaskCollator",
    "TaskPresence",
    "export_peft",
    "import_peft",
    "is_patched",
    "load_adapters",
    "load_patched",
    "load_run",
    "merge_task",
    "patch_model",
    "reset_adapters",
    "save_adapters",
    "task_ids",
    "unpatch_model",
    "use_task",
]


def __getattr__(name: str):
    if name == "load_run":  # needs the [recsys] extra; the kernels and the patcher do not
        from ckf.run import load_run

        return load_run
    if name == "MultiLoRATrainer":  # transformers' Trainer takes long to import
        from ckf.trainer import MultiLoRATrainer

        return MultiLoRATrainer
    raise AttributeError(f"module 'ckf' has no attribute {name!r}")
