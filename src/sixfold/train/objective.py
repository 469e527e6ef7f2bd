"""What a model is trained to do, by the kind of its data."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from sixfold.contracts import Batch

UNITS = {"tokens": "nats/token", "labels": "nats/example", "states": "1 (mean squared)"}


def loss(objective: str, model: nn.Module, batch: Batch) -> Tensor:
    """Mean loss of a model on a batch."""
    return compare(objective, model(batch.inputs), batch)


def compare(objective: str, predicted: Tensor, batch: Batch) -> Tensor:
    """Mean loss of a prediction: cross-entropy for tokens and labels, squared error for states."""
    if objective == "states":
        return mse_loss(predicted.float(), batch.targets)
    return cross_entropy(predicted.float().flatten(0, -2), batch.targets.flatten())


class Validation(NamedTuple):
    """The whole validation set: mean loss, and the share of right answers for labels."""

    loss: float
    accuracy: float | None
