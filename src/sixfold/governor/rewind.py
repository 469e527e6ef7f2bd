"""Copies of a run in memory, and the way back to them."""

from __future__ import annotations

import copy
import random
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor, nn

from sixfold.train.checkpoint import random_states, set_random_states


class Moment(NamedTuple):
    """Everything that the next step of a run depends on, but its batch.

    aside: buffers that are no part of the model's state; training: the flag of every module.
    """

    model: dict[str, Tensor]
    aside: dict[str, Tensor]
    parts: tuple[dict[str, Any], ...]
    random: dict[str, Tensor]
    others: tuple[Any, Any]
    training: dict[str, bool]


class Rewind:
    """Keeps copies of a run, and the batches since the oldest of them.

    Args:
        model: what is trained.
        parts: whatever else has ``state_dict`` and ``load_state_dict``: optimizer, scheduler,
            scaler.
    """

    def __init__(self, model: nn.Module, parts: Sequence[Any]) -> None:
        self.model, self.parts = model, tuple(parts)
        self.moments: dict[int, Moment] = {}
        self.batches: list[tuple[int, Any]] = []
        self.again: deque[Any] = deque()
        self.given_up: Moment | None = None
        self.queued = 0
        self.now = 0
        self.recording = False

    def data(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The same batches; after a return those that were good come again."""
        if self.recording and self.now == 0:
            self.moments[0] = self.copied()
        yield from self._repeated()
        for batch in batches:
            yield self._given(batch)
            yield from self._repeated()

    def _repeated(self) -> Iterator[Any]:
        while self.again:
            yield self._given(self.again.popleft())

    def _given(self, batch: Any) -> Any:
        if self.recording:
            self.batches.append((self.now + 1, batch))
        return batch

    def clear(self) -> None:
        """Hold nothing any more; batches pass through."""
        self.recording, self.given_up = False, None
        self.moments.clear()
        self.batches.clear()

    def keep(self, steps: Sequence[int]) -> None:
        """Have copies of exactly these steps; the one of this moment is made now."""
        if not self.moments and not self.batches:
            return
        for step in steps:
            if step == self.now and step not in self.moments:
                self.moments[step] = self.copied()
        self.moments = {step: self.moments[step] for step in steps if step in self.moments}
        oldest = min(self.moments, default=self.now)
        self.batches = [(step, batch) for step, batch in self.batches if step > oldest]

    def copied(self) -> Moment:
        """A copy of this moment."""
        state, buffers = self.model.state_dict(), dict(self.model.named_buffers())
        return Moment(
            {name: tensor.clone() for name, tensor in state.items()},
            {name: tensor.clone() for name, tensor in buffers.items() if name not in state},
            tuple(copy.deepcopy(part.state_dict()) for part in self.parts),
            random_states(),
            (random.getstate(), numpy.random.get_state()),  # noqa: NPY002 - what loaders may use
            {name: module.training for name, module in self.model.named_modules()},
        )

    def put(self, moment: Moment) -> None:
        """Make the run what it was, to the bit."""
        self.model.load_state_dict(moment.model)
        for name, tensor in moment.aside.items():
            put_buffer(self.model, name, tensor)
        for part, state in zip(self.parts, moment.parts, strict=True):
            part.load_state_dict(copy.deepcopy(state))
        set_random_states(moment.random)
        random.setstate(moment.others[0])
        numpy.random.set_state(moment.others[1])  # noqa: NPY002
        for name, module in self.model.named_modules():
            module.training = moment.training.get(name, module.training)

    def back(self, to: int, since: int) -> None:
        """Return to after step `to`; the batches before step `since` come again, later ones never.

        Raises KeyError where no copy of that step is kept.
        """
        moment = self.moments[to]
        self.given_up = self.copied()
        self.put(moment)
        good = [batch for step, batch in self.batches if to < step < since]
        self.batches = [(step, batch) for step, batch in self.batches if step <= to]
        self.queued = len(self.again)
        self.again = deque([*good, *self.again])

    def forward(self) -> None:
        """Return to the run that was given up; batches already repeated are not taken back.

        Those that were to come again before it was given up still are.
        """
        if self.given_up is None:
            raise RuntimeError("there is no run to return to: nothing was given up")
        self.put(self.given_up)
        self.given_up = None
        while len(self.again) > self.queued:
            self.again.popleft()


@torch.no_grad()
def put_buffer(model: nn.Module, name: str, value: Tensor) -> None:
    """Give a buffer its earlier value; one that has another shape by now gives way to it."""
    path, _, own = name.rpartition(".")
    module = model.get_submodule(path)
    buffer = getattr(module, own)
    if buffer is not None and buffer.shape == value.shape:
        buffer.copy_(value)
    else:
        setattr(module, own, value.clone())
