"""Rotary position embedding."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, offset: int, theta: float) -> Tensor:
    """The tokens of x (b, h, n, d) turned by their positions, the first of which is `offset`."""
    exact = torch.promote_types(x.dtype, torch.float32)
    position = torch.arange(offset, offset + x.shape[-2], device=x.device, dtype=exact)
    return turn(x, position, theta)


def turn(x: Tensor, position: Tensor, theta: float) -> Tensor:
    """Turn each feature pair (x_i, x_{i + d/2}) by position * theta^(-2i/d).

    Inner products then depend on relative position only.

    Args:
        x: (..., n, d), d even.
        position: (..., n), fractions too; broadcast to the tokens of x.
        theta: base of the geometric series of wavelengths.

    Source: Su et al., RoFormer, arXiv 2104.09864, eq. 34 (half-split pairing as in LLaMA).
    """
    half = x.shape[-1] // 2
    exact = {"device": x.device, "dtype": torch.promote_types(x.dtype, torch.float32)}
    grid = torch.arange(half, **exact)
    angle = position[..., None].to(**exact) * theta ** (-grid / half)
    cosine, sine = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)
