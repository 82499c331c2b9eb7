"""Adapters on disk, in PEFT's format: save, load, and a base model with them in one call.

    <path>/ckf.json                     how the model was patched
    <path>/README.md                    model card
    <path>/shared/adapter_config.json   adapter_model.safetensors
    <path>/<task>/adapter_config.json   adapter_model.safetensors
    <path>/ckf_gate.safetensors         learned gates only

Every folder is a plain PEFT adapter: loaded together, ``shared`` and ``<task>`` active, PEFT gives
what the patched model gives for that task (hard gates). Safetensors only, never pickle.
"""

import json
import warnings
from dataclasses import asdict, fields
from pathlib import Path

from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from ckf import adapter_files as files
from ckf.calls import ADAPTERS_FOLDER
from ckf.card import model_card
from ckf.layers import SHARED, MultiLoRALinear
from ckf.patch import (
    PatchSettings,
    check_task_name,
    patch_model,
    patch_state,
    patched_layers,
    unpatch_model,
)

FORMAT = 2
SETTINGS_FILE = "ckf.json"
CARD_FILE = "README.md"
GATE_FILE = "ckf_gate.safetensors"
_KINDS = {
    "tasks": dict,
    "shared_r": int,
    "lora_alpha": int | float,
    "lora_dropout": int | float,
    "use_rslora": bool,
    "gate": str,
    "gate_per_layer": bool,
    "backend": str,
    "shared_modules": str | list,
    "task_modules": str | list,
}


def save_adapters(model: nn.Module, path: str | Path) -> None:
    """Write the shared and every task's LoRA as PEFT adapters, with a model card.

    Replaces all that an earlier save wrote to ``path``; other files there stay. Of a sharded model
    (FSDP2) every rank must call this; rank 0 writes. Parameters that train and belong to no adapter
    (a classification head, new embeddings) are not saved: one warning names them.

    Raises:
        ValueError: an unpatched model, adapters without values (meta device), or ``path`` exists
            and holds no saved adapters.
    """
    settings, layers = patch_state(model).settings, patched_layers(model)
    _warn_of_others(model, layers)
    owned = {expert: files.matrices(layers, expert) for expert in settings.experts}
    here = files.writes_here(p for adapter in owned.values() for p in adapter.values())
    adapters = {e: {k: files.whole(p) for k, p in own.items()} for e, own in owned.items()}
    gates = {name: files.whole(gate) for name, gate in _gate_tensors(model).items()}
    if not here:
        return
    owned_files = _written(Path(path), settings.experts)
    with files.replacing(Path(path), SETTINGS_FILE, owned_files) as folder:
        for expert, tensors in adapters.items():
            places = {n: layer for n, layer in layers.items() if expert in layer.experts}
            config = files.peft_config(
                model,
                places,
                r=settings.rank(expert),
                lora_alpha=settings.lora_alpha,
                lora_dropout=settings.lora_dropout,
                use_rslora=settings.use_rslora,
            )
            files.write_adapter(folder / expert, config, tensors)
        if gates:
            files.write_tensors(gates, folder / GATE_FILE)
        about = {"format": FORMAT, **asdict(settings)}
        (folder / SETTINGS_FILE).write_text(json.dumps(about, indent=2) + "\n")
        (folder / CARD_FILE).write_text(model_card(settings, files.base_name(model)))


def load_adapters(model: nn.Module, path: str | Path) -> None:
    """Read adapters that ``save_adapters`` wrote into a model patched the same way.

    Everything is checked before anything is copied; a wrong file changes nothing. Values go to the
    device and dtype of the model's own adapters, whatever device saved them.

    Raises:
        ValueError: a missing or unreadable file, tasks, scaling or gates that differ, keys, shapes
            or dtypes that do not fit, a name or a link that leads out of ``path``.
    """
    settings, layers, path = patch_state(model).settings, patched_layers(model), Path(path)
    saved = read_settings(path)
    _check_tasks(path, list(saved["tasks"]), list(settings.tasks))
    _check_alike(path, saved, settings)
    copies: list[tuple[Tensor, Tensor]] = []
    for expert in settings.experts:
        file = path / expert / files.WEIGHTS_FILE
        tensors = files.read_tensors(file, path)
        for key, own in files.matrices(layers, expert).items():
            copies.append((own, files.take(tensors, key, own, file)))
        if tensors:
            raise ValueError(f"{file} has {min(tensors)}, which the patched model lacks")
    gates = _gate_tensors(model)
    if gates:
        file = path / GATE_FILE
        tensors = files.read_tensors(file, path)
        copies += [(own, files.take(tensors, name, own, file)) for name, own in gates.items()]
        if tensors:
            raise ValueError(f"{file} has {min(tensors)}, which the patched model lacks")
    files.copy_all(copies)
    for layer in layers.values():  # a sharded model gathers adapters without counting
        layer.forget_decoding()


def load_patched(
    base: nn.Module | str, path: str | Path, backend: str | None = None, **options
) -> nn.Module:
    """A base model patched as the saved one was, with the saved adapters in it.

    Args:
        base: a causal LM, patched in place, or the name or folder of one, loaded in eval mode.
        path: a folder written by ``save_adapters``.
        backend: takes the place of the saved setting.
        options: to ``AutoModelForCausalLM.from_pretrained`` where ``base`` is a name, such as
            ``dtype`` and ``device_map``.

    Raises:
        ValueError: a base model that cannot be loaded, or as ``patch_model`` and
            ``load_adapters``; a model given is then left unpatched.
    """
    saved = read_settings(path)
    if isinstance(base, nn.Module):
        if options:
            raise ValueError(
                f"{', '.join(options)} apply when a base is loaded by name, and this is a model "
                "already; leave them out"
            )
    else:
        base = _load_base(str(base), options)
    settings = {f.name: saved[f.name] for f in fields(PatchSettings)}
    if backend is not None:
        settings["backend"] = backend
    for expert, rank in {**saved["tasks"], SHARED: saved["shared_r"]}.items():
        if rank:  # before memory is given to what a foreign file merely claims
            files.check_rank(Path(path) / expert / files.WEIGHTS_FILE, Path(path), rank)
    model = patch_model(base, **settings)
    try:
        load_adapters(model, path)
    except BaseException:
        unpatch_model(model)
        raise
    return model


def read_settings(path: str | Path) -> dict:
    """How the model was patched whose adapters lie in ``path``; ValueError for a foreign file."""
    if not isinstance(path, str | Path):
        raise ValueError(
            f"path is a {type(path).__name__}; expected the folder of adapters, and the model "
            "before it: ckf.load_patched(base, path)"
        )
    path = Path(path)
    file, expected = path / SETTINGS_FILE, "a folder written by ckf.save_adapters"
    inside = path / ADAPTERS_FOLDER
    if not file.exists() and (inside / SETTINGS_FILE).exists():
        raise ValueError(
            f"{path} holds no {SETTINGS_FILE}; its adapters are in {inside}: give that"
        )
    settings = files.read_json(file, path, expected)
    if settings.get("format") != FORMAT:
        raise ValueError(
            f"{file} has format {settings.get('format')!r}; this version reads {FORMAT}: save the "
            "adapters again"
        )
    missing = [f.name for f in fields(PatchSettings) if f.name not in settings]
    if missing:
        raise ValueError(f"{file} lacks {', '.join(missing)}; not {expected}")
    for name, kinds in _KINDS.items():
        value = settings[name]
        names = value if isinstance(value, list) else []
        if not isinstance(value, kinds) or not all(isinstance(n, str) for n in names):
            raise ValueError(f"{file}: {name} is {value!r}; not {expected}")
    for task in settings["tasks"]:
        check_task_name(task)
    return settings


def _written(path: Path, experts: tuple[str, ...]) -> set[str]:
    """The files of a save with these experts, and those that an earlier one put into ``path``."""
    try:
        tasks = files.read_json(path / SETTINGS_FILE, path, "settings").get("tasks")
    except ValueError:  # nothing there, or damaged: its own tasks are then unknown
        tasks = None
    before = (SHARED, *tasks) if isinstance(tasks, dict) else (SHARED,)
    adapters = [files.adapter_files(expert) for expert in (*experts, *before)]
    return {SETTINGS_FILE, CARD_FILE, GATE_FILE}.union(*adapters)


def _load_base(name: str, options: dict) -> nn.Module:
    try:
        return AutoModelForCausalLM.from_pretrained(name, **options).eval()
    except OSError as error:
        raise ValueError(
            f"cannot load the base model {name!r}: {error}\nGive a folder with config.json, or a "
            "Hugging Face name that can be reached from here"
        ) from error


def _check_tasks(path: Path, saved: list[str], own: list[str]) -> None:
    if saved == own:
        return
    lacks, extra = [t for t in own if t not in saved], [t for t in saved if t not in own]
    differences = [f"it lacks {', '.join(lacks)}"] * bool(lacks)
    differences += [f"it has {', '.join(extra)} besides"] * bool(extra)
    raise ValueError(
        f"{path} holds adapters for tasks {', '.join(saved)}; the model is patched for "
        f"{', '.join(own)} ({'; '.join(differences) or 'the order differs'}): patch it with the "
        "same tasks in this order, or use ckf.load_patched; ckf.import_peft reads one adapter into "
        "a task of another name"
    )


def _check_alike(path: Path, saved: dict, settings: PatchSettings) -> None:
    """ValueError where the same matrices would say something else."""
    for name in ("lora_alpha", "use_rslora", "gate", "gate_per_layer"):
        value, own = saved[name], getattr(settings, name)
        if value != own:
            raise ValueError(
                f"{path} holds adapters with {name} {value!r}; the model is patched with {own!r}: "
                f"patch it with {name}={value!r}, or use ckf.load_patched"
            )


def _warn_of_others(model: nn.Module, layers: dict[str, MultiLoRALinear]) -> None:
    """Whoever trains more than adapters has to keep that himself."""
    own = {p for layer in layers.values() for s in (layer.lora_A, layer.lora_B) for p in s.values()}
    own.update(_gate_tensors(model).values())
    others = [n for n, p in model.named_parameters() if p.requires_grad and p not in own]
    if others:
        shown = ", ".join(others[:4]) + f" and {len(others) - 4} more" * (len(others) > 4)
        warnings.warn(
            f"{shown} can train but belong to no adapter and are not saved here: save them "
            "yourself, from model.state_dict() for example, and load them into the model that you "
            "give to ckf.load_patched",
            stacklevel=3,
        )


def _gate_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if "ckf_gate" in n.split(".")}
