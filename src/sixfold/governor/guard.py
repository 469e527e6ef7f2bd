"""The governor's hand on the optimizer: what it sees before a step, and how it tempers it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Guard:
    """Hooks of an optimizer: the norm of all gradients, skipped steps, shielded rates.

    Args:
        optimizer: what moves the weights.
        before: called with the norm before each step; True skips it.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, before: Callable[[float], bool]) -> None:
        self.optimizer, self.before = optimizer, before
        self.shield = 0
        self._rates: list[float | Tensor] = []
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def _before(self, optimizer: torch.optim.Optimizer, *unused: Any) -> None:  # noqa: ARG002
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0
        if self.before(norm):
            for parameter in parameters:
                parameter.grad = None
        if self.shield:
            self._rates = [group["lr"] for group in optimizer.param_groups]
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * 2.0**-self.shield

    def _after(self, optimizer: torch.optim.Optimizer, *unused: Any) -> None:  # noqa: ARG002
        for group, rate in zip(optimizer.param_groups, self._rates, strict=False):
            group["lr"] = rate
        self._rates = []

    def remove(self) -> None:
        """Let go of the optimizer."""
        for handle in self._handles:
            handle.remove()
