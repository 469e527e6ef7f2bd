"""Axes without a plotting library: scales, ticks, numbers as text, and lines thinned honestly."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby, pairwise
from typing import Literal, NamedTuple

import numpy as np

Point = tuple[float, float]
GAP = float("nan")
Kind = Literal["linear", "log", "symlog"]
WARP: dict[Kind, Callable[[float], float]] = {
    "linear": float,
    "log": math.log,
    "symlog": math.asinh,
}


class Scale(NamedTuple):
    """A map from [low, high] to [start, end]: linear, log, or symlog, which is asinh.

    asinh is linear below 1 and logarithmic beyond, on both sides of 0.
    """

    low: float
    high: float
    start: float
    end: float
    kind: Kind = "linear"

    def fraction(self, value: float) -> float:
        """Where a value lies: 0 at low, 1 at high, never outside.

        >>> Scale(1, 100, 0, 1, "log").fraction(10)
        0.5
        """
        warp = WARP[self.kind]
        low, high = warp(self.low), warp(self.high)
        return (warp(min(max(value, self.low), self.high)) - low) / (high - low)

    def __call__(self, value: float) -> float:
        """The place of a value on the page."""
        return self.start + (self.end - self.start) * self.fraction(value)

    def ticks(self, count: int) -> tuple[float, ...]:
        """About `count` round numbers within the scale."""
        if self.kind == "log":
            return log_ticks(self.low, self.high, count)
        if self.kind == "symlog":
            return symlog_ticks(self.low, self.high, count)
        return ticks(self.low, self.high, count)


def ticks(low: float, high: float, count: int) -> tuple[float, ...]:
    """Multiples of 1, 2 or 5 times a power of ten, about `count` of them.

    >>> ticks(0, 1000, 5)
    (0.0, 200.0, 400.0, 600.0, 800.0, 1000.0)
    """
    if not high > low:
        return (low,)
    raw = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(
        m for m, most in ((1, 1.4), (2, 3), (5, 7), (10, 11)) if raw / power <= most
    )
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return tuple(float(f"{n * step:.12g}") for n in range(first, last + 1))


def log_ticks(low: float, high: float, count: int) -> tuple[float, ...]:
    """Powers of ten, every so many decades; 1, 2, 5 within each where there are few.

    >>> log_ticks(1, 1000, 4), log_ticks(1, 20, 4)
    ((1.0, 10.0, 100.0, 1000.0), (1.0, 2.0, 5.0, 10.0, 20.0))
    """
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    digits = (1, 2, 5) if last - first <= 2 else (1,)
    for stride in range(max(1, math.ceil((last - first) / max(count, 1))), 0, -1):
        found = (m * 10.0**power for power in range(first, last + 1, stride) for m in digits)
        inside = tuple(t for t in found if low * 0.9999 <= t <= high * 1.0001)
        if len(inside) >= 2:
            return inside
    return ticks(low, high, count)


def symlog_ticks(low: float, high: float, count: int) -> tuple[float, ...]:
    """Zero and powers of ten on both sides of it.

    >>> symlog_ticks(-30, 1000, 6)
    (-10.0, 0.0, 10.0, 100.0, 1000.0)
    """
    size = max(abs(low), abs(high), 10.0)
    top = math.floor(math.log10(size) + 1e-9)
    stride = max(1, math.ceil(top / max(count, 1)))
    powers = [10.0**power for power in range(top, 0, -stride)]
    found = [*(-power for power in powers), 0.0, *reversed(powers)]
    inside = tuple(tick for tick in found if low <= tick <= high)
    return inside if len(inside) >= 2 else ticks(low, high, count)


def tick_labels(values: Sequence[float], kind: Kind = "linear") -> list[str]:
    """Labels with as many decimals as the steps between ticks need, thousands separated.

    >>> tick_labels((0.0, 0.5, 1.0)), tick_labels((1.0, 1000.0), "log")
    (['0.0', '0.5', '1.0'], ['1', '1,000'])
    """
    if kind != "linear" or len(values) < 2 or max(map(abs, values)) >= 1e7:
        return [number(value) for value in values]
    step = min(b - a for a, b in pairwise(values))
    if step < 1e-5:
        return [number(value) for value in values]
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return [f"{value:,.{decimals}f}" for value in values]


def number(value: float) -> str:
    """A number as text: four significant digits, thousands separated, exact where whole.

    >>> number(12345), number(0.123456), number(1.5e-7), number(float("nan"))
    ('12,345', '0.1235', '1.5e-7', 'NaN')
    """
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if isinstance(value, int):
        return f"{value:,}"
    size = abs(value)
    if size != 0 and (size >= 1e7 or size < 1e-4):
        mantissa, _, exponent = f"{value:.3e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:,.0f}" if size >= 1000 else f"{value:.4g}"


def duration(seconds: float) -> str:
    """A time for people.

    >>> duration(7.25), duration(75), duration(3 * 3600 + 120)
    ('7.2 s', '1 min 15 s', '3 h 2 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60:,} h {minutes % 60} min"


def finite(points: Iterable[Point]) -> list[float]:
    """The values that can be drawn."""
    return [y for _, y in points if math.isfinite(y)]


def kind_of(values: Sequence[float], span: float = 40) -> Kind:
    """The kind of axis that hides nothing: linear unless the values span too much.

    Positive values are wide where the greatest is `span` times the least; others where the
    greatest size is a quarter of `span` times the middle one.

    >>> kind_of([1, 2, 3]), kind_of([0.01, 5.0]), kind_of([-3, 4, 5, 900])
    ('linear', 'log', 'symlog')
    """
    if not values:
        return "linear"
    if min(values) > 0:
        return "log" if max(values) / min(values) > span else "linear"
    sizes = sorted(map(abs, values))
    wide = sizes[-1] > 10 and sizes[-1] > span / 4 * sizes[len(sizes) // 2]
    return "symlog" if wide else "linear"


def with_gaps(points: Sequence[Point]) -> list[Point]:
    """Put a NaN wherever the line must not be drawn: nothing was measured in between.

    >>> with_gaps([(0, 1.0), (1, 1.0), (2, 1.0), (3, 1.0), (9, 1.0)])[-2:]
    [(6.0, nan), (9, 1.0)]
    """
    gaps = [(step, GAP) for step in pauses([step for step, _ in points])]
    return sorted([*points, *gaps], key=lambda point: point[0]) if gaps else list(points)


def pauses(steps: Sequence[float]) -> list[float]:
    """The middles of the stretches in which nothing was measured: over 1.5 times the rhythm."""
    places = np.asarray(steps, dtype=np.float64)
    long = np.flatnonzero(np.diff(places) > 1.5 * rhythm(steps))
    return ((places[long] + places[long + 1]) / 2).tolist()


def rhythm(steps: Sequence[float]) -> float:
    """The slowest distance that three measurements in a row keep.

    A signal may have more than one (now and then, or at every step while there is an alarm).

    >>> rhythm([0, 10, 20, 30, 32, 34, 36, 90])
    10.0
    """
    distances = np.diff(np.asarray(steps, dtype=np.float64))
    if not len(distances):
        return 0.0
    kept = max(1, min(3, len(distances) // 2))
    runs = np.lib.stride_tricks.sliding_window_view(distances, kept)
    return float(runs.min(axis=1).max())


def decimate(points: Sequence[Point], limit: int = 600) -> list[Point]:
    """About `limit` points at most: the extremes of every stretch, every gap, and the end.

    >>> spike = [(i, 100.0 if i == 777 else 0.0) for i in range(10_000)]
    >>> thin = decimate(spike, 60)
    >>> len(thin) <= 60, (777, 100.0) in thin
    (True, True)
    """
    if len(points) <= limit:
        return list(points)
    first, last = points[0][0], points[-1][0]
    buckets = max(limit // 2 - 2, 1)
    width = (last - first) / buckets or 1.0
    out: list[Point] = []
    for _, group in groupby(points, key=lambda p: int((p[0] - first) / width)):
        stretch = list(group)
        drawn = [p for p in stretch if math.isfinite(p[1])]
        if drawn:
            low, high = min(drawn, key=lambda p: p[1]), max(drawn, key=lambda p: p[1])
            out.extend(sorted({low, high}))
        if len(drawn) < len(stretch) and (not out or math.isfinite(out[-1][1])):
            out.append((stretch[-1][0], GAP))
    if math.isfinite(points[-1][1]) and out[-1] != points[-1]:
        out.append(points[-1])
    return out


def smooth(points: Sequence[Point], window: int, count: int = 400) -> list[Point]:
    """Means of the finite values of a centred window, at about `count` places.

    A stretch that holds a value that is not finite stays a gap.

    >>> smooth([(0, 1.0), (1, 4.0), (2, 1.0)], 3)[1]
    (1, 2.0)
    """
    half, stride = window // 2, max(1, len(points) // count)
    out: list[Point] = []
    for i in range(0, len(points), stride):
        x = points[i][0]
        if len(finite(points[i : i + stride])) < len(points[i : i + stride]):
            out.append((x, GAP))
            continue
        reach = min(half, i, len(points) - 1 - i)
        near = finite(points[i - reach : i + reach + 1])
        out.append((x, math.fsum(near) / len(near)))
    return out
