"""The governor's hand on the optimizer: what it sees before a step, and how it tempers it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Guard:
    """Hooks of an optimizer: the norm of all gradients, skipped or bounded steps, shields.

    A shield divides a setting of every parameter group by a power of two inside the optimizer's
    step alone: whoever schedules it, or looks, finds what they set.

    Args:
        optimizer: what moves the weights.
        before: called with the norm before each step; True skips it.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, before: Callable[[float], bool]) -> None:
        self.optimizer, self.before = optimizer, before
        self.shields = {"lr": 0, "weight_decay": 0}
        self.bound: float | None = None
        self._usual: list[dict[str, Any]] = []
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def _before(self, optimizer: torch.optim.Optimizer, *unused: Any) -> None:  # noqa: ARG002
        self._after(optimizer)  # a step that raised has left its shields up
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in parameters if p.grad is not None]
        gradients = [g.coalesce().values() if g.is_sparse else g for g in gradients]
        norm = float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0
        if self.before(norm):
            for parameter in parameters:
                parameter.grad = None
        elif self.bound is not None and norm > self.bound:
            torch._foreach_mul_(gradients, self.bound / norm)
        up = {name: power for name, power in self.shields.items() if power}
        self._usual = [
            {name: group[name] for name in up if name in group} for group in optimizer.param_groups
        ]
        for group, usual in zip(optimizer.param_groups, self._usual, strict=True):
            group.update({name: value * 2.0 ** -up[name] for name, value in usual.items()})

    def _after(self, optimizer: torch.optim.Optimizer, *unused: Any) -> None:  # noqa: ARG002
        for group, usual in zip(optimizer.param_groups, self._usual, strict=False):
            group.update(usual)
        self._usual = []

    def remove(self) -> None:
        """Let go of the optimizer."""
        for handle in self._handles:
            handle.remove()
