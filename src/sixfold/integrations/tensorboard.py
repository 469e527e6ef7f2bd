"""Metrics as TensorBoard events, in the run's folder ``tensorboard``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sixfold.train.loop import Progress


@contextmanager
def tracking(
    folder: Path,
    settings: Mapping[str, Any],  # noqa: ARG001 - the signature all trackers share
    start: int,
) -> Iterator[Callable[[Progress], None]]:
    """Write every step; what an earlier attempt wrote after step `start` is hidden.

    Events are written out every few seconds: a killed process loses the points of those.

    Raises ModuleNotFoundError naming the extra.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "track.tensorboard needs tensorboard: pip install 'sixfold[tensorboard]'"
        ) from error
    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1, flush_secs=5)

    def write(now: Progress) -> None:
        for name, value in now.metrics().items():
            writer.add_scalar(name, value, now.step)

    try:
        yield write
    finally:
        writer.close()
