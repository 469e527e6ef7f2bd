"""The evaluator: fork a run, train on the same batches with and without a change, compare."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from sixfold.contracts import Change, Effect
from sixfold.governor.architect import LeadMetaArchitect
from sixfold.train.checkpoint import random_states, set_random_states
from sixfold.train.loop import Training, step_settings
from sixfold.train.optimizer import set_rate
from sixfold.train.step import train_step

# two-sided 95 % quantiles of Student's t for 1 to 30 degrees of freedom, then the normal one
T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
    2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
    2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
NORMAL95 = 1.960


class Fork(NamedTuple):
    """A run at one moment: everything that its next steps depend on."""

    model: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    random: dict[str, torch.Tensor]
    training: bool


def freeze(run: Training) -> Fork:
    """Copy the state of a run."""
    return Fork(
        copy.deepcopy(run.model.state_dict()),
        copy.deepcopy(run.optimizer.state_dict()),
        random_states(),
        run.model.training,
    )


def thaw(run: Training, fork: Fork) -> None:
    """Put the state of a run back, to the bit."""
    run.model.load_state_dict(fork.model)
    run.optimizer.load_state_dict(copy.deepcopy(fork.optimizer))
    set_random_states(fork.random)
    run.model.train(fork.training)


@contextmanager
def forked(run: Training) -> Iterator[Fork]:
    """Whatever happens inside, the run is afterwards what it was before."""
    fork = freeze(run)
    try:
        yield fork
    finally:
        thaw(run, fork)


def interval(differences: list[float]) -> tuple[float, float]:
    """95 % confidence interval of the mean difference, by Student's t.

    >>> [round(end, 2) for end in interval([1.0, 2.0, 3.0])]
    [-0.48, 4.48]
    """
    mean, count = statistics.fmean(differences), len(differences)
    if count < 2:
        return (-math.inf, math.inf)
    quantile = T95[count - 2] if count - 1 <= len(T95) else NORMAL95
    half = quantile * statistics.stdev(differences) / math.sqrt(count)
    return (mean - half, mean + half)


def mean_loss(
    run: Training, governor: LeadMetaArchitect, seed: int, start: int, steps: int
) -> float:
    """Train some steps on the batches of `seed`, and return their mean loss."""
    losses = []
    for step in range(start, start + steps):
        batch = run.dataset.train_batch(seed, step, run.settings.batch_size)
        set_rate(run.optimizer, run.rates.rate(step, run.settings.steps))
        report = train_step(
            run.model, run.optimizer, batch, step_settings(run), governor.penalty, run.world
        )
        losses.append(report.loss)
    return statistics.fmean(losses)


def paired_effect(
    run: Training,
    governor: LeadMetaArchitect,
    change: Change,
    *,
    start: int,
    steps: int = 20,
    forks: int = 5,
) -> Effect:
    """What a change does to the loss, on this run, from now.

    Each fork trains `steps` steps twice from the same state, on the same batches: once as it is,
    once with the change. Forks differ in their batches, which come from seeds of their own. The run
    itself is left as it was, to the bit.

    Args:
        run: the run; it must stand between two steps.
        governor: the governor attached to it, which executes the change.
        change: what to try.
        start: first step of the forks, for batches and learning rates.
        steps: length of a fork.
        forks: how many pairs; the interval is over them.

    Returns:
        Mean loss over each fork with and without, their mean difference (below 0: the change
        helps) and its 95 % interval.
    """

    with_change, without = [], []
    with governor.resting():
        for number in range(1, forks + 1):
            seed = run.settings.seed + 1_000_003 * number
            with forked(run):
                without.append(mean_loss(run, governor, seed, start, steps))
            with forked(run), governor.trying(change):
                with_change.append(mean_loss(run, governor, seed, start, steps))
    differences = [a - b for a, b in zip(with_change, without, strict=True)]
    return Effect(
        tuple(with_change), tuple(without), statistics.fmean(differences), interval(differences)
    )
