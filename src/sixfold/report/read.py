"""A run folder, read back: what was configured, measured, alarmed, changed and generated.

A folder that a governor alone has written (``telemetry.jsonl`` and ``journal.jsonl``) is a run too.
A process that is killed leaves its last line half written: that line is left out and noted. Any
other damage is an error that names the file and the line.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from sixfold.contracts import PerHead, Snapshot
from sixfold.report.scale import Point
from sixfold.report.thin import Track

Row = Mapping[str, Any]
KEPT = 240
"""Samples that are kept whole at least, for maps of all heads at one moment."""
MAPPED = ("max_logit", "entropy")
"""Signals that are drawn as maps of heads."""


class Lines(NamedTuple):
    """One JSON-lines file: its header, its rows, and what a reader must be told about it."""

    header: Row
    rows: tuple[Row, ...]
    notes: tuple[str, ...]


class Log:
    """A JSON-lines file, row by row. The header and the notes are known once it has been read.

    Raises ValueError, naming file and line, for a line that is damaged or lacks a required key.
    """

    def __init__(self, path: Path, *required: str) -> None:
        self.path, self.required = path, required
        self.header: dict[str, Any] = {}
        self.notes: list[str] = []

    def __iter__(self) -> Iterator[Row]:
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.isspace():
                    continue
                try:
                    row = json.loads(line.decode())
                except ValueError as error:
                    if file.read().strip():
                        raise ValueError(
                            f"{self.path}, line {number}: not valid JSON: {error}"
                        ) from error
                    self.notes.append(
                        f"{self.path.name}: the last line was cut off and is left out"
                    )
                    return
                if isinstance(row, dict) and "header" in row:
                    self.header |= _mapping(row, "header")
                else:
                    yield self._checked(row, number)

    def _checked(self, row: object, number: int) -> Row:
        place = f"{self.path}, line {number}"
        if not isinstance(row, dict):
            raise ValueError(f"{place}: expected a JSON object, got {type(row).__name__}")
        missing = [key for key in self.required if key not in row]
        if missing:
            raise ValueError(f"{place}: no {' and no '.join(repr(key) for key in missing)}")
        return row


@dataclass
class Telemetry:
    """What the probes measured, thinned while it is read.

    samples: some moments whole, evenly spread, with the first, the last and the highest. tracks:
    all moments, thinned, by signal. times: of each part of a step, likewise. steps: loss and
    scalars of every step. befores: by its id, what a change's own signal was when it was made.
    """

    header: Row = field(default_factory=dict)
    samples: tuple[Snapshot, ...] = ()
    tracks: dict[str, Track] = field(default_factory=lambda: defaultdict(Track))
    times: dict[str, Track] = field(default_factory=lambda: defaultdict(Track))
    steps: list[Row] = field(default_factory=list)
    befores: dict[Any, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Run:
    """Everything a run folder says. `notes` names what is missing or was cut off."""

    folder: Path
    config: Row
    environment: Row
    metrics: Lines
    measured: Telemetry
    journal: tuple[Row, ...]
    sample: str | None
    notes: tuple[str, ...]

    @property
    def name(self) -> str:
        """The run's own name, or its folder's."""
        return str(self.metrics.header.get("run") or self.folder.resolve().name)

    @cached_property
    def curves(self) -> dict[tuple[str, str], list[Point]]:
        """Metrics by name and split. Where a resumed run repeats a step, the later row holds."""
        found: dict[tuple[str, str], dict[float, float]] = defaultdict(dict)
        for row in self.metrics.rows:
            split, step = row["split"], row["step"]
            for name, value in row.items():
                if isinstance(value, int | float) and name != "step":
                    found[name, split][step] = value
        return {key: sorted(points.items()) for key, points in found.items()}

    @property
    def telemetry(self) -> tuple[Snapshot, ...]:
        """The samples that are kept whole."""
        return self.measured.samples

    def unit(self, name: str) -> str:
        """Unit of a metric as its file states it; empty where it is a plain number."""
        return _unit(_mapping(self.metrics.header, "units").get(name))

    def signal_unit(self, name: str) -> str:
        """Unit of a signal; one unit may stand for a family (``sigma_max`` for ``sigma_max_q``)."""
        units = _mapping(self.measured.header, "units")
        return _unit(units.get(name, units.get(name.rpartition("_")[0])))


def _unit(unit: object) -> str:
    """A unit as it is shown.

    >>> _unit("nats"), _unit("1"), _unit("1 (of log n)"), _unit(None)
    ('nats', '', 'of log n', '')
    """
    text = str(unit or "")
    if text.startswith("1 (") and text.endswith(")"):
        return text[3:-1]
    return "" if text == "1" else text


def read_run(folder: str | Path) -> Run:
    """Read a run folder, or one that a governor of somebody's own loop has written.

    Without metrics.jsonl the losses are those of the telemetry.

    Raises FileNotFoundError where the folder is missing, where it holds neither metrics.jsonl nor
    telemetry.jsonl, and where metrics.jsonl has no config.json and environment.json beside it;
    ValueError, naming file and line, where a file is damaged. What a run lacks is noted.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no run folder {folder}")
    own = folder / "metrics.jsonl"
    # what else lies in the folder of somebody's own loop is theirs, whatever its name
    ours = own.is_file() or not (folder / "telemetry.jsonl").is_file()
    journal = _lines(folder / "journal.jsonl", "step", "kind", optional=True)
    measured = _telemetry(folder / "telemetry.jsonl", journal.rows, losses=not ours)
    metrics = _lines(own, "step", "split") if ours else _as_metrics(measured)
    sample = folder / "sample.txt"
    return Run(
        folder=folder,
        config=_object(folder / "config.json") if ours else {},
        environment=_object(folder / "environment.json") if ours else {},
        metrics=metrics,
        measured=measured,
        journal=journal.rows,
        sample=sample.read_text("utf-8", errors="replace") if sample.is_file() else None,
        notes=metrics.notes + measured.notes + journal.notes,
    )


def _object(path: Path) -> Row:
    if not path.is_file():
        raise FileNotFoundError(f"not a run folder: {path} is missing")
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _lines(path: Path, *required: str, optional: bool = False) -> Lines:
    if not path.is_file():
        if optional:
            return Lines({}, (), (f"{path.name}: not recorded in this run",))
        raise FileNotFoundError(f"not a run folder: {path} is missing")
    log = Log(path, *required)
    rows = tuple(log)
    return Lines(log.header, rows, tuple(log.notes))


# ---------------------------------------------------------------- telemetry


def _telemetry(path: Path, journal: Sequence[Row], *, losses: bool) -> Telemetry:
    if not path.is_file():
        return Telemetry(notes=(f"{path.name}: not recorded in this run",))
    log, found, kept, befores = Log(path, "step"), Telemetry(), Samples(), Befores(journal)
    for row in log:
        befores.see(row)
        if losses:
            found.steps.append(_scalars(row))
        # between samples only loss and scalars are recorded
        if not row.get("signals"):
            continue
        kept.add(row)
        for name, layers in row["signals"].items():
            found.tracks[name].add(row["step"], layers)
        for name, value in _mapping(row, "times_us").items():
            found.times[name].add(row["step"], [[value]])
    found.header, found.notes, found.samples = log.header, tuple(log.notes), kept.snapshots()
    found.befores = befores.all()
    return found


class Befores:
    """What the signal of each change was, at its target, when the change was made."""

    def __init__(self, journal: Sequence[Row]) -> None:
        changes = [row for row in journal if row["kind"] == "change"]
        self._open = deque(sorted(changes, key=lambda row: row["step"]))
        self._found: dict[Any, float] = {}
        self._now: Row = {}
        self._latest: dict[str, Row] = {}

    def see(self, row: Row) -> None:
        """Look at the next step."""
        while self._open and self._open[0]["step"] < row["step"]:
            self._tell(self._open.popleft())
        self._now = row
        for name in row.get("signals") or ():
            self._latest[name] = row

    def all(self) -> dict[Any, float]:
        """Values by the ids of changes; what was never measured has none."""
        while self._open:
            self._tell(self._open.popleft())
        return self._found

    def _tell(self, change: Row) -> None:
        expects = _mapping(change, "expects")
        name = str(expects.get("signal"))
        layer, head = expects.get("target") or (change.get("layer", -1), change.get("head", -1))
        value = value_at(self._now if layer < 0 else self._latest.get(name, {}), name, layer, head)
        if value is not None:
            self._found[change.get("id")] = value


def value_at(row: Row, name: str, layer: int, head: int) -> float | None:
    """A signal of one row: of a head, the median of a layer (-1), or of the whole model (-1, -1).

    >>> value_at({"loss": 2.5, "signals": {"entropy": [[0.1, 0.5, 0.3]]}}, "entropy", 0, -1)
    0.3
    """
    if layer < 0:
        value = row.get("loss") if name == "loss" else _mapping(row, "scalars").get(name)
        return None if value is None else float(value)
    layers = _mapping(row, "signals").get(name) or ()
    heads = layers[layer] if layer < len(layers) else ()
    if head < 0:
        return statistics.median(heads) if heads else None
    return heads[head] if head < len(heads) else None


class Samples:
    """Some rows of many: evenly spread, with the first, the last and the highest of each map."""

    def __init__(self) -> None:
        self._rows: list[Row] = []
        self._stride = 1
        self._count = 0
        self._last: dict[str, Row] = {}
        self._highest: dict[str, tuple[float, Row]] = {}

    def add(self, row: Row) -> None:
        """Consider one more row."""
        if self._count % self._stride == 0:
            self._rows.append(row)
        self._count += 1
        if len(self._rows) > 2 * KEPT:
            self._rows, self._stride = self._rows[::2], 2 * self._stride
        for name in row["signals"]:
            self._last[name] = row
        for name in MAPPED:
            before = self._highest.get(name, (-math.inf, row))[0]
            # a quick look, then a careful one: numbers may be missing or not finite
            try:
                heads = chain.from_iterable(row["signals"].get(name, ()))
                top = max(heads, default=-math.inf)
            except TypeError:
                top = math.nan
            if not top <= before:
                top = highest(row["signals"][name])
                if top > before:
                    self._highest[name] = (top, row)

    def snapshots(self) -> tuple[Snapshot, ...]:
        """The rows chosen; the later of equal steps."""
        peaks = [row for _, row in self._highest.values()]
        chosen = {int(row["step"]): row for row in (*self._rows, *peaks, *self._last.values())}
        return tuple(_snapshot(chosen[step]) for step in sorted(chosen))


def highest(signal: Sequence[Sequence[float | None]]) -> float:
    """The largest finite value of all heads, -inf where there is none."""
    values = (value for heads in signal for value in heads if value is not None)
    return max((value for value in values if math.isfinite(value)), default=-math.inf)


def _scalars(row: Row) -> Row:
    """What is known of one step as a whole, as a row of metrics."""
    found = {"step": row["step"], "split": "train", **(row.get("scalars") or {})}
    finite, loss = found.pop("loss_finite", 1.0), _number(row.get("loss"))
    # a NaN stands for a loss that was not given, unless it is said that it was one
    if not math.isnan(loss) or not finite:
        found["loss"] = loss
    return found


def _as_metrics(measured: Telemetry) -> Lines:
    """The telemetry's own losses and scalars as metrics."""
    units = _mapping(measured.header, "units")
    # the governor does not know the unit of a loss it was given
    units.pop("loss", None)
    return Lines({"units": units}, tuple(measured.steps), ())


def _snapshot(row: Row) -> Snapshot:
    return Snapshot(
        step=int(row["step"]),
        loss=_number(row.get("loss")),
        signals={name: _per_head(value) for name, value in _mapping(row, "signals").items()},
        scalars={name: _number(value) for name, value in _mapping(row, "scalars").items()},
        times_us={name: _number(value) for name, value in _mapping(row, "times_us").items()},
    )


def _per_head(layers: list[list[float | None]]) -> PerHead:
    return tuple(tuple(_number(value) for value in heads) for heads in layers)


def _number(value: Any) -> float:
    """A number that was not measured is NaN, and is drawn as a gap."""
    return float("nan") if value is None else float(value)


def _mapping(row: Row, key: str) -> dict[str, Any]:
    value = row.get(key)
    return dict(value) if isinstance(value, Mapping) else {}
