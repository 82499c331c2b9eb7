"""Training on ``transformers.Trainer``: mixed-task batches, curriculum, presence, resume."""

import json
import logging
import math
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from ckf.adapters import load_adapters, save_adapters
from ckf.assembly import Assembly
from ckf.batches import Example, is_drawn
from ckf.config import TrainConfig
from ckf.data.mixing import task_order
from ckf.halving import HalvedSteps
from ckf.layer_graphs import LayerGraphs, why_not_graphed
from ckf.liger import using_liger
from ckf.presence import TaskPresence
from ckf.processes import is_main_process, main_process_first, process_count

logger = logging.getLogger("ckf.train")

METANET_FILE = "metanet.safetensors"
ADAPTERS_FOLDER = "adapters"


def text_share(config: TrainConfig, progress: float) -> float:
    """Probability that a row is shown as text at a share ``progress`` of training.

    L = s L_text + (1 - s) L_vectors with s falling from 1 to 0 by a sigmoid; drawing each row as
    text with probability s has that expectation at half its cost.
    """
    if config.schedule == "joint":
        return 0.0
    z = config.curriculum_sharpness * (progress - config.curriculum_middle)
    return 1.0 / (1.0 + math.exp(min(50.0, max(-50.0, z))))


class TrainStream(Dataset):
    """The whole run as one list: entry p is row p % batch of step p // batch, whatever resumed.

    It travels to loader processes, so it holds what makes batches: arrays, and no model.
    """

    def __init__(self, assembly: Assembly) -> None:
        self.config, self.batcher = assembly.config, assembly.batcher
        self.tasks, self.uses_vectors = assembly.tasks, assembly.uses_vectors
        train = self.config.train
        self.per_step = train.batch_size * train.accumulation * process_count()
        self.rows = {t: assembly.maker.rows_and_places(t, "train") for t in self.tasks}
        sizes = {t: len(rows) for t, (rows, _) in self.rows.items()}
        empty = [t for t, size in sizes.items() if not size]
        if empty:
            raise ValueError(
                f"no train rows for {', '.join(empty)}; leave the task out of the config, or give "
                "data that has them"
            )
        batches = train.steps * train.accumulation * process_count()
        seed = self.config.seed
        order = task_order(sizes, train.batch_size, batches, train.temperature, seed)
        ids = {task: place for place, task in enumerate(self.tasks)}
        self.order = np.array([(ids[task], index) for task, index in order])  # (positions, 2)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, position: int) -> tuple[Example, bool]:
        """The example and whether it is shown in the vector form."""
        number, index = self.order[position].tolist()
        task = self.tasks[number]
        rows, places = self.rows[task]
        share = text_share(self.config.train, position / len(self.order))
        as_text = is_drawn(self.config.seed, position, share)
        return Example(
            task, int(rows[index]), int(places[index])
        ), self.uses_vectors and not as_text

    def collate(self, entries: list[tuple[Example, bool]]) -> dict:
        """Rows of one task next to each other, as one batch; the rows themselves as "entries"."""
        entries = sorted(entries, key=lambda e: self.tasks.index(e[0].task))
        batcher = self.batcher
        prompts = [batcher.encode(example, "train", vectors) for example, vectors in entries]
        examples = [example for example, _ in entries]
        seed, share = self.config.seed + 1, self.config.train.fold_share
        folded = np.array([is_drawn(seed, example.row, share) for example in examples])
        return batcher.batch(examples, prompts, folded) | {"entries": entries}


class CKFTrainer(HalvedSteps, Trainer):
    """Trainer whose checkpoints hold adapters, meta-network and optimizer, never the base."""

    def __init__(
        self, assembly: Assembly, stream: TrainStream, folder: Path, device, before: float = 0.0
    ) -> None:
        self.assembly, self.folder = assembly, folder
        self.graphs: LayerGraphs | None = None
        self.start = time.perf_counter() - before  # as if the run had never been stopped
        self.presence = TaskPresence(assembly.model.backbone)
        self._sums: dict[str, list] = defaultdict(list)
        self._tokens, self._since, self._waited = 0, time.perf_counter(), 0.0
        super().__init__(
            model=assembly.model,
            args=training_arguments(assembly.config, folder, device),
            train_dataset=stream,
            data_collator=stream.collate,
        )
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = False  # the loss is a mean over rows

    def _get_train_sampler(self, *_args):
        return SequentialSampler(self.train_dataset)

    def get_batch_samples(self, *args, **kwargs):
        """Trainer's, timed: what making and moving batches keeps the model waiting."""
        start = time.perf_counter()
        try:
            return super().get_batch_samples(*args, **kwargs)
        finally:
            self._waited += time.perf_counter() - start

    def create_optimizer(self, *_args):
        """LoRAs and meta-network with their own learning rates; absent tasks stay put."""
        if self.optimizer is None:
            train, model = self.assembly.config.train, self.assembly.model
            groups = _groups(model.backbone, train.lr, train.weight_decay)
            if model.metanet is not None:
                groups += _groups(model.metanet, train.vector_lr, train.weight_decay)
            # a LoRA per task is hundreds of small tensors: on a GPU one launch for many of them
            fused = next(model.backbone.parameters()).is_cuda or None  # None: as torch chooses
            self.optimizer = torch.optim.AdamW(groups, lr=train.lr, betas=(0.9, 0.99), fused=fused)
            self.presence.attach(self.optimizer)
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        self._sums["losses"].append(outputs["row_losses"])
        self._sums["tasks"].append(outputs["row_tasks"])
        self._tokens += inputs["input_ids"].numel()
        loss = outputs["loss"] * self.loss_share
        return (loss, outputs) if return_outputs else loss

    def _cut_smaller(self, rows: int, why: str) -> None:
        self.drop_graphs()  # parts of a batch are too small for them, and need their memory
        super()._cut_smaller(rows, why)

    def drop_graphs(self) -> None:
        """Decoder layers run as ever from here on."""
        if self.graphs is not None:
            self.graphs.remove()
            self.graphs = None

    def step_notes(self) -> tuple:
        """What a step that is undone has to take back."""
        return {k: list(v) for k, v in self._sums.items()}, self._tokens

    def set_step_notes(self, notes: tuple) -> None:
        sums, self._tokens = notes
        self._sums = defaultdict(list, {k: list(v) for k, v in sums.items()})

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Add the loss per task, the text share and the speed, and keep them as JSON lines."""
        if "loss" in logs:
            self._check_finite("the loss", torch.tensor(float(logs["loss"])))
        if "loss" in logs and self._sums["losses"]:
            logs |= self._task_losses()
            now = time.perf_counter()
            elapsed = max(now - self._since, 1e-9)
            logs["seconds"] = round(now - self.start, 1)
            logs["tokens_per_second"] = round(self._tokens / elapsed, 1)
            logs["data_wait"] = round(self._waited / elapsed, 4)  # share of the time
            progress = self.state.global_step / self.assembly.config.train.steps
            logs["text_share"] = round(text_share(self.assembly.config.train, progress), 4)
            self._tokens, self._since, self._waited = 0, now, 0.0
            line = {"step": self.state.global_step, **_named_learning_rate(logs)}
            if is_main_process():
                with open(self.folder / "train_log.jsonl", "a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
        super().log(logs, *args, **kwargs)

    def _task_losses(self) -> dict[str, float]:
        losses, tasks = torch.cat(self._sums.pop("losses")), torch.cat(self._sums.pop("tasks"))
        means = {}
        for index, name in enumerate(self.assembly.tasks):
            own = losses[tasks == index]
            if own.numel():
                means[f"loss/{name}"] = round(float(own.mean()), 4)
        return means

    def _check_finite(self, what: str, values: torch.Tensor) -> None:
        """NaN or infinity ends training with a message, before it reaches a log or a checkpoint."""
        if not bool(values.isfinite().all()):
            raise ValueError(
                f"{what} is not finite at step {self.state.global_step}; lower train.lr or "
                "train.vector_lr and train into another --out, or with --overwrite"
            )

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        for name, parameter in self.assembly.model.named_parameters():
            if parameter.requires_grad:
                self._check_finite(name, parameter.detach())
        if is_main_process():
            save_trained(self.assembly, Path(output_dir or self.args.output_dir))

    def _save_checkpoint(self, *args) -> None:
        with _writing(Path(self.args.output_dir)):
            super()._save_checkpoint(*args)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        load_trained(self.assembly, Path(resume_from_checkpoint))


def _groups(module: torch.nn.Module, lr: float, decay: float) -> list[dict]:
    """Parameters that train. Matrices decay; gates, biases and maps do not rest at 0."""
    matrices, parts = {"lora_A", "lora_B", "weight"}, {decay: [], 0.0: []}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            parts[0.0 if matrices.isdisjoint(name.split(".")) else decay].append(parameter)
    return [{"params": p, "lr": lr, "weight_decay": own} for own, p in parts.items() if p]


def training_arguments(config, folder: Path, device: torch.device) -> TrainingArguments:
    """Trainer's settings of a run."""
    train = config.train
    arguments = TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        max_steps=train.steps,
        per_device_train_batch_size=train.batch_size,
        gradient_accumulation_steps=train.accumulation,
        learning_rate=train.lr,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(train.warmup * train.steps),
        max_grad_norm=train.max_grad_norm,
        logging_steps=train.log_every,
        logging_nan_inf_filter=False,  # it would hide a loss of NaN behind the last good one
        logging_first_step=True,
        save_steps=train.save_every,
        save_total_limit=2,
        dataloader_num_workers=train.workers,
        remove_unused_columns=False,
        use_cpu=device.type == "cpu",
        report_to=[],
        seed=config.seed,
        data_seed=config.seed,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # DataParallel would split a packed sequence
    return arguments


def train(assembly: Assembly, folder: Path, device: torch.device) -> dict[str, float]:
    """Train, going on from the last whole checkpoint where there is one; save into ``folder``.

    Returns:
        seconds of this call and of those that it goes on from.
    """
    if assembly.config.train.gradient_checkpointing:
        backbone = assembly.model.backbone
        newer = hasattr(backbone, "activation_checkpointing_enable")
        name = "activation_checkpointing" if newer else "gradient_checkpointing"
        getattr(backbone, f"{name}_enable")({"use_reentrant": False})
    with main_process_first(device):
        checkpoint = last_checkpoint(folder / "checkpoints")
        before = _cut_log(folder / "train_log.jsonl", _step(checkpoint) if checkpoint else 0)
    settings, backbone = assembly.config.train, assembly.model.backbone
    trainer = CKFTrainer(assembly, TrainStream(assembly), folder, device, before)
    with using_liger(backbone) if settings.liger else nullcontext():
        trainer.graphs = _graphs(settings.cuda_graphs, backbone)
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            trainer.drop_graphs()
    if assembly.model.metanet is not None:
        assembly.model.metanet.settle()
    if is_main_process():
        with _writing(folder):
            save_trained(assembly, folder)
    return {"seconds": round(time.perf_counter() - trainer.start, 1)}


def _graphs(wanted: str | bool, backbone: torch.nn.Module) -> LayerGraphs | None:
    """train.cuda_graphs; ValueError where they are asked for by name and cannot be."""
    if wanted is False or (wanted == "auto" and why_not_graphed(backbone) is not None):
        return None
    try:
        return LayerGraphs(backbone)
    except ValueError as error:
        raise ValueError(f"train.cuda_graphs is true, but {error}") from error


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Files that cannot be written end training with one line; earlier checkpoints are whole."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        of_torch_save = any(word in str(error) for word in ("inline_container", "iostream"))
        if isinstance(error, RuntimeError) and not of_torch_save:
            raise
        raise OSError(
            f"cannot save into {folder} ({error}); free space on its disk, then the same command "
            "goes on from the last whole checkpoint"
        ) from error


def save_trained(assembly: Assembly, folder: Path) -> None:
    """Adapters and meta-network of a run or a checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    save_adapters(assembly.model.backbone, folder / ADAPTERS_FOLDER)
    if assembly.model.metanet is not None:
        tensors = {k: v.cpu().contiguous() for k, v in assembly.model.metanet.state_dict().items()}
        temporary = folder / (METANET_FILE + ".part")
        save_file(tensors, temporary)
        temporary.replace(folder / METANET_FILE)


def load_trained(assembly: Assembly, folder: Path) -> None:
    """Read what ``save_trained`` wrote; ValueError, and nothing changed, for foreign files."""
    metanet = assembly.model.metanet
    tensors = {} if metanet is None else _read_metanet(metanet, folder / METANET_FILE)
    load_adapters(assembly.model.backbone, folder / ADAPTERS_FOLDER)
    if metanet is not None:
        metanet.load_state_dict(tensors)


def _read_metanet(metanet: torch.nn.Module, file: Path) -> dict[str, torch.Tensor]:
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} is missing or damaged ({error}); train the run again") from error
    for who in ("user", "item"):  # files of earlier versions: the bias stood in their place
        if f"{who}_out.bias" in tensors:
            tensors.setdefault(f"no_{who}", tensors[f"{who}_out.bias"])
    tensors.setdefault("gain", torch.ones(()))
    own = {name: tuple(value.shape) for name, value in metanet.state_dict().items()}
    there = {name: tuple(value.shape) for name, value in tensors.items()}
    for name in sorted({*own, *there}):
        if own.get(name) != there.get(name):
            raise ValueError(
                f"{file} has {name} of shape {there.get(name, 'none')}; this run's meta-network "
                f"expects {own.get(name, 'none')}: the file is of another run"
            )
    return tensors


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint whose last-written file is whole; half-written ones are removed."""
    found = sorted(folder.glob("checkpoint-*"), key=_step, reverse=True)
    for checkpoint in found:
        try:
            state = json.loads((checkpoint / "trainer_state.json").read_text())
            if state["global_step"] == _step(checkpoint):
                return checkpoint
        except (OSError, ValueError, KeyError, TypeError):
            pass
        logger.warning("%s is half-written and left out: saving it was cut short", checkpoint)
        shutil.rmtree(checkpoint, ignore_errors=True)
    return None


def _step(checkpoint: Path) -> int:
    digits = checkpoint.name.rpartition("-")[2]
    return int(digits) if digits.isdigit() else -1


def _cut_log(file: Path, step: int) -> float:
    """Drop lines of steps that will be trained again; the seconds that the kept ones took."""
    if not file.exists():
        return 0.0
    kept, seconds = [], 0.0
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
            if entry["step"] <= step:
                kept.append(line + "\n")
                seconds = float(entry.get("seconds", 0.0))
        except (ValueError, KeyError, TypeError):
            continue  # a line cut short by a kill
    file.write_text("".join(kept), encoding="utf-8")
    return seconds


def _named_learning_rate(logs: dict) -> dict:
    renamed = dict(logs)
    if "learning_rate" in renamed:
        renamed["lr"] = renamed.pop("learning_rate")
    return {k: float(v) for k, v in renamed.items() if isinstance(v, int | float | str)}
