"""The facts a reader wants first, each counted from the files of a run."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

from sixfold.report.read import Row, Run
from sixfold.report.scale import Point, number

LEVELS = ("notice", "warning", "critical")


class Headline(NamedTuple):
    """Losses with their steps, sizes, and what the governor did; None where not recorded."""

    final_validation: Point | None
    best_validation: Point | None
    final_train: Point | None
    broken_at: int | None
    last_step: int
    wall_s: float | None
    parameters: int | None
    alarms: Mapping[str, int]
    changes: int
    judged: int
    held: int
    undone: int


def headline(run: Run) -> Headline:
    """Count and look up everything in `Headline`.

    Wall time is ``wall_s`` or ``wall_time_s``, parameters are ``parameters`` or
    ``num_parameters``, anywhere in environment.json or config.json.
    """
    validation, train = metric(run, "loss", "validation"), metric(run, "loss", "train")
    known = [point for point in validation if math.isfinite(point[1])]
    kinds = Counter(str(entry["kind"]) for entry in run.journal)
    verdicts = outcomes(run)
    wall = _find((run.environment, run.config), "wall_s", "wall_time_s")
    parameters = _find((run.environment, run.config), "parameters", "num_parameters")
    return Headline(
        final_validation=validation[-1] if validation else None,
        best_validation=min(known, key=lambda point: point[1]) if known else None,
        final_train=train[-1] if train else None,
        broken_at=next(
            (int(x) for x, y in sorted(train + validation) if not math.isfinite(y)), None
        ),
        last_step=int(max((row["step"] for row in run.metrics.rows), default=0)),
        wall_s=float(wall) if wall is not None else None,
        parameters=int(parameters) if parameters is not None else None,
        alarms={level: count for level in LEVELS if (count := _level_count(run, level))},
        changes=kinds["change"],
        judged=len(verdicts),
        held=sum(bool(verdict.get("held")) for verdict in verdicts.values()),
        undone=kinds["undo"],
    )


def metric(run: Run, name: str, split: str) -> list[Point]:
    """A metric by step. Where a resumed run repeats a step, the later row holds."""
    rows = run.metrics.rows
    found = {r["step"]: float(r[name]) for r in rows if r["split"] == split and name in r}
    return sorted(found.items())


def outcomes(run: Run) -> dict[Any, Row]:
    """The last evidence on every change, by the change's id."""
    return {entry.get("id"): entry for entry in run.journal if entry["kind"] == "evidence"}


def where(entry: Row) -> str:
    """The head a journal entry speaks of.

    >>> where({"layer": 2, "head": 3}), where({"layer": 2}), where({})
    ('layer 2 · head 3', 'layer 2', '')
    """
    parts = [f"{part} {entry[part]}" for part in ("layer", "head") if entry.get(part) is not None]
    return " · ".join(parts)


def promise(entry: Row) -> str:
    """What a change expects, in words.

    >>> promise({"expects": {"signal": "max_logit", "direction": "fall", "bound": 60.0,
    ...                      "within": 30}})
    'max_logit falls past 60 within 30 steps'
    """
    expects = entry.get("expects")
    if not isinstance(expects, Mapping):
        return ""
    verb = {"fall": "falls", "rise": "rises"}.get(str(expects.get("direction")), "moves")
    bound, within = expects.get("bound"), expects.get("within")
    past = f" past {number(bound)}" if isinstance(bound, int | float) else ""
    soon = f" within {number(within)} steps" if isinstance(within, int | float) else ""
    return f"{expects.get('signal', 'signal')} {verb}{past}{soon}"


def verdict(evidence: Row | None) -> str:
    """What came of a change, in words: held, did not hold, or not judged."""
    if evidence is None:
        return "not judged"
    value = evidence.get("value")
    came = f": {number(value)}" if isinstance(value, int | float) else ""
    return (
        f"{'held' if evidence.get('held') else 'did not hold'}{came} at step {evidence['step']:,}"
    )


def _level_count(run: Run, level: str) -> int:
    return sum(e["kind"] == "alarm" and e.get("level") == level for e in run.journal)


def _find(trees: tuple[Row, ...], *names: str) -> float | None:
    for tree in trees:
        for name, value in tree.items():
            if name in names and isinstance(value, int | float):
                return value
            inner = _find((value,), *names) if isinstance(value, Mapping) else None
            if inner is not None:
                return inner
    return None
