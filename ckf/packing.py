"""Rows packed into one sequence must not see each other: what a forward pass can know beforehand.

Positions that start anew tell packed rows apart. The eager, sdpa and flex attention of transformers
honour them only where no attention_mask is given and no cache is in use, flash attention only in
batches of one sequence, and some models (OPT) never. ``ckf.packed_attention`` is told the rows.
Everything here is known on the host: shapes, flags, packing arguments, and positions that lie on
the host; nothing is copied from a device.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ckf.packed_attention import (
    PACKED_ATTENTION,
    PackedRows,
    attends_packed,
    can_attend_packed,
    missing_windows,
)

_BORDERS = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")  # arguments that only packed rows have


class PackingCheck:
    """Looks at the arguments of every forward pass of one model."""

    def __init__(self) -> None:
        self._right: dict[str, bool] = {}  # by attention implementation
        self.resting = False

    def __call__(self, model: nn.Module, inputs: Mapping[str, object], task_ids: object) -> None:
        """ValueError where packed rows would see each other.

        Args:
            inputs: the arguments of the forward pass by name.
            task_ids: as given; one a token where packed.
        """
        positions, mask = inputs.get("position_ids"), inputs.get("attention_mask")
        if torch.compiler.is_compiling() or self.resting or not isinstance(model, PreTrainedModel):
            return
        implementation = str(model.config._attn_implementation)
        if inputs.get("packed_rows") is not None:
            _check_packed_rows(model, inputs)
            self._check_model(model, implementation)
            return
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
            return  # a mask of every pair: the caller keeps rows apart
        if not packed(inputs):
            _refuse_unread(model, positions, mask, inputs, task_ids)
            return
        if mask is not None:
            _refuse("an attention_mask is given", "leave it out, the position_ids tell rows apart")
        if _caches(model, inputs):
            _refuse("the forward pass keeps a key-value cache", "pass use_cache=False")
        batch = next(v.shape[0] for v in inputs.values() if isinstance(v, Tensor) and v.dim() > 1)
        if "flash" in implementation and batch > 1 and inputs.get("cu_seq_lens_q") is None:
            _refuse(
                f"{implementation} was given {batch} packed sequences",
                "pack all rows into one sequence, or pass cu_seq_lens_q, cu_seq_lens_k, "
                "max_length_q and max_length_k",
            )
        self._check_model(model, implementation)

    def _check_model(self, model: nn.Module, implementation: str) -> None:
        """Tried out once; not on sharded parameters, whose ranks would have to try together."""
        if implementation not in self._right:
            self._right[implementation] = True  # no trial within the trial
            if not any(isinstance(p, DTensor) for p in model.parameters()):
                self._right[implementation] = _try_packing(model)
        if not self._right[implementation]:
            _refuse(
                f"{type(model).__name__} with {implementation} attention does not keep them apart",
                "pad the rows instead, one a sequence",
            )


def packed(inputs: Mapping[str, object]) -> bool:
    """Whether the arguments show on the host that a sequence holds several rows."""
    if any(inputs.get(name) is not None for name in _BORDERS):
        return True
    positions, mask = inputs.get("position_ids"), inputs.get("attention_mask")
    if not isinstance(positions, Tensor) or positions.device.type != "cpu":
        return False
    if positions.dim() != 2 or positions.shape[1] < 2:
        return False
    restarts = positions[:, 1:] <= positions[:, :-1]
    if isinstance(mask, Tensor):  # padding may have any position
        if mask.device.type != "cpu":
            return False
        attended = mask[:, -positions.shape[1] :].bool()
        restarts = restarts & attended[:, 1:] & attended[:, :-1]
    return bool(restarts.any())


@torch.no_grad()
def packs_rows_right(model: PreTrainedModel, tolerance: float = 1e-2) -> bool:
    """Whether two rows in one sequence give what each gives alone: not so for every family."""
    told = attends_packed(model)
    if told and not can_attend_packed(model):
        return False
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, max(4, vocabulary), (1, 15), generator=generator).to(model.device)
    lengths = (7, 8)
    positions = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0).to(model.device)
    rows = {"packed_rows": replace(PackedRows.of(lengths), windows=[])} if told else {}

    def run(tokens: Tensor, **options) -> Tensor:
        embeds = model.get_input_embeddings()(tokens)
        tasks = torch.full(tokens.shape, -1)
        outputs = model(inputs_embeds=embeds, use_cache=False, task_ids=tasks, **options)
        return outputs.logits.float()

    with _trial(model):
        together = run(ids, position_ids=positions, **rows)
        if told and missing_windows(model, rows["packed_rows"].windows):
            return False
        other = torch.cat([ids[:, : lengths[0]].flip(1), ids[:, lengths[0] :]], dim=1)
        beside = run(other, position_ids=positions, **rows)[:, lengths[0] :]
        with _attending(model, "sdpa") if told else nullcontext():
            alone = torch.cat([run(part) for part in ids.split(lengths, dim=1)], dim=1)
    wide = model.dtype != torch.float32
    error = (together - alone).abs().max() / alone.abs().max()
    leak = (together[:, lengths[0] :] - beside).abs().max() / alone.abs().max()
    return bool(error < tolerance * (5 if wide else 1) and leak < (3e-2 if wide else 1e-5))


@contextmanager
def _attending(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    """The model with another attention implementation."""
    own = model.config._attn_implementation
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(own)


def attend_packed(model: PreTrainedModel) -> bool:
    """Let packed rows attend within themselves at the cost of rows apart, where the model can.

    Afterwards its attention is "ckf_packed" and this returns True, or all is as before.
    """
    if not can_attend_packed(model):
        return False
    before, right = model.config._attn_implementation, False
    try:
        model.set_attn_implementation(PACKED_ATTENTION)
        right = attends_packed(model) and packs_rows_right(model)  # not every family switches
    except Exception:  # a model that does not hand arguments on, or more than attention knows
        right = False
    if not right:
        model.set_attn_implementation(before)
    return right


def _check_packed_rows(model: nn.Module, inputs: Mapping[str, object]) -> None:
    implementation, mask = model.config._attn_implementation, inputs.get("attention_mask")
    if not attends_packed(model):
        _refuse(
            f"packed_rows was given to {implementation} attention, which does not know it",
            f'call model.set_attn_implementation("{PACKED_ATTENTION}")',
        )
    if mask is not None and not (isinstance(mask, Tensor) and mask.numel() == 1):
        _refuse("an attention_mask is given beside packed_rows", "leave it out")
    if _caches(model, inputs):
        _refuse("the forward pass keeps a key-value cache", "pass use_cache=False")
    if inputs.get("token_type_ids") is not None:  # some models attend both ways in a prefix
        _refuse("token_type_ids are given beside packed_rows", "leave them out, or pad the rows")


def _try_packing(model: PreTrainedModel) -> bool:
    try:
        return packs_rows_right(model)
    except Exception as error:  # a model may need more than tokens
        warnings.warn(
            f"{type(model).__name__}: whether it keeps packed rows apart was not found out "
            f"({error}); ckf.packing.packs_rows_right(model) tries it",
            stacklevel=2,
        )
        return True


@contextmanager
def _trial(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, its own check at rest."""
    check = getattr(model.forward, "check_packing", PackingCheck())
    training = [m for m in model.modules() if m.training]
    model.eval()
    check.resting = True
    try:
        yield
    finally:
        check.resting = False
        for module in training:
            module.training = True


def _caches(model: nn.Module, inputs: Mapping[str, object]) -> bool:
    asked = inputs.get("use_cache")
    if asked is None:
        asked = getattr(model.config, "use_cache", False)
    return bool(asked) or given_cache(inputs) is not None


def given_cache(named: Mapping[str, object]) -> object | None:
    """The key-value cache among a call's arguments; transformers from 5.24 calls it ``cache``."""
    return next((named[n] for n in ("cache", "past_key_values") if named.get(n) is not None), None)


def _refuse_unread(model, positions, mask, inputs, task_ids) -> None:
    """Training on positions that lie on a device: a cache helps nobody and could mix rows."""
    per_token = isinstance(task_ids, Tensor) and task_ids.dim() == 2 and task_ids.shape[1] > 1
    unread = isinstance(positions, Tensor) and positions.device.type != "cpu"
    training = model.training and torch.is_grad_enabled()
    if per_token and unread and training and mask is None and _caches(model, inputs):
        _refuse(
            "training got position_ids on a device, a task a token and a key-value cache",
            "pass use_cache=False",
        )


def _refuse(found: str, fix: str) -> None:
    raise ValueError(f"rows packed into one sequence would see each other: {found}; {fix}")
