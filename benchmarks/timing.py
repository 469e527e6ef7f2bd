"""Times of calls that are taken in turn, so that what disturbs one disturbs its neighbours too."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable

LEAST = 5
"""Timed rounds that a budget of seconds leaves in any case."""


def interleaved(
    calls: dict[str, Callable[[], object]],
    rounds: int,
    seconds: float = math.inf,
    least: int = LEAST,
    warm: int = 2,
) -> dict[str, list[float]]:
    """Seconds of each call, taken in turn; the first `warm` rounds only warm up.

    No round begins after `seconds` once `least` have been timed.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    for number in range(rounds + warm):
        if number >= least + warm and time.perf_counter() - start > seconds:
            break
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if number >= warm:
                times[name].append(time.perf_counter() - began)
    return times


def ratio(times: list[float], base: list[float]) -> tuple[float, float]:
    """Median and half interquartile range of pairwise ratios."""
    low, middle, high = statistics.quantiles([a / b for a, b in zip(times, base, strict=True)], n=4)
    return middle, (high - low) / 2


def typical(times: list[float]) -> tuple[float, float]:
    """Median and half interquartile range, in milliseconds."""
    low, middle, high = statistics.quantiles(times, n=4)
    return 1e3 * middle, 1e3 * (high - low) / 2
