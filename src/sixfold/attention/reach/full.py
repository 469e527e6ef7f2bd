"""Every query sees every key that the caller's masks allow."""

from __future__ import annotations

import torch
from torch import nn

from sixfold.contracts import Heads, Visibility


class Full(nn.Module):
    """No restriction."""

    ordered = None
    condenses = False

    def forward(self, visibility: Visibility, n: int, m: int, device: torch.device) -> Visibility:  # noqa: ARG002
        """What the caller allows, unchanged."""
        return visibility


def build(heads: Heads, **factory: object) -> Full:  # noqa: ARG001
    """The reach of `heads`; it has no parameters."""
    return Full()
