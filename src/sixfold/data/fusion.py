"""Sensor fusion: noisy readings of hidden values, each with its known deviation, and Bayes' answer.

    x_g ~ N(0, 1),   y_i ~ N(x_g(i), s_i^2),   g(i) = i mod G
    x_g | y ~ N(sum_i p_i y_i / (1 + sum_i p_i), 1 / (1 + sum_i p_i)),   p_i = 1 / s_i^2

Sums go over the readings of g. No answer has a smaller mean squared error than the posterior mean.
Source: Gelman et al., Bayesian Data Analysis, 3rd edition, section 2.5.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sixfold.contracts import Batch
from sixfold.data._kinds import States
from sixfold.errors import DataError

_VALIDATION_FRACTION = 0.2


class Measured(NamedTuple):
    """What sensors say, and what there was: readings (N, n, 2) as in `build`, hidden (N, n)."""

    readings: Tensor
    hidden: Tensor


def build(
    *,
    sequences: int = 1280,
    values: int = 4,
    rounds: int = 8,
    quietest: float = 0.1,
    loudest: float = 3.0,
    seed: int = 0,
) -> States:
    """Beliefs in, beliefs out: (N, n, 2) of (mean, log deviation), float32, n = values * rounds.

    An input is a reading with the logarithm of its sensor's deviation; the target is the posterior
    of the value it measured, given the whole sequence. `values` hidden numbers are read in turn,
    `rounds` times each; the last fifth of the sequences is for validation.

    Raises DataError for fewer than two sequences, and as `draw`.

    >>> data = build()
    >>> data.train.inputs.shape, data.validation.targets.shape
    (torch.Size([1024, 32, 2]), torch.Size([256, 32, 2]))
    """
    if sequences < 2:
        raise DataError(f"sequences must be at least 2, not {sequences}: one is for validation")
    readings, _ = draw(
        np.random.default_rng(seed),
        sequences,
        values=values,
        rounds=rounds,
        quietest=quietest,
        loudest=loudest,
    )
    pairs = Batch(readings.float(), posterior(readings, values).float())
    cut = sequences - math.ceil(sequences * _VALIDATION_FRACTION)
    return States(Batch(*(x[:cut] for x in pairs)), Batch(*(x[cut:] for x in pairs)))


def miniature(*, seed: int = 0) -> States:
    """The same with two values read three times: 32 sequences for training, 8 for validation."""
    return build(sequences=40, values=2, rounds=3, seed=seed)


def draw(
    rng: np.random.Generator,
    count: int,
    *,
    values: int = 4,
    rounds: int = 8,
    quietest: float = 0.1,
    loudest: float = 3.0,
) -> Measured:
    """`count` sequences in float64; log deviations are uniform from `quietest` to `loudest`.

    Raises DataError without a sequence, a value or a round, and for deviations out of order.
    """
    for name, number in (("count", count), ("values", values), ("rounds", rounds)):
        if number < 1:
            raise DataError(f"{name} must be at least 1, not {number}")
    if not 0 < quietest <= loudest < math.inf:
        raise DataError(
            f"deviations need 0 < quietest <= loudest < inf, not {quietest} and {loudest}"
        )
    hidden = np.tile(rng.standard_normal((count, values)), rounds)
    log_deviation = rng.uniform(math.log(quietest), math.log(loudest), hidden.shape)
    reading = hidden + np.exp(log_deviation) * rng.standard_normal(hidden.shape)
    pairs = torch.from_numpy(np.stack([reading, log_deviation], axis=-1))
    return Measured(pairs, torch.from_numpy(hidden))


def posterior(readings: Tensor, values: int) -> Tensor:
    """Mean and log deviation, at each token, of the value it measured: (..., n, 2) to (..., n, 2).

    Raises DataError when n is no multiple of `values`.

    >>> two = torch.tensor([[2.0, 0.0], [1.0, 0.0]])  # both of one value, both of deviation 1
    >>> posterior(two, values=1)[0]  # (2 + 1) / (1 + 2), and log of 1 / sqrt(3)
    tensor([ 1.0000, -0.5493])
    """
    n = readings.shape[-2]
    if values < 1 or n % values:
        raise DataError(f"{n} readings cannot be of {values} values in turn")
    reading, log_deviation = readings.unflatten(-2, (-1, values)).unbind(-1)
    precision = torch.exp(-2 * log_deviation)
    total = 1 + precision.sum(-2)
    belief = torch.stack([(precision * reading).sum(-2) / total, -0.5 * total.log()], dim=-1)
    return belief.repeat(*(1,) * (belief.ndim - 2), n // values, 1)
