"""What a governor may be put on: a model and its optimizer, and no other governor's."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

from sixfold.governor.watch.watch import may_attend

ATTACHED: weakref.WeakSet[Any] = weakref.WeakSet()
"""Every `LeadMetaArchitect` that has not let go."""

OPTIMIZER = ("param_groups", "state", "state_dict", "register_step_pre_hook")
"""What is used of an optimizer: one that wraps another and has these will do."""


def check_own(model: Any, optimizer: Any) -> None:
    """Raise ValueError for what is no model or no optimizer, and where one moves nothing of it."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, got {model!r}")
    if next(model.parameters(), None) is None:
        raise ValueError(f"model must have parameters: this {type(model).__name__} has none")
    if optimizer is None:
        return
    if isinstance(optimizer, type) or not all(hasattr(optimizer, name) for name in OPTIMIZER):
        raise ValueError(f"optimizer must be a torch.optim.Optimizer or None, got {optimizer!r}")
    moved = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if moved and not moved & {id(p) for p in model.parameters()}:
        raise ValueError(
            f"this {type(optimizer).__name__} moves no parameter of this {type(model).__name__}: "
            "build the optimizer after the model, from its parameters"
        )


def check_free(model: nn.Module, optimizer: Any) -> None:
    """Raise ValueError where a governor is at work on a model's layers or its optimizer already."""
    mine = set(model.modules())
    for other in ATTACHED:
        if other.model is model:
            raise ValueError("this model has a governor already: detach() it first")
        shared = mine & set(other.model.modules())
        if any(module in (model, other.model) or may_attend(module) for module in shared):
            raise ValueError(
                f"this {type(model).__name__} shares layers with a {type(other.model).__name__} "
                "that has a governor already: detach() it first, or govern the whole alone"
            )
        if optimizer is not None and other.optimizer is optimizer:
            raise ValueError(
                f"this {type(optimizer).__name__} has a governor already, that of another model: "
                "give each model an optimizer of its own, or govern one module that holds both"
            )
