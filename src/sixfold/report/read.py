"""A run folder, read back: what was configured, measured, alarmed, changed and generated.

A process that is killed leaves its last line half written: that line is left out and noted. Any
other damage is an error that names the file and the line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sixfold.contracts import PerHead, Snapshot

Row = Mapping[str, Any]


class Lines(NamedTuple):
    """One JSON-lines file: its header, its rows, and what a reader must be told about it."""

    header: Row
    rows: tuple[Row, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Run:
    """Everything a run folder says. `notes` names what is missing or was cut off."""

    folder: Path
    config: Row
    environment: Row
    metrics: Lines
    telemetry_header: Row
    telemetry: tuple[Snapshot, ...]
    journal: tuple[Row, ...]
    sample: str | None
    notes: tuple[str, ...]

    @property
    def name(self) -> str:
        """The run's own name, or its folder's."""
        return str(self.metrics.header.get("run") or self.folder.resolve().name)

    def unit(self, name: str) -> str:
        """Unit of a metric as its file states it; empty where it is a plain number."""
        return _unit(_mapping(self.metrics.header, "units").get(name))

    def signal_unit(self, name: str) -> str:
        """Unit of a signal; one unit may stand for a family (``sigma_max`` for ``sigma_max_q``)."""
        units = _mapping(self.telemetry_header, "units")
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
    """Read a run folder.

    Raises FileNotFoundError where the folder or one of config.json, environment.json and
    metrics.jsonl is missing, and ValueError, naming file and line, where a file is damaged. A run
    without a governor has no telemetry or journal; that is noted.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no run folder {folder}")
    metrics = _lines(folder / "metrics.jsonl", "step", "split")
    telemetry = _lines(folder / "telemetry.jsonl", "step", optional=True)
    journal = _lines(folder / "journal.jsonl", "step", "kind", optional=True)
    sample = folder / "sample.txt"
    return Run(
        folder=folder,
        config=_object(folder / "config.json"),
        environment=_object(folder / "environment.json"),
        metrics=metrics,
        telemetry_header=telemetry.header,
        # between samples only loss and scalars are recorded, for replay
        telemetry=tuple(_snapshot(row) for row in telemetry.rows if row["signals"]),
        journal=journal.rows,
        sample=sample.read_text("utf-8", errors="replace") if sample.is_file() else None,
        notes=metrics.notes + telemetry.notes + journal.notes,
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
    header: dict[str, Any] = {}
    rows: list[Row] = []
    notes: list[str] = []
    for place, line, is_last in _numbered(path):
        try:
            row = json.loads(line)
        except ValueError as error:
            if not is_last:
                raise ValueError(f"{place}: not valid JSON: {error}") from error
            notes.append(f"{path.name}: the last line was cut off and is left out")
            continue
        if isinstance(row, dict) and "header" in row:
            header |= _mapping(row, "header")
        else:
            rows.append(_checked(row, place, required))
    return Lines(header, tuple(rows), tuple(notes))


def _numbered(path: Path) -> Iterator[tuple[str, bytes, bool]]:
    """Every line that is not blank: where it is, its bytes, and whether it is the last."""
    lines = [(n, line) for n, line in enumerate(path.read_bytes().split(b"\n"), 1) if line.strip()]
    for number, line in lines:
        yield f"{path}, line {number}", line, number == lines[-1][0]


def _checked(row: object, place: str, required: tuple[str, ...]) -> Row:
    if not isinstance(row, dict):
        raise ValueError(f"{place}: expected a JSON object, got {type(row).__name__}")
    missing = [key for key in required if key not in row]
    if missing:
        raise ValueError(f"{place}: no {' and no '.join(repr(key) for key in missing)}")
    return row


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
