"""The data sets whose sequences ask: drawn anew for every step, with answers at a few places."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import torch

from sixfold.contracts import Batch
from sixfold.errors import DataError

IGNORED = -100
"""The target of a token that is not asked for, which no loss counts."""

Draw = Callable[[np.random.Generator, int], Batch]
"""So many sequences from a generator: inputs and targets (N, n)."""


@dataclass(frozen=True, eq=False)
class Questions:
    """Sequences that are never seen twice; where something is asked, the target is the next token.

    Elsewhere it is `IGNORED`. A batch is a function of (seed, step), and of `world`, the seed of
    the data set, from which the validation set is drawn as well.

    Raises DataError for a validation set without a sequence.
    """

    objective: ClassVar[Literal["tokens"]] = "tokens"

    draw: Draw
    vocab_size: int
    context: int
    validation_size: int
    world: int
    validation: Batch = field(init=False)

    def __post_init__(self) -> None:
        if self.validation_size < 1:
            raise DataError(f"validation must be at least 1 sequence, not {self.validation_size}")
        rng = np.random.default_rng(np.random.SeedSequence(self.world))
        object.__setattr__(self, "validation", self.draw(rng, self.validation_size))

    def train_batch(self, seed: int, step: int, size: int) -> Batch:
        """Fresh sequences, (size, context) both."""
        if size < 1:
            raise DataError(f"size must be at least 1, not {size}")
        source = np.random.SeedSequence((self.world, seed), spawn_key=(step,))
        return self.draw(np.random.default_rng(source), size)

    def validation_batches(self, size: int) -> Iterator[Batch]:
        """Every validation sequence once, in order: (<= size, context) both."""
        if size < 1:
            raise DataError(f"size must be at least 1, not {size}")
        return map(Batch, self.validation.inputs.split(size), self.validation.targets.split(size))


def asked(sequences: np.ndarray, places: np.ndarray) -> Batch:
    """Sequences (N, n + 1) as inputs (N, n) and, at `places` (N, k) of the inputs, the next tokens.

    >>> asked(np.array([[5, 6, 7, 8]]), np.array([[1]]))
    Batch(inputs=tensor([[5, 6, 7]]), targets=tensor([[-100,    7, -100]]))
    """
    inputs, following = sequences[:, :-1], sequences[:, 1:]
    targets = np.full_like(following, IGNORED)
    np.put_along_axis(targets, places, np.take_along_axis(following, places, 1), 1)
    return Batch(torch.from_numpy(inputs.copy()), torch.from_numpy(targets))


def distinct(rng: np.random.Generator, shape: tuple[int, ...], among: int) -> np.ndarray:
    """Different numbers of [0, among) in random order, in each row of an array of that shape."""
    return rng.random((*shape[:-1], among)).argsort(-1)[..., : shape[-1]]
