"""From snapshots to alarms: what is remembered, what is raised, and which heads are in trouble."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, NamedTuple

from sixfold.contracts import WHOLE, HeadId, PerHead, Snapshot
from sixfold.governor.limits import AlarmLimits

REMEMBERED = 32
"""Samples a head is compared with: at the default pace, the last 320 steps."""
SHORT = 3
"""Samples that a ratio must last."""
FALLS = 5
"""Samples in a row in which weights must fall."""
STEPS = 64
"""Losses that are remembered, one a step."""
ACUTE = ("max_logit", "entropy")
"""Signals that follow from others."""
CRISIS = 100
"""Steps after a critical alarm in which warnings are answered too."""
SCATTER = 4.0
"""Deviations (median absolute) of the losses by which one may lie above the first by chance."""
EARLY, EARLY_SCATTER = 8, 3.0
"""The same where fewer losses than this are known from before it was worse, of all together."""
CLEAR = 0.8
"""An alarm is over when its signal is this far inside its limit."""


class Alarm(NamedTuple):
    """A signal outside its limit."""

    step: int
    level: str
    signal: str
    target: HeadId
    value: float
    limit: float


@dataclass(frozen=True)
class Memory:
    """What rules compare with, and what is raised.

    The last samples of signals, the last losses, norms of all weights with their steps, shares of
    the smallest gradient, shares of all weights that a step moved; since which step the loss has
    been worse than at the start, for how many losses, and which of them was not.
    """

    logits: tuple[PerHead, ...] = ()
    entropies: tuple[PerHead, ...] = ()
    gradients: tuple[PerHead, ...] = ()
    updates: tuple[PerHead, ...] = ()
    losses: tuple[float, ...] = ()
    first_loss: float | None = None
    worse_since: int | None = None
    worse_for: int = 0
    spared: int | None = None
    weights: tuple[tuple[int, float], ...] = ()
    shares: tuple[float, ...] = ()
    moved: tuple[float, ...] = ()
    best_speed: float = 0.0
    critical_at: int | None = None
    raised: frozenset[tuple[str, str, int, int]] = frozenset()

    @property
    def vigilant(self) -> bool:
        """Whether some head's logits are in alarm: things may then happen within a few steps."""
        return any(signal == "max_logit" for _, signal, _, _ in self.raised)


SERIES = {
    "logits": ("max_logit", REMEMBERED),
    "entropies": ("entropy", REMEMBERED),
    "gradients": ("gradient_norm", SHORT),
    "updates": ("update_ratio", SHORT),
}
"""A series of the memory: its signal, and how many samples of it are kept."""


def history(memory: Memory, signal: str, head: HeadId) -> list[float]:
    """What is remembered of one signal of one head, oldest first."""
    series = next(name for name, (known, _) in SERIES.items() if known == signal)
    samples = (sample[head.layer] for sample in getattr(memory, series) if head.layer < len(sample))
    return [heads[head.head] for heads in samples if heads]


def own_median(memory: Memory, signal: str, head: HeadId) -> float | None:
    """Median of what is remembered, None before the first sample."""
    values = [value for value in history(memory, signal, head) if math.isfinite(value)]
    return statistics.median(values) if values else None


def deviation(losses: Sequence[float], middle: float) -> float:
    """Median distance of losses from their median."""
    return statistics.median(abs(loss - middle) for loss in losses)


def worst_loss(memory: Memory, limits: AlarmLimits) -> float | None:
    """What a loss must not stay above: ``first + max((ratio - 1) |first|, SCATTER deviation)``.

    The ratio is the stricter one while steps go far. The deviation is that of the losses after the
    first, which may have been a lucky batch, and before they were worse. None where limits do not
    ask, before the first loss, and where losses change sign, for there is no ratio of them.

    >>> limits = AlarmLimits(loss_ratio=1.5, hot_loss_ratio=1.25, hot_update=0.003)
    >>> worst_loss(Memory(first_loss=2.0, losses=(2.0, 2.1, 2.0, 1.9)), limits)
    3.0
    >>> worst_loss(Memory(first_loss=2.0, losses=(2.0, 2.1, 2.0, 1.9), moved=(0.01,)), limits)
    2.5
    >>> worst_loss(Memory(first_loss=2.0, losses=(2.0, 1.0, 4.0, 2.5)), limits)
    6.5
    """
    first, ratio = memory.first_loss, limits.loss_ratio
    if not first or ratio is None or any(first * loss < 0 for loss in memory.losses):
        return None
    if limits.hot_loss_ratio is not None and max(memory.moved, default=0.0) > limits.hot_update:
        ratio = limits.hot_loss_ratio
    later = memory.losses[1:]
    before = later[: max(len(later) - memory.worse_for, 0)]
    factor, known = (EARLY_SCATTER, later) if len(before) < EARLY else (SCATTER, before)
    scatter = factor * deviation(known, statistics.median(known)) if known else 0.0
    return first + max((ratio - 1) * abs(first), scatter)


def falling(losses: Sequence[float]) -> bool:
    """Whether the later half of some losses lies below the earlier one, by more than it scatters.

    >>> falling([3.0, 2.9, 2.8, 2.7, 2.6, 2.5, 2.4, 2.3]), falling([3.0, 2.0, 3.0, 2.0])
    (True, False)
    """
    half = len(losses) // 2
    if half < 2:
        return False
    early, late = statistics.median(losses[:half]), statistics.median(losses[half:])
    return early - late > deviation(losses[half:], late)


def stretch(memory: Memory, step: int, patience: int, *, worse: bool) -> dict[str, int | None]:
    """Since when losses have been worse than the first: one of `patience` may be better."""
    since, count, spared = memory.worse_since, memory.worse_for + 1, memory.spared
    if worse:
        since = step if since is None else since
        return {"worse_since": since, "worse_for": count, "spared": spared}
    if since is not None and (spared is None or count - spared > patience):
        return {"worse_since": since, "worse_for": count, "spared": count}
    return {"worse_since": None, "worse_for": 0, "spared": None}


def gone_back(memory: Memory) -> Memory:
    """The memory after a return: the losses that were worse belong to what was given up.

    The next loss that is better shows that the run is well again.
    """
    kept = memory.losses[: max(len(memory.losses) - memory.worse_for, 0)]
    return replace(memory, losses=kept, spared=memory.worse_for)


def remember(memory: Memory, snapshot: Snapshot, limits: AlarmLimits) -> dict[str, Any]:
    """The memory's series with this snapshot in them."""
    found: dict[str, Any] = {}
    for series, (signal, kept) in SERIES.items():
        samples = getattr(memory, series)
        if signal in snapshot.signals:
            samples = (*samples, snapshot.signals[signal])[-kept:]
        found[series] = samples
    loss, limit = snapshot.loss, worst_loss(memory, limits)
    if math.isfinite(loss):
        found["losses"] = (*memory.losses, loss)[-STEPS:]
        found["first_loss"] = loss if memory.first_loss is None else memory.first_loss
    # a loss of NaN is worse, one that is missing is not
    given = not math.isnan(loss) or snapshot.scalars.get("loss_finite") == 0.0
    if given and limit is not None:
        found |= stretch(memory, snapshot.step, limits.loss_patience, worse=not loss <= limit)
    if "weight_norm" in snapshot.scalars:
        now = (snapshot.step, snapshot.scalars["weight_norm"])
        found["weights"] = (*memory.weights, now)[-FALLS - 1 :]
    if "gradient_share" in snapshot.scalars:
        found["shares"] = (*memory.shares, snapshot.scalars["gradient_share"])[-SHORT:]
    if "update_ratio" in snapshot.scalars:
        found["moved"] = (*memory.moved, snapshot.scalars["update_ratio"])[-SHORT:]
    speed = snapshot.scalars.get("tokens_per_s", 0.0)
    return found | {"best_speed": max(memory.best_speed, speed)}


def judge(
    memory: Memory, snapshot: Snapshot, present: list[Alarm], limits: AlarmLimits
) -> tuple[Memory, tuple[Alarm, ...], tuple[Alarm, ...]]:
    """Tell what is new among the alarms that hold, and for whom something should be done.

    Args:
        memory: what is known of the steps before.
        snapshot: this step.
        present: every alarm that holds at it, as the rules found.
        limits: for the hysteresis.

    Returns:
        The memory with this snapshot in it, the alarms raised now, and for every target in trouble
        the worst alarm, whether raised now or earlier. Outside a crisis there is none: a warning
        alone is told and not answered, for healthy runs come near it.
    """
    present = [alarm for alarm in present if alarm.signal not in limits.muted]
    keys = {(a.level, a.signal, *a.target): a for a in present}
    news = tuple(alarm for key, alarm in keys.items() if key not in memory.raised)
    heard = {key for key in memory.raised if key[1] not in limits.muted}
    still = {key for key in heard if key in keys or not cleared(key, snapshot, limits)}
    critical_at = memory.critical_at
    if any(alarm.level == "critical" for alarm in present):
        critical_at = snapshot.step
    crisis = critical_at is not None and snapshot.step - critical_at <= CRISIS
    troubled: dict[HeadId, Alarm] = {}
    # what is wrong with the weights explains what is wrong with the logits
    for alarm in sorted(present, key=lambda a: (a.level != "critical", a.signal in ACUTE)):
        if crisis and alarm.level != "notice":
            troubled.setdefault(alarm.target, alarm)
    kept = {field.name: getattr(memory, field.name) for field in fields(memory)}
    kept |= remember(memory, snapshot, limits)
    kept |= {"critical_at": critical_at, "raised": frozenset(still | keys.keys())}
    return Memory(**kept), news, tuple(troubled.values())


def cleared(key: tuple[str, str, int, int], snapshot: Snapshot, limits: AlarmLimits) -> bool:
    """Whether a raised alarm whose rule is silent is over: not while its signal is not measured.

    Logits have a hysteresis on top.
    """
    level, signal, layer, head = key
    if (layer, head) == WHOLE and signal in ("loss", "gradient_norm"):
        return True
    if (layer, head) == WHOLE and signal in ("update_ratio", "weight_norm", "weight_growth"):
        return "weight_norm" in snapshot.scalars
    if (layer, head) == WHOLE:
        return signal in snapshot.scalars or signal in snapshot.times_us
    if signal != "max_logit":
        return signal in snapshot.signals
    if signal not in snapshot.signals:
        return False
    value = snapshot.signal(signal, HeadId(layer, head))
    limit = limits.logit_critical if level == "critical" else limits.logit_warning
    return value is None or limit is None or value < CLEAR * limit


def memory_dict(memory: Memory) -> dict[str, Any]:
    """Memory as plain JSON values."""
    return asdict(memory) | {"raised": sorted(memory.raised)}


def load_memory(values: Mapping[str, Any]) -> Memory:
    """The inverse of `memory_dict`."""

    def frozen(samples: Any) -> Any:
        return tuple(tuple(tuple(layer) for layer in sample) for sample in samples)

    raised = frozenset(
        (level, signal, layer, head) for level, signal, layer, head in values["raised"]
    )
    series = {name: frozen(values[name]) for name in SERIES}
    plain = {name: tuple(values[name]) for name in ("losses", "shares", "moved")}
    plain |= {"weights": tuple((step, norm) for step, norm in values["weights"])}
    return Memory(**{**values, **series, **plain, "raised": raised})
