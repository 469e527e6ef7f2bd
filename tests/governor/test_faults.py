"""What goes wrong around a governor: training goes on, loudly, and nothing is lost in silence."""

from __future__ import annotations

import errno
import gc
import importlib
import json
import math
import os
import time
import warnings
import weakref
from pathlib import Path

import pytest
import torch
from plain import Model, batches, made, move
from snapshots import snapshot
from torch import multiprocessing

from sixfold import LeadMetaArchitect
from sixfold.contracts import HeadId
from sixfold.governor import journal
from sixfold.governor.limits import AlarmLimits, Limits
from sixfold.governor.replay import replay
from sixfold.governor.watch.ranks import packed, unpacked
from sixfold.governor.watch.watch import EAGER, Watch


def train(model, optimizer, governor, steps=6):
    return [move(model, optimizer, tokens, governor) for tokens in batches(steps)]


def test_a_full_disk_is_told_of_once_and_training_goes_on(tmp_path, monkeypatch):
    model, optimizer = made()
    governor = LeadMetaArchitect(model, optimizer, every=1, folder=tmp_path)
    train(model, optimizer, governor, 2)

    def full(self, row):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))

    monkeypatch.setattr("sixfold.record.Log.append", full)
    with pytest.warns(UserWarning, match="No space left on device.*goes on without its logs"):
        train(model, optimizer, governor, 1)
    seen = train(model, optimizer, governor, 3)
    assert all(step.snapshot.signals for step in seen)


def test_an_exception_inside_lets_go_and_tells_where(monkeypatch):
    model, optimizer = made()
    governor = LeadMetaArchitect(model, optimizer, every=1)

    def broken(*_):
        raise KeyError("a bug")

    monkeypatch.setattr("sixfold.governor.architect.step", broken)
    with pytest.warns(UserWarning, match=r"failed at step 1 and let go: KeyError\('a bug'\)"):
        train(model, optimizer, governor, 1)
    seen = train(model, optimizer, governor, 3)
    assert all(step.snapshot is None for step in seen)
    assert not model._forward_hooks
    assert not optimizer._optimizer_step_pre_hooks


def test_an_exception_while_looking_does_not_end_the_pass(monkeypatch):
    model, optimizer = made()
    governor = LeadMetaArchitect(model, optimizer, every=1)

    def broken(*_):
        raise RuntimeError("cannot look")

    monkeypatch.setattr("sixfold.governor.watch.probe.sampled", broken)
    with pytest.warns(UserWarning, match="cannot look.*training goes on without it"):
        train(model, optimizer, governor, 1)


def test_an_exception_before_the_optimizer_moves_does_not_stop_it(monkeypatch):
    model, optimizer = made()
    governor = LeadMetaArchitect(model, optimizer, every=1)

    def broken(*_):
        raise RuntimeError("no gradient")

    monkeypatch.setattr("sixfold.governor.watch.collect.gradients", broken)
    before = model.head.weight.detach().clone()
    with pytest.warns(UserWarning, match="no gradient.*training goes on without it"):
        train(model, optimizer, governor, 1)
    assert not torch.equal(before, model.head.weight)


def test_a_clock_that_is_set_back_gives_no_negative_time(monkeypatch):
    model, optimizer = made()
    governor = LeadMetaArchitect(model, optimizer, every=1)
    ticks = iter(range(10**6, 0, -1))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))
    seen = train(model, optimizer, governor, 3)[1:]
    assert all(value >= 0 for step in seen for value in step.snapshot.times_us.values())
    assert all("tokens_per_s" not in step.snapshot.scalars for step in seen)


def test_telemetry_that_was_cut_off_is_decided_on_as_far_as_it_goes(tmp_path):
    model, optimizer = made()
    governor = LeadMetaArchitect(model, optimizer, every=2, folder=tmp_path)
    train(model, optimizer, governor, 9)
    governor.detach()
    telemetry, recorded = (
        (tmp_path / name).read_text().splitlines() for name in (journal.TELEMETRY, journal.JOURNAL)
    )
    whole = [json.loads(line) for line in telemetry]
    again = replay(whole[:6], [json.loads(line) for line in recorded])
    assert again.differs is None
    assert again.snapshots == 3


def test_several_parameter_groups():
    model, _ = made()
    optimizer = torch.optim.AdamW(
        [
            {"params": model.attention.parameters(), "lr": 1e-2, "weight_decay": 0.0},
            {"params": [*model.embed.parameters(), *model.head.parameters()], "lr": 1e-3},
        ]
    )
    governor = LeadMetaArchitect(model, optimizer, every=1)
    governor.shields["lr"] = 1
    seen = train(model, optimizer, governor)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 1e-3]
    assert seen[-1].snapshot.scalars["gradient_norm"] > 0


def test_frozen_layers_are_watched_and_let_be():
    model, optimizer = made()
    model.attention[0].requires_grad_(requires_grad=False)
    governor = LeadMetaArchitect(model, optimizer, limits=Limits(AlarmLimits(logit_critical=1e-9)))
    seen = train(model, optimizer, governor)
    assert "frozen" in governor.layers[0].refusal
    assert len(seen[0].snapshot.signals["max_logit"][0]) == 4
    assert seen[0].snapshot.signals["gradient_norm"][0] == ()
    assert not any(row.get("name") == "qk_clip" and row["layer"] == 0 for row in governor.journal)
    with pytest.raises(ValueError, match="layer 0 is only watched: .*frozen"):
        governor.command_reset_head((0, 1))


def test_tied_layers_are_watched_and_let_be():
    model, _ = made()
    model.attention[1].qkv.weight = model.attention[0].qkv.weight
    optimizer = torch.optim.AdamW(model.parameters())
    governor = LeadMetaArchitect(model, optimizer)
    train(model, optimizer, governor)
    assert "tied" in governor.layers[0].refusal


def test_two_processes_decide_alike_and_join_what_only_one_has_seen(tmp_path):
    multiprocessing.spawn(worker, args=(str(tmp_path),), nprocs=2)
    ours, theirs = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert ours["journal"] == theirs["journal"]
    assert ours["weights"] == theirs["weights"]
    names = [row["name"] for row in ours["journal"] if row["kind"] == "change"]
    assert "gradient_skip" in names  # a NaN that only the second process saw
    assert "qk_clip" in names


def worker(rank: int, folder: str) -> None:
    """One of two processes, each with batches of its own."""
    warnings.simplefilter("ignore")
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    torch.manual_seed(0)
    plain = Model()
    plain.drop.p = 0.0
    model = torch.nn.parallel.DistributedDataParallel(plain)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    limits = Limits(AlarmLimits(logit_critical=0.5, finite=True))
    governor = LeadMetaArchitect(model, optimizer, limits=limits, every=2)
    for place, tokens in enumerate(batches(10, seed=rank)):
        loss = torch.nn.functional.cross_entropy(
            model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()
        )
        if place == 5 and rank == 1:
            loss = loss * float("nan")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        governor.process_step(loss)
    found = {
        "journal": list(governor.journal),
        "weights": [p.detach().double().sum().item() for p in model.parameters()],
    }
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_processes_share_the_mean_loss_and_the_worst_of_everything_else():
    mine = snapshot(1, [5.0, 9.0], [0.5, 0.8], loss=1.0, scalars={"gradient_norm": 3.0})
    other = snapshot(1, [7.0, 2.0], [0.6, 0.1], loss=4.0, scalars={"gradient_norm": math.nan})
    joined = unpacked(mine, [packed(mine).tolist(), packed(other).tolist()])
    assert joined.loss == 2.5
    assert joined.signals == {"max_logit": ((7.0, 9.0),), "entropy": ((0.5, 0.1),)}
    assert math.isnan(joined.scalars["gradient_norm"])


def test_detach_mute_and_observe_work_at_any_step():
    limits = Limits(AlarmLimits(logit_critical=1e-9))
    model, optimizer = made()
    governor = LeadMetaArchitect(model, optimizer, limits=limits, every=1, mode="observe")
    bare, moved = made()
    given = batches(8)
    for place, tokens in enumerate(given):
        if place == 3:
            governor.mute("max_logit")
        if place == 6:
            governor.detach()
        move(model, optimizer, tokens, governor)
        move(bare, moved, tokens)
    # both use the one generator in turn, so only a model without dropout can be compared
    assert governor.state.pending == ()
    assert [row["kind"] for row in governor.journal].count("change") > 0


def test_an_adapter_is_watched_and_let_be():
    peft = pytest.importorskip("peft")
    model, _ = made()
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["qkv"], r=2))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad])
    governor = LeadMetaArchitect(adapted, optimizer, every=1)
    seen = train(adapted, optimizer, governor)
    assert len(seen[0].snapshot.signals["max_logit"]) == 2
    assert "Lora" in governor.layers[0].refusal or "lora" in governor.layers[0].refusal
    assert seen[-1].snapshot.signal("max_logit", HeadId(0, 0)) is not None


def test_a_resumed_governor_goes_on_in_its_logs_and_a_fresh_one_says_what_it_overwrites(tmp_path):
    model, optimizer = made()
    governor = LeadMetaArchitect(model, optimizer, every=2, folder=tmp_path)
    train(model, optimizer, governor, 4)
    state = json.loads(json.dumps(governor.state_dict()))
    train(model, optimizer, governor, 2)
    governor.detach()
    again = LeadMetaArchitect(model, optimizer, every=2, folder=tmp_path)
    again.load_state_dict(state)
    train(model, optimizer, again, 2)
    again.detach()
    lines = (tmp_path / journal.TELEMETRY).read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines[1:]] == [1, 2, 3, 4, 5, 6]
    fresh = LeadMetaArchitect(model, optimizer, every=2, folder=tmp_path)
    with pytest.warns(UserWarning, match="of an earlier run is written anew"):
        train(model, optimizer, fresh, 1)


def test_sequences_of_one_token_are_no_collapse():
    model, optimizer = made()
    governor = LeadMetaArchitect(model, optimizer, every=1)
    for tokens in batches(4):
        move(model, optimizer, tokens[:, :2], governor)
    assert not governor.journal
    assert all("rank_distance" not in s.signals for s in governor.telemetry.history)


def test_two_governors_give_the_compiler_back_in_any_order():
    importlib.import_module("torch._dynamo")  # whatever is compiled has imported it

    governors = [LeadMetaArchitect(*pair) for pair in (made(), made())]
    assert EAGER.holders == 2
    for governor in governors:
        governor.detach()
    assert EAGER.holders == 0


def test_a_governor_that_nobody_holds_lets_go_of_the_model_at_once():
    importlib.import_module("torch._dynamo")
    model, _ = made()
    before = EAGER.holders
    governor = LeadMetaArchitect(model)
    assert EAGER.holders == before + 1
    assert model._forward_hooks
    del governor
    assert EAGER.holders == before
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_a_watch_that_is_armed_can_be_collected_with_its_model():
    importlib.import_module("torch._dynamo")
    before, watch = EAGER.holders, Watch(made()[0])
    watch.arm(lambda _: None)
    known = weakref.ref(watch)
    del watch
    gc.collect()
    assert known() is None
    assert EAGER.holders == before


def test_layers_that_begin_to_learn_are_no_jump():
    model, optimizer = made(1e-3)
    for attention in model.attention:
        attention.requires_grad_(requires_grad=False)
    governor = LeadMetaArchitect(model, optimizer, every=2)
    for place, tokens in enumerate(batches(12)):
        if place == 6:
            model.requires_grad_(requires_grad=True)
        move(model, optimizer, tokens, governor)
    assert not [row for row in governor.journal if row.get("signal") == "weight_norm"]
