"""How much the final loss depends on the learning rate: the reference run at each rate of a ladder.

Wortsman et al. 2023, Small-scale proxies for large-scale Transformer training instabilities,
section 2.2.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace

from sixfold.bench.rescue.columns import COLUMNS
from sixfold.bench.rescue.families import LARGE
from sixfold.bench.rescue.score import Rows, capped
from sixfold.bench.rescue.trial import Case

LADDER = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
"""From the rate of the healthy reference run to a hundred times that."""


def named(rate: float) -> str:
    """The case of a rate.

    >>> named(3e-2)
    'rate 0.03'
    """
    return f"rate {rate:g}"


def climbing(columns: Sequence[str], seeds: Sequence[int]) -> list[Case]:
    """The reference run at every rate, under these columns and with nothing."""
    return [
        Case(named(rate), column, seed, recipe)
        for seed in seeds
        for rate in LADDER
        for column in dict.fromkeys(["nothing", *columns])
        if (recipe := COLUMNS[column].recipe(replace(LARGE, rate=rate))) is not None
    ]


def ladders(rows: Rows, column: str) -> list[list[float]]:
    """Final losses at every rate, at most that before training, of each seed that has them all."""
    found = []
    for seed in sorted({seed for _, by, seed in rows if by == column}):
        climb = [rows.get((named(rate), column, seed)) for rate in LADDER]
        if None not in climb:
            found.append([capped(row, row["initial"]) for row in climb])
    return found


def sensitivity(losses: Sequence[float]) -> float:
    """Mean over the rates of min(final, initial), minus the best of them: 0 where no rate matters.

    >>> sensitivity([1.0, 1.0, 4.0])
    1.0
    """
    return statistics.fmean(losses) - min(losses)
