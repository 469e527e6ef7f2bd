from __future__ import annotations

import pytest
import torch

from sixfold.contracts import Expectation, HeadId
from sixfold.data import shakespeare
from sixfold.governor import sandbox
from sixfold.governor.architect import LeadMetaArchitect
from sixfold.governor.protocols import entropy_term, qk_clip
from sixfold.governor.sandbox import T95, interval, paired_effect
from sixfold.models.language import LanguageModel
from sixfold.train.loop import Training, TrainSettings, fit
from sixfold.train.optimizer import OptimizerSettings, build_optimizer


def run_and_governor(tmp_path):
    torch.manual_seed(0)
    data = shakespeare.miniature()
    model = LanguageModel(
        data.vocab_size, data.context, 28, 1, {"num_heads": 7, "mixer": "hexagonal"}, dropout=0.1
    )
    rates = OptimizerSettings(learning_rate=3e-3, schedule="constant", warmup=0)
    optimizer = build_optimizer(model, rates)
    governor = LeadMetaArchitect(model, optimizer)
    settings = TrainSettings(steps=30, batch_size=4, validate_every=30, device="cpu")
    run = Training(model, optimizer, data, settings, rates, tmp_path, {}, observer=governor)
    fit(run)
    return run, governor


def clip(head: int, power: int) -> qk_clip.QKClip:
    return qk_clip.QKClip(
        HeadId(0, head), power, Expectation("max_logit", HeadId(0, head), "fall", 1.0, 20)
    )


def test_the_run_is_left_as_it_was_to_the_bit(tmp_path):
    run, governor = run_and_governor(tmp_path)
    before = {n: t.clone() for n, t in run.model.state_dict().items()}
    moments = {n: t.clone() for n, t in run.optimizer.state[run.model.embedding.weight].items()}
    state, samples, random = (
        governor.state_dict(),
        len(governor.telemetry.history),
        torch.get_rng_state(),
    )
    paired_effect(run, governor, clip(2, 1), start=30, steps=3, forks=2)
    assert all(torch.equal(before[n], t) for n, t in run.model.state_dict().items())
    after = run.optimizer.state[run.model.embedding.weight]
    assert all(torch.equal(moments[n], after[n]) for n in moments)
    assert torch.equal(torch.get_rng_state(), random)
    assert governor.state_dict() == state
    assert len(governor.telemetry.history) == samples


def test_a_change_that_does_nothing_has_no_effect_at_all(tmp_path):
    run, governor = run_and_governor(tmp_path)
    nothing = clip(1, 0)
    effect = paired_effect(run, governor, nothing, start=30, steps=3, forks=3)
    assert effect.with_change == effect.without
    assert effect.mean == 0
    assert effect.interval == (0, 0)


def test_a_harmful_change_is_proven_harmful(tmp_path):
    run, governor = run_and_governor(tmp_path)
    # logits times 2^20 make every head one-hot: the opposite of a repair
    effect = paired_effect(run, governor, clip(3, -20), start=30, steps=5, forks=4)
    assert effect.mean > 0
    assert effect.interval[0] > 0
    assert len(effect.without) == 4


def test_an_entropy_term_is_in_force_inside_its_fork_only(tmp_path):
    run, governor = run_and_governor(tmp_path)
    term = entropy_term.build(HeadId(0, 3), floor=1.5, coefficient=50.0, lasts=200, within=100)
    effect = paired_effect(run, governor, term, start=20, steps=4, forks=2)
    assert effect.with_change != effect.without
    assert not governor.terms
    assert governor.penalty() is None


def test_forks_follow_the_schedule(tmp_path, monkeypatch):
    run, governor = run_and_governor(tmp_path)
    rates = []
    whole = sandbox.train_step
    monkeypatch.setattr(
        sandbox,
        "train_step",
        lambda model, optimizer, *rest: (
            rates.append(optimizer.param_groups[0]["lr"]), whole(model, optimizer, *rest)
        )[1],
    )  # fmt: skip
    paired_effect(run, governor, clip(0, 1), start=7, steps=2, forks=1)
    assert rates == [run.rates.rate(step, 30) for step in (7, 8)] * 2


def test_the_interval_is_students(tmp_path):
    # mean 3, standard deviation sqrt(2.5), t(4) = 2.776: half width 2.776 * sqrt(2.5 / 5)
    assert interval([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx((1.037, 4.963), abs=1e-3)
    assert interval([1.0]) == (-torch.inf, torch.inf)
    assert list(T95) == sorted(T95, reverse=True)
