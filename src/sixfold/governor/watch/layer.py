"""What the governor holds of one attention layer, ours or not."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from sixfold.attention.multihead import MultiHeadAttention
from sixfold.attention.projection.coordinate import CoordinateProjection
from sixfold.attention.projection.linear import LinearProjection
from sixfold.attention.score.dot import Dot
from sixfold.geometry.hexgrid import HexGrid
from sixfold.governor.watch.capture import Sight
from sixfold.governor.watch.layout import Layout, Piece, Product, Share, Untraced, trace

TRIES = 8
"""Watched passes after which a layer that could not be decided on is given up."""


class Layer(Protocol):
    """One attention layer: what its heads are made of, and how one of them is scaled.

    `refusal` says why its weights are left alone; None where they were verified.
    """

    name: str
    module: nn.Module
    num_heads: int
    num_kv_heads: int
    grid: HexGrid | None
    refusal: str | None

    @property
    def scales(self) -> bool:
        """Whether the logits of its heads can be scaled."""

    def matrices(self) -> dict[str, Tensor]:
        """Weights by role: ``q`` (h, d, c), ``k`` and ``v`` (h_kv, d, c); {} where unknown."""

    def gradients(self) -> dict[str, Tensor] | None:
        """Their gradients, as `matrices`; None where there are none."""

    def pieces(self, head: int) -> dict[str, tuple[Piece, ...]]:
        """By role the weight rows and bias entries of a head; keys and values are its group's.

        Raises ValueError with the refusal, and for a head that does not exist.
        """

    def scale_head_(self, head: int, power: int) -> None:
        """Multiply the logits of one head by 2**power, in place and exactly reversibly."""


def check_head(head: int, num_heads: int) -> None:
    """Raise ValueError for a head that does not exist."""
    if not 0 <= head < num_heads:
        raise ValueError(f"head must be in [0, {num_heads}), got {head}")


def pieces_of(layout: Layout, head: int) -> dict[str, tuple[Piece, ...]]:
    """The pieces of one query head and of the key and value head that it uses."""
    heads = len(layout["q"])
    return {role: shares[head * len(shares) // heads].pieces() for role, shares in layout.items()}


def parameters_of(layout: Layout) -> list[nn.Parameter]:
    """Every parameter of a layout once."""
    pieces = (piece for shares in layout.values() for share in shares for piece in share.pieces())
    return list({id(piece.parameter): piece.parameter for piece in pieces}.values())


def untouchable(layout: Layout, shared: Iterable[nn.Parameter]) -> str | None:
    """Why the parameters of a layout are left alone, if for any reason."""
    parameters, common = parameters_of(layout), {id(parameter) for parameter in shared}
    if not all(parameter.requires_grad for parameter in parameters):
        return "its weights are frozen: they do not require gradients"
    if any(id(parameter) in common for parameter in parameters):
        return "its weights are tied to those of another place in the model"
    return None


class Own:
    """A `sixfold.MultiHeadAttention`."""

    def __init__(self, name: str, module: MultiHeadAttention) -> None:
        self.name, self.module = name, module
        self.num_heads, self.num_kv_heads = module.heads.num_heads, module.heads.num_kv_heads
        self.shared: Sequence[nn.Parameter] = ()

    @property
    def grid(self) -> HexGrid | None:
        """The hexagonal grid its heads sit on, if they do."""
        return self.module.grid

    @property
    def layout(self) -> Layout | None:
        """Rows of its fused weight; None where heads are more than rows of a weight."""
        projection, heads = self.module.projection, self.module.heads
        if isinstance(projection, LinearProjection):
            fused = projection.qkv
        elif isinstance(projection, CoordinateProjection):
            fused = projection.base
        else:
            return None
        if type(fused) is not nn.Linear:
            return None
        d, start, layout = heads.head_dim, 0, {}
        for role, count in zip("qkv", (self.num_heads, *[self.num_kv_heads] * 2), strict=True):
            starts = range(start, start + count * d, d)
            layout[role] = [Share(fused.weight, 0, fused.bias, o, d, o) for o in starts]
            start += count * d
        return layout

    @property
    def refusal(self) -> str | None:
        """Why its weights are left alone; its logits can be scaled all the same."""
        layout = self.layout
        if layout is None:
            kind = type(self.module.projection).__name__
            return f"the heads of {kind} are more than rows of one weight"
        return untouchable(layout, self.shared)

    @property
    def scales(self) -> bool:
        """Always: beside its weights."""
        return True

    def parameters(self) -> list[nn.Parameter]:
        """What its heads are made of."""
        return [] if self.layout is None else parameters_of(self.layout)

    def matrices(self) -> dict[str, Tensor]:
        """Weights by role, as the layer itself tells them."""
        return self.module.materialize()

    def gradients(self) -> dict[str, Tensor] | None:
        """Gradients of the heads' own weights by role."""
        return self.module.projection.gradients()

    def pieces(self, head: int) -> dict[str, tuple[Piece, ...]]:
        """Rows of the fused weight, and entries of its bias."""
        check_head(head, self.num_heads)
        if self.refusal is not None:
            raise ValueError(f"{self.name}: {self.refusal}")
        return pieces_of(self.layout, head)

    def scale_head_(self, head: int, power: int) -> None:
        """Multiply the logits of one head by 2**power, apart from its weights."""
        self.module.scale_head_(head, power)


class Foreign:
    """Attention of any other kind, as its calls show it."""

    grid = None

    def __init__(self, name: str, module: nn.Module, sight: Sight) -> None:
        query, key, *_ = sight.points or sight.observation.rating
        self.name, self.module = name, module
        self.num_heads, self._key_heads = query.shape[1], key.shape[1]
        self.layout, self.score = sight.layout, sight.score
        self.shared: Sequence[nn.Parameter] = ()
        self._untraced = "no pass was traced yet" if sight.points is not None else UNPLAIN
        self._tries = 0 if self.layout is None and sight.points is not None else TRIES

    @property
    def undecided(self) -> bool:
        """Whether one more traced pass may tell what its heads are made of."""
        return self._tries < TRIES

    @property
    def num_kv_heads(self) -> int:
        """Key heads: as many as there are different ones, where they were traced."""
        return self._key_heads if self.layout is None else len(self.layout["k"])

    @property
    def has_own_score(self) -> bool:
        """Whether its score, which scales heads by itself, is a part of it."""
        return any(part is self.score for part in self.module.modules())

    @property
    def refusal(self) -> str | None:
        """Why its weights are left alone; None where they were verified."""
        adapter = adapter_in(self.module)
        if adapter is not None:
            return f"{adapter} adds to its weights: no one weight makes its heads"
        if not (self.score is None or isinstance(self.score, Dot) or self.has_own_score):
            return (
                f"no power of its weights scales the logits of {type(self.score).__name__}, and "
                "the layer has no rate of its own: sixfold.integrations.convert gives it one"
            )
        return self._untraced if self.layout is None else untouchable(self.layout, self.shared)

    @property
    def scales(self) -> bool:
        """Where its weights may be touched, and beside them by a score of its own."""
        return self.refusal is None or self.has_own_score

    def trace(self, sight: Sight, products: Sequence[Product]) -> None:
        """Try to find the rows of a weight that make each head."""
        self._tries += 1
        try:
            self.layout = trace(*sight.points, products)
            self._tries = TRIES
        except Untraced as reason:
            self._untraced = str(reason)
            self._tries = self._tries if reason.again else TRIES

    def parameters(self) -> list[nn.Parameter]:
        """What its heads are made of, as far as it is known."""
        return [] if self.layout is None else parameters_of(self.layout)

    def matrices(self) -> dict[str, Tensor]:
        """The traced rows by role; {} where they are not known."""
        layout = self.layout or {}
        return {role: stacked(shares, gradient=False) for role, shares in layout.items()}

    def gradients(self) -> dict[str, Tensor] | None:
        """Gradients of the traced rows; None where one is missing."""
        if self.layout is None or any(
            share.weight.grad is None for shares in self.layout.values() for share in shares
        ):
            return None
        return {role: stacked(shares, gradient=True) for role, shares in self.layout.items()}

    def pieces(self, head: int) -> dict[str, tuple[Piece, ...]]:
        """The traced rows of a head, and entries of their biases."""
        check_head(head, self.num_heads)
        if self.refusal is not None:
            raise ValueError(f"{self.name}: {self.refusal}")
        return pieces_of(self.layout, head)

    def scale_head_(self, head: int, power: int) -> None:
        """Multiply the logits of one head by 2**power, by its own score or through its weights.

        Of weights a key head of its own takes half of the power, rounded to zero so that the
        opposite power takes back the same; a shared one takes none, and W_Q the rest. Whole powers
        of two change exponents alone: what is taken back is restored to the bit.
        Raises ValueError with the refusal, and where a weight's exponents have no room for it.
        Source: Kimi K2, arXiv 2507.20534, section 2.1 (QK-Clip).
        """
        if self.has_own_score:
            check_head(head, self.num_heads)
            self.score.scale_head_(head, power)
            return
        found = self.pieces(head)
        theirs = int(power / 2) if self.num_kv_heads == self.num_heads else 0
        scaled = []
        for role, exponent in (("q", power - theirs), ("k", theirs)):
            for piece in found[role]:
                old = piece.view()
                new = old * 2.0**exponent
                if not torch.equal(new * 2.0**-exponent, old):
                    raise ValueError(
                        f"{self.name}: 2**{exponent} times W_{role.upper()} of head {head} does "
                        f"not fit {old.dtype}: taking it back would not restore every bit"
                    )
                scaled.append((old, new))
        for old, new in scaled:
            old.copy_(new)


UNPLAIN = "a weight of nn.MultiheadAttention is no parameter, as under a parametrization"


def stacked(shares: Sequence[Share], *, gradient: bool) -> Tensor:
    """(h, d, c) of the weights of some heads, or of their gradients."""
    return torch.stack(
        [share.rows(share.weight.grad if gradient else share.weight.data) for share in shares]
    )


def adapter_in(module: nn.Module) -> str | None:
    """The kind of the first adapter of PEFT inside a module."""
    library = sys.modules.get("peft.tuners.tuners_utils")
    if library is None:  # a model with an adapter imports it
        return None
    inside = (part for part in module.modules() if isinstance(part, library.BaseTunerLayer))
    return next((f"{type(part).__module__}.{type(part).__name__}" for part in inside), None)
