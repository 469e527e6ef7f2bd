"""Which change answers an alarm: the least invasive first, harder ones where it did not last."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple, TypeGuard

from sixfold.contracts import WHOLE, Change, HeadId, Snapshot
from sixfold.governor import alarms
from sixfold.governor.alarms import Alarm, Memory
from sixfold.governor.limits import ActionLimits, Limits
from sixfold.governor.protocols import (
    decay_shield,
    entropy_term,
    gradient_clip,
    gradient_skip,
    head_reset,
    initial_gain,
    learning_rate_shield,
    perturbation,
    qk_clip,
    rollback,
    spectral_normalization,
    temperature,
)

PROTOCOLS: dict[str, type] = {
    "qk_clip": qk_clip.QKClip,
    "temperature": temperature.Temperature,
    "entropy_term": entropy_term.EntropyTerm,
    "spectral_normalization": spectral_normalization.SpectralNormalization,
    "perturbation": perturbation.Perturbation,
    "head_reset": head_reset.HeadReset,
    "learning_rate_shield": learning_rate_shield.LearningRateShield,
    "decay_shield": decay_shield.DecayShield,
    "gradient_clip": gradient_clip.GradientClip,
    "gradient_skip": gradient_skip.GradientSkip,
    "rollback": rollback.Rollback,
    "initial_gain": initial_gain.InitialGain,
}


SKIP = gradient_skip.GradientSkip.name
SHIELD = learning_rate_shield.LearningRateShield.name
UNSHIELDED = ("loss", "weight_norm", "weight_growth", "update_ratio")
"""Signals that are answered while a shield is up: it came late, or was too weak for what came."""
LOST = 1.0
"""Part of themselves that one step may move weights by before they count as lost."""
COOLER = 3
"""Power of two by which the learning rate falls when a run has to go back again."""
EXPLODED = 1e3
"""Norm of all gradients that no loss of a mean has."""


class Situation(NamedTuple):
    """An alarm, and all that the choice of an answer depends on.

    history: (step, name, target) of all changes made so far; pending: changes in force; undone:
    those taken back at this step; copies: steps that a rollback can go to.
    """

    alarm: Alarm
    memory: Memory
    snapshot: Snapshot
    history: tuple[tuple[int, str, HeadId], ...]
    pending: tuple[Change, ...]
    undone: tuple[Change, ...]
    copies: tuple[int, ...]
    limits: Limits

    def made(self, *names: str) -> int:
        """How many changes of these names this target has had."""
        return sum(
            name in names and target == self.alarm.target for _, name, target in self.history
        )

    def last(self, target: HeadId) -> int | None:
        """When this target was last changed; a skipped step changes nothing."""
        made = (when for when, name, mine in self.history if mine == target and name != SKIP)
        return max(made, default=None)

    def waits(self) -> bool:
        """Whether an earlier change of this target is still being judged or has just been made."""
        last = self.last(self.target())
        recent = last is not None and self.alarm.step - last < self.limits.actions.cooldown
        beside = (SKIP, SHIELD) if self.alarm.signal in UNSHIELDED else (SKIP,)
        judged = (change for change in self.pending if change.name not in beside)
        return recent or any(change.target == self.target() for change in judged)

    def target(self) -> HeadId:
        """What would be changed: the head, or where no head is at fault the whole model."""
        return WHOLE if self.alarm.target.head < 0 else self.alarm.target


def answer(now: Situation) -> Change | None:
    """The change for an alarm, or None where it has to wait or nothing is left to try."""
    spent = sum(target == now.target() and name != SKIP for _, name, target in now.history)
    if spent >= now.limits.actions.budget:
        return None
    if now.alarm.signal == "gradient_norm" and now.alarm.target == WHOLE:
        return unreadable_gradient(now)
    if now.waits():
        return None
    found = ANSWERS.get(now.alarm.signal)
    return None if found is None else found(now)


def unreadable_gradient(now: Situation) -> Change | None:
    """The step was skipped; where that goes on, the weights are beyond it."""
    recent = [when for when, name, _ in now.history[-3:] if name == SKIP]
    if len(recent) == 3 and recent[0] >= now.alarm.step - 3:
        return back(now)
    return gradient_skip.build(now.limits.actions.within)


def large_logit(now: Situation) -> Change | None:
    """Clips; the entropy term where clips do not last; the weights where nothing else does."""
    head, actions, value = now.alarm.target, now.limits.actions, now.alarm.value
    if not math.isfinite(value):
        return None
    if head.layer in now.limits.unscaled:
        return low_entropy(now)
    soft = now.made("qk_clip", "entropy_term", "temperature")
    if soft >= actions.hard_after:
        return hard(now)
    terms = now.made("entropy_term")
    if now.made("qk_clip") < actions.clips_before_entropy * (terms + 1):
        returned = sum(change.power for change in now.undone if is_clip_of(change, head))
        return qk_clip.build(head, value * 2.0**returned, actions.clip_to, actions.within)
    return low_entropy(now)


def low_entropy(now: Situation) -> Change | None:
    """Hold the head's entropy up by a term in the objective; stir it where that does not last."""
    head, actions = now.alarm.target, now.limits.actions
    if now.made("entropy_term") >= actions.hard_after:
        return hard(now)
    if (
        now.made("entropy_term") > now.made("temperature") + 1
        and head.layer not in now.limits.unscaled
    ):
        value = now.snapshot.signal("entropy", head)
        if value is not None:
            return temperature.build(head, value, actions.entropy_steps, actions.within)
    floor = alarms.own_median(now.memory, "entropy", head)
    if floor is None:
        return None
    weight, lasts = actions.entropy_coefficient, actions.entropy_steps
    return entropy_term.build(head, floor, weight, lasts, within=lasts // 2)


def hard(now: Situation) -> Change | None:
    """The head's own weights: their spectra, then some noise, then a new start."""
    head, within = now.alarm.target, now.limits.actions.within
    if head.layer in now.limits.untouched:
        return None
    if not now.made("spectral_normalization"):
        return spectral_normalization.build(head, now.alarm, within)
    if not now.made("perturbation"):
        return perturbation.build(head, now.alarm, within)
    if not now.made("head_reset"):
        return head_reset.build(head, now.alarm, within)
    return None


def dead_head(now: Situation) -> Change | None:
    """A head that nothing reaches starts again, once."""
    head = now.alarm.target
    if head.head < 0 or head.layer in now.limits.untouched or now.made("head_reset"):
        return None
    return head_reset.build(now.alarm.target, now.alarm, 10 * now.limits.actions.within)


def out_of_proportion(now: Situation) -> Change | None:
    """A head whose weights are many times those of the others starts again, once."""
    head = now.alarm.target
    if head.layer in now.limits.untouched or now.made("head_reset"):
        return None
    return head_reset.build(head, now.alarm, 10 * now.limits.actions.within)


def too_hot(now: Situation) -> Change | None:
    """Shield the model from its learning rate, or from gradients that are out of all proportion.

    Weights that one step has moved by more than themselves are lost: they are gone back from, and
    begun with anew where they were too large from the beginning.
    """
    lost = not now.alarm.value <= LOST
    exploded = now.snapshot.scalars.get("gradient_norm", 0.0) > EXPLODED
    if lost and exploded and begun_too_large(now):
        return initial_gain.build(now.alarm, now.limits.actions.within)
    if lost and exploded and not now.made("gradient_clip"):
        return gradient_clip.build(now.limits.actions.within)
    if lost:
        change = back(now)
        if change is not None or not math.isfinite(now.alarm.value):
            return change
    power = math.log2(now.alarm.value / now.limits.actions.shield_to)
    return learning_rate_shield.build(now.alarm, power, now.limits.actions)


def begun_too_large(now: Situation) -> bool:
    """Whether this was the first step, from weights that blow up whatever passes.

    Nothing has been learned yet that smaller weights would spoil.
    """
    first = now.limits.rewinding and now.snapshot.step == 1
    return first and now.snapshot.scalars.get("gain", 0.0) > initial_gain.GAIN


def growing(now: Situation) -> Change | None:
    """Weights that grow this fast are moved too far: by sqrt(g^2 - 1) of themselves a sample."""
    moved = math.sqrt(now.alarm.value**2 - 1)
    power = math.log2(moved / now.limits.actions.shield_growth)
    return learning_rate_shield.build(now.alarm, power, now.limits.actions)


def moved_by_themselves(now: Situation) -> Change | None:
    """Weights that jumped go back to where they were; weights that fade are shielded from decay."""
    if not now.alarm.value <= now.alarm.limit:
        return back(now)
    return decay_shield.build(now.alarm, now.limits.actions)


def lowered(change: Change) -> Change | None:
    """What takes the place of a change whose time is over: a shield half as strong."""
    if not isinstance(change, learning_rate_shield.LearningRateShield) or change.power == 1:
        return None
    return replace(change, power=change.power - 1)


def still_needed(change: Change, snapshot: Snapshot, memory: Memory, limits: Limits) -> bool:
    """Whether a change whose time is over would be made again if it ended."""
    if change.name != "learning_rate_shield" or limits.alarms.update_ratio is None:
        return False
    ratios = (
        [statistics.median(heads) for heads in memory.updates[-1] if heads]
        if memory.updates
        else []
    )
    whole = snapshot.scalars.get("update_ratio")
    ratios += [] if whole is None else [whole]
    return bool(ratios) and max(ratios) * 2.0**change.power > 0.5 * limits.alarms.update_ratio


def worse_than_ever(now: Situation) -> Change | None:
    """A run that is worse than when it began goes back to where it was well."""
    return back(now)


def cooler(
    returned: Alarm,
    history: tuple[tuple[int, str, HeadId], ...],
    memory: Memory,
    actions: ActionLimits,
) -> Change | None:
    """A shield beside a return for a loss, where it went wrong again soon after the last one.

    The batches that were left out were then not what is wrong: what is left is how far steps go.
    """
    before = [when for when, name, _ in history if name == "rollback"]
    began = returned.step if memory.worse_since is None else memory.worse_since
    if returned.signal != "loss" or not before or began - before[-1] > actions.within:
        return None
    return learning_rate_shield.build(returned, COOLER, actions)


def back(now: Situation) -> Change | None:
    """Roll back to a copy that is older than the first sign of trouble, if there is one."""
    actions = now.limits.actions
    done = sum(name == "rollback" for _, name, _ in now.history)
    sign = now.alarm.step if now.memory.worse_since is None else now.memory.worse_since
    if now.alarm.signal == "weight_norm" and len(now.memory.weights) > 1:
        # somewhere since the sample before
        sign = min(sign, now.memory.weights[-2][0] + 1)
    # a loss shows what the step before it did
    since = sign - actions.margin
    old = [step for step in now.copies if step < since]
    if done >= actions.rollbacks or not old:
        return None
    # each return goes one copy further back than the one before
    to = old[-1 - min(done, len(old) - 1)]
    return rollback.build(to, since, now.alarm, actions.within)


ANSWERS: dict[str, Callable[[Situation], Change | None]] = {
    "max_logit": large_logit,
    "entropy": low_entropy,
    "gradient_norm": dead_head,
    "sigma_max_v": out_of_proportion,
    "update_ratio": too_hot,
    "weight_norm": moved_by_themselves,
    "weight_growth": growing,
    "loss": worse_than_ever,
}
"""By the signal that alarms; others are only told."""


def is_clip_of(change: Change, head: HeadId) -> TypeGuard[qk_clip.QKClip]:
    """Whether a change is a clip of this head."""
    return isinstance(change, qk_clip.QKClip) and change.target == head


REASONS = {
    "loss": "the loss is worse than when training began",
    "gradient_norm": "no gradient that can be used reaches the weights",
    "update_ratio": "each step moves the attention weights by a large part of themselves: the "
    "learning rate is too high",
    "rank_distance": "all tokens have become one at the input of this layer: the stack loses rank, "
    "as one without skip connections does",
    "gradient_share": "gradients vanish on their way through the layers: look at activations and "
    "initial weights",
    "weight_growth": "the weights grow too fast: the learning rate is too high",
    "weight_norm": "the weights fade away: weight decay times learning rate is too large",
    "sigma_max_v": "the values of a head are out of all proportion",
    "max_logit": "attention logits grow without end",
    "entropy": "attention has collapsed",
}


def diagnosis(alarm: Alarm, history: tuple[tuple[int, str, HeadId], ...]) -> str:
    """Why going on is no use, and what was tried."""
    tried = sorted({name for _, name, _ in history})
    done = f"tried: {', '.join(tried)}" if tried else "there is no change that answers it"
    reason = REASONS.get(alarm.signal, f"{alarm.signal} stays outside its limit")
    layer, head = alarm.target
    where = "" if layer < 0 else f" (layer {layer}" + (f" head {head})" if head >= 0 else ")")
    return f"{reason}{where}: {alarm.value:.4g}, limit {alarm.limit:.4g}; {done}"
