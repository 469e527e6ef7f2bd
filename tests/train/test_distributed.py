"""Two processes equal one process that accumulates."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

SETTINGS = (
    "train.steps=8", "train.checkpoint_every=8", "train.batch_size=8", "model.num_layers=1",
    "model.d_model=28", "attention.num_heads=7", "attention.mixer=hexagonal", "data.context=16",
    "train.device=cpu",
)  # fmt: skip
CODE = "import sys; from sixfold import recipe, run; run.train(recipe.configure((), None, sys.argv[2:]), sys.argv[1])"


def train(launcher: list[str], runs: Path, *more: str) -> dict[str, torch.Tensor]:
    script = runs / "script.py"
    runs.mkdir()
    script.write_text(CODE)
    command = [*launcher, str(script), str(runs / "runs"), *SETTINGS, *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, check=True, timeout=240)
    folders = list((runs / "runs").iterdir())
    assert len(folders) == 1
    return load_file(folders[0] / "checkpoints/step-00000008/model.safetensors")


def test_two_processes_equal_one_that_accumulates(tmp_path):
    one = train([sys.executable], tmp_path / "one", "train.accumulation=2")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    two = train(torchrun, tmp_path / "two")
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        # the sums are the same two terms; only the order inside the gradient norm may differ
        torch.testing.assert_close(
            two[name], tensor, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
