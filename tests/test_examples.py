"""The example scripts, run as a user runs them."""

import os
import subprocess
import sys
from pathlib import Path

import torch

import ckf

ROOT = Path(__file__).parent.parent


def test_word_tasks(small_model, tmp_path):
    command = [sys.executable, ROOT / "examples" / "word_tasks.py", "--model", small_model]
    done = subprocess.run(
        [*command, "--steps", "2", "--out", tmp_path / "out"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    table = [line.split()[0] for line in done.stdout.split("\n") if line[:1].isalpha()]
    assert table[-6:] == ["new", "kind", "lazy", "soft", "weak", "adapters:"]
    model = ckf.load_patched(str(small_model), tmp_path / "out" / "adapters")
    moved = [p for name, p in model.named_parameters() if "lora_B" in name and p.any()]
    assert len(moved) == 2 * 7 * 4  # layers, linears, the shared LoRA and three tasks'
    for task in ("more", "most", "noun"):
        assert (tmp_path / "out" / task / "adapter_model.safetensors").is_file()
    ids = torch.tensor([[5, 6, 7]] * 3)
    logits = model(ids, task_ids=["more", "most", "noun"]).logits
    assert not torch.equal(logits[0], logits[1]) and not torch.equal(logits[1], logits[2])
