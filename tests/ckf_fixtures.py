"""A whole small run, made on the spot: tokenizer, random Llama, ratings with reviews, one training.

Fixtures of session scope: everything is made once. Tests that change something copy the folder or
put back what they touched.
"""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

USERS, ITEMS, ROWS_PER_USER = 30, 40, 16
TASKS = ("ctr", "topk", "rating", "explain", "review_rating")
STEPS = 8
_LOVED = ("I love this {}, it sounds great.", "A wonderful {} that I recommend to all.")
_HATED = ("I hate this {}, it sounds awful.", "A boring {} that I recommend to nobody.")
_KINDS = ("album", "record")


def make_tokenizer(special=("<pad>", "<eos>"), split_digits=False, merges=True):
    """Byte-level BPE whose answers are single tokens: ' Yes', ' No', ' A' to ' Z', ' 1' to ' 5'.

    split_digits: ' 1' is two tokens, a space and a digit. merges False: bytes only.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from ckf.prompts import ANSWERS, TEMPLATES

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.BPE())
    parts = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    if split_digits:
        parts.insert(0, pre_tokenizers.Digits(individual_digits=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600 if merges else len(alphabet) + len(special),
        special_tokens=list(special),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    answers = " ".join(word for words in ANSWERS.values() for word in words)
    reviews = [text.format(kind) for text in _LOVED + _HATED for kind in _KINDS]
    texts = [f" {answers}"] * 9 + [*TEMPLATES.values()] * 3 + reviews
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def save_model(folder: Path) -> Path:
    """A random two-layer Llama and its tokenizer, as ``from_pretrained`` reads them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_ratings(folder: Path) -> Path:
    """ratings.csv: two groups of users who love and hate two groups of items, with reviews."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "ratings.csv", "w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow(["customer", "sku", "stars", "when", "review", "name"])
        for user in range(USERS):
            times = 1_000_000 + 100 * np.sort(rng.integers(0, 60, ROWS_PER_USER))
            for item, time in zip(rng.permutation(ITEMS)[:ROWS_PER_USER], times, strict=True):
                loved = (user + item) % 2 == 0
                stars = int(rng.integers(4, 6) if loved else rng.integers(1, 4))
                text = (_LOVED if loved else _HATED)[int(rng.integers(2))]
                text = text.format(_KINDS[int(rng.integers(2))])
                out.writerow([f"u{user}", f"i{item}", stars, time, text, title(int(item))])
    return folder


def title(item: int) -> str:
    """The title of item "i<item>"."""
    return f"Title {97 - item}"


def settings(model: Path, **changes) -> dict:
    """Settings of the small run; ``changes`` name settings as ``train__steps=3``."""
    values = {
        "name": "small",
        "data": {
            "name": "made-up",
            "format": "table",
            "columns": {
                "user": "customer",
                "item": "sku",
                "rating": "stars",
                "time": "when",
                "text": "review",
                "title": "name",
            },
            "history": 6,
            "split": {"kind": "per_user_time", "valid": 0.1, "test": 0.2},
        },
        "model": {"name": str(model)},
        "tasks": {
            "ctr": {"train": 80, "valid": 10, "test": 40},
            "topk": {"train": 40, "valid": 10, "test": 12},
            "rating": {"train": 40, "valid": 10, "test": 20},
            "explain": {"train": 40, "valid": 10, "test": 8},
            "review_rating": {"train": 40, "valid": 10, "test": 12},
        },
        "cf": {"kind": "mf", "dim": 4, "epochs": 8},
        "lora": {"r": 2, "lora_alpha": 8, "lora_dropout": 0.1},
        "metanet": {"hidden": 8},
        "prompt": {"history_titles": 3, "max_tokens": 200, "max_answer_tokens": 12},
        "train": {
            "steps": STEPS,
            "batch_size": 10,
            "lr": 2e-2,
            "vector_lr": 2e-2,
            "save_every": 4,
            "log_every": 1,
        },
        "evaluate": {"bootstrap": 20, "batch_tokens": 2000},
    }
    for key, value in changes.items():
        *groups, last = key.split("__")
        inner = values
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[last] = value
    return values


def small_config(model: Path, **changes):
    """A checked RunConfig."""
    from ckf.config_files import config_from_dict

    return config_from_dict(settings(model, **changes))


def quiet(_line: str) -> None:
    """A log that keeps nothing."""


def randomise(model, seed: int = 3) -> None:
    """Every adapter and every map as after training: nothing is zero, users differ."""
    from tests.tiny import randomise_adapters

    randomise_adapters(model.backbone, seed, scale=0.2)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.metanet.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def read_log(folder: Path) -> list[dict]:
    """The lines of a run's train_log.jsonl."""
    return [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def tokenizer():
    """The small model's tokenizer."""
    return make_tokenizer()


@pytest.fixture(scope="session")
def small_model(tmp_path_factory) -> Path:
    """Folder of the random model and its tokenizer."""
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def raw_data(tmp_path_factory) -> Path:
    """Folder of the raw ratings."""
    return write_ratings(tmp_path_factory.mktemp("raw"))


@pytest.fixture(scope="session")
def small_run(small_model, raw_data, tmp_path_factory):
    """The run just trained and evaluated; the raw data it was made from are gone."""
    from ckf.run import train_run

    gone = Path(shutil.copytree(raw_data, tmp_path_factory.mktemp("gone") / "raw"))
    folder = tmp_path_factory.mktemp("runs") / "small"
    run = train_run(small_config(small_model), folder, str(gone), device="cpu", log=quiet)
    shutil.rmtree(gone)
    run.evaluate(quiet)
    return run


@pytest.fixture(scope="session")
def small_metrics(small_run) -> dict:
    """metrics.json of the small run."""
    return json.loads((small_run.folder / "metrics.json").read_text())


@pytest.fixture(scope="session")
def prepared(small_run) -> Path:
    """The small run's prepared data, for runs with other settings."""
    return small_run.folder / "data"


@pytest.fixture
def run_copy(small_run, tmp_path) -> Path:
    """A copy of the small run's folder that a test may spoil."""
    return Path(shutil.copytree(small_run.folder, tmp_path / "copy"))


@pytest.fixture(scope="session")
def assembly(small_run):
    """The small run's parts with random adapters and maps, in eval mode. Not to be changed."""
    from ckf.assembly import assemble

    trained = small_run.assembly
    made = assemble(trained.config, trained.data, trained.vectors, torch.device("cpu"))
    randomise(made.model)
    made.model.eval()
    return made


@pytest.fixture(scope="session")
def mixed(assembly):
    """Two train examples of each task, of many users, rows of one task apart from each other."""
    maker = assembly.maker
    found = {task: maker.examples(task, "train") for task in TASKS}
    places = [(task, 5 + 3 * t + 20 * k) for k in (0, 1) for t, task in enumerate(TASKS)]
    return [found[task][place] for task, place in places]
