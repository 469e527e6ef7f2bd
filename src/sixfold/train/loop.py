"""The training loop: one step after another, watched, saved, and resumed to the bit."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import nn

from sixfold.contracts import Dataset, Observer, Seen
from sixfold.discover import unknown
from sixfold.errors import ConfigError, Diverged, Interrupted
from sixfold.record import Log
from sixfold.train import checkpoint
from sixfold.train.distributed import ALONE, World
from sixfold.train.objective import Validation, compare
from sixfold.train.optimizer import OptimizerSettings, set_rate
from sixfold.train.step import PRECISIONS, StepSettings, autocast, train_step

DEVICES = ("auto", "cpu", "cuda", "mps")


@dataclass(frozen=True)
class TrainSettings:
    """How long and how a model is trained; batches and steps are those of the optimizer."""

    steps: int = 2000
    batch_size: int = 12
    accumulation: int = 1
    precision: str = "fp32"
    clip_norm: float | None = 1.0
    validate_every: int = 250
    checkpoint_every: int = 250
    patience: int | None = None
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(unknown("train.precision", self.precision, PRECISIONS))
        for name in ("steps", "batch_size", "accumulation", "validate_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} must be 1 or more, got {getattr(self, name)}")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"train.patience must be 1 or more, or none; got {self.patience}")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"train.clip_norm must be positive, or none; got {self.clip_norm}")
        if self.seed < 0:
            raise ValueError(f"train.seed must be 0 or more, got {self.seed}")
        if self.device not in DEVICES:
            raise ValueError(unknown("train.device", self.device, DEVICES))
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"train.batch_size {self.batch_size} is not a multiple of "
                f"train.accumulation {self.accumulation}"
            )


class Progress(NamedTuple):
    """What a display or a tracker can show after a step; `validation` only where one was made.

    steps: how many there will be; a run that goes back makes more than it was given.
    """

    step: int
    steps: int
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens_per_s: float
    validation: float | None

    def metrics(self) -> dict[str, float]:
        """Figures by name."""
        found = {
            "train/loss": self.loss,
            "train/learning_rate": self.learning_rate,
            "train/gradient_norm": self.gradient_norm,
            "train/tokens_per_s": self.tokens_per_s,
        }
        return found if self.validation is None else {**found, "validation/loss": self.validation}


class View(NamedTuple):
    """Who watches a run: called after each step, and with every sentence of an observer."""

    step: Callable[[Progress], None] = lambda progress: None  # noqa: ARG005
    say: Callable[[str], None] = lambda text: None  # noqa: ARG005


class Outcome(NamedTuple):
    """How a run ended."""

    step: int
    validation: Validation | None
    best: tuple[float, int]
    stopped_early: bool


@dataclass
class Training:
    """A run: what is trained, on what, how, and who watches.

    Attributes:
        step: steps made so far.
        fresh: position of the first batch that was not trained on yet. Batches and learning rates
            go by position; it falls behind `step` where the observer makes batches come again.
        best: smallest validation loss, and its step.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    dataset: Dataset
    settings: TrainSettings
    rates: OptimizerSettings
    folder: Path
    header: dict[str, Any]
    observer: Observer | None = None
    logs: Sequence[Any] = ()
    world: World = ALONE
    view: View = View()  # noqa: RUF009 - two pure functions
    step: int = field(default=0, init=False)
    fresh: int = field(default=0, init=False)
    best: tuple[float, int] = field(default=(math.inf, 0), init=False)

    @property
    def left(self) -> int:
        """Steps still to be made."""
        again = 0 if self.observer is None else len(self.observer.again)
        return again + self.settings.steps - self.fresh

    def positions(self) -> Iterable[int]:
        """Positions of the batches still to come; the observer may send some of them again."""
        fresh = range(self.fresh, self.settings.steps)
        return fresh if self.observer is None else self.observer.data(fresh)


def step_settings(run: Training) -> StepSettings:
    """The part of the settings that one step needs."""
    settings = run.settings
    return StepSettings(
        run.dataset.objective, settings.accumulation, settings.precision, settings.clip_norm
    )


@torch.no_grad()
def validate(run: Training) -> Validation:
    """Mean loss (and accuracy, where there are labels) over the whole validation set."""
    run.model.eval()
    total = right = count = 0.0
    size = 8 * run.settings.batch_size
    for batch in run.dataset.validation_batches(size):
        batch = type(batch)(*(tensor.to(run.world.device) for tensor in batch))
        with autocast(run.settings.precision, run.world.device):
            predicted = run.model(batch.inputs)
            value = compare(run.dataset.objective, predicted, batch)
        if run.dataset.objective == "labels":
            right += (predicted.argmax(-1) == batch.targets).sum().item()
        total += value.item() * batch.targets.numel()
        count += batch.targets.numel()
    run.model.train()
    return Validation(total / count, right / count if run.dataset.objective == "labels" else None)


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C or SIGTERM into a question the loop asks between steps."""
    asked: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    # only the main thread may set handlers; training elsewhere is stopped by whoever started it
    main = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM) if main else ()
    previous = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def save(run: Training, metrics: Log | None, *, stopped_early: bool) -> None:
    """Write a checkpoint; logs are made durable first."""
    if run.world.leads and metrics is not None:
        logs = {log.path.name: log.position() for log in (metrics, *run.logs)}
        state = {
            "logs": logs,
            "best": run.best,
            "fresh": run.fresh,
            "stopped_early": stopped_early,
            "observer": None if run.observer is None else run.observer.state_dict(),
        }
        checkpoint.save(
            run.folder / "checkpoints",
            run.step,
            run.model,
            run.optimizer,
            state,
            frozenset({run.best[1]}),
        )
    run.world.wait()


def restore(run: Training, saved: checkpoint.Saved) -> None:
    """Put a checkpoint's state into the run."""
    checkpoint.load_training(saved, run.model, run.optimizer)
    run.best = (saved.state["best"][0], saved.state["best"][1])
    run.step, run.fresh = saved.step, saved.state["fresh"]
    if run.observer is not None:
        run.observer.load_state_dict(saved.state["observer"])


def fit(run: Training, saved: checkpoint.Saved | None = None) -> Outcome:
    """Train from the start, or from `saved`, to the end.

    Raises:
        Interrupted: the user asked to stop; the run is saved and can be resumed.
        Diverged: the loss became NaN or infinite.
        OSError: a file could not be written; earlier checkpoints are intact.
    """
    if run.settings.batch_size % (run.settings.accumulation * run.world.size):
        raise ConfigError(
            f"train.batch_size {run.settings.batch_size} cannot be shared by {run.world.size} "
            f"processes with train.accumulation {run.settings.accumulation}"
        )
    offset = 0
    if saved is not None:
        restore(run, saved)
        if saved.state["stopped_early"]:
            return Outcome(saved.step, validate(run), run.best, stopped_early=True)
        offset = saved.state["logs"]["metrics.jsonl"]
    metrics = Log(run.folder / "metrics.jsonl", run.header, offset) if run.world.leads else None
    run.model.train()
    try:
        with stop_requests() as asked:
            return _fit(run, metrics, asked)
    finally:
        if metrics is not None:
            metrics.close()


def _fit(run: Training, metrics: Log | None, asked: Callable[[], bool]) -> Outcome:
    settings = run.settings
    model = run.world.wrap(run.model)
    validation = None
    for position in run.positions():
        now = advance(run, model, position, metrics)
        last, patient = not run.left, True
        if last or now.step % settings.validate_every == 0:
            validation = validate(run)
            patient = judge(run, validation, metrics)
            now = now._replace(validation=validation.loss)
        run.view.step(now)
        stop = run.world.any(asked())
        if last or stop or not patient or now.step % settings.checkpoint_every == 0:
            save(run, metrics, stopped_early=not patient)
        if not patient:
            return Outcome(now.step, validation, run.best, stopped_early=True)
        if stop and not last:
            raise Interrupted(now.step, run.folder)
    return Outcome(run.step, validation or validate(run), run.best, stopped_early=False)


def advance(run: Training, model: nn.Module, position: int, metrics: Log | None) -> Progress:
    """Make one step on the batch at `position`, let the observer see it, and log it.

    Raises Diverged when the loss is not finite and nothing is done about it, or when the observer
    gives the run up.
    """
    settings, began = run.settings, time.perf_counter()
    batch = run.dataset.train_batch(settings.seed, position, settings.batch_size)
    rate = run.rates.rate(position, settings.steps)
    set_rate(run.optimizer, rate)
    penalty = (lambda: None) if run.observer is None else run.observer.penalty
    measured = train_step(model, run.optimizer, batch, step_settings(run), penalty, run.world)
    run.step, run.fresh = run.step + 1, max(run.fresh, position + 1)
    seen = None if run.observer is None else run.observer.process_step(measured.loss)
    for text in () if seen is None else seen.text:
        run.view.say(f"step {run.step}: {text}")
    speed = batch.targets.numel() / (time.perf_counter() - began)
    total = run.step + run.left
    now = Progress(run.step, total, measured.loss, rate, measured.gradient_norm, speed, None)
    if metrics is not None:
        metrics.append({
            "step": now.step, "split": "train", "loss": now.loss, "learning_rate": rate,
            "gradient_norm": now.gradient_norm, "tokens_per_s": speed,
        })  # fmt: skip
    diverged(run, now, seen)
    return now


def diverged(run: Training, now: Progress, seen: Seen | None) -> None:
    """Raise Diverged where going on is no use: the message says why and what to do."""
    if seen is not None and seen.stop is not None:
        raise Diverged(
            f"stopped at step {now.step}: {seen.stop}; earlier checkpoints are intact", run.folder
        )
    if math.isfinite(now.loss) or (seen is not None and seen.acted):
        return
    raise Diverged(
        f"the loss is {now.loss} at step {now.step}; lower optimizer.learning_rate, turn the "
        "governor on, or look for bad data; earlier checkpoints are intact",
        run.folder,
    )


def judge(run: Training, validation: Validation, metrics: Log | None) -> bool:
    """Log a validation; False when it has not improved for `patience` validations."""
    if metrics is not None:
        row = {"step": run.step, "split": "validation", "loss": validation.loss}
        if validation.accuracy is not None:
            row["accuracy"] = validation.accuracy
        metrics.append(row)
    if validation.loss < run.best[0]:
        run.best = (validation.loss, run.step)
    patience = run.settings.patience
    return patience is None or run.step - run.best[1] < patience * run.settings.validate_every
