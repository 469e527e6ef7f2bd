"""Signals thinned while they are read: the lowest and highest of every stretch are kept.

A run of any length takes the same memory, and no peak is lost.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from itertools import chain, pairwise, zip_longest
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sixfold.report.scale import Point, pauses

KEPT = 256
"""Stretches that are kept at least; a sample each up to twice as many."""
BLOCK = 256


class Extremes(NamedTuple):
    """Lowest and highest value of each stretch and column, and the steps they were measured at.

    low, low_at, high, high_at (stretches, columns), NaN where no value is finite; broken: whether
    some value is not finite; end (stretches,): the last step.
    """

    low: NDArray[np.float64]
    low_at: NDArray[np.int64]
    high: NDArray[np.float64]
    high_at: NDArray[np.int64]
    broken: NDArray[np.bool_]
    end: NDArray[np.int64]


def samples(steps: NDArray[np.int64], values: NDArray[np.float64]) -> Extremes:
    """Every sample (n, columns) a stretch of its own."""
    broken = ~np.isfinite(values)
    values = np.where(broken, np.nan, values)
    at = np.broadcast_to(steps[:, None], values.shape)
    return Extremes(values, at, values, at, broken, steps)


def squeezed(found: Extremes, factor: int) -> Extremes:
    """Every `factor` stretches as one.

    >>> found = squeezed(samples(np.arange(1, 4), np.array([[5.0], [4.0], [7.0]])), 2)
    >>> found.low[:, 0].tolist(), found.low_at[:, 0].tolist(), found.end.tolist()
    ([4.0, 7.0], [2, 3], [2, 3])
    """
    if factor == 1:
        return found

    def grouped(values: NDArray) -> NDArray:
        missing = -len(values) % factor
        if missing:
            values = np.concatenate([values, np.repeat(values[-1:], missing, axis=0)])
        return values.reshape(-1, factor, *values.shape[1:])

    low, high = grouped(found.low), grouped(found.high)
    least = np.where(np.isnan(low), np.inf, low).argmin(1)[:, None]
    most = np.where(np.isnan(high), -np.inf, high).argmax(1)[:, None]

    def chosen(values: NDArray, where: NDArray) -> NDArray:
        return np.take_along_axis(values, where, 1)[:, 0]

    return Extremes(
        chosen(low, least), chosen(grouped(found.low_at), least),
        chosen(high, most), chosen(grouped(found.high_at), most),
        grouped(found.broken).any(1), grouped(found.end)[:, -1],
    )  # fmt: skip


def numbers(layers: Sequence[Sequence[float | None]]) -> NDArray[np.float64]:
    """The values of all heads in one row; what was not measured is NaN.

    >>> numbers([[1.0, 2.0], [3.0]]).tolist(), numbers([[4.0, None]]).tolist()
    ([1.0, 2.0, 3.0], [4.0, nan])
    """
    try:
        return np.fromiter(chain.from_iterable(layers), np.float64)
    except TypeError:  # it reads twice as fast, but numbers alone
        return np.array([*chain.from_iterable(layers)], dtype=np.float64)


class Track:
    """One signal of every head over a run.

    `steps` are all that it was measured at, `shape` the heads of each layer. A column for each head
    is followed by one for each layer: its largest head.
    """

    def __init__(self) -> None:
        self.steps, self.shape = array("q"), list[int]()
        self._rows: list[NDArray[np.float64]] = []
        self._missing: list[tuple[int, int]] = []
        self._done: Extremes | None = None
        self._factor = 1
        self._pauses: set[Point] | None = None

    def add(self, step: int, layers: Sequence[Sequence[float | None]]) -> None:
        """Take one more sample, later than those before; a layer that did not run is empty."""
        shape = [*map(len, layers)]
        if shape != self.shape:
            layers = [self._fitted(layers, shape)]
        self._pauses = None
        self.steps.append(step)
        self._rows.append(numbers(layers))
        if len(self._rows) == max(BLOCK, self._factor):
            self._settle()

    def extremes(self) -> Extremes:
        """What is kept of all samples so far."""
        if self._rows:
            self._settle()
        assert self._done is not None
        return self._done

    def points(self, layer: int, head: int | None = None) -> list[Point]:
        """The line of one head, or of a layer's largest, with a NaN wherever it is broken."""
        found = self.extremes()
        column = sum(self.shape) + layer if head is None else sum(self.shape[:layer]) + head
        lows = zip(found.low_at[:, column].tolist(), found.low[:, column].tolist(), strict=True)
        highs = zip(found.high_at[:, column].tolist(), found.high[:, column].tolist(), strict=True)
        known = {point for point in (*lows, *highs) if not math.isnan(point[1])}
        gaps = {(step, math.nan) for step in found.end[found.broken[:, column]].tolist()}
        gaps |= self.pauses()
        return sorted(known | gaps, key=lambda point: (point[0], math.isnan(point[1])))

    def pauses(self) -> set[Point]:
        """Gaps where nothing was measured."""
        if self._pauses is None:
            self._pauses = {(step, math.nan) for step in pauses(self.steps)}
        return self._pauses

    def values(self) -> list[float]:
        """The finite values that are kept of all heads."""
        found = self.extremes()
        kept = np.concatenate([found.low, found.high])[:, : sum(self.shape)]
        return kept[~np.isnan(kept)].tolist()

    def _fitted(
        self, layers: Sequence[Sequence[float | None]], shape: list[int]
    ) -> list[float | None]:
        """A sample of another shape: heads that are new get a column, those that lack a hole."""
        wide = [max(pair) for pair in zip_longest(self.shape, shape, fillvalue=0)]
        if wide != self.shape:
            self._widen(wide)
        row: list[float | None] = []
        for n, size in enumerate(wide):
            heads = layers[n] if n < len(layers) else ()
            first = len(row)
            row += [*heads, *[None] * (size - len(heads))]
            absent = [first + head for head in range(len(heads), size)]
            if not heads:
                absent.append(sum(wide) + n)
            self._missing += [(len(self._rows), column) for column in absent]
        return row

    def _widen(self, shape: list[int]) -> None:
        """Give the columns new places; what was not measured stays empty."""
        if self._rows:
            self._settle()
        old, self.shape = self.shape, shape
        if self._done is None:
            return
        starts = [sum(shape[:n]) for n in range(len(shape))]
        places = [starts[n] + head for n, size in enumerate(old) for head in range(size)]
        places += [sum(shape) + n for n in range(len(old))]

        def moved(values: NDArray, empty: float) -> NDArray:
            out = np.full((len(values), sum(shape) + len(shape)), empty, values.dtype)
            out[:, places] = values
            return out

        *columns, end = self._done
        empty = (math.nan, 0, math.nan, 0, False)
        self._done = Extremes(*map(moved, columns, empty), end)

    def _settle(self) -> None:
        """Thin the samples that are held."""
        values = np.array(self._rows)
        steps = np.array(self.steps[-len(values) :], dtype=np.int64)
        known = np.where(np.isfinite(values), values, -np.inf)
        ends = np.cumsum([0, *self.shape]).tolist()
        tops = [known[:, a:b].max(axis=1, initial=-np.inf) for a, b in pairwise(ends)]
        new = samples(steps, np.column_stack([values, *tops]))
        for row, column in self._missing:
            new.broken[row, column] = False
        new = squeezed(new, self._factor)
        if self._done is not None:
            new = Extremes(*(np.concatenate(pair) for pair in zip(self._done, new, strict=True)))
        while len(new.end) > 2 * KEPT:
            new, self._factor = squeezed(new, 2), 2 * self._factor
        self._done, self._rows, self._missing = new, [], []
