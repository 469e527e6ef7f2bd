"""The command line as its user meets it: what it prints, what it leaves, how it fails."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from sixfold import cli, recipe, run
from sixfold.train import checkpoint

SMALL = (
    "model.num_layers=1", "model.d_model=28", "attention.num_heads=7", "attention.mixer=hexagonal",
    "attention.projection=coordinate", "data.context=16", "train.batch_size=4", "train.steps=6",
    "train.checkpoint_every=3", "train.validate_every=100", "train.device=cpu", "governor.every=2",
)  # fmt: skip


@pytest.fixture(autouse=True)
def quick_validation(monkeypatch):
    """The real text, of which only a few windows are validated."""
    from sixfold.data import _kinds

    whole = _kinds.TokenStream.validation_batches
    monkeypatch.setattr(
        _kinds.TokenStream, "validation_batches", lambda self, size: iter([next(whole(self, size))])
    )
    monkeypatch.setattr(run, "SAMPLE", 20)


def sixfold(*words: str) -> int:
    with pytest.raises(SystemExit) as left:
        cli.main(list(words))
    return int(left.value.code or 0)


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


@pytest.fixture
def trained(runs, capsys):
    assert sixfold("train", *SMALL) == 0
    capsys.readouterr()
    return next(runs.iterdir())


def test_train_leaves_a_whole_run_folder(runs, capsys):
    assert sixfold("train", *SMALL, "name=first") == 0
    folder = next(runs.iterdir())
    assert folder.name.endswith("-first")
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "config.json", "environment.json", "metrics.jsonl", "telemetry.jsonl", "journal.jsonl",
        "checkpoints", "tokenizer.json", "sample.txt", "report.html",
    }  # fmt: skip
    said = capsys.readouterr()
    assert str(folder / "report.html").rsplit("/", 2)[-1] in said.out
    header = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])["header"]
    assert header["units"]["loss"] == "nats/token"
    assert len(header["config_hash"]) == 12
    assert len((folder / "sample.txt").read_text()) == 20


def test_a_toml_file_presets_and_overrides_stack(runs):
    Path("my.toml").write_text('name = "mine"\n[train]\nsteps = 2\n')
    assert (
        sixfold("train", "demo", "my.toml", *SMALL[:-3], "train.device=cpu", "train.steps=1") == 0
    )
    values = json.loads((next(runs.iterdir()) / "config.json").read_text())
    assert values["name"] == "mine"
    assert values["train"]["steps"] == 1
    assert values["attention"]["head_dim"] == 16


def test_a_system_config_is_understood(runs):
    system = {
        "hamha": {"d_model": 28, "d_head": 4, "grid_radius": 1},
        "lma": {"kappa_threshold": 50.0},
    }
    Path("config.json").write_text(json.dumps(system))
    more = (
        "model.num_layers=1",
        "data.context=16",
        "train.batch_size=4",
        "train.steps=2",
        "train.device=cpu",
    )
    assert sixfold("train", "config.json", *more) == 0
    values = recipe.read_config(next(runs.iterdir()))
    assert values.governor.resolve().alarms.condition == 50.0
    assert values.attention["mixer"] == "hexagonal"
    built = recipe.build(values)
    assert built.model.blocks[0].attention.grid.radius == 1


def test_resume_goes_on_and_refuses_another_configuration(trained, capsys):
    newest = checkpoint.steps(trained / "checkpoints")[-1][1]
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    assert sixfold("train", "--resume", "last") == 0
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()[1:]]
    assert [row["step"] for row in rows if row["split"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert sixfold("train", "train.steps=9", "--resume", "last") == 1
    assert "keeps the run's own configuration; drop train.steps=9" in capsys.readouterr().err


def test_a_corpus_without_line_breaks_ends_with_a_report(runs):
    Path("line.txt").write_text("the quick brown fox jumps over the lazy dog " * 30)
    more = ("data.name=corpus", "data.path=line.txt", "data.tokenizer=words")
    assert sixfold("train", *SMALL, *more) == 0
    folder = next(runs.iterdir())
    assert (folder / "report.html").exists()
    assert " " in (folder / "sample.txt").read_text()


def test_generate_is_repeatable_and_streams(trained, capsys):
    for _ in range(2):
        assert sixfold("generate", "--prompt", "The", "--tokens", "12", "--seed", "3") == 0
    first, second = capsys.readouterr().out.split("The")[1:]
    assert first.strip() == second.strip()
    assert sixfold("generate", str(trained), "--prompt", "", "--tokens", "3") == 1
    assert "the prompt is empty" in capsys.readouterr().err
    assert sixfold("generate", "--temperature", "-1") == 1
    assert "temperature must be 0 or more" in capsys.readouterr().err


def test_report_text_picture_and_page(trained, capsys):
    assert sixfold("report", "last", "--text") == 0
    assert trained.name in capsys.readouterr().out
    assert sixfold("report", "last", "--picture", "loss.svg") == 0
    assert Path("loss.svg").read_text().startswith("<svg")
    (trained / "report.html").unlink()
    assert sixfold("report") == 0
    assert (trained / "report.html").exists()


def test_replay_says_that_nothing_differs(trained, capsys):
    assert sixfold("replay") == 0
    assert "3 samples: the same actions as in the run" in capsys.readouterr().out
    assert sixfold("replay", "last", "alarms.logit_critical=0.01", "actions.clip_to=0.005") == 0
    assert "step 1: here it would have acted otherwise" in capsys.readouterr().out
    assert sixfold("replay", "--limits", "sed") == 1
    assert "Did you mean 'seed'" in capsys.readouterr().err


def test_runs_and_doctor(trained, capsys):
    assert sixfold("runs") == 0
    assert trained.name[:8] in capsys.readouterr().out
    assert sixfold("doctor") == 0
    said = capsys.readouterr().out
    assert "torch" in said
    assert "data shakespeare         found" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("tran.steps=3",), "unknown key 'tran'.*Did you mean 'train'"),
        (("train.step=3",), "unknown key of train 'step'.*Did you mean 'steps'"),
        (("train.steps=abc",), "train.steps must be an integer, got 'abc'"),
        (
            ("attention.num_heads=4", "attention.mixer=hexagnal"),
            "unknown mixer 'hexagnal'.*Did you mean 'hexagonal'",
        ),
        (("attention.mixer=none",), "attention.num_heads is missing; it must be an integer"),
        (("attention.num_hedas=7",), "unknown key of attention 'num_hedas'.*'num_heads'"),
        (
            ("attention.num_heads=8", "attention.mixer=hexagonal"),
            "no hexagonal grid has 8 heads.*7",
        ),
        (("model.kind=langauge",), "model.kind: unknown models 'langauge'.*'language'"),
        (("model.kind=vision",), "cannot be trained on TokenStream data"),
        (("data.name=shakespear",), "data.name: unknown data 'shakespear'.*'shakespeare'"),
        (("data.name=corpus",), "data.path is missing; it must be"),
        (("data.name=corpus", "data.path=gone.txt"), "gone.txt"),
        (("data.context=2000000",), "needs 2000001"),
        (("train.precision=fp8",), "choose from: bf16, fp32"),
        (("governor.mode=atc",), "choose from: act, observe, off"),
        (("governor.alarms={logit_critcal=3}",), "unknown key of governor.alarms 'logit_critcal'"),
        (("governor.every=0",), "governor.every must be 1 or more"),
        (("governor.actions={clip_to=0.0}",), "clip_to must be positive"),
        (("optimizer.beta1=2.0",), "optimizer.beta1 must be in"),
        (("optimizer.warmup=-5",), "optimizer.warmup must be 0 or more"),
        (("name=a/b",), "name must be one part of a path"),
        (("a.toml", "b.toml"), "one configuration file at a time"),
        (("demmo",), "unknown preset 'demmo'.*Did you mean 'demo'"),
        (("missing.toml",), "cannot read missing.toml: No such file"),
        (("train.batch_size=5", "train.accumulation=2"), "not a multiple"),
        (("--resume", "gone"), "gone holds no run"),
    ],
)
def test_what_cannot_be_meant_is_one_clear_sentence(runs, capsys, words, message):
    import re

    small = () if words[0] in ("--resume", "demmo", "missing.toml", "a.toml") else SMALL[:1]
    assert sixfold("train", *small, *words) == 1
    said = capsys.readouterr().err
    assert said.startswith("sixfold: ")
    assert re.search(message, said), said
    assert "Traceback" not in said
    assert not list(runs.glob("*/metrics.jsonl"))


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "empty"), (b"abc", "3|short"), (b"\xff\xfe\x00", "UTF-8")],
)
def test_corpora_that_cannot_be_read(runs, capsys, content, message):
    Path("text.txt").write_bytes(content)
    assert sixfold("train", "data.name=corpus", "data.path=text.txt") == 1
    assert __import__("re").search(message, capsys.readouterr().err)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_folder_is_named(runs, capsys):
    Path("locked").mkdir(mode=0o500)
    assert sixfold("train", *SMALL, "--runs", "locked/runs") == 1
    assert "cannot create locked/runs" in capsys.readouterr().err


def test_a_file_in_the_way_of_the_folder_is_named(runs, capsys):
    Path("taken").write_text("")
    assert sixfold("train", *SMALL, "--runs", "taken") == 1
    assert "cannot create taken/" in capsys.readouterr().err


def test_a_damaged_checkpoint_stops_resume_and_generate(trained, capsys):
    file = checkpoint.steps(trained / "checkpoints")[-1][1] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    assert sixfold("train", "--resume", "last") == 1
    assert "is damaged" in capsys.readouterr().err
    assert sixfold("generate") == 1
    assert "is damaged" in capsys.readouterr().err


def test_a_checkpoint_of_another_architecture_is_refused(trained, capsys):
    path = trained / "config.json"
    values = json.loads(path.read_text())
    values["model"]["d_model"] = 14
    path.write_text(json.dumps(values))
    assert sixfold("train", "--resume", "last") == 1
    assert "is of another architecture" in capsys.readouterr().err


def test_the_demo_tells_what_it_showed(runs, capsys):
    assert sixfold("demo", *SMALL) == 0
    said = capsys.readouterr().out
    assert "nats per character on the whole split" in said
    assert "under the governor" in said
    main = next(runs.glob("*-demo"))
    page = (main / "report.html").read_text()
    assert "collapse-alone" in page
    assert "collapse-governed" in page


def test_the_old_command_line(runs, capsys, monkeypatch):
    from sixfold.compat.hamha import cli as old

    def call(*words: str) -> int:
        with pytest.raises(SystemExit) as left:
            old.main(list(words))
        return int(left.value.code or 0)

    Path("small.toml").write_text(
        "[model]\nnum_layers = 1\nd_model = 28\n[data]\ncontext = 16\n[train]\nbatch_size = 4\n"
    )
    assert (
        call("--mode", "train", "--config", "small.toml", "--steps", "3", "--save-telemetry") == 0
    )
    said = capsys.readouterr().out
    telemetry = Path(said.split("telemetry")[-1].strip())
    assert telemetry.name == "telemetry.jsonl" or "telemetry.jsonl" in said
    folder = next(runs.iterdir())
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 1 + 3 + 1
    assert call("--mode", "train", "--checkpoint", str(folder)) == 0
    assert call("--mode", "train", "--checkpoint", "model_checkpoint.pt") == 1
    assert "would have to be unpickled" in capsys.readouterr().err


def test_tensorboard_receives_every_step(runs):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert sixfold("train", *SMALL, "track.tensorboard=true") == 0
    folder = next(runs.iterdir())
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    shown = {event.step: event.value for event in events.Scalars("train/loss")}
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()[1:]]
    logged = {row["step"]: row["loss"] for row in rows if row["split"] == "train"}
    assert shown == pytest.approx(logged, rel=1e-6)


def test_tensorboard_goes_on_where_a_run_was_stopped(runs):
    """Events of steps after the checkpoint are hidden, that of the checkpoint's own step stays."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    wanted = (*SMALL, "track.tensorboard=true")
    assert sixfold("train", *wanted) == 0
    folder = next(runs.iterdir())
    *_, newest = sorted((folder / "checkpoints").iterdir())
    shutil.rmtree(newest)
    assert sixfold("train", "--resume", str(folder)) == 0
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 7))


def test_a_missing_tracker_names_its_extra(runs, capsys, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "mlflow", None)
    assert sixfold("train", *SMALL, "track.mlflow=sqlite:///mlflow.db") == 1
    assert "pip install 'sixfold[mlflow]'" in capsys.readouterr().err
