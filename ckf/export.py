"""One task as one ordinary LoRA, one ordinary LoRA as one adapter, or a task inside the weights."""

import math
import re
import shlex
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from transformers.pytorch_utils import Conv1D

from ckf import adapter_files as files
from ckf.layers import SHARED, MultiLoRALinear
from ckf.patch import PatchState, patch_state, patched_layers, unpatch_model

# Ranks that `vllm serve --max-lora-rank` takes; an adapter may have any rank up to the one given.
SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)

# Settings of a PEFT LoRA that change what it computes, and that a plain A and B cannot hold.
_UNSUPPORTED = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "megatron_config",
    "modules_to_save",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
)
_HIGHEST_RANK = 2**31  # no file holds more; integers of JSON have no limit
# Ways to draw the first A and B; any other one (PiSSA, OLoRA, ...) changes the base weights too.
_HARMLESS_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")


def export_peft(model: nn.Module, task: str, path: str | Path) -> int:
    """Write what one task uses as ONE ordinary PEFT LoRA, scalings and gates folded into B.

    Its rank is shared + task (with learned gates: all experts) everywhere, zero-padded where a
    layer has less; lora_alpha equals the rank, so that any LoRA server scales it by one. An adapter
    in ``path`` is replaced, other files beside it stay. Of a sharded model every rank must call
    this; rank 0 writes.

    Returns:
        The rank; a server needs room for it (``--max-lora-rank`` of vLLM, see ``serving_command``).

    Raises:
        ValueError: an unpatched model, an unknown task, or a folder with files but no adapter.
    """
    state, layers = patch_state(model), patched_layers(model)
    row = state.router.index(_known_task(state, task))
    learned = state.settings.gate == "learned"
    experts = [e for e in state.settings.experts if learned or e in (SHARED, task)]
    rank = sum(state.settings.rank(e) for e in experts)
    places = {n: layer for n, layer in layers.items() if set(layer.experts) & set(experts)}
    owned = [p for e in experts for p in files.matrices(places, e).values()]
    tensors: dict[str, Tensor] = {}
    for name, layer in places.items():
        a, b = _folded(layer, row, experts)
        pad = rank - a.shape[0]
        tensors[files.key(name, "lora_A")] = nn.functional.pad(a, (0, 0, 0, pad))
        tensors[files.key(name, "lora_B")] = nn.functional.pad(b, (0, pad))
    config = files.peft_config(
        model, places, r=rank, lora_alpha=rank, lora_dropout=0.0, use_rslora=False
    )
    if files.writes_here(owned):
        owned_files = {files.CONFIG_FILE, files.WEIGHTS_FILE}
        with files.replacing(Path(path), files.CONFIG_FILE, owned_files) as folder:
            files.write_adapter(folder, config, tensors)
    return rank


def serving_command(base: str | None, adapters: dict[str, Path], rank: int) -> str:
    """The vLLM command that serves exported tasks from one base: name, folder and highest rank.

    Rows of all tasks may then share a batch; a request names its task as the model.
    """
    room = next((r for r in SERVED_RANKS if r >= rank), None)
    if room is None:
        return f"rank {rank} is above what vLLM serves ({SERVED_RANKS[-1]}); use ckf.merge_task"
    modules = " ".join(shlex.quote(f"{task}={folder}") for task, folder in adapters.items())
    return (
        f"vllm serve {shlex.quote(base or 'BASE')} --enable-lora --max-lora-rank {room} "
        f"--max-loras {len(adapters)} --lora-modules {modules}"
    )


def import_peft(model: nn.Module, path: str | Path, adapter: str) -> None:
    """Read an ordinary PEFT LoRA into one adapter of a patched model: "shared" or a task's.

    The adapter then adds what PEFT would: differing scalings are folded into B, a lower rank is
    filled up with zero columns of B (A keeps its own values there, so that they can still train),
    and layers that the file does not name get a B of zero. Learned gates weigh it as they stand,
    and a task's is added to the shared one as ever: alone it counts where the shared B is zero.
    Everything is checked before anything is copied.

    Args:
        path: a folder with adapter_config.json and adapter_model.safetensors.
        adapter: "shared" or a task name.

    Raises:
        ValueError: an unknown adapter; a rank above the model's; layers that are not patched; or a
            LoRA of another kind (DoRA, biases, saved modules and so on), by its setting.
    """
    state, path = patch_state(model), Path(path)
    if adapter not in state.settings.experts:
        raise ValueError(
            f"adapter is {adapter!r}; this model has {', '.join(state.settings.experts)}"
        )
    file = path / files.CONFIG_FILE
    config = files.read_json(file, path, "a PEFT adapter's folder")
    _check_config(config, file)
    found = files.read_tensors(path / files.WEIGHTS_FILE, path)
    layers = {n: m for n, m in patched_layers(model).items() if adapter in m.experts}
    pairs = _pairs(found, layers, adapter, path / files.WEIGHTS_FILE)
    copies: list[tuple[Tensor, Tensor]] = []
    for name, layer in layers.items():
        own_a, own_b = layer.lora_A[adapter], layer.lora_B[adapter]
        whole_b = torch.zeros(own_b.shape, dtype=torch.float64)
        if name in pairs:
            a, b = pairs[name]
            rank, scaling = _scaling(config, name, file)
            _check_pair(name, a, b, rank, own_a, own_b, adapter, file)
            whole_b[:, :rank] = b.double() * (scaling / layer.scaling[adapter])
            whole_a = files.whole(own_a).cpu().double().clone()
            whole_a[:rank] = a.double()
            copies.append((own_a, whole_a))
        copies.append((own_b, whole_b))
    files.copy_all(copies)
    for layer in layers.values():
        layer.forget_decoding()


def merge_task(model: nn.Module, task: str) -> nn.Module:
    """Add one task's update to the frozen weights and take the patch out; other tasks are lost.

    With learned gates too: a task's gates are constants. The sum is rounded once, to the weight's
    dtype. The model is then a plain one: it knows no tasks, and most ignore ``task_ids``.

    Raises:
        ValueError: an unpatched model, an unknown task, or a base that cannot take it exactly
            (quantized, sharded, offloaded, or tied to another module); the model is unchanged.
    """
    state, layers = patch_state(model), patched_layers(model)
    row = state.router.index(_known_task(state, task))
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for name, layer in layers.items():
        _check_mergeable(name, layer, owners)
    with torch.no_grad():
        for layer in layers.values():
            weight = layer.base_layer.weight
            a, b = _folded(layer, row, layer.experts)
            delta = b.double() @ a.double()  # (n, k)
            delta = delta.t() if isinstance(layer.base_layer, Conv1D) else delta
            weight.copy_(weight.double() + delta)
    return unpatch_model(model)


def _folded(layer: MultiLoRALinear, row: int, experts) -> tuple[Tensor, Tensor]:
    """A (r, k) and B (n, r) over the ``experts`` present, gates of the task in ``row`` in B.

    A gate of zero selects nothing, also where A or B are not finite.
    """
    own = [e for e in layer.experts if e in experts]
    gates = layer.gates(layer.lora_A[own[0]].device)[row].detach()
    a, b = [], []
    for expert in own:
        gate = gates[layer.experts.index(expert)]
        a_e, b_e = files.whole(layer.lora_A[expert]), files.whole(layer.lora_B[expert])
        a.append(a_e if gate != 0 else torch.zeros_like(a_e))
        b.append((gate * b_e).to(b_e.dtype) if gate != 0 else torch.zeros_like(b_e))
    return torch.cat(a), torch.cat(b, dim=1)


def _check_mergeable(name: str, layer: MultiLoRALinear, owners: dict[int, list[str]]) -> None:
    weight = getattr(layer.base_layer, "weight", None)
    if is_parametrized(layer.base_layer):
        raise ValueError(
            f"{name} makes its weight anew at every call (torch.nn.utils.parametrize); remove that "
            "before a merge, or use ckf.export_peft"
        )
    if weight is None or hasattr(weight, "__tensor_flatten__") or weight.dim() != 2:
        raise ValueError(
            f"{name} has a quantized or sharded weight; a merge would lose precision: load the "
            "base unquantized, or use ckf.export_peft"
        )
    if weight.dtype not in files.PLAIN_DTYPES:
        raise ValueError(
            f"{name} has a quantized weight ({weight.dtype}); a merge would lose precision: load "
            "the base unquantized, or use ckf.export_peft"
        )
    if weight.is_meta:
        raise ValueError(
            f"{name} is offloaded or on the meta device; load the base onto the CPU to merge"
        )
    if len(owners[id(weight)]) > 1:
        raise ValueError(
            f"{name} shares its weight with {', '.join(owners[id(weight)])}; a merge would "
            "change them all: leave it out of target_modules, or use ckf.export_peft"
        )


def _known_task(state: PatchState, task: str) -> str:
    if not isinstance(task, str):
        raise ValueError(f"task is {task!r}; expected a name: {', '.join(state.settings.tasks)}")
    state.router.index(task)
    return task


def _check_config(config: dict, file: Path) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{file}: peft_type is {kind!r}; only LORA can be imported")
    set_ones = [name for name in _UNSUPPORTED if config.get(name)]
    if set_ones:
        raise ValueError(
            f"{file}: {set_ones[0]} is {config[set_ones[0]]!r}, which plain LoRA matrices cannot "
            "hold; merge that adapter into its base with PEFT and patch the merged model"
        )
    if config.get("bias", "none") != "none":
        raise ValueError(
            f"{file}: bias is {config['bias']!r}; expected 'none': trained biases belong to the "
            "base, so merge that adapter into its base with PEFT and patch the merged model"
        )
    start = config.get("init_lora_weights")
    if start not in _HARMLESS_STARTS:
        raise ValueError(
            f"{file}: init_lora_weights is {start!r}, which changes the base weights as well; save "
            "it from PEFT with path_initial_model_for_weight_conversion, as a plain LoRA"
        )
    if not isinstance(config.get("use_rslora"), bool | None):
        raise ValueError(
            f"{file}: use_rslora is {config['use_rslora']!r}; expected true or false: it decides "
            "the scaling"
        )
    if not isinstance(config.get("r"), int) or not isinstance(
        config.get("lora_alpha"), int | float
    ):
        raise ValueError(f"{file} lacks a whole number r and a number lora_alpha; not PEFT's file")


def _scaling(config: dict, name: str, file: Path) -> tuple[int, float]:
    """Rank and scaling of a layer: PEFT takes the first pattern that ends its name."""

    def patterned(key: str, default):
        try:
            for pattern, value in (config.get(key) or {}).items():
                if re.match(rf"(.*\.)?({pattern})$", name):
                    return value
        except (re.error, RecursionError, OverflowError, AttributeError) as error:
            raise ValueError(
                f"{file}: {key} is {config[key]!r} ({error}); expected a table of patterns"
            ) from error
        return default

    rank = patterned("rank_pattern", config["r"])
    alpha = patterned("alpha_pattern", config["lora_alpha"])
    numbers = isinstance(rank, int) and isinstance(alpha, int | float)
    if not numbers or not 0 < rank <= _HIGHEST_RANK or not abs(alpha) <= sys.float_info.max:
        raise ValueError(
            f"{file}: {name} has rank {rank!r} and lora_alpha {alpha!r}; expected a whole number "
            "above 0 and a finite number"
        )
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _pairs(
    found: dict[str, Tensor], layers: dict[str, MultiLoRALinear], adapter: str, file: Path
) -> dict[str, tuple[Tensor, Tensor]]:
    """(A, B) by layer; every tensor of the file must be one of them."""
    pairs, rest = {}, dict(found)
    for name in layers:
        sides = [rest.pop(files.key(name, side), None) for side in ("lora_A", "lora_B")]
        if all(t is not None for t in sides):
            pairs[name] = tuple(sides)
        elif any(t is not None for t in sides):
            raise ValueError(f"{file} has only one of lora_A and lora_B for {name}; save it again")
    embeddings = sorted(n for n in rest if ".lora_embedding_" in n)
    if embeddings:
        raise ValueError(
            f"{file} holds {embeddings[0].removeprefix(files.PREFIX)}: a LoRA on an embedding, and "
            "Multi-LoRA goes on linears only; merge that adapter into its base with PEFT and patch "
            "the merged model"
        )
    if rest:
        foreign = sorted({re.sub(r"\.lora_\w+(\.weight)?$", "", n) for n in rest})
        names = [n.removeprefix(files.PREFIX) for n in foreign]
        suffixes = sorted({n.rsplit(".", 1)[-1] for n in names})
        raise ValueError(
            f"{file} holds {names[0]} (in all {', '.join(suffixes)}), which carries no {adapter} "
            "LoRA in this model; patch linears of these names, with target_modules for example"
        )
    if not pairs:
        raise ValueError(f"{file} holds no LoRA matrices; expected keys like {files.PREFIX}...")
    return pairs


def _check_pair(name, a, b, rank, own_a, own_b, adapter: str, file: Path) -> None:
    for tensor, side, shape in (
        (a, "lora_A", (rank, own_a.shape[1])),
        (b, "lora_B", (own_b.shape[0], rank)),
    ):
        if tuple(tensor.shape) != shape or tensor.dtype not in files.PLAIN_DTYPES:
            raise ValueError(
                f"{file.parent}: {side} of {name} is {tensor.dtype} {tuple(tensor.shape)}; the "
                f"config and the model need floats {shape}"
            )
    if rank > own_a.shape[0]:
        fix = f"shared_r={rank}" if adapter == SHARED else f'tasks={{"{adapter}": {rank}, ...}}'
        raise ValueError(
            f"{file.parent}: {name} has rank {rank}; the model's {adapter} LoRA has "
            f"{own_a.shape[0]}: patch it with {fix}"
        )
