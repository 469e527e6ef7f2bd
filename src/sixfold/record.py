"""The only writer of numbers: each leaves with its unit, seed, device, commit and config."""

from __future__ import annotations

import csv
import errno
import hashlib
import json
import os
import platform
import subprocess
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

COLUMNS = (
    "experiment",
    "case",
    "metric",
    "value",
    "unit",
    "spread",
    "seeds",
    "device",
    "commit",
    "config",
)


@dataclass(frozen=True)
class Provenance:
    """Where numbers come from."""

    device: str
    commit: str
    config_hash: str


def config_hash(config: Mapping[str, Any]) -> str:
    """First 12 hex digits of the SHA-256 of the configuration as canonical JSON.

    >>> config_hash({"b": 1, "a": 2}) == config_hash({"a": 2, "b": 1})
    True
    """
    text = json.dumps(config, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@cache
def commit() -> str:
    """Commit of the source tree this package runs from, with ``+`` if it was changed since.

    ``unversioned`` where the package does not run from a git checkout.
    """
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return "unversioned"
    git = ["git", "-C", str(root)]
    try:
        found = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
        )
        changed = subprocess.run(
            [*git, "status", "--porcelain", "src"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        # no git on this machine, or a repository it does not trust
        return "unversioned"
    return found.stdout.strip() + ("+" if changed.stdout.strip() else "")


@cache
def device_name() -> str:
    """The processor's model name and the cores this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    name = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        lines = information.read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        name = names[0] if names else name
    return f"cpu: {name}, {cores} cores"


class Log:
    """An append-only JSON-lines file that survives a kill and resumes without gap or duplicate.

    The first line is a header. `position` is durable once it returns: a checkpoint stores it, and a
    resumed run is opened with it, which forgets what was written after the checkpoint.

    Raises OSError naming the file when it cannot be written (folder, permission, full disk).
    """

    def __init__(self, path: Path, header: Mapping[str, Any], position: int = 0) -> None:
        self.path = path
        with naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            # unbuffered: a row is with the operating system once `append` returns
            self._file = path.open("r+b" if path.exists() else "w+b", buffering=0)
            # whoever lets go of a log without closing it has still closed it
            self.close = weakref.finalize(self, self._file.close)
            if path.is_file():
                size = path.stat().st_size
                if size < position:
                    raise OSError(errno.EIO, f"{size} bytes, the checkpoint counts {position}")
                self._file.truncate(position)
            self._file.seek(0, os.SEEK_END)
        if position == 0:
            self.append({"header": dict(header)})

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row."""
        line = json.dumps(row, separators=(",", ":")).encode() + b"\n"
        with naming(self.path):
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def position(self) -> int:
        """Bytes written so far, now on disk."""
        with naming(self.path):
            if self.path.is_file():
                os.fsync(self._file.fileno())
            return self._file.tell()


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors inside say which file could not be written."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path}: {error.strerror}") from error


@dataclass(frozen=True)
class Result:
    """One published figure; `spread` is the half width or deviation named by the metric."""

    experiment: str
    case: str
    metric: str
    value: float
    unit: str
    spread: float
    seeds: int


def publish(path: Path, results: list[Result], provenance: Provenance) -> None:
    """Write the rows of one experiment to a CSV file, replacing earlier rows of the same cases."""
    kept: list[dict[str, str]] = []
    if path.exists():
        with path.open(newline="") as file:
            kept = list(csv.DictReader(file))
    new = {(result.experiment, result.case, result.metric) for result in results}
    kept = [row for row in kept if (row["experiment"], row["case"], row["metric"]) not in new]
    stamp = {
        "device": provenance.device,
        "commit": provenance.commit,
        "config": provenance.config_hash,
    }
    rows = [
        {key: f"{v:.6g}" if isinstance(v, float) else v for key, v in asdict(r).items()}
        for r in results
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows([*kept, *({**row, **stamp} for row in rows)])


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file so that a reader sees the old one or the new one, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    with naming(path):
        with temporary.open("w") as file:
            json.dump(value, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
