"""The rescue benchmark as a whole: which runs, under which columns, and what is published."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from sixfold import record
from sixfold.bench.rescue import score, sensitivity, table
from sixfold.bench.rescue.columns import COLUMNS, missing
from sixfold.bench.rescue.families import FAMILIES, TWINS
from sixfold.bench.rescue.healthy import healthy
from sixfold.bench.rescue.trial import Case, Row, conduct_all
from sixfold.discover import unknown
from sixfold.errors import ConfigError
from sixfold.record import Provenance, Result

SEEDS = {"tuning": range(5), "reporting": range(100, 105)}
"""What limits may be chosen by, and what is reported: never the same."""
SMOKE, SMOKE_STEPS = ("fast collapse", "exploding", "rates"), 20
SMOKE_HEALTHY = ("copy 0", "digits 0")
BESIDE = ("healthy", "rates")
"""What is run beside the families, and is named like them."""


def chosen(what: str, names: Sequence[str], allowed: Sequence[str]) -> list[str]:
    """`names`, or all that are allowed where there are none.

    Raises ConfigError listing what is allowed.
    """
    for name in names:
        if name not in allowed:
            raise ConfigError(unknown(f"rescue {what}", name, allowed))
    return list(names or allowed)


def present(columns: Sequence[str]) -> list[str]:
    """`columns`, or all that can be run here where there are none.

    Raises ConfigError for a column that is not known, and for one whose package is not installed.
    """
    absent = missing()
    for name in columns:
        if name in absent:
            raise ConfigError(
                f"rescue column {name!r} needs a package that is not installed: "
                f"pip install {absent[name]!r}"
            )
    return [name for name in chosen("column", columns, list(COLUMNS)) if name not in absent]


def failing(columns: Sequence[str], families: Sequence[str], seeds: Sequence[int]) -> list[Case]:
    """Families under columns, and with nothing beside their twins."""
    cases = []
    for seed in seeds:
        for name in families:
            arm = FAMILIES[name].run(seed)
            twin = FAMILIES[name].twin
            cases.append(Case(twin, "nothing", seed, TWINS[twin]))
            for column in dict.fromkeys(["nothing", *columns]):
                recipe = COLUMNS[column].recipe(arm)
                if recipe is not None:
                    cases.append(Case(name, column, seed, recipe))
    return list(dict.fromkeys(cases))


def suspicious(columns: Sequence[str], seed: int) -> list[Case]:
    """Every healthy run under columns, and with nothing."""
    cases = []
    for name, arm in healthy(seed).items():
        for column in dict.fromkeys(["nothing", *columns]):
            recipe = COLUMNS[column].recipe(arm)
            if recipe is not None:
                cases.append(Case(name, column, seed, recipe))
    return cases


def smoke(cases: Sequence[Case]) -> list[Case]:
    """The same, a few steps each."""
    return [replace(c, arm=replace(c.arm, steps=SMOKE_STEPS, resumed=0)) for c in cases]


def planned(
    columns: Sequence[str], families: Sequence[str], seeds: Sequence[int], *, small: bool
) -> list[Case]:
    """What is to be run; healthy runs on the first seed only, and few of them where `small`."""
    cases = failing(columns, [name for name in families if name in FAMILIES], seeds)
    if "rates" in families:
        cases += sensitivity.climbing(columns, seeds)
    if "healthy" in families:
        cases += suspicious(columns, seeds[0])
    elif small:
        cases += [case for case in suspicious(columns, seeds[0]) if case.name in SMOKE_HEALTHY]
    return smoke(cases) if small else cases


@contextmanager
def progress(total: int, left_out: Mapping[str, str]) -> Iterator[Callable[[str], None]]:
    """A bar on a terminal; elsewhere a line every tenth of the way. First, what is not here."""
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the rescue benchmark shows its progress with {error.name}: pip install 'sixfold[cli]'"
        ) from error
    console, done = Console(stderr=True), 0
    for name, package in left_out.items():
        said = f"rescue  {name} is left out: {package} is not installed"
        console.print(said, markup=False, highlight=False)

    def line(name: str) -> None:
        nonlocal done
        done += 1
        if done % max(1, total // 10) == 0:
            console.print(f"rescue  {done}/{total} runs  {name}", markup=False, highlight=False)

    if not console.is_terminal:
        yield line
        return
    with Progress(console=console) as bar:
        task = bar.add_task("rescue", total=total)
        yield lambda name: bar.update(task, advance=1, description=f"rescue: {name}")


def rescue(
    columns: Sequence[str] = (),
    families: Sequence[str] = (),
    *,
    seeds: str = "tuning",
    jobs: int = 1,
    runs: Path = Path("runs/rescue"),
    small: bool = False,
    publish: Path | None = None,
) -> str:
    """Run the benchmark, or what is left of it, and return its tables as Markdown.

    Args:
        columns: keys of `COLUMNS`; all that are installed if none is given.
        families: keys of `FAMILIES`, "healthy" and "rates"; all of them if none is given.
        seeds: "tuning" or "reporting".
        jobs: processes, each on one thread.
        runs: folder of the rows.
        small: a few steps of a few runs, to see that everything works.
        publish: folder in which ``results/rescue.csv`` and ``docs/rescue.md`` are written.

    Raises:
        ConfigError: for a name that is not known, a column that is not installed, less than one
            job, or publishing a part, or what limits were chosen by.
    """
    if publish is not None and (small or families or seeds == "tuning"):
        raise ConfigError("only all families on the reporting seeds are published")
    chosen("seeds", [seeds], list(SEEDS))
    names = present(columns)
    families = chosen("family", families or SMOKE * small, [*FAMILIES, *BESIDE])
    numbers = list(SEEDS[seeds])[: 1 if small else None]
    cases = planned(names, families, numbers, small=small)
    runs = runs / "smoke" if small else runs
    with progress(len(cases), {} if columns else missing()) as tell:
        rows = conduct_all(runs / seeds, cases, jobs, tell)
    found = table.results(score.by_key(rows), names)
    if publish is None:
        return table.page(found)
    return published(publish, found, rows)


def published(root: Path, found: list[Result], rows: Sequence[Row]) -> str:
    """Write the figures, and the page from all the figures there are."""
    path = root / "results" / "rescue.csv"
    configs = {"rows": sorted(row["config"] for row in rows)}
    record.publish(
        path, found, Provenance(record.device_name(), record.commit(), record.config_hash(configs))
    )
    text = table.page(*table.read(path))
    (root / "docs" / "rescue.md").write_text(text)
    return text
