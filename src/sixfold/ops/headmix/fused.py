"""Graph mixing in a layout where every step is one large product.

With heads first, (h, b n, d), gathering over the graph is one (h, h) product over everything else
and the weights act on all tokens at once. Every gradient of a gain comes from the small matrices
X_i^T dY_i that the weights need anyway.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def heads_first(heads: Tensor) -> Tensor:
    """(b, n, h, d) -> (h, b n, d), a view."""
    return heads.permute(2, 0, 1, 3).reshape(heads.shape[2], -1, heads.shape[3])


def heads_inside(heads: Tensor, like: Tensor) -> Tensor:
    """(h, b n, d) -> (b, n, h, d), a view."""
    return heads.unflatten(1, like.shape[:2]).permute(1, 2, 0, 3)


def gather(edges: Tensor, heads: Tensor) -> Tensor:
    """Sum over j of edges_ij H_j: (h, h) and (h, b n, d) -> (h, b n, d)."""
    return (edges @ heads.flatten(1)).view_as(heads)


def steps(
    heads: Tensor, weight_self: Tensor, weight_neighbour: Tensor, graph: Tensor, gate: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gated sum, and what its gradient needs: sums over neighbours and the mixture."""
    own, edges = graph.diagonal(), graph.clone().fill_diagonal_(0.0)
    near = gather(edges, heads_first(heads))
    mixed = near @ weight_neighbour
    mixed = mixed.baddbmm_(heads_first(heads), own[:, None, None] * weight_self).relu_()
    return torch.addcmul(heads, heads_inside(mixed, heads), gate[:, None]), near, mixed


class GatedMix(torch.autograd.Function):
    """H + gate * relu(own_i H_i W_self + sum over j of edges_ij H_j W_neighbour)."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        """The gated sum."""
        out, near, mixed = steps(*inputs)
        # the heads are kept by attention itself: to hold them costs nothing
        ctx.save_for_backward(*inputs, near, mixed)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        """One gradient per input, in their order."""
        heads, weight_self, weight_neighbour, graph, gate, near, mixed = ctx.saved_tensors
        own, edges = graph.diagonal(), graph.clone().fill_diagonal_(0.0)
        rows = heads_first(heads)
        # the gradient of what relu was given, were the gate 1
        slope = torch.ops.aten.threshold_backward(heads_first(grad).contiguous(), mixed, 0)
        by_near = (near.transpose(1, 2) @ slope).flatten(1)
        by_own = (rows.transpose(1, 2) @ slope).flatten(1)
        through_own = by_own @ weight_self.flatten()
        grad_gate = torch.addcmul(by_near @ weight_neighbour.flatten(), through_own, own)
        grad_neighbour = (gate @ by_near).view_as(weight_neighbour)
        grad_self = ((gate * own) @ by_own).view_as(weight_self)
        sent = slope @ weight_neighbour.T
        grad_graph = gate[:, None] * (sent.flatten(1) @ rows.flatten(1).T)
        grad_graph.diagonal().copy_(gate * through_own)
        back = gather((gate[:, None] * edges).T, sent)
        back = back.baddbmm_(slope, (gate * own)[:, None, None] * weight_self.T)
        return grad + heads_inside(back, heads), grad_self, grad_neighbour, grad_graph, grad_gate


def mix(
    heads: Tensor, weight_self: Tensor, weight_neighbour: Tensor, graph: Tensor, gate: Tensor
) -> Tensor:
    """Same as the reference; cost b n h d (2d + h). Differentiable once."""
    small = [t.to(heads.dtype) for t in (weight_self, weight_neighbour, graph, gate)]
    # a compiler derives the gradient, and fuses it, itself
    return (
        steps(heads, *small)[0] if torch.compiler.is_compiling() else GatedMix.apply(heads, *small)
    )
