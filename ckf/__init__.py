"""ckf: Multi-LoRA kernels, a model patcher, and Collaborative Knowledge Fusion for LLMs."""

from importlib import import_module

__version__ = "0.1.0"

# Read when they are asked for: ckf.kernels needs torch alone, the patcher transformers as well, the
# trainer accelerate, and load_run the [recsys] extra.
_MODULES = {
    "LayerGraphs": "layer_graphs",
    "MultiLoRATrainer": "trainer",
    "TaskCollator": "collate",
    "TaskPresence": "presence",
    "export_peft": "export",
    "import_peft": "export",
    "is_patched": "patch",
    "load_adapters": "adapters",
    "load_patched": "adapters",
    "load_run": "run",
    "merge_task": "export",
    "patch_model": "patch",
    "reset_adapters": "patch",
    "save_adapters": "adapters",
    "task_ids": "patch",
    "unpatch_model": "patch",
    "use_task": "patch",
}
__all__ = list(_MODULES)


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module 'ckf' has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(f"ckf.{_MODULES[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
