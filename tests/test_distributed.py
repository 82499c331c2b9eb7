"""Two gloo processes on the CPU: DDP, FSDP2, Trainer and ``ckf train`` against one process."""

import functools
import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import ckf
from tests import distributed_worker as worker
from tests.distributed_worker import OPTIONS, TASKS, patched, train

# The experts that may move in each step of the plan: those with rows on any rank.
MOVES = [{0, 1, 2}, {0, 1}, {0, 2}, {0, 1}, {2}]
ONE = {"shared", *TASKS}


def launch(*arguments, timeout=240, folder=None):
    """torchrun with two processes; what they said, in an error, where they failed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    command += ["--master_addr=127.0.0.1", f"--master_port={port}", "-m", *map(str, arguments)]
    root = os.path.dirname(os.path.dirname(worker.__file__))
    paths = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    with subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            said = process.communicate(timeout=timeout)[0]
        finally:
            process.terminate()  # where it still runs; torchrun then ends its workers
    assert process.returncode == 0, said[-8000:]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """The folder with what both processes found in every scenario, from one launch."""
    folder = tmp_path_factory.mktemp("distributed")
    launch("tests.distributed_worker", folder)
    return folder


@pytest.fixture(scope="module")
def one_process():
    """The same plan on whole batches, in this process."""
    torch.manual_seed(0)
    found = {
        name: train(patched(**options), worker.momentum if name == "plain" else worker.adamw)
        for name, options in OPTIONS.items()
    }
    return found | {"adamw": train(patched())}


@functools.cache
def read(folder, scenario):
    """What each rank found."""
    ranks = [torch.load(folder / scenario / f"rank{r}.pt", weights_only=False) for r in (0, 1)]
    for found in ranks:
        assert "error" not in found, found["error"]
    return ranks


def expert(name):
    return name.rsplit(".", 1)[-1]


def moved(before, after):
    """Experts of which anything moved."""
    return {expert(n) for n in before if "lora" in n and not torch.equal(before[n], after[n])}


def names(ids):
    return {"shared", *(TASKS[i] for i in ids)}


def assert_near(own, reference, what):
    """To rounding: as many float32 ulps of the largest value as sums have terms, 4 rows x 7."""
    bound = 28 * torch.finfo(torch.float32).eps * float(reference.abs().max())
    assert float((own - reference).abs().max()) <= bound, what


@pytest.mark.parametrize("scenario", ["ddp", "fsdp"])
def test_gradients_equal_those_of_one_process(two_processes, one_process, scenario):
    first, second = read(two_processes, scenario)
    for name in ("plain", "learned", "frozen_shared", "frozen_task"):
        references = one_process[name]["gradients"][0]
        assert references.keys() == first[name]["gradients"][0].keys()
        for key, reference in references.items():
            own = first[name]["gradients"][0][key]
            assert torch.equal(own, second[name]["gradients"][0][key])
            assert_near(own, reference, f"{name} {key}")


@pytest.mark.parametrize("scenario", ["ddp", "fsdp"])
def test_training_equals_that_of_one_process(two_processes, one_process, scenario):
    found = read(two_processes, scenario)[0]["plain"]["adapters"]
    for step, reference in enumerate(one_process["plain"]["adapters"]):
        for key, value in reference.items():
            # rounding of the gradients of every step so far, through the model
            torch.testing.assert_close(
                found[step][key], value, rtol=1e-4, atol=1e-5, msg=f"step {step}, {key}"
            )


@pytest.mark.parametrize("name", ["plain", "adamw"])
@pytest.mark.parametrize("scenario", ["one", "ddp", "fsdp"])
def test_tasks_without_rows_on_any_rank_do_not_move(two_processes, one_process, scenario, name):
    """Also where momentum and decay would move them; rows on one rank move a task on both."""
    found = [one_process] if scenario == "one" else read(two_processes, scenario)
    for rank in found:
        steps = rank[name]["adapters"]
        for step, present in enumerate(MOVES):
            assert moved(steps[step], steps[step + 1]) == names(present), f"step {step}"
    for key, value in found[0][name]["adapters"][-1].items():
        assert torch.equal(value, found[-1][name]["adapters"][-1][key])


@pytest.mark.parametrize("scenario", ["one", "ddp", "fsdp"])
def test_gates_of_tasks_without_rows_do_not_move(two_processes, one_process, scenario):
    found = one_process if scenario == "one" else read(two_processes, scenario)[1]
    steps = found["learned"]["adapters"]
    (name,) = [n for n in steps[0] if "ckf_gate" in n]
    for step, present in enumerate(MOVES):
        differs = (steps[step][name] != steps[step + 1][name]).any(1)
        assert {i for i, d in enumerate(differs.tolist()) if d} == present, f"step {step}"


@pytest.mark.parametrize("scenario", ["one", "ddp", "fsdp"])
@pytest.mark.parametrize("frozen", ["shared", "task"])
def test_frozen_experts_stay_and_the_others_move(two_processes, one_process, scenario, frozen):
    found = one_process if scenario == "one" else read(two_processes, scenario)[0]
    steps = found[f"frozen_{frozen}"]["adapters"]
    stays = {"shared": "shared", "task": "topk"}[frozen]
    for step, present in enumerate(MOVES):
        assert moved(steps[step], steps[step + 1]) == names(present) - {stays}


def test_without_presence_decay_would_move_them():
    model = patched()
    optimizer = worker.adamw([p for p in model.parameters() if p.requires_grad])
    before = worker.trained(model)
    model(
        input_ids=torch.ones(1, 3).long(), labels=torch.ones(1, 3).long(), task_ids=[0]
    ).loss.backward()
    optimizer.step()
    assert moved(before, worker.trained(model)) == ONE


def test_fsdp_saves_whole_adapters_once_and_loads_them(two_processes):
    for found in read(two_processes, "fsdp"):
        assert found["saved"].keys() == found["loaded"].keys()
        for key, value in found["saved"].items():
            assert torch.equal(value, found["loaded"][key]), key
    twin = patched(gate="learned")
    for folder in ("saved", "pretrained/adapters"):
        worker.randomise_adapters(twin, seed=9)
        ckf.load_adapters(twin, two_processes / "fsdp" / folder)
        for key, value in worker.trained(twin).items():
            assert torch.equal(value, found["saved"][key]), key


def test_fsdp_of_a_bfloat16_base_follows_one_process(two_processes):
    """Sharded as it is (float32 adapters), and a float32 model under a bfloat16 policy."""
    found = read(two_processes, "fsdp_bf16")[0]
    reference = train(patched(dtype=torch.bfloat16), worker.momentum)
    for name in ("as_is", "policy"):
        steps = found[name]["adapters"]
        assert all(value.dtype == torch.float32 for value in steps[-1].values())
        for step, present in enumerate(MOVES):
            assert moved(steps[step], steps[step + 1]) == names(present)
        for key, value in reference["gradients"][0].items():
            error = (found[name]["gradients"][0][key] - value).norm() / value.norm()
            assert error < 0.1, (name, key)  # two bfloat16 passes, a few percent from each other


def test_trainer_in_two_processes_saves_resumes_and_leaves_absent_tasks(two_processes):
    for found in read(two_processes, "trainer"):
        assert moved(found["before"], found["after"]) == {"shared", "ctr", "rating"}
        if worker.RESUMES_ON_CPU:
            assert all(torch.equal(v, found["resumed"][k]) for k, v in found["after"].items())
    run = two_processes / "trainer" / "run"
    assert sorted(f.name for f in run.iterdir()) == ["checkpoint-2", "checkpoint-4"]
    saved = load_file(run / "checkpoint-4/adapters/ctr/adapter_model.safetensors")
    key = "model.layers.0.self_attn.q_proj.lora_A"
    assert torch.equal(saved[f"base_model.model.{key}.weight"], found["after"][f"{key}.ctr"])
    assert not [f for f in run.rglob("*.safetensors") if "adapters" not in f.parts]


def test_ckf_train_in_two_processes(small_model, prepared, tmp_path):
    from ckf.config_files import write_config
    from tests.ckf_fixtures import small_config

    config = small_config(small_model, train__steps=4, train__batch_size=5, train__save_every=2)
    write_config(config, tmp_path / "config.yaml")
    folder = tmp_path / "run"
    arguments = ("train", tmp_path / "config.yaml", "--prepared", prepared, "--out", folder)
    launch("ckf.cli", *arguments, "--device", "cpu", "--no-evaluate")
    lines = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    state = json.loads((folder / "checkpoints" / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["epoch"] == 1  # the processes share one stream, once
    assert lines[-1]["text_share"] < 0.01
    assert (folder / "run.json").exists() and (folder / "metanet.safetensors").exists()
    assert {f.name for f in (folder / "checkpoints").iterdir()} == {"checkpoint-2", "checkpoint-4"}


def test_processes_wait_for_hours_while_one_prepares(tmp_path):
    (tmp_path / "wait.py").write_text(
        "import torch, torch.distributed as dist\n"
        "from ckf.processes import main_process_first\n"
        "with main_process_first(torch.device('cpu')):\n"
        "    group = dist.group.WORLD._get_backend(torch.device('cpu'))\n"
        "    open(f'rank{dist.get_rank()}', 'w').write(str(group.options._timeout))\n"
    )
    launch("wait", folder=tmp_path)
    assert [(tmp_path / f"rank{k}").read_text() for k in (0, 1)] == ["1 day, 0:00:00"] * 2
