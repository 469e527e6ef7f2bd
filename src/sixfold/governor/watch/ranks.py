"""One snapshot for all processes: each sees its own batch, and all must decide alike."""

from __future__ import annotations

import math
import statistics

import torch
from torch import distributed

from sixfold.contracts import Snapshot

LEAST = ("entropy", "rank_distance", "stable_rank", "tokens_per_s")
"""Signals whose smallest value is the worst; of the others it is the largest."""


def joined(snapshot: Snapshot, device: torch.device, *, sampled: bool) -> Snapshot:
    """The worst of every signal over all processes, the mean of the loss; one exchange a sample.

    Between samples nothing is exchanged, and what differs between processes is left out: the norm
    of the gradients, which they share, stays.
    """
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return snapshot
    if not sampled:
        shared = {
            k: v for k, v in snapshot.scalars.items() if k in ("gradient_norm", "learning_rate")
        }
        return snapshot._replace(loss=math.nan, scalars=shared)
    mine = packed(snapshot)
    rows = [torch.empty_like(mine, device=device) for _ in range(distributed.get_world_size())]
    distributed.all_gather(rows, mine.to(device))
    return unpacked(snapshot, [row.tolist() for row in rows])


def packed(snapshot: Snapshot) -> torch.Tensor:
    """All figures of a snapshot in one row."""
    values = [snapshot.loss]
    for name in sorted(snapshot.signals):
        values += [value for heads in snapshot.signals[name] for value in heads]
    for group in (snapshot.scalars, snapshot.times_us):
        values += [group[name] for name in sorted(group)]
    return torch.tensor(values, dtype=torch.float64)


def worst(name: str, values: list[float]) -> float:
    """The worst of some figures; one that is not a number is worse than all."""
    if any(map(math.isnan, values)):
        return math.nan
    return min(values) if name in LEAST or name == "loss_finite" else max(values)


def unpacked(snapshot: Snapshot, rows: list[list[float]]) -> Snapshot:
    """A snapshot of the shape of `snapshot` from the rows of all processes."""
    columns = iter(zip(*rows, strict=True))
    loss = statistics.fmean(next(columns))
    signals = {
        name: tuple(
            tuple(worst(name, list(next(columns))) for _ in heads)
            for heads in snapshot.signals[name]
        )
        for name in sorted(snapshot.signals)
    }
    groups = [
        {name: worst(name, list(next(columns))) for name in sorted(group)}
        for group in (snapshot.scalars, snapshot.times_us)
    ]
    return Snapshot(snapshot.step, loss, signals, *groups)
