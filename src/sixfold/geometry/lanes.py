"""Small matrices of many tokens, entry by entry: (d, k, t), the tokens side by side.

A batched product of matrices as small as a head is mostly overhead on a CPU. Entry by entry it is
d multiplications of whole tensors, and so is a triangular solve. Blocks of tokens are taken in
turn, so that the matrices of one block stay near the processor. A compiler takes the plain loops
and finds blocks and gradients itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

CACHED = 2**20
"""Entries that the matrices of one block of tokens have: four megabytes in float32."""


def by_blocks(compute: Callable[..., Tensor], *lanes: Tensor) -> Tensor:
    """`compute` on blocks of tokens, the last axis of what goes in and what comes out."""
    if lanes[0].device.type != "cpu":
        return compute(*lanes)
    size = max(CACHED // lanes[0].shape[:-1].numel(), 64)
    if lanes[0].shape[-1] <= size:
        return compute(*lanes)
    blocks = zip(*(each.split(size, dim=-1) for each in lanes), strict=True)
    return torch.cat([compute(*block) for block in blocks], dim=-1)


def times(one: Tensor, two: Tensor) -> Tensor:
    """A B."""
    columns, rows = one[:, :, None].unbind(1), two.unbind(0)
    out = columns[0] * rows[0]
    for column, row in zip(columns[1:], rows[1:], strict=True):
        out.addcmul_(column, row)
    return out


def forward_substitution(lower: Tensor, sides: Tensor) -> Tensor:
    """L^-1 B."""
    rows, rest = [], sides
    for k, column in enumerate(lower[:, :, None].unbind(1)):
        rows.append(rest[0] / column[k])
        rest = torch.addcmul(rest[1:], column[k + 1 :], rows[-1], value=-1)
    return torch.stack(rows)


def backward_substitution(lower: Tensor, sides: Tensor) -> Tensor:
    """L^-T B."""
    rows, rest = [], sides
    for row in reversed(lower[:, :, None].unbind(0)):
        k = len(rest) - 1
        rows.append(rest[k] / row[k])
        rest = torch.addcmul(rest[:k], row[:k], rows[-1], value=-1)
    return torch.stack(rows[::-1])


class Product(Function):
    """A B; its gradients are products again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(one: Tensor, two: Tensor) -> Tensor:
        """(i, k, t) and (k, j, t) to (i, j, t)."""
        return by_blocks(times, one, two)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:  # noqa: ARG004
        """Keep both factors."""
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, flow: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """G B^T and A^T G."""
        one, two = ctx.saved_tensors
        return (
            Product.apply(flow, two.transpose(0, 1)) if ctx.needs_input_grad[0] else None,
            Product.apply(one.transpose(0, 1), flow) if ctx.needs_input_grad[1] else None,
        )


class Solve(Function):
    """X = L^-1 B."""

    generate_vmap_rule = True

    @staticmethod
    def forward(lower: Tensor, sides: Tensor) -> Tensor:
        """(d, d, t) and (d, j, t) to (d, j, t); what is above the diagonal of L is not read."""
        return by_blocks(forward_substitution, lower, sides)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        """Keep the triangle and the solution."""
        ctx.save_for_backward(inputs[0], output)

    @staticmethod
    def backward(ctx: Any, flow: Tensor) -> tuple[Tensor, Tensor]:
        """-tril(Y X^T) and Y = L^-T G."""
        lower, solution = ctx.saved_tensors
        pulled = by_blocks(backward_substitution, lower, flow)
        below = torch.ones(lower.shape[:2], dtype=lower.dtype, device=lower.device).tril()
        turned = Product.apply(pulled, solution.transpose(0, 1))
        return turned * -below[..., None], pulled


def half_square(lanes: Tensor) -> Tensor:
    """half(A A^T), its entries first."""
    d = len(lanes)
    rows, columns = torch.tril_indices(d, d, device=lanes.device)
    square = times(lanes, lanes.transpose(0, 1))
    return square.flatten(0, 1).index_select(0, rows * d + columns)


def half_square_backward(lanes: Tensor, flow: Tensor) -> Tensor:
    """(H + H^T) A, with H the lower triangle whose entries are `flow`."""
    d = len(lanes)
    rows, columns = torch.tril_indices(d, d, device=lanes.device)
    places = torch.empty(d, d, dtype=torch.int64, device=lanes.device)
    places[rows, columns] = places[columns, rows] = torch.arange(len(rows), device=lanes.device)
    twice = torch.where(rows == columns, 2.0, 1.0).to(flow.dtype)[:, None]
    return times((flow * twice).index_select(0, places.flatten()).unflatten(0, (d, d)), lanes)


class Gram(Function):
    """half(A A^T)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(lanes: Tensor) -> Tensor:
        """(d, k, t) to a row of d (d + 1) / 2 numbers for each token."""
        return by_blocks(half_square, lanes).mT.contiguous()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:  # noqa: ARG004
        """Keep A."""
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, flow: Tensor) -> Tensor:
        """(H + H^T) A."""
        (lanes,) = ctx.saved_tensors
        return by_blocks(half_square_backward, lanes, flow.mT.contiguous())


def product(one: Tensor, two: Tensor) -> Tensor:
    """A B: (i, k, t) and (k, j, t) to (i, j, t).

    >>> shear = torch.tensor([[1.0, 1.0], [0.0, 1.0]])[..., None]
    >>> product(shear, shear)[..., 0]
    tensor([[1., 2.],
            [0., 1.]])
    """
    return times(one, two) if torch.compiler.is_compiling() else Product.apply(one, two)


def solve(lower: Tensor, sides: Tensor) -> Tensor:
    """L^-1 B: (d, d, t) and (d, j, t) to (d, j, t); L is not read above its diagonal.

    >>> solve(torch.tensor([[2.0, 9.0], [1.0, 1.0]])[..., None], torch.ones(2, 1, 1)).flatten()
    tensor([0.5000, 0.5000])
    """
    if torch.compiler.is_compiling():
        return forward_substitution(lower, sides)
    return Solve.apply(lower, sides)


def gram(lanes: Tensor) -> Tensor:
    """half(A A^T) of each token in a row: (d, k, t) to (t, d (d + 1) / 2).

    >>> gram(torch.tensor([[1.0], [2.0]])[..., None])
    tensor([[1., 2., 4.]])
    """
    return half_square(lanes).mT if torch.compiler.is_compiling() else Gram.apply(lanes)
