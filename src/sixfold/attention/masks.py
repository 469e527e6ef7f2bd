"""Masks: True where a query may attend."""

from __future__ import annotations

import torch
from torch import Tensor

from sixfold.contracts import Visibility
from sixfold.ops.attend.reference import restrict


def visibility_of(
    attn_mask: Tensor | None,
    key_mask: Tensor | None,
    shape: tuple[int, int, int, int],
    *,
    is_causal: bool,
) -> Visibility:
    """Join the caller's masks into one that broadcasts to `shape` (b, h, n, m).

    Raises ValueError for a shape or dtype that cannot be meant.
    """
    batch, _, n, m = shape
    for name, mask in (("attn_mask", attn_mask), ("key_mask", key_mask)):
        if mask is not None and not isinstance(mask, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(mask).__name__}")
    if attn_mask is not None:
        mask = attn_mask[:, None] if attn_mask.ndim == 3 else attn_mask
        axes = zip(mask.shape, (n, m) if mask.ndim == 2 else shape, strict=False)
        if mask.ndim not in (2, 4) or any(size not in (1, whole) for size, whole in axes):
            raise ValueError(
                f"attn_mask must be (n, m), (b, n, m) or (b, h, n, m) = {shape}, "
                f"got {tuple(attn_mask.shape)}"
            )
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise ValueError(
                f"attn_mask must be boolean (True = may attend) or float, got {mask.dtype}"
            )
        attn_mask = mask
    if key_mask is not None:
        if key_mask.shape != (batch, m) or key_mask.dtype != torch.bool:
            raise ValueError(
                f"key_mask must be boolean (True = a real key) of shape (b, m) = {(batch, m)}, "
                f"got {key_mask.dtype} {tuple(key_mask.shape)}"
            )
        attn_mask = restrict(attn_mask, key_mask[:, None, None, :])
    return Visibility(attn_mask, is_causal)


def same_document(documents: Tensor) -> Tensor:
    """Mask that keeps packed documents apart: True where both tokens belong to one.

    documents (b, n): any number per token that tells its document; (b, n, n) out, an ``attn_mask``.
    Attention over the packed row then equals attention over each document alone: rotary positions
    and ALiBi are relative, learned positions have to start again by themselves.

    >>> same_document(torch.tensor([[0, 0, 1]]))[0].int().tolist()
    [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
    """
    if documents.ndim != 2:
        raise ValueError(f"documents must be (b, n), got {tuple(documents.shape)}")
    return documents[:, :, None] == documents[:, None, :]
