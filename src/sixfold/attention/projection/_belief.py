"""What projections to beliefs share: one matrix for means, shapes of covariances and values."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from sixfold.contracts import Belief, Cache, Emission, Heads, Visibility

FLOOR = 0.05  # of a deviation: a precision beyond 400 has no digits left in half precision
START = math.log(math.expm1(1 - FLOOR))  # softplus of this and the floor make 1
QUIET = 0.1  # how much a fresh covariance varies beside a fresh mean


def entries(tokens: Tensor, weight: Tensor, width: int) -> Tensor:
    """W x by head, entry by entry: (width, b, h, n), where `lanes` want the tokens."""
    flat = weight @ tokens.flatten(0, 1).mT
    return flat.unflatten(0, (-1, width)).unflatten(-1, tokens.shape[:2]).permute(1, 2, 0, 3)


class BeliefProjection(nn.Module):
    """Means, covariances and values from one matrix; `tied`: one belief serves as query and key."""

    grid = None

    def __init__(self, heads: Heads, shapes: int, *, tied: bool, **factory: Any) -> None:
        super().__init__()
        if tied and heads.num_heads != heads.num_kv_heads:
            raise ValueError(
                "tied beliefs serve as queries and keys: num_heads and num_kv_heads must be equal, "
                f"got {heads.num_heads} and {heads.num_kv_heads}"
            )
        self.heads, self.tied, self.width = heads, tied, heads.head_dim + shapes
        queries, keys = heads.num_heads * self.width, heads.num_kv_heads * self.width
        self.roles = [queries, 0 if tied else keys, heads.num_kv_heads * heads.head_dim]
        self.beliefs = nn.Linear(heads.d_model, sum(self.roles), bias=False, **factory)
        nn.init.normal_(self.beliefs.weight, std=heads.d_model**-0.5)
        for rows in self.beliefs.weight.data.split(self.roles)[:2]:
            rows.unflatten(0, (-1, self.width))[:, heads.head_dim :].mul_(QUIET)

    def shape(self, raw: Tensor) -> Tensor:
        """The factor of a covariance from `raw` numbers, (b, h, n, shapes)."""
        raise NotImplementedError

    def framed(self, belief: Belief, tokens: Tensor, past: int) -> Belief:  # noqa: ARG002
        """The same belief in the frames of its tokens; here all share one."""
        return belief

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        visibility: Visibility,  # noqa: ARG002
        cache: Cache | None,
    ) -> Emission:
        """Beliefs of x (b, n, d_model) as queries, of context (b, m, d_model) as keys."""
        past = 0 if cache is None else cache.length
        for_query, for_key, for_value = self.beliefs.weight.split(self.roles)
        query = self._belief(x, for_query, past)
        if self.tied and context is x:
            key = query
        else:
            key = self._belief(context, for_query if self.tied else for_key, past)
        value = entries(context, for_value, self.heads.head_dim).movedim(0, -1)
        return Emission(query, key, value)

    def _belief(self, tokens: Tensor, weight: Tensor, past: int) -> Belief:
        mean, raw = entries(tokens, weight, self.width).tensor_split([self.heads.head_dim])
        belief = Belief(mean.movedim(0, -1), self.shape(raw.movedim(0, -1)))
        return self.framed(belief, tokens, past)

    def materialize(self) -> dict[str, Tensor]:
        """Weights of the means of queries and keys, and of the values, by role."""
        return self._by_role(self.beliefs.weight)

    def gradients(self) -> dict[str, Tensor] | None:
        """Gradients of the weights by role."""
        gradient = self.beliefs.weight.grad
        return None if gradient is None else self._by_role(gradient)

    def _by_role(self, rows: Tensor) -> dict[str, Tensor]:
        query, key, value = rows.split(self.roles)
        d = self.heads.head_dim
        means = {"q": query, "k": query if self.tied else key}
        by_role = {name: part.unflatten(0, (-1, self.width))[:, :d] for name, part in means.items()}
        return by_role | {"v": value.unflatten(0, (-1, d))}
