"""Which change answers which alarm, decided on snapshots alone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sixfold.contracts import WHOLE, Snapshot
from sixfold.governor.alarms import Alarm, Memory
from sixfold.governor.ladder import Situation, back, still_needed
from sixfold.governor.limits import preset
from sixfold.governor.protocols import learning_rate_shield
from sixfold.governor.state import State
from sixfold.governor.step import step

REWINDING = replace(preset("default"), rewinding=True)


def decided(rows, limits=REWINDING):
    """(step, change) of what is done about these scalars of every tenth step, losses as given."""
    state, made = State(), []
    for number, row in enumerate(rows):
        loss = row.pop("loss", 2.0)
        now = Snapshot(10 * number + 1, loss, {"max_logit": ((1.0,),)}, row, {})
        state, decisions = step(state, now, limits)
        made += [(now.step, applied.change) for applied in decisions.applied]
    return made


@pytest.mark.parametrize(("ratio", "power"), [(0.049, None), (0.051, 2), (0.11, 3)])
def test_one_step_that_moves_all_weights_too_far_is_shielded_at_once(ratio, power):
    made = decided([{"update_ratio": ratio, "weight_norm": 30.0}])
    assert [(at, change.name, change.power) for at, change in made] == (
        [] if power is None else [(1, "learning_rate_shield", power)]
    )


def test_a_layer_may_be_moved_further_than_the_whole():
    now = Snapshot(1, 2.0, {"update_ratio": ((0.19, 0.19),)}, {"update_ratio": 0.04}, {})
    assert not step(State(), now, REWINDING)[1].applied


def test_a_shield_that_was_too_weak_is_joined_by_another_after_the_cooldown():
    rows = [
        {"update_ratio": 0.06, "weight_norm": 30.0},
        {"update_ratio": 0.04, "weight_norm": 31.0, "weight_growth": 1.2},
        {"update_ratio": 0.001, "weight_norm": 31.0, "weight_growth": 1.01},
    ]
    made = decided(rows)
    # 1.2^2 - 1 = 0.44 = 0.66^2; 0.66 / 0.05 = 13 < 2^4
    assert [(at, change.name, change.power) for at, change in made] == [
        (1, "learning_rate_shield", 2), (11, "learning_rate_shield", 4),
    ]  # fmt: skip


def test_growth_says_more_than_one_step_and_is_answered_first():
    (one,) = decided([{"update_ratio": 0.06, "weight_norm": 30.0, "weight_growth": 1.4}])
    assert one[1].expects.signal == "weight_growth"


def test_a_run_is_gone_back_from_under_a_shield_too():
    rows = [{"update_ratio": 0.06, "weight_norm": 30.0}]
    rows += [{"update_ratio": 0.01, "weight_norm": 30.0} for _ in range(4)]
    rows += [{"update_ratio": 0.01, "weight_norm": 100.0}]
    names = [(at, change.name) for at, change in decided(rows)]
    assert names == [(1, "learning_rate_shield"), (51, "rollback")]


@pytest.mark.parametrize(
    ("first", "gain", "limits", "name"),
    [
        (True, 2.5, REWINDING, "initial_gain"),
        (True, 1.4, REWINDING, "gradient_clip"),
        (True, 2.5, preset("default"), "gradient_clip"),
        (False, 2.5, REWINDING, "gradient_clip"),
    ],
)
def test_only_a_run_that_can_begin_again_has_its_gains_changed(first, gain, limits, name):
    row = {"update_ratio": 200.0, "gradient_norm": 1e6, "weight_norm": 90.0, "gain": gain}
    made = decided([row] if first else [{"weight_norm": 90.0}, row], limits)
    assert [change.name for _, change in made] == [name]


def returns(losses):
    """(step, change) of what is done about the losses of a run, one a step."""
    state, made = State(), []
    for number, loss in enumerate(losses):
        now = Snapshot(number + 1, loss, {}, {"loss_finite": 1.0}, {})
        state, decisions = step(state, now, REWINDING)
        made += [(now.step, applied.change) for applied in decisions.applied]
    return made


def test_a_second_return_brings_a_smaller_learning_rate():
    bad, good = [4.0] * 8, [2.0] * 40
    once = returns([*good, *bad, *good])
    assert [change.name for _, change in once] == ["rollback"]
    # much later, another batch may be to blame
    later = returns([*good, *bad, *good, *bad, *good])
    assert [change.name for _, change in later] == ["rollback", "rollback"]
    twice = returns([*good, *bad, *good[:4], *bad, *good])
    assert [change.name for _, change in twice] == ["rollback", "rollback", "learning_rate_shield"]
    _, (first, _), (second, shield) = twice
    assert first == second
    assert shield.power == 3


def test_a_muted_signal_keeps_nobody_awake():
    hot = Snapshot(1, 2.0, {"max_logit": ((200.0,),)}, {}, {})
    state, _ = step(State(), hot, REWINDING)
    assert state.memory.vigilant
    muted = replace(REWINDING, alarms=replace(REWINDING.alarms, muted=("max_logit",)))
    state, decisions = step(state, hot._replace(step=2), muted)
    assert not state.memory.vigilant
    assert not decisions.alarms


@pytest.mark.parametrize(("ratio", "needed"), [(0.0062, False), (0.0063, True)])
def test_a_shield_stays_where_the_rate_behind_it_would_alarm_again(ratio, needed):
    shield = learning_rate_shield.build(
        Alarm(1, "critical", "update_ratio", WHOLE, 0.11, 0.05), 2, REWINDING.actions
    )
    now = Snapshot(200, 2.0, {}, {"update_ratio": ratio}, {})
    limits = replace(REWINDING, alarms=replace(REWINDING.alarms, update_ratio=0.05))
    # half of 0.05 behind a factor of 4
    assert still_needed(shield, now, State().memory, limits) is needed


@pytest.mark.parametrize(("done", "to"), [(0, 40), (1, 20), (2, 0), (3, 0)])
def test_each_return_goes_one_copy_further_back(done, to):
    alarm = Alarm(60, "critical", "loss", WHOLE, 9.0, 3.0)
    history = tuple((50 + n, "rollback", WHOLE) for n in range(done))
    memory = Memory(worse_since=55)
    now = Situation(
        alarm, memory, Snapshot(60, 9.0, {}, {}, {}), history, (), (), (0, 20, 40), REWINDING
    )
    change = back(now)
    assert (change.to, change.since) == (to, 54)


def test_no_copy_is_kept_while_the_loss_is_worse_than_at_first():
    rows = [{"loss": 2.0}, *[{"loss": 2.0} for _ in range(7)], {"loss": 9.0}, {"loss": 9.0}]
    state = State()
    for number, row in enumerate(rows):
        now = Snapshot(20 * number + 1, row["loss"], {}, {}, {})
        state, _ = step(state, now._replace(step=max(20 * number, 1)), REWINDING)
    assert state.snapshots == (100, 120, 140)


def test_losses_of_the_run_that_was_given_up_are_forgotten():
    rows = [{"loss": 2.0} for _ in range(20)] + [{"loss": 9.0 * (1 + n % 3)} for n in range(8)]
    state = State()
    for number, row in enumerate(rows):
        now = Snapshot(number + 1, row["loss"], {}, {}, {})
        state, made = step(state, now, REWINDING)
    assert [item.change.name for item in made.applied] == ["rollback"]
    assert state.memory.losses == (2.0,) * 20
    again = [Snapshot(29 + n, loss, {}, {}, {}) for n, loss in enumerate([2.0, *[4.0] * 30])]
    names = []
    for now in again:
        state, made = step(state, now, REWINDING)
        names += [(now.step, item.change.name) for item in made.applied]
    assert names[:2] == [(38, "rollback"), (38, "learning_rate_shield")]
