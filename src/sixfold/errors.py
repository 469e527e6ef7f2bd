"""Errors whose message is meant for the user: what is wrong, and what to do."""

from __future__ import annotations

from pathlib import Path


class Explained(Exception):
    """An error that a command shows as one sentence, without a traceback."""


class ConfigError(Explained, ValueError):
    """A configuration that cannot be meant."""


class DataError(Explained, ValueError):
    """Data that cannot be trained on as given; the message says what to change."""


class DataMissing(Explained, FileNotFoundError):
    """Data that is not where it was looked for; the message says where to get it."""


class CheckpointError(Explained, RuntimeError):
    """A checkpoint that cannot be used: damaged, foreign or absent."""


class Diverged(Explained, RuntimeError):
    """The loss is not a number: going on would only hide a dead model."""

    def __init__(self, message: str, folder: Path) -> None:
        super().__init__(message)
        self.folder = folder


class Interrupted(Explained):
    """The user asked to stop; everything up to `step` is saved in `folder`."""

    def __init__(self, step: int, folder: Path) -> None:
        super().__init__(
            f"stopped after step {step}; saved. Go on with: sixfold train --resume {folder}"
        )
        self.step, self.folder = step, folder
