"""The three kinds of data set: token streams, labelled examples, states.

A batch is a function of (seed, step): the two are hashed by `numpy.random.SeedSequence`, so a
resumed run needs no sampler state. NumPy draws rather than `torch.Generator`, whose CPU form keeps
32 bits of its seed, so that a long run would meet equal batches at unequal steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from sixfold.contracts import Batch
from sixfold.errors import DataError


class Tokenizer(Protocol):
    """Text to ids in [0, vocab_size) and back."""

    @property
    def vocab_size(self) -> int:
        """How many ids there are."""

    def encode(self, text: str) -> Tensor:
        """Ids (n,) of a text, int64."""

    def decode(self, ids: Iterable[int] | Tensor) -> str:
        """The text of ids (n,)."""

    def to_json(self) -> str:
        """Everything the module's ``from_json`` needs."""


@dataclass(frozen=True, eq=False)
class TokenStream:
    """One long text as ids, cut into windows; a window's targets are its inputs shifted by one.

    Training draws windows uniformly with replacement. Validation reads the text once from left to
    right, so that every token but the first is a target exactly once.

    Raises DataError for ids outside the vocabulary, or a text too short for `context`.
    """

    objective: ClassVar[Literal["tokens"]] = "tokens"

    train: Tensor
    validation: Tensor
    context: int
    tokenizer: Tokenizer

    def __post_init__(self) -> None:
        _check_positive(context=self.context)
        for name, ids in (("train", self.train), ("validation", self.validation)):
            _check_labels(f"{name} tokens", ids, self.vocab_size)
        if len(self.train) <= self.context:
            raise DataError(
                f"the train text has {len(self.train)} tokens, but a context of {self.context} "
                f"needs {self.context + 1}; give more text or a shorter context"
            )
        if len(self.validation) < 2:
            raise DataError(
                f"the validation text has {len(self.validation)} tokens, but a target needs 2; "
                "give more text or a larger validation_fraction"
            )

    @property
    def vocab_size(self) -> int:
        """How many token ids there are."""
        return self.tokenizer.vocab_size

    def train_batch(self, seed: int, step: int, size: int) -> Batch:
        """Random windows: inputs and targets (size, context)."""
        _check_positive(size=size)
        starts = _generator(seed, step).integers(0, len(self.train) - self.context, size)
        windows = torch.from_numpy(starts)[:, None] + torch.arange(self.context)
        return Batch(self.train[windows], self.train[windows + 1])

    def validation_batches(self, size: int) -> Iterator[Batch]:
        """Adjacent windows (<= size, context); a shorter last window is a batch of its own."""
        _check_positive(size=size)
        inputs, targets = self.validation[:-1], self.validation[1:]
        whole = len(inputs) // self.context * self.context
        if whole:
            shape = (-1, self.context)
            yield from _slices(Batch(inputs[:whole].view(shape), targets[:whole].view(shape)), size)
        if whole < len(inputs):
            yield Batch(inputs[None, whole:], targets[None, whole:])


@dataclass(frozen=True, eq=False)
class LabelledExamples:
    """Inputs (N, ...) with one label each: targets (N,) int64 in [0, num_classes).

    `tokenizer` is the one that made the inputs when these are token ids, None otherwise.

    Raises DataError for empty data, unequal lengths, NaN or Inf, or a label outside the range.
    """

    objective: ClassVar[Literal["labels"]] = "labels"

    train: Batch
    validation: Batch
    num_classes: int
    tokenizer: Tokenizer | None = None

    def __post_init__(self) -> None:
        for name, examples in (("train", self.train), ("validation", self.validation)):
            _check_examples(name, examples)
            _check_labels(f"{name} labels", examples.targets, self.num_classes)
            if self.tokenizer is not None:
                _check_labels(
                    f"{name} tokens", examples.inputs.flatten(), self.tokenizer.vocab_size
                )

    def train_batch(self, seed: int, step: int, size: int) -> Batch:
        """The next `size` examples of a stream of shuffled epochs: (size, ...) and (size,)."""
        return _epoch_batch(self.train, seed, step, size)

    def validation_batches(self, size: int) -> Iterator[Batch]:
        """Every validation example once, in order: (<= size, ...) and (<= size,)."""
        return _slices(self.validation, size)


@dataclass(frozen=True, eq=False)
class States:
    """Inputs (N, ...) and the real-valued targets (N, ...) they lead to.

    Raises DataError for empty data, unequal lengths, NaN or Inf.
    """

    objective: ClassVar[Literal["states"]] = "states"

    train: Batch
    validation: Batch

    def __post_init__(self) -> None:
        for name, examples in (("train", self.train), ("validation", self.validation)):
            _check_examples(name, examples)

    def train_batch(self, seed: int, step: int, size: int) -> Batch:
        """The next `size` examples of a stream of shuffled epochs."""
        return _epoch_batch(self.train, seed, step, size)

    def validation_batches(self, size: int) -> Iterator[Batch]:
        """Every validation example once, in order."""
        return _slices(self.validation, size)


# ---------------------------------------------------------------- sampling


def _generator(seed: int, step: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(step,)))


# 8 entries: a batch asks for the epochs it touches, and a comparison runs a few seeds in turn
@lru_cache(maxsize=8)
def _permutation(seed: int, epoch: int, count: int) -> Tensor:
    return torch.from_numpy(_generator(seed, epoch).permutation(count))


def _epoch_batch(examples: Batch, seed: int, step: int, size: int) -> Batch:
    """Entries [step * size, (step + 1) * size) of the permutations of epochs 0, 1, ... in a row."""
    _check_positive(size=size)
    count, first = len(examples.inputs), step * size
    epochs = range(first // count, (first + size - 1) // count + 1)
    stream = torch.cat([_permutation(seed, epoch, count) for epoch in epochs])
    chosen = stream[first % count :][:size]
    return Batch(examples.inputs[chosen], examples.targets[chosen])


def _slices(examples: Batch, size: int) -> Iterator[Batch]:
    _check_positive(size=size)
    return map(Batch, examples.inputs.split(size), examples.targets.split(size))


# ---------------------------------------------------------------- checks


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise DataError(f"{name} must be at least 1, not {value}")


def _check_examples(name: str, examples: Batch) -> None:
    inputs, targets = examples
    if len(inputs) != len(targets):
        raise DataError(f"{name} has {len(inputs)} inputs, but {len(targets)} targets")
    if not len(inputs):
        raise DataError(f"{name} has no examples")
    _check_finite(f"{name} inputs", inputs)
    _check_finite(f"{name} targets", targets)


def _check_finite(name: str, values: Tensor) -> None:
    bad = ~values.isfinite()
    if bad.any():
        first = tuple(bad.nonzero()[0].tolist())
        raise DataError(
            f"{name} hold {int(bad.sum())} NaN or infinite values, the first at index {first}; "
            "repair or remove these examples"
        )


def _check_labels(name: str, labels: Tensor, count: int) -> None:
    if labels.ndim != 1 or labels.dtype != torch.int64:
        raise DataError(f"{name} must be a 1-D int64 tensor, not {labels.ndim}-D {labels.dtype}")
    bad = (labels < 0) | (labels >= count)
    if bad.any():
        first = int(bad.nonzero()[0])
        raise DataError(
            f"{name} must lie in [0, {count}), but {int(bad.sum())} do not; "
            f"the first is {int(labels[first])} at index {first}"
        )
