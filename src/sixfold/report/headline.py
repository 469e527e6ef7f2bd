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
    """Losses with their steps, sizes, and what the governor did; None where not recorded.

    stops: the advice to stop, the first time each reason was given.
    """

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
    by_hand: int
    stops: tuple[Row, ...]


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
        by_hand=sum(e["kind"] == "change" and bool(e.get("by_hand")) for e in run.journal),
        stops=stops(run),
    )


def origin(run: Run) -> str:
    """Where the numbers come from: seed, commit and machine, or somebody's own loop."""
    header = run.metrics.header
    known = [f"{key.replace('_', ' ')} {header[key]}" for key in ("seed", "commit", "config_hash")
             if key in header]  # fmt: skip
    if known or run.config:
        return " · ".join([*known, *([str(header["device"])] if "device" in header else [])])
    shape = max((track.shape for track in run.measured.tracks.values()), key=sum, default=[])
    sizes = f" · {number(sum(shape))} heads in {number(len(shape))} layers" if shape else ""
    return f"watched by a governor in a loop of its own{sizes}"


def stops(run: Run) -> tuple[Row, ...]:
    """The advice to stop, the first time each reason was given.

    The advice is repeated at every step, with another number in it.
    """
    found: dict[str, Row] = {}
    for entry in run.journal:
        if entry["kind"] == "stop":
            found.setdefault(str(entry.get("reason", "")).partition(":")[0], entry)
    return tuple(found.values())


def metric(run: Run, name: str, split: str) -> list[Point]:
    """A metric by step; empty where it was not measured."""
    return run.curves.get((name, split), [])


def outcomes(run: Run) -> dict[Any, Row]:
    """The last evidence on every change, by the change's id."""
    return {entry.get("id"): entry for entry in run.journal if entry["kind"] == "evidence"}


def where(entry: Row) -> str:
    """The head a journal entry speaks of, a whole layer, or the model.

    >>> where({"layer": 2, "head": 3}), where({"layer": 2, "head": -1})
    ('layer 2 · head 3', 'layer 2')
    >>> where({"layer": -1, "head": -1}), where({})
    ('the model', '')
    """
    layer, head = entry.get("layer"), entry.get("head")
    if layer is None:
        return ""
    if layer < 0:
        return "the model"
    return f"layer {layer}" if head is None or head < 0 else f"layer {layer} · head {head}"


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
    moves = f"{verb} past {number(bound)}" if isinstance(bound, int | float) else verb
    if bound == math.inf:
        moves = "is finite again"
    soon = f" within {number(within)} steps" if isinstance(within, int | float) else ""
    return f"{expects.get('signal', 'signal')} {moves}{soon}"


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
