"""Which implementation takes the statistics: a named one runs or raises, only ``auto`` chooses."""

from __future__ import annotations

from sixfold.contracts import Observation, Statistics
from sixfold.discover import unknown
from sixfold.ops.statistics import fused, reference, tiled

IMPLEMENTATIONS = {
    "reference": reference.statistics,
    "fused": fused.statistics,
    "tiled": tiled.statistics,
}


def statistics(
    observation: Observation, *, largest: bool = False, impl: str = "auto"
) -> Statistics:
    """Entropy, received weight and log-sum-exp per head and token, without the weights.

    Args:
        observation: a rating and who sees whom.
        largest: also the exact largest logit of each head, which costs a pass in tiles;
            log_sum_exp - log(visible keys) <= largest of a query <= log_sum_exp comes for free.
        impl: ``fused`` (two fused calls: features on a CPU), ``tiled`` (any score) or
            ``reference`` (differentiable, explicit weights); ``auto`` is fused where it can be.

    Raises ValueError for an unknown implementation and for what a named one cannot give.
    """
    if impl == "auto":
        impl = "fused" if fused.refusal(observation, largest=largest) is None else "tiled"
    if impl not in IMPLEMENTATIONS:
        raise ValueError(unknown("impl", impl, ("auto", *IMPLEMENTATIONS)))
    return IMPLEMENTATIONS[impl](observation, largest=largest)
