"""Time of what Sixfold adds, as ratios to what a user would write instead. Run: make bench.

Rows go to results/speed.csv: the hexagonal layer beside the plain layer with the same heads, the
training loop beside a bare PyTorch loop, governed and not, and the import of sixfold beside torch.
Every ratio is the median over interleaved pairs in one process; its spread is half the distance
between the quartiles.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from itertools import count
from pathlib import Path

import torch
from timing import interleaved, ratio, typical
from torch.nn.functional import cross_entropy

from sixfold import LeadMetaArchitect, MultiHeadAttention, config, recipe, record
from sixfold.record import Log, Provenance, Result, publish
from sixfold.train.loop import Training, advance
from sixfold.train.optimizer import build_optimizer

RESULTS = Path(__file__).parents[1] / "results" / "speed.csv"
LAYERS = (
    (12, 64, 128, 7, 16),
    (12, 64, 128, 19, 8),
    (4, 128, 512, 19, 64),
    (8, 256, 256, 7, 64),
    (4, 512, 512, 7, 72),
)


def layer_rows(rounds: int) -> list[Result]:
    """Forward and backward of one layer, hexagonal over plain."""
    rows = []
    for batch, length, d_model, num_heads, head_dim in LAYERS:
        x = torch.randn(batch, length, d_model, requires_grad=True)

        def call(layer: MultiHeadAttention, x: torch.Tensor = x) -> None:
            layer(x, is_causal=True).sum().backward()

        sizes = {"d_model": d_model, "num_heads": num_heads, "head_dim": head_dim}
        layers = {
            "plain": MultiHeadAttention(**sizes),
            "hexagonal mixer": MultiHeadAttention(**sizes, mixer="hexagonal"),
            "coordinate projection": MultiHeadAttention(**sizes, projection="coordinate"),
            "hexagonal layer": MultiHeadAttention(
                **sizes, projection="coordinate", mixer="hexagonal"
            ),
        }
        times = interleaved(
            {name: lambda layer=layer: call(layer) for name, layer in layers.items()}, rounds
        )
        case = f"b{batch} n{length} d{d_model} h{num_heads}x{head_dim}"
        plain, spread = typical(times["plain"])
        rows.append(Result("layer forward+backward", case, "plain", plain, "ms", spread, 1))
        for name in list(layers)[1:]:
            value, spread = ratio(times[name], times["plain"])
            rows.append(
                Result("layer forward+backward", case, f"{name} / plain", value, "1", spread, 1)
            )
    return rows


def bare_step(settings: recipe.RunConfig) -> Callable[[], object]:
    """One step of the loop a user would write: same model, data and optimizer."""
    built, rates, steps = recipe.build(settings), settings.optimizer, count()
    model = built.model
    decay = [p for p in model.parameters() if p.ndim >= 2]
    free = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": decay, "weight_decay": rates.weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=rates.learning_rate, betas=(rates.beta1, rates.beta2))

    def call() -> None:
        step = next(steps)
        inputs, targets = built.dataset.train_batch(0, step, settings.train.batch_size)
        for group in optimizer.param_groups:
            group["lr"] = rates.rate(step, settings.train.steps)
        loss = cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    return call


def our_step(settings: recipe.RunConfig, folder: Path) -> Callable[[], object]:
    """One step of Sixfold's loop, with its logs, governed if the settings say so."""
    built = recipe.build(settings)
    optimizer = build_optimizer(built.model, settings.optimizer)
    on = settings.governor.mode != "off"
    governor = LeadMetaArchitect(built.model, optimizer, folder=folder) if on else None
    training = Training(
        built.model, optimizer, built.dataset, settings.train, settings.optimizer, folder, {},
        observer=governor,
    )  # fmt: skip
    metrics = Log(folder / "metrics.jsonl", {})
    positions = iter(training.positions())
    return lambda: advance(training, built.model, next(positions), metrics)


def loop_rows(blocks: int) -> list[Result]:
    """Tokens per second of the loop over the bare loop's, step by step in turn.

    The governor samples every tenth step: ratios are of blocks of ten steps each.
    """
    with tempfile.TemporaryDirectory() as folder:
        alone = recipe.configure(["demo"], None, ("governor.mode=off", "train.device=cpu"))
        governed = recipe.configure(["demo"], None, ("train.device=cpu",))
        calls = {
            "bare": bare_step(alone),
            "ungoverned": our_step(alone, Path(folder) / "alone"),
            "governed": our_step(governed, Path(folder) / "governed"),
        }
        times = interleaved(calls, 10 * blocks)
    sums = {
        name: [sum(t[10 * i : 10 * i + 10]) for i in range(blocks)] for name, t in times.items()
    }
    middle, spread = typical([block / 10 for block in sums["bare"]])
    rows = [Result("training loop", "demo", "bare", middle, "ms/step", spread, 1)]
    for name in ("ungoverned", "governed"):
        value, spread = ratio(sums["bare"], sums[name])
        rows.append(
            Result("training loop", "demo", f"tokens/s {name} / bare", value, "1", spread, 1)
        )
    return rows


def import_rows(rounds: int) -> list[Result]:
    """Seconds that importing sixfold's main names takes once torch is there, in fresh processes."""
    code = (
        "import time, torch; began = time.perf_counter();"
        "from sixfold import HexagonalMultiHeadAttention, LeadMetaArchitect, LanguageModel;"
        "print(time.perf_counter() - began)"
    )
    command = [sys.executable, "-c", code]
    runs = [subprocess.run(command, capture_output=True, check=True) for _ in range(rounds + 1)]
    low, middle, high = statistics.quantiles([float(run.stdout) for run in runs[1:]], n=4)
    return [Result("import", "main names", "over torch", middle, "s", (high - low) / 2, 1)]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--only", choices=("layer", "loop", "import"))
    arguments.add_argument("--smoke", action="store_true", help="seconds; publishes nothing")
    given = arguments.parse_args()
    torch.manual_seed(0)
    rounds = 2 if given.smoke else 25
    rows: list[Result] = []
    if given.only in (None, "import"):
        rows += import_rows(min(rounds, 11))
    if given.only in (None, "layer"):
        rows += layer_rows(rounds)
    if given.only in (None, "loop"):
        rows += loop_rows(2 if given.smoke else 20)
    for row in rows:
        print(
            f"{row.experiment:<24} {row.case:<26} {row.metric:<34} {row.value:8.3f} {row.unit:<8} ± {row.spread:.3f}"
        )
    if not given.smoke:
        settings = record.config_hash(config.plain(recipe.configure(["demo"])))
        publish(RESULTS, rows, Provenance(record.device_name(), record.commit(), settings))


if __name__ == "__main__":
    main()
