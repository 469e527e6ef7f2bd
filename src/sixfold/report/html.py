"""The report of a run: one HTML file that needs nothing else, and fetches nothing."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from sixfold.contracts import Snapshot
from sixfold.report import series
from sixfold.report.actions import Action, Told, actions, told
from sixfold.report.compare import finals, side_by_side
from sixfold.report.headline import headline, metric, origin, outcomes, promise, verdict, where
from sixfold.report.heat import heat_map
from sixfold.report.hexmap import MapStyle, Moment, colour_scale, hex_maps, hex_row, viridis
from sixfold.report.read import Row, Run, read_run
from sixfold.report.scale import duration, finite, kind_of, number
from sixfold.report.svg import DARK, LIGHT, Axes, Line, line_chart, style

TITLES = {
    "max_logit": "Largest attention logit",
    "entropy": "Attention entropy",
    "condition_q": "Condition number, queries",
    "condition_k": "Condition number, keys",
    "condition_v": "Condition number, values",
    "sigma_max_q": "Spectral norm, queries",
    "sigma_max_k": "Spectral norm, keys",
    "sigma_max_v": "Spectral norm, values",
    "gradient_norm": "Gradient norm, largest head of each layer",
    "gradient_mean": "Mean gradient, largest head of each layer",
    "update_ratio": "Size of a step",
    "redundancy": "Redundancy of heads",
    "rank_distance": "Distance from rank 1",
    "stable_rank": "Stable rank",
    "filter_response": "Filter response, strongest mode",
}
WHOLE = {
    "update_ratio": "Size of a step, whole model",
    "weight_growth": "Growth of the weights, whole model",
}
LEAST = ("entropy",)
"""Signals whose least value is the one to see."""
WIDE, NARROW = 1080, 400
COLUMN = {"pair": 528, "threes": 346, "fours": 256}
MAX_ENTRIES, MAX_SAMPLE, MAX_POINTS = 400, 20_000, 16_000


class Tile(NamedTuple):
    """One headline number."""

    label: str
    value: str
    detail: str
    bad: bool = False


class Gallery(NamedTuple):
    """Drawings in columns; `look` says how many columns a wide window has."""

    look: str
    drawings: list[str]


class Deed(NamedTuple):
    """One row of the table of changes, as text."""

    step: str
    name: str
    place: str
    told: Told
    tone: str


class Entry(NamedTuple):
    """One row of the journal table, as text."""

    step: str
    kind: str
    level: str
    place: str
    text: str
    outcome: str
    tone: str


def write_report(run_folder: str | Path, compare: Sequence[str | Path] = ()) -> Path:
    """Write report.html into the run folder, with other runs beside it if given.

    Raises ModuleNotFoundError, naming the extra, without jinja2; see `read_run` for the rest.
    """
    jinja2 = _jinja2()
    run = read_run(run_folder)
    others = [read_run(folder) for folder in compare]
    page = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).from_string(_packaged("page.html"))
    path = run.folder / "report.html"
    path.write_text(page.render(_context(run, others)), encoding="utf-8")
    return path


def _jinja2() -> ModuleType:
    try:
        return importlib.import_module("jinja2")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the report needs jinja2: pip install 'sixfold[cli]'") from error


def _packaged(name: str) -> str:
    return files("sixfold.report").joinpath(name).read_text("utf-8")


def _context(run: Run, others: Sequence[Run]) -> dict[str, Any]:
    """Everything the page shows. Keys that end in ``svg`` are drawings, all else is escaped."""
    entries, hidden = _journal(run)
    deeds = [_deed(run, action) for action in actions(run)]
    player = _player(run)
    return {
        "run": run,
        "provenance": origin(run),
        "tiles": _tiles(run),
        "stops": [_stop(run, row) for row in headline(run).stops],
        "deeds": deeds[:MAX_ENTRIES],
        "deeds_hidden": number(len(deeds) - MAX_ENTRIES) if len(deeds) > MAX_ENTRIES else "",
        "gridded": series.radius_of(run) is not None,
        "css": _packaged("page.css") + _theme(),
        "js": _packaged("page.js"),
        "loss_svg": _loss(run),
        "rate_svg": _rate(run),
        "side_svg": _both(lambda width: _side(run, others, width)) if others else None,
        "finals": finals(_labelled(run, others)) if others else [],
        "maps_svg": _maps(run),
        "player_svg": Gallery("pair", player[0]),
        "frames": player[1],
        "logit_svg": _panels(run, "max_logit"),
        "entropy_svg": _panels(run, "entropy"),
        "condition_svg": _layers(run, "condition_q", "condition_k", "condition_v"),
        "sigma_svg": _layers(run, "sigma_max_q", "sigma_max_k", "sigma_max_v"),
        "gradient_svg": _gradients(run),
        "rank_svg": _layers(run, "redundancy", "rank_distance", "stable_rank"),
        "other_svg": _layers(run, *_others(run)),
        "timing_svg": _timing(run),
        "entries": entries,
        "hidden": number(hidden) if hidden else "",
        "sample": run.sample[:MAX_SAMPLE] if run.sample is not None else None,
        "config": _flat(run.config),
        "environment": _flat(run.environment),
        "limits": _flat(run.measured.header.get("limits") or {}),
        "layers": [
            (f"layer {n}", str(name))
            for n, name in enumerate(run.measured.header.get("names") or ())
        ],
    }


def _theme() -> str:
    return f"{style(LIGHT)}@media (prefers-color-scheme:dark){{{style(DARK)}}}"


# ---------------------------------------------------------------- numbers


def _stop(run: Run, row: Row) -> tuple[str, str]:
    """The advice to stop, and since when and how often it was given."""
    same = str(row.get("reason", "")).partition(":")[0]
    steps = [
        each["step"]
        for each in run.journal
        if each["kind"] == "stop" and str(each.get("reason", "")).startswith(same)
    ]
    since = f"step {number(steps[0])}"
    if len(steps) > 1:
        since += f", and {number(len(steps) - 1)} times more up to step {number(steps[-1])}"
    return str(row.get("reason") or row.get("text") or ""), since


def _tiles(run: Run) -> list[Tile]:
    facts = headline(run)
    unit = run.unit("loss")
    tiles = [_loss_tile(run)] if facts.final_validation or facts.final_train is None else []
    if facts.final_train is not None:
        step, loss = facts.final_train
        detail = f"{unit}, step {number(int(step))}".strip(", ")
        tiles.append(Tile("training loss", number(loss), detail, not math.isfinite(loss)))
    levels = ", ".join(f"{number(count)} {level}" for level, count in facts.alarms.items())
    tiles.append(Tile("alarms", number(sum(facts.alarms.values())), levels))
    undone = f", {number(facts.undone)} undone" if facts.undone else ""
    undone += f", {number(facts.by_hand)} by hand" if facts.by_hand else ""
    kept = f"{number(facts.held)} of {number(facts.judged)} judged expectations held{undone}"
    if series.changes(run) and not any(row.get("applied", True) for row in series.changes(run)):
        kept = "only said: this governor observes"
    tiles.append(Tile("changes", number(facts.changes), kept if facts.changes else ""))
    if facts.broken_at is not None:
        tiles.append(
            Tile("loss broke", f"step {number(facts.broken_at)}", "not a number", bad=True)
        )
    tiles.append(Tile("steps", number(facts.last_step), ""))
    if facts.wall_s is not None:
        tiles.append(Tile("wall time", duration(facts.wall_s), ""))
    if facts.parameters is not None:
        tiles.append(Tile("parameters", number(facts.parameters), ""))
    return tiles


def _loss_tile(run: Run) -> Tile:
    facts = headline(run)
    if facts.final_validation is None:
        return Tile("final validation loss", "not measured", "")
    (step, loss), best = facts.final_validation, facts.best_validation
    detail = f"{run.unit('loss')}, step {number(int(step))}".strip(", ")
    if best is not None and best[0] != step:
        detail += f"; best {number(best[1])} at step {number(int(best[0]))}"
    return Tile("final validation loss", number(loss), detail, not math.isfinite(loss))


def _flat(tree: Row, prefix: str = "") -> list[tuple[str, str]]:
    """A nested mapping as dotted names and values.

    >>> _flat({"model": {"num_heads": 7}, "seed": 0})
    [('model.num_heads', '7'), ('seed', '0')]
    """
    rows: list[tuple[str, str]] = []
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            rows += _flat(value, f"{prefix}{key}.")
        else:
            shown = value if isinstance(value, str) else json.dumps(value)
            rows.append((f"{prefix}{key}", shown))
    return rows


def _journal(run: Run) -> tuple[list[Entry], int]:
    """The table, and how many entries it leaves out: what repeats, then the mildest alarms."""
    first = {id(entry) for entry in headline(run).stops}
    mildness = {"notice": 3, "warning": 2}

    def rank(entry: Row) -> int:
        if entry["kind"] == "alarm":
            return mildness.get(str(entry.get("level")), 1)
        return 4 if entry["kind"] == "stop" and id(entry) not in first else 0

    order = sorted(range(len(run.journal)), key=lambda i: rank(run.journal[i]))
    judged = outcomes(run)
    answers = _answers(run)
    shown = sorted(order[:MAX_ENTRIES])
    entries = [_entry(run.journal[i], judged, answers) for i in shown]
    return entries, len(order) - len(shown)


def _answers(run: Run) -> dict[tuple[int, str], str]:
    """The change that was made at a step and place."""
    return {(row["step"], where(row)): f"change {row.get('id')}" for row in series.changes(run)
            if not row.get("by_hand")}  # fmt: skip


def _deed(run: Run, action: Action) -> Deed:
    change = action.change
    values = change.get("arguments")
    given = ", ".join(f"{key} {_short(value)}" for key, value in values.items()) if values else ""
    name = f"{change.get('id')} {change.get('name')}" + (f" ({given})" if given else "")
    tone = {True: "good", False: "bad", None: ""}[action.held]
    words = told(action, run.signal_unit(action.signal))
    return Deed(number(change["step"]), name, where(change), words, tone)


def _short(value: object) -> str:
    return number(value) if isinstance(value, int | float) else str(value)


def _entry(row: Row, judged: Mapping[Any, Row], answers: Mapping[tuple[int, str], str]) -> Entry:
    kind = str(row["kind"])
    text, outcome, tone = series.words(row), "", ""
    if kind == "change":
        evidence = judged.get(row.get("id"))
        promised = "" if "expects" in text else promise(row)
        outcome = "; ".join(part for part in (promised, verdict(evidence)) if part)
        tone = "" if evidence is None else ("good" if evidence.get("held") else "bad")
    elif kind == "evidence":
        outcome, tone = verdict(row), "good" if row.get("held") else "bad"
    elif kind == "alarm" and isinstance(row.get("value"), int | float):
        limit = row.get("limit")
        past = f", limit {number(limit)}" if isinstance(limit, int | float) else ""
        answer = answers.get((row["step"], where(row)))
        outcome = f"{number(row['value'])}{past}" + (f"; answered by {answer}" if answer else "")
    name = row.get("name") or row.get("signal") or ""
    numbered = f"{kind} {row['id']}" if row.get("id") is not None else kind
    head = f"{name}: " if name and name not in text else ""
    cost = f" (cost: {row['cost']})" if row.get("cost") else ""
    if row.get("by_hand"):
        cost += ", by hand"
    return Entry(number(row["step"]), numbered, str(row.get("level") or kind), where(row),
                 head + text + cost, outcome, tone)  # fmt: skip


# ---------------------------------------------------------------- drawings


def _both(draw: Callable[[int], str]) -> str:
    """A wide drawing and a narrow one; the window's width decides which is seen."""
    return f'<div class="wide">{draw(WIDE)}</div><div class="narrow">{draw(NARROW)}</div>'


def _loss(run: Run) -> str:
    lines, span = series.loss_lines(run), _span(run)
    losses = sorted(metric(run, "loss", "train") + metric(run, "loss", "validation"))
    marks = series.journal_marks(run) + series.broken_marks(losses, "critical", "loss")
    unit = run.unit("loss")
    return _both(lambda width: line_chart(lines, marks, Axes("Loss", unit, width, 330, steps=span)))


def _rate(run: Run) -> str | None:
    points = series.line_of(run, "learning_rate")
    if not points:
        return None
    line, marks = Line("learning rate", points, "s2"), series.journal_marks(run)
    axes = Axes("Learning rate", run.unit("learning_rate"), WIDE, 130, steps=_span(run))
    return _both(lambda width: line_chart([line], marks, replace(axes, width=width)))


def _span(run: Run) -> tuple[float, ...]:
    steps = [row["step"] for row in run.metrics.rows]
    return (min(steps), max(steps)) if steps else ()


def _labelled(run: Run, others: Sequence[Run]) -> list[tuple[str, Run]]:
    """Runs by name; a name that occurs twice is followed by its folder's."""
    runs = [run, *others]
    names = [each.name for each in runs]
    return [
        (name if names.count(name) == 1 else f"{name} ({each.folder.resolve().name})", each)
        for name, each in zip(names, runs, strict=True)
    ]


def _side(run: Run, others: Sequence[Run], width: int) -> str:
    axes = Axes("Training loss", run.unit("loss"), width, 330)
    return side_by_side(_labelled(run, others), axes)


def _panels(run: Run, signal: str) -> Gallery:
    """One small chart per layer on shared axes, a line per head."""
    track = run.measured.tracks.get(signal)
    depth = len(track.shape) if track is not None else 0
    look = "pair" if depth < 3 else ("fours" if depth % 4 == 0 else "threes")
    named = 2 if look == "fours" else 3
    layers = [series.head_lines(run, signal, layer, named) for layer in range(depth)]
    values = [y for lines in layers for line in lines for y in finite(line.points)]
    per_line = min(600, max(60, MAX_POINTS // max(sum(map(len, layers)), 1)))
    entropy = signal == "entropy"
    axes = Axes(
        "", run.signal_unit(signal), COLUMN[look], 190,
        values=(0.0, 1.0) if entropy else (min(values, default=0), max(values, default=1)),
        scale="linear" if entropy else kind_of(values),
        points=per_line, rest="other heads",
    )  # fmt: skip
    charts = [
        line_chart(lines, series.journal_marks(run, signal, layer),
                   replace(axes, title=f"Layer {layer}", limits=_limits(run, signal, layer)))
        for layer, lines in enumerate(layers)
    ]  # fmt: skip
    return Gallery(look, charts)


def _limits(run: Run, signal: str, layer: int | None = None) -> tuple[float, ...]:
    """The limits alarms of a signal were raised by, unless every head has its own.

    Of several limits a layer has its own; one that holds for all is drawn everywhere.
    """
    rows = [row for row in series.alarms(run, signal) if row.get("limit") is not None]
    limits = {row["limit"] for row in rows if math.isfinite(row["limit"])}
    if layer is not None and signal in LEAST:
        limits = {row["limit"] for row in rows if row.get("layer") == layer} & limits
    return tuple(limits) if len(limits) <= 2 else ()


def _layers(run: Run, *signals: str) -> Gallery:
    """One chart per signal, a line per layer: its largest head."""
    axes = Axes("", "", COLUMN["threes"], 220, points=400, rest="other layers")
    charts = [
        line_chart(series.layer_lines(run, signal), series.journal_marks(run, signal),
                   replace(axes, title=TITLES.get(signal, signal), unit=run.signal_unit(signal)))
        for signal in signals
        if signal in run.measured.tracks
    ]  # fmt: skip
    return Gallery("threes", charts)


def _others(run: Run) -> list[str]:
    """Signals that this page knows nothing of."""
    return [name for name in run.measured.tracks if name not in TITLES]


def _gradients(run: Run) -> Gallery:
    whole = series.line_of(run, "gradient_norm")
    axes = Axes("Gradient norm, whole model", run.unit("gradient_norm"))
    charts = [line_chart([Line("gradient norm", whole, "s0")], [], axes)] if whole else []
    for name, title in WHOLE.items():
        points = series.line_of(run, name)
        if points:
            axes = Axes(title, run.unit(name))
            charts.append(line_chart([Line(name, points, "s0")], [], axes))
    for signal in ("gradient_norm", "update_ratio", "gradient_mean"):
        if signal in run.measured.tracks:
            axes = Axes(TITLES[signal], run.signal_unit(signal), limits=_limits(run, signal))
            marks = series.journal_marks(run, signal)
            charts.append(line_chart(series.layer_lines(run, signal), marks, axes))
    return Gallery("pair", charts)


def _timing(run: Run) -> Gallery:
    lines = [
        Line(name, track.points(0), f"s{i % 8}")
        for i, (name, track) in enumerate(run.measured.times.items())
    ]
    charts = [line_chart(lines, [], Axes("Time per step and part", "us"))] if lines else []
    speed = series.line_of(run, "tokens_per_s")
    if speed:
        axes = Axes("Throughput", run.unit("tokens_per_s"), values=(0.0,), scale="linear")
        charts.append(line_chart([Line("throughput", speed, "s2")], [], axes))
    return Gallery("pair", charts)


# ---------------------------------------------------------------- maps


def _map_style(run: Run, signal: str) -> MapStyle:
    values = run.measured.tracks[signal].values()
    fixed = (0.0, 1.0) if signal == "entropy" else None
    return MapStyle(
        TITLES[signal], run.signal_unit(signal), colour_scale(values, fixed), series.radius_of(run)
    )


def _mapped(run: Run) -> list[str]:
    return [name for name in series.MAPPED if name in run.measured.tracks]


def _maps(run: Run) -> Gallery:
    """Maps of heads: on their grid at some moments, or where they have none a row for each."""
    draw = _heat if series.radius_of(run) is None else _hexagons
    return Gallery("pair", [draw(run, name, _map_style(run, name)) for name in _mapped(run)])


def _hexagons(run: Run, signal: str, look: MapStyle) -> str:
    return hex_maps(series.moments(run, signal, 6), look)


def _heat(run: Run, signal: str, look: MapStyle) -> str:
    alarms = series.spots(series.alarms(run, signal))
    changes = series.spots(series.changes(run))
    track = run.measured.tracks[signal]
    return heat_map(track, look, alarms, changes, least=signal in LEAST)


def _player(run: Run) -> tuple[list[str], dict[str, Any] | None]:
    """The last moment of every mapped signal, and what a slider needs to show the others."""
    names = _mapped(run)
    cells = sum(sum(run.measured.tracks[name].shape) for name in names)
    rows = series.frames(run, min(60, max(12, 36_000 // max(cells, 1))))
    if len(rows) < 2:
        return [], None
    before = [-math.inf, *(row.step for row in rows)]
    drawings, signals = [], []
    for name in names:
        look, shape = _map_style(run, name), run.measured.tracks[name].shape
        frames = [_filled(row, name, shape) for row in rows]
        drawings.append(hex_row(Moment(rows[-1].step, frames[-1]), look))
        signals.append({
            "unit": look.unit, "low": look.scale.low, "high": look.scale.high,
            "kind": look.scale.kind, "values": [_flat_values(frame) for frame in frames],
        })  # fmt: skip
    return drawings, {
        "steps": [row.step for row in rows],
        "texts": [series.frame_text(run, a, r.step) for a, r in zip(before, rows, strict=False)],
        "colours": [viridis(i / 63) for i in range(64)],
        "signals": signals,
    }


def _filled(row: Snapshot, name: str, shape: Sequence[int]) -> list[list[float]]:
    """A signal of every head there ever was; NaN where it was not measured."""
    layers = row.signals.get(name, ())
    return [
        [layers[n][h] if n < len(layers) and h < len(layers[n]) else math.nan for h in range(size)]
        for n, size in enumerate(shape)
    ]


def _flat_values(layers: Sequence[Sequence[float]]) -> list[float | None]:
    """Layer by layer, four digits, None where there is no finite number."""
    return [
        float(f"{value:.4g}") if math.isfinite(value) else None
        for heads in layers
        for value in heads
    ]
