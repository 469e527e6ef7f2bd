"""Metrics, hyperparameters and the run's files in MLflow."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sixfold.train.loop import Progress

EVERY = 10
"""MLflow takes milliseconds a call: one call every ten steps."""


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


@contextmanager
def tracking(
    folder: Path, settings: Mapping[str, Any], start: int
) -> Iterator[Callable[[Progress], None]]:
    """Log to the tracking URI ``track.mlflow``; a resumed run goes on in its own MLflow run.

    Raises ModuleNotFoundError naming the extra.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    try:
        import mlflow
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "track.mlflow needs mlflow: pip install 'sixfold[mlflow]'"
        ) from error
    mlflow.set_tracking_uri(settings["track"]["mlflow"])
    mlflow.set_experiment("sixfold")
    marker = folder / "mlflow-run-id.txt"
    known = marker.read_text() if marker.exists() else None
    with mlflow.start_run(run_id=known, run_name=folder.name) as started:
        marker.write_text(started.info.run_id)
        if start == 0:
            mlflow.log_params(flat(settings))

        def write(now: Progress) -> None:
            if now.step % EVERY == 0 or now.validation is not None:
                mlflow.log_metrics(now.metrics(), step=now.step)

        yield write
        for name in ("config.json", "environment.json", "metrics.jsonl", "journal.jsonl"):
            if (folder / name).exists():
                mlflow.log_artifact(str(folder / name))
