"""timm's `Attention`: queries and keys as its own normalisation passes them on."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from sixfold.analysis.families._watch import Family, Log, LogOf, after, before
from sixfold.analysis.measure import sight, tokens_of
from sixfold.attention.masks import visibility_of
from sixfold.contracts import Features, Observation


class Watcher:
    """Hooks around one layer."""

    def __init__(self, layer: nn.Module, log: Log, stack: ExitStack) -> None:
        self.log = log
        self.query: Tensor | None = None
        self.key: Tensor | None = None
        before(layer, self.start, stack)
        after(layer.q_norm, self.take_query, stack)
        after(layer.k_norm, self.take_key, stack)
        before(layer.proj, self.attended, stack)
        after(layer, self.end, stack)

    def start(self, *_: Any) -> None:
        """The layer begins."""
        self.log.start()

    def take_query(self, *passed: Any) -> None:
        """Queries (b, h, n, d), as they will be rated."""
        self.query = passed[-1]

    def take_key(self, *passed: Any) -> None:
        """Keys, after which attention begins."""
        self.key = passed[-1]
        self.log.mark("projection")

    def attended(self, *_: Any) -> None:
        """The output projection begins."""
        self.log.mark("attention")

    def end(self, layer: nn.Module, args: tuple[Any, ...], given: dict[str, Any], _: Any) -> None:
        """Measure what the layer did."""
        self.log.end("output")
        mask = args[1] if len(args) > 1 else given.get("attn_mask")
        is_causal = args[2] if len(args) > 2 else given.get("is_causal", False)
        shape = (*self.query.shape[:3], self.key.shape[2])
        visibility = visibility_of(mask, None, shape, is_causal=is_causal)
        observation = Observation(Features(self.query, self.key, layer.scale), visibility)
        self.log.show(sight(observation, tokens_of(visibility.mask), together=True))
        self.query = self.key = None


def watch(model: nn.Module, stack: ExitStack, log_of: LogOf) -> None:
    """Hooks around every layer whose forward pass is timm's own."""
    known = sys.modules.get("timm.layers.attention")
    if known is None:  # a model of timm imports it
        return
    for layer in model.modules():
        if isinstance(layer, known.Attention) and type(layer).forward is known.Attention.forward:
            log = log_of(layer, "timm")
            if log is not None:
                Watcher(layer, log, stack)


def build() -> Family:
    """Every `timm.layers.Attention`; window and rotary attention are other modules."""
    return Family("timm.layers.Attention", watch)
