"""What each change does to a model written without Sixfold, and what its undo gives back."""

from __future__ import annotations

import math

import pytest
import torch
from plain import batches, made, move
from torch import nn

from sixfold import LanguageModel, LeadMetaArchitect
from sixfold.contracts import WHOLE, HeadId
from sixfold.governor.alarms import Alarm
from sixfold.governor.limits import ActionLimits, AlarmLimits, Limits
from sixfold.governor.protocols import (
    head_reset,
    initial_gain,
    learning_rate_shield,
    perturbation,
    spectral_normalization,
    temperature,
)

HEAD = HeadId(1, 2)
ALARM = Alarm(1, "critical", "max_logit", HEAD, 200.0, 100.0)


def trained(steps: int = 3, **options):
    model, optimizer = made()
    governor = LeadMetaArchitect(model, optimizer, every=1, **options)
    for tokens in batches(steps):
        move(model, optimizer, tokens, governor)
    return model, optimizer, governor


def rows_of(model, head: HeadId, roles: str):
    """The rows of the fused weight that make a head, by hand."""
    width = model.attention[0].qkv.weight.shape[1]
    d = width // model.attention[0].heads
    starts = [width * "qkv".index(role) + d * head.head for role in roles]
    return [slice(start, start + d) for start in starts]


@pytest.mark.parametrize(
    ("build", "roles"),
    [
        (lambda: spectral_normalization.build(HEAD, ALARM, 20), "qk"),
        (lambda: perturbation.build(HEAD, ALARM, 20), "qk"),
        (lambda: head_reset.build(HEAD, ALARM, 20, "orthogonal"), "qkv"),
        (lambda: head_reset.build(HEAD, ALARM, 20, "xavier"), "qkv"),
        (lambda: head_reset.build(HEAD, ALARM, 20, "neighbours"), "qkv"),
        (lambda: temperature.build(HEAD, 0.5, 20, 10), "q"),
    ],
)
def test_only_this_head_changes_and_undo_restores_every_bit(build, roles):
    model, _optimizer, governor = trained()
    with torch.no_grad():
        model.attention[1].qkv.weight.mul_(8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    change = build()
    change.apply(governor)
    qkv = model.attention[1].qkv
    own = torch.zeros(len(qkv.weight), dtype=torch.bool)
    for rows in rows_of(model, HEAD, roles):
        own[rows] = True
    moved = (qkv.weight != before["attention.1.qkv.weight"]).any(1)
    assert torch.equal(moved, own)
    for name, value in model.state_dict().items():
        if not name.startswith("attention.1.qkv"):
            assert torch.equal(value, before[name]), name
    change.undo(governor)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_reset_head_forgets_its_moments_and_no_other():
    model, optimizer, governor = trained()
    head_reset.build(HEAD, ALARM, 20).apply(governor)
    state = optimizer.state[model.attention[1].qkv.weight]
    own = torch.zeros(len(state["exp_avg"]), dtype=torch.bool)
    for rows in rows_of(model, HEAD, "qkv"):
        own[rows] = True
    assert (state["exp_avg"][own] == 0).all()
    assert (state["exp_avg_sq"][~own] != 0).any(1).all()
    orthogonal = model.attention[1].qkv.weight[rows_of(model, HEAD, "q")[0]]
    gram = orthogonal @ orthogonal.T
    torch.testing.assert_close(gram, gram[0, 0] * torch.eye(4), rtol=1e-5, atol=1e-6)


def test_spectral_normalization_bounds_the_spectra():
    model, _, governor = trained()
    spectral_normalization.build(HEAD, ALARM, 20).apply(governor)
    for rows in rows_of(model, HEAD, "qk"):
        norm = torch.linalg.matrix_norm(model.attention[1].qkv.weight[rows], 2)
        assert norm <= 1 + 1e-6


def test_a_shield_divides_what_the_optimizer_sees_and_leaves_the_schedule():
    given = batches(8)
    runs = []
    for shielded in (False, True):
        model, optimizer = made(0.04 if not shielded else 0.16)
        governor = LeadMetaArchitect(model, optimizer)
        if shielded:
            alarm = Alarm(1, "critical", "update_ratio", HEAD, 1.0, 0.3)
            change = learning_rate_shield.build(alarm, 1.5, ActionLimits())
            assert (change.target, change.power) == (WHOLE, 2)
            change.apply(governor)
        for tokens in given:
            move(model, optimizer, tokens, governor)
            assert optimizer.param_groups[0]["lr"] == (0.16 if shielded else 0.04)
        governor.detach()
        runs.append(model.state_dict())
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())


def test_a_learning_rate_that_is_too_hot_is_shielded():
    model, optimizer = made(0.5)
    governor = LeadMetaArchitect(model, optimizer, every=2)
    for tokens in batches(12):
        move(model, optimizer, tokens, governor)
    changes = [row for row in governor.journal if row["kind"] == "change"]
    assert changes[0]["name"] == "learning_rate_shield"
    assert governor.shields["lr"] > 0
    ratios = [s.signals["update_ratio"] for s in governor.telemetry.history]
    assert min(ratios[0][0]) > 0.3
    governor.detach()


def test_the_update_ratio_is_what_a_step_moves():
    model, optimizer = made()
    governor = LeadMetaArchitect(model, optimizer, every=1)
    given = batches(2)
    move(model, optimizer, given[0], governor)
    before = model.attention[0].qkv.weight.detach().clone()
    seen = move(model, optimizer, given[1], governor)
    moved = model.attention[0].qkv.weight.detach() - before
    for head in range(4):
        rows = rows_of(model, HeadId(0, head), "qkv")
        ratio = (
            torch.cat([moved[r] for r in rows]).norm() / torch.cat([before[r] for r in rows]).norm()
        )
        assert seen.snapshot.signals["update_ratio"][0][head] == pytest.approx(
            ratio.item(), rel=1e-4
        )


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_moves_nothing(value):
    def poison(model, optimizer):
        model.head.weight.grad[0, 0] = value

    given, (model, optimizer) = batches(10), made()
    governor = LeadMetaArchitect(model, optimizer)
    seen = [
        move(model, optimizer, tokens, governor, poison if place == 4 else None)
        for place, tokens in enumerate(given)
    ]
    twin, moments = made()
    for place, tokens in enumerate(given):
        if place == 4:  # a forward pass is all that is left of it
            twin(tokens[:, :-1])
        else:
            move(twin, moments, tokens)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)
    (skip,) = [row for row in governor.journal if row["kind"] == "change"]
    assert (skip["name"], skip["step"]) == ("gradient_skip", 5)
    (held,) = [row for row in governor.journal if row["kind"] == "evidence"]
    assert held["held"]
    assert seen[-1].stop is None


def test_a_dead_head_starts_again():
    torch.manual_seed(0)
    model, optimizer = made(width=32)
    with torch.no_grad():
        model.attention[1].qkv.weight[rows_of(model, HEAD, "v")[0]] = 0
        model.attention[1].qkv.bias[rows_of(model, HEAD, "v")[0]] = 0
        model.attention[1].out.weight[:, 16:24] = 0
    governor = LeadMetaArchitect(model, optimizer, every=2)
    for tokens in batches(20):
        move(model, optimizer, tokens, governor)
    (row,) = [row for row in governor.journal if row["kind"] == "change"]
    assert (row["name"], row["layer"], row["head"]) == ("head_reset", *HEAD)
    assert model.attention[1].out.weight[:, 16:24].abs().sum() > 0
    assert governor.telemetry.history[-1].signal("gradient_norm", HEAD) > 0


def test_a_layer_in_which_every_head_is_dead_starts_again():
    model, optimizer = made()
    with torch.no_grad():
        for part in (model.attention[1].qkv.weight, model.attention[1].qkv.bias):
            part[32:] = 0
        model.attention[1].out.weight.zero_()
    governor = LeadMetaArchitect(model, optimizer, every=2)
    for tokens in batches(20):
        move(model, optimizer, tokens, governor)
    assert governor.layers[1].refusal is None
    rows = [row for row in governor.journal if row["kind"] == "change"]
    assert [(row["name"], row["layer"], row["head"]) for row in rows] == [
        ("head_reset", 1, head) for head in range(4)
    ]
    assert min(governor.telemetry.history[-1].signals["gradient_norm"][1]) > 0


@pytest.mark.parametrize("zeros", ["neighbour", "role", "layer"])
def test_a_reset_head_is_never_of_the_size_of_weights_that_are_zero(zeros):
    model, _optimizer, governor = trained()
    qkv = model.attention[1].qkv.weight.data
    qkv[{"neighbour": slice(40, 48), "role": slice(32, 48), "layer": slice(None)}[zeros]] = 0
    known = {"neighbour": qkv[32:40], "role": qkv[:32]}.get(zeros)
    sizes = [] if known is None else sorted(float(w.square().mean().sqrt()) for w in known.split(4))
    head_reset.build(HEAD, ALARM, 20).apply(governor)
    size = float(qkv[rows_of(model, HEAD, "v")[0]].square().mean().sqrt())
    # of zeros alone nothing is known: rows of norm 1, of 16 numbers each
    assert size == pytest.approx(sizes[(len(sizes) - 1) // 2] if sizes else 0.25, rel=0.01)


def exploding(gain: float, steps: int):
    """Twelve rectified layers of a gain; the governor, and the weights before the first step."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(32, 32), nn.ReLU()) for _ in range(12)))
    for p in model.parameters():
        nn.init.normal_(p, std=gain / 32**0.5) if p.ndim > 1 else nn.init.zeros_(p)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    before = [layer[0].weight.detach().clone() for layer in model]
    governor = LeadMetaArchitect(model, optimizer)
    given = []
    with pytest.warns(UserWarning, match="only loss and gradients are watched"):
        for x in governor.data(torch.randn(steps, 64, 32)):
            given.append(x)
            loss = (model(x) - x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            governor.process_step(loss)
            if len(given) == 1:
                now = [layer[0].weight.detach().clone() for layer in model]
    return model, governor, before, now, given


def test_a_run_that_explodes_at_once_begins_again_with_smaller_weights():
    _, governor, before, now, given = exploding(gain=6.0, steps=30)
    changes = [row for row in governor.journal if row["kind"] in ("change", "undo")]
    assert [(row["step"], row["name"]) for row in changes] == [(1, "initial_gain")]
    for old, new in zip(before, now, strict=True):
        gain = old.double().square().sum().div(32).sqrt()
        torch.testing.assert_close(new, (old * 2**0.5 / gain).float())
    assert torch.equal(given[0], given[1])
    assert len(given) == 31
    (held,) = [row for row in governor.journal if row["kind"] == "evidence"]
    assert held["held"]


def test_weights_of_the_right_size_begin_anew_as_they_were():
    model, governor, before, _, _ = exploding(gain=1.2, steps=1)
    assert not [row for row in governor.journal if row["kind"] == "change"]
    change = initial_gain.build(Alarm(1, "critical", "update_ratio", WHOLE, 2.0, 0.05), 20)
    moved = [layer[0].weight.detach().clone() for layer in model]
    change.apply(governor)
    assert all(torch.equal(old, at[0].weight) for old, at in zip(before, model, strict=True))
    change.undo(governor)
    assert all(torch.equal(old, at[0].weight) for old, at in zip(moved, model, strict=True))


def test_a_head_that_explodes_is_named_and_clipped():
    model, optimizer = made(1e-3)
    governor = LeadMetaArchitect(model, optimizer, every=2)
    with torch.no_grad():
        for rows in rows_of(model, HEAD, "qk"):
            model.attention[1].qkv.weight[rows] *= 60
    for tokens in batches(8):
        move(model, optimizer, tokens, governor)
    changes = [row for row in governor.journal if row["kind"] == "change"]
    assert {(row["name"], row["layer"], row["head"]) for row in changes} == {("qk_clip", *HEAD)}
    assert governor.telemetry.history[-1].signal("max_logit", HEAD) < 100


def test_a_place_without_a_grid_holds_its_layer():
    torch.manual_seed(0)
    model = LanguageModel(11, 16, 28, 2, {"num_heads": 7})
    optimizer = torch.optim.AdamW(model.parameters())
    governor = LeadMetaArchitect(model, optimizer, every=1)
    move(model, optimizer, batches(1)[0], governor)
    for command in (
        governor.command_reset_head,
        lambda coord, layer: governor.command_adjust_entropy_regularization(0.1, coord, layer),
    ):
        with pytest.raises(ValueError, match=r"layer must be None, got 1: .* here \(0, 2\)"):
            command((0, 2), layer=1)
    assert "layer 1 head 2" in governor.command_reset_head((1, 2))


def test_the_commands_do_what_they_say_and_are_judged():
    torch.manual_seed(0)
    attention = {"num_heads": 7, "head_dim": 4, "mixer": "hexagonal"}
    model = LanguageModel(11, 16, 28, 1, attention)
    optimizer = torch.optim.AdamW(model.parameters())
    governor = LeadMetaArchitect(model, optimizer, every=1)
    with pytest.raises(ValueError, match="no entropy has been measured yet"):
        governor.command_adjust_entropy_regularization(0.01)
    move(model, optimizer, batches(1)[0], governor)
    assert governor.command_reset_head((0, 0)).startswith("made head_reset (method orthogonal)")
    term = governor.command_adjust_entropy_regularization(0.01, (1, 0))
    assert f"layer 0 head {governor.grid.index[1, 0]}" in term
    with pytest.raises(ValueError, match="not on the grid of radius 1"):
        governor.command_reset_head((3, 3))
    for number in (-1, 1, "a"):
        with pytest.raises(
            ValueError, match=rf"layer must be in \[0, 1\), or None, got {number!r}"
        ):
            governor.command_reset_head((0, 0), layer=number)
    with pytest.raises(ValueError, match=r"coord must be two whole numbers, got \(1, 'a'\)"):
        governor.command_reset_head((1, "a"))
    for delta in (math.nan, math.inf, "a", None):
        with pytest.raises(ValueError, match=f"delta must be a finite number, got {delta!r}"):
            governor.command_adjust_entropy_regularization(delta)
    with pytest.raises(ValueError, match="layer must be None where coord is None, got 0"):
        governor.command_adjust_entropy_regularization(0.01, layer=0)
    with pytest.raises(ValueError, match="unknown method 'zero'"):
        governor.command_reset_head((0, 0), "zero")
    with pytest.raises(ValueError, match="would become -1"):
        governor.command_adjust_entropy_regularization(-1.0)
    for tokens in batches(4):
        move(model, optimizer, tokens, governor)
    kinds = [row["kind"] for row in governor.journal]
    assert kinds.count("change") == 2
    assert "evidence" in kinds


def test_muted_signals_raise_no_alarm():
    limits = Limits(AlarmLimits(entropy_fixation=2.0))
    model, optimizer = made()
    governor = LeadMetaArchitect(model, optimizer, limits=limits, every=1)
    governor.mute("entropy")
    move(model, optimizer, batches(1)[0], governor)
    assert not governor.journal
    with pytest.raises(ValueError, match="unknown signal 'entropie'.*Did you mean 'entropy'"):
        governor.mute("entropie")


def test_a_head_whose_values_are_out_of_proportion_starts_again():
    model, optimizer = made(1e-3)
    governor = LeadMetaArchitect(model, optimizer, every=2)
    with torch.no_grad():
        model.attention[1].qkv.weight[rows_of(model, HEAD, "v")[0]] *= 30
    for tokens in batches(3):
        move(model, optimizer, tokens, governor)
    (row,) = [row for row in governor.journal if row["kind"] == "change"]
    assert (row["name"], row["layer"], row["head"]) == ("head_reset", *HEAD)
    assert row["expects"]["signal"] == "sigma_max_v"


def test_what_a_reset_draws_differs_from_role_to_role_and_head_to_head():
    model, _, governor = trained()
    head_reset.build(HEAD, ALARM, 20).apply(governor)
    head_reset.build(HeadId(1, 0), ALARM, 20).apply(governor)
    places = [*rows_of(model, HEAD, "qkv"), *rows_of(model, HeadId(1, 0), "qkv")]
    fresh = torch.stack([model.attention[1].qkv.weight[rows].flatten() for rows in places])
    cosines = torch.nn.functional.normalize(fresh, dim=-1)
    assert ((cosines @ cosines.T).fill_diagonal_(0).abs() < 0.9).all()


def test_two_resets_of_one_head_are_taken_back_one_by_one():
    model, _, governor = trained()
    before = model.attention[1].qkv.weight.detach().clone()
    change = head_reset.build(HEAD, ALARM, 20)
    change.apply(governor)
    between = model.attention[1].qkv.weight.detach().clone()
    governor.now += 1
    change.apply(governor)
    change.undo(governor)
    assert torch.equal(model.attention[1].qkv.weight, between)
    change.undo(governor)
    assert torch.equal(model.attention[1].qkv.weight, before)


def test_a_change_that_the_model_refuses_is_told_of_and_the_governor_stays(monkeypatch):
    model, optimizer = made(1e-3)
    governor = LeadMetaArchitect(
        model, optimizer, every=1, limits=Limits(AlarmLimits(logit_critical=1e-3))
    )
    given = batches(3)
    monkeypatch.setattr(
        "sixfold.governor.protocols.qk_clip.QKClip.apply", lambda *_: {}["does not fit"]
    )
    with pytest.warns(UserWarning, match="could not be made: 'does not fit'"):
        move(model, optimizer, given[0], governor)
    assert not governor.state.pending
    with pytest.warns(UserWarning, match="could not be made"):
        for tokens in batches(12):
            move(model, optimizer, tokens, governor)


def test_a_step_that_raised_leaves_no_shield_in_the_learning_rate():
    model, optimizer = made(1e-2)
    governor = LeadMetaArchitect(model, optimizer)
    governor.shields["lr"] = 3

    def broken():
        raise MemoryError

    with pytest.raises(MemoryError):
        optimizer.step(broken)
    move(model, optimizer, batches(1)[0], governor)
    assert optimizer.param_groups[0]["lr"] == 1e-2


def test_sparse_gradients_are_measured_too():
    embed = torch.nn.Embedding(5, 3, sparse=True)
    optimizer = torch.optim.SGD(embed.parameters(), lr=0.1)
    governor = LeadMetaArchitect(embed, optimizer)
    embed(torch.tensor([1, 1, 2])).sum().backward()
    optimizer.step()
    with pytest.warns(UserWarning, match="no attention was seen"):
        seen = governor.process_step(1.0)
    assert seen.snapshot.scalars["gradient_norm"] == pytest.approx((3 * 4 + 3) ** 0.5)


def test_detach_is_for_good():
    model, optimizer = made()
    governor = LeadMetaArchitect(model, optimizer, every=1)
    governor.detach()
    assert move(model, optimizer, batches(1)[0], governor).snapshot is None
    assert not model._forward_hooks
