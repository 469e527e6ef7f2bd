"""When the governor speaks and when it acts. A rule whose limit is None is off."""

from __future__ import annotations

from dataclasses import dataclass, field

from sixfold.discover import unknown


@dataclass(frozen=True)
class AlarmLimits:
    """Where signals become alarms.

    Attributes:
        logit_warning: maximal logit, in nats, that is a warning where it also grows.
        logit_critical: maximal logit that is critical by itself.
        logit_growth: factor over the last samples that counts as growing.
        entropy_ratio: entropy over the head's own median that is a warning once logits warn too.
        entropy_fixation: entropy below this is critical.
        entropy_drift: entropy below this and falling is a warning.
        condition: condition number of W_Q, W_K or W_V.
        gradient: smallest and largest gradient norm of a head.
        mixing_us: time of head mixing, microseconds.
        throughput_drop: share of the best tokens/s that may be lost.
    """

    logit_warning: float | None = None
    logit_critical: float | None = None
    logit_growth: float = 1.5
    entropy_ratio: float | None = None
    entropy_fixation: float | None = None
    entropy_drift: float | None = None
    condition: float | None = None
    gradient: tuple[float, float] | None = None
    mixing_us: float | None = None
    throughput_drop: float | None = None


@dataclass(frozen=True)
class ActionLimits:
    """How far the governor may go.

    Attributes:
        clip_to: a QK-clip brings the maximal logit to this or below, by a power of two.
        cooldown: steps before the same head is touched again.
        within: steps in which a change must show what it promised.
        clips_before_entropy: clips of one head before its entropy is held as well.
        entropy_coefficient: weight of the entropy term, nats of loss per unit of entropy.
        entropy_steps: how long an entropy term stays.
        budget: changes per head in one run.
    """

    clip_to: float = 50.0
    cooldown: int = 10
    within: int = 20
    clips_before_entropy: int = 3
    entropy_coefficient: float = 0.05
    entropy_steps: int = 200
    budget: int = 64

    def __post_init__(self) -> None:
        if not self.clip_to > 0:
            raise ValueError(f"clip_to must be positive, got {self.clip_to}")


@dataclass(frozen=True)
class Limits:
    """What the governor holds to."""

    alarms: AlarmLimits = field(default_factory=AlarmLimits)
    actions: ActionLimits = field(default_factory=ActionLimits)


PRESETS = {
    # logits separate collapse from health; entropy alone does not (an induction head is sharp)
    "default": Limits(
        AlarmLimits(logit_warning=50.0, logit_critical=100.0, entropy_ratio=0.5),
    ),
    # the first published rule set: kept to be compared with, it warns on healthy runs
    "seed": Limits(
        AlarmLimits(
            entropy_fixation=0.3, entropy_drift=0.9, condition=100.0, gradient=(1e-6, 1e3),
            mixing_us=50.0, throughput_drop=0.1,
        )
    ),
}  # fmt: skip


def preset(name: str) -> Limits:
    """Limits by name.

    Raises ValueError listing the presets.
    """
    if name not in PRESETS:
        raise ValueError(unknown("governor.preset", name, PRESETS))
    return PRESETS[name]
