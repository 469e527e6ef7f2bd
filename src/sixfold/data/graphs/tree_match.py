"""Tree-NeighborsMatch: the root of a binary tree must tell the value of the leaf with its own key.

A complete binary tree of a given depth, 2^depth leaves. Each leaf shows a key of its own (how many
blue neighbours it has) and a value, the root shows one of the keys. All that the leaves know must
pass the two edges at the root. Keys and values are one-hot, inner nodes show zeros.
Source: Alon and Yahav, On the Bottleneck of Graph Neural Networks, ICLR 2021 (arXiv:2006.05205),
section 4. There edges lead to the root alone; here they are undirected, as a Laplacian needs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sixfold.contracts import Batch
from sixfold.data.graphs._copies import asked, generator, require


@dataclass(frozen=True, kw_only=True)
class TreeMatch:
    """Trees of 2^(depth + 1) - 1 nodes, numbered level by level, each with a question to its root.

    Args:
        depth: hops from the root to every leaf.

    Raises:
        DataError: for a depth below 1.

    >>> graph, targets = TreeMatch(depth=1).train_batch(seed=0, step=0, size=1)
    >>> graph.nodes.tolist()  # key, then value: the root seeks the second key
    [[0.0, 1.0, 0.0, 0.0], [0.0, 1.0, 0.0, 1.0], [1.0, 0.0, 1.0, 0.0]]
    >>> targets.tolist()
    [1, -100, -100]
    """

    depth: int = 3

    def __post_init__(self) -> None:
        require(1, depth=self.depth)

    @property
    def classes(self) -> int:
        """Leaves, and with them keys and values."""
        return 2**self.depth

    @property
    def chance(self) -> float:
        """The accuracy of a guess among the values: 2^-depth."""
        return 1 / self.classes

    def train_batch(self, seed: int, step: int, size: int) -> Batch:
        """A `Graph` of `size` trees and targets (size * nodes,), from (seed, step) alone."""
        require(1, size=size)
        rng, leaves = generator(seed, step), self.classes
        # a random order of the leaves' keys, and another of their values
        keys, values = rng.random((2, size, leaves)).argsort(-1)
        sought = rng.integers(leaves, size=size)
        one_hot = np.eye(leaves)
        nodes = np.zeros((size, 2 * leaves - 1, 2 * leaves))
        nodes[:, leaves - 1 :] = np.concatenate([one_hot[keys], one_hot[values]], axis=-1)
        nodes[:, 0, :leaves] = one_hot[sought]
        answers = values[keys == sought[:, None]]
        children = np.arange(1, 2 * leaves - 1)
        return asked(nodes, np.stack([children, (children - 1) // 2]), 0, answers)


build = TreeMatch
