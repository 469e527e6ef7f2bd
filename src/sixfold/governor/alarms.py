"""From snapshots to alarms: limits with hysteresis, each head against its own history."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from sixfold.contracts import HeadId, Snapshot
from sixfold.governor.limits import AlarmLimits

REMEMBERED = 32
"""Samples a head is compared with: at the default pace, the last 320 steps."""
RECENT = 3
"""Samples over which growth counts."""
ACTED_ON = ("max_logit", "entropy")
"""Signals that a change answers; times and spectra are only told."""
CRISIS = 100
"""Steps after a critical alarm in which warnings are answered too."""
CLEAR = 0.8
"""An alarm is over when its signal is this far inside its limit."""
WHOLE = HeadId(-1, -1)
"""The target of an alarm about the whole model."""


class Alarm(NamedTuple):
    """A signal outside its limit."""

    step: int
    level: str
    signal: str
    target: HeadId
    value: float
    limit: float


Series = Mapping[str, tuple[tuple[tuple[float, ...], ...], ...]]


@dataclass(frozen=True)
class Memory:
    """The last samples of the signals that rules compare with, and the alarms that are raised."""

    logits: tuple[tuple[tuple[float, ...], ...], ...] = ()
    entropies: tuple[tuple[tuple[float, ...], ...], ...] = ()
    best_speed: float = 0.0
    critical_at: int | None = None
    raised: frozenset[tuple[str, str, int, int]] = frozenset()

    @property
    def vigilant(self) -> bool:
        """Whether some head's logits are in alarm: things may then happen within a few steps."""
        return any(signal == "max_logit" for _, signal, _, _ in self.raised)


def history(memory: Memory, signal: str, head: HeadId) -> list[float]:
    """What is remembered of one signal of one head, oldest first."""
    samples = memory.logits if signal == "max_logit" else memory.entropies
    return [sample[head.layer][head.head] for sample in samples]


def own_median(memory: Memory, signal: str, head: HeadId) -> float | None:
    """Median of what is remembered, None before the first sample."""
    values = [value for value in history(memory, signal, head) if math.isfinite(value)]
    return statistics.median(values) if values else None


def judge(
    memory: Memory, snapshot: Snapshot, limits: AlarmLimits
) -> tuple[Memory, tuple[Alarm, ...], tuple[Alarm, ...]]:
    """Compare a snapshot with the limits and with the past.

    Returns:
        The memory with this snapshot in it, the alarms raised now, and for every head in trouble
        the worst alarm a change can answer, whether raised now or earlier. Outside a crisis there
        is none: a warning alone is told and not answered, for healthy runs come near it.
    """
    present = list(rules(memory, snapshot, limits))
    keys = {(a.level, a.signal, *a.target): a for a in present}
    news = tuple(alarm for key, alarm in keys.items() if key not in memory.raised)
    still = {key for key in memory.raised if key in keys or not cleared(key, snapshot, limits)}
    critical_at = memory.critical_at
    if any(alarm.level == "critical" for alarm in present):
        critical_at = snapshot.step
    crisis = critical_at is not None and snapshot.step - critical_at <= CRISIS
    answerable: dict[HeadId, Alarm] = {}
    for alarm in sorted(present, key=lambda a: a.level != "critical"):
        if crisis and alarm.signal in ACTED_ON and math.isfinite(alarm.value):
            answerable.setdefault(alarm.target, alarm)
    memory = Memory(
        remember(memory.logits, snapshot, "max_logit"),
        remember(memory.entropies, snapshot, "entropy"),
        max(memory.best_speed, snapshot.scalars.get("tokens_per_s", 0.0)),
        critical_at,
        frozenset(still | keys.keys()),
    )
    return memory, news, tuple(answerable.values())


def remember(samples: tuple[Any, ...], snapshot: Snapshot, signal: str) -> tuple[Any, ...]:
    """Add a sample, forget the oldest."""
    if signal not in snapshot.signals:
        return samples
    return (*samples, snapshot.signals[signal])[-REMEMBERED:]


def cleared(key: tuple[str, str, int, int], snapshot: Snapshot, limits: AlarmLimits) -> bool:
    """Whether a raised alarm whose rule is silent is over: not while its signal is not measured.

    Logits have a hysteresis on top.
    """
    level, signal, layer, head = key
    if signal != "max_logit":
        return any(
            signal in found for found in (snapshot.signals, snapshot.scalars, snapshot.times_us)
        )
    value = snapshot.signal(signal, HeadId(layer, head))
    limit = limits.logit_critical if level == "critical" else limits.logit_warning
    return value is None or limit is None or value < CLEAR * limit


def rules(memory: Memory, snapshot: Snapshot, limits: AlarmLimits) -> Iterator[Alarm]:
    """Every alarm that holds at this snapshot."""
    yield from logit_rules(memory, snapshot, limits)
    yield from entropy_rules(memory, snapshot, limits)
    yield from matrix_rules(snapshot, limits)
    yield from pace_rules(memory, snapshot, limits)


def per_head(snapshot: Snapshot, signal: str) -> Iterator[tuple[HeadId, float]]:
    """Every head's value of a signal; nothing where it was not measured."""
    for layer, values in enumerate(snapshot.signals.get(signal, ())):
        for head, value in enumerate(values):
            yield HeadId(layer, head), value


def growing(memory: Memory, head: HeadId, value: float, factor: float) -> bool:
    """Whether a head's logit is `factor` above what it was a few samples ago."""
    past = history(memory, "max_logit", head)[-RECENT:]
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


def matrix_rules(snapshot: Snapshot, limits: AlarmLimits) -> Iterator[Alarm]:
    """Condition numbers and gradient norms."""
    if limits.condition is not None:
        for signal in ("condition_q", "condition_k", "condition_v"):
            for head, value in per_head(snapshot, signal):
                if value > limits.condition:
                    yield Alarm(snapshot.step, "warning", signal, head, value, limits.condition)
    if limits.gradient is not None:
        least, most = limits.gradient
        for head, value in per_head(snapshot, "gradient_norm"):
            if not least <= value <= most:
                limit = least if value < least else most
                yield Alarm(snapshot.step, "warning", "gradient_norm", head, value, limit)


def pace_rules(memory: Memory, snapshot: Snapshot, limits: AlarmLimits) -> Iterator[Alarm]:
    """Times: they are told, never acted on."""
    mixing, speed = snapshot.times_us.get("mixing"), snapshot.scalars.get("tokens_per_s")
    if limits.mixing_us is not None and mixing is not None and mixing > limits.mixing_us:
        yield Alarm(snapshot.step, "notice", "mixing", WHOLE, mixing, limits.mixing_us)
    if limits.throughput_drop is not None and speed is not None:
        limit = (1 - limits.throughput_drop) * memory.best_speed
        if speed < limit:
            yield Alarm(snapshot.step, "notice", "tokens_per_s", WHOLE, speed, limit)


def memory_dict(memory: Memory) -> dict[str, Any]:
    """Memory as plain JSON values."""
    return {
        "logits": memory.logits,
        "entropies": memory.entropies,
        "best_speed": memory.best_speed,
        "critical_at": memory.critical_at,
        "raised": sorted(memory.raised),
    }


def load_memory(values: Mapping[str, Any]) -> Memory:
    """The inverse of `memory_dict`."""

    def frozen(samples: Any) -> Any:
        return tuple(tuple(tuple(layer) for layer in sample) for sample in samples)

    raised = frozenset(
        (level, signal, layer, head) for level, signal, layer, head in values["raised"]
    )
    return Memory(
        frozen(values["logits"]),
        frozen(values["entropies"]),
        values["best_speed"],
        values["critical_at"],
        raised,
    )
