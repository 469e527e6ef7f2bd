"""Attention of beliefs, each in a frame of its own."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sixfold.attention.allowed import check_positive
from sixfold.attention.beliefs import Update, believe, divergence_score, listen, settle, to_own
from sixfold.attention.masks import visibility_of
from sixfold.attention.moments import gaussians, moments
from sixfold.attention.multihead import MultiHeadAttention, check_sizes
from sixfold.attention.named._own import check_own
from sixfold.contracts import Belief, Features, Visibility
from sixfold.ops.attend.reference import weights
from sixfold.ops.precision import exact, wide


class GaugeAttention(MultiHeadAttention):
    """Attention of beliefs by divergence: softmax(-KL(q_i || Omega_ij q_j) / kappa).

    Every token is one Gaussian q_i per head, in a frame of its own, as a query and as a key.
    Omega_ij = U_i U_j^-1 moves beliefs, and values, from the frame of j to that of i. The frames
    are rotations or any invertible matrices, so that going around a loop changes nothing.
    `update` takes beliefs that are given instead of projected.

    KL(q_i || q_i) = 0 is the best rating there is: a token always sees itself most. This is kept,
    as in the formula; ``reach="others"`` leaves the token itself out.

    Args:
        d_model: width of inputs and outputs.
        num_heads: heads, each with its own belief of a token.
        head_dim: width of a belief, d_model // num_heads unless given.
        frames: ``so`` (rotations), ``gl`` (invertible matrices), or None for one common frame.
        per: a frame per ``position`` or per ``token``.
        kappa: the temperature, sqrt(head_dim) unless given.
        learn_kappa: learn one per head, by its logarithm.
        options: any further argument of `MultiHeadAttention`.

    Raises:
        ValueError: for a kappa that is not positive, a projection or score, which are made of the
            arguments above, and as `MultiHeadAttention`.

    >>> import torch
    >>> layer = GaugeAttention(16, num_heads=4)
    >>> layer(torch.randn(2, 5, 16), is_causal=True).shape
    torch.Size([2, 5, 16])
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int = 1,
        head_dim: int | None = None,
        *,
        frames: str | None = "so",
        per: str = "position",
        kappa: float | None = None,
        learn_kappa: bool = False,
        **options: Any,
    ) -> None:
        own = {"projection": "frames and per", "score": "kappa and learn_kappa"}
        check_own(type(self).__name__, options, **own)
        width = check_sizes(d_model, num_heads, head_dim, options.get("num_kv_heads")).head_dim
        projection = {"name": "gaussian", "tied": True, "frames": frames, "per": per}
        score = divergence_score(math.sqrt(width) if kappa is None else kappa, learned=learn_kappa)
        super().__init__(
            d_model, num_heads, head_dim, projection=projection, score=score, **options
        )
        self.frames = frames

    @property
    def kappa(self) -> Tensor:
        """Every head's temperature, (h,)."""
        return 1 / self.score.rate()

    def update(  # noqa: PLR0913 - a belief, what to return, and the masks of forward
        self,
        mean: Tensor,
        covariance: Tensor | None = None,
        phi: Tensor | None = None,
        *,
        factor: Tensor | None = None,
        covariances: bool = False,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        key_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Update:
        """What tokens believe after listening: mu_i' = sum over j of beta_ij Omega_ij mu_j.

        Nothing is projected and nothing learned but kappa. An offset that all means share costs
        digits: in float32 give them relative to a point near them.

        Args:
            mean: (n, d) or (b, n, d) with one head, or (b, h, n, d); d is `head_dim`.
            covariance: (..., n, d, d), symmetric and positive definite.
            phi: (..., n, g), coordinates of the frames U_i = exp(phi_i) in the algebra `frames`
                (g = d (d - 1) / 2 in so(d), d^2 in gl(d)); without it all share one frame.
            factor: lower Cholesky factors (..., n, d, d), instead of `covariance`.
            covariances: also the covariances of the mixtures, sum over j of
                beta_ij Omega_ij (S_j + mu_j mu_j^T) Omega_ij^T - mu_i' mu_i'^T.
            need_weights: also the weights beta, (b, h, n, n).
            attn_mask: as in `forward`.
            key_mask: as in `forward`.
            is_causal: as in `forward`.

        Returns:
            An `Update` of the same shapes. Tokens that see none have mean and covariance zero.

        Raises:
            ValueError: naming the argument: a covariance that is not symmetric and positive
                definite, a factor that is not lower triangular with a positive diagonal, shapes
                that cannot be meant, a phi without `frames`.

        >>> import torch
        >>> layer = GaugeAttention(2, kappa=1.0)
        >>> mu, same = torch.tensor([[0.0, 0.0], [2.0, 0.0]]), torch.eye(2).expand(2, 2, 2)
        >>> layer.update(mu, same).mean[0, 0]  # 2 e^-2 / (1 + e^-2)
        tensor(0.2384)
        """
        belief = believe(mean, covariance, phi, factor=factor, algebra=self.frames)
        rating, seen = self._listening(belief, attn_mask, key_mask, is_causal=is_causal)
        if self.reach.condenses:
            found, spread = told(belief, self._heard(belief, rating, seen))
            spread = spread if covariances else None
        else:
            found, spread = listen(belief, rating, seen, self.impl, covariances=covariances)
        return Update(
            found.reshape(mean.shape),
            None if spread is None else spread.reshape(*mean.shape, mean.shape[-1]),
            weights(*self._explicit(belief, rating, seen)) if need_weights else None,
        )

    def settle(
        self,
        mean: Tensor,
        covariance: Tensor | None = None,
        phi: Tensor | None = None,
        *,
        factor: Tensor | None = None,
        strength: float = 1.0,
        attn_mask: Tensor | None = None,
        key_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Update:
        """What tokens believe after one variational step, without any target.

        It minimises the free energy of each token with the weights beta held,
        F_i(q) = strength KL(q || q_i) + sum over j of beta_ij KL(q || Omega_ij q_j),
        exactly and not by a gradient step. Precise
        neighbours count for more: L = strength P_i + sum_j beta_ij P_j is the new precision up to
        the factor strength + 1, with every precision P moved to the frame of i. With reach
        ``hierarchical`` all weights are held at once.

        Args:
            mean: (n, d) or (b, n, d) with one head, or (b, h, n, d); d is `head_dim`.
            covariance: (..., n, d, d), symmetric and positive definite.
            phi: (..., n, g), coordinates of the frames, as in `update`.
            factor: lower Cholesky factors (..., n, d, d), instead of `covariance`.
            strength: how much a token's own belief counts beside what it hears, positive.
            attn_mask: as in `forward`.
            key_mask: as in `forward`.
            is_causal: as in `forward`.

        Returns:
            An `Update`. A token that sees none keeps its belief.

        Raises:
            ValueError: as `update`, and for a strength that is not positive.

        >>> import torch
        >>> layer = GaugeAttention(1, kappa=1.0, reach="others")
        >>> mu, var = torch.tensor([[0.0], [3.0]]), torch.tensor([[[1.0]], [[0.5]]])
        >>> round(layer.settle(mu, var).mean[0].item(), 4)  # (1 * 0 + 2 * 3) / (1 + 2)
        2.0
        """
        check_positive("strength", strength)
        # natural parameters do not bear half precision
        wider = [None if part is None else wide(part) for part in (mean, covariance, phi, factor)]
        belief = believe(*wider[:3], factor=wider[3], algebra=self.frames)
        rating, seen = self._listening(belief, attn_mask, key_mask, is_causal=is_causal)
        rating, seen = self._explicit(belief, rating, seen)
        found, spread = settle(
            belief, rating, seen, self.impl, strength=strength, center=self.score.center
        )
        shape, dtype = mean.shape, mean.dtype
        return Update(
            found.reshape(shape).to(dtype), spread.reshape(*shape, shape[-1]).to(dtype), None
        )

    def _listening(
        self,
        belief: Belief,
        attn_mask: Tensor | None,
        key_mask: Tensor | None,
        *,
        is_causal: bool,
    ) -> tuple[Features, Visibility]:
        """How given beliefs rate one another, and who sees whom."""
        batch, heads, n, d = belief.mean.shape
        if (heads, d) != (self.heads.num_heads, self.heads.head_dim):
            raise ValueError(
                f"mean must have {self.heads.num_heads} heads of width {self.heads.head_dim}, "
                f"got {heads} of width {d}"
            )
        seen = visibility_of(attn_mask, key_mask, (batch, heads, n, n), is_causal=is_causal)
        seen = self.reach(seen, n, n, belief.mean.device)
        return self.score(belief, self.score.keys(belief)), seen

    def _heard(self, belief: Belief, rating: Features, seen: Visibility) -> Tensor:
        """Moments (b, h, n, w) of the mixture that each hears, in the frame they share.

        Attention whose values are moments gives moments, of groups as of tokens.
        """
        with exact(belief.mean):
            given = moments(belief, "belief")
            far = self._far(belief, given, seen, None)
            rating = rating._replace(query=rating.query.to(given), key=rating.key.to(given))
            return self.reach.attend(rating, far, seen, 0.0, self.impl, None)

    def _explicit(
        self, belief: Belief, rating: Features, seen: Visibility
    ) -> tuple[Features, Visibility]:
        """The same; where groups condense, all logits as a mask, beside keys that rate nothing."""
        if not self.reach.condenses:
            return rating, seen
        far = self._far(belief, belief.mean, seen, None)
        _, seen = self.reach.explicit(rating, far, seen)
        return rating._replace(query=torch.zeros_like(rating.query)), seen


def told(belief: Belief, heard: Tensor) -> tuple[Tensor, Tensor]:
    """Means and covariances of moments that were heard, each in its token's own frame."""
    mean, covariance = gaussians(heard, belief.mean.shape[-1])
    mean, covariance = mean.to(belief.mean.dtype), covariance.to(belief.factor.dtype)
    if belief.frame is not None:
        covariance = belief.frame @ covariance @ belief.frame.mT
    return to_own(belief, mean), covariance
