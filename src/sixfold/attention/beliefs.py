"""Beliefs that are given, not projected: how they listen to one another.

q_i = N(mu_i, S_i) in the frame U_i. Weights beta_ij = softmax over j of -KL(q_i || Omega_ij q_j) /
kappa with Omega_ij = U_i U_j^-1, and the mixture of what is seen has the moments
mu_i' = sum_j beta_ij Omega_ij mu_j and S_i' = sum_j beta_ij Omega_ij (S_j + mu_j mu_j^T)
Omega_ij^T - mu_i' mu_i'^T. Both are sums in the common frame, read in the frame of i.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sixfold.attention.allowed import check_positive
from sixfold.attention.score.kl import move
from sixfold.contracts import Belief, Features, Visibility
from sixfold.geometry.frames import dimension, element
from sixfold.geometry.gaussian import whole
from sixfold.ops.attend import choose
from sixfold.ops.precision import exact, wide

SYMMETRIC = 1e-4  # relative: what a covariance computed in float32 may miss


class Update(NamedTuple):
    """Beliefs after listening; None for what was not asked for."""

    mean: Tensor
    covariance: Tensor | None
    weights: Tensor | None


def divergence_score(kappa: float, *, learned: bool) -> dict[str, Any]:
    """The score -KL / kappa as options of a layer.

    Raises ValueError for a kappa that is not positive.
    """
    check_positive("kappa", kappa)
    return {"name": "kl", "rate": 1 / kappa, "learned": learned}


def by_head(entries: Tensor, axes: int) -> Tensor:
    """Entries of tokens (n, ..), (b, n, ..) or (b, h, n, ..) as (b, h, n, ..); `axes` follow n."""
    for _ in range(3 + axes - entries.ndim):
        entries = entries.unsqueeze(0 if entries.ndim == 1 + axes else 1)
    return entries


def believe(
    mean: Tensor,
    covariance: Tensor | None = None,
    phi: Tensor | None = None,
    *,
    factor: Tensor | None = None,
    algebra: str | None = "so",
) -> Belief:
    """Beliefs N(mean, covariance) in the frames exp(phi), with a batch and heads.

    Args:
        mean: (n, d), (b, n, d) or (b, h, n, d).
        covariance: (..., n, d, d), symmetric and positive definite.
        phi: coordinates (..., n, g) in the algebra, or None for one common frame.
        factor: lower Cholesky factors (..., n, d, d) instead of `covariance`.
        algebra: ``so``, ``gl``, or None where there are no frames.

    Raises:
        ValueError: naming the argument that cannot be meant.
    """
    if mean.ndim not in (2, 3, 4):
        raise ValueError(f"mean must be (n, d), (b, n, d) or (b, h, n, d), got {tuple(mean.shape)}")
    if (covariance is None) == (factor is None):
        raise ValueError("give covariance or factor: one of them, not both")
    name, given = ("covariance", covariance) if factor is None else ("factor", factor)
    dtypes = {part.dtype for part in (mean, given, phi) if part is not None}
    if len(dtypes) > 1:
        raise ValueError(f"mean, {name} and phi must share a dtype, got {sorted(map(str, dtypes))}")
    check_shape(name, given, (*mean.shape, mean.shape[-1]))
    root = cholesky(wide(given)) if factor is None else checked_factor(wide(given))
    belief = Belief(by_head(mean, 1), by_head(root, 2))
    if phi is None:
        return belief
    if algebra is None:
        raise ValueError("phi needs frames: this layer was built with frames=None")
    d = mean.shape[-1]
    check_shape("phi", phi, (*mean.shape[:-1], dimension(algebra, d)))
    with exact(phi):
        turn = by_head(element(wide(phi), algebra, d), 2).contiguous()
        frame, inverse = torch.matrix_exp(turn), torch.matrix_exp(-turn)
    volume = turn.diagonal(dim1=-2, dim2=-1).sum(-1)
    return belief._replace(frame=frame, inverse=inverse, log_volume=volume)


def check_shape(name: str, given: Tensor, shape: tuple[int, ...]) -> None:
    """Raise a ValueError that names an argument of another shape."""
    if given.shape != shape:
        raise ValueError(f"{name} must be {shape}, got {tuple(given.shape)}")


def cholesky(covariance: Tensor) -> Tensor:
    """Lower factors of covariances (..., d, d).

    Raises ValueError where one is not finite, not symmetric or not positive definite.
    """
    if not covariance.isfinite().all():
        raise ValueError("covariance must be finite")
    apart = (covariance - covariance.mT).abs().amax((-2, -1))
    if not (apart <= SYMMETRIC * covariance.abs().amax((-2, -1))).all():
        raise ValueError("covariance must be symmetric")
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if failed.any():
        token = tuple(failed.nonzero()[0].tolist())
        raise ValueError(f"covariance must be positive definite; that of token {token} is not")
    return factor


def checked_factor(factor: Tensor) -> Tensor:
    """Lower factors (..., d, d) as they are.

    Raises ValueError where one is not lower triangular with a positive diagonal.
    """
    if factor.triu(1).any() or not (factor.diagonal(dim1=-2, dim2=-1) > 0).all():
        raise ValueError("factor must be lower triangular with a positive diagonal")
    return factor


def listen(
    belief: Belief, rating: Features, visibility: Visibility, impl: str, *, covariances: bool
) -> tuple[Tensor, Tensor | None]:
    """Means (b, h, n, d) and, if asked, covariances (b, h, n, d, d) of what is seen."""
    mean, dtype = to_common(belief, wide(belief.mean)), belief.mean.dtype
    if not covariances:
        return to_own(belief, choose.attend(rating, mean.to(dtype), visibility, 0.0, impl)), None
    with exact(mean):
        root = belief.factor if belief.inverse is None else belief.inverse @ belief.factor
        second = root @ root.mT + outer(mean)
        moments = torch.cat([mean, second.flatten(-2)], dim=-1)
        rating = rating._replace(query=wide(rating.query), key=wide(rating.key))
        out = choose.attend(rating, moments, visibility, 0.0, impl)
        mean = out[..., : mean.shape[-1]]
        covariance = out[..., mean.shape[-1] :].view_as(second) - outer(mean)
        if belief.frame is not None:
            covariance = belief.frame @ covariance @ belief.frame.mT
    return to_own(belief, mean).to(dtype), covariance


def settle(
    belief: Belief,
    rating: Features,
    visibility: Visibility,
    impl: str,
    *,
    strength: float,
    center: Tensor,
) -> tuple[Tensor, Tensor]:
    """Means and covariances that minimise the free energy of each token, its weights held.

    F_i(q) = strength KL(q || q_i) + sum_j beta_ij KL(q || Omega_ij q_j). The minimum is Gaussian:
    with P the precisions in the common frame and L = strength P_i + sum_j beta_ij P_j its precision
    is L / (strength + sum_j beta_ij), its mean L^-1 (strength P_i m_i + sum_j beta_ij P_j m_j).
    The sums are attention over what the keys' features hold already, relative to their `center`.
    """
    d, dtype = belief.mean.shape[-1], belief.mean.dtype
    with exact(belief.mean):
        rating = rating._replace(query=wide(rating.query), key=wide(rating.key))
        natural = rating.key[..., : d * (d + 1) // 2 + d]
        ones = torch.ones_like(natural[..., :1])
        heard = choose.attend(rating, torch.cat([natural, ones], -1), visibility, 0.0, impl)
        total = heard + strength * torch.cat([natural, ones], -1)
        precision, pull = whole(total[..., : -d - 1], d), total[..., -d - 1 : -1]
        root = torch.linalg.cholesky(precision)
        mean = torch.cholesky_solve(pull[..., None], root)[..., 0] + wide(center)
        covariance = total[..., -1:, None] * torch.cholesky_inverse(root)
        if belief.frame is not None:
            covariance = belief.frame @ covariance @ belief.frame.mT
    return to_own(belief, mean).to(dtype), covariance.to(dtype)


def to_common(belief: Belief, vectors: Tensor) -> Tensor:
    """U_j^-1 v_j."""
    return vectors if belief.inverse is None else move(belief.inverse, vectors)


def to_own(belief: Belief, vectors: Tensor) -> Tensor:
    """U_i v_i."""
    return vectors if belief.frame is None else move(belief.frame, vectors)


def outer(vectors: Tensor) -> Tensor:
    """The products v v^T, (..., d) to (..., d, d)."""
    return vectors[..., None] * vectors[..., None, :]
