"""Every query sees every key the caller allows but its own token.

For scores that rate a token against itself without meaning to: the divergence of a belief from
itself is 0, the best rating there is, whatever the token says.
"""

from __future__ import annotations

import torch
from torch import nn

from sixfold.contracts import Heads, Visibility
from sixfold.ops.attend.reference import restrict, visible


class Others(nn.Module):
    """All but the diagonal; queries are the last n of m positions."""

    ordered = "reach 'others'"
    condenses = False

    def forward(self, visibility: Visibility, n: int, m: int, device: torch.device) -> Visibility:
        """The caller's mask without j = i."""
        others = ~torch.eye(m, dtype=torch.bool, device=device)[m - n :]
        return Visibility(restrict(visible(visibility, n, m, device), others), is_causal=False)


def build(heads: Heads, **factory: object) -> Others:  # noqa: ARG001
    """The reach of `heads`; it has no parameters."""
    return Others()
