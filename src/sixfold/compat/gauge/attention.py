"""Attention among agents: transport, divergence, weights and what is gathered by them.

Covariances are matrices here, not factors; frames are coordinates phi, U = exp(phi).
"""

from __future__ import annotations

import torch
from torch import Tensor

from sixfold.attention.beliefs import believe, cholesky, divergence_score, to_common, to_own
from sixfold.attention.multihead import build_part
from sixfold.contracts import Belief, Heads, Visibility
from sixfold.discover import unknown
from sixfold.geometry.frames import ALGEBRAS, dimension, element
from sixfold.geometry.gaussian import kl
from sixfold.ops.attend.reference import weights

__all__ = ["KL", "aggregate_beliefs", "compute_kl_attention", "compute_kl_matrix", "transport"]

WIDEST = 512  # of a frame whose width is read off its coordinates


def transport(phi_i: Tensor, phi_j: Tensor, algebra: str = "so") -> Tensor:
    """Omega_ij = exp(phi_i) exp(-phi_j): coordinates (..., g) to matrices (..., d, d).

    Raises ValueError where no d has g coordinates, for unequal numbers of them, and for another
    algebra than ``so`` and ``gl``.

    >>> half_turn = transport(torch.tensor([torch.pi]), torch.zeros(1))
    >>> half_turn.round().abs()
    tensor([[1., 0.],
            [0., 1.]])
    """
    if algebra not in ALGEBRAS:
        raise ValueError(unknown("algebra", algebra, ALGEBRAS))
    g = phi_i.shape[-1]
    widths = [d for d in range(1, WIDEST) if dimension(algebra, d) == g]
    if phi_j.shape[-1] != g:
        raise ValueError(f"phi_i has {g} coordinates, phi_j {phi_j.shape[-1]}")
    if not widths:
        raise ValueError(f"phi_i has {g} coordinates: no width has so many in {algebra}(d)")
    there, back = element(phi_i, algebra, widths[0]), element(-phi_j, algebra, widths[0])
    return torch.matrix_exp(there.contiguous()) @ torch.matrix_exp(back.contiguous())


def KL(mu_i: Tensor, Sigma_i: Tensor, mu_j: Tensor, Sigma_j: Tensor) -> Tensor:  # noqa: N802, N803
    """KL(N(mu_i, Sigma_i) || N(mu_j, Sigma_j)) in nats: (..., d), (..., d, d) to (...).

    Raises ValueError for a covariance that is not symmetric and positive definite.
    """
    return kl(mu_i, cholesky(Sigma_i), mu_j, cholesky(Sigma_j))


def compute_kl_matrix(mu: Tensor, Sigma: Tensor, phi: Tensor | None = None) -> Tensor:  # noqa: N803
    """KL(q_i || Omega_ij q_j) of all pairs: (n, d), (n, d, d), (n, g) to (n, n).

    Every agent is moved once to the common frame, where a divergence is the same.
    """
    here = believe(mu, Sigma, phi)
    mean, factor = to_common(here, here.mean), here.factor
    if here.inverse is not None:
        moved = here.inverse @ factor
        factor = torch.linalg.cholesky(moved @ moved.mT)
    pairs = kl(mean[..., :, None, :], factor[..., :, None, :, :], mean[..., None, :, :],
               factor[..., None, :, :, :])  # fmt: skip
    return pairs.reshape(*mu.shape[:-1], mu.shape[-2])


def compute_kl_attention(
    mu: Tensor,
    Sigma: Tensor,  # noqa: N803
    phi: Tensor | None = None,
    kappa: float = 1.0,
    *,
    is_causal: bool = False,
) -> Tensor:
    """beta_ij = softmax over j of -KL(q_i || Omega_ij q_j) / kappa: (n, d), ... to (n, n).

    The divergence of an agent from itself is 0, and it is among those it attends to.

    >>> mu = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    >>> compute_kl_attention(mu, torch.eye(2).expand(2, 2, 2))[0, 1]  # e^-2 / (1 + e^-2)
    tensor(0.1192)
    """
    belief = believe(mu, Sigma, phi)
    heads, d = belief.mean.shape[1], mu.shape[-1]
    options = {"dtype": mu.dtype, "device": mu.device}
    part = divergence_score(kappa, learned=False)
    score = build_part("score", part, Heads(heads * d, heads, d, heads), **options)
    rating = score(belief, score.keys(belief))
    beta = weights(rating, Visibility(None, is_causal))
    return beta.reshape(*mu.shape[:-1], mu.shape[-2])


def aggregate_beliefs(mu: Tensor, beta: Tensor, phi: Tensor | None = None) -> Tensor:
    """mu_i' = sum over j of beta_ij Omega_ij mu_j: (n, d), (n, n), (n, g) to (n, d).

    Without phi all agents share one frame. Raises ValueError for a beta that is not of all pairs.
    """
    if beta.shape[-2:] != (mu.shape[-2], mu.shape[-2]):
        raise ValueError(
            f"beta must be (..., n, n) beside mu (..., n, d) {tuple(mu.shape)}, "
            f"got {tuple(beta.shape)}"
        )
    if phi is None:
        return beta @ mu
    eye = torch.eye(mu.shape[-1], dtype=mu.dtype, device=mu.device)
    belief: Belief = believe(mu, None, phi, factor=eye.expand(*mu.shape, mu.shape[-1]))
    common = to_common(belief, belief.mean)
    return to_own(belief, beta.view(*common.shape[:-1], -1) @ common).reshape(mu.shape)
