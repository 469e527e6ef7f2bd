"""Reads the heads of a model during one forward pass, on the steps it is asked to."""

from __future__ import annotations

import time
from typing import Literal

import torch
from torch import Tensor, nn

from sixfold.attention.multihead import MultiHeadAttention
from sixfold.contracts import Observation
from sixfold.ops.statistics.sampled import head_statistics, sampled

Stage = Literal["start", "projection", "attention", "mixing"]


def attention_layers(model: nn.Module) -> list[MultiHeadAttention]:
    """The attention layers of a model, in order.

    Raises ValueError where there is none: there would be nothing to watch.
    """
    layers = [module for module in model.modules() if isinstance(module, MultiHeadAttention)]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no sixfold.MultiHeadAttention to watch; build the model "
            "with it, e.g. sixfold.LanguageModel(...)"
        )
    return layers


def clock_us(device: torch.device) -> float:
    """Microseconds now, after the work queued on an accelerator."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return 1e6 * time.perf_counter()


class LayerProbe:
    """What one layer shows: statistics and times of the first pass, entropies of every pass.

    Args:
        measure: take statistics and times on the next pass.
        hold: heads whose entropy must stay differentiable, for a term in the objective.
    """

    def __init__(self, device: torch.device, *, measure: bool, hold: tuple[int, ...]) -> None:
        self.device, self.measure, self.hold = device, measure, hold
        self.max_logit: Tensor | None = None
        self.entropy: Tensor | None = None
        self.redundancy: Tensor | None = None
        self.held: Tensor | None = None
        self.error: Exception | None = None
        self.times_us: dict[str, float] = {}
        self.tokens = 0
        self._last = 0.0

    def mark(self, stage: Stage) -> None:
        """Note the time since the stage before."""
        if self.measure and "mixing" not in self.times_us:
            now = clock_us(self.device)
            if stage != "start":
                self.times_us[stage] = now - self._last
            self._last = now

    def observe(self, observation: Observation) -> None:
        """Take statistics; they are no part of the graph unless a head is held.

        What goes wrong is kept in `error`: a forward pass does not fail for being watched.
        """
        try:
            self._observe(observation)
        except Exception as error:  # noqa: BLE001 - raised by the governor after the step
            self.error = error

    def _observe(self, observation: Observation) -> None:
        query = observation.rating.query
        self.tokens += query.shape[0] * query.shape[-2]
        few = sampled(observation)
        if self.measure and self.max_logit is None:
            with torch.no_grad():
                self.max_logit, self.entropy, self.redundancy = head_statistics(few)
            # the time of looking is not the time of mixing
            self._last = clock_us(self.device)
        if self.hold and torch.is_grad_enabled():
            self.held = head_statistics(few)[1][list(self.hold)]
