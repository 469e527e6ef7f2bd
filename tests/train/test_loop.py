from __future__ import annotations

import errno
import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch

from sixfold.contracts import Batch
from sixfold.errors import ConfigError, Diverged, Interrupted
from sixfold.governor.architect import LeadMetaArchitect
from sixfold.train import checkpoint, step
from sixfold.train.loop import TrainSettings, View, fit, validate
from sixfold.train.objective import loss
from sixfold.train.optimizer import OptimizerSettings
from sixfold.train.step import StepSettings, train_step


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()[1:]]


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in rows(folder / "metrics.jsonl") if row["split"] == "train"]


def weights(run) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in run.model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_learns_and_validates_the_whole_split(training):
    run = training(steps=60, rates={"learning_rate": 3e-3})
    before = validate(run).loss
    outcome = fit(run)
    assert outcome.validation.loss < before - 0.5
    inputs, targets = run.dataset.validation[:-1], run.dataset.validation[1:]
    run.model.eval()
    context = run.dataset.context
    with torch.no_grad():
        total = sum(
            loss("tokens", run.model, Batch(x[None], y[None])).item() * len(y)
            for x, y in zip(inputs.split(context), targets.split(context), strict=True)
        )
    assert outcome.validation.loss == pytest.approx(total / len(targets), rel=1e-6)


def test_one_step_is_what_pytorch_users_write(training):
    ours, theirs = training(), training()
    batch = ours.dataset.train_batch(0, 0, 4)
    report = train_step(ours.model, ours.optimizer, batch, StepSettings("tokens"))
    logits = theirs.model(batch.inputs)
    value = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
    value.backward()
    norm = torch.nn.utils.clip_grad_norm_(theirs.model.parameters(), 1.0)
    theirs.optimizer.step()
    # parameters are summed in another order: the norm's last bit may differ
    assert report == pytest.approx((value.item(), norm.item()), rel=1e-6)
    for name, tensor in weights(theirs).items():
        torch.testing.assert_close(weights(ours)[name], tensor)


def test_accumulation_equals_one_large_batch(training):
    whole, parts = training(), training()
    batch = whole.dataset.train_batch(0, 0, 8)
    train_step(whole.model, whole.optimizer, batch, StepSettings("tokens"))
    train_step(parts.model, parts.optimizer, batch, StepSettings("tokens", accumulation=4))
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(weights(parts)[name], tensor, atol=2e-5, rtol=1e-4)


def test_the_schedule_warms_up_and_ends_where_it_should():
    rates = OptimizerSettings(learning_rate=1.0, final_learning_rate=0.1, warmup=10)
    assert [rates.rate(s, 110) for s in (0, 9, 10, 60, 110)] == pytest.approx(
        [0.1, 1, 1, 0.55, 0.1]
    )
    linear = OptimizerSettings(
        learning_rate=1.0, final_learning_rate=0.0, warmup=0, schedule="linear"
    )
    assert linear.rate(25, 100) == pytest.approx(0.75)
    constant = OptimizerSettings(learning_rate=0.5, warmup=0, schedule="constant")
    assert constant.rate(99, 100) == 0.5


@pytest.mark.parametrize("governed", [False, True])
def test_a_resumed_run_equals_the_uninterrupted_one_to_the_bit(training, tmp_path, governed):
    options = {"governed": governed, "dropout": 0.1}
    whole = training(folder=tmp_path / "whole", **options)
    fit(whole)
    broken = training(folder=tmp_path / "broken", **options)
    with pytest.raises(RuntimeError, match="power cut"):
        broken.view = View(step=lambda now: fail(now.step == 7))
        fit(broken)
    saved = checkpoint.latest(tmp_path / "broken" / "checkpoints")
    assert saved.step == 4
    again = reopened(training, tmp_path / "broken", saved, options)
    fit(again, saved)
    assert same(weights(whole), weights(again))
    assert losses(tmp_path / "whole") == losses(tmp_path / "broken")
    if governed:
        for name in ("telemetry.jsonl", "journal.jsonl"):
            ours, theirs = rows(tmp_path / "broken" / name), rows(tmp_path / "whole" / name)
            # that it was resumed is told: copies that it could have gone back to are lost
            ours = [row for row in ours if row.get("kind") != "resumed"]
            assert [timeless(row) for row in ours] == [timeless(row) for row in theirs]


def reopened(training, folder, saved, options):
    """A run whose logs go on where the checkpoint left them."""
    run = training(**{**options, "governed": False}, folder=folder)
    if options["governed"]:
        governor = LeadMetaArchitect(
            run.model, run.optimizer, every=2, folder=folder, positions=saved.state["logs"]
        )
        run.observer, run.logs = governor, governor.logs
    return run


def timeless(row: dict) -> dict:
    scalars = {k: v for k, v in row.get("scalars", {}).items() if k != "tokens_per_s"}
    return {**row, "times_us": None, "scalars": scalars}


def fail(now: bool) -> None:
    if now:
        raise RuntimeError("power cut")


def test_a_healthy_run_keeps_its_bits_under_the_governor(training, tmp_path):
    alone = training(folder=tmp_path / "alone", steps=20)
    governed = training(folder=tmp_path / "governed", steps=20, governed=True)
    fit(alone)
    fit(governed)
    assert losses(tmp_path / "alone") == losses(tmp_path / "governed")
    assert same(weights(alone), weights(governed))
    assert not [r for r in rows(tmp_path / "governed" / "journal.jsonl") if r["kind"] == "change"]


def test_early_stop_keeps_the_best_checkpoint(training, tmp_path):
    run = training(
        steps=200, validate_every=2, checkpoint_every=2, patience=2, rates={"learning_rate": 0.2}
    )
    outcome = fit(run)
    assert outcome.stopped_early
    assert outcome.step == outcome.best[1] + 4
    kept = [number for number, _ in checkpoint.steps(tmp_path / "checkpoints")]
    assert outcome.best[1] in kept
    assert len(kept) <= 3
    again = training(steps=200, validate_every=2, checkpoint_every=2, patience=2)
    ended = fit(again, checkpoint.latest(tmp_path / "checkpoints"))
    assert ended.stopped_early
    assert ended.step == outcome.step


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_says_how_to_go_on(training, tmp_path, number):
    run = training()
    run.view = View(step=lambda now: os.kill(os.getpid(), number) if now.step == 5 else None)
    with pytest.raises(Interrupted, match=r"sixfold train --resume") as stopped:
        fit(run)
    assert stopped.value.step == 5
    assert checkpoint.latest(tmp_path / "checkpoints").step == 5
    again = training()
    fit(again, checkpoint.latest(tmp_path / "checkpoints"))
    assert len(losses(tmp_path)) == 12


def test_a_loss_that_is_not_a_number_stops_the_run(training, tmp_path):
    run = training()
    run.view = View(step=lambda now: poison(run) if now.step == 6 else None)
    with pytest.raises(Diverged, match=r"nan at step 7.*learning_rate"):
        fit(run)
    assert math.isnan(losses(tmp_path)[-1])
    assert checkpoint.latest(tmp_path / "checkpoints").step == 4


def poison(run) -> None:
    with torch.no_grad():
        run.model.embedding.weight[0, 0] = math.nan


def test_bf16_trains_close_to_fp32(training, tmp_path):
    full = training(folder=tmp_path / "fp32")
    half = training(folder=tmp_path / "bf16", precision="bf16")
    fit(full)
    fit(half)
    # bf16 keeps 8 bits: a relative error of 2^-8 on a loss of 3.5 nats
    assert losses(tmp_path / "bf16") == pytest.approx(
        losses(tmp_path / "fp32"), abs=3.5 * 2**-8 * 4
    )
    assert next(half.model.parameters()).dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precision": "fp8"}, "train.precision 'fp8'; choose from: bf16, fp32"),
        ({"steps": 0}, "train.steps must be 1 or more"),
        ({"clip_norm": -1.0}, "train.clip_norm must be positive"),
        ({"patience": 0}, "train.patience must be 1 or more"),
        ({"seed": -1}, "train.seed must be 0 or more"),
        ({"device": "gpu"}, "choose from: auto, cpu, cuda, mps"),
        ({"batch_size": 5, "accumulation": 2}, "not a multiple of train.accumulation 2"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainSettings(**settings)


def test_too_few_examples_for_all_processes(training):
    run = training(batch_size=4)
    run.world = step.World(0, 3, torch.device("cpu"))
    with pytest.raises(ConfigError, match="cannot be shared by 3 processes"):
        fit(run)


def test_a_full_disk_ends_the_run_and_loses_nothing(training, tmp_path, monkeypatch):
    run = training()
    whole = checkpoint.save_file

    def full(tensors, path):
        if "00000008" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        whole(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match=r"cannot write checkpoint .*00000008.*No space left.*intact"):
        fit(run)
    monkeypatch.undo()
    assert [number for number, _ in checkpoint.steps(tmp_path / "checkpoints")] == [4]
    assert not list((tmp_path / "checkpoints").glob(".*"))
    again = training()
    fit(again, checkpoint.latest(tmp_path / "checkpoints"))
    assert len(losses(tmp_path)) == 12


def test_metrics_on_a_full_disk_are_an_error_that_names_the_file(training, tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"cannot write .*metrics.jsonl: No space left"):
        fit(training())


def test_training_works_in_a_thread(training):
    from concurrent.futures import ThreadPoolExecutor

    run = training(steps=2)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(fit, run).result().step == 2
