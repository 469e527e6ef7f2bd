"""`timm.layers.Attention`, the attention of its vision transformers. It is not imported."""

from __future__ import annotations

from torch import Tensor, nn

from sixfold.contracts import Cache, Emission, Heads, Visibility
from sixfold.integrations.convert._stand_in import (
    Family,
    StandIn,
    Wanted,
    attention_like,
    restore_stand_ins,
)

HOMES = ("timm.layers.attention", "timm.models.vision_transformer")


class NormedProjection(nn.Module):
    """A projection whose queries and keys are normalised, each head by itself."""

    def __init__(self, projection: nn.Module, q_norm: nn.Module, k_norm: nn.Module) -> None:
        super().__init__()
        self.projection, self.q_norm, self.k_norm = projection, q_norm, k_norm
        self.heads, self.grid = projection.heads, projection.grid
        self.schema, self.ordered = projection.schema, projection.ordered

    def forward(
        self, x: Tensor, context: Tensor, visibility: Visibility, cache: Cache | None
    ) -> Emission:
        """Project, then normalise."""
        query, key, value = self.projection(x, context, visibility, cache)
        return Emission(self.q_norm(query), self.k_norm(key), value)

    def materialize(self) -> dict[str, Tensor]:
        """The weights before the norms."""
        return self.projection.materialize()

    def gradients(self) -> dict[str, Tensor] | None:
        """Gradients of these."""
        return self.projection.gradients()


class ForTimm(StandIn):
    """Called as `timm.layers.Attention` is."""

    def __init__(self, shell: nn.Module, wanted: Wanted) -> None:
        super().__init__(shell)
        weight, num_heads = shell.qkv.weight, shell.num_heads
        heads = Heads(weight.shape[1], num_heads, weight.shape[0] // 3 // num_heads, num_heads)
        self.attention = attention_like(weight, heads, wanted, shell.attn_drop.p)
        self.attention.projection.qkv = shell.qkv
        self.is_normed = not isinstance(shell.q_norm, nn.Identity)
        if self.is_normed:
            projection = NormedProjection(self.attention.projection, shell.q_norm, shell.k_norm)
            self.attention.projection = projection
        self.attention.output = shell.proj
        self.proj_drop = shell.proj_drop

    def original(self) -> nn.Module:
        """The shell, given back what was learned."""
        projection = self.attention.projection
        if self.is_normed:
            self.shell.q_norm, self.shell.k_norm = projection.q_norm, projection.k_norm
            projection = projection.projection
        self.shell.qkv, self.shell.proj = projection.qkv, self.attention.output
        self.shell.proj_drop = self.proj_drop
        return self.shell

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,  # noqa: FBT001, FBT002 - the signature that callers know
    ) -> Tensor:
        """Attend within x (b, n, dim); a boolean mask is True where a key is seen."""
        return self.proj_drop(self.attention(x, attn_mask=attn_mask, is_causal=is_causal))


class Timm(Family):
    """timm's plain attention, with or without norms of queries and keys."""

    def claims(self, module: nn.Module) -> bool:
        """By where its class comes from."""
        kind = type(module)
        return kind.__module__ in HOMES and kind.__name__ == "Attention"

    def stand_in(self, module: nn.Module, wanted: Wanted) -> nn.Module:
        """Raise ValueError for what a layer of ours does not have."""
        if getattr(module, "gate", None) is not None:
            raise ValueError("gated attention has a gate that ours has not")
        if not isinstance(getattr(module, "norm", nn.Identity()), nn.Identity):
            raise ValueError("scale_norm normalises what heads give, which ours does not")
        return ForTimm(module, wanted)

    def restore(self, model: nn.Module) -> int:
        """Put back the modules."""
        return restore_stand_ins(model, ForTimm)


def build() -> Timm:
    """The family."""
    return Timm()
