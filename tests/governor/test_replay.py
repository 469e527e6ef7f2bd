"""A run that was altered on the way is decided again as it was, from its logs alone."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from plain import batches, made, move

from sixfold import LeadMetaArchitect
from sixfold.governor import journal
from sixfold.governor.limits import ActionLimits, AlarmLimits, Limits
from sixfold.governor.replay import replay

LIMITS = Limits(
    AlarmLimits(
        logit_warning=0.2, logit_critical=0.3, loss_ratio=1.5, loss_patience=4, finite=True
    ),
    ActionLimits(clip_to=0.2, cooldown=4, within=8, entropy_steps=20, snapshot_every=5),
)


def logs(folder):
    return [
        [json.loads(line) for line in (folder / name).read_text().splitlines()]
        for name in (journal.TELEMETRY, journal.JOURNAL)
    ]


def agree(folder):
    """The journal of a run, which its replay has written too."""
    telemetry, recorded = logs(folder)
    again = replay(telemetry, recorded)
    assert again.differs is None
    assert list(again.rows) == recorded[1:]
    return recorded[1:]


def attach(model, optimizer, folder, limits=LIMITS):
    return LeadMetaArchitect(model, optimizer, limits=limits, every=2, folder=folder)


def train(model, optimizer, governor, given, bad=()):
    for place, tokens in given:

        def ruin(model, optimizer, place=place):
            with torch.no_grad():
                model.head.weight.mul_(200 if place in bad else 1)

        move(model, optimizer, tokens, governor, ruin)


def kinds(rows):
    return [row["kind"] for row in rows if row["kind"] in journal.GIVEN]


def test_mute_late_data_and_layers_that_are_frozen_on_the_way(tmp_path):
    model, optimizer = made()
    governor, given = attach(model, optimizer, tmp_path), list(enumerate(batches(40)))
    train(model, optimizer, governor, given[:6])
    train(model, optimizer, governor, governor.data(given[6:12]))
    model.attention[0].requires_grad_(requires_grad=False)
    train(model, optimizer, governor, governor.data(given[12:20]))
    governor.mute("max_logit")
    train(model, optimizer, governor, governor.data(given[20:]), bad={27})
    rows = agree(tmp_path)
    assert kinds(rows) == ["limits"] * 3
    texts = [row["text"] for row in rows if row["kind"] == "limits"]
    assert "rewinding True" in texts[0]
    assert "untouched 0" in texts[1]
    assert "muted max_logit" in texts[2]
    assert "rollback" in [row.get("name") for row in rows]
    assert "qk_clip" in [row.get("name") for row in rows]


@pytest.mark.parametrize("where", ["here", "elsewhere"])
def test_a_run_that_was_resumed_and_rolled_back(tmp_path, where):
    model, optimizer = made()
    limits = replace(LIMITS, alarms=replace(LIMITS.alarms, logit_critical=3.0))
    governor, given = (
        attach(model, optimizer, tmp_path / "here", limits),
        list(enumerate(batches(80))),
    )
    train(model, optimizer, governor, governor.data(given[:30]), bad={12})
    governor.mute("entropy")
    train(model, optimizer, governor, [(30, given[30][1])])
    state = json.loads(json.dumps(governor.state_dict()))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, governor, given[31:36])  # what is forgotten
    governor.detach()

    model, optimizer = made()
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    governor = attach(model, optimizer, tmp_path / where, limits)
    if where == "elsewhere":
        state["positions"] = {}
    governor.load_state_dict(state)
    train(model, optimizer, governor, governor.data(given[31:]), bad={50})
    rows = agree(tmp_path / where)
    if where == "here":  # the new governor has limits of its own: it is not muted
        assert kinds(rows) == ["limits", "resumed", "limits"]
        assert "muted none" in [row["text"] for row in rows if row["kind"] == "limits"][-1]
    else:
        assert kinds(rows) == ["resumed"]
    names = [row.get("name") for row in rows]
    assert names.count("rollback") == (2 if where == "here" else 1)
    resumed = next(row for row in rows if row["kind"] == "resumed")
    assert resumed["step"] == state["now"]
    assert ("state" in resumed) == (where == "elsewhere")


def test_commands_and_what_the_model_refuses(tmp_path, monkeypatch):
    model, optimizer = made()
    governor, given = attach(model, optimizer, tmp_path), list(enumerate(batches(40)))
    train(model, optimizer, governor, given[:5])
    governor.command_adjust_entropy_regularization(0.1, (1, 2))
    with monkeypatch.context() as broken:
        broken.setattr(
            "sixfold.governor.protocols.qk_clip.QKClip.apply", lambda *_: {}["does not fit"]
        )
        with pytest.warns(UserWarning, match="could not be made: 'does not fit'"):
            train(model, optimizer, governor, given[5:9])
    train(model, optimizer, governor, given[9:])
    rows = agree(tmp_path)
    assert "refused" in kinds(rows)
    assert sum(bool(row.get("by_hand")) for row in rows) == 1


def test_other_limits_keep_what_could_be_done_at_all(tmp_path):
    model, optimizer = made()
    governor, given = attach(model, optimizer, tmp_path), list(enumerate(batches(24)))
    train(model, optimizer, governor, given[:11])
    model.attention[0].requires_grad_(requires_grad=False)
    train(model, optimizer, governor, given[11:])
    telemetry, recorded = logs(tmp_path)
    assert replay(telemetry, recorded, LIMITS).differs is None
    silent = Limits(AlarmLimits(logit_critical=1e6))
    first = next(row["step"] for row in recorded[1:] if row["kind"] == "change")
    assert replay(telemetry, recorded, silent).differs == first


def test_a_command_that_cannot_be_carried_out_leaves_no_trace():
    model, optimizer = made(heads=1)
    governor = LeadMetaArchitect(model, optimizer, every=1)
    move(model, optimizer, batches(1)[0], governor)
    before = governor.state
    with pytest.raises(ValueError, match="needs more than one head"):
        governor.command_reset_head((0, 0), "neighbours")
    assert governor.state == before
    assert not governor.journal
