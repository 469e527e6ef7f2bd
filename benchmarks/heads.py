"""How should heads talk? Seven mixers on three tasks, at equal parameters, steps and care.

Rows go to results/heads.csv: mean over seeds and half width of its 95 % interval, and each mixer's
difference from "none" on the same seeds. Nineteen heads of 8 (a grid of radius 2), two layers of width
32; "none, 4 heads of 32" is a plain layer with few wide heads. What a mixer adds is taken out of the
feed-forward layers: parameters agree within 1 %.
Tasks: which block of letters holds the two that are given ("failed" is the share of blocks with a
letter wrong; a model that uses the question but finds no block fails 0.97); multi-query associative
recall of two pairs ("steps" is how many it takes until at most 0.02 of the answers are wrong, looked at
every 50; a model that finds values but no keys is wrong in 0.25); the next character of tiny Shakespeare.
A mixer's learning rate on a task is the one of a few that ends lowest on a validation set, on a
seed that is not reported; what is reported was measured on other sequences (of Shakespeare, one half
of the validation split picks, the other is reported). "None" alone chose the sizes of the tasks.
Resumable: finished runs are kept in the runs folder, and made seed by seed over all mixers.
With --cost: time of a layer's forward and backward over that of a layer without mixing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timing import interleaved, ratio
from torch import nn
from torch.nn.functional import cross_entropy
from trials import remembered, row

from sixfold import MultiHeadAttention, models, record
from sixfold.contracts import Dataset
from sixfold.data import associative_recall, block_finding, shakespeare
from sixfold.data._questions import IGNORED
from sixfold.models import language
from sixfold.record import Provenance, Result, publish
from sixfold.train.objective import loss
from sixfold.train.optimizer import OptimizerSettings, build_optimizer, set_rate

RESULTS = Path(__file__).parents[1] / "results" / "heads.csv"
PICK = 99
"""The seed that picks learning rates."""
WIDTH, LAYERS, HIDDEN = 32, 2, 128
NARROW = {"num_heads": 19, "head_dim": 8}
CASES: dict[str, dict[str, Any]] = {
    "none": NARROW,
    "ring": {**NARROW, "mixer": "ring"},
    "random": {**NARROW, "mixer": "random"},
    "dense": {**NARROW, "mixer": "dense"},
    "hexagonal": {**NARROW, "mixer": "hexagonal"},
    "hexagonal_logits": {**NARROW, "mixer": "hexagonal_logits"},
    "spectral": {**NARROW, "mixer": "spectral"},
    "none, 4 heads of 32": {"num_heads": 4, "head_dim": 32},
}
SHAPES = ((12, 64, 64, 19, 8), (4, 256, 256, 19, 16))


class Task(NamedTuple):
    """What is learned, and for how long; where `enough` is given, until no more answers are wrong."""

    build: Callable[..., Dataset]
    options: dict[str, Any]
    steps: int
    batch: int
    rates: tuple[float, ...]
    seeds: int
    enough: float | None = None

    def sets(self) -> tuple[Dataset, Dataset]:
        """The data, and data of the same rule whose validation set is the one that is reported."""
        data = self.build(**self.options)
        if self.build is shakespeare.build:
            first, second = data.validation.chunk(2)
            return replace(data, validation=first), replace(data, validation=second)
        return data, self.build(**self.options, seed=1)


TASKS = {
    "block finding": Task(
        block_finding.build, {"letters": 8, "block": 3, "query": 2, "blocks": 3},
        2000, 16, (4e-3, 8e-3), 5,
    ),
    "associative recall": Task(
        associative_recall.build, {"vocab_size": 16, "pairs": 2, "length": 8, "power": 1.0},
        2400, 32, (4e-3, 8e-3), 10, 0.02,
    ),
    "language model": Task(shakespeare.build, {"context": 64}, 600, 8, (4e-3, 8e-3, 16e-3), 3),
}  # fmt: skip
METRICS = {
    "block finding": {"loss": "nats/letter", "failed": "1"},
    "associative recall": {"steps": "1", "wrong": "1"},
    "language model": {"loss": "nats/char"},
}
"""What is reported of a task, and its units; the first picks the learning rate."""
LOOK = 50
"""Steps from one look at a validation set to the next, where it ends a run."""


def fresh(case: str, data: Dataset) -> nn.Module:
    """A model of the case, its feed-forward layers as wide as the parameters of "none" allow."""

    def made(case: str, hidden: int) -> nn.Module:
        sizes = (data.vocab_size, data.context, WIDTH, LAYERS)
        return language.build(*sizes, CASES[case], mlp_ratio=hidden / WIDTH)

    target, own = (models.parameters(made(name, HIDDEN)) for name in ("none", case))
    return made(case, HIDDEN + round((target - own) / (2 * WIDTH * LAYERS)))


@torch.no_grad()
def measured(model: nn.Module, data: Dataset) -> dict[str, float]:
    """Loss per target, and the shares of answers and of whole sequences that are wrong."""
    total = targets = wrong = failed = sequences = 0
    for batch in data.validation_batches(256):
        logits, told = model(batch.inputs), batch.targets != IGNORED
        misses = (logits.argmax(-1) != batch.targets) & told
        total += float(
            cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="sum")
        )
        targets, wrong = targets + int(told.sum()), wrong + int(misses.sum())
        failed, sequences = failed + int(misses.any(1).sum()), sequences + len(misses)
    return {"loss": total / targets, "wrong": wrong / targets, "failed": failed / sequences}


def trained(task: Task, case: str, rate: float, seed: int) -> dict[str, float]:
    """What a run came to, and its parameters; the seed that picks sees one set, the others another."""
    picks, reports = task.sets()
    torch.manual_seed(seed)
    model = fresh(case, picks)
    rates = OptimizerSettings(rate, rate / 10, warmup=task.steps // 10)
    optimizer = build_optimizer(model, rates)
    for step in range(task.steps):
        set_rate(optimizer, rates.rate(step, task.steps))
        value = loss("tokens", model, picks.train_batch(seed, step, task.batch))
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        looks = task.enough is not None and (step + 1) % LOOK == 0
        if looks and measured(model, picks)["wrong"] <= task.enough:
            break
    found = measured(model, picks if seed == PICK else reports)
    return {**found, "steps": step + 1, "parameters": models.parameters(model)}


def settings(name: str) -> str:
    """What a task and its models are made of, as a hash."""
    task = TASKS[name]._replace(build=name)
    return record.config_hash({"task": task, "sizes": [WIDTH, LAYERS, HIDDEN], "cases": CASES})


class Runs(NamedTuple):
    """Finished runs, and those that have yet to be made."""

    folder: Path

    def run(self, name: str, case: str, rate: float, seed: int) -> dict[str, float]:
        """A run, trained unless it is there."""
        return remembered(
            self.folder / settings(name),
            f"{name}-{case}-rate{rate}-seed{seed}",
            lambda: trained(TASKS[name], case, rate, seed),
        )

    def rate(self, name: str, case: str) -> float:
        """The learning rate of a case."""
        first = next(iter(METRICS[name]))
        return min(TASKS[name].rates, key=lambda rate: self.run(name, case, rate, PICK)[first])

    def seeds(self, name: str, case: str) -> list[dict[str, float]]:
        """The runs that are reported."""
        rate = self.rate(name, case)
        return [self.run(name, case, rate, seed) for seed in range(TASKS[name].seeds)]


def rows_of(runs: Runs, name: str, case: str) -> list[Result]:
    """Rows of one mixer on one task."""
    found, plain = runs.seeds(name, case), runs.seeds(name, "none")
    rows = []
    for metric, unit in METRICS[name].items():
        values, base = ([run[metric] for run in seeds] for seeds in (found, plain))
        rows.append(replace(row(name, case, metric, values), unit=unit))
        if case != "none":
            apart = [value - other for value, other in zip(values, base, strict=True)]
            rows.append(replace(row(name, case, f"{metric} above none", apart), unit=unit))
    rate, size = runs.rate(name, case), found[0]["parameters"]
    rows.append(Result(name, case, "learning rate", rate, "1", 0.0, len(found)))
    rows.append(Result(name, case, "parameters", size, "1", 0.0, len(found)))
    return rows


def costs(rounds: int) -> list[Result]:
    """Forward and backward of one layer, mixed over not mixed, taken in turn."""
    rows = []
    for batch, length, d_model, num_heads, head_dim in SHAPES:
        x = torch.randn(batch, length, d_model, requires_grad=True)
        layers = {
            case: MultiHeadAttention(
                d_model, **{**options, "num_heads": num_heads, "head_dim": head_dim}
            )
            for case, options in CASES.items()
            if options["num_heads"] == num_heads
        }
        calls = {
            case: lambda layer=layer, x=x: layer(x, is_causal=True).sum().backward()
            for case, layer in layers.items()
        }
        times = interleaved(calls, rounds)
        shape = f"b{batch} n{length} d{d_model} h{num_heads}x{head_dim}"
        for case in list(layers)[1:]:
            value, spread = ratio(times[case], times["none"])
            rows.append(
                Result("layer forward+backward", shape, f"{case} / none", value, "1", spread, 1)
            )
    return rows


def origin(settings: str) -> Provenance:
    """Where the rows of these settings come from."""
    return Provenance(record.device_name(), record.commit(), settings)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--runs", type=Path, default=Path("runs/heads"))
    arguments.add_argument("--only", nargs="*", default=list(TASKS), help="tasks by name")
    arguments.add_argument("--cost", action="store_true", help="times, not losses")
    arguments.add_argument("--rounds", type=int, default=60)
    given = arguments.parse_args()
    if given.cost:
        publish(RESULTS, costs(given.rounds), origin(record.config_hash({"shapes": SHAPES})))
        return
    runs = Runs(given.runs)
    for name in given.only:
        for case in CASES:
            print(f"{name:<20} {case:<20} rate {runs.rate(name, case)}", flush=True)
    # seed by seed, so that what is there at any time is a fair comparison
    for seed in range(max(TASKS[name].seeds for name in given.only)):
        for name in given.only:
            for case in CASES if seed < TASKS[name].seeds else ():
                runs.run(name, case, runs.rate(name, case), seed)
    for name in given.only:
        for case in CASES:
            rows = rows_of(runs, name, case)
            print(
                f"{name:<20} {case:<20}",
                *(f"{r.metric} {r.value:.4g} ± {r.spread:.2g};" for r in rows),
                flush=True,
            )
            publish(RESULTS, rows, origin(settings(name)))


if __name__ == "__main__":
    main()
