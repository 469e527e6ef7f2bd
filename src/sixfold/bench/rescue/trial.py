"""One run is one row, made once and kept under its name: work goes on where it was stopped."""

from __future__ import annotations

import hashlib
import json
import math
import signal
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sixfold import governor
from sixfold.bench.rescue.columns import COLUMNS, Said
from sixfold.bench.rescue.task import Arm, Run, held_out, resumed
from sixfold.errors import ConfigError
from sixfold.record import config_hash, write_json

Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A run to be made: an arm under a column, by one seed."""

    name: str
    column: str
    seed: int
    arm: Arm

    @property
    def file(self) -> str:
        """Where its row is kept."""
        return f"{self.name} {self.column} {self.seed}.json".replace(" ", "_")

    @property
    def config(self) -> str:
        """What the row depends on: the recipe, and for the governor its source."""
        source = governor_source() if self.column == "governor" else ""
        recipe = {"arm": asdict(self.arm), "seed": self.seed, "column": self.column}
        return config_hash({**recipe, "source": source})


@cache
def governor_source() -> str:
    """A digest of the governor's own files, so that its rows are not older than it is."""
    folder = Path(governor.__path__[0])
    parts = [path.read_bytes() for path in sorted(folder.rglob("*.py"))]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of every parameter and buffer, to the bit."""
    found = hashlib.sha256()
    for name, value in model.state_dict().items():
        found.update(name.encode() + value.detach().contiguous().numpy().tobytes())
    return found.hexdigest()


def finite(value: float) -> float | None:
    """A number for JSON; what is not finite becomes None."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def conduct(case: Case) -> Row:
    """Train a case on one thread, and say what came of it."""
    # more threads add in another order, and a governed run could not be compared to the bit
    torch.set_num_threads(1)
    began = time.process_time()
    run = resumed(case.arm, case.seed)
    initial = held_out(run)
    with warnings.catch_warnings():
        # a governor that let go would look like one that kept still
        warnings.filterwarnings("error", "the governor failed")
        warnings.filterwarnings("ignore", ".*only loss and gradients are watched")
        step = COLUMNS[case.column].begin(run)
        losses, alarms, actions, stop = train(run, step)
    return {
        "case": case.name, "column": case.column, "seed": case.seed, "config": case.config,
        "initial": initial, "final": finite(held_out(run)), "losses": losses, "alarms": alarms,
        "actions": actions, "stop": stop, "parameters": fingerprint(run.model),
        "seconds": time.process_time() - began,
    }  # fmt: skip


def train(run: Run, step: Callable[[torch.Tensor], Said]) -> tuple[list, list, list, str | None]:
    """The loop: the losses, what was said and done at which iteration, and why it was stopped."""
    losses: list[float | None] = []
    alarms: list[list] = []
    actions: list[list] = []
    for batch in run.batches:
        loss = run.loss(batch)
        losses.append(finite(loss.item()))
        said = step(loss)
        alarms += [[len(losses), *alarm] for alarm in said.alarms]
        actions += [[len(losses), name] for name in said.actions]
        if said.stop is not None:
            return losses, alarms, actions, said.stop
    return losses, alarms, actions, None


def remembered(folder: Path, case: Case) -> Row | None:
    """The row of a case, if it was made by the same recipe."""
    path = folder / case.file
    if not path.exists():
        return None
    row = json.loads(path.read_text())
    return row if row["config"] == case.config else None


def keep(folder: Path, case: Case) -> Row:
    """Conduct a case and write its row."""
    row = conduct(case)
    write_json(folder / case.file, row)
    return row


def deaf() -> None:
    """An interrupt is the parent's business: here a row is finished or not begun."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def conduct_all(
    folder: Path, cases: Sequence[Case], jobs: int, tell: Callable[[str], None]
) -> list[Row]:
    """The rows of all cases; those that are kept are not made again, and an interrupt loses none.

    Args:
        folder: where rows are kept.
        cases: what to run.
        jobs: processes, each on one thread.
        tell: called with a case's name whenever there is one row more.

    Raises ConfigError for less than one job.
    """
    if jobs < 1:
        raise ConfigError(f"jobs must be 1 or more, got {jobs}")
    folder.mkdir(parents=True, exist_ok=True)
    rows, left = [], []
    for case in cases:
        row = remembered(folder, case)
        if row is None:
            left.append(case)
        else:
            rows.append(row)
            tell(case.name)
    return rows + list(conducted(folder, left, jobs, tell))


def conducted(
    folder: Path, cases: Sequence[Case], jobs: int, tell: Callable[[str], None]
) -> Iterable[Row]:
    """Rows as they come in; one job needs no other process."""
    if jobs == 1:
        for case in cases:
            yield keep(folder, case)
            tell(case.name)
        return
    with ProcessPoolExecutor(jobs, get_context("spawn"), deaf) as pool:
        futures = {pool.submit(keep, folder, case): case for case in cases}
        try:
            for future in as_completed(futures):
                yield future.result()
                tell(futures[future].name)
        finally:
            pool.shutdown(cancel_futures=True)
