"""The RFCs of the Internet: documents as nodes, citations as edges, working groups as classes.

9,148 documents, 1969 to 2023, from https://www.rfc-editor.org: the terms each uses, its
year, what it cites. 2,886 of them are by one of the 60 largest working groups, and have its
number as their label; citations are taken both ways.
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
    first_of_each,
    split,
    undirected,
    words,
)
from sixfold.discover import unknown
from sixfold.errors import DataError

FILES = ("rfc-citations/rfc.npz",)
HOME = "https://www.rfc-editor.org/rfc-index.xml (citations and words gathered in one .npz)"
EACH, HELD = 20, 500
SPLITS = ("random", "first")


def build(*, part: Literal["random", "first"] = "random", seed: int = 0) -> LabelledNodes:
    """Features (9148, 3000), shares of words; 97,680 edges, both ways; 60 classes.

    20 documents of every group train, 500 of the others validate and 1,186 test. ``random`` draws
    the 20 by the seed, ``first`` takes the oldest: then what a group wrote later is asked.

    Raises DataMissing without ``rfc-citations/rfc.npz``, DataError for another way to part them.
    """
    if part not in SPLITS:
        raise DataError(unknown("part", part, SPLITS))
    rng = np.random.default_rng(seed)
    with np.load(find(FILES[0], HOME)) as arrays:
        graph, labels = alone(features(arrays), undirected(arrays["edges"])), arrays["label"]
        if part == "random":
            parts = split(rng, labels, EACH, HELD)
        else:
            order = np.argsort(arrays["year"], kind="stable")
            parts = first_of_each(order[labels[order] >= 0], rng, labels, EACH, HELD)
    known = torch.from_numpy(labels.astype(np.int64))
    return LabelledNodes(graph, known, int(known.max()) + 1, *parts)


def miniature(*, seed: int = 0) -> LabelledNodes:
    """Generated: 120 nodes with 16 words, 80 of them in one of 4 classes and 40 in none.

    >>> data = miniature()
    >>> data.graph.nodes.shape, int((data.labels < 0).sum()), len(data.test)
    (torch.Size([120, 16]), 40, 40)
    """
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(80) % 4, np.full(40, -1)])
    graph = alone(words(rng, labels % 5, 16), undirected(blocks(rng, labels, 0.12, 0.02)))
    return LabelledNodes(graph, torch.from_numpy(labels), 4, *split(rng, labels, 5, 20))
