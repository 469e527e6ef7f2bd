"""Divergences between Gaussians, elementwise over leading axes and differentiable.

A covariance is given by a factor: standard deviations (..., d) for a diagonal one, or a lower
Cholesky factor L (..., d, d), S = L L^T, for a full one. Divergences are in nats.
"""

from __future__ import annotations

import torch
from torch import Tensor


def log_det(factor: Tensor, *, diagonal: bool) -> Tensor:
    """Logarithm of the determinant of the covariance, (...)."""
    scales = factor if diagonal else factor.diagonal(dim1=-2, dim2=-1)
    return 2 * scales.abs().log().sum(-1)


def kl_diagonal(mean_p: Tensor, std_p: Tensor, mean_q: Tensor, std_q: Tensor) -> Tensor:
    """KL(p || q) of diagonal Gaussians, in nats.

    sum over c of log(s_q / s_p) + (s_p^2 + (m_p - m_q)^2) / (2 s_q^2) - 1/2
    Shapes (..., d), broadcast; result (...).

    >>> one, two = torch.ones(1), torch.full((1,), 2.0)
    >>> round(kl_diagonal(one, one, one, two).item(), 4)  # log 2 + 1/8 - 1/2
    0.3181
    """
    ratio = (std_p.square() + (mean_p - mean_q).square()) / std_q.square()
    return 0.5 * (ratio - 1 + 2 * (std_q.log() - std_p.log())).sum(-1)


def kl(mean_p: Tensor, factor_p: Tensor, mean_q: Tensor, factor_q: Tensor) -> Tensor:
    """KL(p || q) = (tr(P_q S_p) + (m_p-m_q)^T P_q (m_p-m_q) + log |S_q|/|S_p| - d) / 2.

    Means (..., d) and lower Cholesky factors (..., d, d), broadcast; result (...), in nats.
    """
    white = torch.linalg.solve_triangular(factor_q, factor_p, upper=False)
    apart = torch.linalg.solve_triangular(factor_q, (mean_p - mean_q)[..., None], upper=False)
    logs = log_det(factor_q, diagonal=False) - log_det(factor_p, diagonal=False)
    trace = white.square().sum((-2, -1))
    return 0.5 * (trace + apart.square().sum((-2, -1)) + logs - mean_p.shape[-1])


def wasserstein2_diagonal(mean_p: Tensor, std_p: Tensor, mean_q: Tensor, std_q: Tensor) -> Tensor:
    """Squared 2-Wasserstein distance of diagonal Gaussians, |m_p - m_q|^2 + |s_p - s_q|^2, (...).

    >>> wasserstein2_diagonal(torch.zeros(2), torch.ones(2), torch.ones(2), torch.ones(2)).item()
    2.0
    """
    return (mean_p - mean_q).square().sum(-1) + (std_p - std_q).square().sum(-1)


def half(matrix: Tensor, *, weighted: bool = False) -> Tensor:
    """The lower half of a symmetric (..., d, d), row by row: (..., d (d + 1) / 2).

    With `weighted` the entries off the diagonal count twice, so that
    <half(A, weighted=True), half(B)> = tr(A B).

    >>> half(torch.tensor([[1.0, 2.0], [2.0, 3.0]]), weighted=True)
    tensor([1., 4., 3.])
    """
    d = matrix.shape[-1]
    rows, columns = torch.tril_indices(d, d, device=matrix.device)
    packed = _take(matrix.flatten(-2).movedim(-1, 0), rows * d + columns)
    return packed * torch.where(rows == columns, 1.0, 2.0).to(matrix) if weighted else packed


def whole(packed: Tensor, d: int) -> Tensor:
    """The symmetric matrix of which `packed` is the lower half, (..., d (d + 1) / 2).

    >>> whole(torch.tensor([1.0, 2.0, 3.0]), 2)
    tensor([[1., 2.],
            [2., 3.]])
    """
    rows, columns = torch.tril_indices(d, d, device=packed.device)
    places = torch.empty(d, d, dtype=torch.int64, device=packed.device)
    places[rows, columns] = places[columns, rows] = torch.arange(len(rows), device=packed.device)
    return _take(packed.movedim(-1, 0), places.flatten()).unflatten(-1, (d, d))


def triangle(diagonal: Tensor, below: Tensor) -> Tensor:
    """A lower triangular matrix from its diagonal (..., d) and what is below it, row by row.

    >>> triangle(torch.tensor([1.0, 2.0]), torch.tensor([3.0]))
    tensor([[1., 0.],
            [3., 2.]])
    """
    d = diagonal.shape[-1]
    rows, columns = torch.tril_indices(d, d, offset=-1, device=below.device)
    places = torch.cat([torch.arange(d, device=below.device) * (d + 1), rows * d + columns])
    entries = torch.cat([diagonal.movedim(-1, 0), below.movedim(-1, 0)])
    zeros = entries.new_zeros(d * d, *entries.shape[1:])
    return zeros.index_copy(0, places, entries).movedim(0, -1).unflatten(-1, (d, d))


def _take(entries: Tensor, places: Tensor) -> Tensor:
    # not fancy indexing, whose backward is three times slower on a CPU
    return entries.index_select(0, places).movedim(0, -1)
