"""``agents``: one token as an agent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Agent", "stack", "tokens_as_agents"]


class Agent(NamedTuple):
    """A belief N(mu, Sigma) in the frame exp(phi), at a position of the sequence."""

    mu: Tensor
    Sigma: Tensor
    phi: Tensor
    pos: int


def tokens_as_agents(mu: Tensor, Sigma: Tensor, phi: Tensor) -> list[Agent]:  # noqa: N803
    """One agent per token: (n, d), (n, d, d) and (n, g), in order."""
    parts = zip(mu, Sigma, phi, strict=True)
    return [Agent(*part, pos=position) for position, part in enumerate(parts)]


def stack(agents: Sequence[Agent]) -> tuple[Tensor, Tensor, Tensor]:
    """mu (n, d), Sigma (n, d, d) and phi (n, g) of agents, by position.

    Raises ValueError where there is no agent.
    """
    if not agents:
        raise ValueError("agents must hold one or more, got none")
    ordered = sorted(agents, key=lambda agent: agent.pos)
    mu, Sigma, phi = (torch.stack(part) for part in list(zip(*ordered, strict=True))[:3])  # noqa: N806
    return mu, Sigma, phi
