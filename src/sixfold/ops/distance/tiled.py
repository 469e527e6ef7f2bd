"""Attention by distance in tiles: an online softmax, memory linear in the number of tokens.

Only the output and the log-sum-exp of each row are kept; the backward pass computes every tile of
distances again. The loop needs two primitives of a metric and nothing else of p.

Source: Dao et al., FlashAttention, arXiv 2205.14135, algorithms 1 and 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sixfold.contracts import Distances, Visibility
from sixfold.ops.distance.reference import check

ROWS = 256
"""Queries in a tile."""

KEYS = 512
"""Keys in a tile."""


class Metric(NamedTuple):
    """All that the loop knows of a distance.

    ``distance(x, y, p)``: ||x_i - y_j||_p, (g, n, d) and (g, m, d) to (g, n, m).
    ``pull(x, y, force, apart, p)``: sum over j of force_ij d||x_i - y_j||_p / dx_i, (g, n, d),
    given the distances `apart`.
    """

    distance: Callable[[Tensor, Tensor, float], Tensor]
    pull: Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]


class Plan(NamedTuple):
    """What the loop needs besides tensors that have gradients."""

    metric: Metric
    p: float
    heads: tuple[int, int]
    is_causal: bool
    dropout: float
    seed: int


def blocks(n: int) -> Iterator[slice]:
    """Queries, `ROWS` at a time."""
    for start in range(0, n, ROWS):
        yield slice(start, min(start + ROWS, n))


def seen_keys(rows: slice, n: int, m: int, *, is_causal: bool) -> Iterator[slice]:
    """Keys that some of these rows may see, `KEYS` at a time."""
    end = min(m, rows.stop + m - n) if is_causal else m
    for start in range(0, end, KEYS):
        yield slice(start, min(start + KEYS, end))


def part(mask: Tensor, rows: slice, keys: slice) -> Tensor:
    """The part of a mask that falls on a tile; axes of size 1 stay."""
    mask = mask if mask.shape[-2] == 1 else mask[..., rows, :]
    return mask if mask.shape[-1] == 1 else mask[..., keys]


def tile_logits(
    apart: Tensor, rate: Tensor, mask: Tensor | None, plan: Plan, place: tuple[slice, slice, int]
) -> Tensor:
    """-rate * apart where visible, -inf elsewhere; `place` is rows, keys and m - n."""
    rows, keys, offset = place
    scores = apart * -rate
    if mask is not None:
        cells = part(mask, rows, keys)
        whole = scores.unflatten(0, plan.heads)
        if mask.dtype == torch.bool:
            whole.masked_fill_(~cells, -math.inf)
        else:
            whole.add_(cells)
    if plan.is_causal and keys.stop - 1 > rows.start + offset:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
        scores.masked_fill_(future.triu_(1 + rows.start + offset - keys.start), -math.inf)
    return scores


def kept(like: Tensor, plan: Plan, rows: slice, keys: slice) -> Tensor:
    """0 for a dropped weight, 1 / (1 - dropout) for a kept one: the same on every call."""
    generator = torch.Generator(like.device)
    # one stream per tile: (row, key) numbers the tiles of one seed apart
    generator.manual_seed((plan.seed + rows.start * 2654435761 + keys.start) % 2**63)
    share = 1 - plan.dropout
    return torch.empty_like(like).bernoulli_(share, generator=generator).div_(share)


class TiledAttention(torch.autograd.Function):
    """softmax(-rate ||q - k||_p) v over (g, n, d), (g, m, d), (g, m, d_v) and rate (g, 1, 1)."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, rate: Tensor, mask: Tensor | None,
        plan: Plan,
    ) -> Tensor:  # fmt: skip
        """The weighted values, (g, n, d_v)."""
        (g, n, _), m = query.shape, key.shape[1]
        out = value.new_zeros(g, n, value.shape[2])
        lse = query.new_full((g, n, 1), math.inf)
        for rows in blocks(n):
            top = lse.new_full((g, rows.stop - rows.start, 1), torch.finfo(lse.dtype).min)
            total, summed = torch.zeros_like(top), torch.zeros_like(out[:, rows])
            for keys in seen_keys(rows, n, m, is_causal=plan.is_causal):
                apart = plan.metric.distance(query[:, rows], key[:, keys], plan.p)
                scores = tile_logits(apart, rate, mask, plan, (rows, keys, m - n))
                before, top = top, torch.maximum(top, scores.amax(-1, keepdim=True))
                weights = scores.sub_(top).exp_()
                shrink = (before - top).exp_()
                total.mul_(shrink).add_(weights.sum(-1, keepdim=True))
                if plan.dropout:
                    weights.mul_(kept(weights, plan, rows, keys))
                summed.mul_(shrink).baddbmm_(weights, value[:, keys])
            blind = total == 0
            out[:, rows] = summed / total.masked_fill(blind, 1.0)
            # exp(logit - inf) is 0: a blind row has no weights in the backward pass either
            lse[:, rows] = (top + total.log()).masked_fill_(blind, math.inf)
        ctx.save_for_backward(query, key, value, rate, mask, out, lse)
        ctx.plan = plan
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of query, key, value, rate and, where asked for, a float mask."""
        query, key, value, rate, mask, out, lse = ctx.saved_tensors
        with torch.autocast(query.device.type, enabled=False):
            return (*gradients(ctx, grad, query, key, value, rate, mask, out, lse), None)


def gradients(ctx: Any, grad: Tensor, *saved: Tensor) -> tuple[Tensor | None, ...]:
    """With weights P and logits S: dS = P * (dO V^T - rowsum(dO * O)), tile by tile."""
    query, key, value, rate, mask, out, lse = saved
    plan: Plan = ctx.plan
    n, m = query.shape[1], key.shape[1]
    grads = [torch.zeros_like(tensor) for tensor in (query, key, value, rate)]
    grad_query, grad_key, grad_value, grad_rate = grads
    grad_mask = torch.zeros_like(mask) if ctx.needs_input_grad[4] else None
    mean = (grad * out).sum(-1, keepdim=True)
    for rows in blocks(n):
        for keys in seen_keys(rows, n, m, is_causal=plan.is_causal):
            ends = query[:, rows], key[:, keys]
            apart = plan.metric.distance(*ends, plan.p)
            scores = tile_logits(apart, rate, mask, plan, (rows, keys, m - n))
            weights = scores.sub_(lse[:, rows]).exp_()
            sent = grad[:, rows] @ value[:, keys].mT
            used = weights
            if plan.dropout:
                keep = kept(weights, plan, rows, keys)
                used, sent = weights * keep, sent.mul_(keep)
            grad_value[:, keys].baddbmm_(used.mT, grad[:, rows])
            flow = sent.sub_(mean[:, rows]).mul_(weights)
            if grad_mask is not None:
                cells = part(grad_mask, rows, keys)
                cells.add_(flow.unflatten(0, plan.heads).sum_to_size(cells.shape))
            grad_rate.sub_(torch.einsum("gij,gij->g", flow, apart)[:, None, None])
            force = flow.mul_(-rate)
            grad_query[:, rows] += plan.metric.pull(*ends, force, apart, plan.p)
            grad_key[:, keys] += plan.metric.pull(*ends[::-1], force.mT, apart.mT, plan.p)
    return (*grads, grad_mask)


def attend_by(
    metric: Metric, rating: Distances, value: Tensor, visibility: Visibility, dropout: float
) -> Tensor:
    """The tiled loop with the primitives of `metric`; half precision is computed in float32."""
    check(rating, value)
    query, key, rate, p = rating
    batch, heads = query.shape[:2]
    dtype = torch.promote_types(query.dtype, torch.float32)
    mask = visibility.mask
    if mask is not None:
        mask = mask if mask.dtype == torch.bool else mask.to(dtype)
        mask = mask[(None,) * (4 - mask.ndim)]
    # drawn from the global generator, so that a seeded run is repeated
    seed = int(torch.randint(2**62, ())) if dropout else 0
    plan = Plan(metric, p, (batch, heads), visibility.is_causal, dropout, seed)
    with torch.autocast(query.device.type, enabled=False):
        flat = [
            tensor.to(dtype).repeat_interleave(heads // tensor.shape[1], dim=1).flatten(0, 1)
            for tensor in (query, key, value)
        ]
        slopes = rate.to(dtype).repeat(batch)[:, None, None]
        out = TiledAttention.apply(*[t.contiguous() for t in flat], slopes, mask, plan)
    return out.unflatten(0, (batch, heads)).to(query.dtype)


def distance(x: Tensor, y: Tensor, p: float) -> Tensor:
    """`torch.cdist`, by differences: its matrix product loses close points to cancellation."""
    if p in (1, 2, math.inf):
        return torch.cdist(x, y, p, compute_mode="donot_use_mm_for_euclid_dist")
    # it does not scale what it raises to p: in float64 that is far from overflow
    return torch.cdist(x.double(), y.double(), p).to(x.dtype)


def pull(x: Tensor, y: Tensor, force: Tensor, apart: Tensor, p: float) -> Tensor:
    """The backward pass of `torch.cdist`; ties of p = inf share what it gives to each in full."""
    if p == math.inf:
        ties = torch.zeros_like(apart)
        for feature in range(x.shape[-1]):
            gap = x[..., feature, None] - y[..., None, :, feature]
            ties += gap.abs_() == apart
        force = force / ties
    dtype = x.dtype if p in (1, 2, math.inf) else torch.float64
    x, y, force, apart = (t.to(dtype).contiguous() for t in (x, y, force, apart))
    if p not in (1, 2, math.inf):
        apart = torch.cdist(x, y, p)
    return torch.ops.aten._cdist_backward(force, x, y, p, apart).to(dtype)


def attend(rating: Distances, value: Tensor, visibility: Visibility, dropout: float) -> Tensor:
    """Same as the reference, without ever holding a weight longer than its tile.

    Differentiable once, memory linear in n and m. Raises as the reference does, and RuntimeError
    on a second differentiation.
    """
    return attend_by(Metric(distance, pull), rating, value, visibility, dropout)
