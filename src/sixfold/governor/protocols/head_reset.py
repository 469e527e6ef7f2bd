"""Let one head start again: new W_Q, W_K and W_V, and no moments of the optimizer.

``orthogonal`` rows of the size that the other heads' weights have, ``xavier`` uniform ones (Glorot
and Bengio 2010), or the mean of the head's ``neighbours``: on the hexagonal grid, or beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sixfold.contracts import Expectation, HeadId
from sixfold.discover import unknown
from sixfold.governor.alarms import Alarm
from sixfold.governor.protocols._weights import Weights

METHODS = ("orthogonal", "xavier", "neighbours")


@dataclass(frozen=True)
class HeadReset(Weights):
    """New weights for one head."""

    name: ClassVar[str] = "head_reset"
    cost: ClassVar[str] = "what the head had learned is lost"
    roles: ClassVar[str] = "qkv"
    method: str = "orthogonal"

    def altered(
        self, weight: Tensor, role: str, subject: Any, generator: torch.Generator
    ) -> Tensor:
        """A fresh weight; biases become zero."""
        if weight.ndim == 1:
            return torch.zeros_like(weight)
        layer = subject.layers[self.target.layer]
        weights = layer.matrices()[role]
        if self.method == "neighbours":
            fresh = weights[near(layer, self.target.head, len(weights))].float().mean(0)
            # some models keep their matrices the other way round
            return (fresh if fresh.shape == weight.shape else fresh.T).to(weight)
        fresh = torch.empty(weight.shape)
        if self.method == "xavier":
            return torch.nn.init.xavier_uniform_(fresh, generator=generator).to(weight)
        torch.nn.init.orthogonal_(fresh, generator=generator)
        usual = usual_size(layer.matrices(), role)
        scale = 1.0 if usual is None else usual / float(fresh.square().mean().sqrt())
        return (fresh * scale).to(weight)


def usual_size(weights: Mapping[str, Tensor], role: str) -> float | None:
    """Median over heads of the root mean square of their weights of a role.

    Weights of zero say nothing of how large others should be: where all heads' are, those of the
    layer's other roles tell it, and None where all are zero.
    """
    sizes = {name: w.float().square().mean((1, 2)).sqrt() for name, w in weights.items()}
    for known in (sizes[role], torch.cat(list(sizes.values()))):
        if known.any():
            return float(known[known > 0].median())
    return None


def near(layer: Any, head: int, count: int) -> list[int]:
    """The heads next to this one, of `count` heads that have a matrix of their own."""
    if layer.grid is not None and count == layer.num_heads:
        return layer.grid.adjacency()[head].nonzero().flatten().tolist()
    own = head * count // layer.num_heads
    found = [other for other in (own - 1, own + 1) if 0 <= other < count]
    if not found:
        raise ValueError("method 'neighbours' needs more than one head")
    return found


def build(target: HeadId, alarm: Alarm, within: int, method: str = "orthogonal") -> HeadReset:
    """The signal that alarmed must move towards its limit.

    Raises ValueError for an unknown method.
    """
    if method not in METHODS:
        raise ValueError(unknown("method", method, METHODS))
    rises = alarm.signal in ("entropy", "gradient_norm")
    expects = Expectation(alarm.signal, target, "rise" if rises else "fall", alarm.value, within)
    return HeadReset(target, expects, method)
