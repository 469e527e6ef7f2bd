"""Linear projections, fused into one matrix: [q; k; v] = W x + b."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import linear

from sixfold.contracts import Cache, Emission, Heads, Visibility


def split_heads(flat: Tensor, head_dim: int) -> Tensor:
    """(b, n, h d) -> (b, h, n, d), a view."""
    return flat.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def project(
    x: Tensor, context: Tensor, weight: Tensor, bias: Tensor | None, heads: Heads
) -> Emission:
    """Apply fused weights ((h + 2 h_kv) d, d_model) to x and, for keys and values, to context."""
    queries = heads.num_heads * heads.head_dim
    keys = heads.num_kv_heads * heads.head_dim
    if context is x:
        parts = linear(x, weight, bias).split([queries, keys, keys], dim=-1)
    else:
        head_bias, rest = (None, None) if bias is None else (bias[:queries], bias[queries:])
        query = linear(x, weight[:queries], head_bias)
        parts = (query, *linear(context, weight[queries:], rest).split([keys, keys], dim=-1))
    return Emission(*(split_heads(part, heads.head_dim) for part in parts))


def called(module: nn.Module, x: Tensor, context: Tensor, heads: Heads) -> Emission:
    """Apply a module in the place of fused weights: an adapter, as LoRA's, must be heard."""
    own = module(x)
    other = own if context is x else module(context)
    queries = heads.num_heads * heads.head_dim
    flat = (own[..., :queries], *other[..., queries:].chunk(2, dim=-1))
    return Emission(*(split_heads(part, heads.head_dim) for part in flat))


def split_weight(weight: Tensor, heads: Heads) -> dict[str, Tensor]:
    """Fused rows as q (h, d, d_model), k and v (h_kv, d, d_model)."""
    sizes = [heads.num_heads, heads.num_kv_heads, heads.num_kv_heads]
    rows = weight.unflatten(0, (-1, heads.head_dim)).split(sizes)
    return dict(zip("qkv", rows, strict=True))


class LinearProjection(nn.Module):
    """One `nn.Linear` for queries, keys and values."""

    grid = None
    schema = "point"
    ordered = None

    def __init__(self, heads: Heads, *, bias: bool = False, **factory: object) -> None:
        super().__init__()
        self.heads = heads
        rows = (heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim
        self.qkv = nn.Linear(heads.d_model, rows, bias=bias, **factory)
        nn.init.normal_(self.qkv.weight, std=heads.d_model**-0.5)

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        visibility: Visibility,  # noqa: ARG002
        cache: Cache | None,  # noqa: ARG002
    ) -> Emission:
        """Project x (b, n, d_model) and context (b, m, d_model)."""
        if context is not x and type(self.qkv) is nn.Linear:
            return project(x, context, self.qkv.weight, self.qkv.bias, self.heads)
        return called(self.qkv, x, context, self.heads)

    def materialize(self) -> dict[str, Tensor]:
        """Plain weights by role, views of the fused matrix."""
        return split_weight(self.qkv.weight, self.heads)

    def gradients(self) -> dict[str, Tensor] | None:
        """Gradients of the weights by role."""
        gradient = self.qkv.weight.grad
        return None if gradient is None else split_weight(gradient, self.heads)


def build(heads: Heads, *, bias: bool = False, **factory: object) -> LinearProjection:
    """The projection of `heads`; option ``bias``."""
    return LinearProjection(heads, bias=bias, **factory)
