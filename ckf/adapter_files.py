"""Files of adapters: PEFT's names, safetensors only, written whole or not at all, read inside one
folder.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.pytorch_utils import Conv1D

from ckf.layers import MultiLoRALinear

PREFIX = "base_model.model."
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PLAIN_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def key(layer: str, side: str) -> str:
    """PEFT's name of one matrix; ``side`` is "lora_A" or "lora_B". Compiled modules count as what
    they wrap."""
    return f"{PREFIX}{layer.replace('_orig_mod.', '')}.{side}.weight"


def matrices(layers: dict[str, MultiLoRALinear], expert: str) -> dict[str, nn.Parameter]:
    """Every A and B of one adapter, by PEFT's names."""
    return {
        key(name, side): parameters[expert]
        for name, layer in layers.items()
        if expert in layer.experts
        for side, parameters in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B))
    }


def peft_config(model: nn.Module, layers: dict[str, MultiLoRALinear], **settings) -> dict:
    """A PEFT LoraConfig as a dict; suffixes as targets where they select exactly ``layers``."""
    suffixes = sorted({n.rsplit(".", 1)[-1] for n in layers})
    selected = {
        n for n, m in model.named_modules()
        if n.rsplit(".", 1)[-1] in suffixes and isinstance(m, MultiLoRALinear | nn.Linear | Conv1D)
    }  # fmt: skip
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name(model),
        "target_modules": suffixes if selected == set(layers) else list(layers),
        "fan_in_fan_out": any(isinstance(m.base_layer, Conv1D) for m in layers.values()),
        "bias": "none",
        "inference_mode": True,
        **settings,
    }


def base_name(model: nn.Module) -> str | None:
    """The name or folder that the base model was loaded from, where it is known."""
    return getattr(getattr(model, "config", None), "_name_or_path", None) or None


def write_adapter(folder: Path, config: dict, tensors: dict[str, Tensor]) -> None:
    """One PEFT adapter into ``folder``."""
    folder.mkdir(exist_ok=True)
    write_tensors(tensors, folder / WEIGHTS_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")


def write_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """Copies on the host, so that views and shared storage do not matter."""
    copies = {k: t.detach().cpu().contiguous().clone() for k, t in tensors.items()}
    save_file(copies, file, metadata={"format": "pt"})


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself; of a sharded one (FSDP2, tensor parallel) all of it, on every rank.

    Raises ValueError for a tensor without values (meta device).
    """
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    if tensor.is_meta:
        raise ValueError(
            "the adapters are on the meta device and have no values yet: give them memory with "
            'model.to_empty(device="cpu") and ckf.reset_adapters(model), or load them'
        )
    return tensor


def writes_here(tensors) -> bool:
    """Whether this process writes: every rank gathers sharded tensors, and rank 0 writes."""
    sharded = any(isinstance(t, DTensor) for t in tensors)
    return not sharded or torch.distributed.get_rank() == 0


def read_tensors(file: Path, root: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file under ``root``, on the CPU.

    Raises:
        ValueError: no such file, another format, or a link that leads out of ``root``.
    """
    with _readable(file, root):
        return load_file(file)


def check_rank(file: Path, root: Path, rank: int) -> None:
    """ValueError unless some A in the file, whose sizes are real, has this rank."""
    with _readable(file, root), safe_open(file, framework="pt") as tensors:
        shapes = [tensors.get_slice(k).get_shape() for k in tensors.keys() if ".lora_A." in k]
    if not any(shape[:1] == [rank] for shape in shapes):
        raise ValueError(f"{file} has no A of rank {rank}, which {root} says; save it again")


@contextmanager
def _readable(file: Path, root: Path) -> Iterator[None]:
    """Reading a safetensors file under ``root``; its errors become ValueError."""
    check_inside(file, root)
    try:
        yield
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        pickled = file.with_suffix(".bin")
        hint = (
            f"{pickled.name} is a pickle, which ckf never reads: load it with PEFT and save it "
            "with safe_serialization=True"
            if pickled.exists()
            else "save the adapters again"
        )
        raise ValueError(f"{file} is not a readable safetensors file ({error}); {hint}") from error


def read_json(file: Path, root: Path, expected: str) -> dict:
    """A JSON object from a file under ``root``; ValueError with what was ``expected`` there."""
    check_inside(file, root)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"a {type(found).__name__}, no object")
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not readable ({error}); expected {expected}") from error
    return found


def check_inside(file: Path, root: Path) -> None:
    """ValueError when a name or a link leads out of ``root``, or to what is no ordinary file.

    The blobs of a hub's cache lie beside its snapshots and are linked to, so a snapshot counts with
    the cache folder of its own model.
    """
    try:
        resolved, place = root.resolve(), file.resolve()
        endless = place.exists() and not (place.is_file() or place.is_dir())
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle, names that are none
        raise ValueError(f"{file} cannot be found ({error}); give a folder of adapters") from error
    if resolved.parent.name == "snapshots":
        resolved = resolved.parent.parent
    if not place.is_relative_to(resolved):
        raise ValueError(
            f"{file} leads out of {root}, to {place}; adapters are read from their own folder "
            "only: put the file itself there"
        )
    if endless:
        raise ValueError(f"{file} is a pipe or a device, no file; put the file itself there")


def take(tensors: dict[str, Tensor], name: str, own: Tensor, file: Path) -> Tensor:
    """Remove and return a tensor that fits the parameter ``own``; ValueError when it does not."""
    if name not in tensors:
        raise ValueError(
            f"{file} lacks {name}; was the model patched with the same target_modules?"
        )
    tensor = tensors.pop(name)
    if tensor.shape != own.shape:
        raise ValueError(
            f"{file}: {name} has shape {tuple(tensor.shape)}; the model needs {tuple(own.shape)}: "
            "patch it with the ranks that were saved, or use ckf.load_patched"
        )
    if tensor.dtype not in PLAIN_DTYPES:
        raise ValueError(f"{file}: {name} is {tensor.dtype}; expected float16 to float64")
    return tensor


@torch.no_grad()
def copy_all(copies: list[tuple[Tensor, Tensor]]) -> None:
    """Copy each (parameter, tensor), sharding where the parameter is; all are checked before."""
    if any(own.is_meta for own, _ in copies):
        raise ValueError(
            "the model's adapters are on the meta device, where a copy is lost: give them memory "
            'first, with model.to_empty(device="cpu") for example'
        )
    for own, tensor in copies:
        if isinstance(own, DTensor):
            tensor = distribute_tensor(tensor.to(own.dtype), own.device_mesh, own.placements)
        own.copy_(tensor)


def adapter_files(expert: str) -> set[str]:
    """What ``write_adapter`` puts under a folder of adapters."""
    return {f"{expert}/{CONFIG_FILE}", f"{expert}/{WEIGHTS_FILE}"}


@contextmanager
def replacing(path: Path, mark: str, owned: set[str]) -> Iterator[Path]:
    """A temporary folder beside ``path`` that takes its place once all is written.

    Of what lies in ``path``, the files that are ``owned``, by their names under it, make room; all
    others come along.

    Raises:
        ValueError: ``path`` holds files, but none called ``mark``.
    """
    path = path.resolve()
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file; give a new or an empty folder")
    if path.exists() and any(path.iterdir()) and not (path / mark).exists():
        raise ValueError(f"{path} exists and holds other files; give a new or an empty folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    old = folder.with_name(folder.name + "-old")
    try:
        yield folder
        if path.exists():
            _bring_along(path, folder, owned)
        os.chmod(folder, 0o755)
        if path.exists():
            path.rename(old)
        folder.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _bring_along(path: Path, folder: Path, owned: set[str]) -> None:
    """What is not ``owned`` in ``path`` into ``folder`` too, by hard links where they can be."""

    def left_behind(here: str, names: list[str]) -> set[str]:
        inner = Path(here).relative_to(path)
        links = {n for n in names if (path / inner / n).is_symlink()}
        return {n for n in names if (inner / n).as_posix() in owned} | {
            n
            for n in links
            if (folder / inner / n).is_dir()  # its files were an adapter's
        }

    shutil.copytree(
        path, folder, symlinks=True, ignore=left_behind, copy_function=_link, dirs_exist_ok=True
    )
    for place in {(folder / name).parent for name in owned} - {folder}:
        if place.is_dir() and not any(place.iterdir()):  # of a task that is no more
            place.rmdir()


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # a file system without hard links
        if os.path.lexists(target):
            raise
        shutil.copy2(source, target, follow_symlinks=False)
