"""One process or several, started by ``torchrun``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel


class World(NamedTuple):
    """This process among all processes of the run."""

    rank: int
    size: int
    device: torch.device

    @property
    def leads(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def mean(self, value: Tensor) -> Tensor:
        """Mean over processes."""
        if self.size > 1:
            distributed.all_reduce(value)
            value = value / self.size
        return value

    def wait(self) -> None:
        """Go on when every process is here."""
        if self.size > 1:
            distributed.barrier()

    def wrap(self, model: nn.Module) -> nn.Module:
        """Average gradients over processes where there are several."""
        return DistributedDataParallel(model) if self.size > 1 else model

    def any(self, flag: bool) -> bool:  # noqa: FBT001
        """Whether it is so in any process."""
        if self.size == 1:
            return flag
        votes = torch.tensor(float(flag), device=self.device)
        distributed.all_reduce(votes, distributed.ReduceOp.MAX)
        return bool(votes)


ALONE = World(0, 1, torch.device("cpu"))


def leads() -> bool:
    """Whether this process is the one that writes and prints."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def world(device: str) -> Iterator[World]:
    """Join the processes ``torchrun`` started, or be alone; `device` is cpu, cuda, mps or auto."""
    if device == "auto":
        found = (
            torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        )
        device = found.type if found is not None else "cpu"
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if size > 1:
        distributed.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield World(rank, size, torch.device(device))
    finally:
        if size > 1:
            distributed.destroy_process_group()
