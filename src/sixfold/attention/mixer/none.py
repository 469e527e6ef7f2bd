"""Heads do not talk to each other before the output projection."""

from __future__ import annotations

from torch import Tensor, nn

from sixfold.contracts import Heads


class NoMixing(nn.Module):
    """The identity."""

    grid = None

    def mix_outputs(self, heads: Tensor, impl: str) -> Tensor:  # noqa: ARG002
        """Heads as they are."""
        return heads


def build(heads: Heads, **factory: object) -> NoMixing:  # noqa: ARG001
    """The mixer of `heads`; it has no parameters."""
    return NoMixing()
