"""Every head a neighbour of every other: what a sparse head graph has to beat."""

from __future__ import annotations

from sixfold.attention.mixer._graph import GraphMixer
from sixfold.contracts import Heads
from sixfold.geometry.graph import complete


def build(heads: Heads, **factory: object) -> GraphMixer:
    """The mixer of `heads`."""
    return GraphMixer(heads, complete(heads.num_heads), **factory)
