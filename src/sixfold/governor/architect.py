"""The governor attached to a training run: it watches, decides by `step`, acts, and writes down."""

from __future__ import annotations

import math
import traceback
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sixfold.contracts import Change, HeadId, Snapshot
from sixfold.discover import unknown
from sixfold.geometry.hexgrid import HexGrid
from sixfold.governor import journal
from sixfold.governor.alarms import Alarm, own_median
from sixfold.governor.guard import Guard
from sixfold.governor.limits import Limits, preset
from sixfold.governor.protocols import entropy_term, head_reset
from sixfold.governor.rewind import Rewind
from sixfold.governor.step import (
    Applied,
    Decisions,
    State,
    load_state,
    skips,
    state_dict,
    step,
)
from sixfold.governor.watch import collect, ranks
from sixfold.governor.watch.layer import Layer
from sixfold.governor.watch.layout import Piece
from sixfold.governor.watch.probe import LayerProbe, clock_us
from sixfold.governor.watch.watch import Watch

MODES = ("act", "observe")
REMEMBERED = 4096
"""Samples held in memory; the log on disk holds all."""
VIGILANCE = 5
SPECTRA_EVERY = 5
"""Singular values move slowly and cost most: every fifth sample."""
ATTACHED: weakref.WeakSet[LeadMetaArchitect] = weakref.WeakSet()
"""The governors at work: two on one model would undo each other's changes."""


class Telemetry:
    """The recorded samples; the last `REMEMBERED` of them in `history`."""

    def __init__(self) -> None:
        self.history: deque[Snapshot] = deque(maxlen=REMEMBERED)


class Seen(NamedTuple):
    """What one call of `process_step` saw and did.

    snapshot: of this step, between samples only loss and scalars. stop: why going on is no use, or
    None; who owns the loop decides.
    """

    step: int
    snapshot: Snapshot | None
    decisions: Decisions | None
    text: tuple[str, ...]
    stop: str | None = None


class LeadMetaArchitect:
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
        ValueError: for an unknown mode or preset, and for a model that has a governor already.

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
        if every < 1:
            raise ValueError(f"governor.every must be 1 or more, got {every}")
        if any(other.model is model for other in ATTACHED):
            raise ValueError("this model has a governor already: detach() it first")
        self.model, self.optimizer, self.mode, self.every = model, optimizer, mode, every
        limits = preset(limits) if isinstance(limits, str) else limits
        self.limits = replace(limits, acting=limits.acting and mode == "act")
        self.watch = Watch(model)
        self.telemetry, self.journal = Telemetry(), deque[dict[str, Any]](maxlen=REMEMBERED)
        self.records = journal.Logs(folder, positions or {})
        self.state, self.now = State(), 0
        self.terms: dict[HeadId, tuple[float, float]] = {}
        self._sizes: list[float] = []
        self.kept: dict[tuple[str, HeadId], list[Tensor]] = {}
        parts = [part for part in (optimizer, scheduler, scaler) if part is not None]
        self.rewind = Rewind(model, parts)
        self.guard = None if optimizer is None else Guard(optimizer, self._before_move)
        self._resting = self._broken = self._blind = False
        self._probes: dict[int, LayerProbe] = {}
        self._forget_step()
        ATTACHED.add(self)
        self._arm()

    # ------------------------------------------------------------ what it knows

    @property
    def layers(self) -> list[Layer]:
        """The attention layers found; a foreign model's after its first pass."""
        return self.watch.layers

    @property
    def logs(self) -> tuple[journal.File, ...]:
        """The telemetry and the journal on disk, or nothing."""
        return self.records.files

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return next(self.model.parameters()).device

    @property
    def grid(self) -> HexGrid | None:
        """The hexagonal grid of the heads, if they sit on one."""
        return self.layers[0].grid if self.layers else None

    @property
    def sampling(self) -> bool:
        """Whether the step now running is measured; while logits alarm, five times as often."""
        vigilant = self.state.memory.vigilant
        every = max(1, self.every // VIGILANCE) if vigilant else self.every
        return not self._resting and self.now % every == 0

    @property
    def shields(self) -> dict[str, int]:
        """By how many powers of two ``lr`` and ``weight_decay`` are divided in each step.

        Raises ValueError where no optimizer was given.
        """
        if self.guard is None:
            raise ValueError("a shield needs the optimizer: give it at attach")
        return self.guard.shields

    # ------------------------------------------------------------ during a step

    def _forget_step(self) -> None:
        """Nothing is known of the step to come."""
        self._measured: collect.Signals = {}
        self._inputs: dict[int, tuple[Tensor, Tensor]] = {}
        self._weights: list[dict[str, Tensor]] = []
        self._whole: collect.Whole | None = None
        self._times: dict[str, float] = {}
        self._gradient_norm: float | None = None
        self._error: Exception | None = None
        self._began = self._forward_ended = 0.0

    def _arm(self) -> None:
        """Set the probes of the step to come; a step that nothing asks about has none."""
        self.watch.disarm()
        self._disarm_hooks()
        self._probes = {}
        self._forget_step()
        unknown_yet = not self.layers and not self.watch.passes
        if self._broken or not (self.sampling or self.terms or unknown_yet):
            return
        self.watch.arm(self._probe_of)
        if self.sampling:
            hooks = [self.model.register_forward_hook(self._after_forward)]
            hooks += [
                layer.module.register_forward_pre_hook(
                    partial(self._input, number), with_kwargs=True
                )
                for number, layer in enumerate(self.layers)
            ]
            self._hooks = hooks
            # a step that is not sampled never waits for the device
            self._began = clock_us(self.device)

    def _disarm_hooks(self) -> None:
        for handle in getattr(self, "_hooks", ()):
            handle.remove()
        self._hooks: list[Any] = []

    def _probe_of(self, number: int) -> LayerProbe | None:
        """The probe of a layer on this step."""
        if number not in self._probes:
            hold = tuple(target.head for target in self.terms if target.layer == number)
            if not (self.sampling or hold):
                return None
            self._probes[number] = LayerProbe(self.device, measure=self.sampling, hold=hold)
        return self._probes[number]

    def _input(
        self,
        number: int,
        module: nn.Module,  # noqa: ARG002
        inputs: tuple[Any, ...],
        named: Mapping[str, Any],
    ) -> None:
        """Look at what a layer is given, once a step; evaluation in between is not the run's."""
        given = (x for x in (*inputs, *named.values()) if isinstance(x, Tensor))
        x = next((x for x in given if x.ndim == 3 and x.is_floating_point()), None)
        training = self.model.training and torch.is_grad_enabled()
        if x is None or x.shape[1] < 2 or number in self._inputs or not training:
            return
        try:
            self._inputs[number] = collect.rank(x.detach())
        except Exception as error:  # noqa: BLE001 - raised, and told, after the step
            self._error = error

    def _after_forward(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG002
        if self.model.training:
            self._forward_ended = clock_us(self.device)

    def _before_move(self, gradient_norm: float) -> bool:
        """Read the gradients as the optimizer sees them; True where it must not move."""
        if self._resting or self._broken:
            return False
        self._gradient_norm = gradient_norm
        if self.sampling:
            try:
                self._times["gradient"] = clock_us(self.device) - self._forward_ended
                self._measured |= collect.gradients(self.layers)
                self._weights = collect.copies(self.layers)
                self._whole = collect.Whole(self.guard.optimizer)
            except Exception as error:  # noqa: BLE001 - raised, and told, after the step
                self._error = error
        return skips(gradient_norm, self.limits)

    def penalty(self) -> Tensor | None:
        """The entropy term of the pass just made, to be added to the loss; None when there is none.

        sum over held heads of coefficient * max(0, floor - H_h).
        """
        total = None
        for number, probe in self._probes.items():
            if probe.held is None:
                continue
            wanted = [self.terms[HeadId(number, head)] for head in probe.hold]
            floors, coefficients = torch.tensor(wanted, device=probe.held.device).T
            term = (coefficients * (floors - probe.held).clamp(min=0)).sum()
            total, probe.held = term if total is None else total + term, None
        return total

    def data(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The same batches; with them the governor can roll back a run, and leaves out bad ones.

        Without it rollback is off. Call it for each epoch:
        ``for batch in governor.data(loader): ...``
        """
        self.limits = replace(self.limits, rewinding=self.limits.acting)
        self.rewind.recording = self.limits.acting and not self._broken
        return self.rewind.data(batches)

    # ------------------------------------------------------------ after a step

    def process_step(self, loss: float | Tensor | None = None) -> Seen:
        """Close a training step: look at it, decide, act, and tell.

        Call it once per step, after the optimizer has moved. Whatever goes wrong in here is warned
        about with its traceback, and the governor lets go: training goes on without it.

        Args:
            loss: the step's loss; without it what needs a loss is off.
        """
        if self._broken:
            return Seen(self.now, None, None, ())
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
        sampled = self.sampling
        for error in (self._error, self.watch.error, *(p.error for p in self._probes.values())):
            if error is not None:
                raise error
        if any(probe.held is not None for probe in self._probes.values()):
            warnings.warn(
                "an entropy term is in force, but governor.penalty() was not added to the loss",
                stacklevel=4,
            )
        if self._resting:
            return Seen(self.now, None, None, ())
        snapshot = self._snapshot(now, loss, sampled=sampled)
        self.rewind.now = self.now = now
        self.state, decisions = step(self.state, snapshot, self.limits)
        self._act(decisions)
        rows = journal.rows(now, decisions, acting=self.limits.acting)
        self.journal += rows
        self.records.write(snapshot, rows, partial(journal.header, self.layers, self.limits))
        if snapshot.signals:
            self.telemetry.history.append(snapshot)
        text = journal.sentence(decisions, acting=self.limits.acting)
        self._arm()
        return Seen(now, snapshot, decisions, text, decisions.stop)

    def _snapshot(self, now: int, loss: float | Tensor | None, *, sampled: bool) -> Snapshot:
        """Everything measured at this step, the worst of all processes where there are several."""
        value = number(loss)
        scalars: dict[str, float] = {}
        if loss is not None:
            scalars["loss_finite"] = float(math.isfinite(value))
        if self._gradient_norm is not None:
            scalars["gradient_norm"] = self._gradient_norm
        if self.optimizer is not None:
            scalars["learning_rate"] = float(self.optimizer.param_groups[0]["lr"])
        if self._whole is not None:
            scalars |= self._whole.moved()
            scalars |= collect.growth(self._sizes, self._whole.sizes)
            self._sizes = self._whole.sizes
        found = Snapshot(now, value, {}, scalars, {})
        if sampled and self.layers:
            found = self._sample(found)
        elif sampled and not self._blind and self.watch.nothing() is not None:
            self._blind = True
            warnings.warn(
                f"{self.watch.nothing()}; only loss and gradients are watched", stacklevel=5
            )
        return ranks.joined(found, self.device, sampled=sampled)

    def _sample(self, found: Snapshot) -> Snapshot:
        """A snapshot with all signals."""
        ended = clock_us(self.device)
        self._untouched()
        measured = collect.seen(self.layers, self._probes) | self._measured
        if not self._measured and self.optimizer is None:
            measured |= collect.gradients(self.layers)
        if self._weights:
            measured |= collect.updates(self.layers, self._weights)
        if (found.step - 1) % (SPECTRA_EVERY * self.every) == 0:
            measured |= collect.matrices(self.layers)
        for place, name in enumerate(("rank_distance", "stable_rank")):
            inputs = [self._inputs.get(number) for number in range(len(self.layers))]
            measured[name] = [
                None if pair is None else pair[place].expand(layer.num_heads)
                for pair, layer in zip(inputs, self.layers, strict=True)
            ]
        times = collect.times(self._probes) | self._times | {"step": ended - self._began}
        times = {stage: value for stage, value in times.items() if value >= 0}
        tokens = max((probe.tokens for probe in self._probes.values()), default=0)
        scalars = dict(found.scalars)
        if tokens and times.get("step"):
            scalars["tokens_per_s"] = 1e6 * tokens / times["step"]
        return found._replace(signals=collect.to_numbers(measured), scalars=scalars, times_us=times)

    def _untouched(self) -> None:
        """Note the layers whose weights must be left alone."""
        alone = tuple(n for n, layer in enumerate(self.layers) if layer.refusal is not None)
        unscaled = tuple(n for n in alone if not self.layers[n].scales)
        if (alone, unscaled) != (self.limits.untouched, self.limits.unscaled):
            self.limits = replace(self.limits, untouched=alone, unscaled=unscaled)

    def _act(self, decisions: Decisions) -> None:
        """Make and take back changes, unless only observing."""
        if not self.limits.acting:
            return
        for undone in decisions.undone:
            self._make(undone.number, undone.change, undone.change.undo)
        for applied in decisions.applied:
            self._make(applied.number, applied.change, applied.change.apply)
        self.rewind.keep(decisions.copies)

    def _make(self, number: int, change: Change, make: Callable[[Any], None]) -> None:
        """Make a change or take it back; one that the model refuses is told of and left out."""
        try:
            make(self)
        except (ValueError, KeyError, IndexError) as error:
            self.state = self.state.without(number)
            warnings.warn(
                f"{change.name} #{number} at {journal.name_of(change.target)} could not be made: "
                f"{error}",
                stacklevel=6,
            )

    @torch.no_grad()
    def forget(self, piece: Piece) -> None:
        """Clear the optimizer's moments of a part of a parameter."""
        if self.optimizer is None:
            return
        for value in self.optimizer.state.get(piece.parameter, {}).values():
            if isinstance(value, Tensor) and value.shape == piece.parameter.shape:
                value[piece.index] = 0

    # ------------------------------------------------------------ commands

    def head_id(self, coord: tuple[int, int], layer: int = 0) -> HeadId:
        """The head at a hexagonal coordinate, or plainly (layer, head) where there is no grid.

        Raises ValueError for a place that is not there.
        """
        grid = self.layers[layer].grid if layer < len(self.layers) else None
        if grid is not None:
            if tuple(coord) not in grid.index:
                raise ValueError(f"{tuple(coord)} is not on the grid of radius {grid.radius}")
            return HeadId(layer, grid.index[tuple(coord)])
        number, head = coord
        if not (0 <= number < len(self.layers) and 0 <= head < self.layers[number].num_heads):
            raise ValueError(f"there is no head {head} in a layer {number}")
        return HeadId(number, head)

    def command(self, change: Change) -> str:
        """Make a change by hand; it is judged, and taken back, like any other.

        Returns what was done, as it stands in the journal. Raises ValueError in observing mode.
        """
        if self._broken:
            raise ValueError("this governor has let go of its model: attach a new one")
        if not self.limits.acting:
            raise ValueError("this governor only observes: attach it with mode='act'")
        number = self.state.count + 1
        signal = change.expects.signal
        asked = Alarm(self.now, "notice", signal, change.target, math.nan, math.nan)
        decisions = Decisions((), (), (), (Applied(number, change, asked),))
        self.state = self.state.with_change(number, change, self.now)
        change.apply(self)
        rows = [row | {"by_hand": True} for row in journal.rows(self.now, decisions, acting=True)]
        self.journal += rows
        self.records.tell(rows, partial(journal.header, self.layers, self.limits))
        self._arm()
        return str(rows[-1]["text"])

    def command_adjust_entropy_regularization(
        self, delta: float, coord: tuple[int, int] | None = None, layer: int = 0
    ) -> str:
        """Add `delta` to the weight of the entropy term: of one head, or of every head.

        The term holds a head's entropy at its own median. Raises ValueError before anything was
        measured, and for a weight that would become negative.
        """
        every = [HeadId(n, h) for n, one in enumerate(self.layers) for h in range(one.num_heads)]
        told = ""
        for head in every if coord is None else [self.head_id(coord, layer)]:
            floor, weight = self.terms.get(
                head, (own_median(self.state.memory, "entropy", head), 0.0)
            )
            if floor is None:
                raise ValueError("no entropy has been measured yet: train a step first")
            if weight + delta < 0:
                raise ValueError(
                    f"the weight of the entropy term would become {weight + delta:.3g}"
                )
            lasts = self.limits.actions.entropy_steps
            told = self.command(
                entropy_term.build(head, floor, weight + delta, lasts, within=lasts // 2)
            )
        return told

    def command_reset_head(
        self, coord: tuple[int, int], strategy: str = "orthogonal", layer: int = 0
    ) -> str:
        """Give one head new weights (``orthogonal``, ``xavier`` or ``neighbours``) and no moments.

        Raises ValueError for an unknown strategy, a head that is not there, and a layer whose
        weights could not be traced.
        """
        head = self.head_id(coord, layer)
        refusal = self.layers[head.layer].refusal
        if refusal is not None:
            raise ValueError(f"layer {head.layer} is only watched: {refusal}")
        alarm = Alarm(self.now, "notice", "gradient_norm", head, 0.0, 0.0)
        return self.command(head_reset.build(head, alarm, self.every + 1, strategy))

    def mute(self, *signals: str) -> None:
        """Raise no alarm about these signals from now on.

        Raises ValueError for a signal that does not exist.
        """
        for signal in signals:
            if signal not in journal.SIGNALS:
                raise ValueError(unknown("signal", signal, journal.SIGNALS))
        muted = tuple(sorted({*self.limits.alarms.muted, *signals}))
        self.limits = replace(self.limits, alarms=replace(self.limits.alarms, muted=muted))

    # ------------------------------------------------------------ around it

    @contextmanager
    def trying(self, change: Change) -> Iterator[None]:
        """A change is in force inside; what it did to the weights is the caller's to restore."""
        terms = dict(self.terms)
        shields = {} if self.guard is None else dict(self.guard.shields)
        change.apply(self)
        self._arm()
        try:
            yield
        finally:
            self.terms = terms
            if self.guard is not None:
                self.guard.shields = shields
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
        self.watch.disarm()
        self._disarm_hooks()
        self.terms.clear()
        self.records.close()
        ATTACHED.discard(self)

    def generate_report(self) -> str:
        """What was seen and done so far, as text."""
        return journal.report(self.telemetry.history, self.journal, self.grid, self.mode)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as plain JSON values."""
        return {
            "now": self.now,
            "state": state_dict(self.state),
            "sizes": self._sizes,
            "positions": {file.path.name: file.position() for file in self.logs},
            "terms": [[*target, *term] for target, term in self.terms.items()],
            "shields": {} if self.guard is None else dict(self.guard.shields),
            "bound": None if self.guard is None else self.guard.bound,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`. Copies of the run did not outlive the process."""
        self.now, self.state = state["now"], replace(load_state(state["state"]), snapshots=())
        self.rewind.now = self.now
        self.terms = {HeadId(layer, head): (floor, c) for layer, head, floor, c in state["terms"]}
        self._sizes = list(state["sizes"])
        if self.guard is not None:
            self.guard.shields |= state["shields"]
            self.guard.bound = state["bound"]
        self.records.go_on(state["positions"])
        self.journal.extend(self.records.journal())
        self._arm()


def number(loss: float | Tensor | None) -> float:
    """A loss as a float; NaN when none was given."""
    if loss is None:
        return math.nan
    return loss.item() if isinstance(loss, Tensor) else float(loss)
