"""What someone asks for by hand, made of what the governor knows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Real

from sixfold.contracts import HeadId
from sixfold.discover import unknown
from sixfold.governor.alarms import Alarm, Memory, own_median
from sixfold.governor.journal import SIGNALS
from sixfold.governor.limits import ActionLimits, Limits
from sixfold.governor.protocols import entropy_term, head_reset
from sixfold.governor.watch.layer import Layer


def head_at(layers: Sequence[Layer], coord: tuple[int, int], layer: int | None) -> HeadId:
    """The head at a hexagonal coordinate, or plainly (layer, head) where there is no grid.

    On a grid no `layer` is the first; elsewhere `coord` says it. Raises ValueError for a place that
    is not there, and for a `layer` beside a `coord` that holds one.
    """
    pair = isinstance(coord, Sequence) and len(coord) == 2
    if not (pair and all(isinstance(place, int) for place in coord)):
        raise ValueError(f"coord must be two whole numbers, got {coord!r}")
    if layer is not None and layer not in range(len(layers)):
        raise ValueError(f"layer must be in [0, {len(layers)}), or None, got {layer!r}")
    grid = layers[layer or 0].grid if layers else None
    if grid is not None:
        if tuple(coord) not in grid.index:
            raise ValueError(f"{tuple(coord)} is not on the grid of radius {grid.radius}")
        return HeadId(layer or 0, grid.index[tuple(coord)])
    if layer is not None:
        raise ValueError(
            f"layer must be None, got {layer}: these heads sit on no grid, and coord is (layer, "
            f"head), here {tuple(coord)}"
        )
    number, head = coord
    if not (0 <= number < len(layers) and 0 <= head < layers[number].num_heads):
        raise ValueError(f"there is no head {head} in a layer {number}")
    return HeadId(number, head)


def every_head(layers: Sequence[Layer]) -> list[HeadId]:
    """All heads of a model."""
    return [HeadId(n, head) for n, layer in enumerate(layers) for head in range(layer.num_heads)]


def heavier_term(
    head: HeadId,
    delta: float,
    terms: Mapping[HeadId, tuple[float, float]],
    memory: Memory,
    actions: ActionLimits,
) -> entropy_term.EntropyTerm:
    """The entropy term of a head with `delta` more weight; a new one holds its own median.

    Raises ValueError before anything was measured, for a delta that is no finite number, and for a
    weight that would become negative.
    """
    if not isinstance(delta, Real) or not math.isfinite(delta):
        raise ValueError(f"delta must be a finite number, got {delta!r}")
    floor, weight = terms.get(head, (own_median(memory, "entropy", head), 0.0))
    if floor is None:
        raise ValueError("no entropy has been measured yet: train a step first")
    if weight + delta < 0:
        raise ValueError(f"the weight of the entropy term would become {weight + delta:.3g}")
    lasts = actions.entropy_steps
    return entropy_term.build(head, floor, weight + delta, lasts, within=lasts // 2)


def reset(
    layers: Sequence[Layer], head: HeadId, method: str, now: int, within: int
) -> head_reset.HeadReset:
    """New weights for a head; a gradient must then reach it.

    Raises ValueError for an unknown method, and a layer whose weights could not be traced.
    """
    refusal = layers[head.layer].refusal
    if refusal is not None:
        raise ValueError(f"layer {head.layer} is only watched: {refusal}")
    alarm = Alarm(now, "notice", "gradient_norm", head, 0.0, 0.0)
    return head_reset.build(head, alarm, within, method)


def muted(limits: Limits, signals: Sequence[str]) -> Limits:
    """The limits without alarms about these signals.

    Raises ValueError for a signal that does not exist.
    """
    for signal in signals:
        if signal not in SIGNALS:
            raise ValueError(unknown("signal", signal, SIGNALS))
    names = tuple(sorted({*limits.alarms.muted, *signals}))
    return replace(limits, alarms=replace(limits.alarms, muted=names))
