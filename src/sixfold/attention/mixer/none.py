"""Heads do not talk to each other before the output projection."""

from __future__ import annotations

from torch import Tensor, nn

from sixfold.contracts import Heads, Rating


class NoMixing(nn.Module):
    """The identity."""

    grid = None
    mixes_logits = False

    def mix_logits(self, rating: Rating) -> Rating:
        """The rating as it is."""
        return rating

    def mix_outputs(self, heads: Tensor, impl: str) -> Tensor:  # noqa: ARG002
        """Heads as they are."""
        return heads


def build(heads: Heads, **factory: object) -> NoMixing:  # noqa: ARG001
    """The mixer of `heads`; it has no parameters."""
    return NoMixing()
