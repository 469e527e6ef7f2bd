"""Where the rows of a governed run go: into memory, and line by line onto a disk."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sixfold.contracts import Snapshot
from sixfold.governor import journal
from sixfold.governor.limits import Limits
from sixfold.governor.state import State
from sixfold.governor.watch.layer import Layer
from sixfold.record import Log

REMEMBERED = 4096
"""Samples, and rows of the journal, held in memory; the log on disk holds all."""
Header = Callable[[], Mapping[str, Any]]
Row = dict[str, Any]


class File:
    """A log that is begun when the first row is there to write, for only then its header is known.

    Args:
        path: where; a folder that is missing is made.
        position: bytes that count when a run is resumed; what was written after them is forgotten.
    """

    def __init__(self, path: Path, position: int) -> None:
        self.path, self._log, self._end = path, None, 0
        self.go_on(position)

    def append(self, rows: Sequence[Mapping[str, Any]], header: Header) -> None:
        """Write some rows, or only the header."""
        self.go_on(self._end)
        if self._log is None:
            if self.path.exists() and self.path.stat().st_size:
                warnings.warn(f"{self.path} of an earlier run is written anew", stacklevel=2)
            self._log = Log(self.path, header())
        for row in rows:
            self._log.append(row)

    def go_on(self, position: int) -> None:
        """Go on behind so many bytes, unless it is being written already."""
        if self._log is None and position:
            self._log = Log(self.path, {}, position)

    def position(self) -> int:
        """Bytes written so far, now on disk."""
        return self._end if self._log is None else self._log.position()

    def close(self) -> None:
        """Nothing more will be written; what was is still counted."""
        if self._log is not None:
            self._end = self._log.position()
            self._log.close()
            self._log = None


class Logs:
    """The telemetry and the journal of a run in `folder`, or nowhere.

    A disk that cannot be written to is warned about once, then left alone: training goes on.
    """

    def __init__(self, folder: Path | str | None, positions: Mapping[str, int]) -> None:
        names = (journal.TELEMETRY, journal.JOURNAL) if folder is not None else ()
        self.files = tuple(File(Path(folder or "") / n, positions.get(n, 0)) for n in names)
        self._lost = False

    def write(self, snapshot: Snapshot | None, rows: Sequence[Row], header: Header) -> None:
        """Append a snapshot where there is one, and what came of it."""
        if snapshot is not None:
            self._append(0, [snapshot._asdict()], header)
        self._append(1, rows, header)

    def _append(self, which: int, rows: Sequence[Mapping[str, Any]], header: Header) -> None:
        if not self.files or self._lost:
            return
        try:
            self.files[which].append(rows, header)
        except OSError as error:
            self._lost = True
            warnings.warn(f"{error}; the governor goes on without its logs", stacklevel=2)

    def go_on(self, positions: Mapping[str, int]) -> None:
        """Go on behind so many bytes of each log, where they are not open yet."""
        for file in self.files:
            file.go_on(positions.get(file.path.name, 0))

    def journal(self) -> list[Row]:
        """The rows written so far."""
        if not self.files or not self.files[1].position():
            return []
        return journal.read(self.files[1].path)

    def fresh(self) -> bool:
        """Whether there are logs that nothing was written to so far."""
        return bool(self.files) and not any(file.position() for file in self.files)

    def close(self) -> None:
        """Nothing more will be written."""
        for file in self.files:
            file.close()


class Telemetry:
    """The recorded samples; the last `REMEMBERED` of them in `history`."""

    def __init__(self) -> None:
        self.history: deque[Snapshot] = deque(maxlen=REMEMBERED)


class Records:
    """What is told of a run: samples, decisions, and whatever else the decisions depended on.

    Limits that change between two steps, and a run that goes on in another process, become rows of
    the journal with the next step: with them a replay decides as the run did.

    Args:
        folder: of the logs; nowhere if None.
        positions: bytes of each log that count when a run is resumed.

    Attributes:
        told: the limits that the last step was decided by; None before the first.
    """

    def __init__(self, folder: Path | str | None, positions: Mapping[str, int]) -> None:
        self.telemetry, self.journal = Telemetry(), deque[Row](maxlen=REMEMBERED)
        self.logs = Logs(folder, positions)
        self.told: Limits | None = None
        self._waiting: list[Row] = []

    def note(self, now: int, limits: Limits) -> None:
        """The limits that this step is decided by; the first ones are told by the header."""
        if self.told is not None and self.told != limits:
            self._waiting.append(journal.limits_row(now, limits, self.told))
        self.told = limits

    def tell(
        self,
        rows: Sequence[Row],
        layers: Sequence[Layer],
        limits: Limits,
        snapshot: Snapshot | None = None,
    ) -> None:
        """Write down what happened, after what has waited to be told."""
        rows, self._waiting = [*self._waiting, *rows], []
        self.journal += rows
        self.logs.write(snapshot, rows, lambda: journal.header(layers, limits))
        if snapshot is not None and snapshot.signals:
            self.telemetry.history.append(snapshot)

    def go_on(self, positions: Mapping[str, int], now: int, state: State, *, whole: bool) -> None:
        """Go on behind so many bytes of each log, as another process left them.

        Args:
            positions: bytes by name.
            now: the step after which the run goes on.
            state: what is known of it.
            whole: whether that is all that was known; if it is, nothing has to be told.
        """
        self.logs.go_on(positions)
        self.journal.extend(self.logs.journal())
        if self.logs.fresh():
            self._waiting, self.told = [journal.resumed_row(now, state)], None
        elif not whole:
            self._waiting = [journal.resumed_row(now, None)]
