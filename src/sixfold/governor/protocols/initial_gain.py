"""Begin again with smaller weights, where those of the beginning blow up whatever passes.

W <- W min(1, sqrt(2) / g), g = ||W||_F / sqrt(outputs), of every linear map, in the run as it was
before its first step. A random map makes its input g times as large, and a rectifier behind it
takes sqrt(2) away: outputs and gradients of L such layers are of the size (g / sqrt(2))^L.
Source: He et al., Delving Deep into Rectifiers, arXiv 1502.01852, section 2.2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from sixfold.contracts import WHOLE, Expectation
from sixfold.governor.alarms import Alarm
from sixfold.governor.protocols.rollback import Rollback

GAIN = math.sqrt(2)
LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class InitialGain(Rollback):
    """The run from its beginning, with no linear map of a gain above sqrt(2)."""

    name: ClassVar[str] = "initial_gain"
    cost: ClassVar[str] = "the first step is made again; initial weights are not the user's"

    @torch.no_grad()
    def apply(self, subject: Any) -> None:
        """Go back, and make the gains that are too large sqrt(2)."""
        super().apply(subject)
        for module in subject.model.modules():
            # a weight that is put together of others in every pass is not there to be scaled
            if isinstance(module, LINEAR) and isinstance(module.weight, nn.Parameter):
                norm = float(torch.linalg.vector_norm(module.weight.float()))
                gain = norm / len(module.weight) ** 0.5
                module.weight.mul_(GAIN / max(gain, GAIN))


def build(alarm: Alarm, within: int) -> InitialGain:
    """From before the first step; steps must then move weights by less than the alarm's limit."""
    expects = Expectation(alarm.signal, alarm.target, "fall", alarm.limit, within)
    return InitialGain(WHOLE, 0, alarm.step + 1, expects)
