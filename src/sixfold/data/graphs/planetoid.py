"""Cora and Citeseer: papers as nodes, citations as edges, the words of a paper as its features.

The public split of Yang et al., arXiv 1603.08861, over the graphs of Sen et al., Collective
Classification in Network Data (2008): 20 papers of each class train, 500 validate, 1,000 test.
Citations are taken both ways.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch

from sixfold.data._root import find
from sixfold.data.graphs._labelled import (
    LabelledNodes,
    alone,
    blocks,
    features,
    split,
    undirected,
    words,
)
from sixfold.discover import unknown
from sixfold.errors import DataError

GRAPHS = ("cora", "citeseer")
FILES = tuple(f"planetoid/{name}.npz" for name in GRAPHS)
HOME = "https://github.com/kimiyoung/planetoid (as one .npz for each graph)"


def build(*, name: Literal["cora", "citeseer"] = "cora") -> LabelledNodes:
    """2,708 papers of 7 classes (cora) or 3,327 of 6 (citeseer).

    Features (n, 1433) or (n, 3703) are shares of words, so that rows sum to 1. 15 papers of
    Citeseer have neither words nor a label.

    Raises DataMissing without ``planetoid/*.npz``, DataError for another name.
    """
    if name not in GRAPHS:
        raise DataError(unknown("graph", name, GRAPHS))
    with np.load(find(f"planetoid/{name}.npz", HOME)) as arrays:
        labels = torch.from_numpy(arrays["label"].astype(np.int64))
        parts = (torch.from_numpy(arrays[part]) for part in ("train", "val", "test"))
        graph = alone(features(arrays), undirected(arrays["edges"]))
        return LabelledNodes(graph, labels, int(labels.max()) + 1, *parts)


def miniature(*, seed: int = 0) -> LabelledNodes:
    """Generated: 90 nodes of 3 classes with 12 words, joined more often inside a class.

    >>> data = miniature()
    >>> data.graph.nodes.shape, len(data.train), len(data.validation), len(data.test)
    (torch.Size([90, 12]), 15, 25, 50)
    """
    rng = np.random.default_rng(seed)
    labels = np.arange(90) % 3
    graph = alone(words(rng, labels, 12), undirected(blocks(rng, labels, 0.15, 0.02)))
    return LabelledNodes(graph, torch.from_numpy(labels), 3, *split(rng, labels, 5, 25))
