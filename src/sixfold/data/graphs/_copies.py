"""What the tasks on graphs share: one graph many times side by side, and a question to each."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sixfold.contracts import Batch, Graph
from sixfold.errors import DataError

IGNORED = -100
"""The target of a node that is not asked, which `cross_entropy` leaves out."""


def generator(seed: int, step: int) -> np.random.Generator:
    """Random numbers that depend on (seed, step) alone."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(step,)))


def asked(nodes: np.ndarray, pairs: np.ndarray, place: int, answers: np.ndarray) -> Batch:
    """Copies of a graph side by side, and targets (N * n,): `IGNORED` but for answers at `place`.

    Args:
        nodes: (N, n, f), what is known of the nodes of each copy.
        pairs: (2, e), the undirected edges of the graph, each once.
        place: the node that is asked.
        answers: (N,), what it should say.
    """
    count, size, _ = nodes.shape
    edges = torch.from_numpy(np.concatenate([pairs, pairs[::-1]], axis=1))
    offsets = size * torch.arange(count)
    targets = torch.full((count, size), IGNORED)
    targets[:, place] = torch.from_numpy(answers)
    graph = Graph(
        torch.from_numpy(nodes.astype(np.float32)).flatten(0, 1),
        (edges[:, None] + offsets[:, None]).flatten(1),
        torch.arange(count).repeat_interleave(size),
    )
    return Batch(graph, targets.flatten())


def share_right(logits: Tensor, targets: Tensor) -> float:
    """Which share of the nodes that are asked have their answer as the largest of their logits.

    >>> share_right(torch.tensor([[0.0, 1.0], [2.0, 1.0], [0.0, 3.0]]), torch.tensor([1, 1, -100]))
    0.5
    """
    told = targets != IGNORED
    return float((logits[told].argmax(-1) == targets[told]).float().mean())


def require(least: int, **values: int) -> None:
    """DataError naming the first of the values that is no whole number, or lies below `least`."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise DataError(f"{name} must be a whole number of at least {least}, not {value!r}")
