"""One optimizer step, the same in training, in a fork of it and on several processes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sixfold.contracts import Batch
from sixfold.train.distributed import ALONE, World
from sixfold.train.objective import loss

PRECISIONS = ("fp32", "bf16")


class StepSettings(NamedTuple):
    """How one step is computed."""

    objective: str
    accumulation: int = 1
    precision: str = "fp32"
    clip_norm: float | None = 1.0


class StepReport(NamedTuple):
    """What one step measured: mean loss without penalties, gradient norm before clipping."""

    loss: float
    gradient_norm: float


def slices(batch: Batch, accumulation: int, world: World) -> list[Batch]:
    """This process's share of the step's batch, in equal parts."""
    parts = accumulation * world.size
    size = len(batch.inputs) // parts
    mine = range(world.rank * accumulation, (world.rank + 1) * accumulation)
    return [Batch(*(t[i * size : (i + 1) * size].to(world.device) for t in batch)) for i in mine]


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Mixed precision in bfloat16, or nothing."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    settings: StepSettings,
    penalty: Callable[[], Tensor | None] = lambda: None,
    world: World = ALONE,
) -> StepReport:
    """Forward, backward and move, once.

    Args:
        model: the model, wrapped for several processes where there are.
        optimizer: moves the model's parameters.
        batch: the whole batch of the step; each process takes its slices.
        settings: accumulation, precision, clipping.
        penalty: called after each forward pass; its value joins the loss that is differentiated.
        world: this process among all.
    """
    parts = slices(batch, settings.accumulation, world)
    total = torch.zeros((), device=world.device)
    for number, part in enumerate(parts, start=1):
        several = isinstance(model, DistributedDataParallel)
        with model.no_sync() if several and number < len(parts) else nullcontext():
            with autocast(settings.precision, world.device):
                value = loss(settings.objective, model, part)
            extra = penalty()
            whole = value if extra is None else value + extra
            (whole / len(parts)).backward()
        total += value.detach() / len(parts)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if settings.clip_norm is None:
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    else:
        norm = torch.nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return StepReport(world.mean(total).item(), norm.item())
