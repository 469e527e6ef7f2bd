"""What families of attention share: the log of a layer, and hooks that are taken off again."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import nn

from sixfold.analysis.measure import Sight, Tally, measure

STAGES = ("projection", "attention", "mixing", "output", "whole")
"""What is timed where a family can tell it apart; ``whole`` is one pass through the layer."""


class Log:
    """What one layer did in the batch that is running: a tally, and the time of each stage."""

    def __init__(self, name: str, family: str, device: torch.device, queries: int | None) -> None:
        self.name, self.family, self.device, self.queries = name, family, device, queries
        self.tally: Tally | None = None
        self.times_us: dict[str, float] = {}
        self._start = self._last = 0.0

    def start(self) -> None:
        """The layer is about to begin."""
        self._start = self._last = self._now()

    def mark(self, stage: str) -> None:
        """A stage has just ended."""
        now = self._now()
        self._spend(stage, now - self._last)
        self._last = now

    def end(self, last: str | None = None) -> None:
        """The layer has ended, and with it a stage."""
        if last is not None:
            self.mark(last)
        self._spend("whole", self._now() - self._start)

    def show(self, seen: Sight) -> None:
        """Measure what the layer did, with its clock stopped."""
        before = self._now()
        found = measure(seen, self.queries, self.device)
        self.tally = found if self.tally is None else self.tally + found
        lost = self._now() - before
        self._start += lost
        self._last += lost

    def collect(self) -> tuple[Tally | None, dict[str, float]]:
        """What the batch that has just ended amounts to; the next one starts anew."""
        found = self.tally, self.times_us
        self.tally, self.times_us = None, {}
        return found

    def _spend(self, stage: str, took: float) -> None:
        self.times_us[stage] = self.times_us.get(stage, 0.0) + took

    def _now(self) -> float:
        """Microseconds now, after the work queued on an accelerator."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return 1e6 * time.perf_counter()


LogOf = Callable[[nn.Module, str], "Log | None"]
"""The log of a module of the watched model for a family; None for any other module."""


class Family(NamedTuple):
    """How attention of one kind is watched.

    what: the modules it knows, in words. watch: given a model, a stack that takes back on exit what
    was put on, and the logs. Raises ValueError for attention that it knows and cannot follow.
    """

    what: str
    watch: Callable[[nn.Module, ExitStack, LogOf], None]


def before(module: nn.Module, call: Callable[..., None], stack: ExitStack) -> None:
    """Call ``call(module, args, kwargs)`` before each pass."""
    stack.callback(module.register_forward_pre_hook(call, with_kwargs=True).remove)


def after(module: nn.Module, call: Callable[..., None], stack: ExitStack) -> None:
    """Call ``call(module, args, kwargs, out)`` after each pass."""
    stack.callback(module.register_forward_hook(call, with_kwargs=True).remove)


def put(owner: Any, name: str, value: Any, stack: ExitStack) -> None:
    """Set an attribute until the stack is left."""
    stack.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)
