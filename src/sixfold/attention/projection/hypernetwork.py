"""Projections written by a small network, from the head's coordinate and from what is in view.

W_h(s) = M_h + sum over r of a_hr(s) M_r,   a(s) = sum over k of c_k(s) phi_k(q_h, r_h)

The M_r are a bank of matrices as large as plain projections; phi_k is a basis generated from the
coordinate, c_0 = 1 and c_k(s) read the summary s: the mean of the tokens that the caller's masks
let a token see, whatever the reach then narrows. Under a causal mask that is the prefix mean, so no
weight depends on the future. Q, K and V have banks, bases and coefficients of their own. Source of
the idea: Ha et al., HyperNetworks, arXiv 1609.09106.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sixfold.attention.projection.coordinate import places
from sixfold.attention.projection.linear import split_heads
from sixfold.contracts import Cache, Emission, Heads, Visibility
from sixfold.geometry.hexgrid import HexGrid
from sixfold.ops.attend.reference import visible

BASIS, HIDDEN = 4, 64


def summaries(tokens: Tensor, visibility: Visibility, n: int) -> Tensor:
    """Mean of the tokens each of the last n positions may see: (b, n or 1, d_model).

    Raises ValueError where heads see different tokens: one summary serves all of them. Float masks
    may differ between heads as long as they hide the same.
    """
    if visibility.mask is None and not visibility.is_causal:
        return tokens.mean(1, keepdim=True)
    if visibility.mask is None:
        count = torch.arange(1, tokens.shape[1] + 1, device=tokens.device, dtype=tokens.dtype)
        return (tokens.cumsum(1) / count[:, None])[:, -n:]
    mask = visible(visibility, n, tokens.shape[1], tokens.device)
    seen = mask if mask.dtype == torch.bool else ~mask.isneginf()
    if seen.ndim == 4:
        if seen.shape[1] > 1 and not torch.equal(seen, seen[:, :1].expand_as(seen)):
            raise ValueError(
                "projection 'hypernetwork' cannot serve an attn_mask that differs between heads: "
                f"one summary of the tokens in view serves all; got mask {tuple(mask.shape)}"
            )
        seen = seen[:, 0]
    seen = seen.to(tokens.dtype)
    seen = seen.expand(*seen.shape[:-1], tokens.shape[1])
    return (seen @ tokens) / seen.sum(-1, keepdim=True).clamp(min=1)


class Writer(nn.Module):
    """The weights of one role (queries, keys or values)."""

    def __init__(self, heads: Heads, count: int, grid: HexGrid, **factory: object) -> None:
        super().__init__()
        self.count, self.head_dim = count, heads.head_dim
        self.bank = nn.Linear(heads.d_model, count * heads.head_dim, bias=False, **factory)
        self.basis = nn.Sequential(
            nn.Linear(2, HIDDEN, **factory), nn.GELU(), nn.Linear(HIDDEN, BASIS * count, **factory)
        )
        self.reader = nn.Sequential(
            nn.Linear(heads.d_model, HIDDEN, **factory),
            nn.Tanh(),
            nn.Linear(HIDDEN, BASIS - 1, **factory),
        )
        self.register_buffer("place", places(grid, count).to(self.bank.weight))
        nn.init.normal_(self.bank.weight, std=heads.d_model**-0.5)

    def coefficients(self, summary: Tensor) -> Tensor:
        """I + a(s): (..., h, h) for summaries (..., d_model)."""
        basis = self.basis(self.place).unflatten(-1, (BASIS, self.count)) * self.count**-0.5
        read = torch.einsum("...k,hkr->...hr", self.reader(summary), basis[:, 1:])
        own = torch.eye(self.count, device=basis.device, dtype=basis.dtype)
        return own + basis[:, 0] + read

    def forward(self, tokens: Tensor, summary: Tensor) -> Tensor:
        """(b, h, n, d) from tokens (b, n, d_model) and their summaries (b, n or 1, d_model)."""
        spread = split_heads(self.bank(tokens), self.head_dim)
        coefficients = self.coefficients(summary)
        if coefficients.shape[1] == 1:
            return torch.einsum("brnd,bhr->bhnd", spread, coefficients[:, 0])
        return torch.einsum("brnd,bnhr->bhnd", spread, coefficients)


class HypernetworkProjection(nn.Module):
    """Weights per head, and per token where tokens see different things."""

    schema = "point"
    ordered = None

    def __init__(self, heads: Heads, **factory: object) -> None:
        super().__init__()
        self.heads, self.grid = heads, HexGrid.of(heads.num_heads)
        self.q = Writer(heads, heads.num_heads, self.grid, **factory)
        self.k = Writer(heads, heads.num_kv_heads, self.grid, **factory)
        self.v = Writer(heads, heads.num_kv_heads, self.grid, **factory)

    def forward(
        self, x: Tensor, context: Tensor, visibility: Visibility, cache: Cache | None
    ) -> Emission:
        """Project x (b, n, d_model) and context (b, m, d_model)."""
        if context is x:
            tokens = x if cache is None else cache.append("tokens", x)
            ours = theirs = summaries(tokens, visibility, x.shape[1])
        else:
            rows = None if visibility.mask is None else visibility.mask.shape[-2]
            if visibility.is_causal or rows not in (None, 1):
                raise ValueError(
                    "projection 'hypernetwork' cannot serve cross-attention whose queries see "
                    "different keys (attn_mask or is_causal): a key's weights would tell each "
                    "query of the others' keys; use key_mask, or projection 'coordinate'"
                )
            ours = theirs = summaries(context, visibility, 1)
        return Emission(self.q(x, ours), self.k(context, theirs), self.v(context, theirs))

    def materialize(self) -> dict[str, Tensor]:
        """Plain weights by role at an empty view (s = 0); with a view they differ by input."""
        weights = {}
        for name, writer in (("q", self.q), ("k", self.k), ("v", self.v)):
            bank = writer.bank.weight.unflatten(0, (writer.count, -1))
            empty = bank.new_zeros(self.heads.d_model)
            weights[name] = torch.einsum("hr,rdm->hdm", writer.coefficients(empty), bank)
        return weights

    def gradients(self) -> dict[str, Tensor] | None:
        """Gradients of each head's own matrix of the bank, by role."""
        found = {name: getattr(self, name).bank.weight.grad for name in "qkv"}
        if any(gradient is None for gradient in found.values()):
            return None
        return {name: g.unflatten(0, (-1, self.heads.head_dim)) for name, g in found.items()}


def build(heads: Heads, **factory: object) -> HypernetworkProjection:
    """The projection of `heads`, whose number must fill a hexagonal grid."""
    return HypernetworkProjection(heads, **factory)
