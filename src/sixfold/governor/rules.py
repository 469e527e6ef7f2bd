"""The alarm rules: each looks at one kind of signal, against limits and against the past."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from itertools import pairwise

from sixfold.contracts import WHOLE, HeadId, Snapshot, layer_of
from sixfold.governor.alarms import (
    FALLS,
    SHORT,
    STEPS,
    Alarm,
    Memory,
    deviation,
    history,
    own_median,
    worst_loss,
)
from sixfold.governor.limits import AlarmLimits


def alarms(memory: Memory, snapshot: Snapshot, limits: AlarmLimits) -> list[Alarm]:
    """Every alarm that holds at this snapshot."""
    rules = (
        finite_rules(snapshot, limits),
        loss_rules(memory, snapshot, limits),
        logit_rules(memory, snapshot, limits),
        entropy_rules(memory, snapshot, limits),
        gradient_rules(memory, snapshot, limits),
        update_rules(memory, snapshot, limits),
        matrix_rules(snapshot, limits),
        pace_rules(memory, snapshot, limits),
    )
    return [alarm for rule in rules for alarm in rule]


def per_head(snapshot: Snapshot, signal: str) -> Iterator[tuple[HeadId, float]]:
    """Every head's value of a signal; nothing where it was not measured."""
    for layer, values in enumerate(snapshot.signals.get(signal, ())):
        for head, value in enumerate(values):
            yield HeadId(layer, head), value


def finite_rules(snapshot: Snapshot, limits: AlarmLimits) -> Iterator[Alarm]:
    """A gradient or a loss that is not finite."""
    if not limits.finite:
        return
    gradient = snapshot.scalars.get("gradient_norm", 0.0)
    if not math.isfinite(gradient):
        yield Alarm(snapshot.step, "critical", "gradient_norm", WHOLE, gradient, math.inf)
    if snapshot.scalars.get("loss_finite", 1.0) == 0.0:
        yield Alarm(snapshot.step, "critical", "loss", WHOLE, snapshot.loss, math.inf)


def loss_rules(memory: Memory, snapshot: Snapshot, limits: AlarmLimits) -> Iterator[Alarm]:
    """A run that is worse than when it began, a spike, and a loss that does not fall."""
    step, loss = snapshot.step, snapshot.loss
    if math.isnan(loss):
        return
    worst = worst_loss(memory, limits)
    # losses are counted, not steps: some runs are told of one only now and then
    if memory.worse_for >= limits.loss_patience and worst is not None and not loss <= worst:
        yield Alarm(step, "critical", "loss", WHOLE, loss, worst)
    if limits.loss_spike is not None and len(memory.losses) == STEPS:
        middle = statistics.median(memory.losses)
        scatter = max(deviation(memory.losses, middle), 0.01 * abs(middle))
        limit = middle + limits.loss_spike * scatter
        if loss > limit:
            yield Alarm(step, "notice", "loss", WHOLE, loss, limit)
    stalled = limits.loss_stalled
    if stalled is not None and step % stalled == 0 and len(memory.losses) >= stalled:
        past = memory.losses[-stalled]
        if loss >= past:
            yield Alarm(step, "warning", "loss", WHOLE, loss, past)


def growing(memory: Memory, head: HeadId, value: float, factor: float) -> bool:
    """Whether a head's logit is `factor` above what it was a few samples ago."""
    past = history(memory, "max_logit", head)[-SHORT:]
    return not past or value > factor * past[0]


def logit_rules(memory: Memory, snapshot: Snapshot, limits: AlarmLimits) -> Iterator[Alarm]:
    """Large logits: critical by themselves, a warning where they also grow."""
    for head, value in per_head(snapshot, "max_logit"):
        critical, warning = limits.logit_critical, limits.logit_warning
        if critical is not None and not value <= critical:
            yield Alarm(snapshot.step, "critical", "max_logit", head, value, critical)
        elif (
            warning is not None
            and value > warning
            and growing(memory, head, value, limits.logit_growth)
        ):
            yield Alarm(snapshot.step, "warning", "max_logit", head, value, warning)


def entropy_rules(memory: Memory, snapshot: Snapshot, limits: AlarmLimits) -> Iterator[Alarm]:
    """Low entropy: against the head's own past once logits warn, or against fixed limits."""
    for head, value in per_head(snapshot, "entropy"):
        logit, usual = snapshot.signal("max_logit", head), own_median(memory, "entropy", head)
        past = history(memory, "entropy", head)
        if limits.entropy_ratio is not None and limits.logit_warning is not None:
            large = logit is not None and logit > limits.logit_warning
            if large and usual is not None and value < limits.entropy_ratio * usual:
                limit = limits.entropy_ratio * usual
                yield Alarm(snapshot.step, "warning", "entropy", head, value, limit)
        if limits.entropy_fixation is not None and value < limits.entropy_fixation:
            yield Alarm(snapshot.step, "critical", "entropy", head, value, limits.entropy_fixation)
        elif (
            limits.entropy_drift is not None
            and past
            and value < min(limits.entropy_drift, past[-1])
        ):
            yield Alarm(snapshot.step, "warning", "entropy", head, value, limits.entropy_drift)


def gradient_rules(memory: Memory, snapshot: Snapshot, limits: AlarmLimits) -> Iterator[Alarm]:
    """Gradients of a head outside their limits, and heads that nothing reaches."""
    for head, value in per_head(snapshot, "gradient_norm"):
        if limits.gradient is not None and not limits.gradient[0] <= value <= limits.gradient[1]:
            limit = limits.gradient[0] if value < limits.gradient[0] else limits.gradient[1]
            yield Alarm(snapshot.step, "warning", "gradient_norm", head, value, limit)
        if limits.dead_samples is not None and value == 0.0:
            past = history(memory, "gradient_norm", head)[-(limits.dead_samples - 1) :]
            dead = len(past) == limits.dead_samples - 1 and not any(past)
            if dead and snapshot.scalars.get("gradient_norm", 0.0) > 0.0:
                yield Alarm(snapshot.step, "critical", "gradient_norm", head, value, 0.0)
    if limits.gradient_mean is not None:
        for head, value in per_head(snapshot, "gradient_mean"):
            if value < limits.gradient_mean:
                limit = limits.gradient_mean
                yield Alarm(snapshot.step, "warning", "gradient_mean", head, value, limit)


def update_rules(memory: Memory, snapshot: Snapshot, limits: AlarmLimits) -> Iterator[Alarm]:
    """Weights that a step moves too far, layer by layer or all together."""
    yield from norm_rules(memory, snapshot, limits)
    step, limit, most = snapshot.step, limits.update_ratio, limits.whole_update
    whole = snapshot.scalars.get("update_ratio", 0.0)
    if most is not None and not whole <= most:
        yield Alarm(step, "critical", "update_ratio", WHOLE, whole, most)
    if limit is not None:
        for number, heads in enumerate(snapshot.signals.get("update_ratio", ())):
            if heads and not statistics.median(heads) <= limit:
                ratio = statistics.median(heads)
                yield Alarm(step, "critical", "update_ratio", layer_of(number), ratio, limit)
    if limits.weight_update is not None:
        least, most = limits.weight_update
        for head, value in per_head(snapshot, "update_ratio"):
            if not least <= value <= most:
                bound = least if value < least else most
                yield Alarm(step, "warning", "update_ratio", head, value, bound)


def norm_rules(memory: Memory, snapshot: Snapshot, limits: AlarmLimits) -> Iterator[Alarm]:
    """Weights that jump, fade away or are learned no more; gradients that vanish on their way."""
    step, now = snapshot.step, snapshot.scalars.get("weight_norm")
    past = [norm for _, norm in memory.weights]
    if now is not None and past and limits.weight_jump is not None:
        limit = limits.weight_jump * past[-1]
        if not now <= limit:
            yield Alarm(step, "critical", "weight_norm", WHOLE, now, limit)
            return
    growth = snapshot.scalars.get("weight_growth")
    if growth is not None and limits.weight_growth is not None and growth > limits.weight_growth:
        yield Alarm(step, "critical", "weight_growth", WHOLE, growth, limits.weight_growth)
    if now is not None and len(past) >= FALLS and limits.weight_fall is not None:
        line = [*past[-FALLS:], now]
        falls = [later / max(earlier, 1e-30) for earlier, later in pairwise(line)]
        if max(falls) < 1 - limits.weight_fall:
            limit = (1 - limits.weight_fall) * past[-1]
            yield Alarm(step, "critical", "weight_norm", WHOLE, now, limit)
    frozen = snapshot.scalars.get("frozen")
    if frozen is not None and limits.frozen is not None and frozen > limits.frozen:
        yield Alarm(step, "warning", "frozen", WHOLE, frozen, limits.frozen)
    share = snapshot.scalars.get("gradient_share")
    if share is not None and limits.gradient_share is not None:
        shares = (*memory.shares[-(SHORT - 1) :], share)
        if len(shares) == SHORT and max(shares) < limits.gradient_share:
            yield Alarm(step, "critical", "gradient_share", WHOLE, share, limits.gradient_share)


def matrix_rules(snapshot: Snapshot, limits: AlarmLimits) -> Iterator[Alarm]:
    """Condition numbers, heads far out of proportion, inputs whose tokens have become one."""
    if limits.sigma_ratio is not None:
        yield from sigma_rules(snapshot, limits.sigma_ratio)
    if limits.condition is not None:
        for signal in ("condition_q", "condition_k", "condition_v"):
            for head, value in per_head(snapshot, signal):
                if value > limits.condition:
                    yield Alarm(snapshot.step, "warning", signal, head, value, limits.condition)
    if limits.rank_distance is not None:
        for layer, values in enumerate(snapshot.signals.get("rank_distance", ())):
            if values and values[0] < limits.rank_distance:
                where, limit = layer_of(layer), limits.rank_distance
                yield Alarm(snapshot.step, "critical", "rank_distance", where, values[0], limit)


def sigma_rules(snapshot: Snapshot, ratio: float) -> Iterator[Alarm]:
    """Heads whose values are many times those of the layer's other heads.

    Queries and keys out of proportion show in the logits, and a clip answers them.
    """
    for number, heads in enumerate(snapshot.signals.get("sigma_max_v", ())):
        limit = ratio * statistics.median(heads) if len(set(heads)) > 2 else math.inf
        for head, value in enumerate(heads):
            if value > limit:
                where = HeadId(number, head)
                yield Alarm(snapshot.step, "critical", "sigma_max_v", where, value, limit)


def pace_rules(memory: Memory, snapshot: Snapshot, limits: AlarmLimits) -> Iterator[Alarm]:
    """Times: they are told, never acted on."""
    mixing, speed = snapshot.times_us.get("mixing"), snapshot.scalars.get("tokens_per_s")
    if limits.mixing_us is not None and mixing is not None and mixing > limits.mixing_us:
        yield Alarm(snapshot.step, "notice", "mixing", WHOLE, mixing, limits.mixing_us)
    if limits.throughput_drop is not None and speed is not None:
        limit = (1 - limits.throughput_drop) * memory.best_speed
        if speed < limit:
            yield Alarm(snapshot.step, "notice", "tokens_per_s", WHOLE, speed, limit)
