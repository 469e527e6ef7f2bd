"""Attention by distance on a GPU: tiles in Triton, deterministic, memory linear in length."""

from __future__ import annotations

import functools
import math
import os
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sixfold.contracts import Distances, Visibility
from sixfold.ops.distance.reference import check, check_transforms, once

BLOCK = 32
"""Queries, and keys, of a tile."""

KINDS = {1.0: 1, 2.0: 2, math.inf: 0}
"""The p that have programs of their own; -1 is any other."""


class Launch(NamedTuple):
    """What the programs need besides tensors that have gradients."""

    p: float
    heads: tuple[int, int]
    is_causal: bool


@functools.cache
def programs() -> ModuleType:
    """The Triton programs; ModuleNotFoundError saying what to install where Triton is missing."""
    try:
        from sixfold.ops.distance import _programs
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "triton":
            raise
        raise ModuleNotFoundError(
            "impl 'triton' needs Triton, which comes with PyTorch for CUDA: pip install triton",
            name=error.name,
        ) from error
    return _programs


def arguments(query: Tensor, value: Tensor, mask: Tensor | None, launch: Launch) -> dict[str, Any]:
    """Sizes, strides and kinds that every program takes."""
    (batch, heads), (_, d, n), (_, m, width) = launch.heads, query.shape, value.shape
    kind, strides = 0, (0, 0, 0, 0)
    if mask is not None:
        kind = 1 if mask.dtype == torch.bool else 2
        strides = mask.expand(batch, heads, n, m).stride()
    return {
        "n": n, "m": m, "d": d, "width": width, "heads": heads, "p": launch.p,
        "at_b": strides[0], "at_h": strides[1], "at_i": strides[2], "at_j": strides[3],
        "KIND": KINDS.get(launch.p, -1), "MASK": kind, "CAUSAL": launch.is_causal,
        "ROWS": BLOCK, "KEYS": BLOCK, "WIDTH": block_of(width),
    }  # fmt: skip


def block_of(width: int) -> int:
    """The power of two that holds `width`; a tile's product takes at least 16."""
    return max(16, 1 << (width - 1).bit_length())


def cells(mask: Tensor | None, otherwise: Tensor) -> Tensor:
    """The mask as numbers that a program can load."""
    if mask is None:
        return otherwise
    return mask.view(torch.uint8) if mask.dtype == torch.bool else mask


class TritonAttention(torch.autograd.Function):
    """softmax(-rate ||q - k||_p) v over (g, d, n), (g, d, m), (g, m, d_v) and rate (g,)."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, rate: Tensor, mask: Tensor | None,
        launch: Launch,
    ) -> Tensor:  # fmt: skip
        """The weighted values, (g, n, d_v)."""
        (g, _, n), width = query.shape, value.shape[2]
        out, lse = value.new_empty(g, n, width), query.new_empty(g, n)
        programs().attend[(-(-n // BLOCK), g)](
            query, key, value, rate, cells(mask, rate), out, lse,
            **arguments(query, value, mask, launch),
        )  # fmt: skip
        ctx.save_for_backward(query, key, value, rate, mask, out, lse)
        ctx.launch = launch
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of query, key, value, rate and, where asked for, a float mask."""
        return *TritonPull.apply(
            grad, *ctx.saved_tensors, ctx.launch, ctx.needs_input_grad[4]
        ), None


class TritonPull(torch.autograd.Function):
    """The gradients of `TritonAttention`, of which there are none."""

    @staticmethod
    def forward(  # noqa: PLR0913 - all that was saved
        ctx: Any, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, rate: Tensor,  # noqa: ARG004
        mask: Tensor | None, out: Tensor, lse: Tensor, launch: Launch, wanted: bool,  # noqa: FBT001
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        """Gradients of query, key, value, rate and, if `wanted`, of a float mask."""
        (g, d, n), m = query.shape, key.shape[2]
        grad = grad.contiguous()
        mean = (grad * out).sum(-1)
        # the gradient of a mask is as large as the mask; only then is a matrix held
        flows = query.new_zeros(g, n, m) if wanted else rate
        grad_query, grad_key = query.new_empty(g, n, d), key.new_empty(g, m, d)
        grad_value, rated = torch.empty_like(value), query.new_empty(g, n)
        given = (query, key, value, rate, cells(mask, rate), lse, mean, grad)
        common = arguments(query, value, mask, launch) | {"FEATURES": block_of(d)}
        programs().pull_queries[(-(-n // BLOCK), g)](
            *given, grad_query, rated, flows, FLOWS=wanted, **common
        )
        programs().pull_keys[(-(-m // BLOCK), g)](*given, grad_key, grad_value, **common)
        grad_mask = None
        if wanted:
            grad_mask = flows.unflatten(0, launch.heads).sum_to_size(mask.shape)
        return grad_query.mT, grad_key.mT, grad_value, rated.sum(1), grad_mask

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:  # noqa: ARG004
        """Raise RuntimeError by name."""
        raise once("triton")


def attend(rating: Distances, value: Tensor, visibility: Visibility, dropout: float) -> Tensor:
    """Same as the reference, in float32 tiles on a GPU (under TRITON_INTERPRET=1, anywhere).

    Differentiable once, memory linear in n and m. Raises as ``tiled`` does; ValueError for dropout
    and for tensors that are not on a GPU; TypeError for float64; ModuleNotFoundError where Triton
    is missing.
    """
    check(rating, value)
    check_transforms("triton", rating, value, vmap=False)
    query, key, rate, p = rating
    if dropout:
        raise ValueError(f"impl 'triton' has no dropout, got {dropout}: use 'tiled' or 'reference'")
    if query.dtype == torch.float64:
        raise TypeError("impl 'triton' computes in float32, got float64: use 'tiled'")
    if query.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("impl 'triton' needs a GPU, got query on cpu: use 'numba' or 'tiled'")
    batch, heads = query.shape[:2]
    mask = visibility.mask
    if mask is not None:
        mask = mask if mask.dtype == torch.bool else mask.float()
        mask = mask[(None,) * (4 - mask.ndim)]
    flat = [
        tensor.float().repeat_interleave(heads // tensor.shape[1], dim=1).flatten(0, 1)
        for tensor in (query, key, value)
    ]
    points = [tensor.mT.contiguous() for tensor in flat[:2]]
    launch = Launch(float(p), (batch, heads), visibility.is_causal)
    out = TritonAttention.apply(
        *points, flat[2].contiguous(), rate.float().repeat(batch), mask, launch
    )
    return out.unflatten(0, (batch, heads)).to(query.dtype)
