"""What is published: figures as rows, and a page that is made of these rows alone."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from sixfold.bench.rescue import score, sensitivity
from sixfold.bench.rescue.columns import COLUMNS
from sixfold.bench.rescue.families import FAMILIES
from sixfold.bench.rescue.healthy import KINDS
from sixfold.bench.rescue.score import Quartiles, Rows, Verdict
from sixfold.record import Result

ALL, CURABLE, HEALTHY = "all failures", "curable failures", "healthy runs"
LADDER = "all rates"
COLLAPSE = "entropy collapse"
COLLAPSES = ("soft collapse", "hard collapse", "fast collapse")
GROUPS = {
    ALL: tuple(FAMILIES),
    CURABLE: tuple(name for name, family in FAMILIES.items() if family.curable),
    COLLAPSE: COLLAPSES,
}


# ---------------------------------------------------------------- rows


def figure(case: str, column: str, metric: str, unit: str, value: Quartiles) -> Result:
    """One row."""
    return Result(f"rescue: {column}", case, metric, value.median, unit, value.spread, value.count)


def share(hits: Iterable[bool]) -> Quartiles:
    """A share as a figure without spread."""
    found = list(hits)
    return Quartiles(sum(found) / len(found), 0.0, len(found))


def of_failures(case: str, column: str, judged: Sequence[Verdict]) -> list[Result]:
    """What a column made of runs that failed alone; a silent failure is to be recalled too."""
    if column == "nothing":
        return []
    found = []
    ratios = [verdict.rescue for verdict in judged if verdict.failed]
    if ratios:
        found = [
            ("rescue ratio", "1", score.quartiles(ratios)),
            ("worst rescue ratio", "1", Quartiles(min(ratios), 0.0, len(ratios))),
        ]
    wrong = [v for v in judged if v.failed or FAMILIES[v.family].silent]
    if wrong and COLUMNS[column].speaks:
        leads = [float(v.lead) for v in judged if v.failed and v.lead is not None]
        located = [v.located for v in wrong if FAMILIES[v.family].located]
        later = [v for v in wrong if FAMILIES[v.family].onset]
        found.append(("recall", "1", share(v.alarm is not None for v in wrong)))
        found.append(("given up", "1", share(v.stopped for v in wrong)))
        found.append(("actions", "1", score.quartiles([float(v.actions) for v in wrong])))
        found += [("too early", "1", share(v.early > 0 for v in later))] if later else []
        found += [("lead", "steps", score.quartiles(leads))] if leads else []
        found += [("right head", "1", share(bool(v) for v in located))] if located else []
    return [figure(case, column, *row) for row in found]


def of_family(name: str, column: str, judged: Sequence[Verdict]) -> list[Result]:
    """Final losses of a family's seeds, and what was made of those that failed."""
    if not judged:
        return []
    losses = score.quartiles([verdict.final for verdict in judged])
    rows = [figure(name, column, "final loss", "nats", losses)]
    if column == "nothing":
        twins = score.quartiles([verdict.twin for verdict in judged])
        rows.append(figure(name, "twin", "final loss", "nats", twins))
        rows.append(figure(name, column, "failed", "1", share(v.failed for v in judged)))
        events = [float(v.event) for v in judged if v.event is not None]
        if events:
            rows.append(figure(name, column, "event", "steps", score.quartiles(events)))
    return rows + of_failures(name, column, judged)


def of_healthy(rows: Rows, column: str) -> list[Result]:
    """What a column did where nothing was wrong."""
    found = []
    for kind in (None, *KINDS):
        seen = score.on_healthy(rows, column, kind)
        if seen is None or column == "nothing":
            continue
        case, count = kind or HEALTHY, seen.runs
        bound = score.upper_bound(seen.disturbed, count)
        figures = [
            ("disturbed", "1", Quartiles(seen.disturbed / count, 0.0, count)),
            ("disturbed, upper bound", "1", Quartiles(bound, 0.0, count)),
            ("false alarms", "per 1000 steps", Quartiles(seen.alarms_per_1000, 0.0, count)),
            ("harm", "nats", score.quartiles(seen.harm)),
            ("worst harm", "nats", Quartiles(max(seen.harm), 0.0, count)),
            ("same to the bit", "1", Quartiles(seen.same / count, 0.0, count)),
        ]
        found += [figure(case, column, *row) for row in figures]
    return found


def of_rates(rows: Rows, column: str) -> list[Result]:
    """Final losses over a ladder of learning rates, and how much they depend on the rate."""
    ladders = sensitivity.ladders(rows, column)
    if not ladders:
        return []
    found = [
        figure(sensitivity.named(rate), column, "final loss", "nats", score.quartiles(losses))
        for rate, losses in zip(sensitivity.LADDER, zip(*ladders, strict=True), strict=True)
    ]
    spread = score.quartiles([sensitivity.sensitivity(losses) for losses in ladders])
    return [*found, figure(LADDER, column, "sensitivity", "nats", spread)]


def results(rows: Rows, columns: Sequence[str]) -> list[Result]:
    """Every figure of these columns that the rows give."""
    found = []
    for column in dict.fromkeys(["nothing", *columns]):
        judged = score.verdicts(rows, column)
        for name in FAMILIES:
            found += of_family(name, column, [v for v in judged if v.family == name])
        for group, names in GROUPS.items():
            found += of_failures(group, column, [v for v in judged if v.family in names])
        found += of_healthy(rows, column) + of_rates(rows, column)
    return found


# ---------------------------------------------------------------- page


class Target(NamedTuple):
    """What the governor is to reach: a figure of a group, and its least or most value."""

    text: str
    case: str
    metric: str
    bound: float
    least: bool = True


TARGETS = (
    Target("recall", ALL, "recall", 0.95),
    Target("lead on entropy collapse, steps", COLLAPSE, "lead", 50),
    Target("right head named", ALL, "right head", 0.9),
    Target("rescue ratio, median", CURABLE, "rescue ratio", 0.95),
    Target("rescue ratio, worst run", CURABLE, "worst rescue ratio", 0.8),
    Target("healthy runs disturbed, bound", HEALTHY, "disturbed, upper bound", 0.01, least=False),
    Target("healthy runs equal to the bit", HEALTHY, "same to the bit", 1.0),
)  # fmt: skip
Figures = dict[tuple[str, str, str], Result]
INTRODUCTION = """\
# Rescue

Failures of small training runs, provoked on purpose, beside healthy runs in which a governor has
to keep still. Models, data and loops are plain PyTorch.

- A run has *failed* where it ends more than 0.1 nat above its healthy twin; final losses are taken
  on batches that training never sees, and count at most as the twin's or the run's own loss before
  training, a loss that is not a number as that. Rescue is scored where a run has failed.
- *Rescue ratio*: (alone - column) / (alone - twin); 1 is as good as the twin, 0 as bad as nothing.
- *Event*: the step from which the smoothed loss stays 0.1 nat above the twin's, or is not finite.
  *Lead*: event minus the first alarm above notice that names the failure. *Recall*: runs that
  failed, or hide their failure, with such an alarm. *Too early*: of runs in which something goes
  wrong later, those with an alarm before. *Given up*: the column said that going on is no use.
- *Disturbed*: a healthy run with an alarm above notice or any action; the bound is the upper end
  of a one-sided 95 % interval (Clopper-Pearson).
- *Sensitivity* to the learning rate: the reference run is trained at five rates; the mean of its
  final losses minus the best of them (Wortsman et al. 2023, section 2.2), column by column.
- Figures are medians over seeds, ± half the distance between the quartiles. ZClip, AdaGC and
  sigma-Reparam are our own, written from their papers, with the defaults given there; *halving* is
  a learning rate that is halved where the smoothed loss stands 0.1 nat above its best; *arc* is the
  package arc-training 5.2.0 with its defaults, in the loop that its page shows, and its alarms are
  the failures that it reports.
"""
ORIGIN = """
This page is made by `sixfold rescue` from `results/rescue.csv`; the governor's limits were chosen
on other seeds than those shown. Measured on:

"""


def read(path: Path) -> tuple[list[Result], list[str]]:
    """The figures of a file, and where they come from."""
    rows = list(csv.DictReader(path.read_text().splitlines()))
    found = [
        Result(
            row["experiment"], row["case"], row["metric"], float(row["value"]), row["unit"],
            float(row["spread"]), int(row["seeds"]),
        )
        for row in rows
    ]  # fmt: skip
    return found, sorted({f"{row['device']}; commit {row['commit']}" for row in rows})


def markdown(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def shown(result: Result | None, digits: int = 2) -> str:
    """A cell, empty where nothing was measured."""
    if result is None:
        return ""
    spread = f" ± {result.spread:.{digits}f}" if result.spread else ""
    return f"{result.value:.{digits}f}{spread}"


def headline(figures: Figures, columns: Sequence[str]) -> str:
    """A line for each column."""
    cells = (
        ("recall", ALL, "recall"), ("lead, steps", ALL, "lead"),
        ("too early", ALL, "too early"), ("right head", ALL, "right head"),
        ("rescue", ALL, "rescue ratio"), ("rescue, curable", CURABLE, "rescue ratio"),
        ("worst, curable", CURABLE, "worst rescue ratio"),
        ("disturbed", HEALTHY, "disturbed"), ("bound", HEALTHY, "disturbed, upper bound"),
        ("false alarms / 1,000 steps", HEALTHY, "false alarms"),
        ("worst harm, nats", HEALTHY, "worst harm"), ("same bits", HEALTHY, "same to the bit"),
    )  # fmt: skip
    head = ["column", *(title for title, _, _ in cells)]
    body = [
        [name, *(shown(figures.get((name, case, metric)), 3) for _, case, metric in cells)]
        for name in columns
        if name != "nothing"
    ]
    return markdown(head, body)


def targets(figures: Figures) -> str:
    """What the governor was to reach beside what it did."""
    body = []
    for target in TARGETS:
        row = figures.get(("governor", target.case, target.metric))
        wanted = f"{'at least' if target.least else 'at most'} {target.bound:g}"
        sign = 1 if target.least else -1
        met = row is not None and sign * row.value >= sign * target.bound
        verdict = "open" if row is None else "met" if met else "**missed**"
        body.append([target.text, wanted, shown(row, 3) or "not measured", verdict])
    return markdown(["what", "target", "measured", ""], body)


def families(figures: Figures) -> str:
    """What was provoked, and how often it failed alone."""
    body = []
    for name, family in FAMILIES.items():
        failed, event = (figures.get(("nothing", name, m)) for m in ("failed", "event"))
        if failed is not None:
            count = f"{failed.value * failed.seeds:.0f} of {failed.seeds}"
            note = "" if family.curable else "only its owner can cure it"
            body.append([name, family.about, count, shown(event, 0), note])
    return markdown(["family", "what is wrong", "failed", "event", ""], body)


def by_family(figures: Figures, columns: Sequence[str], metric: str) -> str:
    """A metric, families by columns; only what was measured."""
    names = [name for name in FAMILIES if any((c, name, metric) in figures for c in columns)]
    body = [[name, *(shown(figures.get((c, name, metric))) for c in columns)] for name in names]
    return markdown(["family", *columns], body)


def on_kinds(figures: Figures, columns: Sequence[str]) -> str:
    """Healthy runs disturbed, kinds by columns."""
    body = []
    for kind in KINDS:
        cells = [figures.get((c, kind, "disturbed")) for c in columns]
        if any(cells):
            counts = (f"{c.value * c.seeds:.0f} of {c.seeds}" if c else "" for c in cells)
            body.append([kind, *counts])
    return markdown(["kind", *columns], body)


def by_rate(figures: Figures, columns: Sequence[str]) -> str:
    """Final losses at each rate of the ladder, and the sensitivity; only what was measured."""
    cells = [(sensitivity.named(rate), "final loss") for rate in sensitivity.LADDER]
    cells.append((LADDER, "sensitivity"))
    head = ["column", *(f"{rate:g}" for rate in sensitivity.LADDER), "sensitivity"]
    climbed = [name for name in columns if (name, *cells[-1]) in figures]
    body = [[name, *(shown(figures.get((name, *cell))) for cell in cells)] for name in climbed]
    return markdown(head, body)


def page(found: Sequence[Result], origins: Sequence[str] = ()) -> str:
    """The page of these figures; where they come from is said where they are published."""
    figures = {(r.experiment.removeprefix("rescue: "), r.case, r.metric): r for r in found}
    columns = [name for name in COLUMNS if any(key[0] == name for key in figures)]
    rivals = [name for name in columns if name != "nothing"]
    speaking = [name for name in rivals if COLUMNS[name].speaks]
    parts = [
        INTRODUCTION + (ORIGIN if origins else "") + "".join(f"- {one}\n" for one in origins),
        "## Targets of the governor\n", targets(figures),
        "## All together\n", headline(figures, columns),
        "## What was provoked\n", families(figures),
        "## Final losses, nats\n", by_family(figures, ["twin", *columns], "final loss"),
        "## Rescue ratios\n", by_family(figures, rivals, "rescue ratio"),
        "## Worst seeds\n", by_family(figures, rivals, "worst rescue ratio"),
        "## Lead, steps\n", by_family(figures, speaking, "lead"),
        "## Runs given up\n", by_family(figures, speaking, "given up"),
        "## Final losses by learning rate, nats\n", by_rate(figures, columns),
        "## Healthy runs disturbed\n", on_kinds(figures, speaking),
    ]  # fmt: skip
    return "\n".join(parts)
