"""The old command line: each of its flags does something."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sixfold import recipe, run
from sixfold.compat.hamha import cli

SYSTEM = {
    "hamha": {"d_model": 28, "d_head": 4, "grid_radius": 1},
    "lma": {"kappa_threshold": 55.0, "entropy_reg_increment": 0.02},
}


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """Few validation windows, and a folder of our own with a configuration in it."""
    from sixfold.data import _kinds

    whole = _kinds.TokenStream.validation_batches
    monkeypatch.setattr(
        _kinds.TokenStream, "validation_batches", lambda self, size: iter([next(whole(self, size))])
    )
    monkeypatch.setattr(run, "SAMPLE", 5)
    monkeypatch.chdir(tmp_path)
    Path("config.json").write_text(json.dumps(SYSTEM))


def call(*words: str) -> int:
    with pytest.raises(SystemExit) as left:
        cli.main(list(words))
    return int(left.value.code or 0)


def train_steps(folder: Path) -> list[int]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()[1:]]
    return [row["step"] for row in rows if row["split"] == "train"]


def told(output: str) -> set[Path]:
    """The telemetry files that were named."""
    lines = [line.split() for line in output.splitlines()]
    return {Path(words[1]) for words in lines if words[:1] == ["telemetry"]}


def test_demo_runs_its_steps_and_names_its_telemetry(capsys):
    assert call("--mode", "demo", "--steps", "2", "--save-telemetry") == 0
    said = capsys.readouterr().out
    governed = {next(Path("runs").glob(f"*-{name}")) for name in ("demo", "collapse-governed")}
    assert told(said) == {folder / "telemetry.jsonl" for folder in governed}
    assert all(train_steps(folder) == [1, 2] for folder in Path("runs").iterdir())


def test_train_follows_the_system_configuration_and_goes_on(capsys):
    assert call("--mode", "train", "--config", "config.json", "--steps", "3") == 0
    assert not told(capsys.readouterr().out)
    (folder,) = Path("runs").iterdir()
    assert train_steps(folder) == [1, 2, 3]
    settings = recipe.read_config(folder)
    assert settings.governor.resolve().alarms.condition == 55.0
    assert settings.governor.resolve().actions.entropy_coefficient == 0.02
    assert (settings.model["d_model"], settings.attention["num_heads"]) == (28, 7)
    # a run that lies elsewhere goes on where it is
    elsewhere = folder.rename("elsewhere")
    longer = json.loads((elsewhere / "config.json").read_text())
    longer["train"]["steps"] = 5
    (elsewhere / "config.json").write_text(json.dumps(longer))
    assert call("--mode", "train", "--checkpoint", "elsewhere", "--save-telemetry") == 0
    assert told(capsys.readouterr().out) == {elsewhere / "telemetry.jsonl"}
    assert not [*Path("runs").iterdir()]
    assert train_steps(elsewhere) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--mode", "train", "--checkpoint", "model_checkpoint.pt"), "would have to be unpickled"),
        (
            ("--checkpoint", "old", "--steps", "3"),
            "keeps the run's own configuration; drop train.steps=3",
        ),
        (("--mode", "demo", "--config", "config.json"), "use --config with --mode train"),
        (("--mode", "train", "--config", "missing.json"), "cannot read missing.json"),
    ],
)
def test_what_cannot_be_done_is_said_and_not_ignored(capsys, words, message):
    assert call(*words) == 1
    assert message in capsys.readouterr().err
    assert not Path("runs").exists()


def test_an_unknown_mode_is_refused(capsys):
    assert call("--mode", "analyze") == 2
    assert "invalid choice: 'analyze'" in capsys.readouterr().err
