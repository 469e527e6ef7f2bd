"""Stir one head's W_Q and W_K: W <- W + 0.1 rms(W) z, z standard normal.

The noise comes from a generator of its own, seeded by step and head: the run's stays untouched.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sixfold.contracts import Expectation, HeadId
from sixfold.governor.alarms import Alarm
from sixfold.governor.protocols._weights import Weights

SHARE = 0.1
"""Size of the noise over that of the weights."""


@dataclass(frozen=True)
class Perturbation(Weights):
    """Add a tenth of noise to W_Q and W_K of one head."""

    name: ClassVar[str] = "perturbation"
    cost: ClassVar[str] = "the head loses a tenth of its precision"

    def altered(
        self,
        weight: Tensor,
        role: str,  # noqa: ARG002
        subject: Any,  # noqa: ARG002
        generator: torch.Generator,
    ) -> Tensor:
        """The weight with noise."""
        noise = torch.randn(weight.shape, generator=generator).to(weight)
        return weight + SHARE * weight.float().square().mean().sqrt().to(weight) * noise


def build(target: HeadId, alarm: Alarm, within: int) -> Perturbation:
    """The signal that alarmed must move towards its limit."""
    direction = "rise" if alarm.signal == "entropy" else "fall"
    return Perturbation(target, Expectation(alarm.signal, target, direction, alarm.value, within))
