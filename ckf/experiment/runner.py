"""Runs the cells of an experiment and goes on wherever it was stopped.

<out>/data, cf, prompts              shared by all cells     <out>/experiment.json    every figure
<out>/cells/<cell>/seed<k>/          an ordinary run's folder: ckf evaluate reads it
    scores-<split>.safetensors, result-<split>.json          written last: the cell's run is done
<out>/experiment.md, experiment.html tables and plots
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path

import torch
from transformers import set_seed

from ckf.assembly import Assembly, assemble
from ckf.backbone import locate_model, pick_device
from ckf.base_model import Base
from ckf.config import RunConfig
from ckf.data.prepared import PreparedData
from ckf.evaluate import Evaluator, write_json
from ckf.experiment.cells import (
    Cell,
    cell_config,
    cf_alone,
    cf_name,
    chosen_cells,
    reduced,
)
from ckf.experiment.checks import check_run
from ckf.experiment.jobs import OUTPUT, Run, run_side_by_side
from ckf.experiment.parts import (
    counted,
    limited,
    link,
    read_vectors,
    shared_data,
    shared_vectors,
)
from ckf.experiment.prompt_cache import PromptCache
from ckf.experiment.scores import write_scores
from ckf.run import read_about, train_or_load, with_absolute_model
from ckf.run_checks import check_rows
from ckf.run_folder import start_run

Log = Callable[[str], None]
SPLITS = ("test", "valid")


@dataclass
class Experiment:
    """What is run: a config, its cells and seeds, and where.

    cut: what was reduced, in words, empty where nothing was. failed: {run: why} of this call.
    """

    config: RunConfig
    cells: list[Cell]
    seeds: int
    out: Path
    split: str = "test"
    cut: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)

    def folder(self, cell: Cell, seed: int) -> Path:
        """The folder of a cell's run."""
        return self.out / "cells" / cell.name / f"seed{seed}"

    def result(self, cell: Cell, seed: int) -> dict | None:
        """What a finished run found; None where it is not done."""
        file = self.folder(cell, seed) / f"result-{self.split}.json"
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def runs(self) -> list[tuple[Cell, int]]:
        """Every cell with one seed before any with the next, so that an early stop is of use."""
        return [(cell, seed) for seed in range(self.seeds) for cell in self.cells]


def make_experiment(
    config: RunConfig,
    out: Path,
    cells: str | Sequence[str] = "main",
    seeds: int = 3,
    split: str = "test",
    is_reduced: bool = False,
) -> Experiment:
    """A checked experiment. Raises ValueError for unknown cells, no seeds or an unknown split."""
    if seeds < 1:
        raise ValueError(f"seeds is {seeds}; expected 1 or more")
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; expected one of {', '.join(SPLITS)}")
    config, cut = with_absolute_model(config), []
    if is_reduced:
        config, seeds, cut = reduced(config, seeds)
    found = chosen_cells(cells, config)
    if not found:
        raise ValueError(f"none of the cells {cells} can be run with the tasks of this config")
    for cell in found:
        cell_config(config, cell, 0)  # wrong settings shall not wait for their turn
    return Experiment(config, found, seeds, Path(out), split, cut)


def run_experiment(
    experiment: Experiment,
    data_path: str | None = None,
    prepared: str | None = None,
    device: str | None = None,
    prepare_only: bool = False,
    log: Log = print,
    jobs: int = 1,
) -> Path:
    """Run what is not done yet, then write the figures; the path of experiment.json.

    A run whose training fails is noted and the others go on. prepare_only: stop before the first
    training, with data, CF vectors and prompts in ``out``. jobs: runs at a time, each in a process.

    Raises:
        ValueError: settings or data that do not fit, ``out`` of another experiment, or runs failed.
    """
    from ckf.experiment.report import write_figures

    if jobs < 1:
        raise ValueError(f"jobs is {jobs}; expected 1 or more runs at a time")
    out = experiment.out
    runner = _runner(experiment, data_path, prepared, device, log)
    if prepare_only:
        runner.prepare()
        log(f"prepared {out}; train with: ckf experiment CONFIG --prepared {out} --model PATH")
        return out
    runner.run_all(jobs)
    file = write_figures(experiment, runner.data, runner.vector_files(), log)
    if experiment.failed:
        raise ValueError(
            f"{len(experiment.failed)} run(s) failed, see {file}: "
            + "; ".join(f"{name}: {why}" for name, why in experiment.failed.items())
        )
    return file


def _runner(
    experiment: Experiment,
    data_path: str | None,
    prepared: str | None,
    device: str | None,
    log: Log,
) -> _Runner:
    """With the data of the experiment's folder, put there where they are not yet."""
    config, out, chosen = experiment.config, experiment.out, pick_device(device)
    locate_model(config.model.name)
    out.mkdir(parents=True, exist_ok=True)
    whole = shared_data(config, out, data_path, prepared, log)
    data = limited(whole, config.tasks, config.seed)
    check_rows(config, data)
    experiment.config = counted(config, data)
    return _Runner(experiment, whole, data, Base(chosen, log), log)


def work_of(
    config: RunConfig,
    cells: Sequence[str],
    out: Path,
    split: str,
    cut: list[str],
    device: str,
    log: Log,
) -> Callable[[tuple[str, int]], None]:
    """For a process of its own: what runs one of these cells, by its name, with a seed."""
    experiment = Experiment(config, chosen_cells(cells, config), 1, out, split, cut)
    runner = _runner(experiment, None, None, device, log)
    by_name = {cell.name: cell for cell in experiment.cells}
    return lambda run: runner.run(by_name[run[0]], run[1])


class _Runner:
    """Runs cells; keeps what they share."""

    def __init__(
        self, experiment: Experiment, whole: PreparedData, data: PreparedData, base: Base, log: Log
    ) -> None:
        self.experiment, self.whole, self.data = experiment, whole, data
        self.base, self.log = base, log
        self.seconds: list[float] = []

    def vector_files(self) -> dict[str, Path]:
        """The CF vectors of every CF setting among the cells, the config's own first.

        Then those of ``cf.beside``. One after the config's own that cannot be imported is left
        out. A further setting of a kind that has its name already is <name>-2.
        """
        configs = [self.experiment.config]
        configs += [cell_config(self.experiment.config, c, 0) for c in self.experiment.cells]
        configs += cf_alone(self.experiment.config)
        files: dict[str, Path] = {}
        scored = [replace(c.cf, held_out=False, beside=[]) for c in configs]  # these change none
        for number, config in enumerate(configs):
            if scored[number] in scored[:number]:
                continue
            try:
                self._add_vectors(files, config)
            except ImportError as error:
                if number == 0:
                    raise
                self.log(f"no row of {config.cf.kind}: {error}")
        return files

    def _add_vectors(self, files: dict[str, Path], config: RunConfig) -> None:
        file = self._vectors(config)
        if file in files.values():
            return
        names = (cf_name(config) + (f"-{k}" if k > 1 else "") for k in count(1))
        files[next(name for name in names if name not in files)] = file

    def prepare(self) -> None:
        """CF vectors and encoded prompts of all cells, without training."""
        self.vector_files()
        for cell in self.experiment.cells:
            self._assemble(cell_config(self.experiment.config, cell, 0))

    def run_all(self, jobs: int = 1) -> None:
        """Every run that has no result yet."""
        runs = self.experiment.runs()
        for cell, seed in runs:  # before hours of training: is it this experiment's folder?
            config = cell_config(self.experiment.config, cell, seed)
            start_run(config, self.experiment.folder(cell, seed))
        todo = [(c, s) for c, s in runs if self.experiment.result(c, s) is None]
        self.log(f"{len(runs)} runs, {len(runs) - len(todo)} of them done")
        if jobs > 1 and len(todo) > 1:
            self._run_side_by_side(todo, jobs)
        else:
            self._run_in_turn(todo)

    def _run_in_turn(self, todo: list[tuple[Cell, int]]) -> None:
        for number, (cell, seed) in enumerate(todo, 1):
            left = len(todo) - number + 1
            each = sum(self.seconds) / len(self.seconds) if self.seconds else None
            about = f", about {left * each / 60:.0f} min to go" if each else ""
            self.log(f"[{number}/{len(todo)}] {cell.name} seed {seed}: {cell.title}{about}")
            start = time.perf_counter()
            try:
                self.run(cell, seed)
            except (ValueError, ImportError, torch.OutOfMemoryError) as error:
                self.experiment.failed[f"{cell.name} seed {seed}"] = str(error)
                self.log(f"failed: {error}")
            self.seconds.append(time.perf_counter() - start)

    def _run_side_by_side(self, todo: list[tuple[Cell, int]], jobs: int) -> None:
        experiment = self.experiment
        self.vector_files()
        for cell in {cell.name: cell for cell, _ in todo}.values():  # once, not once a process
            try:
                self._assemble(cell_config(experiment.config, cell, 0))
            except (ValueError, ImportError):
                self.log(f"{cell.name} cannot be prepared; its runs will say why")
        self.base.release()
        runs = []
        for cell, seed in todo:
            steps = cell_config(experiment.config, cell, seed).train.steps
            folder = experiment.folder(cell, seed)
            runs.append(Run((cell.name, seed), f"{cell.name} seed {seed}", folder, steps))
        self.log(f"{min(jobs, len(runs))} runs at a time; their own words are in {OUTPUT} of each")
        names = [cell.name for cell in experiment.cells]
        arguments = (experiment.config, names, experiment.out, experiment.split, experiment.cut)
        arguments += (str(self.base.device),)
        experiment.failed |= run_side_by_side(runs, jobs, work_of, arguments, self.log)

    def run(self, cell: Cell, seed: int) -> None:
        """One run, from its training to its result."""
        config = cell_config(self.experiment.config, cell, seed)
        folder = self.experiment.folder(cell, seed)
        out, split = self.experiment.out, self.experiment.split
        vectors = self._vectors(config)
        link(Path("data"), folder / "data")
        link(vectors.relative_to(out), folder / "cf.safetensors")
        set_seed(config.seed)
        assembly = self._assemble(config)
        train_or_load(assembly, folder, self.base.device, {}, self.log)
        metrics, predictions = {}, {}
        start = time.perf_counter()
        for task in assembly.tasks:
            evaluator = Evaluator(assembly, split)
            evaluator.samples = 0  # intervals come once, over all seeds
            found = evaluator.task(task)
            metrics[task], predictions[task] = found.metrics, found.predictions
        write_scores(predictions, folder / f"scores-{split}.safetensors")
        result = {
            "cell": cell.name,
            "seed": config.seed,
            "reduced": self.experiment.cut,
            "about": read_about(folder),
            "evaluate_seconds": round(time.perf_counter() - start, 1),
            "throughput": throughput(folder / "train_log.jsonl"),
            "checks": check_run(assembly, split),
            "metrics": metrics,
        }
        write_json(result, folder / f"result-{split}.json")

    def _vectors(self, config: RunConfig) -> Path:
        config = replace(config, seed=self.experiment.config.seed)  # the same for all seeds
        return shared_vectors(config, self.experiment.out, self.whole, self.base, self.log)

    def _assemble(self, config: RunConfig) -> Assembly:
        vectors = read_vectors(self._vectors(config))
        loaded = self.base.fresh(config)
        assembly = assemble(config, self.data, vectors, self.base.device, loaded)
        batcher = assembly.batcher
        folder = self.experiment.out / "prompts"
        batcher.cache = PromptCache(folder, assembly.maker, batcher.encoder, self.log)
        self._fill(assembly)
        return assembly

    def _fill(self, assembly: Assembly) -> None:
        """All prompts that the cell will see, before loader processes could all make them."""
        maker, encode, split = assembly.maker, assembly.batcher.encode, self.experiment.split
        form = assembly.uses_vectors
        forms = {form} if assembly.config.train.schedule == "joint" else {False, form}
        for task in assembly.tasks:
            for example in maker.examples(task, "train")[:1]:
                for shown in forms:
                    encode(example, "train", shown)
            if task == "topk" and maker.ranks_by_title:
                continue  # encoded candidate by candidate
            for name in assembly.config.data.test_lists if task == "topk" else [None]:
                for example in maker.examples(task, split, name)[:1]:
                    encode(example, split, form, name)
        prior = assembly.batcher.collator.prior
        for task in prior.tokens if prior is not None else ():  # shown to weigh it
            for example in maker.examples(task, "valid")[:1]:
                encode(example, "valid", form)


def throughput(log: Path) -> dict[str, float | None]:
    """{"tokens_per_second", "data_wait"}: medians over a training log without its first line."""
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines() if line]
    found: dict[str, float | None] = {}
    for name in ("tokens_per_second", "data_wait"):
        values = sorted(line[name] for line in lines[1:] or lines if name in line)
        found[name] = values[len(values) // 2] if values else None
    return found
