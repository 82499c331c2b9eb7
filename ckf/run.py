"""A run is a folder: make one, train it, open it again, put questions to it.

config.yaml           resolved settings        cf.safetensors        CF vectors
data/                 prepared data            metanet.safetensors   meta-network
adapters/             LoRAs, PEFT format       checkpoints/          for resuming
train_log.jsonl       losses                   metrics.json          see ckf.evaluate
predictions/          Parquet per task         report.html           see ckf.report
"""

import datetime
import json
import os
import platform
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from transformers import set_seed

from ckf.assembly import Assembly, assemble
from ckf.backbone import locate_model, pick_device
from ckf.base_model import Base
from ckf.batches import expected_stars
from ckf.cf import CFVectors, fit_cf
from ckf.config import RunConfig
from ckf.data.prepared import PreparedData, load_prepared
from ckf.evaluate import evaluate_run, write_json
from ckf.processes import is_main_process, main_process_first
from ckf.prompts import Encoded, Question
from ckf.requests import Names
from ckf.run_checks import check_prompts, check_rows
from ckf.run_folder import (
    ABOUT,
    CONFIG,
    VECTORS,
    alone_in,
    opened_config,
    remove_run,
    run_folder,
    start_run,
    take_settings,
)
from ckf.scoring import Scorer
from ckf.train import load_trained, train
from ckf.weighing import check_weights, fit_weights

Log = Callable[[str], None]


@dataclass
class Run:
    """An open run: everything loaded, the model in eval mode."""

    folder: Path
    assembly: Assembly

    @property
    def config(self) -> RunConfig:
        return self.assembly.config

    def evaluate(self, log: Log = print, progress=None) -> dict:
        """Evaluate on the run's test rows; writes metrics.json and predictions/."""
        about = read_about(self.folder)
        return evaluate_run(self.assembly, self.folder, about, log, progress)

    def predict(self, requests: Sequence[dict]) -> list[dict]:
        """Answer requests of mixed tasks; scores of all of them come from one pass.

        A request is ``{"task": .., "user": raw id, "item": raw id}``; topk takes ``"candidates":
        [raw ids]`` instead of an item, review_rating a ``"review"``. ``"history"``, raw ids of last
        liked items, oldest first, replaces what the data knows of the user, and is needed for
        users it does not know. Without it the history is the user's last liked items in the data,
        of all splits, without those that are asked about; with ``"time"``, seconds, it is of
        earlier rows alone, as evaluation shows it.

        Returns:
            per request: ctr ``{"score", "probability"}`` (log-odds of a like, and the same as 0 to
            1), rating and review_rating ``{"rating"}`` (expected stars, 1 to 5), topk ``{"ranking":
            [raw ids, best first], "scores"}`` (2 to 26 candidates), explain ``{"text"}``.

        Raises:
            ValueError: an unknown task, user or item, or a missing field, naming the request.
        """
        if not isinstance(requests, list | tuple):
            raise ValueError(
                f"predict was given a {type(requests).__name__}; expected a list of requests"
            )
        questions, users, histories = self._questions(requests)
        replies: list[dict] = [{} for _ in requests]
        scorer = Scorer(self.assembly)
        scored = [i for i, q in enumerate(questions) if q.task != "explain"]
        written = [i for i, q in enumerate(questions) if q.task == "explain"]
        if scored:
            prompts = [self._encode(questions[i], i) for i in scored]
            logits = scorer.word_logits(prompts, users[scored], histories[scored])
            for i, values in zip(scored, logits, strict=True):
                replies[i] = self._reply(questions[i], values)
        if written:
            longest = self.config.prompt.max_answer_tokens
            chosen = [questions[i] for i in written]
            texts = scorer.texts(chosen, users[written], histories[written], longest)
            for i, text in zip(written, texts, strict=True):
                replies[i] = {"text": text}
        return replies

    @cached_property
    def _names(self) -> Names:
        return Names(self.assembly.data, self.assembly.tasks)

    def _encode(self, question: Question, number: int) -> Encoded:
        try:
            return self.assembly.batcher.encoder.encode(question, self.assembly.uses_vectors)
        except ValueError as error:
            raise ValueError(f"request {number}: {error}") from error

    def _reply(self, question: Question, values: np.ndarray) -> dict:
        if question.task == "ctr":
            score = float(values[0] - values[1])
            return {"score": score, "probability": float(1 / (1 + np.exp(-score)))}
        if question.task == "topk":
            scores = values[: len(question.candidates)]
            order = np.argsort(-scores, kind="stable")
            ids = self.assembly.data.item_ids
            ranking = [ids[question.candidates[o]] for o in order]
            return {"ranking": ranking, "scores": scores[order].tolist()}
        return {"rating": float(expected_stars(values))}

    def _questions(self, requests) -> tuple[list[Question], np.ndarray, np.ndarray]:
        book = self._names
        questions, users, histories = [], [], []
        for number, request in enumerate(requests):
            question, user, history = book.question(request, f"request {number}")
            if question.task == "topk" and self.assembly.maker.ranks_by_title:
                raise ValueError(
                    "this run ranks candidates by title likelihood, which predict() does not "
                    "offer; train with prompt.rank_by: letters"
                )
            questions.append(question)
            users.append(user)
            histories.append(history)
        return questions, np.array(users, np.int64), np.array(histories, np.int64)


def load_run(
    folder: str | Path,
    device: str | None = None,
    model: str | None = None,
    overrides: Sequence[str] = (),
) -> Run:
    """Open a finished run from its folder alone.

    Args:
        model: where its language model lies by now, or another name of it.
        overrides: ``evaluate.key=value``, such as a smaller ``evaluate.batch_tokens``.

    Raises:
        ValueError: no run there, files that are missing or do not fit, or a setting that a finished
            run has for good.
    """
    folder = run_folder(folder)
    if not (folder / ABOUT).is_file():
        raise ValueError(
            f"{folder} was not trained to the end; go on with: ckf train {folder}/{CONFIG}"
        )
    config = opened_config(folder, overrides)
    if model is not None:
        config = replace(config, model=replace(config.model, name=model))
    config = with_absolute_model(config)
    try:
        locate_model(config.model.name)
    except ValueError as error:
        raise ValueError(
            f"{error}; where the run's model lies elsewhere, say so: --model FOLDER, or "
            "load_run(..., model=FOLDER)"
        ) from error
    data = load_prepared(folder / "data")
    vectors = _read_vectors(folder / VECTORS)
    assembly = assemble(config, data, vectors, pick_device(device))
    load_trained(assembly, folder)
    _take_weights(assembly, folder)
    assembly.forget_held_out()
    assembly.model.eval()
    return Run(folder, assembly)


# Random numbers, and what transformers and accelerate keep, belong to the process: two trainings at
# once would reset each other's.
_TRAINING = threading.RLock()


def train_run(
    config: RunConfig,
    folder: str | Path,
    data_path: str | None = None,
    prepared: str | None = None,
    device: str | None = None,
    overwrite: bool = False,
    log: Log = print,
) -> Run:
    """Prepare, fit CF vectors, train; goes on where an earlier call with the same settings ended.

    Calls from several threads run one after the other.

    Args:
        folder: the run's folder, made where it is missing.
        data_path: raw data, instead of ``config.data.path``.
        prepared: a folder made by ``ckf prepare``, instead of raw data.
        overwrite: remove what the folder holds first, if it is a run.

    Raises:
        ValueError: the folder holds another run or other files, or anything wrong with settings
            or data.
    """
    with _TRAINING:
        folder, chosen = Path(folder), pick_device(device)
        config = with_absolute_model(config)
        locate_model(config.model.name)  # a wrong name shall not wait for the data
        if overwrite and is_main_process():
            remove_run(folder)
        with main_process_first(chosen):
            take_settings(config, folder, log)
            made = start_run(config, folder, "give another --out, or --overwrite to remove it")
            set_seed(config.seed)
            try:
                data = _data_of(config, folder, data_path, prepared, log)
            except Exception:
                if made:  # mended settings shall not meet what is left of the wrong ones
                    shutil.rmtree(folder)
                raise
            base = Base(chosen, log)
            vectors, seconds = _vectors_of(config, folder, data, base, log)
        set_seed(config.seed)
        assembly = assemble(config, data, vectors, chosen, base.loaded(config))
        return train_or_load(assembly, folder, chosen, seconds, log)


def train_or_load(
    assembly: Assembly, folder: Path, device: torch.device, seconds: dict, log: Log = print
) -> Run:
    """The trained run of a folder: trained to the end where it is not yet, else read."""
    trainable = sum(p.numel() for p in assembly.model.parameters() if p.requires_grad)
    log(f"training {trainable:,} parameters on {device}, {_sizes(assembly)}")
    if (folder / ABOUT).is_file():  # written last
        log(f"{folder} is trained already; --overwrite trains it anew")
        load_trained(assembly, folder)
    else:
        check_prompts(assembly)
        with alone_in(folder):
            seconds["train"] = train(assembly, folder, device)["seconds"]
        with main_process_first(device):  # the others read what it writes
            if is_main_process():
                weights = _fit_weights(assembly, seconds, log)
                about = _about(assembly.config, assembly, device, trainable, seconds, weights)
                write_json(about, folder / ABOUT)
    _take_weights(assembly, folder)
    assembly.forget_held_out()
    assembly.model.eval()
    return Run(folder, assembly)


def _fit_weights(assembly: Assembly, seconds: dict, log: Log) -> dict[str, float]:
    if assembly.batcher.collator.prior is None:
        return {}
    log("weighing the language model against the prior on valid rows")
    start = time.perf_counter()
    weights = fit_weights(assembly)
    seconds["weigh"] = round(time.perf_counter() - start, 1)
    return weights


def _take_weights(assembly: Assembly, folder: Path) -> None:
    """Count the language model beside its prior as the run says."""
    about = read_about(folder)
    try:
        weights = check_weights(about.get("weights", {}))
    except ValueError as error:
        raise ValueError(f"{folder / ABOUT} has {error}; train the run again") from error
    assembly.weights = weights if assembly.config.evaluate.weigh else {}


def with_absolute_model(config: RunConfig) -> RunConfig:
    """A model in a folder or file by its full path, so that the run opens from anywhere."""
    path = Path(config.model.name).expanduser()
    if not path.exists():
        return config
    return replace(config, model=replace(config.model, name=str(path.resolve())))


def _data_of(config: RunConfig, folder: Path, path, prepared, log: Log) -> PreparedData:
    target = folder / "data"
    if prepared is not None and not target.exists():
        load_prepared(prepared)
        part = folder / "data.part"
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(prepared, part)
        os.rename(part, target)
    if prepared is not None or (target.exists() and path is None):  # a run goes on from its folder
        data = load_prepared(target)
    else:
        from ckf.data.prepare import prepare

        data = prepare(config.data, config.tasks, path, target, config.seed, log)
    check_rows(config, data)
    return data


def _vectors_of(config: RunConfig, folder: Path, data: PreparedData, base: Base, log: Log):
    file = folder / VECTORS
    if file.exists():
        return _read_vectors(file), {}
    start = datetime.datetime.now()
    titles = base.titles(config, data) if config.cf.titles else None
    log(f"fitting CF vectors ({config.cf.kind})")
    vectors = fit_cf(replace(config.cf, seed=config.seed), data, log, titles)
    temporary = file.with_name(file.name + ".part")
    vectors.save(temporary)
    temporary.replace(file)
    vectors = _read_vectors(file)  # large tables stay there
    return vectors, {"cf": round((datetime.datetime.now() - start).total_seconds(), 1)}


def _read_vectors(file: Path) -> CFVectors:
    try:
        return CFVectors.load(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} is missing or damaged ({error}); train the run again") from error


def _sizes(assembly: Assembly) -> str:
    rows = assembly.data.rows
    return ", ".join(f"{len(rows(t, 'train'))} {t} rows" for t in assembly.tasks)


def _about(
    config: RunConfig, assembly: Assembly, device, trainable: int, seconds: dict, weights: dict
) -> dict:
    now = datetime.datetime.now(datetime.UTC)
    rows = assembly.data.rows
    return {
        "name": config.name,
        "created": now.isoformat(timespec="seconds"),
        "seed": config.seed,
        "model": config.model.name,
        "data": config.data.name,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else str(device),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "trainable_parameters": trainable,
        "packed": assembly.packed,
        "weights": weights,
        "seconds": seconds,
        "rows": {s: {t: len(rows(t, s)) for t in assembly.tasks} for s in ("train", "test")},
    }


def read_about(folder: Path) -> dict:
    """What a finished run says of itself; ValueError where it was not trained to the end."""
    try:
        about = json.loads((folder / ABOUT).read_text())
        if not isinstance(about, dict):
            raise ValueError(f"it holds a {type(about).__name__}")
        return about
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder / ABOUT} is missing or broken ({error}); train the run again"
        ) from error
