"""Sensor fusion: which score finds precision weighting, the answer that Bayes gives?

Rows go to results/denoise.csv: squared error over that of the exact posterior mean (1 is perfect) on
2,048 sequences, mean over seeds and half width of its 95 % interval. A token is a reading and its
sensor's deviation, told as its logarithm or plainly; four hidden values are read in turn, eight times
each. A model answers at every token with the value it measured, and is trained on the values alone.
"beyond" are sensors three times quieter and louder than any in training, "early" is after a quarter of
the steps.
One block of width 32, four heads of 8, the same steps, data and learning rate for all, parameters equal
within 1 %: two beliefs per token are paid for by a narrower feed-forward, one (tied) costs nothing.
"mean" weighs the readings of a value equally. Resumable: finished seeds are kept in the runs folder.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from trials import remembered, row, train

from sixfold import models, record
from sixfold.contracts import Batch
from sixfold.data import fusion
from sixfold.models._block import blocks
from sixfold.record import Provenance, publish
from sixfold.train.optimizer import OptimizerSettings

RESULTS = Path(__file__).parents[1] / "results" / "denoise.csv"
VALUES, ROUNDS, WIDTH, HEADS = 4, 8, 32, 4
STEPS, BATCH, TEST = 400, 64, 2048
TRAINED, BEYOND = (0.1, 3.0), (0.1 / 3, 9.0)
RATES = OptimizerSettings(learning_rate=5e-3, final_learning_rate=1e-4, warmup=50, weight_decay=0.0)
TOLD = ("log deviation", "deviation", "nothing")
POINTS = ("dot", "cosine", "l2_squared")
BELIEFS = ("kl_diagonal", "jeffreys", "wasserstein2")


class Fuser(nn.Module):
    """Readings (b, n, 2) to an answer at every token, (b, n)."""

    def __init__(self, attention: dict[str, Any], mlp_ratio: float, told: str) -> None:
        super().__init__()
        self.told = told
        self.embed = nn.Linear(2, WIDTH)
        self.measured = nn.Parameter(torch.randn(VALUES, WIDTH))
        self.blocks = blocks(1, WIDTH, {"num_heads": HEADS, **attention}, mlp_ratio, dropout=0.0)
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, readings: Tensor) -> Tensor:
        x = self.embed(told(readings, self.told)) + self.measured.repeat(ROUNDS, 1)
        for block in self.blocks:
            x = block(x)
        return self.head(x)[..., 0]


def told(readings: Tensor, how: str) -> Tensor:
    """Readings (b, n, 2) with the deviation as a model is told it."""
    reading, log_deviation = readings.unbind(-1)
    ways = {
        "log deviation": log_deviation,
        "deviation": log_deviation.exp(),
        "nothing": torch.zeros_like(reading),
    }
    return torch.stack([reading, ways[how]], dim=-1)


def cases() -> dict[str, tuple[dict[str, Any], float]]:
    """Name of a case to its options of attention and the width of its feed-forward."""
    found: dict[str, tuple[dict[str, Any], float]] = {
        name: ({"score": name}, 4.0) for name in POINTS
    }
    for name in BELIEFS:
        found[name] = ({"score": name, "projection": "gaussian_diagonal"}, 3.0)
    tied = {"name": "gaussian_diagonal", "tied": True}
    found["kl_diagonal, tied"] = ({"score": "kl_diagonal", "projection": tied}, 4.0)
    return found


def readings(seed: int, step: int, count: int, noise: tuple[float, float]) -> fusion.Measured:
    """Sequences that depend on (seed, step) alone, float32."""
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(step,)))
    quietest, loudest = noise
    found = fusion.draw(
        rng, count, values=VALUES, rounds=ROUNDS, quietest=quietest, loudest=loudest
    )
    return fusion.Measured(*(x.float() for x in found))


def tests() -> dict[str, fusion.Measured]:
    """The sequences that all answers are measured on, by metric."""
    seed = 2**32  # no seed of training
    return {
        "error / oracle": readings(seed, 0, TEST, TRAINED),
        "error / oracle, beyond": readings(seed, 1, TEST, BEYOND),
    }


def error(answer: Tensor, test: fusion.Measured) -> float:
    """Squared error of an answer over that of the posterior mean."""
    oracle = fusion.posterior(test.readings.double(), VALUES)[..., 0]
    errors = ((x.double() - test.hidden).square().mean() for x in (answer, oracle))
    return float(next(errors) / next(errors))


def equal_weights(test: fusion.Measured) -> Tensor:
    """The mean of a value's readings, shrunk by the one factor that suits `test` best."""
    mean = test.readings[..., 0].unflatten(-1, (ROUNDS, VALUES)).mean(-2).repeat(1, ROUNDS)
    return mean * (mean * test.hidden).mean() / mean.square().mean()


def trained(case: str, how: str, seed: int, steps: int) -> dict[str, float]:
    """Errors of one seed, and how many parameters it had."""
    attention, mlp_ratio = cases()[case]
    torch.manual_seed(seed)
    model, found = Fuser(attention, mlp_ratio, how), {}

    @torch.no_grad()
    def look(step: int) -> None:
        for name, test in tests().items() if step + 1 == steps else ():
            found[name] = error(model(test.readings), test)
        if 4 * (step + 1) == steps:
            name, test = next(iter(tests().items()))
            found[f"{name}, early"] = error(model(test.readings), test)

    train(model, lambda step: Batch(*readings(seed, step, BATCH, TRAINED)), RATES, steps, look)
    return found | {"parameters": models.parameters(model)}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--runs", type=Path, default=Path("runs/denoise"))
    arguments.add_argument("--seeds", type=int, default=5)
    arguments.add_argument("--steps", type=int, default=STEPS)
    arguments.add_argument("--only", nargs="*", help="cases by name; all of them without it")
    given = arguments.parse_args()
    settings = record.config_hash(
        {"steps": given.steps, "batch": BATCH, "rates": asdict(RATES), "noise": [TRAINED, BEYOND]}
    )
    origin = Provenance(record.device_name(), record.commit(), settings)
    baseline = [
        row("denoising", "mean", name, [error(equal_weights(test), test)])
        for name, test in tests().items()
    ]
    publish(RESULTS, baseline, origin)
    chosen = [(case, how) for how in TOLD[:2] for case in cases()] + [("dot", "nothing")]
    for case, how in chosen:
        if given.only is not None and case not in given.only:
            continue
        name = f"{case}, told {how}"
        found = [
            remembered(
                given.runs / settings, f"{name}-{seed}",
                lambda seed=seed, case=case, how=how: trained(case, how, seed, given.steps),
            )
            for seed in range(given.seeds)
        ]  # fmt: skip
        rows = [row("denoising", name, metric, [f[metric] for f in found]) for metric in found[0]]
        print(f"{name:<40}", *(f"{r.value:9.4g} ± {r.spread:<7.3g}" for r in rows), flush=True)
        publish(RESULTS, rows, origin)


if __name__ == "__main__":
    main()
