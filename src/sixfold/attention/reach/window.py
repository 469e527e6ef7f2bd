"""A query sees keys less than `width` positions away: |i - j| < width.

Source: Beltagy et al., Longformer, arXiv 2004.05150, section 3.1 (sliding window).
"""

from __future__ import annotations

import torch
from torch import nn

from sixfold.contracts import Heads, Visibility
from sixfold.ops.attend.reference import restrict, visible


class Window(nn.Module):
    """Sliding window; queries are the last n of m positions."""

    ordered = "reach 'window'"
    condenses = False

    def __init__(self, width: int) -> None:
        super().__init__()
        if not (isinstance(width, int) and width >= 1):
            raise ValueError(f"window width must be a whole number of 1 or more, got {width!r}")
        self.width = width

    def forward(self, visibility: Visibility, n: int, m: int, device: torch.device) -> Visibility:
        """The caller's mask, and the band."""
        distance = torch.arange(m - n, m, device=device)[:, None] - torch.arange(m, device=device)
        band = distance.abs() < self.width
        return Visibility(restrict(visible(visibility, n, m, device), band), is_causal=False)

    def extra_repr(self) -> str:
        """Shown in the module's printout."""
        return f"width={self.width}"


def build(heads: Heads, *, width: int, **factory: object) -> Window:  # noqa: ARG001
    """The reach of `heads`; it has no parameters."""
    return Window(width)
