from __future__ import annotations

import json

import pytest
import torch

from sixfold.errors import CheckpointError
from sixfold.models.language import LanguageModel
from sixfold.train import checkpoint
from sixfold.train.loop import fit
from sixfold.train.optimizer import OptimizerSettings, build_optimizer


@pytest.fixture
def root(training, tmp_path):
    fit(training())
    return tmp_path / "checkpoints"


def test_nothing_is_pickled(root):
    for file in root.rglob("*"):
        if file.is_file():
            assert file.suffix in (".safetensors", ".json")
            assert not file.read_bytes().startswith((b"PK", b"\x80"))


def test_only_the_last_two_stay(root):
    assert [number for number, _ in checkpoint.steps(root)] == [8, 12]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_file_is_refused_by_name(root, name):
    file = root / "step-00000012" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(
        CheckpointError, match=rf"step-00000012 is damaged \({name}.*delete that folder"
    ):
        checkpoint.latest(root)


@pytest.mark.parametrize("name", ["manifest.json", "model.safetensors"])
def test_a_missing_or_cut_file_is_refused(root, name):
    file = root / "step-00000012" / name
    file.write_bytes(file.read_bytes()[:10])
    with pytest.raises(CheckpointError, match="is damaged"):
        checkpoint.latest(root)
    file.unlink()
    with pytest.raises(CheckpointError, match="is damaged"):
        checkpoint.latest(root)


def test_another_format_is_refused(root):
    manifest = root / "step-00000012" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 99}))
    with pytest.raises(CheckpointError, match="format 99; this version reads 2"):
        checkpoint.latest(root)


def test_a_foreign_architecture_is_refused_and_says_what_differs(root):
    other = LanguageModel(65, 16, 32, 2, {"num_heads": 4})
    with pytest.raises(CheckpointError, match=r"another architecture.*blocks\.0"):
        checkpoint.load_model(checkpoint.latest(root), other)


def test_a_checkpoint_restores_random_numbers_and_moments(training, root):
    saved = checkpoint.latest(root)
    run = training()
    checkpoint.load_training(saved, run.model, run.optimizer)
    first = torch.rand(3)
    checkpoint.load_training(saved, run.model, run.optimizer)
    assert torch.equal(torch.rand(3), first)
    state = run.optimizer.state[run.model.embedding.weight]
    assert state["step"] == 12
    assert state["exp_avg"].abs().sum() > 0


def test_decay_falls_on_matrices_only():
    model = LanguageModel(11, 8, 16, 1, {"num_heads": 2})
    decayed, free = build_optimizer(model, OptimizerSettings()).param_groups
    assert {p.ndim for p in decayed["params"]} == {2}
    assert {p.ndim for p in free["params"]} == {1}
    assert free["weight_decay"] == 0
