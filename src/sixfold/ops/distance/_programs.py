"""Attention by distance as Triton programs: one for the output, one for each side's gradients.

Every program owns what it writes, so there are no atomics and results repeat. Points come
transposed, (g, d, n), so that one feature of neighbouring points is one load. All in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

L1 = tl.constexpr(1)
L2 = tl.constexpr(2)
LARGEST = tl.constexpr(0)
POWER = tl.constexpr(-1)
BOOLEAN = tl.constexpr(1)
FLOAT = tl.constexpr(2)
MINIMUM = tl.constexpr(-3.0e38)


@triton.jit
def gaps(x, y, i, j, n, m, c):
    """x_ic - y_jc for one feature c, (i, j)."""
    xc = tl.load(x + c * n + i, mask=i < n, other=0.0)
    yc = tl.load(y + c * m + j, mask=j < m, other=0.0)
    return xc[:, None] - yc[None, :]


@triton.jit
def distances(x, y, i, j, n, m, d, p, KIND: tl.constexpr):  # noqa: PLR0913
    """||x_i - y_j||_p, (i, j)."""
    total = tl.abs(gaps(x, y, i, j, n, m, 0))
    if KIND == L1:
        for c in range(1, d):
            total += tl.abs(gaps(x, y, i, j, n, m, c))
    elif KIND == L2:
        total = total * total
        for c in range(1, d):
            gap = gaps(x, y, i, j, n, m, c)
            total += gap * gap
        total = tl.sqrt(total)
    else:
        for c in range(1, d):
            gap = tl.abs(gaps(x, y, i, j, n, m, c))
            total = tl.maximum(total, gap, propagate_nan=tl.PropagateNan.ALL)
    if KIND == POWER:
        # powers of gap / largest gap neither overflow nor vanish
        top = total
        scale = tl.where(top == 0.0, 1.0, top)
        total = tl.zeros_like(top)
        for c in range(d):
            total += raised(tl.abs(gaps(x, y, i, j, n, m, c)) / scale, p)
        total = top * raised(total, 1.0 / p)
    return total


@triton.jit
def raised(base, p):
    """base ** p, base >= 0; a power of 1e-38 stands for that of 0."""
    return tl.exp2(p * tl.log2(tl.where(base == 0.0, 1.0e-38, base)))


@triton.jit
def slope(gap, apart, p, KIND: tl.constexpr):
    """Gradient of a distance by one feature of x; 0 where the points meet."""
    sign = tl.where(gap > 0.0, 1.0, tl.where(gap < 0.0, -1.0, 0.0))
    if KIND == L1:
        result = sign
    elif KIND == LARGEST:
        result = tl.where(tl.abs(gap) == apart, sign, 0.0)
    else:
        ratio = gap / tl.where(apart == 0.0, 1.0, apart)
        result = ratio if KIND == L2 else sign * raised(tl.abs(ratio), p - 1.0)
    return result


@triton.jit
def ties(x, y, i, j, n, m, d, apart):
    """How many features have the largest gap, (i, j)."""
    count = tl.zeros_like(apart)
    for c in range(d):
        count += tl.where(tl.abs(gaps(x, y, i, j, n, m, c)) == apart, 1.0, 0.0)
    return count


@triton.jit
def logits(  # noqa: PLR0913
    apart, rate, mask, i, j, n, m, at_i, at_j, MASK: tl.constexpr, CAUSAL: tl.constexpr
):
    """-rate * apart where visible, -inf elsewhere, (i, j)."""
    inside = (i[:, None] < n) & (j[None, :] < m)
    if CAUSAL:
        inside = inside & (j[None, :] <= i[:, None] + m - n)
    scores = -rate * apart
    cells = mask + i[:, None].to(tl.int64) * at_i + j[None, :] * at_j
    if MASK == BOOLEAN:
        inside = inside & (tl.load(cells, mask=inside, other=0) != 0)
    if MASK == FLOAT:
        scores += tl.load(cells, mask=inside, other=0.0)
    return tl.where(inside, scores, float("-inf"))


@triton.jit
def attend(  # noqa: PLR0913 - a program takes plain numbers
    query, key, value, rate, mask, out, lse,
    n, m, d, width, heads, p, at_b, at_h, at_i, at_j,
    KIND: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of one block of queries, by an online softmax over keys."""
    g = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    x, y, rate_g = query + g * d * n, key + g * d * m, tl.load(rate + g)
    mask += (g // heads) * at_b + (g % heads) * at_h
    top = tl.full([ROWS], MINIMUM, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    summed = tl.zeros([ROWS, WIDTH], tl.float32)
    end = m
    if CAUSAL:
        end = tl.minimum(m, (tl.program_id(0) + 1) * ROWS + m - n)
    for start in range(0, end, KEYS):
        j = start + tl.arange(0, KEYS)
        apart = distances(x, y, i, j, n, m, d, p, KIND)
        scores = logits(apart, rate_g, mask, i, j, n, m, at_i, at_j, MASK, CAUSAL)
        new = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp(scores - new[:, None])
        shrink = tl.exp(top - new)
        total = total * shrink + tl.sum(weights, 1)
        cells = value + (g * m + j[:, None]) * width + column[None, :]
        held = (j[:, None] < m) & (column[None, :] < width)
        values = tl.load(cells, mask=held, other=0.0)
        summed = summed * shrink[:, None] + tl.dot(weights, values, input_precision="ieee")
        top = new
    blind = total == 0.0
    if tl.max(tl.where(blind & (i < n), 1, 0), 0) == 1:
        # logits that overflow are no mask: a broken model must not look alive
        seen = tl.zeros([ROWS], tl.int32)
        for start in range(0, end, KEYS):
            j = start + tl.arange(0, KEYS)
            alike = tl.zeros([ROWS, KEYS], tl.float32)
            scores = logits(alike, 0.0, mask, i, j, n, m, at_i, at_j, MASK, CAUSAL)
            seen = tl.maximum(seen, tl.max(tl.where(scores == float("-inf"), 0, 1), 1))
        total = tl.where(blind & (seen == 1), float("nan"), total)
        blind = total == 0.0
    whole = tl.where(blind, 1.0, total)
    cells = out + (g * n + i[:, None]) * width + column[None, :]
    held = (i[:, None] < n) & (column[None, :] < width)
    tl.store(cells, summed / whole[:, None], mask=held)
    # exp(logit - inf) is 0: a blind row has no weights in the backward programs either
    tl.store(lse + g * n + i, tl.where(blind, float("inf"), top + tl.log(whole)), mask=i < n)


@triton.jit
def flow_of(scores, lse, mean, grad, values):
    """Weights, and the gradient of the logits: P * (dO V^T - rowsum(dO * O))."""
    weights = tl.exp(scores - lse[:, None])
    sent = tl.dot(grad, tl.trans(values), input_precision="ieee")
    return weights, weights * (sent - mean[:, None])


@triton.jit
def pull_queries(  # noqa: PLR0913 - a program takes plain numbers
    query, key, value, rate, mask, lse, mean, grad, grad_query, rated, flows,
    n, m, d, width, heads, p, at_b, at_h, at_i, at_j,
    KIND: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, FLOWS: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """Gradient of one block of queries; what each row adds to that of the rate, of the logits."""
    g = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column, feature = tl.arange(0, WIDTH), tl.arange(0, FEATURES)
    x, y, rate_g = query + g * d * n, key + g * d * m, tl.load(rate + g)
    mask += (g // heads) * at_b + (g % heads) * at_h
    lse_i = tl.load(lse + g * n + i, mask=i < n, other=float("inf"))
    mean_i = tl.load(mean + g * n + i, mask=i < n, other=0.0)
    cells = grad + (g * n + i[:, None]) * width + column[None, :]
    held = (i[:, None] < n) & (column[None, :] < width)
    grad_i = tl.load(cells, mask=held, other=0.0)
    pulled = tl.zeros([ROWS, FEATURES], tl.float32)
    rated_i = tl.zeros([ROWS], tl.float32)
    end = m
    if CAUSAL:
        end = tl.minimum(m, (tl.program_id(0) + 1) * ROWS + m - n)
    for start in range(0, end, KEYS):
        j = start + tl.arange(0, KEYS)
        cells = value + (g * m + j[:, None]) * width + column[None, :]
        held = (j[:, None] < m) & (column[None, :] < width)
        values = tl.load(cells, mask=held, other=0.0)
        apart = distances(x, y, i, j, n, m, d, p, KIND)
        scores = logits(apart, rate_g, mask, i, j, n, m, at_i, at_j, MASK, CAUSAL)
        _, flow = flow_of(scores, lse_i, mean_i, grad_i, values)
        rated_i -= tl.sum(flow * apart, 1)
        if FLOWS:
            cells = flows + (g * n + i[:, None]) * m + j[None, :]
            tl.store(cells, flow, mask=(i[:, None] < n) & (j[None, :] < m))
        force = -rate_g * flow
        if KIND == LARGEST:
            force = force / ties(x, y, i, j, n, m, d, apart)
        for c in range(d):
            steps = slope(gaps(x, y, i, j, n, m, c), apart, p, KIND)
            pull = tl.sum(force * steps, 1)
            pulled += tl.where(feature[None, :] == c, pull[:, None], 0.0)
    held = (i[:, None] < n) & (feature[None, :] < d)
    tl.store(grad_query + (g * n + i[:, None]) * d + feature[None, :], pulled, mask=held)
    tl.store(rated + g * n + i, rated_i, mask=i < n)


@triton.jit
def pull_keys(  # noqa: PLR0913 - a program takes plain numbers
    query, key, value, rate, mask, lse, mean, grad, grad_key, grad_value,
    n, m, d, width, heads, p, at_b, at_h, at_i, at_j,
    KIND: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """Gradients of one block of keys and values."""
    g = tl.program_id(1).to(tl.int64)
    j = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    column, feature = tl.arange(0, WIDTH), tl.arange(0, FEATURES)
    x, y, rate_g = query + g * d * n, key + g * d * m, tl.load(rate + g)
    mask += (g // heads) * at_b + (g % heads) * at_h
    value_cells = (g * m + j[:, None]) * width + column[None, :]
    value_held = (j[:, None] < m) & (column[None, :] < width)
    values = tl.load(value + value_cells, mask=value_held, other=0.0)
    pulled = tl.zeros([KEYS, FEATURES], tl.float32)
    carried = tl.zeros([KEYS, WIDTH], tl.float32)
    begin = 0
    if CAUSAL:
        begin = tl.maximum(0, tl.program_id(0) * KEYS - (m - n)) // ROWS * ROWS
    for start in range(begin, n, ROWS):
        i = start + tl.arange(0, ROWS)
        lse_i = tl.load(lse + g * n + i, mask=i < n, other=float("inf"))
        mean_i = tl.load(mean + g * n + i, mask=i < n, other=0.0)
        cells = grad + (g * n + i[:, None]) * width + column[None, :]
        held = (i[:, None] < n) & (column[None, :] < width)
        grad_i = tl.load(cells, mask=held, other=0.0)
        apart = distances(x, y, i, j, n, m, d, p, KIND)
        scores = logits(apart, rate_g, mask, i, j, n, m, at_i, at_j, MASK, CAUSAL)
        weights, flow = flow_of(scores, lse_i, mean_i, grad_i, values)
        carried += tl.dot(tl.trans(weights), grad_i, input_precision="ieee")
        force = rate_g * flow
        if KIND == LARGEST:
            force = force / ties(x, y, i, j, n, m, d, apart)
        for c in range(d):
            steps = slope(gaps(x, y, i, j, n, m, c), apart, p, KIND)
            pull = tl.sum(force * steps, 0)
            pulled += tl.where(feature[None, :] == c, pull[:, None], 0.0)
    held = (j[:, None] < m) & (feature[None, :] < d)
    tl.store(grad_key + (g * m + j[:, None]) * d + feature[None, :], pulled, mask=held)
    tl.store(grad_value + value_cells, carried, mask=value_held)
