"""Two processes of test_distributed.py: each trains by a plan and writes what it found.

    torchrun --nproc_per_node 2 -m tests.distributed_worker FOLDER

``train`` is also what the test itself runs in one process, on the whole batches, as the judge.
"""

import contextlib
import inspect
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer

import ckf
from tests.tiny import randomise_adapters, tiny_model, tokens

TASKS = ["ctr", "topk", "rating"]
# Steps of micro-batches of the rows' tasks; rank 0 has the first half of each, rank 1 the other.
PLAN = [
    [[0, 1, 2, 0]],
    [[0, 0, 1, 0]],  # topk on rank 1 alone, rating nowhere
    [[0, -1, 2, 2], [0, 0, 0, 0]],  # rating in the first micro-batch of rank 1
    [[-1, -1, 0, 1]],  # rank 0 has rows of the base alone
    [[2, 2, 2, 2]],
]

# transformers 5.10 loads the optimizer of one process of several to "cpu:0", which torch refuses
RESUMES_ON_CPU = "device.type" in inspect.getsource(Trainer._load_optimizer_and_scheduler)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)


def momentum(parameters):
    return torch.optim.SGD(parameters, lr=1e-1, momentum=0.9, weight_decay=0.1)


def patched(frozen=(), dtype=torch.float32, **options):
    """A model with adapters as after training; ``frozen`` names experts that stay."""
    model = ckf.patch_model(tiny_model().to(dtype), TASKS, r=2, lora_alpha=4, **options).train()
    randomise_adapters(model)
    for name, parameter in model.named_parameters():
        if name.rsplit(".", 1)[-1] in frozen:
            parameter.requires_grad_(False)
    return model


def shard(model, **options):
    """FSDP2 as its documentation shows it: each decoder layer, then the rest."""
    for layer in model.model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def whole(tensor):
    tensor = tensor.detach()
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return tensor.cpu().clone()


def trained(model):
    """Trained and frozen adapters and gates by their names, in one piece."""
    model = getattr(model, "module", model)
    return {n: whole(p) for n, p in model.named_parameters() if "lora_" in n or "ckf_gate" in n}


def gradients(model):
    model = getattr(model, "module", model)
    return {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}


def train(model, make_optimizer=adamw, rank=None, plan=PLAN):
    """Train by the plan; adapters after each step, and gradients of the first and second step.

    rank: takes its half of each micro-batch; None takes all of it.
    """
    optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad])
    ckf.TaskPresence(model).attach(optimizer)
    seen = {"adapters": [trained(model)], "gradients": []}
    for number, micro_batches in enumerate(plan):
        for index, ids in enumerate(micro_batches):
            x, ids = tokens(4, seed=10 * number + index), torch.tensor(ids)
            if rank is not None:
                x, ids = x[2 * rank :][:2], ids[2 * rank :][:2]
            last = index == len(micro_batches) - 1
            with synchronised(model, last):
                loss = model(input_ids=x, labels=x, task_ids=ids).loss
                (loss / len(micro_batches)).backward()
        seen["gradients"].append(gradients(model))
        optimizer.step()
        optimizer.zero_grad()
        seen["adapters"].append(trained(model))
    return seen


def synchronised(model, last: bool):
    """Gradients travel between processes in the last micro-batch only."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    elif isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    return contextlib.nullcontext()


OPTIONS = {
    "plain": {},
    "frozen_shared": {"frozen": ["shared"]},
    "frozen_task": {"frozen": ["topk"]},
    "learned": {"gate": "learned"},
}


def ddp(folder, rank):
    """DDP without find_unused_parameters."""
    found = {}
    for name, options in OPTIONS.items():
        model = DistributedDataParallel(patched(**options))
        found[name] = train(model, momentum if name == "plain" else adamw, rank)
    found["adamw"] = train(DistributedDataParallel(patched()), adamw, rank)
    return found


def fsdp(folder, rank):
    """FSDP2, saving and loading."""
    found = {}
    for name, options in OPTIONS.items():
        model = shard(patched(**options))
        found[name] = train(model, momentum if name == "plain" else adamw, rank)
    found["adamw"] = train(shard(patched()), adamw, rank)
    model = shard(patched(gate="learned"))
    train(model, adamw, rank)
    ckf.save_adapters(model, folder / "saved")
    model.save_pretrained(folder / "pretrained", is_main_process=rank == 0)
    dist.barrier()
    twin = shard(ckf.patch_model(tiny_model(), TASKS, r=2, lora_alpha=4, gate="learned"))
    ckf.load_adapters(twin, folder / "saved")
    found["loaded"], found["saved"] = trained(twin), trained(model)
    ids = [0, 1, 2, -1]
    with torch.no_grad():
        outputs = [m.eval()(input_ids=tokens(), task_ids=ids).logits for m in (model, twin)]
    assert torch.equal(*outputs)
    return found


def fsdp_bf16(folder, rank):
    """A bfloat16 base with float32 adapters; a float32 model under a mixed precision policy."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    as_is = train(shard(patched(dtype=torch.bfloat16)), momentum, rank)
    policed = train(shard(patched(), mp_policy=policy), momentum, rank)
    return {"as_is": as_is, "policy": policed}


def trainer(folder, rank):
    """MultiLoRATrainer under DDP, resumed once."""
    from tests.test_trainer import adapters, dataset, make_trainer

    def run(**options):
        model = patched()
        before = adapters(model)
        rows = dataset(tasks=["ctr", "rating"])
        made = make_trainer(folder / "run", model, rows, ddp_find_unused_parameters=False)
        made.train(**options)
        return before, adapters(model)

    before, after = run()
    resumed = None
    if RESUMES_ON_CPU:
        resumed = run(resume_from_checkpoint=str(folder / "run" / "checkpoint-2"))[1]
    return {"before": before, "after": after, "resumed": resumed}


SCENARIOS = {"ddp": ddp, "fsdp": fsdp, "fsdp_bf16": fsdp_bf16, "trainer": trainer}


def main(folder: Path) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=90))
    rank = dist.get_rank()
    torch.manual_seed(rank)
    for name, scenario in SCENARIOS.items():
        (folder / name).mkdir(exist_ok=True)
        try:
            found = scenario(folder / name, rank)
        except Exception:
            found = {"error": traceback.format_exc()}
        torch.save(found, folder / name / f"rank{rank}.pt")
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
