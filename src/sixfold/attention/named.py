"""The names under which mechanisms are known; each is a composition of the four parts."""

from __future__ import annotations

import math
from enum import StrEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sixfold.attention.beliefs import Update, believe, divergence_score, listen, settle, to_own
from sixfold.attention.hierarchy import (
    Group,
    MetaTokens,
    form,
    gaussians,
    groups,
    meta_tokens,
    of_beliefs,
    tokens_of,
)
from sixfold.attention.masks import visibility_of
from sixfold.attention.moments import moments
from sixfold.attention.multihead import MultiHeadAttention, check_sizes
from sixfold.attention.score.cosine import LARGEST
from sixfold.contracts import Belief, Features, Visibility
from sixfold.discover import unknown
from sixfold.geometry.hexgrid import HexGrid
from sixfold.ops.attend.reference import weights
from sixfold.ops.precision import exact, wide


class HexagonalMultiHeadAttention(MultiHeadAttention):
    """Heads on a hexagonal grid: coordinate-aware projections, mixing over the grid.

    Args:
        d_model: width of inputs and outputs.
        grid_radius: R; the layer has 3R^2 + 3R + 1 heads.
        d_head: width of a head (`head_dim` elsewhere).
        use_hypernet: projections from a hypernetwork instead of base plus coordinate term.
        use_spectral: heads mix through the spectrum of the grid instead of with their neighbours.
        options: any further argument of `MultiHeadAttention`.

    >>> HexagonalMultiHeadAttention(d_model=64, grid_radius=2, d_head=8).heads.num_heads
    19
    """

    def __init__(
        self,
        d_model: int,
        grid_radius: int = 2,
        d_head: int = 64,
        use_hypernet: bool = False,  # noqa: FBT001, FBT002
        use_spectral: bool = False,  # noqa: FBT001, FBT002
        **options: Any,
    ) -> None:
        parts = {
            "projection": "hypernetwork" if use_hypernet else "coordinate",
            "mixer": "spectral" if use_spectral else "hexagonal",
        }
        num_heads = HexGrid(grid_radius).num_heads
        super().__init__(d_model, num_heads, head_dim=d_head, **(parts | options))


class SpectralHexagonalAttention(MultiHeadAttention):
    """Heads on a hexagonal grid, mixed by learned filters of the grid's spectrum.

    Tokens attend to tokens in every head, whatever their number; what the heads found is then
    filtered over the grid: H + gate relu(g(L) H W), g one function of the eigenvalues of the
    normalised Laplacian L per group of channels. Projections are plain: the grid enters by its
    spectrum alone. `mixer.response` and `mixer.frequency_penalty` show and restrain the filters.

    Args:
        d_model: width of inputs and outputs.
        grid_radius: R; the layer has 3R^2 + 3R + 1 heads.
        k_eigenvectors: how many modes of the grid pass at least, the slowest first. The number is
            rounded up to whole eigenspaces; a grid with fewer modes keeps all.
        d_head: width of a head (`head_dim` elsewhere).
        filter: ``bands``, ``smooth``, ``chebyshev`` or ``rational``.
        order: number of bands or knots, degree, or number of poles.
        spatial: mix with the neighbours on the grid as well.
        options: any further argument of `MultiHeadAttention`; ``mixer`` as a table
            ``{"name": "spectral", ...}`` takes the place of the four above.

    Raises:
        ValueError: for a k below 1, a filter that does not exist, and an order that would learn
            more numbers than eigenspaces are kept.

    Source: filters of a graph's spectrum, Defferrard et al., arXiv 1606.09375, section 2.1.

    >>> import torch
    >>> layer = SpectralHexagonalAttention(32, 1, k_eigenvectors=2, d_head=8)
    >>> layer(torch.randn(2, 5, 32)).shape, sum(layer.mixer.multiplicities)
    (torch.Size([2, 5, 32]), 3)
    """

    def __init__(
        self,
        d_model: int,
        grid_radius: int = 2,
        k_eigenvectors: int = 32,
        d_head: int = 64,
        filter: str = "bands",  # noqa: A002 - the mixer's word
        order: int | None = None,
        *,
        spatial: bool = False,
        **options: Any,
    ) -> None:
        num_heads = HexGrid(grid_radius).num_heads
        mixer = {
            "name": "spectral",
            "filter": filter,
            "order": order,
            "modes": min(k_eigenvectors, num_heads),
            "spatial": spatial,
        }
        super().__init__(d_model, num_heads, head_dim=d_head, **({"mixer": mixer} | options))


class DistanceType(StrEnum):
    """Distances by which a query may rate a key; the values are names of scores.

    >>> DistanceType("l1") is DistanceType.L1
    True
    """

    L1 = "l1"
    L2 = "l2"
    LP = "lp"
    COSINE = "cosine"
    CHEBYSHEV = "chebyshev"
    L2_SQUARED = "l2_squared"

    @classmethod
    def _missing_(cls, value: object) -> None:
        raise ValueError(unknown("distance_type", value, [kind.value for kind in cls]))


def distance_score(
    distance_type: DistanceType | str, lambda_param: float, p_norm: float, head_dim: int
) -> dict[str, Any]:
    """The score whose logits are -lambda distance / sqrt(head_dim), as options of a layer.

    Its lambdas are learned: one positive number per head, of which the logarithm is the parameter.

    Raises ValueError for a distance that does not exist, a lambda that is not positive, and one
    beyond what the temperature of the cosine may be.
    """
    kind = DistanceType(distance_type)
    if not (lambda_param > 0 and math.isfinite(lambda_param)):
        raise ValueError(f"lambda_param must be positive and finite, got {lambda_param}")
    if kind is DistanceType.LP and not p_norm >= 1:
        raise ValueError(f"p_norm must be in [1, inf], got {p_norm}")
    rate = lambda_param / math.sqrt(head_dim)
    if kind is DistanceType.COSINE and rate > LARGEST:
        raise ValueError(
            f"lambda_param must be at most {LARGEST} sqrt({head_dim}) for the cosine, "
            f"got {lambda_param}"
        )
    return {"name": kind.value, "rate": rate} | ({"p": p_norm} if kind is DistanceType.LP else {})


class DistanceBasedAttention(nn.Module):
    """Attention by distance: softmax(-lambda distance(q_i, k_j) / sqrt(d)) V.

    The cosine distance is 1 - cos(q_i, k_j). A learned lambda is one number per head and always
    positive, for what is learned is its logarithm: a negative one would attend to what is farthest.
    The layer itself is `attention`, a `MultiHeadAttention`.

    Args:
        hidden_size: width of inputs and outputs (`d_model` elsewhere).
        num_heads: heads.
        distance_type: a `DistanceType` or its value.
        lambda_param: where every head's lambda starts.
        p_norm: p of the distance LP, in [1, inf]; the others do not read it.
        dropout: probability of dropping an attention weight in training.
        options: any further argument of `MultiHeadAttention`.

    Raises:
        ValueError: for an unknown distance, a lambda that is not positive, a p below 1, and
            sizes that do not divide.

    Source: Kim, Papamakarios, Mnih, arXiv 2006.04710 (squared L2); Liu et al., arXiv 2111.09883,
    section 3.2 (cosine).

    >>> import torch
    >>> layer = DistanceBasedAttention(32, 4, DistanceType.L1)
    >>> output, weights = layer(torch.randn(2, 5, 32), output_attentions=True)
    >>> output.shape, weights.shape
    (torch.Size([2, 5, 32]), torch.Size([2, 4, 5, 5]))
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        distance_type: DistanceType | str = DistanceType.L1,
        lambda_param: float = 1.0,
        p_norm: float = 2.0,
        dropout: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__()
        sizes = (options.get("head_dim"), options.get("num_kv_heads"))
        head_dim = check_sizes(hidden_size, num_heads, *sizes).head_dim
        self.distance_type = DistanceType(distance_type)
        score = distance_score(self.distance_type, lambda_param, p_norm, head_dim)
        self.attention = MultiHeadAttention(
            hidden_size, num_heads, score=score, dropout=dropout, **options
        )
        self.set_learnable_lambda(False)

    def forward(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool = False,  # noqa: FBT001, FBT002
        *,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from x to itself.

        Args:
            x: (b, n, hidden_size).
            attention_mask: (b, n), 1 or True at real tokens; or a mask of pairs, (b, n, n) or
                (b, h, n, n), as `attn_mask` of `MultiHeadAttention`.
            output_attentions: also return the weights, before dropout.
            is_causal: a token sees none after it.

        Returns:
            (b, n, hidden_size), and the weights (b, h, n, n) or None. Rows that may attend to
            nothing are zero.

        Raises:
            ValueError: for a mask of another shape, or one of tokens that is not 0 and 1.
        """
        masks = {} if attention_mask is None else as_mask(attention_mask)
        found = self.attention(x, is_causal=is_causal, need_weights=output_attentions, **masks)
        return found if output_attentions else (found, None)

    @property
    def lambda_param(self) -> Tensor:
        """Every head's lambda, (h,)."""
        return self.attention.score.rate() * math.sqrt(self.attention.heads.head_dim)

    @property
    def learnable_lambda(self) -> Tensor | None:
        """Every head's lambda, (h,), where it is learned; None where it is fixed."""
        return self.lambda_param if self.attention.score.log_rate.requires_grad else None

    def set_learnable_lambda(self, enabled: bool = True) -> None:  # noqa: FBT001, FBT002
        """Learn the lambdas, or leave them where they are.

        The parameter is there from the start: an optimizer made before this call moves it as well.
        """
        self.attention.score.log_rate.requires_grad_(enabled)

    def extra_repr(self) -> str:
        """Shown in the module's printout."""
        return f"distance_type={self.distance_type.value}"


def as_mask(attention_mask: Tensor) -> dict[str, Tensor]:
    """A mask of tokens, 0 and 1, or of pairs of tokens, in the words of `MultiHeadAttention`.

    >>> import torch
    >>> as_mask(torch.tensor([[1, 0]]))
    {'key_mask': tensor([[ True, False]])}
    """
    if attention_mask.ndim != 2:
        return {"attn_mask": attention_mask}
    real = attention_mask == 1
    if not (real | (attention_mask == 0)).all():
        raise ValueError("attention_mask of tokens must hold 1 (real) and 0 (padding) only")
    return {"key_mask": real}


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
        ValueError: for a kappa that is not positive, and as `MultiHeadAttention`.

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
        if not (strength > 0 and math.isfinite(strength)):
            raise ValueError(f"strength must be positive and finite, got {strength}")
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
            far = self._far(belief, given, 0, None)
            rating = rating._replace(query=rating.query.to(given), key=rating.key.to(given))
            return self.reach.attend(rating, far, seen, 0.0, self.impl, None)

    def _explicit(
        self, belief: Belief, rating: Features, seen: Visibility
    ) -> tuple[Features, Visibility]:
        """The same; where groups condense, all logits as a mask, beside keys that rate nothing."""
        if not self.reach.condenses:
            return rating, seen
        far = self._far(belief, belief.mean, 0, None)
        _, seen = self.reach.explicit(rating, far, seen)
        return rating._replace(query=torch.zeros_like(rating.query)), seen


def told(belief: Belief, heard: Tensor) -> tuple[Tensor, Tensor]:
    """Means and covariances of moments that were heard, each in its token's own frame."""
    mean, covariance = gaussians(heard, belief.mean.shape[-1])
    mean, covariance = mean.to(belief.mean.dtype), covariance.to(belief.factor.dtype)
    if belief.frame is not None:
        covariance = belief.frame @ covariance @ belief.frame.mT
    return to_own(belief, mean), covariance


class Emergence(NamedTuple):
    """Tokens after listening, the meta-tokens they form by scale, and which tokens these are."""

    base_tokens: Update
    meta_tokens: tuple[MetaTokens, ...]
    hierarchy: tuple[Group, ...]


class EmergentHierarchicalAttention(GaugeAttention):
    """Attention of beliefs in which neighbours in consensus condense into meta-tokens.

    A `GaugeAttention` of reach ``hierarchical``: groups are found in the frame that all share, so
    that a change of frames changes none of them. `emerge` takes beliefs that are given.

    Args:
        d_model: width of inputs and outputs.
        num_heads: heads, each with its own belief of a token and its own groups.
        head_dim: width of a belief, d_model // num_heads unless given.
        block: tokens of a block; its own and the one before are seen one by one.
        capacity: meta-tokens of a cell, at most.
        threshold: of consensus, KL both ways, nats.
        scales: how many there are, None for all that fit.
        temperature: of soft groups in training, None for hard ones.
        learned: every head learns its threshold; needs a temperature.
        options: any further argument of `GaugeAttention` but `reach`.

    Raises:
        ValueError: for rules that cannot be meant, and as `GaugeAttention`.

    >>> import torch
    >>> layer = EmergentHierarchicalAttention(1, kappa=1.0, block=4, threshold=0.5)
    >>> mu = torch.tensor([[0.0], [0.1], [9.0], [9.1]])
    >>> found = layer.emerge(mu, torch.ones(4, 1, 1))
    >>> [(group.start, group.stop) for group in found.hierarchy]
    [(0, 2), (2, 4)]
    """

    def __init__(  # noqa: PLR0913 - the sizes of a layer and the rules of a hierarchy
        self,
        d_model: int,
        num_heads: int = 1,
        head_dim: int | None = None,
        *,
        block: int = 64,
        capacity: int = 16,
        threshold: float = 0.01,
        scales: int | None = None,
        temperature: float | None = None,
        learned: bool = False,
        **options: Any,
    ) -> None:
        reach = {
            "name": "hierarchical",
            "block": block,
            "capacity": capacity,
            "threshold": threshold,
            "scales": scales,
            "temperature": temperature,
            "learned": learned,
        }
        super().__init__(d_model, num_heads, head_dim, reach=reach, **options)

    def emerge(
        self,
        mean: Tensor,
        covariance: Tensor | None = None,
        phi: Tensor | None = None,
        *,
        factor: Tensor | None = None,
        key_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Emergence:
        """What tokens believe after listening, and what they condense into then.

        Arguments as in `update`. Meta-tokens are beliefs in the frame that all share. Groups are
        hard, and gradients reach every constituent. If `is_causal`, a cell that is not full yet
        has none.
        """
        belief = believe(mean, covariance, phi, factor=factor, algebra=self.frames)
        rating, seen = self._listening(belief, None, key_mask, is_causal=is_causal)
        heard, d = self._heard(belief, rating, seen), mean.shape[-1]
        found, spread = told(belief, heard)
        tokens, rules = tokens_of(heard, seen.mask), self.reach.decided
        built = form(tokens, d, rules, is_causal=is_causal)
        base = Update(found.reshape(mean.shape), spread.reshape(*mean.shape, d), None)
        formed = meta_tokens(built, d, mean.dtype)
        return Emergence(base, formed, groups(tokens, of_beliefs(d), rules, built))
