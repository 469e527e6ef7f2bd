"""From rows to figures: what was recalled, how early, where, what was rescued, what was harmed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from sixfold.bench.rescue.families import FAMILIES, Family
from sixfold.bench.rescue.healthy import KINDS

MARGIN = 0.1
"""Nats above the twin that make a failure."""
SMOOTH, LASTING = 0.9, 10
"""The loss is averaged so, and has to stay above the margin for so many steps."""
QUIET = "notice"
"""Alarms of this level alarm nobody."""

Row = Mapping[str, Any]
Rows = Mapping[tuple[str, str, int], Row]


def by_key(rows: Iterable[Row]) -> Rows:
    """Rows by case, column and seed."""
    return {(row["case"], row["column"], row["seed"]): row for row in rows}


def capped(row: Row, cap: float) -> float:
    """The final loss, at most `cap`; what is not finite counts as that.

    >>> capped({"final": None}, 4.0), capped({"final": 1.0}, 4.0)
    (4.0, 1.0)
    """
    return cap if row["final"] is None else min(row["final"], cap)


def smoothed(losses: Sequence[float | None]) -> list[float]:
    """Moving average of the losses, infinite from the first that is not finite."""
    values, mean = [], None
    for loss in losses:
        now = math.inf if loss is None else loss
        mean = now if mean is None else SMOOTH * mean + (1 - SMOOTH) * now
        values.append(mean)
    return values


def event(alone: Row, twin: Row) -> int | None:
    """The step from which the loss stands above the twin's: 1 is the first step.

    >>> event({"losses": [3.0] * 20}, {"losses": [3.0] * 9 + [1.0] * 11})
    10
    >>> event({"losses": [3.0, None, None]}, {"losses": [3.0, 3.0, 3.0]})
    2
    """
    pairs = zip(smoothed(alone["losses"]), smoothed(twin["losses"]), strict=False)
    above = [mine > other + MARGIN for mine, other in pairs]
    for step in range(len(above)):
        if all(above[step : step + LASTING]):
            return step + 1
    return None


class Verdict(NamedTuple):
    """What a column made of one failing run.

    Attributes:
        alone: final loss of the run with nothing.
        twin: final loss of the healthy twin.
        final: final loss under the column.
        event: step at which the run alone had failed.
        alarm: step of the first alarm that names the failure.
        located: whether that alarm named the head at fault, None where no head is.
        early: alarms before anything was wrong.
        actions: how many.
        stopped: whether the column gave the run up.
    """

    family: str
    seed: int
    alone: float
    twin: float
    final: float
    event: int | None
    alarm: int | None
    located: bool | None
    early: int
    actions: int
    stopped: bool

    @property
    def failed(self) -> bool:
        """Whether the run alone ended above its twin."""
        return self.alone > self.twin + MARGIN

    @property
    def rescue(self) -> float:
        """(alone - final) / (alone - twin): 1 is as good as the twin, 0 as bad as nothing."""
        return (self.alone - self.final) / (self.alone - self.twin)

    @property
    def lead(self) -> int | None:
        """Steps between the alarm and the event."""
        return None if self.event is None or self.alarm is None else self.event - self.alarm


def judge(name: str, family: Family, row: Row, alone: Row, twin: Row) -> Verdict:
    """Compare a column's row with those of nothing and of the twin.

    Losses count at most as that before training: the twin's, where the run began in ruins.
    """
    cap = min(alone["initial"], twin["initial"])
    loud = [alarm for alarm in row["alarms"] if alarm[1] != QUIET]
    right = [a for a in loud if a[2] in family.alarms and a[0] > family.onset]
    located = None
    if family.located and right:
        located = tuple(right[0][3:5]) == family.culprit(row["seed"])
    return Verdict(
        name, row["seed"], *(capped(one, cap) for one in (alone, twin, row)), event(alone, twin),
        right[0][0] if right else None, located,
        sum(alarm[0] <= family.onset for alarm in loud), len(row["actions"]),
        row["stop"] is not None,
    )  # fmt: skip


def verdicts(rows: Rows, column: str) -> list[Verdict]:
    """One for every family and seed for which the column, nothing and the twin have been run."""
    found = []
    for (name, by, seed), row in rows.items():
        family = FAMILIES.get(name)
        if by != column or family is None:
            continue
        alone, twin = rows.get((name, "nothing", seed)), rows.get((family.twin, "nothing", seed))
        if alone is not None and twin is not None:
            found.append(judge(name, family, row, alone, twin))
    return found


class Quartiles(NamedTuple):
    """Median, half the distance between the quartiles, and how many."""

    median: float
    spread: float
    count: int


def quartiles(values: Sequence[float]) -> Quartiles:
    """Of one or more values.

    >>> quartiles([1.0, 2.0, 3.0])
    Quartiles(median=2.0, spread=1.0, count=3)
    """
    if len(values) < 2:
        return Quartiles(values[0], 0.0, 1)
    low, middle, high = statistics.quantiles(values, n=4)
    return Quartiles(middle, (high - low) / 2, len(values))


def upper_bound(hits: int, count: int, level: float = 0.95) -> float:
    """One-sided Clopper-Pearson bound of a rate: the p at which so few hits have probability 0.05.

    Clopper and Pearson 1934, The use of confidence or fiducial limits.

    >>> round(upper_bound(0, 300), 4)
    0.0099
    """
    if hits >= count:
        return 1.0
    low, high = hits / count, 1.0
    for _ in range(60):
        p = (low + high) / 2
        below = sum(math.comb(count, k) * p**k * (1 - p) ** (count - k) for k in range(hits + 1))
        low, high = (p, high) if below > 1 - level else (low, p)
    return high


class Healthy(NamedTuple):
    """What a column did to healthy runs.

    Attributes:
        runs: how many.
        disturbed: runs with an alarm above notice, an action or a stop.
        alarms_per_1000: alarms above notice per 1,000 steps.
        harm: final loss minus that of nothing, in nats, run by run.
        same: runs whose parameters are those of nothing to the bit.
    """

    runs: int
    disturbed: int
    alarms_per_1000: float
    harm: list[float]
    same: int


def kind_of(name: str) -> str | None:
    """The kind of a healthy run, None of any other.

    >>> kind_of("phase change 3"), kind_of("soft collapse")
    ('phase change', None)
    """
    kind, _, number = name.rpartition(" ")
    return kind if kind in KINDS and number.isdigit() else None


def on_healthy(rows: Rows, column: str, kind: str | None = None) -> Healthy | None:
    """Over all healthy runs of a column, or those of one kind; None where there are none."""
    chosen = [
        (row, rows[name, "nothing", seed])
        for (name, by, seed), row in rows.items()
        if by == column and kind_of(name) is not None and kind in (None, kind_of(name))
        and (name, "nothing", seed) in rows
    ]  # fmt: skip
    if not chosen:
        return None
    loud = [[a for a in row["alarms"] if a[1] != QUIET] for row, _ in chosen]
    touched = [
        bool(alarms or row["actions"] or row["stop"])
        for alarms, (row, _) in zip(loud, chosen, strict=True)
    ]
    steps = sum(len(row["losses"]) for row, _ in chosen)
    return Healthy(
        len(chosen), sum(touched), 1000 * sum(map(len, loud)) / steps,
        [capped(row, math.inf) - capped(alone, math.inf) for row, alone in chosen],
        sum(row["parameters"] == alone["parameters"] for row, alone in chosen),
    )  # fmt: skip
