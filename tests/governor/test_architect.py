from __future__ import annotations

import copy
import io
import json

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.hooks import RemovableHandle

from sixfold import (
    HexagonalMultiHeadAttention,
    LanguageModel,
    LeadMetaArchitect,
    MultiHeadAttention,
)
from sixfold.contracts import HeadId, Visibility
from sixfold.governor import journal
from sixfold.governor.limits import ActionLimits, AlarmLimits, Limits
from sixfold.governor.protocols import entropy_term, qk_clip
from sixfold.governor.replay import replay
from sixfold.ops.attend import reference

HEXAGONAL = {"num_heads": 7, "head_dim": 8, "projection": "coordinate", "mixer": "hexagonal"}
TIGHT = Limits(
    AlarmLimits(logit_warning=3.0, logit_critical=4.0, entropy_ratio=0.5),
    ActionLimits(clip_to=2.0, cooldown=4, within=8, entropy_steps=20),
)


def model_and_optimizer(learning_rate: float = 1e-3, **attention):
    torch.manual_seed(0)
    model = LanguageModel(11, 16, 28, 2, {**HEXAGONAL, **attention})
    return model, torch.optim.AdamW(model.parameters(), lr=learning_rate)


def train(model, optimizer, governor, steps: int, seed: int = 0) -> list[float]:
    generator, losses = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        tokens = torch.randint(0, 11, (4, 17), generator=generator)
        loss = cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        penalty = None if governor is None else governor.penalty()
        (loss if penalty is None else loss + penalty).backward()
        optimizer.step()
        optimizer.zero_grad()
        if governor is not None:
            governor.process_step(loss)
        losses.append(loss.item())
    return losses


def test_signals_are_those_of_the_explicit_weights():
    model, optimizer = model_and_optimizer()
    governor = LeadMetaArchitect(model, optimizer)
    tokens = torch.randint(0, 11, (3, 16))
    features = []
    for layer in governor.layers:
        layer.module.score.register_forward_hook(
            lambda module, inputs, output: features.append(output)
        )
    loss = cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
    loss.backward()
    gradients = [layer.module.projection.base.weight.grad.clone() for layer in governor.layers]
    weights = [layer.matrices() for layer in governor.layers]
    optimizer.step()
    snapshot = governor.process_step(loss).snapshot
    assert snapshot.loss == loss.item()
    causal = torch.ones(16, 16, dtype=torch.bool).tril()
    for number, (query, key, scale) in enumerate(features):
        scores = (scale * query[0] @ key[0].mT).masked_fill(~causal, -torch.inf)
        assert snapshot.signals["max_logit"][number] == pytest.approx(
            scores.amax((1, 2)).tolist(), rel=1e-5
        )
        p = scores.softmax(-1)[:, 1:]
        entropy = -(p * p.clamp(min=1e-30).log()).sum(-1) / torch.arange(2, 17).log()
        assert snapshot.signals["entropy"][number] == pytest.approx(
            entropy.mean(1).tolist(), rel=1e-5
        )
        norms = gradients[number].view(3, 7, -1).pow(2).sum((0, 2)).sqrt()
        assert snapshot.signals["gradient_norm"][number] == pytest.approx(norms.tolist(), rel=1e-5)
    # spectra are those after the step: close to those before it at this learning rate
    for role in "qkv":
        values = torch.linalg.svdvals(weights[0][role])
        assert snapshot.signals[f"sigma_max_{role}"][0] == pytest.approx(
            values[:, 0].tolist(), rel=2e-2
        )
        condition = (values[:, 0] / values[:, -1]).tolist()
        assert snapshot.signals[f"condition_{role}"][0] == pytest.approx(condition, rel=5e-2)


def test_a_spectral_mixer_tells_what_its_filters_let_pass():
    mixer = {"name": "spectral", "filter": "chebyshev", "modes": 2, "order": 1}
    model, optimizer = model_and_optimizer(mixer=mixer)
    governor = LeadMetaArchitect(model, optimizer)
    loss = cross_entropy(model(torch.randint(0, 11, (3, 16))).mean(1), torch.zeros(3).long())
    loss.backward()
    found = governor.process_step(loss).snapshot.signals["filter_response"]
    for layer, values in zip(governor.layers, found, strict=True):
        # of a wheel of seven: the constant mode, a pair of slow ones, and four that are not kept
        filters = layer.module.mixer
        constant, pair = filters.response(filters.eigenvalues).abs().mean(0).tolist()
        assert values == pytest.approx((constant, pair, pair, 0, 0, 0, 0), rel=1e-6)
    governor.detach()
    plain, optimizer = model_and_optimizer()
    governor = LeadMetaArchitect(plain, optimizer)
    plain(torch.randint(0, 11, (3, 16))).sum().backward()
    assert "filter_response" not in governor.process_step(1.0).snapshot.signals
    governor.detach()


def test_times_and_speed_are_measured():
    model, optimizer = model_and_optimizer()
    governor = LeadMetaArchitect(model, optimizer, every=1)
    train(model, optimizer, governor, 3)
    last = governor.telemetry.history[-1]
    assert set(last.times_us) == {"projection", "attention", "mixing", "gradient", "step"}
    assert all(value > 0 for value in last.times_us.values())
    inside = sum(last.times_us[name] for name in ("projection", "attention", "mixing", "gradient"))
    assert inside < last.times_us["step"]
    assert last.scalars["tokens_per_s"] == pytest.approx(64 / (last.times_us["step"] * 1e-6))
    assert last.scalars["learning_rate"] == 1e-3


def test_only_sampled_steps_are_measured():
    model, optimizer = model_and_optimizer()
    governor = LeadMetaArchitect(model, optimizer, every=5)
    train(model, optimizer, governor, 12)
    assert [s.step for s in governor.telemetry.history] == [1, 6, 11]
    assert ["condition_q" in s.signals for s in governor.telemetry.history] == [True, False, False]
    assert all(layer.module.probe is None for layer in governor.layers)


def test_watching_changes_no_bit():
    bare, moved = model_and_optimizer()
    alone = train(bare, moved, None, 12)
    model, optimizer = model_and_optimizer()
    watched = train(model, optimizer, LeadMetaArchitect(model, optimizer, every=1), 12)
    assert alone == watched
    for a, b in zip(bare.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


def logits_of(model, layer: int, tokens) -> torch.Tensor:
    found = []
    handle = model.blocks[layer].attention.score.register_forward_hook(
        lambda module, inputs, output: found.append(output)
    )
    with torch.no_grad():
        model(tokens)
    handle.remove()
    query, key, scale = found[0]
    return scale * query @ key.mT


@pytest.mark.parametrize("projection", ["linear", "coordinate", "hypernetwork"])
@pytest.mark.parametrize("score", ["dot", "cosine"])
def test_a_clip_scales_one_head_and_its_undo_restores_every_bit(projection, score):
    model, optimizer = model_and_optimizer(projection=projection, score=score)
    governor = LeadMetaArchitect(model, optimizer)
    tokens = torch.randint(0, 11, (2, 16))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = logits_of(model, 0, tokens)
    change = qk_clip.build(HeadId(0, 3), value=300.0, clip_to=50.0, within=20)
    change.apply(governor)
    clipped = logits_of(model, 0, tokens)
    torch.testing.assert_close(clipped[:, 3], plain[:, 3] / 8)
    others = [0, 1, 2, 4, 5, 6]
    assert torch.equal(clipped[:, others], plain[:, others])
    change.undo(governor)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_penalty_is_the_entropy_term_and_moves_the_entropy():
    model, optimizer = model_and_optimizer()
    governor = LeadMetaArchitect(model, optimizer, every=1)
    tokens = torch.randint(0, 11, (4, 16))
    model(tokens)
    low = governor.process_step(1.0).snapshot.signal("entropy", HeadId(1, 2))
    change = entropy_term.build(HeadId(1, 2), floor=1.0, coefficient=3.0, lasts=50, within=20)
    change.apply(governor)
    governor.process_step(1.0)
    model(tokens)
    penalty = governor.penalty()
    assert penalty.item() == pytest.approx(3.0 * (1.0 - low), rel=1e-5)
    assert governor.penalty() is None
    for _ in range(30):
        governor.process_step(1.0)
        model(tokens)
        optimizer.zero_grad()
        governor.penalty().backward()
        optimizer.step()
    assert governor.process_step(1.0).snapshot.signal("entropy", HeadId(1, 2)) > low + 0.5 * (
        1 - low
    )
    change.undo(governor)
    governor.process_step(1.0)
    model(tokens)
    assert governor.penalty() is None


def test_a_term_that_is_not_added_to_the_loss_is_a_warning():
    model, optimizer = model_and_optimizer()
    governor = LeadMetaArchitect(model, optimizer)
    entropy_term.build(HeadId(0, 1), 0.9, 1.0, 50, 20).apply(governor)
    governor.process_step(1.0)
    model(torch.randint(0, 11, (1, 8)))
    with pytest.warns(UserWarning, match="penalty.. was not added to the loss"):
        governor.process_step(1.0)


def test_statistics_stay_in_float32_under_autocast():
    model, optimizer = model_and_optimizer()
    governor = LeadMetaArchitect(model, optimizer, every=1)
    tokens = torch.randint(0, 11, (2, 16))
    with torch.autocast("cpu", torch.bfloat16):
        model(tokens)
    values = governor.process_step(1.0).snapshot.signals["max_logit"][0]
    assert any(value != torch.tensor(value, dtype=torch.bfloat16).item() for value in values)


def test_observe_tells_and_touches_nothing():
    bare, moved = model_and_optimizer(0.05)
    alone = train(bare, moved, None, 20)
    model, optimizer = model_and_optimizer(0.05)
    governor = LeadMetaArchitect(model, optimizer, limits=TIGHT, mode="observe", every=2)
    assert train(model, optimizer, governor, 20) == alone
    changes = [row for row in governor.journal if row["kind"] == "change"]
    assert changes
    assert not any(row["applied"] for row in changes)
    assert "would make qk_clip" in changes[0]["text"]


def test_detach_leaves_nothing_behind():
    model, optimizer = model_and_optimizer()
    governor = LeadMetaArchitect(model, optimizer)
    governor.detach()
    assert all(layer.module.probe is None for layer in governor.layers)
    assert not model._forward_hooks
    assert not optimizer._optimizer_step_pre_hooks


def test_the_report_tells_what_was_done():
    model, optimizer = model_and_optimizer(0.05)
    governor = LeadMetaArchitect(model, optimizer, limits=TIGHT, every=2)
    assert "nothing measured yet" in governor.generate_report()
    train(model, optimizer, governor, 30)
    changes = sum(row["kind"] == "change" for row in governor.journal)
    assert changes
    report = governor.generate_report()
    assert f"changes    {changes}" in report
    assert "hexagonal grid of radius 1" in report
    assert governor.journal[-1]["text"] in report


def governed_logs(tmp_path):
    model, optimizer = model_and_optimizer(0.05)
    governor = LeadMetaArchitect(model, optimizer, limits=TIGHT, every=2, folder=tmp_path)
    train(model, optimizer, governor, 40)
    return [
        [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        for name in (journal.TELEMETRY, journal.JOURNAL)
    ]


def test_a_recorded_run_is_decided_alike_without_its_model(tmp_path):
    telemetry, recorded = governed_logs(tmp_path)
    again = replay(telemetry, recorded)
    assert again.differs is None
    assert list(again.rows) == recorded[1:]
    assert any(row["kind"] == "change" for row in again.rows)


def test_replay_with_other_limits_stops_where_it_would_have_acted_otherwise(tmp_path):
    telemetry, recorded = governed_logs(tmp_path)
    first = next(row["step"] for row in recorded[1:] if row["kind"] == "change")
    again = replay(telemetry, recorded, Limits(AlarmLimits(logit_critical=1e6)))
    assert again.differs == first
    assert not any(row["kind"] == "change" for row in again.rows)


def test_the_first_call_needs_neither_optimizer_nor_loss():
    layer = HexagonalMultiHeadAttention(d_model=32, grid_radius=2, d_head=8)
    governor = LeadMetaArchitect(layer)
    layer(torch.randn(4, 12, 32))
    seen = governor.process_step()
    assert len(seen.snapshot.signals["max_logit"][0]) == 19
    assert "gradient_norm" not in seen.snapshot.signals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "atc"}, "unknown governor.mode 'atc'; choose from: act, observe"),
        ({"every": 0}, "governor.every must be a whole number of 1 or more, got 0"),
        ({"every": 2.5}, "governor.every must be a whole number of 1 or more, got 2.5"),
        ({"limits": "sed"}, "Did you mean 'seed'"),
        ({"limits": None}, "limits must be a preset's name or Limits, got None"),
        ({"limits": {}}, "limits must be a preset's name or Limits, got {}"),
        ({"optimizer": "adam"}, "optimizer must be a torch.optim.Optimizer or None, got 'adam'"),
        ({"optimizer": []}, r"optimizer must be a torch.optim.Optimizer or None, got \[\]"),
        ({"model": None}, "model must be a torch.nn.Module, got None"),
        ({"model": (p for p in ())}, "model must be a torch.nn.Module, got <generator"),
        ({"model": torch.nn.Identity()}, "model must have parameters: this Identity has none"),
    ],
)
def test_what_cannot_be_meant_is_refused(options, message):
    model, optimizer = model_and_optimizer()
    with pytest.raises(ValueError, match=message):
        LeadMetaArchitect(**{"model": model, "optimizer": optimizer, **options})


@pytest.mark.parametrize("loss", [torch.ones(3), torch.ones(1) * 1j, "abc", [1.0], np.ones(2)])
def test_a_loss_that_is_none_is_refused_and_the_governor_stays(loss):
    model, optimizer = model_and_optimizer()
    governor = LeadMetaArchitect(model, optimizer, every=1)
    train(model, optimizer, governor, 1)
    with pytest.raises(ValueError, match="loss must be a number, a tensor of one element, or None"):
        governor.process_step(loss)
    train(model, optimizer, governor, 1)
    assert governor.now == 2 and governor.telemetry.history[-1].signals


@pytest.mark.parametrize("loss", [2, 2.0, torch.tensor(2.0), torch.full((1, 1), 2), np.float32(2)])
def test_a_loss_is_any_one_number(loss):
    governor = LeadMetaArchitect(model_and_optimizer()[0])
    assert governor.process_step(loss).snapshot.loss == 2


def in_file(model):
    """What comes back from a file, as a fresh process would number what it hooks."""
    file = io.BytesIO()
    torch.save(model, file)
    RemovableHandle.next_id = 0
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


def wrapped(model):
    return torch.compile(model, backend="eager")


def in_place(model):
    model.compile(backend="eager")
    return model


@pytest.mark.parametrize("copied", [in_file, copy.deepcopy])
@pytest.mark.parametrize("compiled", [lambda model: model, wrapped, in_place])
@pytest.mark.parametrize("steps", [0, 1, 2])
def test_what_is_copied_or_saved_is_not_watched(copied, compiled, steps, tmp_path, monkeypatch):
    monkeypatch.setattr(RemovableHandle, "next_id", 0)
    model, optimizer = model_and_optimizer()
    model, tokens = compiled(model), torch.zeros(1, 5, dtype=torch.long)
    governor = LeadMetaArchitect(model, optimizer, every=2, folder=tmp_path)
    train(model, optimizer, governor, steps)
    assert governor.meter.sampling == (steps != 1)
    other = copied(copied(model))
    assert torch.equal(other(tokens), model.eval()(tokens))
    assert not governor.meter.probes
    model.train()
    # hooks of others have no number of those that came along
    plain, module = [], next(m for m in other.modules() if isinstance(m, MultiHeadAttention))
    for _ in range(40):
        module.register_forward_pre_hook(lambda module, inputs: plain.append(inputs))
    second = torch.optim.AdamW(other.parameters())
    anew = LeadMetaArchitect(other, second, every=1)
    train(other, second, anew, 2)
    assert len(plain) == 80 and len(anew.telemetry.history[-1].signals["max_logit"]) == 2
    train(model, optimizer, governor, 3)
    assert governor.now == steps + 3 and governor.telemetry.history[-1].signals
    for one in (governor, anew):
        one.detach()


def test_a_model_without_attention_is_told_of_once_and_its_loss_is_watched():
    model = torch.nn.Linear(2, 2)
    governor = LeadMetaArchitect(model, torch.optim.SGD(model.parameters()), every=1)
    model(torch.zeros(1, 2)).sum().backward()
    with pytest.warns(UserWarning, match="no attention was seen in a forward pass of Linear"):
        seen = governor.process_step(1.0)
    assert seen.snapshot.loss == 1.0
    model(torch.zeros(1, 2)).sum().backward()
    assert governor.process_step(1.0).snapshot.signals == {}


def test_an_optimizer_of_another_model_is_refused():
    model, _ = model_and_optimizer()
    _, optimizer = model_and_optimizer()
    with pytest.raises(ValueError, match="this AdamW moves no parameter of this LanguageModel"):
        LeadMetaArchitect(model, optimizer)
    LeadMetaArchitect(model).detach()


def test_a_model_has_one_governor():
    model, optimizer = model_and_optimizer()
    first = LeadMetaArchitect(model, optimizer)
    with pytest.raises(ValueError, match="has a governor already: detach"):
        LeadMetaArchitect(model, optimizer)
    first.detach()
    LeadMetaArchitect(model, optimizer)


def test_a_part_of_a_governed_model_has_no_governor_of_its_own():
    model, optimizer = model_and_optimizer()
    part = model.blocks[0]
    inner = torch.optim.SGD(part.parameters(), lr=0.1)
    first = LeadMetaArchitect(model, optimizer)
    with pytest.raises(ValueError, match="this Block shares layers with a LanguageModel"):
        LeadMetaArchitect(part, inner)
    with pytest.raises(ValueError, match="shares layers.*govern the whole alone"):
        LeadMetaArchitect(torch.nn.Sequential(part, torch.nn.Linear(2, 2)))
    first.detach()
    second = LeadMetaArchitect(part, inner)
    with pytest.raises(ValueError, match="this LanguageModel shares layers with a Block"):
        LeadMetaArchitect(model, optimizer)
    second.detach()
    LeadMetaArchitect(model, optimizer)


def test_an_optimizer_has_one_governor():
    one, other = model_and_optimizer()[0], model_and_optimizer()[0]
    optimizer = torch.optim.SGD([*one.parameters(), *other.parameters()], lr=0.1)
    first = LeadMetaArchitect(one, optimizer)
    with pytest.raises(ValueError, match="this SGD has a governor already, that of another model"):
        LeadMetaArchitect(other, optimizer)
    LeadMetaArchitect(other)
    first.detach()


def test_grouped_heads_are_watched_too():
    torch.manual_seed(0)
    model = LanguageModel(11, 16, 32, 1, {"num_heads": 4, "num_kv_heads": 2})
    optimizer = torch.optim.AdamW(model.parameters())
    governor = LeadMetaArchitect(model, optimizer)
    train(model, optimizer, governor, 1)
    for signal, layers in governor.telemetry.history[0].signals.items():
        assert [len(layer) for layer in layers] == [4], signal


def test_masked_reference_weights_agree_with_the_probe_on_padding():
    layer = HexagonalMultiHeadAttention(d_model=16, grid_radius=1, d_head=4)
    governor = LeadMetaArchitect(layer)
    x, keys = torch.randn(1, 6, 16), torch.tensor([[True] * 4 + [False] * 2])
    seen = []
    layer.score.register_forward_hook(lambda module, inputs, output: seen.append(output))
    layer(x, key_mask=keys)
    entropy = governor.process_step().snapshot.signals["entropy"][0]
    scores = reference.logits(seen[0], Visibility(keys[:, None, None, :], is_causal=False))
    p = scores.softmax(-1)[0, :, :, :4]
    expected = -(p * p.log()).sum(-1).mean(-1) / torch.tensor(4.0).log()
    assert entropy == pytest.approx(expected.tolist(), rel=1e-5)


def test_what_stops_learning_after_the_governor_came_is_told_of_once():
    model, optimizer = model_and_optimizer()
    model.blocks[0].requires_grad_(False)  # by plan, before: nobody is told
    governor = LeadMetaArchitect(model, optimizer, every=2)
    train(model, optimizer, governor, 4)
    assert not [row for row in governor.journal if row["kind"] == "alarm"]
    model.blocks[1].requires_grad_(False)
    train(model, optimizer, governor, 6)
    told = [row for row in governor.journal if row["kind"] == "alarm"]
    assert [(row["signal"], row["level"]) for row in told] == [("frozen", "warning")]
    first, second = (sum(p.numel() for p in block.parameters()) for block in model.blocks)
    total = sum(p.numel() for p in model.parameters()) - first
    assert told[0]["value"] == pytest.approx(second / total)


def test_a_model_in_eval_mode_is_told_of():
    model, optimizer = model_and_optimizer()
    governor = LeadMetaArchitect(model.eval(), optimizer, every=1)
    with pytest.warns(UserWarning, match=r"eval mode.*model.train\(\).*only loss and gradients"):
        train(model, optimizer, governor, 3)
