"""Attention of Hugging Face models that asks transformers how to attend.

The module stays, with its projections, rotations and caches: what is added is a score of its own,
by which ``sixfold_learned`` attends.
"""

from __future__ import annotations

import math
import sys

import torch
from torch import nn

from sixfold.attention.multihead import Part
from sixfold.contracts import Heads
from sixfold.integrations.convert._stand_in import OWN, Family, Wanted, point_score

BEFORE = "attended_by"
"""Where a model keeps how it attended."""

PROJECTIONS = (("q_proj", "k_proj"), ("query", "key"), ("q", "k"), ("c_attn", "c_attn"))
WIDTHS = ("head_dim", "attention_head_size", "key_value_proj_dim")


def projections(module: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    """Where queries and keys come from, if `module` is attention."""
    for names in PROJECTIONS:
        if all(isinstance(getattr(module, name, None), nn.Module) for name in names):
            return getattr(module, names[0]), getattr(module, names[1])
    return None


def sizes(module: nn.Module) -> Heads:
    """The heads of an attention module, by the names that models give them.

    Raises ValueError where none fits.
    """
    query, key = projections(module)
    width = next((getattr(module, name) for name in WIDTHS if hasattr(module, name)), None)
    if width is None:
        raise ValueError(f"none of {', '.join(WIDTHS)} tells the width of a head")
    if query is key:
        # one matrix for queries, keys and values
        return Heads(module.num_heads * width, module.num_heads, width, module.num_heads)
    rows, key_rows = query.weight.shape[0], key.weight.shape[0]
    return Heads(query.weight.shape[1], rows // width, width, key_rows // width)


def stretch(score: nn.Module, described: Part, scaling: float | None, d: int) -> None:
    """Let a rate that was not chosen start where the model's scaling puts it, as in `register`."""
    options = {"name": described} if isinstance(described, str) else described
    if scaling is None or "rate" in options or options["name"] in ("dot", "cosine"):
        return
    with torch.no_grad():
        getattr(score, "score", score).log_rate += math.log(scaling * math.sqrt(d))


class HuggingFace(Family):
    """Attention with a configuration that names an implementation."""

    def claims(self, module: nn.Module) -> bool:
        """By its configuration, its name and its projections."""
        config = getattr(module, "config", None)
        is_attention = "Attention" in type(module).__name__
        return (
            is_attention and hasattr(config, "_attn_implementation") and bool(projections(module))
        )

    def stand_in(self, module: nn.Module, wanted: Wanted) -> nn.Module:
        """The score; ValueError for other parts than a score."""
        for part, natural in (("mixer", "none"), ("reach", "full"), ("impl", "auto")):
            if wanted.parts[part] != natural:
                raise ValueError(
                    f"{part} {wanted.parts[part]!r}: only the score can be chosen here"
                )
        if not hasattr(sys.modules[type(module).__module__], "ALL_ATTENTION_FUNCTIONS"):
            raise ValueError(f"{type(module).__name__} does not ask transformers how to attend")
        heads, weight = sizes(module), projections(module)[0].weight
        score = point_score(wanted.score, heads, device=weight.device, dtype=weight.dtype)
        stretch(score, wanted.score, getattr(module, "scaling", None), heads.head_dim)
        return score

    def place(self, model: nn.Module, name: str, stand_in: nn.Module) -> None:
        """Give the module its score."""
        model.get_submodule(name).add_module(OWN, stand_in)

    def settle(self, model: nn.Module) -> None:
        """Let the models inside attend by their modules' scores."""
        from sixfold.integrations.huggingface.attention import LEARNED, PREFIX, register

        register()
        for inner in outermost(model):
            inner.__dict__[BEFORE] = inner.config._attn_implementation
            inner.set_attn_implementation(PREFIX + LEARNED)

    def restore(self, model: nn.Module) -> int:
        """Take the scores away, and attend as before."""
        holders = [module for module in model.modules() if OWN in module._modules]
        for module in holders:
            delattr(module, OWN)
        for inner in outermost(model) if holders else ():
            inner.set_attn_implementation(inner.__dict__.pop(BEFORE))
        return len(holders)


def outermost(model: nn.Module) -> list[nn.Module]:
    """The `PreTrainedModel`s in a model that are in no other."""
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel):
        return [model]
    return [inner for child in model.children() for inner in outermost(child)]


def build() -> HuggingFace:
    """The family."""
    return HuggingFace()
