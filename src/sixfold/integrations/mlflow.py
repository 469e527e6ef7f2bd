"""A run's settings, metrics and files in MLflow: a copy that catches up with ``metrics.jsonl``."""

from __future__ import annotations

import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sixfold.errors import Interrupted
from sixfold.train.loop import Progress

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

EVERY = 10
"""MLflow takes milliseconds a call: one call every ten steps, with all ten in it."""

PAUSE = 60.0
"""Seconds until a server that did not answer is asked again."""

ROWS = 150
"""Rows a call: MLflow takes 1000 metrics at once, and no row holds more than six."""

PARAMS = 100
"""Parameters MLflow takes at once."""

FILES = ("config.json", "environment.json", "metrics.jsonl", "journal.jsonl")

QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # MLflow's own seven retries hold a training step for four minutes
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}
"""What MLflow's environment is set to where the user has not set it."""


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted names.

    >>> flat({"train": {"steps": 3}})
    {'train.steps': 3}
    """
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def rows_after(path: Path, offset: int, last: float) -> tuple[list[dict[str, Any]], int]:
    """Some whole rows of a log after `offset`, none of a step after `last`; and where they end."""
    found = []
    with path.open("rb") as file:
        file.seek(offset)
        for line in islice(file, ROWS):
            if not line.endswith(b"\n"):
                break
            row = json.loads(line)
            if row.get("step", 0) > last:
                break
            found.append(row)
            offset += len(line)
    return found, offset


@contextmanager
def answering(uri: str, folder: Path) -> Iterator[None]:
    """Errors of MLflow inside say which store it was, and that nothing is lost."""
    try:
        yield
    # MLflow lets through the errors of its stores too: SQLAlchemy's, requests', those of files
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        raise ConnectionError(
            f"track.mlflow={uri} did not take the run: {reason}. All of it is in {folder}; "
            f"sixfold train --resume {folder} goes on and sends what MLflow lacks"
        ) from error


@dataclass
class Copy:
    """One MLflow run and how much of a run's folder it has."""

    client: MlflowClient
    uri: str
    folder: Path
    name: str
    offset: int = 0
    reached: dict[str, int] | None = None
    asleep: float = field(default=-math.inf)

    def history(self, split: str) -> int:
        """The last step whose loss MLflow has, 0 before the first."""
        return max(
            (each.step for each in self.client.get_metric_history(self.name, f"{split}/loss")),
            default=0,
        )

    def send(self, last: float) -> None:
        """Send the rows up to step `last` that MLflow lacks.

        Raises ConnectionError where MLflow does not take them; what it took is asked for anew then,
        since a call may arrive although its answer does not.
        """
        from mlflow.entities import Metric

        path = self.folder / "metrics.jsonl"
        with answering(self.uri, self.folder):
            reached, self.reached = self.reached, None
            if reached is None:
                reached = {split: self.history(split) for split in ("train", "validation")}
            while path.exists():
                rows, end = rows_after(path, self.offset, last)
                if not rows:
                    break
                now = int(1000 * time.time())
                metrics = [
                    Metric(f"{row['split']}/{name}", value, now, row["step"])
                    for row in rows
                    if "split" in row and row["step"] > reached[row["split"]]
                    for name, value in row.items()
                    if name not in ("step", "split")
                ]
                if metrics:
                    self.client.log_batch(self.name, metrics=metrics)
                self.offset = end
            self.reached = reached

    def step(self, now: Progress) -> None:
        """Send every ten steps and with each validation; an absent server delays only the copy."""
        if (now.step % EVERY and now.validation is None) or time.monotonic() < self.asleep + PAUSE:
            return
        try:
            self.send(now.step)
        except ConnectionError as error:
            self.asleep = time.monotonic()
            warnings.warn(f"{error}; training goes on", RuntimeWarning, stacklevel=2)

    def close(self, status: str) -> None:
        """Send the rest and the files, and say how the run ended."""
        self.send(math.inf)
        with answering(self.uri, self.folder):
            for name in FILES:
                if (self.folder / name).exists():
                    self.client.log_artifact(self.name, str(self.folder / name))
            self.client.set_terminated(self.name, status)


def facts(folder: Path) -> dict[str, str]:
    """What the run stands on (commit, device, versions) as tags."""
    found = flat(json.loads((folder / "environment.json").read_text()))
    return {name: str(value) for name, value in found.items()}


def open_run(folder: Path, settings: Mapping[str, Any]) -> Copy:
    """The MLflow run of a folder: the one it had before, else a new one with the settings."""
    from mlflow import MlflowClient
    from mlflow.entities import Param

    uri = settings["track"]["mlflow"]
    marker = folder / "mlflow-run-id.txt"
    with answering(uri, folder):
        client = MlflowClient(tracking_uri=uri)
        if marker.exists():
            name = marker.read_text()
            client.update_run(name, status="RUNNING")
        else:
            known = client.get_experiment_by_name("sixfold")
            home = client.create_experiment("sixfold") if known is None else known.experiment_id
            name = client.create_run(home, run_name=folder.name, tags=facts(folder)).info.run_id
            marker.write_text(name)
        # where the metrics go is no property of the run, and an address may hold a password
        told = {section: value for section, value in settings.items() if section != "track"}
        params = [Param(name, str(value)) for name, value in flat(told).items()]
        for first in range(0, len(params), PARAMS):
            client.log_batch(name, params=params[first : first + PARAMS])
    return Copy(client, uri, folder, name)


@contextmanager
def tracking(
    folder: Path, settings: Mapping[str, Any], start: int
) -> Iterator[Callable[[Progress], None]]:
    """Copy the run to the tracking URI ``track.mlflow``; a resumed run goes on in its MLflow run.

    A step is sent once: one repeated after a kill keeps what the first attempt sent. The MLflow run
    ends as FINISHED, KILLED (stopped by the user) or FAILED.

    Raises:
        ModuleNotFoundError: MLflow is not installed; names the extra.
        ConnectionError: MLflow does not answer, or refuses, at the start or at the end; between
            them it is a warning, and the copy catches up.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        import mlflow  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "track.mlflow needs mlflow: pip install 'sixfold[mlflow]'"
        ) from error
    copy = open_run(folder, settings)
    # what lies beyond the checkpoint is about to be forgotten; a run from the start forgets all
    if start > 0:
        copy.send(start)
    try:
        yield copy.step
    except BaseException as error:
        stopped = isinstance(error, (Interrupted, KeyboardInterrupt))
        try:
            copy.close("KILLED" if stopped else "FAILED")
        except ConnectionError as gone:
            # why the run ended matters more than that MLflow was not told
            warnings.warn(str(gone), RuntimeWarning, stacklevel=2)
        raise
    copy.close("FINISHED")
