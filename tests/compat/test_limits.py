"""The published table of alert thresholds, line by line, and the automatic answer to them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from snapshots import snapshot

from sixfold import HexagonalMultiHeadAttention, LeadMetaArchitect
from sixfold.contracts import HeadId
from sixfold.governor.limits import preset
from sixfold.governor.step import State, step

SEED = preset("seed")


def alarms(*snapshots, limits=SEED):
    """The alarms raised at the last of these snapshots, as (level, signal)."""
    state = State()
    for now in snapshots:
        state, decisions = step(state, now, limits)
    return [(alarm.level, alarm.signal) for alarm in decisions.alarms]


def one(entropy=0.95, at=1, **more):
    return snapshot(at, [5.0], [entropy], **more)


@pytest.mark.parametrize("role", ["q", "k", "v"])
@pytest.mark.parametrize(("value", "alarmed"), [(99.9, False), (100.0, False), (100.1, True)])
def test_condition_numbers_above_100(role, value, alarmed):
    signal = f"condition_{role}"
    assert alarms(one(signals={signal: ((value,),)})) == [("warning", signal)] * alarmed


@pytest.mark.parametrize(("value", "alarmed"), [(0.301, False), (0.299, True)])
def test_entropy_below_0_3_is_fixation(value, alarmed):
    # the first sample: nothing has fallen yet
    assert alarms(one(value)) == [("critical", "entropy")] * alarmed


@pytest.mark.parametrize(
    ("before", "now", "alarmed"),
    [
        (0.95, 0.89, True),
        (0.89, 0.88, True),
        (0.85, 0.88, False),
        (0.88, 0.88, False),
        (0.99, 0.91, False),
    ],
)
def test_entropy_below_0_9_and_falling_is_drift(before, now, alarmed):
    limits = replace(SEED, actions=replace(SEED.actions, budget=0))
    expected = [("warning", "entropy")] * alarmed
    assert alarms(one(before), one(now, at=11), limits=limits) == expected


@pytest.mark.parametrize(
    ("value", "alarmed"), [(0.99e-6, True), (1.01e-6, False), (999.0, False), (1001.0, True)]
)
def test_vanishing_and_exploding_gradients(value, alarmed):
    found = alarms(one(signals={"gradient_norm": ((value,),)}))
    assert found == [("warning", "gradient_norm")] * alarmed


@pytest.mark.parametrize(("value", "alarmed"), [(49.0, False), (51.0, True)])
def test_mixing_above_50_microseconds(value, alarmed):
    assert alarms(one(times_us={"mixing": value})) == [("notice", "mixing")] * alarmed


@pytest.mark.parametrize(("value", "alarmed"), [(91.0, False), (89.0, True)])
def test_throughput_ten_percent_below_the_best(value, alarmed):
    before, now = (one(at=t, scalars={"tokens_per_s": v}) for t, v in ((1, 100.0), (11, value)))
    assert alarms(before, now) == [("notice", "tokens_per_s")] * alarmed


@pytest.mark.parametrize(("value", "acts"), [(0.86, False), (0.84, True)])
def test_the_automatic_trigger_can_be_set_to_0_85(value, acts):
    limits = replace(SEED, alarms=replace(SEED.alarms, entropy_fixation=0.85, entropy_drift=None))
    state, _ = step(State(), one(0.95), limits)
    _, decisions = step(state, one(value, at=11), limits)
    assert [applied.change.name for applied in decisions.applied] == ["entropy_term"] * acts
    assert all(applied.change.target == HeadId(0, 0) for applied in decisions.applied)


def test_the_first_phase_is_executed_and_says_at_which_head():
    hamha = HexagonalMultiHeadAttention(d_model=28, grid_radius=1, d_head=4)
    lma = LeadMetaArchitect(hamha, limits="seed", every=1)
    x, head, texts = torch.randn(1, 12, 28), 3, []
    for _ in range(3):
        hamha(x)
        lma.penalty()
        texts.append(" ".join(lma.process_step().text))
        # sharpen one head: its entropy falls far below 0.3
        hamha.scale_head_(head, 6)
    assert lma.telemetry.history[1].signal("entropy", HeadId(0, head)) < 0.3
    assert "made entropy_term at" in texts[1]
    assert "0.3" in texts[1].partition("entropy_term at")[2].split()
    assert HeadId(0, head) in lma.terms
    hamha(x)
    assert lma.penalty() > 0
