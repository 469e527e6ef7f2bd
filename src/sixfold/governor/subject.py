"""A run as changes see it: what they may alter, and what it takes to take them back."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sixfold.contracts import Change, HeadId
from sixfold.geometry.hexgrid import HexGrid
from sixfold.governor import journal
from sixfold.governor.guard import Before, Guard
from sixfold.governor.meter import Meter
from sixfold.governor.rewind import Rewind
from sixfold.governor.step import Decisions
from sixfold.governor.watch.layer import Layer
from sixfold.governor.watch.layout import Piece


class Subject:
    """What changes apply to: weights and scales of heads, terms, shields, the run itself.

    Args:
        model: what is trained.
        optimizer: what moves it; without it nothing can be shielded.
        meter: what finds the layers.
        before: called with the norm of the gradients before each step; True skips it.
        parts: scheduler and scaler, which go back with the model.

    Attributes:
        now: steps made so far.
        terms: floor and coefficient of the entropy of heads that are held.
        kept: weights that changes have replaced, by the change's name and target.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        meter: Meter,
        before: Before,
        parts: Sequence[Any],
    ) -> None:
        self.model, self.optimizer, self.meter, self.now = model, optimizer, meter, 0
        self.terms: dict[HeadId, tuple[float, float]] = {}
        self.kept: dict[tuple[str, HeadId], list[list[Tensor]]] = {}
        self.guard = None if optimizer is None else Guard(optimizer, before)
        self.rewind = Rewind(model, [p for p in (optimizer, *parts) if p is not None])

    @property
    def layers(self) -> list[Layer]:
        """The attention layers found; a foreign model's after its first pass."""
        return self.meter.layers

    @property
    def grid(self) -> HexGrid | None:
        """The hexagonal grid of the heads, if they sit on one."""
        return self.layers[0].grid if self.layers else None

    @property
    def again(self) -> tuple[Any, ...]:
        """Batches of `data` that come again before new ones."""
        return tuple(self.rewind.again)

    @property
    def shields(self) -> dict[str, int]:
        """By how many powers of two ``lr`` and ``weight_decay`` are divided in each step.

        Raises ValueError where no optimizer was given.
        """
        if self.guard is None:
            raise ValueError("a shield needs the optimizer: give it at attach")
        return self.guard.shields

    def carry_out(self, decisions: Decisions) -> list[dict[str, Any]]:
        """Take changes back and make new ones; returns what the model refused, as rows."""
        makes = [(item, item.change.undo) for item in decisions.undone]
        makes += [(item, item.change.apply) for item in decisions.applied]
        refused = []
        for item, make in makes:
            try:
                make(self)
            except (ValueError, KeyError, IndexError) as error:
                row = journal.refused_row(self.now, item.number, item.change, error)
                warnings.warn(row["text"], stacklevel=5)
                refused.append(row)
        self.rewind.keep(decisions.copies)
        return refused

    def penalty(self) -> Tensor | None:
        """The entropy term of the pass just made, to be added to the loss; None when there is none.

        sum over held heads of coefficient * max(0, floor - H_h).
        """
        total = None
        for number, probe in self.meter.probes.items():
            if probe.held is None:
                continue
            wanted = [self.terms[HeadId(number, head)] for head in probe.hold]
            floors, coefficients = torch.tensor(wanted, device=probe.held.device).T
            term = (coefficients * (floors - probe.held).clamp(min=0)).sum()
            total, probe.held = term if total is None else total + term, None
        return total

    @torch.no_grad()
    def forget(self, piece: Piece) -> None:
        """Clear the optimizer's moments of a part of a parameter."""
        if self.optimizer is None:
            return
        for value in self.optimizer.state.get(piece.parameter, {}).values():
            if isinstance(value, Tensor) and value.shape == piece.parameter.shape:
                value[piece.index] = 0

    @contextmanager
    def in_force(self, change: Change) -> Iterator[None]:
        """A change is in force inside; what it did to the weights is the caller's to restore."""
        before = self.forces()
        change.apply(self)
        try:
            yield
        finally:
            self.restore(before)

    def forces(self) -> dict[str, Any]:
        """Terms, shields and bound in force, as plain JSON values."""
        return {
            "terms": [[*target, *term] for target, term in self.terms.items()],
            "shields": {} if self.guard is None else dict(self.guard.shields),
            "bound": None if self.guard is None else self.guard.bound,
        }

    def restore(self, forces: Mapping[str, Any]) -> None:
        """Put into force what `forces` gave."""
        self.terms = {HeadId(layer, head): (floor, c) for layer, head, floor, c in forces["terms"]}
        if self.guard is not None:
            self.guard.shields |= forces["shields"]
            self.guard.bound = forces["bound"]
