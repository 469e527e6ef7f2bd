"""What small experiments share: training a model, keeping what a seed came to, a row over seeds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import mse_loss

from sixfold.contracts import Batch
from sixfold.governor.sandbox import interval
from sixfold.record import Result, write_json
from sixfold.train.optimizer import OptimizerSettings, build_optimizer, set_rate


def train(
    model: nn.Module,
    batch: Callable[[int], Batch],
    rates: OptimizerSettings,
    steps: int,
    look: Callable[[int], None] = lambda step: None,
) -> None:
    """`steps` of AdamW on the squared error of batch(step); look(step) after each."""
    optimizer = build_optimizer(model, rates)
    for step in range(steps):
        set_rate(optimizer, rates.rate(step, steps))
        inputs, targets = batch(step)
        loss = mse_loss(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        look(step)


def copied(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's state, apart from the model."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def remembered(
    folder: Path, name: str, compute: Callable[[], dict[str, float]]
) -> dict[str, float]:
    """What `compute` returned when it first ran under this name.

    A folder knows nothing of the library that ran: another version of it begins another folder.
    """
    path = folder / f"{name.replace(', ', '-').replace(' ', '_')}.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, compute())
    return json.loads(path.read_text())


def row(experiment: str, case: str, metric: str, values: list[float]) -> Result:
    """The mean over seeds and half the width of its 95 % interval; one value has no spread."""
    low, high = interval(values) if len(values) > 1 else (values[0], values[0])
    mean, half = statistics.fmean(values), (high - low) / 2
    return Result(experiment, case, metric, mean, "1", half, len(values))
