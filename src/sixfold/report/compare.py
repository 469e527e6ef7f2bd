"""Runs side by side: their losses in one chart, for a report or as a picture of its own."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from sixfold.report.headline import headline, metric
from sixfold.report.read import Run, read_run
from sixfold.report.scale import number, smooth, with_gaps
from sixfold.report.series import broken_marks, journal_marks
from sixfold.report.svg import FONT, LIGHT, LOOKS, Axes, Line, Mark, line_chart, style


class Final(NamedTuple):
    """One row of the table of final losses, as text."""

    label: str
    validation: str
    best: str
    steps: str
    broken: str
    changes: str


def side_by_side(runs: Sequence[tuple[str, Run]], axes: Axes) -> str:
    """Training losses of several runs as one chart, with changes and breaks in each run's colour.

    Raises ValueError for more runs than there are colours.
    """
    if len(runs) > len(LOOKS):
        raise ValueError(f"at most {len(LOOKS)} runs can be told apart in one chart: {len(runs)}")
    lines: list[Line] = []
    strong: list[Line] = []
    marks: list[Mark] = []
    for look, (label, run) in zip(LOOKS, runs, strict=False):
        points = metric(run, "loss", "train")
        window = max(1, len(points) // 50) | 1
        lines.append(Line(f"{label}, every row", with_gaps(points), look, "pale"))
        strong.append(Line(label, with_gaps(smooth(points, window)), look))
        marks += [m._replace(look=look) for m in journal_marks(run) if m.kind in ("change", "held")]
        marks += broken_marks(points, look, label)
    return line_chart(lines[::-1] + strong[::-1], marks, axes)


def finals(runs: Sequence[tuple[str, Run]]) -> list[Final]:
    """What each run came to."""
    return [_final(label, run) for label, run in runs]


def picture(
    runs: Sequence[tuple[str, str | Path]], path: str | Path, title: str = "Training loss"
) -> Path:
    """Write the side-by-side chart as one SVG file on a white card, for light and dark pages.

    `runs` are pairs of a label and a run folder.
    """
    opened = [(label, read_run(folder)) for label, folder in runs]
    if not opened:
        raise ValueError("picture needs at least one run")
    width, height = 880, 400
    axes = Axes(title, opened[0][1].unit("loss"), width=width - 48, height=height - 56)
    chart = side_by_side(opened, axes).replace("<svg ", '<svg x="24" y="20" ', 1)
    chart = chart.replace(f'style="max-width:{axes.width}px"',
                          f'width="{axes.width}" height="{axes.height}"')  # fmt: skip
    label = escape(f"{title}: {', '.join(label for label, _ in opened)}")
    path = Path(path)
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" role="img" aria-label="{label}">'
        f"<title>{label}</title><style>{style(LIGHT)}"
        f".source{{font:11px {FONT};fill:{LIGHT['muted']}}}</style>"
        f'<rect x=".5" y=".5" width="{width - 1}" height="{height - 1}" rx="12" '
        f'fill="{LIGHT["paper"]}" stroke="{LIGHT["grid"]}"/>{chart}'
        f'<text class="source" x="26" y="{height - 14}">{escape(_source(opened))}</text></svg>\n',
        encoding="utf-8",
    )
    return path


def _final(label: str, run: Run) -> Final:
    facts = headline(run)
    best = facts.best_validation
    return Final(
        label=label,
        validation=number(facts.final_validation[1]) if facts.final_validation else "not measured",
        best=f"{number(best[1])} at step {number(int(best[0]))}" if best else "none",
        steps=number(facts.last_step),
        broken=f"step {number(facts.broken_at)}" if facts.broken_at is not None else "never",
        changes=f"{number(facts.changes)}, {number(facts.held)} held" if facts.changes else "0",
    )


def _source(runs: Sequence[tuple[str, Run]]) -> str:
    """Final losses, then where the numbers come from."""
    losses = "; ".join(f"{row.label} {row.validation}" for row in finals(runs))
    header = runs[0][1].metrics.header
    origin = [f"{key} {header[key]}" for key in ("seed", "commit") if key in header]
    device = [str(header["device"])] if "device" in header else []
    return " · ".join([f"final validation loss: {losses}", *origin, *device])
