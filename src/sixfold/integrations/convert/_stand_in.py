"""What families of attention modules share: a module that stands in for another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from sixfold.attention.multihead import MultiHeadAttention, Part, build_part
from sixfold.attention.projection._belief import FLOOR, START
from sixfold.attention.together import check_held
from sixfold.contracts import Belief, Features, Heads, Rating
from sixfold.ops.attend import choose

OWN = "sixfold_score"
"""The name under which a module that is not swapped keeps a score."""

NATURAL = {"score": "dot", "reach": "full"}
"""Parts with which attention is what it was."""


class Wanted(NamedTuple):
    """The parts that converted attention shall have: a score, and a mixer, a reach and an impl."""

    score: Part
    parts: Mapping[str, Any]

    @property
    def same(self) -> bool:
        """Whether attention so made computes what it computed: a mixer's gate starts at 0."""
        return self.score == NATURAL["score"] and self.parts["reach"] == NATURAL["reach"]


class PointBeliefs(nn.Module):
    """A score of diagonal beliefs over points: the mean is the point, std_h = f(W_h point).

    f(x) = FLOOR + softplus(x + c), and W starts at 0: all deviations are 1. Keys that are kept in a
    cache are points, whose beliefs are made again.
    """

    schema = "point"
    rotation_invariant = False

    def __init__(self, score: nn.Module, heads: Heads, **factory: Any) -> None:
        super().__init__()
        self.score, d = score, heads.head_dim
        self.gives, self.signed = score.gives, score.signed
        self.query_width = nn.Parameter(torch.zeros(heads.num_heads, d, d, **factory))
        self.key_width = nn.Parameter(torch.zeros(heads.num_kv_heads, d, d, **factory))

    def believed(self, point: Tensor, width: Tensor) -> Belief:
        """The belief of points (b, h, n, d)."""
        return Belief(point, FLOOR + softplus(point @ width.to(point.dtype).mT + START))

    def keys(self, key: Tensor) -> Tensor:
        """What the score keeps of the beliefs of keys."""
        return self.score.keys(self.believed(key, self.key_width))

    def forward(self, query: Tensor, keys: Tensor) -> Rating:
        """The rating of kept keys by the beliefs of queries."""
        return self.score(self.believed(query, self.query_width), keys)

    def carry(self, value: Tensor, key: Tensor) -> Tensor:  # noqa: ARG002
        """Values as they are: all beliefs share one frame."""
        return value

    def readout(self, out: Tensor, query: Tensor) -> Tensor:  # noqa: ARG002
        """Outputs as they are."""
        return out

    def recenter_(self, key: Tensor) -> None:
        """Pass on to the score."""
        self.score.recenter_(self.believed(key, self.key_width))

    def scale_head_(self, head: int, power: int) -> None:
        """Pass on to the score."""
        self.score.scale_head_(head, power)


def point_score(score: Part, heads: Heads, **factory: Any) -> nn.Module:
    """A score of points that learns; one of diagonal beliefs is given their widths.

    Raises ValueError for a score of full covariances, whose frames points do not have.
    """
    part = build_part("score", score, heads, **factory)
    if part.schema == "belief":
        raise ValueError(f"score {score!r} rates beliefs with frames, which points do not have")
    return part if part.schema == "point" else PointBeliefs(part, heads, **factory)


def attention_like(
    weight: Tensor, heads: Heads, wanted: Wanted, dropout: float
) -> MultiHeadAttention:
    """A layer of these parts on the device and in the precision of `weight`.

    Its projection and output are there to be replaced by what the model has learned.
    """
    factory = {"device": weight.device, "dtype": weight.dtype}
    layer = MultiHeadAttention(
        heads.d_model, heads.num_heads, heads.head_dim, heads.num_kv_heads,
        dropout=dropout, **{**wanted.parts, "impl": "auto"}, **factory,
    )  # fmt: skip
    layer.score = point_score(wanted.score, heads, **factory)
    layer.impl = wanted.parts["impl"]
    choose.check(layer.score.gives, layer.impl)
    if layer.mixer.mixes_logits and layer.score.gives is not Features:
        check_held(f"mixer {wanted.parts['mixer']!r}", wanted.score, layer.impl)
    gate = getattr(layer.mixer, "gate", None)
    if gate is not None:
        nn.init.zeros_(gate)
    return layer


class StandIn(nn.Module):
    """A module that is called as the one it stands for, which it gives back by `original`."""

    def __init__(self, shell: nn.Module) -> None:
        super().__init__()
        # out of the sight of `parameters()`: what it has learned is held by the stand-in alone
        self.__dict__["shell"] = shell

    def original(self) -> nn.Module:
        """The module this stands for, with the weights that there are now."""
        raise NotImplementedError


class Family:
    """How attention modules of one kind are found, swapped and put back."""

    def claims(self, module: nn.Module) -> bool:
        """Whether `module` is attention of this kind."""
        raise NotImplementedError

    def stand_in(self, module: nn.Module, wanted: Wanted) -> nn.Module:
        """What takes its place; ValueError where something cannot be kept."""
        raise NotImplementedError

    def place(self, model: nn.Module, name: str, stand_in: nn.Module) -> None:
        """Put `stand_in` where the module `name` is."""
        model.set_submodule(name, stand_in)

    def settle(self, model: nn.Module) -> None:
        """What is to be done once when all are placed."""

    def restore(self, model: nn.Module) -> int:
        """Put originals back; how many."""
        raise NotImplementedError


def restore_stand_ins(model: nn.Module, kind: type[StandIn]) -> int:
    """Put back the originals of all stand-ins of one kind."""
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, kind)]
    for name, module in found:
        model.set_submodule(name, module.original().train(module.training))
    return len(found)
