"""Optimizer and learning-rate schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from sixfold.discover import unknown

SCHEDULES = ("cosine", "linear", "constant")


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW and its schedule.

    Source of the defaults: nanoGPT's character recipe for a CPU.
    """

    learning_rate: float = 1e-3
    final_learning_rate: float = 1e-4
    schedule: str = "cosine"
    warmup: int = 100
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.99

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(unknown("optimizer.schedule", self.schedule, SCHEDULES))
        if self.learning_rate <= 0:
            raise ValueError(f"optimizer.learning_rate must be positive, got {self.learning_rate}")
        if self.warmup < 0:
            raise ValueError(f"optimizer.warmup must be 0 or more, got {self.warmup}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optimizer.{name} must be in [0, 1), got {getattr(self, name)}")

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of a step: linear warm-up to the peak, then the schedule to the end.

        >>> OptimizerSettings(learning_rate=1.0, final_learning_rate=0.0, warmup=10).rate(4, 100)
        0.5
        """
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        if self.schedule == "constant":
            return self.learning_rate
        done = (step - self.warmup) / max(1, steps - self.warmup)
        left = 0.5 * (1 + math.cos(math.pi * done)) if self.schedule == "cosine" else 1 - done
        return self.final_learning_rate + left * (self.learning_rate - self.final_learning_rate)


def build_optimizer(model: nn.Module, settings: OptimizerSettings) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only: gains and biases keep their size."""
    trained = [p for p in model.parameters() if p.requires_grad and p.numel()]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    betas = (settings.beta1, settings.beta2)
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=betas)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate
