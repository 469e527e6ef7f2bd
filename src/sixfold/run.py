"""A configured run: train what a recipe builds, and leave a folder behind.

A run's folder holds ``config.json``, ``environment.json``, ``metrics.jsonl``, ``telemetry.jsonl``,
``journal.jsonl``, ``checkpoints/``, ``tokenizer.json`` and ``sample.txt`` where there is text, and
``report.html``.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from sixfold import __version__, config, record
from sixfold.contracts import Dataset
from sixfold.data._kinds import TokenStream
from sixfold.data.tokenizer._file import load_tokenizer, save_tokenizer
from sixfold.errors import CheckpointError, ConfigError
from sixfold.governor.architect import LeadMetaArchitect
from sixfold.governor.journal import JOURNAL, TELEMETRY
from sixfold.governor.replay import Replay
from sixfold.governor.replay import replay as decide_again
from sixfold.models import parameters
from sixfold.models.language import LanguageModel
from sixfold.recipe import Built, GovernorSettings, RunConfig, build, read_config
from sixfold.report.html import write_report
from sixfold.train import checkpoint
from sixfold.train.distributed import World, world
from sixfold.train.loop import Outcome, Progress, Training, View, fit
from sixfold.train.objective import UNITS
from sixfold.train.optimizer import build_optimizer

UNSEEN = View()


def environment(device: torch.device) -> dict[str, Any]:
    """What the run stands on."""
    name = record.device_name() if device.type == "cpu" else torch.cuda.get_device_name(device)
    return {
        "sixfold": __version__,
        "commit": record.commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": name,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "packages": {
            name: importlib.metadata.version(name) for name in ("numpy", "safetensors", "torch")
        },
    }


def new_folder(runs: Path, name: str) -> Path:
    """A fresh folder below `runs`, named after the time."""
    stem = f"{time.strftime('%Y%m%d-%H%M%S')}-{name}"
    for number in range(1000):
        folder = runs / (stem if number == 0 else f"{stem}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise OSError(error.errno, f"cannot create {folder}: {error.strerror}") from error
        return folder
    raise FileExistsError(f"{runs} holds a thousand runs named {stem}")


def train(
    settings: RunConfig, runs: Path | str = "runs", view: View = UNSEEN
) -> tuple[Path, Outcome]:
    """Start a run and train it to the end.

    Returns:
        The run's folder and how it ended.

    Raises:
        Explained: any of its kinds; the message says what to do.
    """
    with world(settings.train.device) as here:
        built = build(settings)
        folder = shared_folder(here, lambda: new_folder(Path(runs), settings.name))
        if here.leads:
            record.write_json(folder / "config.json", config.plain(settings))
            facts = environment(here.device) | {"parameters": parameters(built.model)}
            record.write_json(folder / "environment.json", facts)
            if isinstance(built.dataset, TokenStream):
                save_tokenizer(built.dataset.tokenizer, folder / "tokenizer.json")
        return folder, go(settings, built, folder, here, view, None)


def resume(folder: Path | str, view: View = UNSEEN) -> Outcome:
    """Continue a run from its newest checkpoint, or from its start if it has none."""
    folder = Path(folder)
    settings = read_config(folder)
    with world(settings.train.device) as here:
        saved = checkpoint.latest(folder / "checkpoints")
        return go(settings, build(settings), folder, here, view, saved)


def go(
    settings: RunConfig,
    built: Built,
    folder: Path,
    here: World,
    view: View,
    saved: checkpoint.Saved | None,
) -> Outcome:
    """Train what was built, from `saved` or from the start."""
    model = built.model.to(here.device)
    optimizer = build_optimizer(model, settings.optimizer)
    view = view if here.leads else UNSEEN
    with ExitStack() as stack:
        governor, logs = None, ()
        if settings.governor.mode != "off":
            governor = LeadMetaArchitect(
                model, optimizer, mode=settings.governor.mode, limits=settings.governor.resolve(),
                every=settings.governor.every, folder=folder if here.leads else None,
                positions={} if saved is None else saved.state["logs"],
            )  # fmt: skip
            stack.callback(governor.detach)
            logs = governor.logs
        start = 0 if saved is None else saved.step
        trackers = [
            stack.enter_context(tracking(name, folder, settings, start))
            for name in settings.track.names()
            if here.leads
        ]

        def shown(now: Progress) -> None:
            for call in (view.step, *trackers):
                call(now)

        training = Training(
            model, optimizer, built.dataset, settings.train, settings.optimizer, folder,
            header_of(settings, built.dataset, folder, here), observer=governor, logs=logs,
            world=here, view=View(shown, view.say),
        )  # fmt: skip
        began = time.monotonic()
        outcome = fit(training, saved)
    if here.leads:
        note_time(folder, time.monotonic() - began)
    return outcome


def note_time(folder: Path, seconds: float) -> None:
    """Add the wall-clock time of this attempt to the environment of the run."""
    path = folder / "environment.json"
    facts = json.loads(path.read_text())
    record.write_json(path, facts | {"wall_s": round(facts.get("wall_s", 0.0) + seconds, 3)})


def tracking(
    name: str, folder: Path, settings: RunConfig, start: int
) -> AbstractContextManager[Callable[[Progress], None]]:
    """A tracker by name."""
    module = importlib.import_module(f"sixfold.integrations.{name}")
    tracker: AbstractContextManager[Callable[[Progress], None]] = module.tracking(
        folder, config.plain(settings), start
    )
    return tracker


def shared_folder(here: World, make: Callable[[], Path]) -> Path:
    """One folder for all processes, made by the first."""
    found: list[Path | None] = [make() if here.leads else None]
    if here.size > 1:
        distributed.broadcast_object_list(found, src=0)
    folder = found[0]
    assert folder is not None
    return folder


def header_of(settings: RunConfig, dataset: Dataset, folder: Path, here: World) -> dict[str, Any]:
    """First line of the metrics: where the numbers come from and in which units."""
    return {
        "run": folder.name,
        "seed": settings.train.seed,
        "device": environment(here.device)["device"],
        "commit": record.commit(),
        "config_hash": record.config_hash(config.plain(settings)),
        "units": {
            "loss": UNITS[dataset.objective], "accuracy": "1", "learning_rate": "1",
            "gradient_norm": "1", "tokens_per_s": "targets/s",
        },
    }  # fmt: skip


def load_run(folder: Path | str) -> Built:
    """The trained model of a run and its data: the newest weights, the best after an early stop.

    Raises CheckpointError where there is no checkpoint, or a damaged or foreign one.
    """
    folder = Path(folder)
    built = build(read_config(folder))
    saved = checkpoint.latest(folder / "checkpoints")
    if saved is None:
        raise CheckpointError(f"{folder} has no checkpoint yet")
    if saved.state["stopped_early"]:
        saved = checkpoint.verify(checkpoint.place(folder / "checkpoints", saved.state["best"][1]))
    checkpoint.load_model(saved, built.model)
    return built


def generate(
    folder: Path | str,
    prompt: str | None,
    max_new_tokens: int,
    *,
    seed: int = 0,
    **sampling: Any,
) -> Iterator[str]:
    """Text that a trained language model continues `prompt` with, piece by piece.

    Without a prompt it continues the first token of the validation text.
    """
    built = load_run(folder)
    if not isinstance(built.model, LanguageModel):
        raise ConfigError(f"{folder} is not a language model: it has no text to continue")
    tokenizer = load_tokenizer(Path(folder) / "tokenizer.json")
    if prompt is None:
        tokens = built.dataset.validation[None, :1]
    else:
        tokens = torch.as_tensor(tokenizer.encode(prompt))[None]
    if tokens.shape[1] == 0:
        raise ConfigError("the prompt is empty; give at least one character")
    generator = torch.Generator().manual_seed(seed)
    try:
        drawn = built.model.generate(tokens, max_new_tokens, generator=generator, **sampling)
        yield from decode_stream(tokenizer, drawn)
    except ValueError as error:
        raise ConfigError(f"generate: {error}") from error


def decode_stream(tokenizer: Any, drawn: Iterator[Tensor]) -> Iterator[str]:
    """Decode tokens as they come; a character that spans tokens waits until it is whole.

    The whole is decoded each time: what a token reads as may depend on the one before it.
    """
    tokens: list[int] = []
    shown = ""
    for token in drawn:
        tokens.append(int(token))
        text = tokenizer.decode(tokens)
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
    yield tokenizer.decode(tokens)[len(shown) :]


SAMPLE = 600


def finish(folder: Path | str, compare: Sequence[Path] = ()) -> Path:
    """Draw a sample where there is text, and write the report."""
    folder = Path(folder)
    if (folder / "tokenizer.json").exists():
        text = "".join(generate(folder, None, SAMPLE, temperature=0.8))
        (folder / "sample.txt").write_text(text)
    return write_report(folder, compare)


def replay(folder: Path, limits: str | None = None, overrides: Sequence[str] = ()) -> Replay:
    """Decide a recorded run again, with its own limits or others.

    Raises FileNotFoundError where the run was not governed, ConfigError for unknown limits.
    """
    telemetry, journal = folder / TELEMETRY, folder / JOURNAL
    for path in (telemetry, journal):
        if not path.exists():
            raise FileNotFoundError(f"{folder} was not governed: there is no {path.name} in it")
    changed: dict[str, Any] = {}
    for assignment in overrides:
        changed = config.override(changed, assignment)
    if limits is not None:
        settings = config.build(GovernorSettings, {"limits": limits}, "--limits")
    elif not changed:
        return decide_again(rows(telemetry), rows(journal))
    else:
        settings = read_config(folder).governor
    settings = config.build(
        GovernorSettings, config.merge(config.plain(settings), changed), "limits"
    )
    return decide_again(rows(telemetry), rows(journal), settings.resolve())


def overview(runs: Path) -> Iterator[tuple[str, ...]]:
    """One row per run: name, steps, best validation loss, alarms, changes, config hash, commit."""
    for path in sorted(runs.glob("*/metrics.jsonl")):
        header, *metrics = rows(path)
        losses = [row["loss"] for row in metrics if row["split"] == "validation"]
        steps = max((row["step"] for row in metrics), default=0)
        journal = path.with_name(JOURNAL)
        kinds = [row.get("kind") for row in rows(journal)] if journal.exists() else []
        yield (
            path.parent.name, str(steps), f"{min(losses):.4f}" if losses else "-",
            str(kinds.count("alarm")) if journal.exists() else "-",
            str(kinds.count("change")) if journal.exists() else "-",
            header["header"]["config_hash"], header["header"]["commit"],
        )  # fmt: skip


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a log, header first; a half-written last line is left out."""
    for line in path.read_bytes().splitlines(keepends=True):
        if line.endswith(b"\n"):
            yield json.loads(line)
