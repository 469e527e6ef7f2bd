"""The demonstration: a governed language model on real text, beside a collapse that is rescued."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

from sixfold import recipe, run
from sixfold.errors import Diverged
from sixfold.train.loop import View

Display = Callable[[str], AbstractContextManager[View]]


class Demonstration(NamedTuple):
    """What the demonstration left behind."""

    folder: Path
    report: Path
    validation: float
    alone: float
    governed: float


def final_loss(folder: Path) -> float:
    """The last validation loss in a run's metrics; NaN if it never came to one."""
    found = [
        row["loss"]
        for row in run.rows(folder / "metrics.jsonl")
        if row.get("split") == "validation"
    ]
    return found[-1] if found else float("nan")


def train(title: str, settings: recipe.RunConfig, runs: Path, view: Display) -> Path:
    """Train one run under a view of its own; a run that is destroyed is what was asked for."""
    with view(title) as now:
        try:
            folder, _ = run.train(settings, runs, now)
        except Diverged as error:
            now.say(f"{title}: {error}")
            folder = error.folder
    return folder


def demonstrate(runs: Path, view: Display, overrides: tuple[str, ...] = ()) -> Demonstration:
    """The demo's model at a destructive learning rate, alone and governed; then as it should be."""
    collapse = ("demo", "collapse")
    off = recipe.configure(collapse, None, (*overrides, "governor.mode=off", "name=collapse-alone"))
    on = recipe.configure(collapse, None, (*overrides, "name=collapse-governed"))
    alone = train("collapse, alone", off, runs, view)
    governed = train("collapse, governed", on, runs, view)
    # last, so that "last" is what people want to go on with
    main = train("demo", recipe.configure(["demo"], None, overrides), runs, view)
    report = run.finish(main, compare=(alone, governed))
    return Demonstration(main, report, final_loss(main), final_loss(alone), final_loss(governed))
