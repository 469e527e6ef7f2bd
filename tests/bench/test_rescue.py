"""The rescue benchmark: its runs are what they say, its rivals do what is written, its sums are right."""

from __future__ import annotations

import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sixfold.bench.rescue import columns, run, score, sensitivity, table, trial
from sixfold.bench.rescue.columns import COLUMNS, AdaGC, Alarm, Said, ZClip, missing, reported
from sixfold.bench.rescue.families import FAMILIES, TWINS, Family
from sixfold.bench.rescue.healthy import KINDS, healthy
from sixfold.bench.rescue.task import (
    AFTER_BACKWARD,
    IGNORED,
    ON_DATA,
    ON_RUN,
    Arm,
    Attention,
    Batches,
    Data,
    Fault,
    Run,
    Shape,
    SpectralWeight,
    copy_batch,
    cross_entropy,
    factor,
    patches,
    resumed,
)  # fmt: skip
from sixfold.bench.rescue.trial import Case, conduct, fingerprint
from sixfold.errors import ConfigError
from sixfold.record import Result

ROOT = Path(__file__).parents[2]
TINY = Arm(Shape(8, 2, 2), Data(half=4, alphabet=8, batch=4), steps=6, warmup=2)


def trained(arm: Arm, seed: int = 0) -> Run:
    made = resumed(arm, seed)
    for batch in made.batches:
        made.move(made.loss(batch))
    return made


# ---------------------------------------------------------------- task


def test_the_reference_model_has_the_published_size():
    assert sum(p.numel() for p in Run(Arm(), 0).model.parameters()) == 111_872


def test_attention_is_softmax_of_scaled_products_head_by_head():
    layer = Attention(Shape(8, 1, 2), causal=True)
    x = torch.randn(3, 5, 8)
    q, k, v = layer.qkv(x).chunk(3, dim=-1)
    hidden = torch.ones(5, 5).triu(1).bool()
    heads = []
    for part in (slice(0, 4), slice(4, 8)):
        logits = q[..., part] @ k[..., part].transpose(1, 2) / 2
        heads.append(logits.masked_fill(hidden, -math.inf).softmax(-1) @ v[..., part])
    torch.testing.assert_close(layer(x), layer.out(torch.cat(heads, -1)))


def test_normed_queries_bound_the_logits():
    model = Run(replace(TINY, shape=replace(TINY.shape, attention="qk_norm")), 0).model
    layer = model.blocks[0].parts[0]
    q = layer.norms[0](1000 * torch.randn(50, 4))
    assert (q @ q.T / 2).max() <= 2 * (1 + 1e-4)


def test_a_spectral_weight_has_spectral_norm_gamma():
    weight = torch.randn(6, 4)
    made = SpectralWeight(weight)
    made.gamma.data.fill_(3.0)
    assert torch.linalg.matrix_norm(made(weight), 2).item() == pytest.approx(3.0, rel=1e-5)


@pytest.mark.parametrize("norm", ["pre", "post", "none"])
def test_without_skips_a_block_replaces_the_stream(norm):
    shape = replace(TINY.shape, skip=False, norm=norm)
    block = Run(replace(TINY, shape=shape), 0).model.blocks[0]
    for part in block.parts:
        final = part.out if isinstance(part, Attention) else part[-1]
        nn.init.zeros_(final.weight)
    assert not block(torch.randn(1, 3, 8)).abs().any()


def test_the_second_half_is_the_first_and_alone_is_asked_for():
    inputs, targets = copy_batch(Data(half=4, alphabet=8, batch=3), seed=1, index=2)
    assert torch.equal(inputs[:, :4], inputs[:, 4:])
    assert torch.equal(targets[:, 3:7], inputs[:, 4:])
    assert torch.equal(targets[:, 7], inputs[:, 0])
    assert (targets[:, :3] == IGNORED).all() and (targets[:, 3:] >= 0).all()


def test_batches_depend_on_seed_and_place_alone():
    first, again = list(Batches(TINY, 3)), list(Batches(TINY, 3, first=4))
    assert all(torch.equal(a, b) for a, b in zip(first[4], again[0], strict=True))
    assert not torch.equal(first[0][0], first[1][0])
    assert not torch.equal(first[0][0], next(iter(Batches(TINY, 4)))[0])


def test_patches_are_the_pixels_in_squares_of_four():
    pictures = torch.arange(64.0).view(1, 1, 8, 8)
    assert torch.allclose(patches(pictures)[0, 1] * 0.4 + 0.3, torch.tensor([2.0, 3, 10, 11]))


def test_a_run_is_the_same_again_to_the_bit():
    assert fingerprint(trained(TINY).model) == fingerprint(trained(TINY).model)
    assert fingerprint(trained(TINY).model) != fingerprint(trained(TINY, seed=1).model)


def test_a_resumed_run_ends_where_the_whole_one_does():
    assert fingerprint(trained(replace(TINY, resumed=3)).model) == fingerprint(trained(TINY).model)


# ---------------------------------------------------------------- faults


def test_every_fault_in_use_is_known():
    arms = [family.run(0) for family in FAMILIES.values()] + list(healthy(0).values())
    assert {f.kind for arm in arms for f in arm.faults} <= {*ON_DATA, *ON_RUN, "rate"}


@pytest.mark.parametrize("attention", ["plain", "qk_norm", "sigma"])
def test_nothing_reaches_a_dead_head_and_it_stays_dead(attention):
    shape = replace(TINY.shape, attention=attention)
    made = trained(replace(TINY, shape=shape, faults=(Fault("kill head", 0, 1, layer=1, head=1),)))
    layer = made.model.blocks[1].parts[0]
    assert not layer.qkv.weight[2 * 8 + 4 :].any() and not layer.out.weight[:, 4:].any()
    assert layer.qkv.weight[2 * 8 : 2 * 8 + 4].all() and layer.out.weight[:, :4].all()


def test_a_scaled_head_has_logits_scaled_by_the_square_and_no_other_has():
    made = Run(replace(TINY, faults=(Fault("scale head", 0, 1, 3.0, layer=0, head=1),)), 0)
    layer, x = made.model.blocks[0].parts[0], torch.randn(5, 8)

    def logits():
        q, k, _ = layer.qkv(x).unflatten(-1, (3, 2, 4)).unbind(1)
        return torch.einsum("nhd,mhd->hnm", q, k)

    before = logits()
    made.loss(next(iter(made.batches)))
    torch.testing.assert_close(logits()[0], before[0])
    torch.testing.assert_close(logits()[1], 9 * before[1])


def test_a_share_of_the_targets_is_wrong_and_only_in_the_window():
    wrong = replace(
        TINY, data=replace(TINY.data, batch=512), faults=(Fault("wrong targets", 2, 3, 0.5),)
    )
    clean = replace(wrong, faults=())
    for index, (mine, other) in enumerate(zip(Batches(wrong, 0), Batches(clean, 0), strict=True)):
        assert torch.equal(mine[0], other[0])
        counted = other[1] != IGNORED
        # one drawn target in eight is right by chance
        share = (mine[1] != other[1])[counted].float().mean().item()
        assert share == (pytest.approx(0.5 * 7 / 8, abs=0.05) if index == 2 else 0)


def test_a_frozen_block_does_not_move():
    made = trained(replace(TINY, faults=(Fault("freeze", 0, 1, layer=1),)))
    fresh = Run(TINY, 0).model
    same = [
        torch.equal(a, b) for a, b in zip(made.model.parameters(), fresh.parameters(), strict=True)
    ]
    frozen = [name.startswith("blocks.1") for name, _ in fresh.named_parameters()]
    assert same == frozen


def test_faults_of_a_step_are_gone_at_the_next():
    made = Run(replace(TINY, warmup=0, faults=(Fault("glitch", 1, 2, 10.0),)), 0)
    rates = []
    made.optimizer.register_step_pre_hook(lambda opt, *_: rates.append(opt.param_groups[0]["lr"]))
    for batch in made.batches:
        made.move(made.loss(batch))
    assert rates == pytest.approx([3e-3, 3e-2, *[3e-3] * 4])


@pytest.mark.parametrize("attention", ["plain", "sigma"])
@pytest.mark.parametrize("fault", [f for f in FAMILIES.values() if f.located])
def test_faults_of_a_head_reach_every_attention(attention, fault):
    arm = replace(TINY, shape=replace(TINY.shape, attention=attention))
    faulty = replace(arm, faults=tuple(replace(f, first=2, last=3) for f in fault.arm.faults))
    assert fingerprint(trained(faulty).model) != fingerprint(trained(arm).model)


def test_a_gradient_that_is_no_number_is_the_heads_own():
    made = Run(replace(TINY, faults=(Fault("nan gradient", 0, 1, layer=1, head=1),)), 0)
    made.loss(next(iter(made.batches))).backward()
    made.disturb(AFTER_BACKWARD)
    found = {name for name, p in made.model.named_parameters() if p.grad.isnan().any()}
    assert found == {"blocks.1.parts.0.qkv.weight"}
    rows = made.model.blocks[1].parts[0].qkv.weight.grad.isnan().any(1).nonzero().flatten()
    assert rows.tolist() == [4]


def test_the_schedule_warms_up_and_goes_wrong():
    arm = Arm(warmup=4, faults=(Fault("rate", 6, 8, 30.0),))
    assert [factor(arm, step) for step in range(9)] == [0.25, 0.5, 0.75, 1, 1, 1, 30, 30, 1]


# ---------------------------------------------------------------- families and healthy runs


def test_there_are_enough_failures_and_each_has_its_twin():
    assert len(FAMILIES) >= 12
    assert {family.twin for family in FAMILIES.values()} == set(TWINS)


@pytest.mark.parametrize("family", [f for f in FAMILIES.values() if f.located])
def test_the_seed_moves_the_head_at_fault(family):
    found = {family.culprit(seed) for seed in range(5)}
    assert len(found) > 2
    for seed in range(5):
        assert {(f.layer, f.head) for f in family.run(seed).faults} == {family.culprit(seed)}
        assert family.culprit(seed)[1] < family.arm.shape.heads


def test_healthy_runs_are_many_and_others_for_other_seeds():
    first, other = healthy(0), healthy(100)
    assert len(first) >= 300 and first == healthy(0) and list(first) == list(other)
    assert sum(first[name] != other[name] for name in first) > 0.9 * len(first)
    assert {score.kind_of(name) for name in first} == set(KINDS)
    assert all(arm.shape.width % arm.shape.heads == 0 for arm in first.values())


# ---------------------------------------------------------------- columns


def parameter(*gradient: float) -> nn.Parameter:
    made = nn.Parameter(torch.zeros(len(gradient)))
    made.grad = torch.tensor(gradient)
    return made


def test_zclip_scales_an_outlier_by_the_rule_and_lets_others_pass():
    tame = ZClip()
    for n in range(25):
        tame([parameter(1.0 if n % 2 else 3.0)])
    mean, deviation = (12 * 1.0 + 13 * 3.0) / 25, math.sqrt((12 * 1.04**2 + 13 * 0.96**2) / 25)
    usual, outlier = parameter(3.0), parameter(0.0, -30.0)
    tame([usual])
    assert usual.grad.item() == 3.0 and not tame.fired
    mean_now = 0.97 * mean + 0.03 * 3.0
    deviation_now = math.sqrt(0.97 * deviation**2 + 0.03 * (3.0 - mean_now) ** 2)
    tame([outlier])
    z = (30 - mean_now) / deviation_now
    assert tame.fired
    assert outlier.grad[1].item() == pytest.approx(
        -(mean_now + 2.5**2 / z * deviation_now), rel=1e-4
    )


def test_adagc_clips_the_whole_first_and_each_tensor_by_its_own_past_later():
    tame, one, two = AdaGC(), parameter(3.0), parameter(4.0)
    for _ in range(AdaGC.WARMUP):
        one.grad, two.grad = torch.tensor([3.0]), torch.tensor([4.0])
        tame([one, two])
    assert (one.grad.item(), two.grad.item()) == pytest.approx((0.6, 0.8), rel=1e-4)
    one.grad, two.grad = torch.tensor([60.0]), torch.tensor([0.1])
    tame([one, two])
    assert one.grad.item() == pytest.approx(1.05 * 0.6, rel=1e-4)
    assert two.grad.item() == pytest.approx(0.1)


def test_the_rate_is_halved_when_the_loss_leaves_its_best_and_not_at_once_again():
    made = Run(replace(TINY, warmup=0), 0)
    step = columns.halving(made)
    batch = next(iter(made.batches))

    def at(value: float):
        loss = cross_entropy(made.model, batch)
        return step(loss * (value / loss.item())).actions

    assert [at(loss) for loss in (3.0, 2.9, 2.9)] == [(), (), ()]
    assert at(9.0) == ("rate halved",) and at(9.0) == ()
    assert made.optimizer.param_groups[0]["lr"] == pytest.approx(1.5e-3)


@pytest.mark.parametrize("column", [name for name in COLUMNS if name not in missing()])
def test_every_column_trains_and_a_healthy_governed_run_keeps_its_bits(column):
    arm = COLUMNS[column].recipe(TINY)
    alone, row = (
        conduct(Case("copy 0", "nothing", 0, TINY)),
        conduct(Case("copy 0", column, 0, arm)),
    )
    assert len(row["losses"]) == TINY.steps and row["final"] < 10
    # AdaGC begins as a clip of the whole; ZClip lets its first steps pass unclipped
    if column in ("zclip", "qk_norm", "sigma"):
        assert row["parameters"] != alone["parameters"]
    else:
        assert row["parameters"] == alone["parameters"] and not row["alarms"] + row["actions"]


def test_attention_cannot_be_changed_where_there_is_none():
    assert COLUMNS["qk_norm"].recipe(TWINS["stack"]) is None


HEALTHY = SimpleNamespace(
    failure_type=None, should_skip=False, rolled_back=False, lr_reduced=False, unrecoverable=False,
    message="",
)  # fmt: skip
SKIP = SimpleNamespace(**{**vars(HEALTHY), "should_skip": True})


class Scripted:
    """A controller that answers each step as it was told, and sees what ARC's would see."""

    answers: tuple = ()

    def __init__(self, model, optimizer, scheduler, verbose):
        assert not verbose and scheduler.optimizer is optimizer
        self.model, self.left, self.norms = model, iter(self.answers), []

    def step(self, loss):
        self.norms.append(columns.total_norm(list(self.model.parameters())))
        return next(self.left)


def scripted(monkeypatch, *answers) -> tuple[Run, list[Scripted]]:
    """A run of the arc column with such a controller, and the controllers that were made."""
    made: list[Scripted] = []

    def build(*args, **kwargs):
        made.append(Scripted(*args, **kwargs))
        made[-1].left = iter(answers)
        return made[-1]

    monkeypatch.setitem(sys.modules, "arc", SimpleNamespace(Controller=build))
    return Run(replace(TINY, clip=1e-3), 0), made


def test_arc_sees_whole_gradients_and_a_step_it_skips_moves_nothing(monkeypatch):
    mine, made = scripted(monkeypatch, HEALTHY, SKIP, HEALTHY, HEALTHY, HEALTHY, HEALTHY)
    step, states = columns.arc(mine), []
    for batch in mine.batches:
        step(mine.loss(batch))
        states.append((fingerprint(mine.model), mine.scheduler.last_epoch, mine.iteration))
    assert states[0][:2] == states[1][:2] != states[2][:2]
    assert [at for _, _, at in states] == [1, 2, 3, 4, 5, 6] and states[-1][1] == 5
    assert min(made[0].norms) > 10 * mine.arm.clip


def test_arc_that_only_looks_on_is_the_plain_loop_with_its_clip_and_faults(monkeypatch):
    mine, _ = scripted(monkeypatch, *[HEALTHY] * TINY.steps)
    faulty = replace(mine.arm, faults=(Fault("glitch", 2, 3, 10.0),))
    watched = Run(faulty, 0)
    step = columns.arc(watched)
    assert {step(watched.loss(batch)) for batch in watched.batches} == {Said()}
    assert fingerprint(watched.model) == fingerprint(trained(faulty).model)


@pytest.mark.parametrize(
    ("failure", "message", "signals"),
    [
        ("nan_loss", "", ["loss"]),
        ("gradient_explosion", "", ["gradient_norm"]),
        ("weight_magnitude_collapse (ratio=0.0010)", "", ["weight_norm"]),
        ("lyapunov_divergence", "", ["weight_growth"]),
        ("drift_detected", "to step 3 | CRITICAL: loss↑0.0612", ["loss"]),
        ("drift_detected", "MULTI: grad↑0.1 weight↑0.2", ["gradient_norm", "weight_growth"]),
    ],
)
def test_what_arc_reports_is_told_in_the_words_of_the_benchmark(failure, message, signals):
    words = {"should_skip": True, "rolled_back": True, "lr_reduced": True}
    action = SimpleNamespace(
        **{**vars(HEALTHY), **words, "failure_type": failure, "message": message}
    )
    alarms = tuple(Alarm("critical", signal, -1, -1) for signal in signals)
    assert reported(action) == Said(alarms, ("rollback", "rate halved"))
    action.unrecoverable = True
    assert reported(action).stop == message


def test_a_failure_that_arc_did_not_know_is_not_guessed():
    with pytest.raises(KeyError, match="new_failure"):
        reported(SimpleNamespace(**{**vars(HEALTHY), "failure_type": "new_failure"}))
    assert reported(SKIP) == Said(actions=("step skipped",))


def test_a_column_that_is_not_installed_is_refused_by_name_and_else_left_out(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(columns.metadata, "distributions", lambda: iter(()))
    assert missing() == {"arc": "arc-training==5.2.0.post1"}
    with pytest.raises(ConfigError, match="'arc' needs .* pip install 'arc-training==5.2.0.post1'"):
        run.rescue(["arc"], runs=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
    assert run.present([]) == [name for name in COLUMNS if name != "arc"]
    with run.progress(0, missing()):
        pass
    assert "arc is left out: arc-training==5.2.0.post1 is not installed" in capsys.readouterr().err


@pytest.mark.skipif("arc" in missing(), reason="arc-training is not installed")
def test_arc_answers_a_gradient_that_is_not_a_number():
    arm = replace(TINY, steps=10, faults=(Fault("nan gradient", 5, 6),))
    row = conduct(Case("nan gradient", "arc", 0, arm))
    assert row["alarms"] == [[6, "critical", "gradient_norm", -1, -1]]
    assert [name for _, name in row["actions"]] == ["rollback", "rate halved"]
    assert row["final"] is not None and row["stop"] is None


def test_a_step_that_is_not_a_number_is_answered_by_the_governor():
    arm = replace(TINY, steps=10, faults=(Fault("nan gradient", 5, 6),))
    alone, governed = (conduct(Case("nan gradient", c, 0, arm)) for c in ("nothing", "governor"))
    assert alone["final"] is None and governed["final"] is not None
    assert governed["alarms"][0][0] == 6 and governed["actions"]


# ---------------------------------------------------------------- trial


def test_rows_are_kept_and_not_made_again_until_the_recipe_changes(tmp_path):
    case = Case("copy 0", "nothing", 0, TINY)
    assert trial.remembered(tmp_path, case) is None
    row = trial.keep(tmp_path, case)
    assert trial.remembered(tmp_path, case) == row
    assert trial.remembered(tmp_path, replace(case, arm=replace(TINY, rate=1e-3))) is None
    told = []
    assert trial.conduct_all(tmp_path, [case], 1, told.append) == [row] and told == ["copy 0"]
    assert [path.name for path in tmp_path.iterdir()] == ["copy_0_nothing_0.json"]


@pytest.mark.slow
def test_other_processes_make_the_rows_that_this_one_would(tmp_path):
    cases = [Case("copy 0", "nothing", seed, TINY) for seed in range(2)]
    rows = trial.conduct_all(tmp_path, cases, 2, lambda name: None)
    assert {row["parameters"] for row in rows} == {conduct(c)["parameters"] for c in cases}


def test_jobs_must_be_positive(tmp_path):
    with pytest.raises(ConfigError, match="jobs must be 1 or more, got 0"):
        trial.conduct_all(tmp_path, [], 0, lambda name: None)


# ---------------------------------------------------------------- score


def row(
    case="fault", column="nothing", *, final=1.0, losses=(), alarms=(), actions=(), seed=0, **more
):
    return {
        "case": case, "column": column, "seed": seed, "initial": 4.0, "final": final, "losses": list(losses),
        "alarms": list(alarms), "actions": list(actions), "stop": None, "parameters": "same", **more,
    }  # fmt: skip


def test_an_event_has_to_last_and_a_loss_that_is_no_number_is_one():
    calm = row(losses=[1.0] * 40)
    assert score.event(row(losses=[1.0] * 20 + [9.0] + [1.0] * 19), calm) == 21  # the average lasts
    assert score.event(row(losses=[1.0] * 20 + [1.5] + [1.0] * 19), calm) is None
    assert score.event(row(losses=[1.0] * 30 + [None] * 10), calm) == 31
    assert score.event(calm, calm) is None


LOCATED = Family(
    "", replace(TINY, faults=(Fault("scale head", 10, 11),)), "small", ("max_logit",), located=True
)


def test_a_verdict_takes_the_first_right_loud_alarm_after_the_fault():
    alarms = [
        [5, "critical", "max_logit", 0, 0],  # nothing is wrong yet
        [12, "notice", "max_logit", 0, 0],  # nobody hears it
        [13, "warning", "loss", -1, -1],  # something else
        [14, "warning", "max_logit", *LOCATED.culprit(3)],
        [15, "warning", "max_logit", 0, 0],
    ]
    alone, twin = row(final=3.0, losses=[1.0] * 20 + [4.0] * 20), row(final=1.0, losses=[1.0] * 40)
    mine = row(final=1.5, alarms=alarms, actions=[[14, "qk_clip"]], seed=3)
    found = score.judge("fault", LOCATED, mine, alone, twin)
    assert (found.alarm, found.event, found.lead, found.early, found.located) == (
        14,
        21,
        7,
        1,
        True,
    )
    assert found.failed and found.rescue == 0.75 and found.actions == 1
    assert score.judge("fault", LOCATED, {**mine, "seed": 0}, alone, twin).located is False
    assert score.judge("fault", LOCATED, row(), alone, twin).alarm is None


def test_losses_are_capped_at_the_first_and_at_the_twins():
    twin, ruins = row(final=1.0, losses=[1.0]), row(final=None, losses=[None], initial=1e6)
    found = score.judge("fault", LOCATED, row(final=99.0, initial=1e6), ruins, twin)
    assert (found.alone, found.twin, found.final) == (4.0, 1.0, 4.0)


@pytest.mark.parametrize(("hits", "count"), [(0, 310), (1, 310), (7, 40)])
def test_the_bound_is_where_so_few_hits_have_one_chance_in_twenty(hits, count):
    bound = score.upper_bound(hits, count)
    draws = torch.distributions.Binomial(count, torch.tensor(bound, dtype=torch.float64))
    chance = draws.log_prob(torch.arange(hits + 1, dtype=torch.float64)).exp().sum().item()
    assert chance == pytest.approx(0.05, rel=1e-6)
    assert score.upper_bound(count, count) == 1.0


def test_healthy_runs_count_alarms_actions_and_bits():
    rows = [row(f"copy {n}", losses=[1.0] * 100) for n in range(4)]
    rows += [
        row("copy 0", "governor", losses=[1.0] * 100),
        row("copy 1", "governor", losses=[1.0] * 100, alarms=[[3, "notice", "loss", -1, -1]]),
        row("copy 2", "governor", losses=[1.0] * 100, alarms=[[3, "warning", "loss", -1, -1]] * 2),
        row(
            "copy 3",
            "governor",
            losses=[1.0] * 100,
            actions=[[3, "x"]],
            final=1.25,
            parameters="other",
        ),
    ]
    seen = score.on_healthy(score.by_key(rows), "governor")
    assert seen == score.Healthy(4, 2, 5.0, [0.0, 0.0, 0.0, 0.25], 3)
    assert score.on_healthy(score.by_key(rows), "governor", "text") is None


# ---------------------------------------------------------------- sensitivity


def climb(column: str, finals: list, seed: int = 0) -> list[dict]:
    cases = [sensitivity.named(rate) for rate in sensitivity.LADDER]
    return [
        row(case, column, final=final, seed=seed) for case, final in zip(cases, finals, strict=True)
    ]


def test_the_ladder_is_the_reference_run_at_each_rate():
    cases = sensitivity.climbing(["clip"], [0, 1])
    assert len(cases) == len({case.file for case in cases}) == 2 * 2 * 5
    assert {case.arm.rate for case in cases} == set(sensitivity.LADDER)
    assert {replace(case.arm, rate=3e-3) for case in cases} == {TWINS["large"]}
    assert not {case.name for case in cases} & {*FAMILIES, *TWINS}


def test_sensitivity_is_the_mean_above_the_best_and_ruins_count_as_the_beginning():
    rows = score.by_key(climb("clip", [1.0, 0.5, 2.0, 99.0, None]))
    assert sensitivity.ladders(rows, "clip") == [[1.0, 0.5, 2.0, 4.0, 4.0]]
    assert sensitivity.sensitivity([1.0, 0.5, 2.0, 4.0, 4.0]) == pytest.approx(11.5 / 5 - 0.5)


def test_a_ladder_with_a_rate_missing_is_not_scored():
    rows = climb("clip", [1.0] * 5) + climb("clip", [2.0] * 5, seed=1)
    assert sensitivity.ladders(score.by_key(rows[:-1]), "clip") == [[1.0] * 5]
    assert not table.of_rates(score.by_key(rows[:4]), "clip")


def test_the_page_has_a_line_for_each_column_that_climbed():
    rows = rows_of_all() + climb("nothing", [1.0, 2.0, 4.0, 4.0, 4.0])
    rows += climb("governor", [1.0, 1.0, 1.0, 1.0, 1.5])
    rows += climb("governor", [1.0, 1.0, 1.0, 1.0, 2.5], seed=1)
    text = table.page(table.results(score.by_key(rows), ["governor", "clip"]))
    assert "| nothing | 1.00 | 2.00 | 4.00 | 4.00 | 4.00 | 2.00 |" in text
    assert "| governor | 1.00 | 1.00 | 1.00 | 1.00 | 2.00 ± 0.75 | 0.20 ± 0.15 |" in text
    assert "| clip |" not in text


# ---------------------------------------------------------------- run and page


def rows_of_all() -> list[dict]:
    """The governor rescues nine tenths of every failure and disturbs one healthy run."""
    bad, good = [1.0] * 5 + [4.0] * 95, [1.0] * 100
    rows = [row(twin, seed=s, losses=good) for twin in TWINS for s in (0, 1)]
    for name, family in FAMILIES.items():
        for seed in (0, 1):
            alarm = [family.onset + 2, "critical", family.alarms[0], *family.culprit(seed)]
            rows.append(row(name, seed=seed, final=3.0, losses=bad))
            rows.append(row(name, "governor", seed=seed, final=1.2, losses=bad, alarms=[alarm]))
    for name in healthy(0):
        rows += [row(name, losses=good), row(name, "governor", losses=good)]
    rows[-1]["actions"] = [[1, "qk_clip"]]
    return rows


def test_the_page_says_what_the_rows_say():
    found = table.results(score.by_key(rows_of_all()), ["governor"])
    text = table.page(found)
    assert "| recall | at least 0.95 | 1.000 | met |" in text
    assert "| right head named | at least 0.9 | 1.000 | met |" in text
    assert "| rescue ratio, median | at least 0.95 | 0.900 | **missed** |" in text
    assert "| healthy runs disturbed, bound | at most 0.01 | 0.015 | **missed** |" in text
    assert "| soft collapse | learning rate 5e-2 | 2 of 2 | 6 |  |" in text
    assert f"| {list(KINDS)[-1]} | 1 of 15 |" in text


def test_every_table_is_a_table():
    text = table.page(table.results(score.by_key(rows_of_all()), ["governor"]))
    blocks = re.findall(r"(?:^\|.*\|\n)+", text, flags=re.MULTILINE)
    assert len(blocks) == 10
    assert all(len({line.count("|") for line in block.splitlines()}) == 1 for block in blocks)


def test_what_was_not_measured_is_not_a_target_met():
    assert "| recall | at least 0.95 | not measured | open |" in table.page([])


def test_published_rows_come_back_as_the_same_page(tmp_path):
    (tmp_path / "docs").mkdir()
    found = table.results(score.by_key(rows_of_all()), ["governor"])
    text = run.published(tmp_path, found, [{"config": "abc"}])
    assert text == (tmp_path / "docs" / "rescue.md").read_text()
    back, origins = table.read(tmp_path / "results" / "rescue.csv")
    assert len(origins) == 1 and origins[0] in text
    assert [r[:3] for r in map(key, back)] == [r[:3] for r in map(key, found)]
    assert [r.value for r in back] == pytest.approx([r.value for r in found], rel=1e-5)


def key(result: Result) -> tuple[str, str, str]:
    return result.experiment, result.case, result.metric


@pytest.mark.skipif(not (ROOT / "results" / "rescue.csv").exists(), reason="not measured here")
def test_the_committed_page_is_that_of_the_committed_rows():
    rows = table.read(ROOT / "results" / "rescue.csv")
    assert (ROOT / "docs" / "rescue.md").read_text() == table.page(*rows)


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ({"columns": ["govenor"]}, "Did you mean 'governor'"),
        ({"families": ["soft colapse"]}, "Did you mean 'soft collapse'"),
        ({"seeds": "all"}, "tuning"),
        ({"publish": Path()}, "only all families on the reporting seeds"),
    ],
)
def test_wrong_names_are_refused_before_anything_runs(words, error, tmp_path):
    with pytest.raises(ConfigError, match=error):
        run.rescue(**words, runs=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_twin_serves_all_its_families_once():
    cases = run.failing(["governor"], ["glitch", "decay"], [0, 1])
    assert len(cases) == len(set(cases)) == 2 * (1 + 2 * 2)


@pytest.mark.slow
def test_smoke(tmp_path):
    assert "# Rescue" in run.rescue(runs=tmp_path, small=True)
