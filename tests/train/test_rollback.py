"""The loop goes back with its governor: batches, learning rates, logs and checkpoints go with it."""

from __future__ import annotations

import math
import os
import signal

import pytest
import torch

from sixfold.contracts import Batch
from sixfold.errors import Diverged, Interrupted
from sixfold.governor.architect import LeadMetaArchitect
from sixfold.train import checkpoint
from sixfold.train.loop import View, fit

from .test_loop import losses, reopened, rows, same, weights


class Spoiled:
    """A dataset some of whose batches ruin whoever trains on them."""

    def __init__(self, dataset, positions, *, ruin) -> None:
        self.dataset, self.positions, self.ruin = dataset, positions, ruin

    def __getattr__(self, name):
        return getattr(self.dataset, name)

    def train_batch(self, seed: int, step: int, size: int) -> Batch:
        if step in self.positions:
            self.ruin()
        return self.dataset.train_batch(seed, step, size)


def ruined(training, folder, **options):
    """A governed run whose weights a batch multiplies by a hundred."""
    run = training(
        governed=True, folder=folder, steps=48, dropout=0.1, validate_every=48, **options
    )

    def ruin() -> None:
        with torch.no_grad():
            for p in run.model.parameters():
                p *= 100

    run.dataset = Spoiled(run.dataset, (33,), ruin=ruin)
    return run


def test_a_run_that_went_back_is_one_that_never_saw_the_bad_batches(training, tmp_path):
    run = ruined(training, tmp_path / "ruined")
    said = []
    run.view = View(say=said.append)
    outcome = fit(run)
    journal = rows(tmp_path / "ruined" / "journal.jsonl")
    back = [row for row in journal if row.get("name") == "rollback"]
    assert len(back) == 1, said
    change = back[0]["arguments"]
    to, since, at = change["to"], change["since"], back[0]["step"]
    assert to < since <= 34 <= at
    # batches before `since` come again, those from there to the return never do
    assert outcome.step == 48 + (since - 1 - to)
    clean = training(folder=tmp_path / "clean", steps=48, dropout=0.1, validate_every=48)
    clean.positions = lambda: [p for p in range(48) if not since - 1 <= p < at]
    fit(clean)
    assert same(weights(run), weights(clean))
    after = losses(tmp_path / "ruined")[at:]
    assert after == losses(tmp_path / "clean")[to:]
    steps = [row["step"] for row in rows(tmp_path / "ruined" / "metrics.jsonl")]
    assert steps == sorted(steps)


def test_stopped_while_batches_come_again_and_resumed(training, tmp_path):
    whole = ruined(training, tmp_path / "whole")
    fit(whole)
    at = next(
        row["step"]
        for row in rows(tmp_path / "whole" / "journal.jsonl")
        if row.get("name") == "rollback"
    )
    broken = ruined(training, tmp_path / "broken")
    broken.view = View(
        step=lambda now: os.kill(os.getpid(), signal.SIGINT) if now.step == at + 3 else None
    )
    with pytest.raises(Interrupted):
        fit(broken)
    saved = checkpoint.latest(tmp_path / "broken" / "checkpoints")
    assert saved.step == at + 3
    assert saved.state["observer"]["again"]
    broken.observer.detach()
    options = {"governed": True, "dropout": 0.1, "steps": 48, "validate_every": 48}
    again = reopened(training, tmp_path / "broken", saved, options)
    assert fit(again, saved).step == whole.step
    assert same(weights(whole), weights(again))
    assert losses(tmp_path / "whole") == losses(tmp_path / "broken")


def test_a_loss_that_is_not_a_number_does_not_end_a_governed_run(training, tmp_path):
    run = training(governed=True, folder=tmp_path)

    def poison() -> None:
        with torch.no_grad():
            run.model.embedding.weight[0, 0] = math.nan

    run.dataset = Spoiled(run.dataset, (6,), ruin=poison)
    fit(run)
    found = losses(tmp_path)
    back = [r for r in rows(tmp_path / "journal.jsonl") if r.get("name") == "rollback"]
    assert len(back) == 1
    # the weights are gone, and some steps are skipped before that is known; the batch that did it
    # does not come again
    assert [n for n, loss in enumerate(found) if math.isnan(loss)] == list(
        range(6, back[0]["step"])
    )


def test_a_governor_that_only_observes_lets_the_loop_end_what_is_broken(training, tmp_path):
    run = training(folder=tmp_path)
    run.observer = LeadMetaArchitect(run.model, run.optimizer, every=2, mode="observe")

    def poison(now) -> None:
        if now.step == 6:
            with torch.no_grad():
                run.model.embedding.weight[0, 0] = math.nan

    run.view = View(step=poison)
    with pytest.raises(Diverged, match="nan at step 7"):
        fit(run)
