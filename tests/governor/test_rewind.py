"""Rolling back: to the bit the run that never saw the bad batches."""

from __future__ import annotations

import pytest
import torch
from plain import batches, made, move

from sixfold import LeadMetaArchitect
from sixfold.contracts import WHOLE
from sixfold.governor.limits import ActionLimits, AlarmLimits, Limits
from sixfold.governor.protocols.rollback import Rollback
from sixfold.governor.rewind import Rewind

LIMITS = Limits(
    AlarmLimits(loss_ratio=1.5, loss_patience=4, finite=True), ActionLimits(snapshot_every=5)
)


def scheduled(optimizer):
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.98)


def ruin(model, optimizer):
    """What a broken batch does: huge weights, though every gradient is finite."""
    with torch.no_grad():
        model.head.weight.mul_(200)


def governed(steps, bad, limits=LIMITS):
    """A governed run whose batches at the places `bad` ruin it; and the places it trained on."""
    model, optimizer = made()
    scheduler = scheduled(optimizer)
    governor = LeadMetaArchitect(model, optimizer, limits=limits, every=2, scheduler=scheduler)
    order, seen = [], []
    for place, tokens in governor.data(enumerate(batches(steps))):
        order.append(place)
        spoil = ruin if place in bad else None
        seen.append(move(model, optimizer, tokens, governor, spoil, scheduler))
    governor.detach()
    return model, optimizer, scheduler, order, seen


def alone(places, steps):
    """A run without a governor that sees only these batches."""
    model, optimizer = made()
    scheduler, given = scheduled(optimizer), batches(steps)
    for place in places:
        move(model, optimizer, given[place], scheduler=scheduler)
    return model, optimizer, scheduler


def changes(seen, name):
    applied = (item.change for step in seen for item in step.decisions.applied)
    return [change for change in applied if change.name == name]


def same(ours, theirs):
    """Whether two runs stand at the same point, to the bit."""
    for (name, a), b in zip(
        ours[0].state_dict().items(), theirs[0].state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name
    moments = [run[1].state_dict()["state"].values() for run in (ours, theirs)]
    for mine, other in zip(*moments, strict=True):
        assert all(torch.equal(mine[key], other[key]) for key in mine)
    assert ours[2].state_dict() == theirs[2].state_dict()


def test_after_a_rollback_the_run_is_one_that_never_saw_the_bad_batches():
    *run, order, seen = governed(40, bad={13})
    assert changes(seen, "rollback") == [
        Rollback(WHOLE, 10, 14, changes(seen, "rollback")[0].expects)
    ]
    # place 13 is step 14; the loss shows it at step 15, and at step 19 that has lasted 4 steps
    assert order == [*range(19), 10, 11, 12, *range(19, 40)]
    same(run, alone([*range(13), *range(19, 40)], 40))


def test_a_second_failure_goes_back_again():
    *run, _order, seen = governed(60, bad={13, 40})
    assert len(changes(seen, "rollback")) == 2
    same(run, alone([*range(13), *range(19, 40), *range(46, 60)], 60))


def test_every_module_keeps_its_own_flag_and_buffers_that_are_in_no_checkpoint_come_back():
    model, optimizer = made()
    model.norms[0].eval()
    model.register_buffer("count", torch.zeros(2), persistent=False)
    model.drop.register_buffer("cache", torch.zeros(1), persistent=False)
    rewind = Rewind(model, (optimizer,))
    moment = rewind.copied()
    model.count += 1
    model.drop.cache = torch.ones(5)
    model.eval()
    model.drop.train()
    rewind.put(moment)
    assert (model.training, model.norms[0].training, model.norms[1].training) == (True, False, True)
    assert model.drop.training
    assert torch.equal(model.count, torch.zeros(2))
    assert torch.equal(model.drop.cache, torch.zeros(1))
    model.drop.cache += 1
    rewind.put(moment)
    assert torch.equal(model.drop.cache, torch.zeros(1))


def test_batches_that_come_late_through_the_governor_can_be_gone_back_over():
    model, optimizer = made()
    limits = Limits(LIMITS.alarms, ActionLimits(snapshot_every=8))
    governor = LeadMetaArchitect(model, optimizer, limits=limits, every=2)
    given = list(enumerate(batches(30)))
    for _, tokens in given[:3]:
        move(model, optimizer, tokens, governor)
    seen = []
    for place, tokens in governor.data(given[3:]):
        # the first copy is that of step 8: before it there is nothing to go back to
        assert set(governor.state.snapshots) <= set(governor.rewind.moments)
        seen.append(move(model, optimizer, tokens, governor, ruin if place == 12 else None))
    assert [change.to for change in changes(seen, "rollback")] == [8]


def test_batches_that_were_to_come_again_survive_the_process():
    model, optimizer = made()
    governor, given = LeadMetaArchitect(model, optimizer, limits=LIMITS, every=2), batches(40)
    for place in governor.data(range(40)):
        seen = move(model, optimizer, given[place], governor, ruin if place == 13 else None)
        if governor.again:
            break
    assert seen.acted
    state = governor.state_dict()
    governor.detach()
    again = LeadMetaArchitect(model, optimizer, limits=LIMITS, every=2)
    again.load_state_dict(state)
    assert list(again.data(range(19, 22))) == [10, 11, 12, 19, 20, 21]


def test_a_failed_promise_returns_to_the_run_that_was_given_up():
    model, optimizer = made()
    rewind = Rewind(model, (optimizer,))
    rewind.recording = True
    feed = rewind.data(batches(9))
    for step in range(1, 7):
        move(model, optimizer, next(feed))
        rewind.now = step
        rewind.keep((0, step) if step == 3 else tuple(rewind.moments))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    rewind.back(3, 5)
    assert not torch.equal(model.state_dict()["head.weight"], state["head.weight"])
    rewind.forward()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with pytest.raises(RuntimeError, match="nothing was given up"):
        rewind.forward()


@pytest.mark.parametrize(("repeated", "left"), [(0, [2, 3]), (1, [2, 3]), (3, [3])])
def test_a_failed_return_leaves_what_an_earlier_one_had_to_repeat(repeated, left):
    model, optimizer = made()
    rewind = Rewind(model, (optimizer,))
    rewind.recording = True
    feed = rewind.data(range(9))
    for step in range(1, 5):
        next(feed)
        rewind.now = step
    rewind.back(0, 5)
    rewind.now = 0
    for step in (1, 2):
        assert next(feed) == step - 1
        rewind.now = step
    rewind.back(0, 3)  # batches 0 and 1 come again, before 2 and 3 that still wait
    rewind.now = 0
    assert [next(feed) for _ in range(repeated)] == [0, 1, 2][:repeated]
    rewind.forward()
    assert [next(feed) for _ in left] == left
    assert next(feed) == 4


def test_without_data_there_is_no_rollback_and_an_honest_stop():
    model, optimizer = made(0.0)  # what was ruined does not become better by itself
    limits = Limits(LIMITS.alarms, ActionLimits(stop_after=6))
    governor = LeadMetaArchitect(model, optimizer, limits=limits, every=2)
    seen = [
        move(model, optimizer, tokens, governor, ruin if place == 5 else None)
        for place, tokens in enumerate(batches(40))
    ]
    assert not changes(seen, "rollback")
    stops = [step for step in seen if step.stop is not None]
    assert stops[0].stop.startswith("the loss is worse than when training began")
    assert any(row["kind"] == "stop" for row in governor.journal)


def test_only_calm_moments_are_kept():
    *_, seen = governed(40, bad={13})
    kept = [step.decisions.copies for step in seen]
    assert kept[0] == (0,)
    assert kept[9] == (0, 5, 10)
    assert 15 not in kept[20]
    assert all(len(copies) <= 3 for copies in kept)


def test_a_healthy_run_keeps_its_bits_while_copies_are_made():
    model, optimizer, scheduler, order, seen = governed(30, bad=set())
    assert order == list(range(30))
    assert not any(step.decisions.alarms or step.decisions.applied for step in seen)
    same((model, optimizer, scheduler), alone(range(30), 30))


def test_copies_and_batches_do_not_pile_up_while_nothing_is_calm():
    limits = Limits(
        AlarmLimits(logit_critical=1e-9), ActionLimits(snapshot_every=1, stop_after=10**6)
    )
    model, optimizer = made(1e-4)
    governor = LeadMetaArchitect(model, optimizer, limits=limits, every=1)
    for tokens in governor.data(batches(60)):
        move(model, optimizer, tokens, governor)
    assert not governor.rewind.moments
    assert not governor.rewind.batches


def test_a_rollback_is_made_alone_and_forgets_what_was_done_to_the_weights_it_leaves():
    limits = Limits(
        AlarmLimits(logit_critical=50.0, weight_jump=3.0, finite=True),
        ActionLimits(snapshot_every=5),
    )
    model, optimizer = made()
    governor = LeadMetaArchitect(model, optimizer, limits=limits, every=2)
    seen = []
    for place, tokens in governor.data(enumerate(batches(20))):

        def jump(model, optimizer, place=place):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(20.0 if place == 12 else 1.0)

        seen.append(move(model, optimizer, tokens, governor, jump))
    (back,) = changes(seen, "rollback")
    (when,) = [step for step in seen if back in [a.change for a in step.decisions.applied]]
    assert [item.change for item in when.decisions.applied] == [back]
    assert not changes(seen, "qk_clip")
    assert governor.telemetry.history[-1].scalars["weight_norm"] < 100


@pytest.mark.parametrize("mode", ["observe", "act"])
def test_batches_are_held_only_where_they_can_come_again(mode):
    model, optimizer = made()
    governor = LeadMetaArchitect(model, optimizer, mode=mode)
    for place, tokens in enumerate(governor.data(batches(10))):
        move(model, optimizer, tokens, governor)
        if place == 6:
            governor.detach()
    assert not governor.rewind.batches
    assert not governor.rewind.moments
