"""Ring transfer: a node must tell the label of the node at the other side of its ring.

A ring of 2 * length nodes. Node 0 is asked and shows zeros, node `length` shows its label one-hot.
The others show ones, or where `others="labels"` labels of their own: then nothing but its place
tells which label is meant.
Source: Bodnar et al., Weisfeiler and Lehman Go Cellular: CW Networks, NeurIPS 2021, section 5; as a
test of over-squashing Di Giovanni et al. 2023 (arXiv:2302.02941), section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from sixfold.contracts import Batch
from sixfold.data.graphs._copies import asked, generator, require
from sixfold.discover import unknown
from sixfold.errors import DataError

OTHERS = ("ones", "labels")


@dataclass(frozen=True, kw_only=True)
class RingTransfer:
    """Rings of 2 * length nodes, each with one question that reaches `length` hops.

    Args:
        length: hops from the node that is asked to the one that knows.
        classes: labels there are, equally likely.
        others: what the remaining nodes show.

    Raises:
        DataError: for a length or a number of classes that is not whole or below 2, and unknown
            `others`.

    >>> graph, targets = RingTransfer(length=2, classes=3).train_batch(seed=0, step=0, size=1)
    >>> graph.nodes.tolist(), targets.tolist()
    ([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [1.0, 0.0, 0.0], [1.0, 1.0, 1.0]], [0, -100, -100, -100])
    """

    length: int = 10
    classes: int = 5
    others: Literal["ones", "labels"] = "ones"

    def __post_init__(self) -> None:
        require(2, length=self.length, classes=self.classes)
        if self.others not in OTHERS:
            raise DataError(unknown("others", self.others, OTHERS))

    @property
    def chance(self) -> float:
        """The accuracy of a guess that knows all but the label: 1 / classes."""
        return 1 / self.classes

    def train_batch(self, seed: int, step: int, size: int) -> Batch:
        """A `Graph` of `size` rings and targets (size * 2 * length,), from (seed, step) alone."""
        require(1, size=size)
        places = np.arange(2 * self.length)
        labels = generator(seed, step).integers(self.classes, size=(size, len(places)))
        nodes = np.eye(self.classes)[labels]
        if self.others == "ones":
            nodes[:, places != self.length] = 1.0
        nodes[:, 0] = 0.0
        pairs = np.stack([places, np.roll(places, -1)])
        return asked(nodes, pairs, 0, labels[:, self.length])


build = RingTransfer
