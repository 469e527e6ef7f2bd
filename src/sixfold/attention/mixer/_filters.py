"""Learned functions of the eigenvalues of a graph, one for each group of channels.

A filter holds `atoms`, fixed symmetric matrices made of projectors onto eigenspaces, and weighs
them: g_c(L) = sum over k of weights_ck atoms_k.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from sixfold.discover import unknown
from sixfold.geometry.spectrum import Spectrum, polynomials
from sixfold.ops.precision import wide

START = 0.7
"""Fresh filters pass about START (1 - lambda / 2): more of what varies slowly over the graph."""


def column(lines: Spectrum) -> Tensor:
    """The eigenvalues as a tensor (e,), float64, on the CPU."""
    return torch.tensor(lines.eigenvalues, dtype=torch.float64, device="cpu")


# ---------------------------------------------------------------- bases


def steps(lambdas: Tensor, cuts: tuple[float, ...]) -> Tensor:
    """1 in the band of each eigenvalue and 0 in the others, (bands, e).

    >>> steps(torch.tensor([0.0, 0.7, 1.5]), cuts=(0.5, 1.0))
    tensor([[1., 0., 0.],
            [0., 1., 0.],
            [0., 0., 1.]])
    """
    band = torch.bucketize(lambdas, lambdas.new_tensor(cuts))
    return torch.eye(len(cuts) + 1, dtype=lambdas.dtype, device=lambdas.device)[:, band]


def hats(lambdas: Tensor, knots: tuple[float, ...]) -> Tensor:
    """Linear interpolation between knots: never negative and summing to 1, (knots, e).

    >>> hats(torch.tensor([0.0, 0.25, 1.5]), knots=(0.0, 1.0))
    tensor([[1.0000, 0.7500, 0.0000],
            [0.0000, 0.2500, 1.0000]])
    """
    if len(knots) == 1:
        return torch.ones_like(lambdas)[None]
    at = lambdas.new_tensor(knots)
    left = torch.bucketize(lambdas, at[1:-1], right=True)
    part = ((lambdas - at[left]) / (at[left + 1] - at[left])).clamp(0, 1)
    unit = torch.eye(len(knots), dtype=lambdas.dtype, device=lambdas.device)
    return unit[:, left] * (1 - part) + unit[:, left + 1] * part


# ---------------------------------------------------------------- filters


class Expansion(nn.Module):
    """g_c(lambda) = sum over k of a_ck phi_k(lambda): linear in what it learns.

    `start` holds the first a_ck of every group, over START.
    """

    def __init__(
        self,
        basis: Callable[[Tensor], Tensor],
        start: Sequence[float],
        lines: Spectrum,
        groups: int,
        **factory: object,
    ) -> None:
        super().__init__()
        self.basis = basis
        self.coefficients = nn.Parameter(torch.empty(groups, len(start), **factory))
        with torch.no_grad():
            self.coefficients.copy_(START * torch.tensor(start, device="cpu"))
        # phi_k(L). Saved with the weights: a layer made on the meta device gets them from there
        atoms = torch.einsum("ke,eij->kij", basis(column(lines)), lines.projectors)
        self.register_buffer("atoms", atoms.to(self.coefficients))

    def weights(self) -> Tensor:
        """What each atom counts in each group, (g, k)."""
        return self.coefficients

    def response(self, lambdas: Tensor) -> Tensor:
        """g_c at eigenvalues (e,), given in float64: (g, e)."""
        return self.coefficients @ self.basis(lambdas).to(self.coefficients)


class Rational(nn.Module):
    """g_c(lambda) = a_c0 + sum over t of a_ct / (1 + s_ct lambda), the logarithm of s learned.

    All poles, -1 / s_ct, are negative, and no eigenvalue is.
    """

    def __init__(self, order: int, lines: Spectrum, groups: int, **factory: object) -> None:
        super().__init__()
        self.coefficients = nn.Parameter(torch.empty(groups, order + 1, **factory))
        self.log_rate = nn.Parameter(torch.empty(groups, order, **factory))
        with torch.no_grad():
            # half constant, for no rate would move under a coefficient of 0
            self.coefficients.fill_(START / (order + 1))
            self.log_rate.copy_(math.log(4.0) * torch.arange(order, device="cpu"))
        self.register_buffer("eigenvalues", column(lines).to(self.coefficients))
        self.register_buffer("atoms", lines.projectors.to(self.coefficients))

    def weights(self) -> Tensor:
        """The response at each eigenvalue, (g, e)."""
        return self.response(self.eigenvalues)

    def response(self, lambdas: Tensor) -> Tensor:
        """g_c at eigenvalues (e,): (g, e)."""
        # in float16 a high rate would be infinite, and no number where the eigenvalue is 0
        rate, weight = wide(self.log_rate).exp(), wide(self.coefficients)
        parts = weight[:, 1:, None] / (1 + rate[..., None] * lambdas.to(rate))
        return (weight[:, :1] + parts.sum(1)).to(self.coefficients)


# ---------------------------------------------------------------- choice


def bands(order: int, lines: Spectrum, groups: int, **factory: object) -> Expansion:
    """One number per band: low, middle, high, each with as many eigenspaces, up to one."""
    basis = partial(steps, cuts=lines.cuts(order))
    members = np.array_split(lines.eigenvalues, order)
    return Expansion(basis, [1 - band.mean() / 2 for band in members], lines, groups, **factory)


def smooth(order: int, lines: Spectrum, groups: int, **factory: object) -> Expansion:
    """One number per knot and straight lines between; knots are eigenvalues at even ranks."""
    ranks = np.linspace(0, len(lines.eigenvalues) - 1, order).round().astype(int)
    knots = tuple(lines.eigenvalues[rank] for rank in ranks)
    basis = partial(hats, knots=knots)
    return Expansion(basis, [1 - knot / 2 for knot in knots], lines, groups, **factory)


def chebyshev(order: int, lines: Spectrum, groups: int, **factory: object) -> Expansion:
    """A polynomial of that degree."""
    start = [0.5, -0.5, *[0.0] * (order - 1)][: order + 1]
    return Expansion(partial(polynomials, degree=order), start, lines, groups, **factory)


class Kind(NamedTuple):
    """How a filter is built, its usual order, and the numbers that it learns in each group."""

    build: Callable[..., Expansion | Rational]
    usual: int
    least: int
    numbers: Callable[[int], int]


FILTERS = {
    "bands": Kind(bands, 3, 1, lambda order: order),
    "smooth": Kind(smooth, 3, 1, lambda order: order),
    "chebyshev": Kind(chebyshev, 3, 0, lambda order: order + 1),
    "rational": Kind(Rational, 2, 0, lambda order: 2 * order + 1),
}


def check_order(name: str, order: int | None, spaces: int) -> int:
    """The order of a filter on so many eigenspaces: its usual one, or less, if None is given.

    Raises ValueError for a filter that does not exist, and for an order that is no whole number, is
    too low or would learn more numbers than there are eigenvalues to tell them apart.

    >>> check_order("bands", None, 2)
    2
    """
    if name not in FILTERS:
        raise ValueError(unknown("filter", name, FILTERS))
    kind = FILTERS[name]
    fitting = [n for n in range(kind.least, spaces + 1) if kind.numbers(n) <= spaces]
    if order is None:
        return min(kind.usual, fitting[-1])
    if isinstance(order, bool) or not isinstance(order, int) or order not in fitting:
        raise ValueError(
            f"order of filter {name!r} must be a whole number in [{fitting[0]}, {fitting[-1]}], "
            f"got {order!r}: it may learn as many numbers as eigenspaces are kept, {spaces}"
        )
    return order
