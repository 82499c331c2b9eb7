"""The model card that lies beside saved adapters."""

from pathlib import Path

from huggingface_hub import ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id

from ckf.layers import SHARED
from ckf.patch import PatchSettings, Targets


def model_card(settings: PatchSettings, base: str | None) -> str:
    """README.md of an adapter folder: YAML header, what lies there, how to load it.

    A base model that is no name on the hub, such as a folder, stays out of the header.
    """
    header = ModelCardData(
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["ckf", "lora", "multi-lora", "peft"],
        base_model=base if _is_hub_name(base) else None,
    ).to_yaml()
    name = base if _is_hub_name(base) else "BASE"
    rows = [_row(expert, settings) for expert in settings.experts]
    first = next(iter(settings.tasks))
    gates = {
        "hard": "hard: a row takes the shared LoRA and its own task's",
        "learned": "learned: a row takes every LoRA, weighted for its task "
        "(`ckf_gate.safetensors`); PEFT knows no such weights, so export a task for it",
    }[settings.gate]
    return f"""---
{header}
---

# Multi-LoRA adapters

One LoRA shared by all tasks and one per task, trained with `ckf` on {base or "a base model"}.

| folder | used by | rank | alpha | scaling |
| --- | --- | --- | --- | --- |
{chr(10).join(rows)}

* Gates: {gates}.
* Shared LoRA on: {_targets(settings.shared_modules)}; task LoRAs on:
  {_targets(settings.task_modules)}.
* Dropout in training: {settings.lora_dropout}.

```python
import ckf

model = ckf.load_patched("{name}", "FOLDER")  # this folder
model.generate(ids, task_ids=["{first}"])  # a task for each row
ckf.export_peft(model, "{first}", "{first}-lora")  # one ordinary LoRA for any server
```

Each folder above is an ordinary PEFT adapter.
"""


def _row(expert: str, settings: PatchSettings) -> str:
    used_by = "all rows" if expert == SHARED else f"`{expert}` rows"
    scaling = f"{settings.scaling(expert):.6g}"
    return (
        f"| `{expert}` | {used_by} | {settings.rank(expert)} | {settings.lora_alpha} | {scaling} |"
    )


def _targets(targets: Targets) -> str:
    return f"`{targets}`" if isinstance(targets, str) else ", ".join(f"`{t}`" for t in targets)


def _is_hub_name(name: str | None) -> bool:
    if not name or Path(name).exists():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
