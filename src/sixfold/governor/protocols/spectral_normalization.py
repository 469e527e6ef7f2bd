"""Divide one head's W_Q and W_K by their largest singular values.

W <- W / sigma_max(W): logits are then bounded by the norms of the inputs alone.
Source: Zhai et al., Stabilizing Transformer Training by Preventing Attention Entropy Collapse,
arXiv 2303.06296, section 3 (there in every step, with a learned factor).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sixfold.contracts import Expectation, HeadId
from sixfold.governor.alarms import Alarm
from sixfold.governor.protocols._weights import Weights


@dataclass(frozen=True)
class SpectralNormalization(Weights):
    """Give W_Q and W_K of one head spectral norm 1."""

    name: ClassVar[str] = "spectral_normalization"
    cost: ClassVar[str] = "the head forgets how sharply it attended"

    def altered(
        self,
        weight: Tensor,
        role: str,  # noqa: ARG002
        subject: Any,  # noqa: ARG002
        generator: torch.Generator,  # noqa: ARG002
    ) -> Tensor:
        """The weight over its largest singular value; a bias goes with its weight's own norm."""
        wide = weight.float()
        norm = torch.linalg.matrix_norm(wide, 2) if wide.ndim == 2 else wide.norm()
        return (wide / norm.clamp(min=1.0)).to(weight.dtype)


def build(target: HeadId, alarm: Alarm, within: int) -> SpectralNormalization:
    """The signal that alarmed must fall below where it is."""
    direction = "rise" if alarm.signal == "entropy" else "fall"
    expects = Expectation(alarm.signal, target, direction, alarm.value, within)
    return SpectralNormalization(target, expects)
