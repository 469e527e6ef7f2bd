"""Sixfold's own attention, through the probe that every layer has."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from sixfold.analysis.families._watch import Family, Log, LogOf, before, put
from sixfold.analysis.measure import sight, tokens_of
from sixfold.attention.masks import visibility_of
from sixfold.attention.multihead import MultiHeadAttention
from sixfold.contracts import Observation


class Probe:
    """Passes on what a layer shows, with the masks that its caller gave."""

    def __init__(self, log: Log) -> None:
        self.log = log
        self.masks: tuple[Tensor | None, Tensor | None] = (None, None)
        self.together = True

    def remember(self, _: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        """What the caller gave: the reach narrows it, and padding is what the caller hides."""
        self.masks = given.get("attn_mask"), given.get("key_mask")
        context = args[1] if len(args) > 1 else given.get("context")
        self.together = context is None or context is (args[0] if args else given["x"])

    def mark(self, stage: str) -> None:
        """Note the time."""
        if stage == "start":
            self.log.start()
        elif stage == "output":
            self.log.end("output")
        else:
            self.log.mark(stage)

    def observe(self, observation: Observation) -> None:
        """Measure it."""
        query, key = observation.rating.query, observation.rating.key
        shape = (*query.shape[:3], key.shape[-2])
        caller = visibility_of(*self.masks, shape, is_causal=False)
        self.log.show(sight(observation, tokens_of(caller.mask), together=self.together))


def watch(model: nn.Module, stack: ExitStack, log_of: LogOf) -> None:
    """Set a probe on every layer."""
    for layer in model.modules():
        log = log_of(layer, "sixfold") if isinstance(layer, MultiHeadAttention) else None
        if log is None:
            continue
        probe = Probe(log)
        before(layer, probe.remember, stack)
        put(layer, "probe", probe, stack)
        # a layer shows itself in training alone; its parts stay as they are, and nothing is dropped
        put(layer, "dropout", 0.0, stack)
        put(layer, "training", True, stack)  # noqa: FBT003 - the value of an attribute


def build() -> Family:
    """Every `sixfold.MultiHeadAttention`, whatever its parts."""
    return Family("sixfold.MultiHeadAttention", watch)
