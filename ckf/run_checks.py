"""What a run's settings ask of its data and prompts, before anything is trained."""

import dataclasses
import json

from ckf.assembly import Assembly
from ckf.batches import Example
from ckf.config import RunConfig
from ckf.data.prepared import PreparedData

_OF_THE_MACHINE = {"path", "source", "reviews", "metadata"}  # where raw files lay
_OF_READING = {"max_bad_share", "max_line_bytes", "max_unpacked_bytes"}
_LISTS = {"train_list", "test_lists"}  # looked for by name


def _check_settings(config: RunConfig, data: PreparedData) -> None:
    there = data.manifest["settings"]["data"]
    for key, own in json.loads(json.dumps(dataclasses.asdict(config.data))).items():
        if key not in _OF_THE_MACHINE | _OF_READING | _LISTS and there.get(key) != own:
            raise ValueError(
                f"{data.folder} was prepared with data.{key} {there.get(key)!r}, but the config "
                f"says {own!r}; prepare it again, or change the config"
            )
    for task, wanted in config.tasks.items():
        for split in ("train", "valid", "test"):
            most, found = getattr(wanted, split), len(data.rows(task, split))
            if most is not None and found > most:
                raise ValueError(
                    f"{data.folder} has {found} rows for tasks.{task}.{split}, but the config says "
                    f"{most}; prepare it again, or change the config"
                )


def check_dtype(config: RunConfig) -> None:
    """ValueError for a dtype that does not train."""
    if config.model.dtype == "float16":
        raise ValueError(
            "model.dtype is float16, in which small gradients are lost; expected auto, float32 or "
            "bfloat16 to train: leave model.dtype out"
        )


def check_rows(config: RunConfig, data: PreparedData) -> None:
    """ValueError before training: float16, or prepared data that lack what the settings ask for or
    were made by others."""
    check_dtype(config)
    for task in config.tasks:
        for split in ("train", "test"):
            if len(data.rows(task, split)) == 0:
                raise ValueError(
                    f"the {split} split has no rows for {task}; leave the task out, or change "
                    "data.split or the number of rows under tasks"
                )
    if "topk" in config.tasks:  # prepared elsewhere they may lack a list: say so before training
        data.candidates("train", config.data.train_list)
        for name in config.data.test_lists:
            data.candidates("test", name)
        if config.metanet.match == "prior" and len(data.rows("topk", "valid")):
            data.candidates("valid", config.data.test_lists[0])  # for the language model's weight
    _check_settings(config, data)


def check_prompts(assembly: Assembly) -> None:
    """ValueError, before training, where a prompt of a task or of a list has no room."""
    maker, encoder = assembly.maker, assembly.batcher.encoder
    for task in assembly.tasks:
        lists = assembly.config.data.test_lists if task == "topk" else [None]
        for split, name in [("train", None), *(("test", name) for name in lists)]:
            rows, places = maker.rows_and_places(task, split, name)
            if len(rows):
                example = Example(task, int(rows[0]), int(places[0]))
                encoder.encode(maker.question(example, split, name), assembly.uses_vectors)
