"""Real graphs with labels: on their nodes, or on each of many graphs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sixfold.contracts import Batch, Graph
from sixfold.errors import DataError


@dataclass(frozen=True, eq=False)
class LabelledNodes:
    """One graph whose nodes have a class each, and which of them train, validate and test.

    A model sees all nodes and edges at all times (transductive); only labels are held back.

    labels (n,) int64, -1 where a node has none; train, validation and test are nodes, int64.

    Raises DataError for features that are not finite, a label outside [-1, num_classes), and parts
    that are empty, overlap or hold nodes without a label.
    """

    graph: Graph
    labels: Tensor
    num_classes: int
    train: Tensor
    validation: Tensor
    test: Tensor

    def __post_init__(self) -> None:
        if not self.graph.nodes.isfinite().all():
            raise DataError("features of the nodes must be finite")
        if not bool(((self.labels >= -1) & (self.labels < self.num_classes)).all()):
            raise DataError(f"labels must lie in [0, {self.num_classes}), or be -1 for none")
        parts = {"train": self.train, "validation": self.validation, "test": self.test}
        for name, nodes in parts.items():
            if not len(nodes) or bool((self.labels[nodes] < 0).any()):
                raise DataError(f"{name} must hold nodes, all of them with a label")
        together = torch.cat(list(parts.values()))
        if len(together.unique()) != len(together):
            raise DataError("train, validation and test must not share a node")


@dataclass(frozen=True, eq=False)
class LabelledGraphs:
    """Many graphs side by side, with a class each: labels (g,) int64 in [0, num_classes).

    Raises DataError for features that are not finite, and where labels and graphs do not fit.
    """

    graph: Graph
    labels: Tensor
    num_classes: int

    def __post_init__(self) -> None:
        if not self.graph.nodes.isfinite().all():
            raise DataError("features of the nodes must be finite")
        count = int(self.graph.member.max()) + 1
        if len(self.labels) != count:
            raise DataError(f"there are {count} graphs, but {len(self.labels)} labels")
        if not bool(((self.labels >= 0) & (self.labels < self.num_classes)).all()):
            raise DataError(f"labels must lie in [0, {self.num_classes})")

    def part(self, which: Tensor) -> Batch:
        """The graphs of these numbers (k,), ascending, side by side, and their labels (k,)."""
        which = which.sort().values
        nodes, edges, member = self.graph
        kept = torch.isin(member, which)
        number = kept.cumsum(0) - 1
        inside = kept[edges[0]]
        graph = Graph(
            nodes[kept], number[edges[:, inside]], torch.searchsorted(which, member[kept])
        )
        return Batch(graph, self.labels[which])

    def folds(self, count: int, seed: int) -> list[Tensor]:
        """Numbers of the graphs in `count` parts, each class spread over them evenly.

        Raises DataError for fewer parts than 2 or more than graphs.
        """
        if not 2 <= count <= len(self.labels):
            raise DataError(f"count must be in [2, {len(self.labels)}], not {count}")
        order = np.random.default_rng(seed).permutation(len(self.labels))
        order = order[np.argsort(self.labels.numpy()[order], kind="stable")]
        return [torch.from_numpy(np.sort(order[start::count])) for start in range(count)]


# ---------------------------------------------------------------- from files


def features(arrays: Mapping[str, np.ndarray]) -> Tensor:
    """Term counts (n, f) in rows of shares that sum to 1, from compressed sparse rows.

    A node without terms keeps a row of zeros. Source of the scaling: Kipf and Welling,
    arXiv 1609.02907, section 5.2.
    """
    counts = torch.zeros(*arrays["shape"].tolist())
    offsets = arrays["x_indptr"].astype(np.int64)
    row = torch.from_numpy(np.repeat(np.arange(len(counts)), np.diff(offsets)))
    column = torch.from_numpy(arrays["x_indices"].astype(np.int64))
    counts[row, column] = torch.from_numpy(arrays["x_data"])
    return counts / counts.sum(1, keepdim=True).clamp(min=torch.finfo(counts.dtype).tiny)


def undirected(pairs: np.ndarray) -> Tensor:
    """Edges (2, e) both ways, of pairs (p, 2) in any direction; each once, none to itself."""
    pairs = pairs[pairs[:, 0] != pairs[:, 1]].astype(np.int64)
    both = np.unique(np.concatenate([pairs, pairs[:, ::-1]]), axis=0)
    return torch.from_numpy(np.ascontiguousarray(both.T))


def alone(nodes: Tensor, edges: Tensor) -> Graph:
    """One graph of these nodes and edges."""
    return Graph(nodes, edges, torch.zeros(len(nodes), dtype=torch.int64))


# ---------------------------------------------------------------- generated


def blocks(
    rng: np.random.Generator, labels: np.ndarray, inside: float, across: float
) -> np.ndarray:
    """Pairs (p, 2) of a stochastic block model: joined with a probability by class.

    Source: Holland, Laskey, Leinhardt, Stochastic blockmodels: first steps (1983).
    """
    chance = np.where(labels[:, None] == labels, inside, across)
    return np.argwhere(np.triu(rng.random(chance.shape) < chance, 1))


def words(rng: np.random.Generator, labels: np.ndarray, vocabulary: int) -> Tensor:
    """Rows (n, vocabulary) of shares of ten words, three of which are those of the class."""
    counts = np.zeros((len(labels), vocabulary), dtype=np.float32)
    for row, label in zip(counts, labels, strict=True):
        own = 2 * label + rng.integers(0, 2, 3)
        np.add.at(row, np.concatenate([own, rng.integers(0, vocabulary, 7)]), 0.1)
    return torch.from_numpy(counts)


def split(rng: np.random.Generator, labels: np.ndarray, each: int, held: int) -> list[Tensor]:
    """Nodes drawn at random: `each` of every class, `held` of the rest, all others."""
    order = rng.permutation(np.flatnonzero(labels >= 0))
    return first_of_each(order, rng, labels, each, held)


def first_of_each(
    order: np.ndarray, rng: np.random.Generator, labels: np.ndarray, each: int, held: int
) -> list[Tensor]:
    """As `split`, but the `each` of a class are the first in `order`."""
    classes = np.unique(labels[order])
    train = np.concatenate([order[labels[order] == label][:each] for label in classes])
    rest = rng.permutation(np.setdiff1d(order, train))
    return [torch.from_numpy(np.sort(part)) for part in (train, rest[:held], rest[held:])]
