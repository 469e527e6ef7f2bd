"""Attention by distance, with the call shapes of an encoder layer."""

from __future__ import annotations

import math
from enum import StrEnum
from numbers import Real
from typing import Any

from torch import Tensor, nn

from sixfold.attention.allowed import check_positive
from sixfold.attention.multihead import MultiHeadAttention, check_sizes
from sixfold.attention.named._own import check_own
from sixfold.attention.score.cosine import LARGEST
from sixfold.discover import unknown


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
    check_positive("lambda_param", lambda_param)
    if kind is DistanceType.LP and not (isinstance(p_norm, Real) and p_norm >= 1):
        raise ValueError(f"p_norm must be in [1, inf], got {p_norm!r}")
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
        ValueError: for an unknown distance, a lambda that is not positive, a p below 1, sizes that
            do not divide, and a score, which is made of the arguments above.

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
        check_own(type(self).__name__, options, score="distance_type, lambda_param and p_norm")
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
