"""When the governor speaks and when it acts. A rule whose limit is None is off."""

from __future__ import annotations

import math
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
        gradient_mean: smallest mean magnitude of a head's gradients.
        dead_samples: samples in a row in which nothing reaches a head's weights while it does reach
            others: a dead head.
        update_ratio: share of a layer's attention weights that one step moves: a learning rate that
            is too hot.
        whole_update: the same of all weights together, large embeddings and norms among them.
        weight_growth: factor between two samples that the norms of three quarters of the matrices
            may grow by before the learning rate is too hot.
        weight_jump: factor at which they count as lost.
        weight_fall: share that they may lose from one sample to the next, five times in a row.
        sigma_ratio: largest singular value of a head's W_V over the median of its layer.
        gradient_share: smallest gradient of a weight matrix over the largest, three samples long.
        frozen: share of the numbers that were to be learned at attach and are so no more.
        rank_distance: part of a layer's input that is not the mean token; below it all tokens are
            one.
        loss_ratio: loss over the first loss, `loss_patience` times and beyond the scatter of the
            losses: a run that is worse than when it began.
        hot_loss_ratio: the same where steps move all weights by more than `hot_update` of
            themselves: what began far below chance is lost before it is half as bad again.
        hot_update: see there.
        loss_patience: losses; one of them may be better.
        loss_spike: deviations (median absolute, of 64 steps) above the median that are a notice.
        finite: whether a loss, gradient or logit that is not finite is critical.
        weight_update: smallest and largest update ratio of a head.
        loss_stalled: steps after which the loss must have fallen.
        mixing_us: time of head mixing, microseconds.
        throughput_drop: share of the best tokens/s that may be lost.
        muted: signals that raise no alarm.
    """

    logit_warning: float | None = None
    logit_critical: float | None = None
    logit_growth: float = 1.5
    entropy_ratio: float | None = None
    entropy_fixation: float | None = None
    entropy_drift: float | None = None
    condition: float | None = None
    gradient: tuple[float, float] | None = None
    gradient_mean: float | None = None
    dead_samples: int | None = None
    update_ratio: float | None = None
    whole_update: float | None = None
    weight_growth: float | None = None
    weight_jump: float | None = None
    weight_fall: float | None = None
    sigma_ratio: float | None = None
    gradient_share: float | None = None
    frozen: float | None = None
    rank_distance: float | None = None
    loss_ratio: float | None = None
    hot_loss_ratio: float | None = None
    hot_update: float = 0.003
    loss_patience: int = 7
    loss_spike: float | None = None
    finite: bool = False
    weight_update: tuple[float, float] | None = None
    loss_stalled: int | None = None
    mixing_us: float | None = None
    throughput_drop: float | None = None
    muted: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("loss_ratio", "hot_loss_ratio"):
            ratio = getattr(self, name)
            if ratio is not None and not (isinstance(ratio, int | float) and 1 < ratio < math.inf):
                raise ValueError(f"{name} must be None or a finite number above 1, got {ratio!r}")
        if self.loss_patience < 1:
            raise ValueError(f"loss_patience must be 1 or more, got {self.loss_patience}")
        for name in ("gradient", "weight_update"):
            between = getattr(self, name)
            if between is not None and not (isinstance(between, tuple) and len(between) == 2):
                raise ValueError(f"{name} must be None or (smallest, largest), got {between!r}")
        if isinstance(self.muted, str):
            raise ValueError(f"muted must be a tuple of signals, got {self.muted!r}")


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
        shield_to: update ratio to which a learning-rate shield goes, by a power of two.
        shield_growth: displacement of all weights between two samples, over their norm, to which it
            goes.
        shield_steps: how long a shield stays before it is taken down by a factor of two.
        budget: changes per head in one run.
        hard_after: changes of one head before its weights are touched.
        rollbacks: rollbacks in one run.
        snapshot_every: steps between two snapshots that a rollback can go to.
        margin: steps before the first sign of trouble that a rollback leaves out too.
        stop_after: steps that a critical state may last after the last answer was tried.
    """

    clip_to: float = 50.0
    cooldown: int = 10
    within: int = 20
    clips_before_entropy: int = 3
    entropy_coefficient: float = 0.05
    entropy_steps: int = 200
    shield_to: float = 0.025
    shield_growth: float = 0.05
    shield_steps: int = 200
    budget: int = 64
    hard_after: int = 16
    rollbacks: int = 8
    snapshot_every: int = 20
    margin: int = 1
    stop_after: int = 200

    def __post_init__(self) -> None:
        for name in ("clip_to", "shield_to"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("within", "snapshot_every", "shield_steps", "entropy_steps", "stop_after"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        for name in ("cooldown", "budget", "hard_after", "rollbacks", "margin"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")


@dataclass(frozen=True)
class Limits:
    """What the governor holds to.

    `acting` is False where it only observes; `rewinding` is True where a run can be rolled back;
    `untouched` are the layers whose weights are left alone, `unscaled` those of them whose logits
    cannot be scaled either.
    """

    alarms: AlarmLimits = field(default_factory=AlarmLimits)
    actions: ActionLimits = field(default_factory=ActionLimits)
    acting: bool = True
    rewinding: bool = False
    untouched: tuple[int, ...] = ()
    unscaled: tuple[int, ...] = ()


PRESETS = {
    # logits separate collapse from health; entropy alone does not (an induction head is sharp)
    "default": Limits(
        AlarmLimits(
            logit_warning=50.0, logit_critical=100.0, entropy_ratio=0.5, dead_samples=3,
            update_ratio=0.2, whole_update=0.05, weight_growth=1.15, weight_jump=3.0,
            weight_fall=0.02,
            sigma_ratio=10.0, gradient_share=1e-6, frozen=0.0, rank_distance=1e-3,
            loss_ratio=1.5, hot_loss_ratio=1.25, loss_spike=10.0, finite=True,
        ),
    ),
    # the first published rule set: kept to be compared with, it warns on healthy runs
    "seed": Limits(
        AlarmLimits(
            entropy_fixation=0.3, entropy_drift=0.9, condition=100.0, gradient=(1e-6, 1e3),
            mixing_us=50.0, throughput_drop=0.1,
        )
    ),
    # the built-in rules of Amazon SageMaker Debugger that a training run's signals can answer:
    # VanishingGradient, ExplodingTensor, WeightUpdateRatio, LossNotDecreasing; it acts on none
    "sagemaker": Limits(
        AlarmLimits(
            gradient_mean=1e-7, finite=True, weight_update=(1e-8, 10.0), loss_stalled=10,
        ),
        acting=False,
    ),
}  # fmt: skip


def preset(name: str) -> Limits:
    """Limits by name.

    Raises ValueError listing the presets.
    """
    if name not in PRESETS:
        raise ValueError(unknown("governor.preset", name, PRESETS))
    return PRESETS[name]
