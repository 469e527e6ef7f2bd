from __future__ import annotations

from sixfold.contracts import Snapshot


def snapshot(
    step: int, logits: list[float], entropies: list[float] | None = None, **more
) -> Snapshot:
    """One layer; the heads have these maximal logits and entropies."""
    entropies = [0.8] * len(logits) if entropies is None else entropies
    signals = {"max_logit": (tuple(logits),), "entropy": (tuple(entropies),)}
    return Snapshot(
        step, more.get("loss", 2.0), {**signals, **more.get("signals", {})},
        more.get("scalars", {}), more.get("times_us", {}),
    )  # fmt: skip
