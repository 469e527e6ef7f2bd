"""Does the shape of the head graph matter? nanoGPT's CPU recipe, one mixer after another.

Rows go to results/mixing.csv: full-validation loss of tiny Shakespeare after 2,000 steps, mean over
seeds and half width of its 95 % interval. Nineteen heads of width 8 (a grid of radius 2), the same
steps and data for all. Parameters stand in the rows: the cases of nineteen heads differ among
themselves by less than 0.3 %; "plain, 4 heads", the recipe as published, has 6 % fewer than they. Resumable: finished runs in the runs folder are not trained again.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import NamedTuple

from sixfold import config, recipe, record, run
from sixfold.governor.sandbox import interval
from sixfold.record import Provenance, Result, publish

RESULTS = Path(__file__).parents[1] / "results" / "mixing.csv"
MIXERS = ("none", "ring", "random", "dense", "hexagonal", "hexagonal_logits")
OFF = (
    "governor.mode=off",
    "train.device=cpu",
    "train.validate_every=2000",
    "train.checkpoint_every=2000",
)


class Trained(NamedTuple):
    """What a finished run came to."""

    loss: float
    parameters: int
    commit: str


def cases() -> dict[str, tuple[str, ...]]:
    """Name of a case to its overrides."""
    heads = ("attention.num_heads=19", "attention.head_dim=8")
    found = {"plain, 4 heads": ()}
    both = "attention.mixer={name='hexagonal_logits', outputs=true}"
    return (
        found
        | {f"{mixer}, 19 heads": (*heads, f"attention.mixer={mixer}") for mixer in MIXERS}
        | {"hexagonal logits and outputs, 19 heads": (*heads, both)}
    )


def loss_of(case: str, overrides: tuple[str, ...], seed: int, runs: Path) -> Trained:
    """One run, trained unless it is there."""
    name = f"{case.replace(', ', '-').replace(' ', '')}-seed{seed}"
    done = [f for f in runs.glob(f"*-{name}") if (f / "checkpoints").exists()]
    if done:
        folder = done[0]
    else:
        settings = recipe.configure(
            ["nanogpt"], None, (*OFF, *overrides, f"train.seed={seed}", f"name={name}")
        )
        folder, _ = run.train(settings, runs)
    rows = [row for row in run.rows(folder / "metrics.jsonl") if row.get("split") == "validation"]
    facts = json.loads((folder / "environment.json").read_text())
    return Trained(rows[-1]["loss"], facts["parameters"], facts["commit"])


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--runs", type=Path, default=Path("runs/mixing"))
    arguments.add_argument("--seeds", type=int, default=3)
    arguments.add_argument("--only", nargs="*", help="cases by name; all of them without it")
    given = arguments.parse_args()
    settings = record.config_hash(config.plain(recipe.configure(["nanogpt"])))
    for case, overrides in cases().items():
        if given.only is not None and case not in given.only:
            continue
        found = [loss_of(case, overrides, seed, given.runs) for seed in range(given.seeds)]
        losses = [trained.loss for trained in found]
        low, high = interval(losses)
        mean, half, size = statistics.fmean(losses), (high - low) / 2, found[0].parameters
        print(f"{case:<22} {mean:.4f} ± {half:.4f}  {losses}  {size:,} parameters", flush=True)
        rows = [
            Result("mixing", case, "validation loss", mean, "nats/char", half, given.seeds),
            Result("mixing", case, "parameters", float(size), "1", 0.0, given.seeds),
        ]
        publish(RESULTS, rows, Provenance(record.device_name(), found[0].commit, settings))


if __name__ == "__main__":
    main()
