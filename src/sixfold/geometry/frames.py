"""Frames: invertible matrices built from elements of a Lie algebra.

A frame U takes the common frame to a token's own: a vector v in the common frame reads U v there.
so(d) is the antisymmetric matrices (frames are rotations), gl(d) all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sixfold.discover import unknown
from sixfold.geometry.gaussian import triangle

ALGEBRAS = ("so", "gl")
NEAR = 32  # a power of two
LARGEST_NORM = 1.0  # of a gl(d) element under `cayley`: it must keep clear of the pole at 2


def dimension(algebra: str, d: int) -> int:
    """Numbers an element takes: d (d - 1) / 2 in so(d), d^2 in gl(d).

    Raises ValueError for another algebra.
    """
    if algebra not in ALGEBRAS:
        raise ValueError(unknown("algebra", algebra, ALGEBRAS))
    return d * d if algebra == "gl" else d * (d - 1) // 2


def element(coordinates: Tensor, algebra: str, d: int) -> Tensor:
    """The matrix with these coordinates, (..., g) to (..., d, d).

    In so(d) they fill the lower triangle row by row, and the upper one with the opposite sign.

    >>> element(torch.tensor([1.0]), "so", 2)
    tensor([[ 0., -1.],
            [ 1.,  0.]])
    """
    if algebra == "gl":
        return coordinates.unflatten(-1, (d, d))
    below = triangle(coordinates.new_zeros(*coordinates.shape[:-1], d), coordinates)
    return below - below.mT


def powers(generator: Tensor, start: int, length: int) -> Tensor:
    """exp(i A) for i in start .. start + length - 1: A (..., d, d) to (..., length, d, d).

    A matrix-valued rotary embedding: frames of two positions differ by exp((i - j) A), whatever
    i is. Every `NEAR`-th power times the `NEAR` first ones, in one product. Both are found in
    float64: a rotation by thousands of turns keeps no digit more than its angle has. The positions
    lie side by side in memory, see `lanes`.

    >>> turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    >>> round(powers(turn, 2, 2)[1, 1, 0].item(), 4)  # sin 3
    0.1411
    """
    d = generator.shape[-1]
    ends, steps = (
        table.to(generator.dtype) for table in _tables(generator.double(), start, length)
    )
    tall, broad = ends.flatten(-3, -2), steps.movedim(-3, -1).flatten(-2)
    pairs = (tall @ broad).unflatten(-2, (-1, d)).unflatten(-1, (d, NEAR))
    by_entry = pairs.movedim((-3, -2), (0, 1)).flatten(-2)[..., :length]
    return by_entry.contiguous().movedim((0, 1), (-2, -1))


def _tables(generator: Tensor, start: int, length: int) -> tuple[Tensor, Tensor]:
    """Powers start, start + NEAR, .. (..., far, d, d) and 0 .. NEAR - 1 (..., NEAR, d, d)."""
    tops = torch.arange((length + NEAR**2 - 1) // NEAR**2, device=generator.device)
    exponents = torch.cat([tops.new_ones(1), start + NEAR**2 * tops]).to(generator.dtype)
    # the exponential asks for contiguous matrices
    found = torch.matrix_exp(exponents[:, None, None] * generator.contiguous()[..., None, :, :])
    steps, last = _doubled(found[..., :1, :, :])
    ends, _ = _doubled(last)
    ends = (found[..., 1:, None, :, :] @ ends[..., None, :, :, :]).flatten(-4, -3)
    return ends[..., : (length + NEAR - 1) // NEAR, :, :], steps


def _doubled(power: Tensor) -> tuple[Tensor, Tensor]:
    """Powers 0 .. NEAR - 1 of a matrix (..., 1, d, d), and its power NEAR."""
    table = torch.eye(power.shape[-1], dtype=power.dtype, device=power.device).expand_as(power)
    while table.shape[-3] < NEAR:
        table = torch.cat([table, table @ power], dim=-3)
        power = power @ power
    return table, power


def cayley(element: Tensor) -> Tensor:
    """(I - A/2)^-1 (I + A/2), (..., d, d): invertible, its inverse is the frame of -A.

    Exact on so(d), where it gives every rotation without a half turn; on gl(d) the caller keeps the
    norm under 2. One solve instead of a matrix exponential.

    >>> turn = cayley(torch.tensor([[0.0, -1.0], [1.0, 0.0]]))
    >>> torch.allclose(turn @ turn.mT, torch.eye(2))
    True
    """
    eye = torch.eye(element.shape[-1], dtype=element.dtype, device=element.device)
    return torch.linalg.solve(eye - element / 2, eye + element / 2)


def bounded(element: Tensor) -> Tensor:
    """An element of norm |A| < LARGEST_NORM in the same direction: A c / sqrt(c^2 + |A|^2)."""
    squared = element.square().sum((-2, -1), keepdim=True)
    return element * (LARGEST_NORM * (LARGEST_NORM**2 + squared).rsqrt())
