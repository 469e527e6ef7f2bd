"""The spectrum of a graph: the eigenspaces of its Laplacian, none of them ever split.

Eigenvectors have no sign, and in an eigenspace of several dimensions no direction, of their own;
the projector P_e onto an eigenspace has both. So projectors and eigenvalues leave this file,
eigenvectors do not: what is made of sum over e of g(lambda_e) P_e = g(L) depends on the graph alone
and commutes with all its symmetries, the six turns of a hexagonal grid among them.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sixfold.geometry.graph import laplacian, undirected

TOLERANCE = 1e-8
"""Eigenvalues nearer than this are one. On hexagonal grids rounding is 1e-14, gaps exceed 1e-5."""


class Spectrum(NamedTuple):
    """Eigenspaces of a Laplacian, ascending: L = sum over e of eigenvalues_e projectors_e.

    eigenvalues and multiplicities hold one number per eigenspace; projectors (e, n, n), float64.
    cut lies between the eigenvalues that are here and the first that is not; infinite if all are.
    """

    eigenvalues: tuple[float, ...]
    multiplicities: tuple[int, ...]
    projectors: Tensor
    cut: float = float("inf")

    def kept(self, count: int) -> Spectrum:
        """The fewest eigenspaces, lowest first, that hold at least `count` modes.

        Raises ValueError for a count below 1 or above the number of modes there are.

        >>> from sixfold.geometry.hexgrid import HexGrid
        >>> found = spectrum(HexGrid(1).adjacency())
        >>> found.multiplicities, found.kept(2).multiplicities
        ((1, 2, 3, 1), (1, 2))
        """
        total = sum(self.multiplicities)
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= total:
            raise ValueError(
                f"count must be whole and in [1, {total}], the dimensions there are; got {count!r}"
            )
        stop = int(np.searchsorted(np.cumsum(self.multiplicities), count)) + 1
        if stop == len(self.eigenvalues):
            return self
        cut = (self.eigenvalues[stop - 1] + self.eigenvalues[stop]) / 2
        return Spectrum(
            self.eigenvalues[:stop], self.multiplicities[:stop], self.projectors[:stop], cut
        )

    def cuts(self, bands: int) -> tuple[float, ...]:
        """The bands - 1 places that part the eigenspaces in bands of equal size, up to one.

        Raises ValueError for fewer bands than 1 or more than eigenspaces: one would be empty.

        >>> from sixfold.geometry.hexgrid import HexGrid
        >>> found = spectrum(HexGrid(1).adjacency())
        >>> [round(cut, 3) for cut in found.cuts(3)]
        [1.0, 1.5]
        """
        values = self.eigenvalues
        most = len(values)
        if isinstance(bands, bool) or not isinstance(bands, int) or not 1 <= bands <= most:
            raise ValueError(
                f"bands must be whole and in [1, {most}], the eigenspaces there are; got {bands!r}"
            )
        starts = [len(part) for part in np.array_split(values, bands)]
        return tuple((values[i - 1] + values[i]) / 2 for i in np.cumsum(starts)[:-1])


def polynomials(lambdas: Tensor, degree: int) -> Tensor:
    """Chebyshev's T_0 to T_degree at lambda - 1, which lies in [-1, 1]: (degree + 1, e).

    >>> polynomials(torch.tensor([0.0, 1.5]), degree=2)
    tensor([[ 1.0000,  1.0000],
            [-1.0000,  0.5000],
            [ 1.0000, -0.5000]])
    """
    x = lambdas - 1
    terms = [torch.ones_like(x), x]
    for _ in range(degree - 1):
        terms.append(2 * x * terms[-1] - terms[-2])
    return torch.stack(terms[: degree + 1])


def spectrum(adjacency: Tensor, *, normalized: bool = True) -> Spectrum:
    """Eigenspaces of the Laplacian of a graph with weighted edges.

    They are kept by the weights themselves, so that a graph that changes is never served an older
    one's. Where one weight changes they are found anew: up to 217 nodes that takes less time than a
    rank-one update of D - A, which moves every eigenvector too and would not serve the normalised.

    Args:
        adjacency: (n, n), symmetric, weights 0 or more.
        normalized: of I - D^(-1/2) A D^(-1/2), whose eigenvalues lie in [0, 2], else of D - A.

    Raises:
        ValueError: for what is no matrix (n, n) of at least one node, symmetric, finite and without
            negative weights.

    Source: Chung, Spectral Graph Theory (1997), ch. 1.

    >>> from sixfold.geometry.graph import complete
    >>> found = spectrum(complete(4), normalized=False)
    >>> [round(value, 3) for value in found.eigenvalues], found.multiplicities
    ([0.0, 4.0], (1, 3))
    """
    weights = undirected(adjacency, "cpu")
    if not len(weights):
        raise ValueError("adjacency must be (n, n) with n 1 or more, got (0, 0)")
    found = decomposed(weights.numpy().tobytes(), len(weights), normalized)
    return found._replace(projectors=found.projectors.clone())


@lru_cache(maxsize=16)
def decomposed(weights: bytes, size: int, normalized: bool) -> Spectrum:  # noqa: FBT001
    """What `spectrum` gives, once for every graph: two layers of one graph agree to the bit."""
    adjacency = torch.frombuffer(bytearray(weights), dtype=torch.float64).view(size, size)
    values, vectors = torch.linalg.eigh(laplacian(adjacency, normalized=normalized))
    # an eigenspace ends where the next eigenvalue is another; rounding makes none negative
    ends = (torch.nonzero(values.diff() > TOLERANCE).flatten() + 1).tolist()
    spaces = list(pairwise([0, *ends, size]))
    return Spectrum(
        tuple(max(values[i:j].mean().item(), 0.0) for i, j in spaces),
        tuple(j - i for i, j in spaces),
        torch.stack([vectors[:, i:j] @ vectors[:, i:j].T for i, j in spaces]),
    )
