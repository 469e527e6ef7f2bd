"""Every kind of visibility that an operation on queries and keys must serve."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from sixfold.contracts import Visibility


def every_mask(n: int, m: int, dtype: torch.dtype = torch.float64) -> dict[str, Visibility]:
    """Visibilities of 2 sequences and 4 heads by kind; float masks are of `dtype`."""
    generator = torch.Generator().manual_seed(1)
    some = torch.rand(2, 4, n, m, generator=generator) < 0.6
    some[..., 0] = True
    bias = torch.randn(2, 4, n, m, generator=generator, dtype=torch.float64).to(dtype)
    keys = torch.ones(2, 1, 1, m, dtype=torch.bool)
    keys[1, ..., : m // 3] = False
    blind = some[0, 0].clone()
    blind[[0, n // 2]] = False
    kinds = {
        "none": (None, False),
        "bool": (some[0, 0], False),
        "per_head": (some, False),
        "keys": (keys, False),
        "float": (bias, False),
        "row_bias": (bias[0, 0, :, :1], False),
        "key_bias": (bias[:, :, :1], False),
        "holes": (bias.masked_fill(~some, -math.inf), False),
        "causal": (None, True),
        "causal_per_head": (some, True),
        "causal_keys": (keys, True),
        "causal_float": (bias[:1], True),
        "blind": (blind, False),
        "blind_float": (torch.zeros(n, m, dtype=dtype).masked_fill(~blind, -math.inf), False),
    }
    return {kind: Visibility(*seen) for kind, seen in kinds.items()}


@pytest.fixture
def masks() -> Callable[..., dict[str, Visibility]]:
    return every_mask


@pytest.fixture(params=every_mask(3, 3))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param
