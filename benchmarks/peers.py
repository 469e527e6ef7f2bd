"""What others offer for the same attention, where it is installed; none of it is a dependency.

Each peer is a function of points, rate and p that returns a call, and each computes the same function
as ours: `ops.py` compares the outputs before it takes a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from shutil import which

import torch
from torch import Tensor

Call = Callable[[], Tensor]
PACKAGES = {"KeOps": "pykeops", "x-transformers": "x_transformers"}


def missing() -> list[str]:
    """Peers that cannot be measured here."""
    absent = [name for name, package in PACKAGES.items() if find_spec(package) is None]
    compiled = [] if which("g++") else ["KeOps", "FlexAttention"]
    return sorted({*absent, *compiled})


def by_cdist(query: Tensor, key: Tensor, value: Tensor, rate: Tensor, p: float) -> Call:
    """`torch.cdist` and a softmax: the logits are -rate ||q - k||_p."""
    return lambda: (-rate[:, None, None] * torch.cdist(query, key, p)).softmax(-1) @ value


def by_cdist_squared(query: Tensor, key: Tensor, value: Tensor, rate: Tensor) -> Call:
    """The same with squared Euclidean distances."""
    return lambda: (-rate[:, None, None] * torch.cdist(query, key).square()).softmax(-1) @ value


def by_keops(query: Tensor, key: Tensor, value: Tensor, rate: Tensor, p: float) -> Call:
    """KeOps: one compiled reduction over symbolic distances."""
    from pykeops.torch import LazyTensor

    slope = rate[:, None, None]

    def call() -> Tensor:
        # a norm is homogeneous: the rate goes into the points
        x = LazyTensor((slope * query)[:, :, :, None].contiguous())
        y = LazyTensor((slope * key)[:, :, None].contiguous())
        gap = (x - y).abs()
        if p == math.inf:
            apart = gap.max(-1)
        elif p == 1:
            apart = gap.sum(-1)
        elif p == 2:
            apart = ((x - y) ** 2).sum(-1).sqrt()
        else:
            apart = gap.power(p).sum(-1).power(1 / p)
        return (-apart).sumsoftmaxweight(LazyTensor(value[:, :, None]), axis=3)

    return call


def by_x_transformers(
    query: Tensor, key: Tensor, value: Tensor, rate: float, *, flash: bool
) -> Call:
    """x-transformers' attention by squared distance; with `flash` through two more key columns."""
    from x_transformers.attend import Attend

    attend = Attend(l2_distance=True, flash=flash, scale=rate, heads=query.shape[1])
    return lambda: attend(query, key, value)[0]


@cache
def compiled_flex() -> Callable[..., Tensor]:
    """FlexAttention, compiled."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def by_flex(query: Tensor, key: Tensor, value: Tensor, rate: Tensor, *, squared: bool) -> Call:
    """FlexAttention with captured norms; on a CPU it has no backward pass."""
    query_norm, key_norm = query.square().sum(-1), key.square().sum(-1)

    def score(product: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        gap = query_norm[b, h, i] + key_norm[b, h, j] - 2 * product
        return -rate[h] * (gap if squared else gap.clamp(min=0).sqrt())

    return lambda: compiled_flex()(query, key, value, score_mod=score, scale=1.0)
