"""Which implementation serves a rating: a named one runs or raises, only ``auto`` chooses."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

from torch import Tensor

from sixfold.contracts import Distances, Features, Rating, Visibility
from sixfold.discover import unknown
from sixfold.ops.attend import fused, reference
from sixfold.ops.distance import numba, tiled, triton
from sixfold.ops.distance import reference as explicit

Attend = Callable[[Rating, Tensor, Visibility, float], Tensor]

SERVES: dict[type, dict[str, Attend]] = {
    Features: {"reference": reference.attend, "fused": fused.attend},
    Distances: {
        "reference": explicit.attend,
        "tiled": tiled.attend,
        "numba": numba.attend,
        "triton": triton.attend,
    },
}
IMPLEMENTATIONS = ("auto", *sorted({name for served in SERVES.values() for name in served}))
NUMBA = find_spec("numba") is not None


def check(kind: type, impl: str) -> None:
    """Raise ValueError for an implementation that does not exist or cannot serve this rating."""
    if impl not in IMPLEMENTATIONS:
        raise ValueError(unknown("impl", impl, IMPLEMENTATIONS))
    if impl != "auto" and impl not in SERVES[kind]:
        allowed = ", ".join(("auto", *SERVES[kind]))
        raise ValueError(f"impl {impl!r} cannot serve {kind.__name__}; choose from: {allowed}")


def fastest(rating: Rating, dropout: float) -> str:
    """The fastest implementation that this rating can have here."""
    if isinstance(rating, Features):
        return "fused"
    if rating.query.is_cuda and dropout == 0:
        return "triton"
    return "numba" if rating.query.device.type == "cpu" and NUMBA else "tiled"


def attend(
    rating: Rating, value: Tensor, visibility: Visibility, dropout: float, impl: str = "auto"
) -> Tensor:
    """Attention by the implementation of that name: (b, h, n, d_v).

    Args:
        rating: `Features` or `Distances`.
        value: (b, h_kv, m, d_v).
        visibility: which keys each query sees.
        dropout: probability of dropping a weight.
        impl: one of `IMPLEMENTATIONS`.
    """
    chosen = fastest(rating, dropout) if impl == "auto" else impl
    return SERVES[type(rating)][chosen](rating, value, visibility, dropout)
