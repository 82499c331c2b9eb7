"""Adapters on disk, in PEFT's format: save, load, export to one ordinary LoRA, merge.

    <path>/ckf.json                     how the model was patched
    <path>/shared/adapter_config.json   adapter_model.safetensors
    <path>/<task>/adapter_config.json   adapter_model.safetensors
    <path>/ckf_gate.safetensors         learned gates only

Every folder is a plain PEFT adapter: loaded together, ``shared`` and ``<task>`` active, PEFT gives
what the patched model gives for that task (hard gates). Safetensors only, never pickle.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ckf.layers import SHARED, MultiLoRALinear
from ckf.patch import PatchSettings, patch_state, patched_layers, unpatch_model

FORMAT = 1
SETTINGS_FILE = "ckf.json"
GATE_FILE = "ckf_gate.safetensors"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."


def save_adapters(model: nn.Module, path: str | Path) -> None:
    """Write the shared and every task's LoRA as PEFT adapters; replaces ``path`` as a whole.

    Raises:
        ValueError: an unpatched model, or ``path`` exists and holds no saved adapters.
    """
    state, layers = patch_state(model), patched_layers(model)
    with _replacing(Path(path)) as folder:
        for expert in state.settings.experts:
            tensors = {}
            for name, layer in layers.items():
                if expert in layer.experts:
                    tensors[f"{_PREFIX}{name}.lora_A.weight"] = layer.lora_A[expert]
                    tensors[f"{_PREFIX}{name}.lora_B.weight"] = layer.lora_B[expert]
            names = [n for n, layer in layers.items() if expert in layer.experts]
            config = _peft_config(model, names, state.settings, state.settings.rank(expert))
            _write_adapter(folder / expert, config, tensors)
        gates = _gate_tensors(model)
        if gates:
            _save(gates, folder / GATE_FILE)
        settings = {"format": FORMAT, **asdict(state.settings)}
        (folder / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n")


def load_adapters(model: nn.Module, path: str | Path) -> None:
    """Read adapters that ``save_adapters`` wrote into a model patched the same way.

    Everything is checked before anything is copied; a wrong file changes nothing.

    Raises:
        ValueError: a missing or unreadable file, tasks that differ, keys or shapes that do not fit.
    """
    state, layers, path = patch_state(model), patched_layers(model), Path(path)
    saved = read_settings(path)
    if list(saved["tasks"]) != list(state.settings.tasks):
        raise ValueError(
            f"{path} holds adapters for tasks {', '.join(saved['tasks'])}; the model is patched "
            f"for {', '.join(state.settings.tasks)}: patch it with the same tasks in this order"
        )
    copies: list[tuple[Tensor, Tensor]] = []
    for expert in state.settings.experts:
        file = path / expert / WEIGHTS_FILE
        tensors = _load(file)
        for name, layer in layers.items():
            if expert not in layer.experts:
                continue
            for side, own in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
                key = f"{_PREFIX}{name}.{side}.weight"
                copies.append((own[expert], _take(tensors, key, own[expert], file)))
        if tensors:
            raise ValueError(f"{file} has {min(tensors)}, which the patched model lacks")
    gates = _gate_tensors(model)
    if gates:
        tensors = _load(path / GATE_FILE)
        copies += [(own, _take(tensors, k, own, path / GATE_FILE)) for k, own in gates.items()]
    with torch.no_grad():
        for own, tensor in copies:
            own.copy_(tensor)


def read_settings(path: str | Path) -> dict:
    """How the model was patched whose adapters lie in ``path``."""
    file = Path(path) / SETTINGS_FILE
    try:
        settings = json.loads(file.read_text())
        if settings["format"] != FORMAT or not isinstance(settings["tasks"], dict):
            raise ValueError(f"{file} has format {settings['format']}; expected {FORMAT}")
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{file} is not readable ({error}); expected a folder written by ckf.save_adapters"
        ) from error
    return settings


def export_peft(model: nn.Module, task: str, path: str | Path) -> None:
    """Write what one task uses as ONE ordinary PEFT LoRA, scalings and gates folded into B.

    Its rank is shared + task (with learned gates: all experts) everywhere, zero-padded where a
    layer has less; lora_alpha equals the rank, so that any LoRA server scales it by one.
    """
    state, layers = patch_state(model), patched_layers(model)
    row = state.router.index(_known_task(state, task))
    learned = state.settings.gate == "learned"
    experts = state.settings.experts if learned else [
        e for e in state.settings.experts if e in (SHARED, task)
    ]  # fmt: skip
    rank = sum(state.settings.rank(e) for e in experts)
    tensors, names = {}, []
    for name, layer in layers.items():
        own = [e for e in layer.experts if e in experts]
        if not own:
            continue
        names.append(name)
        gates = layer.gates(layer.lora_A[own[0]].device)[row].detach()
        a = torch.cat([layer.lora_A[e].detach() for e in own])
        b = [gates[layer.experts.index(e)] * layer.lora_B[e].detach() for e in own]
        b = torch.cat(b, dim=1)
        pad = rank - a.shape[0]
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = torch.cat([a, a.new_zeros(pad, a.shape[1])])
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = torch.cat(
            [b, b.new_zeros(b.shape[0], pad)], dim=1
        )
    config = _peft_config(model, names, state.settings, rank)
    config |= {"lora_alpha": rank, "use_rslora": False, "lora_dropout": 0.0}
    with _replacing(Path(path), "adapter_config.json") as folder:
        _write_adapter(folder, config, tensors)


def merge_task(model: nn.Module, task: str) -> nn.Module:
    """Add one task's update to the frozen weights and take the patch out.

    Raises:
        ValueError: a base that cannot take it exactly (quantized, or tied to another module).
    """
    state, layers = patch_state(model), patched_layers(model)
    row = state.router.index(_known_task(state, task))
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for name, layer in layers.items():
        weight = getattr(layer.base_layer, "weight", None)
        if weight is None or not weight.is_floating_point() or weight.dim() != 2:
            raise ValueError(f"{name} has a quantized weight; a merge would lose precision")
        if len(owners[id(weight)]) > 1:
            raise ValueError(
                f"{name} shares its weight with {', '.join(owners[id(weight)])}; a merge would "
                "change them all: leave it out of target_modules, or use ckf.export_peft"
            )
    with torch.no_grad():
        for layer in layers.values():
            weight = layer.base_layer.weight
            delta = _delta(layer, row)
            delta = delta.t() if isinstance(layer.base_layer, Conv1D) else delta
            weight.copy_(weight.to(delta.dtype) + delta)
    return unpatch_model(model)


def _delta(layer: MultiLoRALinear, row: int) -> Tensor:
    gates = layer.gates(layer.lora_A[layer.experts[0]].device)[row]
    parts = [
        gate * (layer.lora_B[e] @ layer.lora_A[e])
        for e, gate in zip(layer.experts, gates, strict=True)
        if gate != 0
    ]
    zero = layer.lora_A[layer.experts[0]].new_zeros(layer.out_features, layer.in_features)
    return sum(parts, zero)


def _known_task(state, task: str) -> str:
    if not isinstance(task, str):
        raise ValueError(f"task is {task!r}; expected a name: {', '.join(state.settings.tasks)}")
    state.router.index(task)
    return task


def _gate_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if "ckf_gate" in n.split(".")}


def _peft_config(model, names: list[str], settings: PatchSettings, rank: int) -> dict:
    """A PEFT LoraConfig as a dict; suffixes as targets where they select exactly these layers."""
    suffixes = sorted({n.rsplit(".", 1)[-1] for n in names})
    patched = patched_layers(model)
    selected = {
        n for n, m in model.named_modules()
        if n.rsplit(".", 1)[-1] in suffixes and (n in patched or isinstance(m, nn.Linear | Conv1D))
    }  # fmt: skip
    conv = any(isinstance(patched[n].base_layer, Conv1D) for n in names)
    config = getattr(model, "config", None)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": getattr(config, "_name_or_path", None) or None,
        "r": rank,
        "lora_alpha": settings.lora_alpha,
        "lora_dropout": settings.lora_dropout,
        "use_rslora": settings.use_rslora,
        "target_modules": suffixes if selected == set(names) else names,
        "fan_in_fan_out": conv,
        "bias": "none",
        "inference_mode": True,
    }


def _write_adapter(folder: Path, config: dict, tensors: dict[str, Tensor]) -> None:
    folder.mkdir(exist_ok=True)
    _save(tensors, folder / WEIGHTS_FILE)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _save(tensors: dict[str, Tensor], file: Path) -> None:
    copies = {k: t.detach().cpu().contiguous().clone() for k, t in tensors.items()}
    save_file(copies, file, metadata={"format": "pt"})


def _load(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{file} is not a readable safetensors file ({error}); save the adapters again"
        ) from error


def _take(tensors: dict[str, Tensor], key: str, own: Tensor, file: Path) -> Tensor:
    if key not in tensors:
        raise ValueError(f"{file} lacks {key}; was the model patched with the same target_modules?")
    tensor = tensors.pop(key)
    if tensor.shape != own.shape:
        raise ValueError(
            f"{file}: {key} has shape {tuple(tensor.shape)}; the model needs {tuple(own.shape)}"
        )
    return tensor


@contextmanager
def _replacing(path: Path, mark: str = SETTINGS_FILE) -> Iterator[Path]:
    """A temporary folder beside ``path`` that takes its place once all is written."""
    if path.exists() and any(path.iterdir()) and not (path / mark).exists():
        raise ValueError(f"{path} exists and holds other files; give a new or an empty folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        yield folder
        os.chmod(folder, 0o755)
        old = folder.with_name(folder.name + "-old")
        if path.exists():
            path.rename(old)
        folder.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
