"""Structured attention for PyTorch, and a governor that watches, explains and repairs a run."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "DistanceBasedAttention": "sixfold.attention.named.distance",
    "DistanceType": "sixfold.attention.named.distance",
    "EmergentHierarchicalAttention": "sixfold.attention.named.emergent",
    "GaugeAttention": "sixfold.attention.named.gauge",
    "GraphClassifier": "sixfold.models.graph",
    "HexCoordinate": "sixfold.geometry.hexgrid",
    "HexGrid": "sixfold.geometry.hexgrid",
    "HexagonalMultiHeadAttention": "sixfold.attention.named.hexagonal",
    "LanguageModel": "sixfold.models.language",
    "LeadMetaArchitect": "sixfold.governor.architect",
    "MultiHeadAttention": "sixfold.attention.multihead",
    "NodeClassifier": "sixfold.models.node",
    "PhysicsSimulator": "sixfold.models.simulator",
    "SequenceClassifier": "sixfold.models.classifier",
    "SoftConsensusDetector": "sixfold.attention.hierarchy",
    "SpectralGraphAttention": "sixfold.attention.graph",
    "SpectralHexagonalAttention": "sixfold.attention.named.hexagonal",
    "TelemetryVisualizer": "sixfold.report.figures",
    "VisionTransformer": "sixfold.models.vision",
    "analyze": "sixfold.analysis.run",
    "plot_hexagonal_grid": "sixfold.report.figures",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'sixfold' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
