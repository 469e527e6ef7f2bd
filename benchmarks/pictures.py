"""Draws the README's two pictures from runs made here. Run: make pictures.

docs/pictures/rescue.svg: the demo's model at a destructive learning rate, alone and governed.
docs/pictures/healthy.svg: the demo's first 300 steps, governed and not; their losses are compared
bit by bit before the picture is drawn.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from sixfold import recipe, run
from sixfold.report.compare import picture
from sixfold.report.terminal import live

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
SHORT = ("train.steps=300", "train.validate_every=300", "train.device=cpu")


def trained(title: str, presets: list[str], runs: Path, *overrides: str) -> Path:
    """Folder of a run, shown while it trains."""
    settings = recipe.configure(presets, None, (*overrides, "train.device=cpu"))
    with live(title) as view:
        return run.train(settings, runs, view)[0]


def losses(folder: Path) -> list[float]:
    """Training losses in order."""
    return [
        row["loss"] for row in run.rows(folder / "metrics.jsonl") if row.get("split") == "train"
    ]


def main() -> None:
    PICTURES.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        runs, off = Path(folder), "governor.mode=off"
        alone = trained("collapse, alone", ["demo", "collapse"], runs, off)
        governed = trained("collapse, governed", ["demo", "collapse"], runs)
        picture(
            [("alone", alone), ("governed", governed)],
            PICTURES / "rescue.svg",
            "Training loss at a destructive learning rate",
        )
        alone = trained("healthy, alone", ["demo"], runs, off, *SHORT)
        governed = trained("healthy, governed", ["demo"], runs, *SHORT)
        if losses(alone) != losses(governed):
            raise SystemExit(
                "the governor changed a healthy run: that is a bug, no picture is drawn"
            )
        picture(
            [("alone", alone), ("governed: the same to the last bit", governed)],
            PICTURES / "healthy.svg",
            "Training loss of a healthy run",
        )
    print(*sorted(PICTURES.glob("*.svg")), sep="\n")


if __name__ == "__main__":
    main()
