"""``hamha.core``."""

from sixfold.attention.named.hexagonal import HexagonalMultiHeadAttention

__all__ = ["HexagonalMultiHeadAttention"]
