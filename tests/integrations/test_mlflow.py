"""The MLflow tracker against MLflow itself: what its own client reads back from a real store."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

pytest.importorskip("mlflow", reason="needs mlflow: pip install 'sixfold[mlflow]'")

from sixfold import recipe, run
from sixfold.errors import Diverged, Interrupted
from sixfold.integrations import mlflow as tracker
from sixfold.train.loop import Progress, View

# MLflow and what it stands on warn of their own affairs
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

SMALL = (
    "model.num_layers=1", "model.d_model=28", "attention.num_heads=7", "data.context=16",
    "train.batch_size=4", "train.steps=25", "train.checkpoint_every=6", "train.validate_every=8",
    "train.device=cpu",
)  # fmt: skip


class Killed(BaseException):
    """Nothing of ours catches this, as nothing catches a kill."""


@pytest.fixture(autouse=True)
def quick_validation(monkeypatch):
    from sixfold.data import _kinds

    whole = _kinds.TokenStream.validation_batches
    monkeypatch.setattr(
        _kinds.TokenStream, "validation_batches", lambda self, size: iter([next(whole(self, size))])
    )


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory):
    """A store whose tables are made once."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("store") / "empty.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path.read_bytes()


@pytest.fixture
def uri(tmp_path, monkeypatch, empty_store):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mlflow.db").write_bytes(empty_store)
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


def settings(uri, *more):
    return recipe.configure([], None, (*SMALL, f"track.mlflow={uri}", *more))


def stored(uri):
    """The client and the only run in the store."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    home = client.get_experiment_by_name("sixfold")
    (found,) = client.search_runs([home.experiment_id])
    return client, found


def history(uri, key):
    client, found = stored(uri)
    return sorted(
        (one.step, one.value) for one in client.get_metric_history(found.info.run_id, key)
    )


def in_file(folder, key):
    split, name = key.split("/")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()[1:]]
    return [(row["step"], row[name]) for row in rows if row["split"] == split]


def only(tmp_path):
    (folder,) = (tmp_path / "runs").iterdir()
    return folder


def stopping(step, error):
    def stop(now):
        if now.step == step:
            raise error

    return View(stop)


def test_mlflow_holds_what_the_folder_holds(uri, tmp_path):
    folder, _ = run.train(settings(uri), tmp_path / "runs")
    client, found = stored(uri)
    assert (found.info.run_name, found.info.status) == (folder.name, "FINISHED")
    for key in ("train/loss", "train/learning_rate", "train/tokens_per_s", "validation/loss"):
        assert history(uri, key) == in_file(folder, key)
    assert len(history(uri, "train/loss")) == 25
    assert found.data.params["train.steps"] == "25"
    assert found.data.params["attention.num_heads"] == "7"
    assert not any(name.startswith("track") for name in found.data.params)
    environment = json.loads((folder / "environment.json").read_text())
    for name in ("commit", "device", "torch", "sixfold"):
        assert found.data.tags[name] == environment[name]
    assert {file.path for file in client.list_artifacts(found.info.run_id)} == set(tracker.FILES)
    copy = client.download_artifacts(found.info.run_id, "metrics.jsonl")
    assert Path(copy).read_text() == (folder / "metrics.jsonl").read_text()


@pytest.mark.parametrize("step", [3, 11, 14, 24])
def test_a_killed_run_goes_on_without_gap_or_duplicate(uri, tmp_path, monkeypatch, step):
    # nothing is sent on the way out, as when the process is gone
    with monkeypatch.context() as gone:
        gone.setattr(tracker.Copy, "close", lambda self, status: None)
        with pytest.raises(Killed):
            run.train(settings(uri), tmp_path / "runs", stopping(step, Killed()))
    folder = only(tmp_path)
    assert stored(uri)[1].info.status == "RUNNING"
    run.resume(folder)
    assert stored(uri)[1].info.status == "FINISHED"
    for key in ("train/loss", "train/gradient_norm", "validation/loss"):
        assert history(uri, key) == in_file(folder, key)
    assert [at for at, _ in history(uri, "train/tokens_per_s")] == list(range(1, 26))


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (KeyboardInterrupt(), "KILLED"),
        (Interrupted(5, None), "KILLED"),
        (OSError("disk"), "FAILED"),
    ],
)
def test_how_a_run_ended(uri, tmp_path, error, status):
    with pytest.raises(type(error)):
        run.train(settings(uri), tmp_path / "runs", stopping(5, error))
    client, found = stored(uri)
    assert found.info.status == status
    assert [step for step, _ in history(uri, "train/loss")] == [1, 2, 3, 4, 5]
    assert "metrics.jsonl" in {file.path for file in client.list_artifacts(found.info.run_id)}


def test_the_loss_that_was_no_number_is_there_too(uri, tmp_path):
    wild = ("optimizer.learning_rate=1e30", "train.clip_norm=none", "governor.mode=off")
    with pytest.raises(Diverged):
        run.train(settings(uri, *wild), tmp_path / "runs")
    assert stored(uri)[1].info.status == "FAILED"
    got, wanted = history(uri, "train/loss"), in_file(only(tmp_path), "train/loss")
    assert [step for step, _ in got] == [step for step, _ in wanted]
    assert not math.isfinite(wanted[-1][1])
    assert math.isnan(got[-1][1]) == math.isnan(wanted[-1][1])


def test_a_server_that_goes_away_delays_only_the_copy(uri, tmp_path, monkeypatch):
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    monkeypatch.setattr(tracker, "PAUSE", 0.0)
    real, calls = MlflowClient.log_batch, []

    def shaky(self, name, metrics=(), params=()):
        if metrics:
            calls.append(len(calls))
            if len(calls) == 2:
                # the call arrives, its answer does not
                real(self, name, metrics=metrics)
            if len(calls) in (2, 3):
                raise MlflowException("gone")
        real(self, name, metrics=metrics, params=params)

    monkeypatch.setattr(MlflowClient, "log_batch", shaky)
    with pytest.warns(RuntimeWarning, match="gone.*training goes on"):
        folder, _ = run.train(settings(uri), tmp_path / "runs")
    for key in ("train/loss", "train/tokens_per_s", "validation/loss"):
        assert history(uri, key) == in_file(folder, key)


def test_resuming_sends_what_the_end_could_not(uri, tmp_path, monkeypatch):
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    def gone(self, name, metrics=(), params=()):
        if metrics:
            raise MlflowException("gone")

    with monkeypatch.context() as away, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        away.setattr(MlflowClient, "log_batch", gone)
        with pytest.raises(ConnectionError, match="gone.*--resume"):
            run.train(settings(uri), tmp_path / "runs")
    folder = only(tmp_path)
    assert len(in_file(folder, "train/loss")) == 25
    run.resume(folder)
    assert history(uri, "train/loss") == in_file(folder, "train/loss")
    assert stored(uri)[1].info.status == "FINISHED"


@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:9", "sqlite:////dev/null/none/mlflow.db", "nonsense://there"]
)
def test_an_address_without_a_store_is_named_before_the_first_step(tmp_path, monkeypatch, address):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConnectionError, match=address):
        run.train(settings(address), tmp_path / "runs")
    assert not (only(tmp_path) / "metrics.jsonl").exists()


def test_a_damaged_store_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mlflow.db").write_text("not a database " * 100)
    with pytest.raises(ConnectionError, match="not a database"):
        run.train(settings("sqlite:///mlflow.db"), tmp_path / "runs")


def test_a_long_log_is_sent_in_pieces(uri, tmp_path):
    settings_ = {"track": {"mlflow": uri}, "train": {"steps": 1}}
    (tmp_path / "environment.json").write_text('{"commit": "c", "packages": {"torch": "2"}}')
    rows = [{"header": {}}, *({"step": n, "split": "train", "loss": 1 / n} for n in range(1, 1201))]
    half = '{"step": 1201, "split": "tr'
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n" + half)
    with tracker.tracking(tmp_path, settings_, 700) as step:
        assert [at for at, _ in history(uri, "train/loss")] == list(range(1, 701))
        step(Progress(1100, 1200, 0.0, 0.0, 0.0, 0.0, None))
        assert [at for at, _ in history(uri, "train/loss")] == list(range(1, 1101))
    assert history(uri, "train/loss") == [(n, 1 / n) for n in range(1, 1201)]
    assert stored(uri)[1].data.tags["packages.torch"] == "2"


QUIET = """
import os, socket, sys
reached = []
def watch(event, args):
    if event in ("socket.connect", "socket.getaddrinfo"):
        reached.append(args)
sys.addaudithook(watch)
import sixfold, sixfold.run, sixfold.integrations.mlflow as tracker
assert "mlflow" not in sys.modules, "mlflow is imported before it is asked for"
import pathlib
folder = pathlib.Path(sys.argv[1])
(folder / "environment.json").write_text("{}")
with tracker.tracking(folder, {"track": {"mlflow": f"sqlite:///{folder}/mlflow.db"}}, 0):
    pass
assert "mlflow" in sys.modules
assert not reached, reached
"""


def test_import_is_lazy_and_a_local_store_opens_no_connection(uri, tmp_path, monkeypatch):
    for name in ("CI", "GITHUB_ACTIONS", "PYTEST_CURRENT_TEST", *tracker.QUIET):
        monkeypatch.delenv(name, raising=False)
    done = subprocess.run(
        [sys.executable, "-c", QUIET, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
