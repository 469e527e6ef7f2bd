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

from sixfold.contracts import Distances, Visibility
from sixfold.ops.distance.reference import check, check_transforms, once
from sixfold.ops.precision import exact

ROWS = 128
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


def sighted(rows: slice, like: Tensor, mask: Tensor | None, plan: Plan, m: int, n: int) -> Tensor:
    """Which of these rows see a key, (g, rows, 1), whatever their logits are."""
    seen = torch.zeros_like(like, dtype=torch.bool)
    for keys in seen_keys(rows, n, m, is_causal=plan.is_causal):
        alike = like.new_zeros(len(like), like.shape[1], keys.stop - keys.start)
        cells = tile_logits(alike, like.new_zeros(()), mask, plan, (rows, keys, m - n))
        seen |= ~cells.isneginf().all(-1, keepdim=True)
    return seen


def kept(like: Tensor, plan: Plan, rows: slice, keys: slice) -> Tensor:
    """0 for a dropped weight, 1 / (1 - dropout) for a kept one: the same on every call."""
    generator = torch.Generator(like.device)
    # one stream per tile: (row, key) numbers the tiles of one seed apart
    generator.manual_seed((plan.seed + rows.start * 2654435761 + keys.start) % 2**63)
    share = 1 - plan.dropout
    return torch.empty_like(like).bernoulli_(share, generator=generator).div_(share)


METRICS: dict[str, Metric] = {}
"""By the name of the implementation: an operator takes plain values, not functions."""


@torch.library.custom_op("sixfold::distance_attention", mutates_args=())
def attention(  # noqa: PLR0913 - an operator takes plain values
    query: Tensor, key: Tensor, value: Tensor, rate: Tensor, mask: Tensor | None, metric: str,
    p: float, heads: int, is_causal: bool, dropout: float, seed: Tensor,  # noqa: FBT001
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """softmax(-rate ||q - k||_p) v over (g, n, d), (g, m, d), (g, m, d_v) and rate (g, 1, 1).

    Returns the weighted values (g, n, d_v) and what normalises each row (g, n, 2): its largest
    logit and the sum of exponentials relative to it, kept apart because their one logarithm would
    round. An operator of its own, so that a compiler takes it whole and does not unroll the loop.
    """
    plan = Plan(METRICS[metric], p, (len(query) // heads, heads), is_causal, dropout, int(seed))
    (g, n, _), m = query.shape, key.shape[1]
    out = value.new_zeros(g, n, value.shape[2])
    norm = query.new_empty(g, n, 2)
    for rows in blocks(n):
        top = norm.new_full((g, rows.stop - rows.start, 1), torch.finfo(norm.dtype).min)
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
        if blind.any():
            # logits that overflow are no mask: a broken model must not look alive
            lost = blind & sighted(rows, total, mask, plan, m, n)
            total.masked_fill_(lost, math.nan)
            blind &= ~lost
        total.masked_fill_(blind, 1.0)
        out[:, rows] = summed / total
        # exp(logit - inf) is 0: a blind row has no weights in the backward pass either
        norm[:, rows] = torch.cat([top.masked_fill_(blind, math.inf), total], -1)
    return out, norm


@attention.register_fake
def _(query: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    value = others[1]
    return value.new_empty(*query.shape[:2], value.shape[2]), query.new_empty(*query.shape[:2], 2)


@torch.library.custom_op("sixfold::distance_attention_backward", mutates_args=())
def attention_backward(  # noqa: PLR0913 - as the operator
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, rate: Tensor, mask: Tensor | None,
    out: Tensor, norm: Tensor, metric: str, p: float, heads: int, is_causal: bool, dropout: float,  # noqa: FBT001
    seed: Tensor, of_mask: bool,  # noqa: FBT001
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, key, value, rate and, if `of_mask`, of a float mask, else empty.

    With weights P and logits S: dS = P * (dO V^T - rowsum(dO * O)), tile by tile.
    """
    plan = Plan(METRICS[metric], p, (len(query) // heads, heads), is_causal, dropout, int(seed))
    n, m = query.shape[1], key.shape[1]
    grads = [torch.zeros_like(tensor) for tensor in (query, key, value, rate)]
    grad_query, grad_key, grad_value, grad_rate = grads
    grad_mask = torch.zeros_like(mask) if of_mask else query.new_empty(0)
    mean = (grad * out).sum(-1, keepdim=True)
    for rows in blocks(n):
        for keys in seen_keys(rows, n, m, is_causal=plan.is_causal):
            ends = query[:, rows], key[:, keys]
            apart = plan.metric.distance(*ends, plan.p)
            scores = tile_logits(apart, rate, mask, plan, (rows, keys, m - n))
            weights = scores.sub_(norm[:, rows, :1]).exp_().div_(norm[:, rows, 1:])
            sent = grad[:, rows] @ value[:, keys].mT
            used = weights
            if plan.dropout:
                keep = kept(weights, plan, rows, keys)
                used, sent = weights * keep, sent.mul_(keep)
            grad_value[:, keys].baddbmm_(used.mT, grad[:, rows])
            flow = sent.sub_(mean[:, rows]).mul_(weights)
            if of_mask:
                cells = part(grad_mask, rows, keys)
                cells.add_(flow.unflatten(0, plan.heads).sum_to_size(cells.shape))
            grad_rate.sub_(torch.einsum("gij,gij->g", flow, apart)[:, None, None])
            force = flow.mul_(-rate)
            grad_query[:, rows] += plan.metric.pull(*ends, force, apart, plan.p)
            grad_key[:, keys] += plan.metric.pull(*ends[::-1], force.mT, apart.mT, plan.p)
    return grad_query, grad_key, grad_value, grad_rate, grad_mask


@attention_backward.register_fake
def _(grad: Tensor, *saved: Any) -> tuple[Tensor, ...]:  # noqa: ARG001
    *inputs, mask = saved[:5]
    of_mask = saved[-1]
    found = [torch.empty_like(tensor) for tensor in inputs]
    return (*found, torch.empty_like(mask) if of_mask else inputs[0].new_empty(0))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *ctx.plan, seed = inputs[5:]
    ctx.save_for_backward(*inputs[:5], *output, seed)


def _backward(ctx: Any, grad: Tensor, grad_norm: Tensor) -> tuple[Any, ...]:  # noqa: ARG001
    *saved, seed = ctx.saved_tensors
    of_mask = ctx.needs_input_grad[4]
    with exact(grad):
        found = attention_backward(grad, *saved, *ctx.plan, seed, of_mask)
    return (*found[:4], found[4] if of_mask else None, *[None] * 6)


def _name(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001
    ctx.impl = inputs[8]


def _twice(ctx: Any, *grads: Tensor) -> None:  # noqa: ARG001
    raise once(ctx.impl)


attention.register_autograd(_backward, setup_context=_keep)
attention_backward.register_autograd(_twice, setup_context=_name)


def attend_by(
    metric: str, rating: Distances, value: Tensor, visibility: Visibility, dropout: float
) -> Tensor:
    """The tiled loop with the primitives of `metric`; half precision is computed in float32."""
    check(rating, value)
    check_transforms(metric, rating, value, vmap=True)
    query, key, rate, p = rating
    batch, heads = query.shape[:2]
    dtype = torch.promote_types(query.dtype, torch.float32)
    mask = visibility.mask
    if mask is not None:
        mask = mask if mask.dtype == torch.bool else mask.to(dtype)
        mask = mask[(None,) * (4 - mask.ndim)]
    # drawn from the global generator, so that a seeded run is repeated
    seed = torch.randint(2**62, ()) if dropout else torch.zeros((), dtype=torch.int64)
    flat = [
        tensor.to(dtype).repeat_interleave(heads // tensor.shape[1], dim=1).flatten(0, 1)
        for tensor in (query, key, value)
    ]
    slopes = rate.to(dtype).repeat(batch)[:, None, None]
    with exact(query):
        out, _ = attention(
            *[t.contiguous() for t in flat], slopes, mask, metric, float(p), heads,
            visibility.is_causal, dropout, seed,
        )  # fmt: skip
    return out.unflatten(0, (batch, heads)).to(query.dtype)


def distance(x: Tensor, y: Tensor, p: float) -> Tensor:
    """`torch.cdist`, by differences: its matrix product loses close points to cancellation."""
    if p == math.inf:
        # its maximum passes over NaN
        lost = x.isnan().any(-1)[..., :, None] | y.isnan().any(-1)[..., None, :]
        return torch.cdist(x, y, p).masked_fill_(lost, math.nan)
    if p in (1, 2):
        return torch.cdist(x, y, p, compute_mode="donot_use_mm_for_euclid_dist")
    # cdist does not scale what it raises to p, which then overflows or vanishes
    top = torch.cdist(x, y, math.inf)
    scale = top.masked_fill((top == 0) | top.isinf(), 1.0)
    total = torch.zeros_like(top)
    for feature in range(x.shape[-1]):
        gap = x[..., feature, None] - y[..., None, :, feature]
        total += (gap.abs_() / scale).pow_(p)
    return total.pow_(1 / p).mul_(scale)


def pull(x: Tensor, y: Tensor, force: Tensor, apart: Tensor, p: float) -> Tensor:
    """The backward pass of `torch.cdist`; ties of p = inf share what it gives to each in full."""
    if p == math.inf:
        ties = torch.zeros_like(apart)
        for feature in range(x.shape[-1]):
            gap = x[..., feature, None] - y[..., None, :, feature]
            ties += gap.abs_() == apart
        force = force / ties
    x, y, force, apart = (t.contiguous() for t in (x, y, force, apart))
    if p in (1, 2, math.inf):
        return torch.ops.aten._cdist_backward(force, x, y, p, apart)
    out, scale = torch.empty_like(x), apart.masked_fill(apart == 0, 1.0)
    for feature in range(x.shape[-1]):
        ratio = (x[..., feature, None] - y[..., None, :, feature]).div_(scale)
        slope = ratio.abs().pow_(p - 1).mul_(ratio.sign_())
        out[..., feature] = slope.mul_(force).sum(-1)
    return out


def attend(rating: Distances, value: Tensor, visibility: Visibility, dropout: float) -> Tensor:
    """Same as the reference, without ever holding a weight longer than its tile.

    Differentiable once, memory linear in n and m. Raises as the reference does, and RuntimeError
    naming itself for a second derivative, a forward one and those of torch.func.
    """
    return attend_by("tiled", rating, value, visibility, dropout)


METRICS["tiled"] = Metric(distance, pull)
