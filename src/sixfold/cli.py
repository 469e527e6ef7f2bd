"""The command ``sixfold``: parse, build, call."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from sixfold import __version__
from sixfold.errors import ConfigError, Explained, Interrupted

try:
    from cyclopts import App, Parameter
    from rich.console import Console
    from rich.table import Table
except ModuleNotFoundError as error:
    raise SystemExit(f"the command line needs {error.name}: pip install 'sixfold[cli]'") from error

app = App(
    name="sixfold",
    version=__version__,
    help="Structured attention for PyTorch, and a governor that watches and repairs a run.",
    result_action="return_value",
)
console = Console(soft_wrap=True, highlight=False)

Runs = Annotated[Path, Parameter(help="Folder that holds the runs.")]
RunName = Annotated[
    str, Parameter(help="A run's folder, its name below the runs folder, or 'last'.")
]


def find(name: str, runs: Path) -> Path:
    """The folder of a run."""
    if name == "last":
        found = sorted(path.parent for path in runs.glob("*/config.json"))
        if not found:
            raise FileNotFoundError(f"there is no run in {runs}")
        return found[-1]
    return Path(name) if Path(name).exists() else runs / name


def sources(words: tuple[str, ...]) -> tuple[list[str], Path | None, list[str]]:
    """Sort words into presets, a configuration file and overrides."""
    presets, file, overrides = [], None, []
    for word in words:
        key, equals, value = word.partition("=")
        if equals and key in ("preset", "config"):
            word, equals = value, ""
        if equals:
            overrides.append(word)
        elif Path(word).suffix in (".toml", ".json"):
            if file is not None:
                raise ConfigError(f"one configuration file at a time: {file} or {word}")
            file = Path(word)
        else:
            presets.append(word)
    return presets, file, overrides


def translated(file: Path) -> dict[str, Any]:
    """A configuration file, whichever of the known forms it has."""
    from sixfold import config
    from sixfold.compat.hamha.config import translate

    return translate(config.read(file))


@app.command
def demo(*overrides: str, runs: Runs = Path("runs")) -> None:
    """Train a governed hexagonal language model, then watch a collapse being rescued.

    Parameters
    ----------
    overrides
        section.key=value, e.g. train.steps=200.
    runs
        Folder that holds the runs.
    """
    from sixfold.demo import demonstrate
    from sixfold.report.terminal import live

    result = demonstrate(runs, live, overrides)
    console.print(f"validation loss {result.validation:.3f} nats per character on the whole split")
    console.print(
        f"provoked collapse: {result.alone:.3f} alone, {result.governed:.3f} under the governor"
    )
    console.print(f"run     {result.folder}\nreport  {result.report}")


@app.command
def train(*config: str, resume: str | None = None, runs: Runs = Path("runs")) -> None:
    """Train a model, or go on with a run that was stopped.

    Parameters
    ----------
    config
        Presets (demo, nanogpt, ...), a .toml or .json file, and section.key=value overrides.
    resume
        A run to continue: its folder, its name, or 'last'. It keeps its own configuration.
    runs
        Folder that holds the runs.
    """
    from sixfold import recipe, run
    from sixfold.report.terminal import live
    from sixfold.train.distributed import leads

    if resume is not None:
        if config:
            raise ConfigError(
                f"--resume keeps the run's own configuration; drop {' '.join(config)}"
            )
        folder = find(resume, runs)
        with live(folder.name) as view:
            outcome = run.resume(folder, view)
    else:
        presets, file, overrides = sources(config)
        settings = recipe.configure(presets, None if file is None else translated(file), overrides)
        with live(settings.name) as view:
            folder, outcome = run.train(settings, runs, view)
    if not leads():
        return
    if outcome.validation is not None:
        console.print(f"validation loss {outcome.validation.loss:.4f} after {outcome.step} steps")
    console.print(f"run     {folder}\nreport  {run.finish(folder)}")


@app.command
def generate(
    name: RunName = "last",
    *,
    prompt: str | None = None,
    tokens: int = 300,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    runs: Runs = Path("runs"),
) -> None:
    """Continue a text with a trained language model, as it is drawn."""
    from sixfold import run

    console.print(prompt or "", end="", markup=False)
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    for piece in run.generate(find(name, runs), prompt, tokens, seed=seed, **sampling):
        console.print(piece, end="", markup=False)
    console.print()


@app.command
def report(
    *names: str,
    picture: Path | None = None,
    text: bool = False,
    runs: Runs = Path("runs"),
) -> None:
    """Write the HTML report of a run; further runs are drawn beside it.

    Parameters
    ----------
    names
        Runs: folders, names, or 'last'. The first is the report's own.
    picture
        Write only the chart of the losses, as one SVG file.
    text
        Print a summary instead.
    runs
        Folder that holds the runs.
    """
    from sixfold.report import compare, html, read
    from sixfold.report import text as summaries

    folders = [find(name, runs) for name in names or ("last",)]
    if picture is not None:
        compare.picture([(folder.name, folder) for folder in folders], picture)
        console.print(str(picture))
    elif text:
        for folder in folders:
            console.print(summaries.summary(read.read_run(folder)), markup=False)
    else:
        console.print(str(html.write_report(folders[0], folders[1:])))


@app.command
def replay(
    name: RunName = "last", *overrides: str, limits: str | None = None, runs: Runs = Path("runs")
) -> None:
    """Decide a recorded run again: what would the governor have done?

    Parameters
    ----------
    name
        A run's folder, its name below the runs folder, or 'last'.
    overrides
        Other limits, e.g. alarms.logit_critical=80.
    limits
        A preset of limits: default, seed or sagemaker. Without it, those of the run.
    runs
        Folder that holds the runs.
    """
    from sixfold import run

    result = run.replay(find(name, runs), limits, overrides)
    for row in result.rows:
        console.print(f"step {row['step']:>6}  {row['text']}", markup=False)
    if result.differs is None:
        console.print(f"{result.snapshots} samples: the same actions as in the run")
    else:
        console.print(
            f"step {result.differs}: here it would have acted otherwise; what follows in the "
            "record answers another action, so the replay ends"
        )


@app.command
def telemetry(name: RunName = "last", *, runs: Runs = Path("runs")) -> None:
    """Write a run's telemetry as Parquet, for pandas or DuckDB.

    Parameters
    ----------
    name
        A run's folder, its name below the runs folder, or 'last'.
    runs
        Folder that holds the runs.
    """
    from sixfold.report.telemetry import compact

    found = compact(find(name, runs))
    for line in (*found.notes, found.signals, found.scalars):
        console.print(str(line), markup=False)


@app.command
def rescue(
    *,
    column: tuple[str, ...] = (),
    family: tuple[str, ...] = (),
    seeds: str = "tuning",
    jobs: int = 1,
    smoke: bool = False,
    publish: bool = False,
    runs: Runs = Path("runs"),
) -> None:
    """Provoke failures of training on purpose: what does the governor save, and what do others?

    Finished runs are kept, so that a benchmark that was stopped goes on where it was.

    Parameters
    ----------
    column
        What is put against the failures, e.g. governor or zclip; all of them without it.
    family
        Which failures, and "healthy" for the runs that must be left alone; all of them without it.
    seeds
        "tuning", by which limits may be chosen, or "reporting".
    jobs
        Processes, each on one thread.
    smoke
        A few steps of a few runs, to see that everything works.
    publish
        Write results/rescue.csv and docs/rescue.md; whole families on the reporting seeds only.
    runs
        Folder that holds the runs.
    """
    from sixfold.bench.rescue.run import rescue as compare

    where = Path() if publish else None
    found = compare(
        column, family, seeds=seeds, jobs=jobs, runs=runs / "rescue", small=smoke, publish=where
    )
    console.print(found, markup=False)


@app.command
def runs(*, runs: Runs = Path("runs")) -> None:
    """List the runs and compare how they ended."""
    from sixfold import run

    table = Table("run", "steps", "validation", "alarms", "changes", "config", "commit")
    for row in run.overview(runs):
        table.add_row(*row)
    console.print(table)


@app.command
def doctor() -> None:
    """Show what this machine has: versions, devices, extras, data sets."""
    from sixfold import doctor as machine

    for name, state in machine.diagnosis():
        console.print(f"{name:<24} {state}", markup=False)


def main(words: list[str] | None = None) -> None:
    """Run the command line; expected errors are one sentence and an exit code."""
    sys.exit(guarded(lambda: app(words, exit_on_error=True)))


def guarded(call: Callable[[], object]) -> int:
    """Run a command: 0 when it worked, 1 for an error, 130 when the user stopped it."""
    try:
        call()
    except Interrupted as stop:
        console.print(str(stop), markup=False)
        return 130
    except KeyboardInterrupt:
        console.print("stopped")
        return 130
    except (Explained, OSError, ModuleNotFoundError) as error:
        text = error.args[-1] if isinstance(error, OSError) and len(error.args) == 2 else error
        Console(stderr=True, soft_wrap=True).print(
            f"sixfold: {text}", markup=False, highlight=False
        )
        return 1
    return 0
