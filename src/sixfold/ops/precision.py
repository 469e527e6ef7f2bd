"""What half precision must not touch: features and frames are built wide and rounded once."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def wide(entries: Tensor) -> Tensor:
    """In float32, or wider where it already is."""
    return entries.to(torch.promote_types(entries.dtype, torch.float32))


def exact(entries: Tensor) -> AbstractContextManager[object]:
    """No autocast on the device of `entries`."""
    kind = entries.device.type
    if not torch.amp.is_autocast_available(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)
