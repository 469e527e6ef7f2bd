"""Which rows of which weight make a head's queries, keys and values: found by what they compute.

Let y = x W^T + b be a linear map that ran before attention. A head's queries are those of rows
o .. o + d of W where, over tokens t, ||q_t|| = c ||y_t[o : o + d]|| with one constant c: rotary
position embedding keeps norms, scaling queries beforehand is a constant. Values are not rotated
and must be equal. No name is read: separate, fused, grouped and interleaved layouts are one case.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sixfold.ops.precision import wide

TOKENS = 32
FEWEST = 4
LATEST = 32
"""How many linear maps before a call of attention are looked at."""


class Piece(NamedTuple):
    """One head's share of one parameter."""

    parameter: nn.Parameter
    index: tuple[slice, ...]

    def view(self) -> Tensor:
        """The share itself: what is written to it is written to the parameter."""
        return self.parameter.data[self.index]

    def gradient(self) -> Tensor | None:
        """The same share of the parameter's gradient."""
        return None if self.parameter.grad is None else self.parameter.grad[self.index]


class Share(NamedTuple):
    """What makes one head's queries, keys or values: d outputs of a weight, and of its bias.

    `axis` is the weight's axis of outputs: 0 in ``nn.Linear``, 1 in x @ W.
    """

    weight: nn.Parameter
    axis: int
    bias: nn.Parameter | None
    start: int
    width: int
    bias_start: int

    @property
    def place(self) -> tuple[int, int]:
        """What tells two shares apart."""
        return id(self.weight), self.start

    def pieces(self) -> tuple[Piece, ...]:
        """The weight's rows, and the entries of the bias where there is one."""
        rows = slice(self.start, self.start + self.width)
        index = (rows,) if self.axis == 0 else (slice(None), rows)
        if self.bias is None:
            return (Piece(self.weight, index),)
        entries = slice(self.bias_start, self.bias_start + self.width)
        return Piece(self.weight, index), Piece(self.bias, (entries,))

    def rows(self, whole: Tensor) -> Tensor:
        """(d, c) of the weight or of its gradient."""
        return whole.narrow(self.axis, self.start, self.width).movedim(self.axis, 0)


Layout = dict[str, list[Share]]
"""Role ``q``, ``k`` or ``v`` to the shares of its heads, in order."""


class Product(NamedTuple):
    """The first rows (t, c) of an output y, how many tokens it has, and what made it."""

    rows: Tensor
    tokens: int
    weight: nn.Parameter
    axis: int
    bias: Tensor | None


class Untraced(ValueError):
    """A head's rows were not found; `again` where another pass may tell more."""

    def __init__(self, message: str, *, again: bool) -> None:
        super().__init__(message)
        self.again = again


def product(out: Tensor, weight: nn.Parameter, axis: int, bias: Tensor | None) -> Product:
    """What is remembered of an output: a copy of a few tokens, so that the output may go."""
    flat = out.detach().flatten(0, -2)
    return Product(flat[:TOKENS].clone(), len(flat), weight, axis, bias)


def first_tokens(points: Tensor, *, batch_first: bool) -> Tensor:
    """Points (b, h, n, d) of the first tokens as a linear map counts them, (t, h, d)."""
    b, _, n, _ = points.shape
    t = torch.arange(min(TOKENS, b * n), device=points.device)
    row, place = (t // n, t % n) if batch_first else (t % b, t // b)
    return points.detach()[row, :, place]


def shape_of(norms: Tensor) -> Tensor:
    """Norms (t, h) divided by their root mean square over tokens."""
    return norms / norms.square().mean(0).sqrt().clamp(min=torch.finfo(norms.dtype).tiny)


def mismatches(points: Tensor, rows: Tensor) -> Tensor:
    """How far the norms of points (t, h, d) are from those of each block of rows, (h, blocks)."""
    d = points.shape[-1]
    blocks = wide(rows[:, : rows.shape[1] // d * d]).unflatten(-1, (-1, d))
    ours, theirs = shape_of(wide(points).norm(dim=-1)), shape_of(blocks.norm(dim=-1))
    return (ours[:, :, None] - theirs[:, None]).abs().amax(0)


def find(role: str, points: Tensor, products: Sequence[Product]) -> list[tuple[Product, int]]:
    """Of each head's points (b, h, n, d), the product they are d outputs of, and the first of them.

    Raises Untraced where there are too few tokens, no rows match, or several match alike.
    """
    b, _, n, d = points.shape
    if b * n < FEWEST:
        raise Untraced(f"{b * n} tokens are too few to trace {role}", again=True)
    silent = (points == 0).all(-1).all(-1).all(0)
    if 0 < silent.sum() < len(silent) - 1:
        heard = find(role, points[:, ~silent], products)
        return beside(role, heard, silent, d)
    products = [made for made in products if made.tokens == b * n and made.rows.shape[1] >= d]
    tolerance = tolerance_of(points, *(made.rows for made in products))
    orders = [first_tokens(points, batch_first=order) for order in (True, False)[: min(b, 2)]]
    norms = shape_of(wide(orders[0]).norm(dim=-1))
    if not (norms.amax(0) - norms.amin(0)).min() >= 4 * tolerance:
        raise Untraced(
            f"{role} have one norm for all tokens (a norm per head?), are zero or not finite",
            again=True,
        )
    apart, places = [], []
    for made in products:
        best = torch.stack([mismatches(here, made.rows) for here in orders]).amin(0)
        apart.append(best)
        places += [(made, block * d) for block in range(best.shape[1])]
    least = torch.cat(apart, 1).topk(min(2, len(places)), largest=False) if apart else None
    if least is None or not least.values[:, 0].max() <= tolerance:
        raise Untraced(
            f"{role} could not be traced to rows of a weight: a norm per head, an adapter, or a "
            "weight that is no parameter stands between them",
            again=False,
        )
    if least.values.shape[1] == 2 and least.values[:, 1].min() < 2 * tolerance:
        raise Untraced(f"several rows make the same {role}", again=True)
    return [places[i] for i in least.indices[:, 0].tolist()]


def beside(
    role: str, heard: list[tuple[Product, int]], silent: Tensor, d: int
) -> list[tuple[Product, int]]:
    """The same with the heads that give zero for every token, at the places the others leave.

    Raises Untraced where the others are not evenly spaced, or these places give something.
    """
    numbers = (~silent).nonzero().flatten().tolist()
    (made, first), (_, last) = heard[0], heard[-1]
    stride = (last - first) // (numbers[-1] - numbers[0])
    starts = [first + stride * (head - numbers[0]) for head in range(len(silent))]
    even = all(
        other is made and start == starts[head]
        for head, (other, start) in zip(numbers, heard, strict=True)
    )
    places = [made.rows[:, starts[head] : starts[head] + d] for head in silent.nonzero().flatten()]
    if not even or any(place.shape[1] != d or place.any() for place in places):
        raise Untraced(f"some {role} are zero, and the other heads do not tell whose", again=True)
    return [(made, start) for start in starts]


def left(
    keys: list[tuple[Product, int]], d: int, products: Sequence[Product]
) -> list[tuple[Product, int]]:
    """What makes values that are all zero: the only d outputs at a time that are, as keys come.

    They are looked for in weights of the shape that makes the keys.
    Raises Untraced where more heads' outputs are zero than there are different keys, or fewer.
    """
    places, first = [(id(made), start) for made, start in keys], keys[0][0]
    heads = list(dict.fromkeys(places))
    zero = [
        (made, start)
        for made in products
        if made.tokens == first.tokens and made.weight.shape == first.weight.shape
        for start in range(0, made.rows.shape[1] - d + 1, d)
        if not made.rows[:, start : start + d].any()
    ]
    if len(zero) != len(heads):
        raise Untraced("all values are zero, and nothing tells what makes them", again=True)
    return [zero[heads.index(place)] for place in places]


def tolerance_of(*points: Tensor) -> float:
    """How far apart equal norms may be after a rotation in the least of these precisions."""
    return max(1e-4, *(2 * torch.finfo(p.dtype).eps for p in points))


def share(made: Product, start: int, width: int) -> Share:
    """Some outputs of a linear map; raises Untraced where its bias is no parameter."""
    if made.bias is not None and not isinstance(made.bias, nn.Parameter):
        raise Untraced("the bias is put together of others in every pass", again=False)
    return Share(made.weight, made.axis, made.bias, start, width, start)


def check_values(value: Tensor, found: Sequence[tuple[Product, int]]) -> None:
    """Raise Untraced where values (b, h, m, d) are not equal to what their rows make."""
    d = value.shape[-1]
    theirs = torch.stack([made.rows[:, start : start + d] for made, start in found], 1)
    limit = tolerance_of(value, theirs) * theirs.abs().max()
    orders = (first_tokens(value, batch_first=order) for order in (True, False))
    if not any((ours - theirs).abs().max() <= limit for ours in orders):
        raise Untraced("values are changed between their weight and attention", again=False)


def trace(query: Tensor, key: Tensor, value: Tensor, products: Sequence[Product]) -> Layout:
    """The layout of a layer from one call of attention; all are (b, h, n, d).

    Keys and values that were repeated for their group of query heads are counted once.
    Raises Untraced, with the reason.
    """
    points = {"queries": query, "keys": key, "values": value}
    found = {role: find(role, points[role], products) for role in ("queries", "keys")}
    if value.any():
        found["values"] = find("values", value, products)
    else:
        found["values"] = left(found["keys"], value.shape[-1], products)
    check_values(value, found["values"])
    layout = {
        role[0]: [share(made, start, points[role].shape[-1]) for made, start in heads]
        for role, heads in found.items()
    }
    layout |= ungrouped(layout["k"], layout["v"])
    check_apart(layout)
    return layout


def ungrouped(key: list[Share], value: list[Share]) -> Layout:
    """Each key and value head once, where neighbours share them."""
    size = len(key) // len({share.place for share in key})
    for roles in (key, value):
        if any(share.place != roles[head // size * size].place for head, share in enumerate(roles)):
            return {"k": key, "v": value}
    return {"k": key[::size], "v": value[::size]}


def check_apart(layout: Layout) -> None:
    """Raise Untraced where two heads, or two roles of a head, are made by the same rows."""
    places = [share.place for shares in layout.values() for share in shares]
    if len(set(places)) < len(places):
        raise Untraced("two heads, or two roles of a head, share rows of a weight", again=False)
