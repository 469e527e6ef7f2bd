"""What a named class settles itself, and no further option may settle otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def check_own(layer: str, options: Mapping[str, Any], **by: str) -> None:
    """Raise ValueError for an option of `MultiHeadAttention` that a class takes by other names.

    >>> check_own("GaugeAttention", {"score": "dot"}, score="kappa and learn_kappa")
    Traceback (most recent call last):
    ValueError: score of GaugeAttention is given by kappa and learn_kappa, got score 'dot'
    """
    for name, others in by.items():
        if name in options:
            raise ValueError(
                f"{name} of {layer} is given by {others}, got {name} {options[name]!r}"
            )


def check_part(options: Mapping[str, Any], kind: str, name: str, where: str) -> None:
    """Raise ValueError for a part of another name than the one that is asked for already.

    >>> check_part({"mixer": "ring"}, "mixer", "spectral", "where use_spectral is True")
    Traceback (most recent call last):
    ValueError: mixer must be 'spectral' where use_spectral is True, got 'ring'
    """
    part = options.get(kind, name)
    if (part.get("name") if isinstance(part, Mapping) else part) != name:
        raise ValueError(f"{kind} must be {name!r} {where}, got {part!r}")
