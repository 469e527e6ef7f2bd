"""What every test shares: one thread, no accelerator in the way, small data."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def ungoverned() -> Iterator[None]:
    """No test leaves a governor at work: an armed one holds the compiler back."""
    yield
    known = sys.modules.get("sixfold.governor.architect")
    for governor in list(known.ATTACHED) if known is not None else ():
        governor.detach()
