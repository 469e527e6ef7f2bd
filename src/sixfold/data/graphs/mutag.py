"""MUTAG: 188 molecules as graphs, mutagenic (1) or not (0).

Debnath et al. 1991, as graphs by Kriege and Mutzel 2012: atoms are nodes, bonds are edges, without
hydrogen. The seven kinds of atoms are features; kinds of bonds are not read.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from sixfold.contracts import Graph
from sixfold.data._root import find
from sixfold.data.graphs._labelled import LabelledGraphs, undirected
from sixfold.errors import DataError

PARTS = ("A", "graph_indicator", "graph_labels", "node_labels")
FILES = tuple(f"mutag/MUTAG/MUTAG_{part}.txt" for part in PARTS)
HOME = "https://chrsmrrs.github.io/datasets (MUTAG)"


def build() -> LabelledGraphs:
    """3,371 atoms of 188 molecules, features (3371, 7) one-hot: C, N, O, F, I, Cl, Br.

    Raises DataMissing without the files, DataError for one that does not hold whole numbers.
    """
    pairs, member, labels, kinds = (_numbers(find(file, HOME)) for file in FILES)
    edges = undirected(pairs.reshape(-1, 2) - 1)
    nodes = torch.eye(int(kinds.max()) + 1)[torch.from_numpy(kinds)]
    graph = Graph(nodes, edges, torch.from_numpy(member - 1))
    return LabelledGraphs(graph, torch.from_numpy((labels > 0).astype(np.int64)), num_classes=2)


def miniature(*, seed: int = 0) -> LabelledGraphs:
    """Generated: 40 graphs of 6 to 9 nodes, rings (1) and stars (0), features (n, 2) at random.

    >>> miniature().labels[:4]
    tensor([0, 1, 0, 1])
    """
    rng = np.random.default_rng(seed)
    sizes, labels = rng.integers(6, 10, 40), np.arange(40) % 2
    starts = np.cumsum(sizes) - sizes
    pairs = [
        [start + i * label, start + (i + 1) % size]
        for start, size, label in zip(starts, sizes, labels, strict=True)
        for i in range(size - 1 + label)
    ]
    nodes = torch.eye(2)[torch.from_numpy(rng.integers(0, 2, sizes.sum()))]
    member = torch.from_numpy(np.repeat(np.arange(40), sizes))
    graph = Graph(nodes, undirected(np.array(pairs)), member)
    return LabelledGraphs(graph, torch.from_numpy(labels), num_classes=2)


def _numbers(path: Path) -> np.ndarray:
    """All whole numbers of a file of lines with commas between them."""
    try:
        return np.array(path.read_text().replace(",", " ").split(), dtype=np.int64)
    except ValueError as error:
        raise DataError(f"{path} must hold whole numbers: {error}") from error
