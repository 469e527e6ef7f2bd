"""Filtering of heads in a layout where every step is one large product.

With groups and heads first, (g, h, b n d/g), each operator is one product over everything else.
"""

from __future__ import annotations

import torch
from torch import Tensor


def mix(onto: Tensor, heads: Tensor, weight: Tensor, operators: Tensor, gate: Tensor) -> Tensor:
    """Same as the reference; cost b n h d (d + h)."""
    weight, operators, gate = (t.to(heads.dtype) for t in (weight, operators, gate))
    groups = len(operators)
    channels = (heads @ weight).unflatten(-1, (groups, -1)).permute(3, 2, 0, 1, 4)
    mixture = torch.relu(operators @ channels.flatten(2)).view_as(channels)
    split = onto.unflatten(-1, (groups, -1))
    return torch.addcmul(split, mixture.permute(2, 3, 1, 0, 4), gate[:, None, None]).flatten(3)
