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
NEAR = 32
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
    i is. An exponential for every `NEAR` positions and `NEAR` for those between, and the products
    of the pairs, which cost a small fraction of as many exponentials.

    >>> turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    >>> round(powers(turn, 2, 2)[1, 1, 0].item(), 4)  # sin 3
    0.1411
    """
    far = (length + NEAR - 1) // NEAR
    steps = torch.arange(NEAR, device=generator.device)
    ends = start + NEAR * torch.arange(far, device=generator.device)
    exponents = torch.cat([ends, steps]).to(generator.dtype)[:, None, None]
    ends, steps = torch.matrix_exp(exponents * generator[..., None, :, :]).split([far, NEAR], -3)
    pairs = ends[..., :, None, :, :] @ steps[..., None, :, :, :]
    return pairs.flatten(-4, -3)[..., :length, :, :]


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
