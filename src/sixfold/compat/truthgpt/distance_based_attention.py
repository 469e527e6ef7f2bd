"""``distance_based_attention``: the layer, and its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sixfold.attention.named.distance import DistanceBasedAttention, DistanceType
from sixfold.config import build, plain

__all__ = [
    "DistanceAttentionConfig",
    "DistanceBasedAttention",
    "DistanceType",
    "MultiHeadDistanceAttention",
    "create_distance_attention",
]


@dataclass(frozen=True)
class DistanceAttentionConfig:
    """A layer of attention by distance, with what stands around it."""

    hidden_size: int = 768
    num_heads: int = 12
    distance_type: str = "l1"
    lambda_param: float = 1.0
    p_norm: float = 2.0
    dropout: float = 0.1
    use_learnable_lambda: bool = False
    use_residual: bool = True
    use_layer_norm: bool = True

    def __post_init__(self) -> None:
        DistanceType(self.distance_type)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return plain(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DistanceAttentionConfig:
        """The inverse of `to_dict`; an unknown key raises ConfigError naming the nearest."""
        return build(cls, values, "DistanceAttentionConfig")


class MultiHeadDistanceAttention(nn.Module):
    """x + attention(norm(x)), or either without: a residual block without its MLP."""

    def __init__(self, config: DistanceAttentionConfig) -> None:
        super().__init__()
        self.config = config
        self.norm = nn.LayerNorm(config.hidden_size) if config.use_layer_norm else nn.Identity()
        self.attention = DistanceBasedAttention(
            config.hidden_size,
            config.num_heads,
            config.distance_type,
            config.lambda_param,
            config.p_norm,
            config.dropout,
        )
        self.attention.set_learnable_lambda(config.use_learnable_lambda)

    def forward(self, x: Tensor, *masks: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        """As `DistanceBasedAttention`."""
        out, weights = self.attention(self.norm(x), *masks, **options)
        return (x + out if self.config.use_residual else out), weights


def create_distance_attention(
    config: DistanceAttentionConfig | None = None, **fields: Any
) -> MultiHeadDistanceAttention:
    """The layer of a configuration, or of its fields.

    Raises ValueError for both at once.
    """
    if config is not None and fields:
        raise ValueError(f"give a config or its fields, not both: got {sorted(fields)} beside it")
    return MultiHeadDistanceAttention(config or DistanceAttentionConfig(**fields))
