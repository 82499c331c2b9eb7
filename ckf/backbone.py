"""Loading the language model: by Hugging Face name, folder, GGUF file, or a known download."""

import os
import struct
import tempfile
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ckf.config import ModelConfig

KNOWN_DOWNLOADS = ("smollm2-135m",)
# Of files that are missing, damaged (struct.error, IndexError: a GGUF file cut short) or unknown.
READ_ERRORS = (OSError, ImportError, LookupError, ValueError, SafetensorError, struct.error)


def pick_device(device: str | None = None) -> torch.device:
    """The device asked for, else a GPU where there is one."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device is {device!r}; expected cpu, cuda or cuda:NUMBER") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda was asked for, but torch sees no GPU; use --device cpu")
    return chosen


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU and float32 on a CPU for "auto", else the dtype named."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)


def load_backbone(
    config: ModelConfig, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The frozen model in eval mode and its tokenizer.

    Raises:
        ValueError: no such model, with what was tried.
    """
    folder, options = locate_model(config.name)
    dtype = pick_dtype(config.dtype, device)
    try:
        if config.name in KNOWN_DOWNLOADS and options:
            folder, options = unpacked(Path(folder), options)
        model, tokenizer = _load(folder, options, dtype)
    except READ_ERRORS as error:
        raise ValueError(
            f"cannot load the model {config.name!r} from {folder}: {error}\n"
            "Give model.name as a Hugging Face name that can be reached, a folder with "
            f"config.json, a .gguf file, or one of {', '.join(KNOWN_DOWNLOADS)}"
        ) from error
    return model.to(device).eval().requires_grad_(False), tokenizer


def _load(folder: str | Path, options: dict, dtype: torch.dtype):
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
    _forget_file_format(model)
    return model, tokenizer


def unpacked(folder: Path, options: dict) -> tuple[str, dict]:
    """A download's GGUF file as float32 safetensors beside it, made at the first call.

    The same numbers and tokens; transformers reads the folder in less than a second and the file in
    half a minute. Where the folder cannot be written, the file as before, with a warning.

    Args:
        folder, options: of ``locate_model``.
    """
    target = folder / "float32"
    if not (target / "config.json").is_file():
        try:
            with tempfile.TemporaryDirectory(prefix=".unpack-", dir=folder) as temporary:
                ready = Path(temporary) / "ready"
                for part in _load(folder, options, torch.float32):
                    part.save_pretrained(ready)
                if target.exists():  # without its config: of no use
                    os.replace(target, Path(temporary) / "broken")
                os.replace(ready, target)
        except OSError as error:
            if not (target / "config.json").is_file():  # else another process was faster
                warnings.warn(
                    f"{folder} cannot keep the model unpacked ({error}), so each start takes half "
                    "a minute; free 600 MB there, or set CKF_CACHE to a folder that can be written",
                    stacklevel=2,
                )
                return str(folder), options
    return str(target), {}


@torch.no_grad()
def check_reads_embeddings(model: PreTrainedModel) -> None:
    """Try whether a model answers embeddings in a padded batch as it answers tokens alone.

    Prompts are given that way. Some models look tokens up a second time, scale embeddings only
    where they made them, or do not skip padding.

    Raises:
        ValueError: its logits differ, or it does not take such a batch.
    """
    embedding, was_training = model.get_input_embeddings(), model.training
    ids = 1 + torch.arange(14, device=model.device) * 7919 % (len(embedding.weight) - 1)
    long, short = ids[:9].unsqueeze(0), ids[9:].unsqueeze(0)
    column = torch.arange(9, device=model.device).expand(2, -1)
    pad = torch.tensor([[0], [4]], device=model.device)
    tokens = torch.cat([long, torch.cat([ids[:4].unsqueeze(0), short], 1)])
    try:
        model.eval()
        alone = [model(input_ids=row, use_cache=False).logits[0, -1:] for row in (long, short)]
        found = model(
            inputs_embeds=embedding(tokens),
            attention_mask=(column >= pad).long(),
            position_ids=(column - pad).clamp(min=0),
            logits_to_keep=column[0, 8:],
            use_cache=False,
        ).logits
    except TypeError as error:
        raise ValueError(f"{type(model).__name__} cannot be given prompts: {error}") from error
    finally:
        model.train(was_training)
    expected = torch.stack(alone).float()
    same = found.shape == expected.shape
    off = (found - expected).abs().max() / expected.abs().max() if same else torch.inf
    if not off <= (0.02 if found.dtype == torch.float32 else 0.1):
        raise ValueError(
            f"{type(model).__name__} answers embeddings in a padded batch otherwise than tokens "
            f"alone (off by {float(off):.2g} of the largest logit), so vectors cannot be written "
            "into its prompts; choose another model"
        )


def locate_model(name: str) -> tuple[str, dict]:
    """A model's folder or hub name, and what ``from_pretrained`` needs beside it.

    Fetches a known download. Raises ValueError for a file or folder that is not there.
    """
    path = Path(name)
    if name in KNOWN_DOWNLOADS and not path.exists():
        from ckf.data.fetch import fetch

        path = next(fetch(name).glob("*.gguf"))
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"model.name is {name!r}, but there is no such file")
        return str(path.parent), {"gguf_file": path.name}
    folder = path.expanduser()
    if folder.is_dir():
        return str(folder), {}
    if path.is_absolute() or name.startswith((".", "~")):
        raise ValueError(f"model.name is {name!r}, but there is no such folder")
    return name, {}


def _forget_file_format(model: PreTrainedModel) -> None:
    """A GGUF file's weights are plain tensors once loaded; Trainer and saving must know it."""
    config = getattr(model.config, "quantization_config", None)
    method = getattr(config, "quant_method", None)
    if "gguf" not in str(getattr(method, "value", method)).lower():
        return
    model.is_quantized = False
    for holder, name in (
        (model, "hf_quantizer"),
        (model, "quantization_method"),
        (model.config, "quantization_config"),
    ):
        if hasattr(holder, name):
            delattr(holder, name)
