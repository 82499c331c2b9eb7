"""The cells of the grid: each a name, what it is, and the settings that make it.

All cells of a config train about as many LoRA parameters, on the same rows for the same steps. The
LoRA scaling (alpha / rank) is the same too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ckf.cf import CFConfig
from ckf.config import RunConfig
from ckf.config_files import config_from_dict, config_to_dict

Change = Callable[[RunConfig], RunConfig]


@dataclass(frozen=True)
class Cell:
    """One cell. change: makes its settings from those of the config."""

    name: str
    title: str
    change: Change


def lora_budget(config: RunConfig, tasks: Sequence[str] | None = None) -> int:
    """Rank of all LoRAs of the config together, or of the shared one and those of ``tasks``."""
    lora = config.lora
    if not lora.per_task:
        return lora.r
    shared = lora.r if lora.shared_r is None else lora.shared_r
    return shared + sum((lora.ranks or {}).get(task, lora.r) for task in tasks or config.tasks)


def _one_lora(config: RunConfig, tasks: Sequence[str] | None = None) -> RunConfig:
    """One LoRA for all tasks with the parameters of all LoRAs together: ``lora_budget``."""
    rank = lora_budget(config, tasks)
    lora = replace(
        config.lora,
        r=rank,
        lora_alpha=_same_scaling(config, rank),
        per_task=False,
        gate="hard",
        ranks=None,
        shared_r=None,
        shared_modules=None,
        task_modules=None,
    )
    return replace(config, lora=lora)


def _per_task_lora(config: RunConfig) -> RunConfig:
    """A LoRA per task, none shared, with the parameters of all LoRAs together."""
    rank = max(1, round(lora_budget(config) / len(config.tasks)))
    alpha = _same_scaling(config, rank)
    lora = replace(config.lora, r=rank, lora_alpha=alpha, per_task=True, shared_r=0, ranks=None)
    return replace(config, lora=lora)


def _multi_lora(config: RunConfig) -> RunConfig:
    """The config's own shared and task LoRAs, with hard gates."""
    return replace(config, lora=replace(config.lora, per_task=True, gate="hard"))


def _learned_gate(config: RunConfig) -> RunConfig:
    return replace(config, lora=replace(config.lora, per_task=True, gate="learned"))


def _same_scaling(config: RunConfig, rank: int) -> float:
    factor = rank / config.lora.r
    return config.lora.lora_alpha * (math.sqrt(factor) if config.lora.use_rslora else factor)


def _vectors(kind: str, match: str = "none", shuffle: bool = False) -> Change:
    def change(config: RunConfig) -> RunConfig:
        parts = replace(config.metanet, kind=kind, match=match, shuffle_users=shuffle)
        return replace(config, metanet=parts)

    return change


def _schedule(name: str) -> Change:
    return lambda config: replace(config, train=replace(config.train, schedule=name))


def _lightgcn(config: RunConfig) -> RunConfig:
    """LightGCN's vectors, its width and weight decay chosen on valid."""
    dims, decays = [8, 16, 32, 64, 128, 256], [0.005, 0.01]
    cf = replace(config.cf, kind="lightgcn", dim=dims, weight_decay=decays, batch_size=4096)
    if config.cf.kind == "file":  # which may have none to hold out
        cf = replace(cf, held_out=None)
    return replace(config, cf=cf)


def _mf(config: RunConfig) -> RunConfig:
    return config if config.cf.kind == "mf" else replace(config, cf=CFConfig(seed=config.cf.seed))


def cf_alone(config: RunConfig) -> list[RunConfig]:
    """The config with each CF model of ``cf.beside`` in its place, without a blend."""
    change = {"mf": _mf, "lightgcn": _lightgcn}
    made = [change[name](config) for name in config.cf.beside]
    return [
        replace(
            one, cf=replace(one.cf, blend=0, titles=0, history=False, held_out=False, beside=[])
        )
        for one in made
    ]


def cf_name(config: RunConfig) -> str:
    """What an experiment calls the config's CF model."""
    return config.cf.kind + ("-blend" if config.cf.blend else "")


def _single(task: str) -> Change:
    """The task alone, one LoRA as wide as shared + task, for the steps its rows had in the mix.

    So all single-task runs together see the rows, and cost the steps, of one multi-task run. Takes
    a config whose train rows are counted.
    """

    def change(config: RunConfig) -> RunConfig:
        sizes = {t: rows.train or 1 for t, rows in config.tasks.items()}
        weights = {t: size ** (1 / config.train.temperature) for t, size in sizes.items()}
        share = weights[task] / sum(weights.values())
        steps = max(1, round(config.train.steps * share))
        train = replace(config.train, steps=steps)
        alone = _one_lora(_multi_lora(config), [task])
        return replace(alone, tasks={task: config.tasks[task]}, train=train)

    return change


def _chain(*changes: Change) -> Change:
    def change(config: RunConfig) -> RunConfig:
        for one in changes:
            config = one(config)
        return config

    return change


MAIN = (
    "text", "linear", "multi-linear",
    "ckf", "ckf-shuffled", "ckf-constant", "ckf-match", "ckf-prior",
)  # fmt: skip
_META = _vectors("meta")
CELLS = {
    cell.name: cell
    for cell in (
        Cell("text", "one LoRA, no CF vectors", _chain(_one_lora, _vectors("none"))),
        Cell("linear", "one LoRA, linear map", _chain(_one_lora, _vectors("linear"))),
        Cell(
            "multi-linear",
            "shared + task LoRA, linear map",
            _chain(_multi_lora, _vectors("linear")),
        ),
        Cell("ckf", "shared + task LoRA, meta-network", _chain(_multi_lora, _META)),
        Cell(
            "ckf-shuffled",
            "ckf, CF vectors of shuffled users",
            _chain(_multi_lora, _vectors("meta", shuffle=True)),
        ),
        Cell("ckf-constant", "ckf, one constant W_u", _chain(_multi_lora, _vectors("constant"))),
        Cell("ckf-match", "ckf and the CF score", _chain(_multi_lora, _vectors("meta", "score"))),
        Cell(
            "ckf-prior",
            "ckf, the CF score also a prior",
            _chain(_multi_lora, _vectors("meta", "prior")),
        ),
        Cell("ckf-text", "shared + task LoRA, no CF", _chain(_multi_lora, _vectors("none"))),
        Cell("ckf-mlp", "shared + task LoRA, MLP map", _chain(_multi_lora, _vectors("mlp"))),
        Cell("one-meta", "one LoRA, meta-network", _chain(_one_lora, _META)),
        Cell("task-meta", "a LoRA per task, meta-network", _chain(_per_task_lora, _META)),
        Cell("gate-meta", "learned gate, meta-network", _chain(_learned_gate, _META)),
        Cell(
            "ckf-joint",
            "ckf, vectors from the start",
            _chain(_multi_lora, _META, _schedule("joint")),
        ),
        Cell(
            "ckf-curriculum",
            "ckf, text first",
            _chain(_multi_lora, _META, _schedule("curriculum")),
        ),
        Cell("ckf-lightgcn", "ckf, LightGCN vectors", _chain(_multi_lora, _META, _lightgcn)),
        *(
            Cell(f"single-{task}", f"{task} alone, meta-network", _chain(_single(task), _META))
            for task in ("ctr", "topk", "rating", "explain", "review_rating")
        ),
    )
}
# (a, b, what a > b would show); a and b are cells, or baselines as "=name"
COMPARISONS = (
    ("linear", "text", "CF vectors help"),
    ("multi-linear", "linear", "a LoRA per task helps"),
    ("ckf", "multi-linear", "a map per user helps"),
    ("ckf", "ckf-shuffled", "the user's vectors matter (control)"),
    ("ckf", "ckf-constant", "a map per user beats one constant map (control)"),
    ("ckf", "text", "all of it helps"),
    ("ckf", "=cf", "the LLM adds to the CF model"),
    ("ckf", "=item_user_mean", "better than item and user means"),
    ("ckf", "=logistic_regression", "better than a regression on means"),
    ("=cf", "=cf-mf", "what else is known beside the CF score helps"),
    ("ckf-match", "ckf", "showing the CF score helps"),
    ("ckf-match", "text", "all of it with the CF score helps"),
    ("ckf-match", "=cf", "with the score shown, the LLM adds to it"),
    ("ckf-match", "=logistic_regression", "with the score shown, better than a regression"),
    ("ckf-prior", "ckf-match", "the CF model's answer as a prior helps"),
    ("ckf-prior", "text", "all of it with the prior helps"),
    ("ckf-prior", "=prior", "the LLM adds to the prior"),
    ("ckf-prior", "=cf", "with the prior, better than the CF model"),
    ("ckf-prior", "=logistic_regression", "with the prior, better than a regression"),
    ("ckf", "ckf-text", "CF vectors help, with a LoRA per task"),
    ("ckf", "ckf-mlp", "a map per user beats an MLP"),
    ("ckf", "one-meta", "a LoRA per task helps, with the meta-network"),
    ("ckf", "task-meta", "a shared LoRA helps"),
    ("gate-meta", "ckf", "learned gates help"),
    ("ckf", "ckf-joint", "text first helps"),
    ("ckf-curriculum", "ckf", "text first helps"),
    ("ckf-lightgcn", "ckf", "LightGCN's vectors beat MF's"),
    *(
        ("ckf", f"single-{task}", "several tasks at once help")
        for task in ("ctr", "topk", "rating", "explain", "review_rating")
    ),
)
# Of those, what may depend on how much is known of the user: CTR AUC by the user's train rows
BY_USER = (("ckf", "multi-linear"), ("ckf", "ckf-shuffled"), ("ckf", "ckf-constant"))
# What --reduced cuts, and why; numbers are upper bounds, rows count per task.
REDUCED = {
    "model.layers": 4,
    "prompt.history_titles": 1,
    "train.steps": 80,
    "train.batch_size": 16,
    "lora.r": 8,
    "train rows": {"ctr": 1280},  # of the other tasks `_OTHER_TRAIN`
    "test rows": {"ctr": 1000, "topk": 60},  # of the other tasks `_OTHER_TEST`
}
_OTHER_TRAIN, _OTHER_TEST = 128, 100


def chosen_cells(names: str | Sequence[str], config: RunConfig) -> list[Cell]:
    """Cells by name: "main", "full", or names with commas between, those that the config allows.

    Raises ValueError for an unknown name.
    """
    names = names.split(",") if isinstance(names, str) else list(names)
    names = [name.strip() for name in names]
    wanted: list[str] = []
    for name in names:
        wanted += {"main": MAIN, "full": tuple(CELLS)}.get(name, (name,))
    unknown = [name for name in wanted if name not in CELLS]
    if unknown:
        raise ValueError(f"no cell is named {unknown[0]!r}; known: main, full, {', '.join(CELLS)}")
    skipped = [f"ckf-{config.train.schedule}"]  # the plain cell has the config's schedule already
    if config.why_no_prior() and "ckf-prior" not in names:  # named, it says why
        skipped.append("ckf-prior")
    alone = len(config.tasks) == 1
    return [
        CELLS[name]
        for name in dict.fromkeys(wanted)
        if name not in skipped
        and not (name.startswith("single-") and (alone or name[7:] not in config.tasks))
    ]


def cell_config(base: RunConfig, cell: Cell, seed: int) -> RunConfig:
    """The checked settings of a cell's run number ``seed``."""
    config = replace(cell.change(base), name=f"{base.name}-{cell.name}", seed=base.seed + seed)
    return config_from_dict(config_to_dict(config))


def reduced(config: RunConfig, seed_count: int) -> tuple[RunConfig, int, list[str]]:
    """The config cut down to minutes on two CPU cores, one seed, and what was cut, in words."""
    cut: list[str] = []

    def least(what: str, value, limit):
        if value is not None and value <= limit:
            return value
        cut.append(f"{what} {limit:,} instead of {'all' if value is None else f'{value:,}'}")
        return limit

    train = config.train
    steps = least("training steps", train.steps, REDUCED["train.steps"])
    batch = least("rows a step", train.batch_size, REDUCED["train.batch_size"])
    titles = config.prompt.history_titles
    titles = least("titles in a prompt", titles, REDUCED["prompt.history_titles"])
    rank = least("LoRA rank", config.lora.r, REDUCED["lora.r"])
    alpha = _same_scaling(config, rank)
    layers = least("decoder layers", config.model.layers, REDUCED["model.layers"])
    tasks = {}
    for task, rows in config.tasks.items():
        train_rows = least(
            f"{task} train rows", rows.train, REDUCED["train rows"].get(task, _OTHER_TRAIN)
        )
        limit = REDUCED["test rows"].get(task, _OTHER_TEST)
        test_rows = least(f"{task} test rows", rows.test, limit)
        valid_rows = least(f"{task} valid rows", rows.valid, limit)
        tasks[task] = replace(rows, train=train_rows, valid=valid_rows, test=test_rows)
    first, listed = config.data.test_lists[0], config.data.train_list
    if "topk" in tasks and config.prompt.rank_by == "letters" and listed != first:
        cut.append(f"train lists {first} instead of {listed}")
        listed = first  # no letter that only lists which are left out would need
    if seed_count > 1:
        cut.append(f"1 seed instead of {seed_count}")
    small = replace(
        config,
        model=replace(config.model, layers=layers),
        tasks=tasks,
        lora=replace(config.lora, r=rank, lora_alpha=alpha, ranks=None),
        prompt=replace(config.prompt, history_titles=titles),
        data=replace(config.data, train_list=listed, test_lists=[first]),
        train=replace(
            train, steps=steps, batch_size=batch, accumulation=1, lr=1e-3, vector_lr=3e-3,
            workers=0, save_every=25, log_every=10, packing="auto", curriculum_middle=0.1,
            curriculum_sharpness=40.0,
        ),
        evaluate=replace(config.evaluate, batch_tokens=2048),
    )  # fmt: skip
    if len(config.data.test_lists) > 1:
        cut.append(f"candidate list {first} only")
    return small, 1, cut
