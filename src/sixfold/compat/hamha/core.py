"""``hamha.core``."""

from sixfold.attention.named import HexagonalMultiHeadAttention

__all__ = ["HexagonalMultiHeadAttention"]
