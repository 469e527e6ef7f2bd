"""Builds the snapshot of a step from what the probes, the weights and the gradients show."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sixfold.attention.multihead import MultiHeadAttention
from sixfold.contracts import PerHead
from sixfold.governor.watch.probe import LayerProbe
from sixfold.ops.statistics.sampled import spectra

UNITS = {
    "loss": "the loss's own",
    "max_logit": "nats",
    "entropy": "1 (of log visible keys)",
    "sigma_max": "1",
    "condition": "1",
    "gradient_norm": "loss per unit weight",
    "times_us": "microseconds",
    "tokens_per_s": "tokens/s",
}


def to_numbers(values: dict[str, list[Tensor]]) -> dict[str, PerHead]:
    """Move every signal of every layer to the host in one transfer."""
    flat = [tensor.double() for tensors in values.values() for tensor in tensors]
    if not flat:
        return {}
    numbers = torch.cat(flat).tolist()
    signals, start = {}, 0
    for name, tensors in values.items():
        layers = []
        for tensor in tensors:
            layers.append(tuple(numbers[start : start + len(tensor)]))
            start += len(tensor)
        signals[name] = tuple(layers)
    return signals


def seen(probes: Sequence[LayerProbe]) -> dict[str, list[Tensor]]:
    """Maximal logits and entropies; absent where a layer did not run."""
    if any(probe.max_logit is None for probe in probes):
        return {}
    return {
        "max_logit": [probe.max_logit for probe in probes],
        "entropy": [probe.entropy for probe in probes],
    }  # type: ignore[dict-item]


def per_query_head(values: Tensor, num_heads: int) -> Tensor:
    """Give every query head the figure of the key or value head it shares."""
    return values.repeat_interleave(num_heads // len(values))


@torch.no_grad()
def matrices(layers: Sequence[MultiHeadAttention]) -> dict[str, list[Tensor]]:
    """Largest singular values and condition numbers of W_Q, W_K, W_V per head."""
    found: dict[str, list[Tensor]] = {}
    for layer in layers:
        for role, weight in layer.materialize().items():
            for name, values in zip(("sigma_max", "condition"), spectra(weight), strict=True):
                shared = per_query_head(values, layer.heads.num_heads)
                found.setdefault(f"{name}_{role}", []).append(shared)
    return found


@torch.no_grad()
def gradients(layers: Sequence[MultiHeadAttention]) -> dict[str, list[Tensor]]:
    """Gradient norm of each head's W_Q, W_K and W_V together; absent before a backward pass."""
    norms = []
    for layer in layers:
        roles = layer.projection.gradients()
        if roles is None:
            return {}
        squares = [
            per_query_head(g.flatten(1).square().sum(1), layer.heads.num_heads)
            for g in roles.values()
        ]
        norms.append(torch.stack(squares).sum(0).sqrt())
    return {"gradient_norm": norms}


def times(probes: Sequence[LayerProbe]) -> dict[str, float]:
    """Microseconds per stage, summed over layers."""
    stages = ("projection", "attention", "mixing")
    complete = [probe.times_us for probe in probes if "mixing" in probe.times_us]
    return {stage: sum(t[stage] for t in complete) for stage in stages} if complete else {}
