"""The governor attached to a training run: it watches, decides by `step`, acts, and writes down."""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn

from sixfold.contracts import Change, HeadId, Snapshot
from sixfold.discover import unknown
from sixfold.geometry.hexgrid import HexGrid
from sixfold.governor import journal
from sixfold.governor.limits import Limits, preset
from sixfold.governor.step import Decisions, State, load_state, state_dict, step
from sixfold.governor.watch import collect
from sixfold.governor.watch.probe import LayerProbe, attention_layers, clock_us

MODES = ("act", "observe")
REMEMBERED = 4096
"""Snapshots held in memory; the log on disk holds all."""
VIGILANCE = 5
SPECTRA_EVERY = 5
"""Singular values move slowly and cost most: every fifth sample."""


class Telemetry:
    """The recorded snapshots; the last `REMEMBERED` of them in `history`."""

    def __init__(self) -> None:
        self.history: deque[Snapshot] = deque(maxlen=REMEMBERED)


class Seen(NamedTuple):
    """What one call of `process_step` saw and did; `snapshot` is None between samples."""

    step: int
    snapshot: Snapshot | None
    decisions: Decisions | None
    text: tuple[str, ...]


class LeadMetaArchitect:
    """Watches every head of a model in training, and repairs what goes wrong.

    Args:
        model: any module with `sixfold.MultiHeadAttention` layers.
        optimizer: the optimizer that moves it; gradients are read just before it steps.
        mode: ``act``, or ``observe`` to decide and tell without touching anything.
        limits: a preset's name (``default``, ``seed``) or `Limits`.
        every: a sample every so many steps.
        folder: where ``telemetry.jsonl`` and ``journal.jsonl`` go; nowhere if None.
        positions: bytes of each log that count when a run is resumed.

    Raises:
        ValueError: for a model without such layers, or an unknown mode or preset.

    >>> from sixfold import LanguageModel
    >>> model = LanguageModel(11, 8, 28, 1, {"num_heads": 7, "mixer": "hexagonal"})
    >>> governor = LeadMetaArchitect(model)
    >>> loss = model(torch.zeros(1, 8, dtype=torch.long)).sum()
    >>> sorted(governor.process_step(loss).snapshot.signals)[:3]
    ['condition_k', 'condition_q', 'condition_v']
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        mode: str = "act",
        limits: str | Limits = "default",
        every: int = 10,
        folder: Path | str | None = None,
        positions: Mapping[str, int] | None = None,
    ) -> None:
        if mode not in MODES:
            raise ValueError(unknown("governor.mode", mode, MODES))
        if every < 1:
            raise ValueError(f"governor.every must be 1 or more, got {every}")
        self.layers = attention_layers(model)
        self.model, self.optimizer, self.mode, self.every = model, optimizer, mode, every
        self.limits = preset(limits) if isinstance(limits, str) else limits
        self.telemetry = Telemetry()
        self.terms: dict[HeadId, tuple[float, float]] = {}
        self.state, self.now, self._resting = State(), 0, False
        self.journal: deque[dict[str, Any]] = deque(maxlen=REMEMBERED)
        self.logs = journal.open_logs(folder, self.layers, self.grid, self.limits, positions or {})
        self._measured: dict[str, list[Tensor]] = {}
        self._times: dict[str, float] = {}
        self._began = self._forward_ended = 0.0
        self._handles = [
            model.register_forward_hook(self._after_forward),
            *(
                [optimizer.register_step_pre_hook(self._before_move)]
                if optimizer is not None
                else []
            ),
        ]
        self._arm()

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return next(self.model.parameters()).device

    @property
    def grid(self) -> HexGrid | None:
        """The hexagonal grid of the heads, if they sit on one."""
        return self.layers[0].grid

    @property
    def sampling(self) -> bool:
        """Whether the step now running is measured; while logits alarm, five times as often."""
        vigilant = self.state.memory.vigilant
        every = max(1, self.every // VIGILANCE) if vigilant else self.every
        return not self._resting and self.now % every == 0

    def _arm(self) -> None:
        """Set the probes of the step to come; a step that nothing asks about has none."""
        for number, layer in enumerate(self.layers):
            hold = tuple(target.head for target in self.terms if target.layer == number)
            wanted = self.sampling or hold
            layer.probe = (
                LayerProbe(self.device, measure=self.sampling, hold=hold) if wanted else None
            )
        self._measured, self._times = {}, {}
        # a step that is not sampled never waits for the device
        self._began = clock_us(self.device) if self.sampling else 0.0

    def _probes(self) -> list[LayerProbe]:
        return [layer.probe for layer in self.layers if isinstance(layer.probe, LayerProbe)]

    def _after_forward(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG002
        if self.model.training and self.sampling:
            self._forward_ended = clock_us(self.device)

    def _before_move(self, optimizer: torch.optim.Optimizer, *unused: Any) -> None:  # noqa: ARG002
        if self.sampling:
            self._times["gradient"] = clock_us(self.device) - self._forward_ended
            self._measured |= collect.gradients(self.layers)

    def penalty(self) -> Tensor | None:
        """The entropy term of the pass just made, to be added to the loss; None when there is none.

        sum over held heads of coefficient * max(0, floor - H_h).
        """
        total = None
        for number, layer in enumerate(self.layers):
            probe = layer.probe
            if not isinstance(probe, LayerProbe) or probe.held is None:
                continue
            wanted = [self.terms[HeadId(number, head)] for head in probe.hold]
            floors, coefficients = torch.tensor(wanted, device=probe.held.device).T
            term = (coefficients * (floors - probe.held).clamp(min=0)).sum()
            total, probe.held = term if total is None else total + term, None
        return total

    def process_step(self, loss: float | Tensor | None = None) -> Seen:
        """Close a training step: measure if it is a sampled one, decide, act, and tell.

        Call it once per step, after the optimizer has moved.

        Args:
            loss: the step's loss; NaN in the record when it is not given.
        """
        now = self.now + 1
        seen = Seen(now, None, None, ())
        probes = self._probes()
        if any(probe.held is not None for probe in probes):
            warnings.warn(
                "an entropy term is in force, but governor.penalty() was not added to the loss",
                stacklevel=2,
            )
        if self.sampling and probes:
            if self.optimizer is None:
                self._measured |= collect.gradients(self.layers)
            snapshot = self._snapshot(now, number(loss), probes)
            self.telemetry.history.append(snapshot)
            self.state, decisions = step(self.state, snapshot, self.limits)
            self._act(decisions)
            rows = journal.rows(now, decisions, self.mode)
            self.journal += rows
            journal.write(self.logs, snapshot, rows)
            seen = Seen(now, snapshot, decisions, journal.sentence(decisions, self.mode))
        self.now = now
        self._arm()
        return seen

    def _snapshot(self, now: int, loss: float, probes: Sequence[LayerProbe]) -> Snapshot:
        """Everything measured at this step; under several processes, what rank 0 measured."""
        ended = clock_us(self.device)
        measured = collect.seen(probes) | self._measured
        if (now - 1) % (SPECTRA_EVERY * self.every) == 0:
            measured |= collect.matrices(self.layers)
        times = collect.times(probes) | self._times | {"step": ended - self._began}
        tokens = probes[0].tokens
        scalars = {"tokens_per_s": 1e6 * tokens / times["step"]} if tokens else {}
        if self.optimizer is not None:
            scalars["learning_rate"] = float(self.optimizer.param_groups[0]["lr"])
        found = [Snapshot(now, loss, collect.to_numbers(measured), scalars, times)]
        if distributed.is_initialized() and distributed.get_world_size() > 1:
            distributed.broadcast_object_list(found, src=0)
        return found[0]

    def _act(self, decisions: Decisions) -> None:
        """Make and take back changes, unless only observing."""
        if self.mode == "act":
            for undone in decisions.undone:
                undone.change.undo(self)
            for applied in decisions.applied:
                applied.change.apply(self)

    @contextmanager
    def trying(self, change: Change) -> Iterator[None]:
        """A change is in force inside; what it did to the weights is the caller's to restore."""
        terms = dict(self.terms)
        change.apply(self)
        self._arm()
        try:
            yield
        finally:
            self.terms = terms
            self._arm()

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Neither measure nor decide inside: steps made there are not the run's own."""
        awake, self._resting = self._resting, True
        self._arm()
        try:
            yield
        finally:
            self._resting = awake
            self._arm()

    def detach(self) -> None:
        """Let go of the model: no hook, no probe, no term stays behind."""
        for handle in self._handles:
            handle.remove()
        for layer in self.layers:
            layer.probe = None
        self.terms.clear()
        for log in self.logs:
            log.close()

    def generate_report(self) -> str:
        """What was seen and done so far, as text."""
        return journal.report(self.telemetry.history, self.journal, self.grid, self.mode)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as plain JSON values."""
        return {
            "now": self.now,
            "state": state_dict(self.state),
            "terms": [[*target, *term] for target, term in self.terms.items()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.now, self.state = state["now"], load_state(state["state"])
        self.terms = {HeadId(layer, head): (floor, c) for layer, head, floor, c in state["terms"]}
        if self.logs:
            self.journal.extend(journal.read(self.logs[1].path))
        self._arm()


def number(loss: float | Tensor | None) -> float:
    """A loss as a float; NaN when none was given."""
    if loss is None:
        return math.nan
    return loss.item() if isinstance(loss, Tensor) else loss
