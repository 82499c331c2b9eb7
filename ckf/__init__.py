"""ckf: Multi-LoRA kernels, a model patcher, and Collaborative Knowledge Fusion for LLMs."""

from ckf.adapters import export_peft, load_adapters, merge_task, save_adapters
from ckf.patch import is_patched, patch_model, task_ids, unpatch_model, use_task

__version__ = "0.1.0"

__all__ = [
    "export_peft",
    "is_patched",
    "load_adapters",
    "load_run",
    "merge_task",
    "patch_model",
    "save_adapters",
    "task_ids",
    "unpatch_model",
    "use_task",
]


def __getattr__(name: str):
    if name == "load_run":  # needs the [recsys] extra; the kernels and the patcher do not
        from ckf.run import load_run

        return load_run
    raise AttributeError(f"module 'ckf' has no attribute {name!r}")
