"""Swap the attention modules of a model for Sixfold's, and back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from sixfold import discover
from sixfold.attention.multihead import Part
from sixfold.integrations.convert._stand_in import OWN, Family, StandIn, Wanted

PLACE = "sixfold.integrations.convert"
FAMILIES: dict[str, Family] = {name: discover.load(PLACE, name)() for name in discover.names(PLACE)}


class Kept(NamedTuple):
    """What became of one attention module.

    name: where it is in the model; family: the file that converted it; same: it computes what it
    computed, to rounding; new: parameters that it did not have. All weights it had are kept.
    """

    name: str
    family: str
    same: bool
    new: tuple[str, ...]


def convert(
    model: nn.Module,
    score: Part = "dot",
    *,
    mixer: Part = "none",
    reach: Part = "full",
    impl: str = "auto",
) -> list[Kept]:
    """Let every attention module of `model` rate keys by `score`, with rates that it learns.

    Weights stay the same `nn.Parameter`s. `nn.MultiheadAttention` and timm's `Attention` are
    swapped for modules that are called as they were; modules of Hugging Face keep their
    projections, rotations and caches, and only rate by a score of their own. A model is converted
    in full or not at all.

    Args:
        model: changed in place.
        score: a score of points by name or with options, or ``kl_diagonal``, ``jeffreys`` or
            ``wasserstein2``: queries and keys are then the means of beliefs whose deviations, 1 at
            first, are learned functions of them.
        mixer: how heads talk; not for Hugging Face.
        reach: narrows what the model allows; not for Hugging Face.
        impl: as in `MultiHeadAttention`; not for Hugging Face.

    Returns:
        A `Kept` for every module, in the model's order.

    Raises:
        ValueError: where the model has no attention that any family knows, and for a module that
            cannot be converted, by its name and reason.

    >>> import torch
    >>> layer = nn.TransformerEncoderLayer(16, 4, batch_first=True).eval()
    >>> x = torch.randn(2, 5, 16)
    >>> before = layer(x)
    >>> convert(layer)
    [Kept(name='self_attn', family='mha', same=True, new=())]
    >>> torch.allclose(layer(x), before, atol=1e-5)
    True
    """
    wanted = Wanted(score, {"mixer": mixer, "reach": reach, "impl": impl})
    swaps, report = [], []
    for family, name, module in attention_in(model):
        try:
            stand_in = FAMILIES[family].stand_in(module, wanted).train(module.training)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        swaps.append((FAMILIES[family], name, stand_in))
        old = {id(p) for p in module.parameters()}
        new = tuple(name for name, p in stand_in.named_parameters() if id(p) not in old)
        report.append(Kept(name, family, wanted.same, new))
    if not swaps:
        raise ValueError(
            f"{type(model).__name__} holds no attention that one of these families knows: "
            f"{', '.join(FAMILIES)}"
        )
    for family, name, stand_in in swaps:
        family.place(model, name, stand_in)
    for family in {id(family): family for family, *_ in swaps}.values():
        family.settle(model)
    return report


def attention_in(model: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    """Family, name and module of all attention in a model; none is inside another.

    Raises ValueError where the model is attention itself, which nothing holds, or converted.
    """
    inside: tuple[str, ...] = ()
    # under every name: a module that two places share is swapped in both
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, StandIn) or hasattr(module, OWN):
            raise ValueError(f"{name} is converted: revert the model first")
        claimed = [family for family, found in FAMILIES.items() if found.claims(module)]
        if not claimed or name.startswith(inside):
            continue
        if not name:
            raise ValueError("the model is attention itself: give the module that holds it")
        inside = (*inside, f"{name}.")
        yield claimed[0], name, module


def revert(model: nn.Module) -> int:
    """Put the modules back that `convert` swapped, with the weights they have now; how many.

    What was new is dropped: a model that learned to attend by another score attends by dot product
    again.

    >>> layer = nn.TransformerEncoderLayer(16, 4)
    >>> names = list(layer.state_dict())
    >>> _ = convert(layer, "l1")
    >>> revert(layer), list(layer.state_dict()) == names
    (1, True)
    """
    return sum(family.restore(model) for family in FAMILIES.values())
