"""Training that is killed, runs out of disk or of memory, and goes on to the same end.

Children come from a fork server, so that a kill costs a second and not an import of torch.
"""

import functools
import logging
import multiprocessing
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ckf.config_files import write_config
from ckf.model import CKFModel
from ckf.run import train_run
from ckf.train import last_checkpoint
from tests.ckf_fixtures import quiet, read_log, small_config
from tests.test_train import assert_same_bits, run_again

STEPS = 40
CHANGES = {"train__steps": STEPS, "train__save_every": 4}


def train_child(
    model: Path, prepared: Path, folder: Path, file_bytes: int | None, steps: int
) -> None:
    """One training in a process of its own; ``file_bytes``: no file may grow beyond.

    A step takes 50 ms or more, so that no machine is done before it is disturbed.
    """
    torch.set_num_threads(1)
    plain = CKFModel.forward
    CKFModel.forward = lambda self, **batch: time.sleep(0.05) or plain(self, **batch)
    if file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    config = small_config(model, **{**CHANGES, "train__steps": steps})
    try:
        train_run(config, folder, prepared=str(prepared), device="cpu", log=quiet)
    except (ValueError, OSError) as error:
        (folder.parent / "said").write_text(str(error)[: file_bytes or None])
        os._exit(2)


@pytest.fixture(scope="module")
def start():
    """Starts ``train_child``; what still runs at the end is killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.hardening.test_training"])
    children = []

    def begin(model, prepared, folder, file_bytes=None, steps=STEPS):
        arguments = (model, prepared, folder, file_bytes, steps)
        child = context.Process(target=train_child, args=arguments)
        child.start()
        children.append(child)
        return child

    yield begin
    for child in children:
        child.kill()


@pytest.fixture(scope="module")
def whole(start, small_model, prepared, tmp_path_factory):
    """The folder of the run that nobody disturbs, by its number of steps."""

    @functools.cache
    def folder(steps: int = STEPS) -> Path:
        folder = tmp_path_factory.mktemp("whole") / "run"
        run_to_the_end(start, small_model, prepared, folder, steps)
        return folder

    return folder


def run_to_the_end(start, model, prepared, folder: Path, steps: int = STEPS) -> None:
    child = start(model, prepared, folder, steps=steps)
    child.join()
    assert child.exitcode == 0


def wait_until(condition, child, seconds=120.0) -> bool:
    """True once the condition holds, False where the child ended before."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        if not child.is_alive():
            return False
        time.sleep(0.001)
    raise AssertionError(f"nothing happened in {seconds} s")


def kill_at(moment: str, child, folder: Path, rng: random.Random) -> None:
    """SIGKILL while starting, between steps, or at the very moment a checkpoint appears."""
    checkpoints, log = folder / "checkpoints", folder / "train_log.jsonl"
    there = {p.name for p in checkpoints.glob("checkpoint-*")}
    size = log.stat().st_size if log.exists() else 0
    if moment == "saving":
        wait_until(lambda: {p.name for p in checkpoints.glob("checkpoint-*")} - there, child)
        time.sleep(rng.uniform(0, 0.02))
    elif moment == "step":
        wait_until(lambda: log.exists() and log.stat().st_size > size, child)
        time.sleep(rng.uniform(0, 0.3))
    else:
        time.sleep(rng.uniform(0, 1))
    child.kill()
    child.join()


def assert_the_same_end(folder: Path, whole: Path) -> None:
    assert_same_bits(folder, whole)
    lines, wanted = read_log(folder), read_log(whole)
    assert [line["step"] for line in lines] == list(range(1, len(wanted) + 1))
    assert [line["loss"] for line in lines] == [line["loss"] for line in wanted]


@pytest.mark.parametrize(
    ("rounds", "steps"), [(1, STEPS), pytest.param(5, 4 * STEPS, marks=pytest.mark.slow)]
)
def test_four_kills_a_round_end_in_the_same_bits(
    start, small_model, prepared, whole, tmp_path, rounds, steps
):
    rng, folder, killed = random.Random(0), tmp_path / "run", 0
    for moment in ["saving", "start", "step", "step"] * rounds:
        child = start(small_model, prepared, folder, steps=steps)
        kill_at(moment, child, folder, rng)
        killed += child.exitcode == -signal.SIGKILL
    assert killed == 4 * rounds and not (folder / "run.json").exists()
    run_to_the_end(start, small_model, prepared, folder, steps)
    assert_the_same_end(folder, whole(steps))


def test_a_half_written_checkpoint_is_left_out_with_one_line(small_run, run_copy, caplog):
    newest = last_checkpoint(run_copy / "checkpoints")
    (newest / "trainer_state.json").unlink()
    with caplog.at_level(logging.WARNING, "ckf.train"):
        assert last_checkpoint(run_copy / "checkpoints").name == "checkpoint-4"
    (record,) = caplog.records
    assert f"{newest} is half-written and left out" in record.getMessage()


@pytest.mark.parametrize("file_bytes", [3_000, 30_000])
def test_a_full_disk_leaves_a_run_that_goes_on(
    start, small_model, prepared, whole, tmp_path, file_bytes
):
    """A limit on the size of files fails writes as a full disk does, in the middle of a file."""
    folder = tmp_path / "run"
    child = start(small_model, prepared, folder)
    wait_until(lambda: (folder / "checkpoints/checkpoint-4/trainer_state.json").exists(), child)
    child.kill()
    child.join()
    kept = last_checkpoint(folder / "checkpoints")
    child = start(small_model, prepared, folder, file_bytes)
    child.join()
    assert child.exitcode == 2
    said = (tmp_path / "said").read_text()
    assert "cannot save into" in said and "free space on its disk" in said
    assert last_checkpoint(folder / "checkpoints") == kept
    run_to_the_end(start, small_model, prepared, folder)
    assert_the_same_end(folder, whole())


# ---- out of GPU memory


@pytest.fixture
def small_memory(monkeypatch):
    """A function that makes batches of more rows than given fail, their gradients half written."""
    plain, failed = CKFModel.forward, []

    def limit(rows: int) -> list:
        def forward(self, **batch):
            if len(batch["row_tasks"]) > rows:
                failed.append(len(batch["row_tasks"]))
                for parameter in self.parameters():
                    if parameter.requires_grad:
                        parameter.grad = torch.full_like(parameter, float("nan"))
                raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            return plain(self, **batch)

        monkeypatch.setattr(CKFModel, "forward", forward)
        return failed

    return limit


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_out_of_memory_goes_through_in_parts(
    small_memory, small_model, prepared, tmp_path, caplog, accumulation
):
    changes = {
        "lora__lora_dropout": 0.0, "train__steps": 3, "train__accumulation": accumulation,
        "train__max_grad_norm": 0.0, "train__save_every": 50,
    }  # fmt: skip
    one = run_again(small_model, prepared, tmp_path / "one", **changes)
    failed = small_memory(4)  # of 10: halves of 5 fail as well, parts of 3 do not
    with caplog.at_level(logging.WARNING, "ckf.train"):
        parts = run_again(small_model, prepared, tmp_path / "parts", **changes)
    assert failed == [10, 5]
    (said,) = [r.getMessage() for r in caplog.records if "GPU memory" in r.getMessage()]
    assert "step 1 ran out of GPU memory (CUDA out of memory" in said and "10 rows" in said
    a, b = read_log(one.folder), read_log(parts.folder)
    assert len(a) == len(b) == 3
    for key in (k for k in a[0] if k.startswith("loss") or k == "grad_norm"):
        # the sums of the same numbers in another order; AdamW's first steps only see signs
        assert [x[key] for x in a] == pytest.approx([x[key] for x in b], rel=1e-3), key


def test_a_single_row_too_many_is_an_error(small_memory, small_model, prepared, tmp_path):
    small_memory(0)
    with pytest.raises(ValueError, match="step 1 ran out of GPU memory with a single row.*lower"):
        run_again(small_model, prepared, tmp_path / "run", train__steps=1)


# ---- one process of several


def children_of(parent: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == parent and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return sorted(found)


@pytest.mark.slow
def test_a_killed_rank_ends_the_others_within_a_minute(small_model, prepared, tmp_path):
    config = tmp_path / "small.yaml"
    write_config(small_config(small_model, **(CHANGES | {"train__steps": 100_000})), config)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    command += ["--master_addr=127.0.0.1", f"--master_port={port}", "-m", "ckf.cli", "train"]
    command += [str(config), "--out", str(folder), "--prepared", str(prepared), "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with (
        open(tmp_path / "said", "wb") as said,
        subprocess.Popen(command, env=environment, stdout=said, stderr=said) as process,
    ):
        try:
            end = time.monotonic() + 200
            while not (folder / "checkpoints/checkpoint-4/trainer_state.json").exists():
                assert process.poll() is None and time.monotonic() < end, (
                    tmp_path / "said"
                ).read_text()[-3000:]
                time.sleep(0.1)
            ranks = children_of(process.pid)
            assert len(ranks) == 2
            os.kill(ranks[1], signal.SIGKILL)
            assert process.wait(60) != 0
            assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)
        finally:
            process.terminate()
    assert last_checkpoint(folder / "checkpoints") is not None
