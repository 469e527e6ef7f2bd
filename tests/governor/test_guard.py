"""What the governor does to an optimizer's step, in every way in which a step can be called."""

from __future__ import annotations

import math

import pytest
import torch
from plain import batches, made, move
from torch.nn.functional import cross_entropy

from sixfold import LeadMetaArchitect
from sixfold.governor.guard import Guard

SCALE = 2.0**10


def loss_of(model, tokens):
    return cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def governed(*, fused=False, learning_rate=1e-2):
    model, _ = made()
    model.drop.p = 0.0
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, fused=fused)
    return model, optimizer, LeadMetaArchitect(model, optimizer, every=1)


def plainly(model, optimizer, governor, tokens):
    return move(model, optimizer, tokens, governor)


def scaled(model, optimizer, governor, tokens, scaler, spoil=lambda model: None):
    loss = loss_of(model, tokens)
    scaler.scale(loss).backward()
    spoil(model)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return governor.process_step(loss)


def closed(model, optimizer, governor, tokens, *, named=True, spoil=lambda model: None):
    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, tokens)
        loss.backward()
        spoil(model)
        return loss

    loss = optimizer.step(closure=closure) if named else optimizer.step(closure)
    return governor.process_step(loss)


def same(ours, theirs):
    return all(
        torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)
    )


@pytest.mark.parametrize("fused", [False, True])
def test_a_loss_scale_is_not_seen(fused):
    plain, scaling = governed(fused=fused), governed(fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    for tokens in batches(3):
        alone, seen = plainly(*plain, tokens), scaled(*scaling, tokens, scaler)
        for name in ("gradient_norm", "gradient_share"):
            wanted = alone.snapshot.scalars[name]
            assert seen.snapshot.scalars[name] == pytest.approx(wanted, rel=1e-5)
        for name in ("gradient_norm", "gradient_mean"):
            for mine, other in zip(
                seen.snapshot.signals[name], alone.snapshot.signals[name], strict=True
            ):
                assert mine == pytest.approx(other, rel=1e-4)


@pytest.mark.parametrize("fused", [False, True])
def test_a_bound_holds_under_a_loss_scale(fused):
    plain, scaling = governed(fused=fused), governed(fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    for run in (plain, scaling):
        run[2].guard.bound = 0.05
    for tokens in batches(3):
        plainly(*plain, tokens)
        scaled(*scaling, tokens, scaler)
    for a, b in zip(plain[0].parameters(), scaling[0].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_overflows_is_the_scalers_to_skip(fused):
    model, optimizer, governor = governed(fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)

    def overflow(model):
        model.head.weight.grad[0, 0] = math.inf

    before = [p.detach().clone() for p in model.parameters()]
    seen = scaled(model, optimizer, governor, batches(1)[0], scaler, overflow)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert scaler.get_scale() == SCALE / 2
    assert "gradient_norm" not in seen.snapshot.scalars
    assert not governor.journal


@pytest.mark.parametrize("named", [True, False])
def test_a_closure_is_seen_with_its_own_gradients(named):
    plain, closing = governed(), governed()
    for tokens in batches(4):
        alone, seen = plainly(*plain, tokens), closed(*closing, tokens, named=named)
        assert seen.snapshot.signals == alone.snapshot.signals
        keys = ("gradient_norm", "update_ratio", "gradient_share")
        assert [seen.snapshot.scalars[key] for key in keys] == [
            alone.snapshot.scalars[key] for key in keys
        ]
    assert same(plain[0], closing[0])


def test_a_closure_whose_gradients_are_not_finite_moves_nothing():
    model, optimizer, governor = governed()
    first, second, third = batches(3)

    def poison(model):
        model.head.weight.grad[0, 0] = math.nan

    closed(model, optimizer, governor, first)
    before = [p.detach().clone() for p in model.parameters()]
    closed(model, optimizer, governor, second, spoil=poison)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    closed(model, optimizer, governor, third)
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    skips = [row["step"] for row in governor.journal if row.get("name") == "gradient_skip"]
    assert skips == [2]


def test_a_shield_holds_inside_a_closure_and_not_outside():
    plain, closing = governed(learning_rate=0.01), governed(learning_rate=0.04)
    closing[2].shields["lr"] = 2
    for tokens in batches(3):
        plainly(*plain, tokens)
        closed(*closing, tokens)
        assert closing[1].param_groups[0]["lr"] == 0.04
    assert same(plain[0], closing[0])


def test_the_first_of_several_calls_of_a_closure_is_looked_at():
    weight, seen, calls = torch.nn.Parameter(torch.ones(2)), [], []

    class Twice(torch.optim.SGD):
        def step(self, closure):
            closure()
            return super().step(closure)

    optimizer = Twice([weight], lr=1.0)
    guard = Guard(optimizer, lambda norm, scale: bool(seen.append(norm)))

    def closure():
        calls.append(None)
        weight.grad = torch.tensor([3.0, 4.0]) * len(calls)

    optimizer.step(closure)
    assert seen[0] == 5.0
    guard.remove()
    optimizer.step(closure)
    assert len(calls) == 4


def test_an_optimizer_of_several_passes_is_refused():
    model, _ = made()
    with pytest.raises(ValueError, match="LBFGS makes several passes in one step"):
        LeadMetaArchitect(model, torch.optim.LBFGS(model.parameters()))
    # what was refused has left nothing behind
    LeadMetaArchitect(model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_sparse_gradients_are_bounded_too():
    embed = torch.nn.Embedding(3, 2, sparse=True)
    before = embed.weight.detach().clone()
    optimizer = torch.optim.SGD(embed.parameters(), lr=1.0)
    guard = Guard(optimizer, lambda norm, scale: False)
    guard.bound = 1.0
    (embed(torch.tensor([1, 1])) * torch.tensor([[3.0, 0.0], [0.0, 4.0]])).sum().backward()
    optimizer.step()
    torch.testing.assert_close(before[1] - embed.weight[1], torch.tensor([0.6, 0.8]))
