"""Distances and their gradients over one tile, compiled by Numba.

Lanes run over points, never over features: each inner loop is elementwise, so it vectorises as it
stands, needs no reassociation, sums in a fixed order and lets NaN through. Points on the lanes come
transposed, (d, n).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic, overload

LARGEST = 0
"""The kind of p = inf."""

POWER = -1
"""The kind of a p that needs logarithms; a small half of an integer is products and a root."""

EASIEST = 8
"""Largest p whose kind is 2 p."""


def kind_of(p: float) -> int:
    """Which kernel serves p."""
    if p == math.inf:
        return LARGEST
    return int(2 * p) if p <= EASIEST and 2 * p == int(2 * p) else POWER


# contract: multiply and add may be one instruction; nothing that would lose a NaN
OPTIONS: dict[str, Any] = {"nogil": True, "fastmath": {"contract"}, "error_model": "numpy"}
INLINE: dict[str, Any] = {**OPTIONS, "forceinline": True}


def compiled(function: Callable[..., Any]) -> Any:
    """Compile to run beside Python; keep the machine code where some folder can be written."""
    try:
        return numba.njit(cache=True, **OPTIONS)(function)
    except RuntimeError:  # nowhere to keep it: each process compiles its own
        return numba.njit(**OPTIONS)(function)


@intrinsic
def bits(_: Any, number: Any) -> Any:
    """The bits of a float as an integer: ordered as the floats from 0 up, NaN above all."""
    wide = number == types.float64

    def generate(_: Any, builder: Any, __: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(64 if wide else 32))

    return (types.int64 if wide else types.int32)(number), generate


@intrinsic
def floating(_: Any, number: Any) -> Any:
    """The float of these bits."""
    wide = number == types.int64

    def generate(_: Any, builder: Any, __: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.DoubleType() if wide else ir.FloatType())

    return (types.float64 if wide else types.float32)(number), generate


ONE, HALF, LOWEST = np.float32(1), np.float32(0.5), np.float32(-126)
LEAST = int(np.float32(math.sqrt(0.5)).view(np.int32))
"""The bits of the least mantissa: they lie in [sqrt(1/2), sqrt 2)."""
# log2 m = 2 / ln 2 * artanh f, f = (m - 1) / (m + 1): |f| < 0.172, the next term is below 3e-9
L1, L3, L5, L7, L9 = (np.float32(2 / math.log(2) / k) for k in (1, 3, 5, 7, 9))
# 2^r for |r| <= 1/2: the next term is below 6e-9
E1, E2, E3, E4, E5, E6, E7 = (np.float32(math.log(2) ** k / math.factorial(k)) for k in range(1, 8))


def raised(base: Any, p: Any) -> Any:
    """base ** p, base >= 0."""
    return base**p


def raised_single(base: Any, p: Any) -> Any:
    """2 ** (p log2 base) without a branch or a call, so that it vectorises; 1e-38 stands for 0."""
    pattern = bits(base)
    exponent = np.int32(np.int32(pattern - LEAST) >> 23)
    mantissa = floating(np.int32(pattern - (exponent << 23)))
    f = (mantissa - ONE) / (mantissa + ONE)
    s = f * f
    log = f * (L1 + s * (L3 + s * (L5 + s * (L7 + s * L9))))
    main = p * np.float32(exponent)
    power = main + p * log
    whole = np.floor((power if power > LOWEST else LOWEST) + HALF)
    # what is left of the power, without the rounding of that sum
    r = (main - whole) + p * log
    r = r if r > -ONE else -ONE
    rest = E3 + r * (E4 + r * (E5 + r * (E6 + r * E7)))
    series = ONE + r * (E1 + r * (E2 + r * rest))
    # base - base is 0, but NaN for what is not finite
    return series * floating(np.int32((np.int32(whole) + 127) << 23)) + (base - base)


@overload(raised, jit_options=INLINE)
def _raised(base: Any, p: Any) -> Any:  # noqa: ARG001 - chosen by type
    return raised_single if base == types.float32 else raised


@numba.njit(**INLINE)
def larger(a: Any, b: Any) -> Any:
    """max(a, b) for a, b >= 0; NaN if one of them is."""
    first, second = bits(a), bits(b)
    return floating(first if first > second else second)


@numba.njit(**INLINE)
def term(gap: Any, scale: Any, p: Any, kind: int) -> Any:
    """What one feature adds to a distance."""
    size = abs(gap)
    if kind == POWER:
        return raised(size * scale, p)
    product = np.sqrt(size) if kind % 2 else size
    for _ in range((kind - 1) // 2):
        product = product * size
    return product


@compiled
def scaled(x: Any, yt: Any, j: int, p: Any) -> Any:
    """One distance whose powers might overflow or vanish: scaled by the largest gap."""
    top = abs(x[0] - x[0])
    for c in range(len(x)):
        top = larger(top, abs(x[c] - yt[c, j]))
    if top == 0 or np.isinf(top):
        return top
    total = top - top
    for c in range(len(x)):
        total += (abs(x[c] - yt[c, j]) / top) ** p
    return top * total ** (x.dtype.type(1) / p)


@compiled
def largest(x: Any, yt: Any, row: Any) -> None:
    """Largest gap of x to every point."""
    row[:] = 0
    d = len(x)
    for c in range(0, d - 3, 4):
        x0, x1, x2, x3 = x[c], x[c + 1], x[c + 2], x[c + 3]
        y0, y1, y2, y3 = yt[c], yt[c + 1], yt[c + 2], yt[c + 3]
        for j in range(len(row)):
            low = larger(abs(x0 - y0[j]), abs(x1 - y1[j]))
            high = larger(abs(x2 - y2[j]), abs(x3 - y3[j]))
            row[j] = larger(row[j], larger(low, high))
    for c in range(d - d % 4, d):
        xc, yc = x[c], yt[c]
        for j in range(len(row)):
            row[j] = larger(row[j], abs(xc - yc[j]))


@functools.cache
def distance_kernel(kind: int) -> Any:  # noqa: C901 - kinds are cases of one loop
    """distance(x (n, d), yt (d, m), p, out (n, m)) for one kind of p."""

    @compiled
    def distance(x: Any, yt: Any, p: Any, out: Any) -> None:  # noqa: C901
        d, m = yt.shape
        one, tiny = x.dtype.type(1), x.dtype.type(1.2e-38)
        # four features at once share a load and a store; a logarithm is work enough alone
        fours = 0 if kind == POWER else d - d % 4
        few, many = x.dtype.type(1e-28), x.dtype.type(1e30)
        scale = np.ones(m, x.dtype)
        for i in range(len(x)):
            row, xi = out[i], x[i]
            if kind == LARGEST:
                largest(xi, yt, row)
                continue
            if kind == POWER:
                largest(xi, yt, row)
                for j in range(m):
                    top = row[j]
                    scale[j] = one / (tiny if top < tiny else top) if top != 0 else top
            row[:] = 0
            for c in range(0, fours, 4):
                x0, x1, x2, x3 = xi[c], xi[c + 1], xi[c + 2], xi[c + 3]
                y0, y1, y2, y3 = yt[c], yt[c + 1], yt[c + 2], yt[c + 3]
                for j in range(m):
                    low = term(x0 - y0[j], scale[j], p, kind) + term(x1 - y1[j], scale[j], p, kind)
                    high = term(x2 - y2[j], scale[j], p, kind) + term(x3 - y3[j], scale[j], p, kind)
                    row[j] += low + high
            for c in range(fours, d):
                xc, yc = xi[c], yt[c]
                for j in range(m):
                    row[j] += term(xc - yc[j], scale[j], p, kind)
            if kind == POWER:
                for j in range(m):
                    far = raised(row[j], one / p) / scale[j]
                    row[j] = far if scale[j] != 0 else scale[j]
            if kind == 4:
                for j in range(m):
                    scale[j] = row[j]
                    row[j] = np.sqrt(row[j])
            if kind > 2 and kind != 4:
                for j in range(m):
                    total = row[j]
                    far = raised(total, one / p)
                    scale[j] = total
                    # one step of Newton: the rounding of 1 / p grows with the logarithm of total;
                    # the quotient first, as far times total may overflow
                    row[j] = far - far * ((term(far, one, p, kind) - total) / (p * total))
            if kind > 2:
                for j in range(m):
                    if not few < scale[j] < many:
                        row[j] = scaled(xi, yt, j, p)

    return distance


@numba.njit(**INLINE)
def slope(gap: Any, reach: Any, p: Any, kind: int) -> Any:
    """Gradient of a distance by one feature; `reach` is 1 / distance (p = inf: the distance)."""
    one = type(gap)(1)
    sign = np.copysign(one, gap)
    if kind == 2:
        return sign if gap != 0 else gap
    if kind == LARGEST:
        return sign if abs(gap) == reach else gap - gap
    ratio = gap * reach
    size = abs(ratio)
    if kind == POWER:
        return raised(size, p - one) * (sign if gap != 0 else gap)
    product = sign * np.sqrt(size) if kind == 3 else ratio
    if kind > 4 and kind % 2:
        product = product * np.sqrt(size)
    for _ in range(kind // 2 - 2):
        product = product * size
    return product


@numba.njit(**INLINE)
def tie(gap: Any, top: Any) -> Any:
    """1 where a feature has the largest gap, else 0."""
    return type(gap)(1) if abs(gap) == top else type(gap)(0)


@compiled
def share(xt: Any, points: Any, force: Any, apart: Any) -> None:
    """Divide forces among the features that tie for the largest gap; none where points meet."""
    hits = np.zeros_like(force[0])
    r0, r1, r2, r3 = apart[0], apart[1], apart[2], apart[3]
    for c in range(len(xt)):
        line = xt[c]
        if len(points) == 4:
            y0, y1, y2, y3 = points[0, c], points[1, c], points[2, c], points[3, c]
            for i in range(len(hits)):
                low = tie(line[i] - y0, r0[i]) + tie(line[i] - y1, r1[i])
                hits[i] += low + (tie(line[i] - y2, r2[i]) + tie(line[i] - y3, r3[i]))
        else:
            y0 = points[0, c]
            for i in range(len(hits)):
                hits[i] += tie(line[i] - y0, r0[i])
    for i in range(len(hits)):
        # one hit a point: no ties, and that is the rule
        for u in range(0 if hits[i] == len(points) else len(points)):
            ties = hits[i] - hits[i]
            for c in range(len(xt)):
                ties += tie(xt[c, i] - points[u, c], apart[u, i])
            met = apart[u, i] == 0
            force[u, i] = force[u, i] * apart[u, i] if met else force[u, i] / ties


@functools.cache
def pull_kernel(kind: int) -> Any:  # noqa: C901 - kinds are cases of one loop
    """pull(xt (d, n), y (m, d), force, apart, p, by_x, out (d, n)) for one kind of p.

    `force` and `apart` are (n, m) if `by_x`, else (m, n).
    """

    @compiled
    def pull(  # noqa: C901
        xt: Any, y: Any, force: Any, apart: Any, p: Any, by_x: Any, out: Any
    ) -> None:
        (d, n), m = xt.shape, len(y)
        one, tiny = xt.dtype.type(1), xt.dtype.type(1.2e-38)
        push, reach = np.empty((4, n), xt.dtype), np.empty((4, n), xt.dtype)
        p0, p1, p2, p3 = push[0], push[1], push[2], push[3]
        r0, r1, r2, r3 = reach[0], reach[1], reach[2], reach[3]
        fours = 0 if kind == POWER else m - m % 4
        out[:] = 0
        j = 0
        while j < m:
            taken = 4 if j < fours else 1
            for i in range(n if by_x else 0):
                for u in range(taken):
                    push[u, i], reach[u, i] = force[i, j + u], apart[i, j + u]
            for u in range(0 if by_x else taken):
                push[u], reach[u] = force[j + u], apart[j + u]
            if kind == LARGEST:
                share(xt, y[j : j + taken], push, reach)
            else:
                for u in range(taken):
                    for i in range(n):
                        far = reach[u, i]
                        reach[u, i] = one / (tiny if far < tiny else far)
            for c in range(d):
                line, total = xt[c], out[c]
                if taken == 1:
                    yc = y[j, c]
                    for i in range(n):
                        total[i] += p0[i] * slope(line[i] - yc, r0[i], p, kind)
                else:
                    y0, y1, y2, y3 = y[j, c], y[j + 1, c], y[j + 2, c], y[j + 3, c]
                    for i in range(n):
                        low = p0[i] * slope(line[i] - y0, r0[i], p, kind)
                        low += p1[i] * slope(line[i] - y1, r1[i], p, kind)
                        high = p2[i] * slope(line[i] - y2, r2[i], p, kind)
                        high += p3[i] * slope(line[i] - y3, r3[i], p, kind)
                        total[i] += low + high
            j += taken

    return pull
