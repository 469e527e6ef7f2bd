"""The governor's hand on the optimizer: what it sees before a step, and how it tempers it."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

Before = Callable[[float, float], bool]
Closure = Callable[[], Any]


class Guard:
    """Hooks of an optimizer: the norm of all gradients, skipped or bounded steps, shields.

    A shield divides a setting of every parameter group by a power of two inside the optimizer's
    step alone: whoever schedules it, or looks, finds what they set. Where the step is given a
    closure, gradients are seen when its first call has made them. Gradients that an optimizer
    unscales itself (a fused one under `torch.amp.GradScaler`) are seen without their scale; a step
    that the scaler has found to overflow is torch's to skip, and is not seen.

    Args:
        optimizer: what moves the weights.
        before: called with the norm and the scale before each step; True skips it.

    Raises:
        ValueError: for an optimizer that makes several passes in one step.

    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> weight.grad = torch.tensor([3.0, 4.0])
    >>> optimizer, seen = torch.optim.SGD([weight], lr=1.0), []
    >>> guard = Guard(optimizer, lambda norm, scale: bool(seen.append((norm, scale))))
    >>> guard.shields["lr"] = 2
    >>> optimizer.step()
    >>> seen, weight.tolist(), optimizer.param_groups[0]["lr"]
    ([(5.0, 1.0)], [-0.75, -1.0], 1.0)
    """

    def __init__(self, optimizer: torch.optim.Optimizer, before: Before) -> None:
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError("LBFGS makes several passes in one step: the governor needs one")
        self.optimizer, self.before = optimizer, before
        self.shields = {"lr": 0, "weight_decay": 0}
        self.bound: float | None = None
        self._usual: list[dict[str, Any]] = []
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def _before(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self._after(optimizer)  # a step that raised has left its shields up
        # what stands between the optimizer and us calls when the gradients are there
        direct = optimizer is self.optimizer
        if direct and callable(named.get("closure")):
            return args, {**named, "closure": self._first(named["closure"])}
        if direct and len(args) > 1 and callable(args[1]):
            return (args[0], self._first(args[1]), *args[2:]), named
        self._look(optimizer)
        return None

    def _first(self, closure: Closure) -> Closure:
        """The closure, behind whose first call the gradients are there."""
        looked = False

        @wraps(closure)
        def with_look() -> Any:
            nonlocal looked
            loss = closure()
            if not looked:
                looked = True
                self._look(self.optimizer)
            return loss

        return with_look

    @torch.no_grad()
    def _look(self, optimizer: torch.optim.Optimizer) -> None:
        """Read the gradients, skip or bound the step, and put the shields up."""
        overflow, scale = (getattr(optimizer, name, None) for name in ("found_inf", "grad_scale"))
        if overflow is not None and float(overflow):
            return
        scale = 1.0 if scale is None else float(scale)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in parameters if p.grad is not None]
        dense = [g.coalesce().values() if g.is_sparse else g for g in gradients]
        norm = float(torch.nn.utils.get_total_norm(dense)) / scale if dense else 0.0
        if self.before(norm, scale):
            for parameter in parameters:
                parameter.grad = None
        elif self.bound is not None and norm > self.bound:
            for gradient in gradients:
                gradient.mul_(self.bound / norm)
        self._shield(optimizer)

    def _shield(self, optimizer: torch.optim.Optimizer) -> None:
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
