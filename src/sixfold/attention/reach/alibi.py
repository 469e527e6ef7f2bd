"""Every query sees every key, the less the farther away it is: logit - slope_h |i - j|.

The slopes of h heads are 2^(-8/h), 2^(-16/h), ..., 2^-8; where h is no power of two, those of the
power p below it and then every other one of 2p heads.
Source: Press et al., Train Short, Test Long, arXiv 2108.12409, section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sixfold.contracts import Heads, Visibility
from sixfold.ops.attend.reference import masked, visible


def slopes(num_heads: int, device: torch.device | str | None = None) -> Tensor:
    """A positive slope for each head, (h,), in float32 whatever the layer holds.

    >>> slopes(4).tolist(), slopes(3).tolist()
    ([0.25, 0.0625, 0.015625, 0.00390625], [0.0625, 0.00390625, 0.25])
    """
    power = 2 ** (num_heads.bit_length() - 1)
    head = torch.arange(1, num_heads + 1, dtype=torch.float32, device=device)
    place = torch.where(head <= power, head, head - power - 0.5)
    return torch.exp2(-8 / power * place)


class ALiBi(nn.Module):
    """A penalty linear in the distance; queries are the last n of m positions."""

    ordered = "reach 'alibi'"
    condenses = False

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads

    def forward(self, visibility: Visibility, n: int, m: int, device: torch.device) -> Visibility:
        """The penalty where the caller's masks allow."""
        distance = torch.arange(m - n, m, device=device)[:, None] - torch.arange(m, device=device)
        penalty = -slopes(self.num_heads, device)[:, None, None] * distance.abs()
        mask = visible(visibility, n, m, device)
        return Visibility(masked(penalty[None], mask), is_causal=False)


def build(heads: Heads, **factory: object) -> ALiBi:  # noqa: ARG001
    """The reach of `heads`; it has no parameters."""
    return ALiBi(heads.num_heads)
