"""A run killed at any moment and resumed equals the uninterrupted one, to the bit."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SETTINGS = (
    "train.steps=60", "train.checkpoint_every=5", "train.validate_every=20", "train.batch_size=4",
    "model.num_layers=1", "model.d_model=28", "model.dropout=0.1", "attention.num_heads=7",
    "attention.mixer=hexagonal", "data.context=16", "governor.every=2",
    "optimizer.learning_rate=0.05", "governor.alarms.logit_critical=6.0",
    "governor.alarms.logit_warning=4.0", "governor.actions.clip_to=3.0",
)  # fmt: skip
START = "import sys; from sixfold import recipe, run; run.train(recipe.configure((), None, sys.argv[2:]), sys.argv[1])"
RESUME = "import sys; from sixfold import run; run.resume(sys.argv[1])"


def python(code: str, *arguments: str) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", code, *arguments], env=environment)


def rows(path: Path) -> list[dict]:
    """Rows without what a clock says, and without that the run was resumed."""
    found = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    found = [row for row in found if row.get("kind") != "resumed"]
    for row in found:
        row.pop("tokens_per_s", None)
        row.pop("times_us", None)
        row.get("scalars", {}).pop("tokens_per_s", None)
    return found


def end(folder: Path) -> dict[str, torch.Tensor]:
    place = folder / "checkpoints" / "step-00000060"
    return {
        **load_file(place / "model.safetensors"),
        **{f"optimizer/{k}": v for k, v in load_file(place / "optimizer.safetensors").items()},
    }


def assert_equal_runs(one: Path, other: Path) -> None:
    for name in ("metrics.jsonl", "telemetry.jsonl", "journal.jsonl"):
        assert rows(one / name) == rows(other / name), name
    first, second = end(one), end(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    states = [
        json.loads((f / "checkpoints/step-00000060/state.json").read_text()) for f in (one, other)
    ]
    for state in states:
        state["observer"]["state"]["memory"].pop("best_speed")
        state["observer"].pop("positions")  # times have more digits or fewer
        state["observer"]["state"].pop("snapshots")  # copies do not outlive their process
        state["observer"].pop("whole")
        state.pop("logs")
    assert states[0] == states[1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, float]:
    """The uninterrupted run, and how long its training took."""
    runs = tmp_path_factory.mktemp("whole")
    assert python(START, str(runs), *SETTINGS).wait() == 0
    folder = next(runs.iterdir())
    times = [
        (f / "manifest.json").stat().st_mtime for f in sorted((folder / "checkpoints").iterdir())
    ]
    return folder, times[-1] - (folder / "config.json").stat().st_mtime


def kill_and_resume(runs: Path, delay: float) -> Path:
    """Kill a new run `delay` seconds after its folder is there, twice, then let it finish."""
    process = python(START, str(runs), *SETTINGS)
    while not list(runs.glob("*/environment.json")):
        assert process.poll() is None
        time.sleep(0.01)
    folder = next(runs.iterdir())
    for _ in range(2):
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process = python(RESUME, str(folder))
        delay = delay / 2 + 2.0
    assert process.wait() == 0
    return folder


def test_the_run_is_governed_and_acts(whole):
    kinds = [row["kind"] for row in rows(whole[0] / "journal.jsonl")]
    assert "change" in kinds
    assert "evidence" in kinds


def test_killed_early_and_resumed(whole, tmp_path):
    assert_equal_runs(whole[0], kill_and_resume(tmp_path, 0.3 * whole[1]))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("moment", range(20))
def test_killed_at_a_random_moment_and_resumed(whole, tmp_path, moment):
    delay = random.Random(moment).uniform(0, whole[1])
    assert_equal_runs(whole[0], kill_and_resume(tmp_path, delay))
