"""Attention over features on PyTorch's fused kernels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from sixfold.contracts import Features, Visibility
from sixfold.ops.attend.features import equal_widths
from sixfold.ops.attend.reference import visible


def blind_rows(mask: Tensor) -> Tensor:
    """Rows of a mask that see no key at all, (..., n, 1)."""
    seen = mask if mask.dtype == torch.bool else ~mask.isneginf()
    return ~seen.any(-1, keepdim=True)


def attend(features: Features, value: Tensor, visibility: Visibility, dropout: float) -> Tensor:
    """Same as the reference, without ever holding the weights."""
    query, key, scale = features
    width = value.shape[-1]
    if key.shape[1] != value.shape[1]:
        # heads that share keys need not share values, nor the other way round
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    query, key, value = equal_widths(query, key, value)
    n, m = query.shape[-2], key.shape[-2]
    # the kernels align causality upper-left: theirs equals ours only for a square without a mask,
    # and some empty queries before the first cost less than a mask
    square, empty = False, 0
    # a branch, because under a compiler the sizes may be symbolic and the kernel wants a plain bool
    if visibility.is_causal and visibility.mask is None and n <= m <= n + n // 4:
        square, empty = True, m - n
        query = pad(query, (0, 0, empty, 0)) if empty else query
    mask = None if square else visible(visibility, n, m, query.device)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(query.dtype)
    out = scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=square, scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    if query.device.type == "cpu":
        # this kernel gives 0 for a row of NaN: a broken model must not look alive
        wide = torch.promote_types(query.dtype, torch.float32)  # half precision would overflow
        asked = query.detach().sum(-1, keepdim=True, dtype=wide)
        answers = key.detach().sum((-2, -1), dtype=wide)[..., None, None]
        lost = asked + answers.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        out = out.masked_fill(lost.isnan(), float("nan"))
    # kernels differ on rows that see nothing (zero or NaN by version and device): decide here
    out = out[:, :, empty:, :width]
    return out if mask is None else out.masked_fill(blind_rows(mask), 0.0)
