"""Telemetry as Parquet, for questions that pandas or DuckDB answer.

``telemetry.parquet`` has one row per sampled step, layer and head and a column per signal;
``scalars.parquet`` one row per step: its loss, scalars and times. What was not measured is null.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sixfold.record import naming
from sixfold.report.read import Log, Row

SOURCE, SIGNALS, SCALARS = "telemetry.jsonl", "telemetry.parquet", "scalars.parquet"
GROUP = 1 << 16
"""Rows that are held in memory, then written as one row group."""
KEYS = {"step": "int64", "layer": "int16", "head": "int16"}


class Compacted(NamedTuple):
    """The two files, and what their reader must be told."""

    signals: Path
    scalars: Path
    notes: tuple[str, ...]


def compact(folder: str | Path) -> Compacted:
    """Write ``telemetry.jsonl`` of a governed run as two Parquet files beside it.

    Units are in the metadata of the columns (``unit``), the log's header in that of the schema
    (``sixfold``). The log stays; written again, the files are the same. Each is moved into its
    place when it is whole. Memory does not grow with the length of the run.

    Raises FileNotFoundError where the run was not governed, ValueError, naming file and line,
    where the log is damaged, and ModuleNotFoundError, naming the extra, without pyarrow.
    """
    arrow = _arrow()
    folder = Path(folder)
    source = folder / SOURCE
    if not source.is_file():
        raise FileNotFoundError(f"{folder} was not governed: there is no {SOURCE} in it")
    columns = (["step", "layer", "head"], ["step", "loss"])
    while True:
        log = Log(source, "step")
        with (
            Sheet(arrow, folder / SIGNALS, columns[0], log.header) as heads,
            Sheet(arrow, folder / SCALARS, columns[1], log.header) as steps,
        ):
            for row in log:
                heads.append(*by_head(row))
                steps.append(scalars(row), 1)
            # a column that came after a part was written: once more, now that all are known
            if all([heads.whole(), steps.whole()]):
                heads.move()
                steps.move()
                return Compacted(heads.path, steps.path, tuple(log.notes))
            columns = (list(heads.columns), list(steps.columns))


def by_head(row: Row) -> tuple[dict[str, Sequence[Any]], int]:
    """The columns of one step, a value per head, and how many heads there are.

    A layer that did not run has no row; a signal that it lacks is None.

    >>> by_head({"step": 3, "signals": {"entropy": [[0.5], [], [0.1, 0.2]], "a": [[1.0]]}})[0]["a"]
    [1.0, None, None]
    """
    signals = row.get("signals") or {}
    depth = max(map(len, signals.values()), default=0)
    sizes = [
        max(len(layers[n]) if n < len(layers) else 0 for layers in signals.values())
        for n in range(depth)
    ]
    count = sum(sizes)
    values: dict[str, Sequence[Any]] = {
        "step": [row["step"]] * count,
        "layer": [n for n, size in enumerate(sizes) for _ in range(size)],
        "head": [head for size in sizes for head in range(size)],
    }
    for name, layers in signals.items():
        flat: list[Any] = []
        for n, size in enumerate(sizes):
            heads = layers[n] if n < len(layers) else ()
            flat += heads
            flat += [None] * (size - len(heads))
        values[name] = flat
    return values, count


def scalars(row: Row) -> dict[str, Sequence[Any]]:
    """What is known of a step as a whole; a time says its unit in its name.

    >>> scalars({"step": 1, "loss": 2.5, "scalars": {}, "times_us": {"gradient": 40.0}})
    {'step': [1], 'loss': [2.5], 'gradient_us': [40.0]}
    """
    values = {"step": row["step"], "loss": row.get("loss"), **(row.get("scalars") or {})}
    times = {f"{name}_us": value for name, value in (row.get("times_us") or {}).items()}
    return {name: [value] for name, value in {**values, **times}.items()}


class Sheet:
    """One Parquet file in the making: rows gather, and leave as row groups."""

    def __init__(self, arrow: Any, path: Path, columns: Sequence[str], header: Row) -> None:
        self.path, self.columns = path, {name: list[Any]() for name in columns}
        self._arrow, self._header, self._count, self._late = arrow, header, 0, False
        self._temporary = path.with_name(path.name + ".tmp")
        self._writer: Any = None

    def __enter__(self) -> Sheet:
        with naming(self.path):
            self._file = self._temporary.open("wb")
        return self

    def __exit__(self, *error: object) -> None:
        """Leave nothing half made behind."""
        if self._writer is not None:
            self._writer.close()
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def append(self, values: Mapping[str, Sequence[Any]], count: int) -> None:
        """Add `count` rows; columns that are not named are null."""
        if not count:
            return
        for name in [name for name in values if name not in self.columns]:
            self._late |= self._writer is not None
            self.columns[name] = [None] * self._count
        for name, column in self.columns.items():
            column += values[name] if name in values else [None] * count
        self._count += count
        if self._count >= GROUP:
            self._flush()

    def whole(self) -> bool:
        """Write what is left to the disk; False where earlier row groups lack a column."""
        if self._count or self._writer is None:
            self._flush()
        with naming(self.path):
            self._writer.close()
            self._file.flush()
            os.fsync(self._file.fileno())
        return not self._late

    def move(self) -> None:
        """Put the file into its place."""
        with naming(self.path):
            self._temporary.replace(self.path)

    def _flush(self) -> None:
        """Write the rows that are held, and hold none."""
        if self._writer is None:
            schema = self._arrow.schema(
                [self._field(name) for name in self.columns],
                {"sixfold": json.dumps(self._header, sort_keys=True)},
            )
            self._writer = self._arrow.parquet.ParquetWriter(
                self._file, schema, compression="zstd", use_dictionary=list(KEYS)
            )
        if not self._late:
            with naming(self.path):
                self._writer.write_table(
                    self._arrow.table(self.columns, schema=self._writer.schema)
                )
        for column in self.columns.values():
            column.clear()
        self._count = 0

    def _field(self, name: str) -> Any:
        unit = unit_of(self._header, name)
        kind = self._arrow.type_for_alias(KEYS.get(name, "float64"))
        return self._arrow.field(name, kind, metadata={"unit": unit} if unit else None)


def unit_of(header: Row, name: str) -> str:
    """Unit of a column as the header of the log states it, empty where it does not.

    One unit may stand for a family.

    >>> header = {"units": {"sigma_max": "1", "times_us": "microseconds"}}
    >>> unit_of(header, "sigma_max_q"), unit_of(header, "mixing_us"), unit_of(header, "step")
    ('1', 'microseconds', '')
    """
    units = header.get("units") or {}
    family = "times_us" if name.endswith("_us") else name.rpartition("_")[0]
    return str(units.get(name, units.get(family, "")))


def _arrow() -> Any:
    try:
        arrow = importlib.import_module("pyarrow")
        importlib.import_module("pyarrow.parquet")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "telemetry as Parquet needs pyarrow: pip install 'sixfold[cli]'"
        ) from error
    return arrow
