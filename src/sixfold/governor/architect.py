"""The governor attached to a training run: it watches, decides by `step`, acts, and writes down."""

from __future__ import annotations

import traceback
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sixfold.attention.allowed import check_whole
from sixfold.contracts import Change, Snapshot
from sixfold.discover import unknown
from sixfold.governor import commands, journal
from sixfold.governor.attached import ATTACHED, check_free, check_own
from sixfold.governor.limits import Limits, preset
from sixfold.governor.logs import File, Records
from sixfold.governor.meter import Meter, check_loss
from sixfold.governor.state import State, load_state, resumed, state_dict, whole
from sixfold.governor.step import Decisions, skips, step
from sixfold.governor.subject import Subject

MODES = ("act", "observe")
VIGILANCE = 5


def _disarm(known: weakref.ref[Meter]) -> None:
    """Take a meter's hooks off the model, where there still is one."""
    meter = known()
    if meter is not None:
        meter.disarm()


class Seen(NamedTuple):
    """What one call of `process_step` saw and did.

    snapshot: of this step, between samples only loss and scalars. stop: why going on is no use, or
    None; who owns the loop decides. acted: whether something was done about it.
    """

    step: int
    snapshot: Snapshot | None
    decisions: Decisions | None
    text: tuple[str, ...]
    stop: str | None = None
    acted: bool = False


class LeadMetaArchitect(Subject):
    """Watches every attention head of a model in training, and repairs what goes wrong.

    Args:
        model: any module whose attention is Sixfold's, `nn.MultiheadAttention` or a call of
            `scaled_dot_product_attention`.
        optimizer: the optimizer that moves it. Gradients are read just before it steps; without it
            nothing is skipped, shielded or reset.
        mode: ``act``, or ``observe`` to decide and tell without touching anything.
        limits: a preset's name (``default``, ``seed``, ``sagemaker``) or `Limits`.
        every: a sample every so many steps.
        folder: where ``telemetry.jsonl`` and ``journal.jsonl`` go; nowhere if None.
        scheduler: of the learning rate; rolled back with the model.
        scaler: of mixed precision; rolled back with the model.
        positions: bytes of each log that count when a run is resumed.

    Raises:
        ValueError: for arguments of another kind, a model without parameters, an unknown mode or
            preset, for a model or an optimizer that has a governor already, by itself or as a part
            of another model, for an optimizer that moves nothing of the model, and for LBFGS.

    >>> from sixfold import LanguageModel
    >>> model = LanguageModel(11, 8, 28, 1, {"num_heads": 7, "mixer": "hexagonal"})
    >>> governor = LeadMetaArchitect(model)
    >>> loss = model(torch.zeros(1, 8, dtype=torch.long)).sum()
    >>> sorted(governor.process_step(loss).snapshot.signals)[:3]
    ['condition_k', 'condition_q', 'condition_v']
    """

    def __init__(  # noqa: PLR0913 - what a run consists of
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        mode: str = "act",
        limits: str | Limits = "default",
        every: int = 10,
        folder: Path | str | None = None,
        scheduler: Any = None,
        scaler: Any = None,
        positions: Mapping[str, int] | None = None,
    ) -> None:
        if mode not in MODES:
            raise ValueError(unknown("governor.mode", mode, MODES))
        check_whole(**{"governor.every": every})
        limits = preset(limits) if isinstance(limits, str) else limits
        if not isinstance(limits, Limits):
            raise ValueError(f"limits must be a preset's name or Limits, got {limits!r}")
        check_own(model, optimizer)
        check_free(model, optimizer)
        meter = Meter(model, optimizer, every)
        super().__init__(model, optimizer, meter, self._before_move, (scheduler, scaler))
        self.limits = replace(limits, acting=limits.acting and mode == "act")
        self.mode, self.every, self.state = mode, every, State()
        self.records = Records(folder, positions or {})
        self.telemetry, self.journal = self.records.telemetry, self.records.journal
        self._resting = self._broken = False
        ATTACHED.add(self)
        # the model's hooks know the meter alone, and outlive a governor that nobody holds
        weakref.finalize(self, _disarm, weakref.ref(meter))
        self._arm()

    @property
    def logs(self) -> tuple[File, ...]:
        """The telemetry and the journal on disk, or nothing."""
        return self.records.logs.files

    # ------------------------------------------------------------ during a step

    def _arm(self) -> None:
        """Set the probes of the step to come; while logits alarm, they come five times as often."""
        if self._broken:
            return
        pace = VIGILANCE if self.state.memory.vigilant else 1
        every = max(1, self.every // pace)
        self.meter.arm(self.terms, sampling=not self._resting and self.now % every == 0)

    def _before_move(self, gradient_norm: float, scale: float) -> bool:
        """Read the gradients as the optimizer sees them; True where it must not move."""
        if self._resting or self._broken:
            return False
        self.meter.before_move(gradient_norm, scale)
        return skips(gradient_norm, self.limits)

    def data(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The same batches; with them the governor can roll back a run, and leaves out bad ones.

        Without it rollback is off. Call it for each epoch:
        ``for batch in governor.data(loader): ...``
        """
        able = self.limits.acting and self.limits.actions.rollbacks > 0 and not self._broken
        self.limits = replace(self.limits, rewinding=able)
        self.rewind.recording = able
        return self.rewind.data(batches)

    # ------------------------------------------------------------ after a step

    def process_step(self, loss: float | Tensor | None = None) -> Seen:
        """Close a training step: look at it, decide, act, and tell.

        Call it once per step, after the optimizer has moved. Whatever goes wrong in here is warned
        about with its traceback, and the governor lets go: training goes on without it.

        Args:
            loss: the step's loss; without it what needs a loss is off.

        Raises ValueError for a loss that is neither a number nor a tensor of one element.
        """
        if self._broken:
            return Seen(self.now, None, None, ())
        check_loss(loss)
        now = self.now + 1
        try:
            return self._processed(now, loss)
        except Exception as error:  # noqa: BLE001 - a watcher must not end what it watches
            return self._let_go(now, error)

    def _let_go(self, now: int, error: Exception) -> Seen:
        self.detach()
        said = f"the governor failed at step {now} and let go: {error!r}"
        warnings.warn(
            f"{said}; training goes on without it\n{''.join(traceback.format_exception(error))}",
            stacklevel=3,
        )
        return Seen(now, None, None, (said,))

    def _processed(self, now: int, loss: float | Tensor | None) -> Seen:
        self.meter.check()
        if self._resting:
            return Seen(self.now, None, None, ())
        snapshot = self.meter.snapshot(now, loss)
        self._leave_alone()
        self.records.note(now, self.limits)
        self.rewind.now = self.now = now
        self.state, decisions = step(self.state, snapshot, self.limits)
        refused = self.carry_out(decisions) if self.limits.acting else []
        for row in refused:
            self.state = self.state.without(row["id"])
        acting = self.limits.acting
        rows = [*journal.rows(now, decisions, acting=acting), *refused]
        self.records.tell(rows, self.layers, self.limits, snapshot)
        self._arm()
        said = journal.sentence(decisions, acting=acting), decisions.stop
        return Seen(now, snapshot, decisions, *said, acted=acting and bool(decisions.applied))

    def _leave_alone(self) -> None:
        """Note the layers whose weights must not be touched, as far as they are known."""
        alone = tuple(n for n, layer in enumerate(self.layers) if layer.refusal is not None)
        unscaled = tuple(n for n in alone if not self.layers[n].scales)
        if self.meter.sampling and self.layers:
            self.limits = replace(self.limits, untouched=alone, unscaled=unscaled)

    # ------------------------------------------------------------ commands

    def command(self, change: Change) -> str:
        """Make a change by hand; it is judged, and taken back, like any other.

        Returns what was done, as it stands in the journal. Raises ValueError in observing mode.
        """
        if self._broken:
            raise ValueError("this governor has let go of its model: attach a new one")
        if not self.limits.acting:
            raise ValueError("this governor only observes: attach it with mode='act'")
        change.apply(self)
        number = self.state.count + 1
        self.state = self.state.with_change(number, change, self.now)
        row = journal.command_row(self.now, number, change)
        self.records.tell([row], self.layers, self.limits)
        self._arm()
        return str(row["text"])

    def command_adjust_entropy_regularization(
        self, delta: float, coord: tuple[int, int] | None = None, layer: int | None = None
    ) -> str:
        """Add `delta` to the weight of the entropy term: of one head, or of every head.

        The term holds a head's entropy at its own median. Raises ValueError before anything was
        measured, for a delta that is not finite, for a weight that would become negative, and for
        a head as `command_reset_head` does.
        """
        if coord is None and layer is not None:
            raise ValueError(f"layer must be None where coord is None, got {layer!r}")
        heads = commands.every_head(self.layers)
        heads = heads if coord is None else [commands.head_at(self.layers, coord, layer)]
        known = (self.terms, self.state.memory, self.limits.actions)
        terms = [commands.heavier_term(head, delta, *known) for head in heads]
        return [self.command(term) for term in terms][-1] if terms else ""

    def command_reset_head(
        self, coord: tuple[int, int], strategy: str = "orthogonal", layer: int | None = None
    ) -> str:
        """Give one head new weights (``orthogonal``, ``xavier`` or ``neighbours``) and no moments.

        On a hexagonal grid `coord` is a place of `layer`, the first unless given; elsewhere it is
        (layer, head). Raises ValueError for an unknown strategy, a head that is not there, a
        `layer` given where `coord` holds it, and a layer whose weights could not be traced.
        """
        head = commands.head_at(self.layers, coord, layer)
        return self.command(commands.reset(self.layers, head, strategy, self.now, self.every + 1))

    def mute(self, *signals: str) -> None:
        """Raise no alarm about these signals from now on; a resumed run has its own limits again.

        Raises ValueError for a signal that does not exist.
        """
        self.limits = commands.muted(self.limits, signals)

    # ------------------------------------------------------------ around it

    @contextmanager
    def trying(self, change: Change) -> Iterator[None]:
        """A change is in force inside; what it did to the weights is the caller's to restore."""
        try:
            with self.in_force(change):
                self._arm()
                yield
        finally:
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
        """Let go of the model for good: no hook, probe, term, shield or copy stays behind."""
        self._broken = True
        self.rewind.clear()
        if self.guard is not None:
            self.guard.remove()
        self.meter.disarm()
        self.terms.clear()
        self.records.logs.close()
        ATTACHED.discard(self)

    def generate_report(self) -> str:
        """What was seen and done so far, as text."""
        return journal.report(self.telemetry.history, self.journal, self.grid, self.mode)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as plain JSON values; of batches to come again, positions."""
        return {
            "now": self.now,
            "state": state_dict(self.state),
            "whole": whole(self.state),
            "limits": None if self.records.told is None else asdict(self.records.told),
            "sizes": self.meter.sizes,
            "positions": {file.path.name: file.position() for file in self.logs},
            "again": [batch for batch in self.again if isinstance(batch, int | str)],
            **self.forces(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`. Copies of the run did not outlive the process."""
        self.now, self.state = state["now"], resumed(load_state(state["state"]))
        self.rewind.now, self.meter.sizes = self.now, list(state["sizes"])
        self.rewind.again.extend(state.get("again", ()))
        self.restore(state)
        if state["limits"] is not None:
            told = self.records.told = journal.load_limits(state["limits"])
            self.limits = replace(self.limits, untouched=told.untouched, unscaled=told.unscaled)
        self.records.go_on(state["positions"], self.now, self.state, whole=state["whole"])
        self._arm()
