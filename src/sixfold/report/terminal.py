"""A training run in the terminal: one line that moves, and the governor's words above it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from sixfold.train.loop import Progress as Now
from sixfold.train.loop import View


@contextmanager
def live(title: str, console: Console | None = None) -> Iterator[View]:
    """A progress bar with loss, targets per second and time left, for as long as it is open.

    Where the output is no terminal it prints a line every tenth of the run instead.
    """
    console = Console(stderr=True) if console is None else console
    if not console.is_terminal:
        yield plain(title, console)
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}  validation {task.fields[validation]}"),
        TextColumn("{task.fields[speed]}/s"),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, refresh_per_second=4) as bar:
        fields = {"loss": "-", "validation": "-", "speed": "-"}
        task = bar.add_task(title, total=None, **fields)

        def step(now: Now) -> None:
            fields["loss"], fields["speed"] = f"{now.loss:.3f}", f"{now.tokens_per_s:,.0f}"
            if now.validation is not None:
                fields["validation"] = f"{now.validation:.3f}"
            bar.update(task, completed=now.step, total=now.steps, **fields)

        yield View(step, lambda text: bar.console.print(text, markup=False, highlight=False))


def plain(title: str, console: Console) -> View:
    """The same without a terminal: ten lines in all."""

    def step(now: Now) -> None:
        if now.step % max(1, now.steps // 10) == 0 or now.step == now.steps:
            validation = "" if now.validation is None else f"  validation {now.validation:.3f}"
            console.print(
                f"{title}  step {now.step}/{now.steps}  loss {now.loss:.3f}{validation}  "
                f"{now.tokens_per_s:,.0f}/s",
                markup=False, highlight=False,
            )  # fmt: skip

    return View(step, lambda text: console.print(text, markup=False, highlight=False))
