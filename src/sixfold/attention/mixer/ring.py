"""Heads on a cycle: two neighbours each. The simplest baseline of the hexagonal mixer."""

from __future__ import annotations

from sixfold.attention.mixer._graph import GraphMixer
from sixfold.contracts import Heads
from sixfold.geometry.graph import ring


def build(heads: Heads, **factory: object) -> GraphMixer:
    """The mixer of `heads`."""
    return GraphMixer(heads, ring(heads.num_heads), **factory)
