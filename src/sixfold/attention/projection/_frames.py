"""Frames of tokens: elements of so(d) or gl(d), learned per position or read from the token."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sixfold.contracts import Heads
from sixfold.geometry.frames import bounded, cayley, dimension, element, powers
from sixfold.ops.precision import exact, wide

LONGEST = 1000.0  # ratio of the slowest head's wavelength to the fastest one's
PERIOD = 1024  # positions over which a gl(d) frame may grow by a factor of e


class Frames(NamedTuple):
    """U, its inverse, and log |det U|."""

    frame: Tensor
    inverse: Tensor
    log_volume: Tensor | float


class PositionFrames(nn.Module):
    """U_i = exp(i A_h): two positions differ by exp((i - j) A_h), as in rotary embedding.

    The coordinates of A_h are learned. Elements of gl(d) are kept
    at |A_h| < 1 / PERIOD, for their powers grow.
    """

    def __init__(self, heads: Heads, algebra: str, **factory: Any) -> None:
        super().__init__()
        self.algebra, self.d = algebra, heads.head_dim
        speed = LONGEST ** -torch.linspace(0, 1, heads.num_kv_heads, **factory)
        size = (heads.num_kv_heads, dimension(algebra, self.d))
        start = torch.randn(size, **factory) * self.d**-0.5
        self.coordinates = nn.Parameter(start * speed[:, None])

    def forward(self, tokens: Tensor, past: int) -> Frames:
        """Frames (h_kv, n, d, d) of positions past .. past + n - 1."""
        n = tokens.shape[1]
        with exact(tokens):
            return self._frames(past, n)

    def _frames(self, past: int, n: int) -> Frames:
        step = element(wide(self.coordinates), self.algebra, self.d)
        if self.algebra == "so":
            frame = powers(step, past, n)
            return Frames(frame, frame.mT, 0.0)
        step = bounded(step) / PERIOD
        position = torch.arange(past, past + n, device=step.device, dtype=step.dtype)
        volume = step.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None] * position
        return Frames(powers(step, past, n), powers(-step, past, n), volume)


class TokenFrames(nn.Module):
    """U_i = cayley(A(W x_i)): a frame per token and key head."""

    def __init__(self, heads: Heads, algebra: str, **factory: Any) -> None:
        super().__init__()
        self.algebra, self.d, self.count = algebra, heads.head_dim, heads.num_kv_heads
        rows = self.count * dimension(algebra, self.d)
        self.coordinates = nn.Linear(heads.d_model, rows, bias=False, **factory)
        nn.init.normal_(self.coordinates.weight, std=(heads.d_model * heads.head_dim) ** -0.5)

    def forward(self, tokens: Tensor, past: int) -> Frames:  # noqa: ARG002
        """Frames (b, h_kv, n, d, d) of these tokens, wherever they stand."""
        coordinates = self.coordinates(tokens).unflatten(-1, (self.count, -1)).transpose(1, 2)
        with exact(tokens):
            turn = element(wide(coordinates), self.algebra, self.d)
            if self.algebra == "so":
                frame = cayley(turn)
                return Frames(frame, frame.mT, 0.0)
            turn = bounded(turn)
            frame = cayley(turn)
            return Frames(frame, cayley(-turn), torch.linalg.slogdet(frame).logabsdet)


PER = {"position": PositionFrames, "token": TokenFrames}
