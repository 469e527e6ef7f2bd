"""Per-token features whose inner product is a score that is no inner product of the tokens.

A term that belongs to the key alone becomes a column of the key against a constant column of the
query. Widths are filled up with zeros to a multiple of 8: on other widths CPU attention leaves its
fast path.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

MULTIPLE = 8


def columns(dtype: torch.dtype) -> int:
    """Columns a key's own term takes: 1, or 2 in half precision, where one would round it away."""
    return 1 if torch.finfo(dtype).bits >= 32 else 2


def lift_keys(vectors: Tensor, own: Tensor, dtype: torch.dtype) -> Tensor:
    """[vectors, own term, zeros]: (..., d) and (...) to (..., width) of `dtype`.

    In half precision the own term is split in a rounded column and the rest.
    """
    rounded = own[..., None].to(dtype)
    parts = [vectors.to(dtype), rounded]
    if columns(dtype) == 2:
        parts.append((own[..., None] - rounded).to(dtype))
    return _filled(parts)


def lift_queries(vectors: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """[vectors, weight, zeros]: the weight, (..., 1) or a scalar, meets the keys' own term."""
    constant = weight.to(dtype).expand(*vectors.shape[:-1], columns(dtype))
    return _filled([vectors.to(dtype), constant])


def _filled(parts: list[Tensor]) -> Tensor:
    missing = -sum(part.shape[-1] for part in parts) % MULTIPLE
    zeros = parts[0].new_zeros(()).expand(*parts[0].shape[:-1], missing)
    return unhidden(torch.cat([*parts, zeros], dim=-1))


def unhidden(features: Tensor) -> Tensor:
    """Features with NaN for infinities of float16: they must not look like a key that is masked."""
    if features.dtype == torch.float16:
        # inf - inf is NaN
        features = features + (features - features).detach()
    return features


def equal_widths(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All three with one width, a multiple of 8, filled with zeros."""
    width = max(query.shape[-1], value.shape[-1])
    width += -width % MULTIPLE
    parts = (query, key, value)
    return tuple(p if p.shape[-1] == width else pad(p, (0, width - p.shape[-1])) for p in parts)
