"""Ways to keep a run from failing: nothing, the published rivals, and the governor.

A column may change the recipe before the run begins, and wraps the step of its loop. The rivals are
written from their papers' descriptions, with the defaults given there; ARC is a package of others,
used where it is installed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sixfold.bench.rescue.task import AFTER_BACKWARD, Arm, Run
from sixfold.governor.architect import LeadMetaArchitect, Seen

WHOLE = (-1, -1)
"""Layer and head of what is said about the whole model."""


class Alarm(NamedTuple):
    """Something a column raised: its level, its signal, and where."""

    level: str
    signal: str
    layer: int
    head: int


class Said(NamedTuple):
    """What a column said and did at a step; `stop` is a sentence where it gave the run up."""

    alarms: tuple[Alarm, ...] = ()
    actions: tuple[str, ...] = ()
    stop: str | None = None


Step = Callable[[Tensor], Said]
QUIET = Said()


class Column(NamedTuple):
    """`recipe` is what the column makes of an arm, None where it has nothing to change there.

    `speaks` where it raises alarms at all. `needs` is the package it is, with its version; None
    where it is our own.
    """

    recipe: Callable[[Arm], Arm | None]
    begin: Callable[[Run], Step]
    speaks: bool = False
    needs: str | None = None


# ---------------------------------------------------------------- recipes


def as_is(arm: Arm) -> Arm:
    """The recipe unchanged."""
    return arm


def clipped(arm: Arm) -> Arm:
    """The gradient's norm is at most 1."""
    return replace(arm, clip=1.0)


def unclipped(arm: Arm) -> Arm:
    """Clipping is left to the column."""
    return replace(arm, clip=None)


def with_attention(kind: str) -> Callable[[Arm], Arm | None]:
    """Another attention, where there is one."""

    def recipe(arm: Arm) -> Arm | None:
        return replace(arm, shape=replace(arm.shape, attention=kind)) if arm.shape.heads else None

    return recipe


# ---------------------------------------------------------------- steps


def plain(run: Run) -> Step:
    """The loop as its owner wrote it."""

    def step(loss: Tensor) -> Said:
        run.move(loss)
        return QUIET

    return step


def total_norm(parameters: list[nn.Parameter]) -> float:
    """Norm of all gradients together."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters]).item()


class ZClip:
    """Gradients whose norm is an outlier are scaled down to mu + (2.5^2 / z) sigma.

    mu and sigma^2 are moving averages (0.97) of the norm after clipping, begun with 25 norms.

    Kumar et al. 2025, ZClip: Adaptive Spike Mitigation for LLM Pre-Training, section 3.
    """

    THRESHOLD, AVERAGE, WARMUP = 2.5, 0.97, 25

    def __init__(self) -> None:
        self.first: list[float] = []
        self.mean = self.variance = 0.0
        self.fired = False

    def __call__(self, parameters: list[nn.Parameter]) -> None:
        """Scale the gradients in place."""
        norm, self.fired = total_norm(parameters), False
        if len(self.first) < self.WARMUP:
            self.first.append(norm)
            self.mean = sum(self.first) / len(self.first)
            self.variance = sum((n - self.mean) ** 2 for n in self.first) / len(self.first)
            return
        deviation = math.sqrt(self.variance) + 1e-6
        z = (norm - self.mean) / deviation
        self.fired = z > self.THRESHOLD
        if self.fired:
            wanted = self.mean + self.THRESHOLD**2 / z * deviation
            for p in parameters:
                p.grad *= wanted / norm
            norm = wanted
        self.mean = self.AVERAGE * self.mean + (1 - self.AVERAGE) * norm
        square = (norm - self.mean) ** 2
        self.variance = self.AVERAGE * self.variance + (1 - self.AVERAGE) * square


class AdaGC:
    """Each tensor's gradient is at most 1.05 times the moving average (0.98) of its own norm.

    For the first 100 steps the whole gradient is clipped to norm 1, and each average is the least
    norm seen.

    Wang et al. 2025, AdaGC: Improving Training Stability for LLM Pretraining, algorithm 1.
    """

    RELATIVE, AVERAGE, ABSOLUTE, WARMUP = 1.05, 0.98, 1.0, 100

    def __init__(self) -> None:
        self.steps = 0
        self.usual: dict[nn.Parameter, Tensor] = {}

    def __call__(self, parameters: list[nn.Parameter]) -> None:
        """Scale the gradients in place."""
        self.steps += 1
        early = self.steps <= self.WARMUP
        if early:
            nn.utils.clip_grad_norm_(parameters, self.ABSOLUTE)
        for p in parameters:
            norm = p.grad.norm()
            usual = self.usual.get(p, norm)
            if early:
                self.usual[p] = torch.minimum(usual, norm)
                continue
            share = (self.RELATIVE * usual / (norm + 1e-12)).clamp(max=1)
            p.grad *= share
            self.usual[p] = self.AVERAGE * usual + (1 - self.AVERAGE) * share * norm


def zclip(run: Run) -> Step:
    """ZClip in the place of clipping; it alarms where it clips."""
    tame = ZClip()

    def step(loss: Tensor) -> Said:
        run.move(loss, tame)
        return Said((Alarm("warning", "gradient_norm", *WHOLE),)) if tame.fired else QUIET

    return step


def adagc(run: Run) -> Step:
    """AdaGC in the place of clipping; it clips nearly always and so says nothing."""
    tame = AdaGC()

    def step(loss: Tensor) -> Said:
        run.move(loss, tame)
        return QUIET

    return step


def halving(run: Run) -> Step:
    """The learning rate is halved where the loss stands 0.1 nat above its best, or is not finite.

    The loss is a moving average (0.9); at most once in 20 steps.
    """
    smooth = best = math.inf
    waits = 0

    def step(loss: Tensor) -> Said:
        nonlocal smooth, best, waits
        run.move(loss)
        now = loss.item()
        smooth = 0.9 * smooth + 0.1 * now if math.isfinite(smooth) else now
        best, waits = min(best, smooth), waits - 1
        if waits > 0 or (math.isfinite(now) and smooth <= best + 0.1):
            return QUIET
        waits = 20
        run.scheduler.base_lrs = [rate / 2 for rate in run.scheduler.base_lrs]
        return Said((Alarm("warning", "loss", *WHOLE),), ("rate halved",))

    return step


ARC_SIGNALS = {
    "nan_loss": "loss", "loss_explosion": "loss",
    "nan_gradients": "gradient_norm", "gradient_explosion": "gradient_norm",
    "nan_weights": "weight_norm", "weight_sparsity_explosion": "weight_norm",
    "weight_magnitude_collapse": "weight_norm", "lyapunov_divergence": "weight_growth",
}  # fmt: skip
"""What ARC calls a failure, and the signal that it was found by in the words of this benchmark."""
ARC_DRIFTS = {"loss↑": "loss", "grad↑": "gradient_norm", "weight↑": "weight_growth"}
"""The same of a drift, which may be one of several trends; its message marks them so."""


def arc(run: Run) -> Step:
    """ARC's controller with its defaults, called as its page says: before clip and optimizer.

    A step that it asks to skip moves nothing, the schedule neither; batches go on.

    Kaushik 2026, ARC: Autonomous Recovery Controller, arc-training 5.2.0.
    """
    from arc import Controller

    controller = Controller(run.model, run.optimizer, scheduler=run.scheduler, verbose=False)

    def step(loss: Tensor) -> Said:
        run.optimizer.zero_grad()
        loss.backward()
        run.disturb(AFTER_BACKWARD)
        action = controller.step(loss)
        if not action.should_skip:
            if run.arm.clip is not None:
                nn.utils.clip_grad_norm_(run.model.parameters(), run.arm.clip)
            run.optimizer.step()
            run.scheduler.step()
        run.iteration += 1
        return reported(action)

    return step


def reported(action: Any) -> Said:
    """What ARC says of a step; it gives a run up where it says that the fault is not the model's.

    Raises KeyError for a failure that ARC did not know when its words were read.
    """
    if action.failure_type is None:
        return Said(actions=("step skipped",)) if action.should_skip else QUIET
    kind = action.failure_type.partition(" ")[0]
    if kind == "drift_detected":
        signals = [name for mark, name in ARC_DRIFTS.items() if mark in action.message]
    else:
        signals = [ARC_SIGNALS[kind]]
    done = {"rollback": action.rolled_back, "rate halved": action.lr_reduced}
    return Said(
        tuple(Alarm("critical", name, *WHOLE) for name in signals),
        tuple(name for name, made in done.items() if made),
        action.message if action.unrecoverable else None,
    )


def governed(run: Run) -> Step:
    """The governor, as anyone would attach it."""
    governor = LeadMetaArchitect(run.model, run.optimizer, scheduler=run.scheduler)
    run.batches = governor.data(run.batches)

    def step(loss: Tensor) -> Said:
        penalty = governor.penalty()
        run.move(loss if penalty is None else loss + penalty)
        return said(governor.process_step(loss))

    return step


def said(seen: Seen) -> Said:
    """What the governor saw at a step, in the words of this benchmark."""
    if seen.decisions is None:
        return Said(stop=seen.stop)
    return Said(
        tuple(Alarm(a.level, a.signal, *a.target) for a in seen.decisions.alarms),
        tuple(applied.change.name for applied in seen.decisions.applied),
        seen.stop,
    )


COLUMNS = {
    "nothing": Column(as_is, plain),
    "clip": Column(clipped, plain),
    "zclip": Column(unclipped, zclip, speaks=True),
    "adagc": Column(unclipped, adagc),
    "halving": Column(as_is, halving, speaks=True),
    "qk_norm": Column(with_attention("qk_norm"), plain),
    "sigma": Column(with_attention("sigma"), plain),
    "arc": Column(as_is, arc, speaks=True, needs="arc-training==5.2.0.post1"),
    "governor": Column(as_is, governed, speaks=True),
}


def missing() -> dict[str, str]:
    """Columns that cannot be run here, and the package that each of them needs.

    Another version is another rival, and would stand under this one's name.
    """
    installed = {f"{found.name}=={found.version}" for found in metadata.distributions()}
    return {
        name: column.needs
        for name, column in COLUMNS.items()
        if column.needs is not None and column.needs not in installed
    }
