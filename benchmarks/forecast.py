"""Forecasting real series: which score, and does attention beat a straight line?

Rows go to results/forecast.csv: mean absolute scaled error of the next 24 values from the last 24, on the
last fifth of each series, mean over seeds and half width of its 95 % interval. 1 is the mean absolute
error, one season back, inside the training part (Hyndman and Koehler, Another look at measures of
forecast accuracy, 2006). Everything is fitted and scaled on the first three fifths; the step that a model
is kept from is the best of eight on the fourth; the last is measured once.
Two blocks of width 32, four heads of 8, equal parameters within 1 % and equal steps for every score. Peers:
the last value, the last season, and an autoregression on as many lags by least squares, iterated.
Resumable: finished seeds are kept in the runs folder. Needs the extra `series`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn
from trials import copied, remembered, row, train

from sixfold import models, record
from sixfold.data import series
from sixfold.data._kinds import States
from sixfold.models._block import blocks
from sixfold.record import Provenance, publish
from sixfold.train.optimizer import OptimizerSettings

RESULTS = Path(__file__).parents[1] / "results" / "forecast.csv"
WINDOW, WIDTH, HEADS, LAYERS, PATCH = 24, 32, 4, 2, 5
STEPS, LOOKS, BATCH = 200, 8, 32
RATES = OptimizerSettings(learning_rate=3e-3, final_learning_rate=1e-4, warmup=20, weight_decay=0.1)
SCORES = ("dot", "cosine", "l1", "l2", "l2_squared", "chebyshev")


class Forecaster(nn.Module):
    """Windows (b, n, 1) to the windows that follow: token i answers with the i-th value to come.

    Values are read and answered relative to the last one, so that a level never seen is none.
    Source: Zeng et al., Are Transformers Effective for Time Series Forecasting?, arXiv 2205.13504
    (NLinear).
    """

    def __init__(self, score: str) -> None:
        super().__init__()
        attention = {"num_heads": HEADS, "score": score}
        self.embed = nn.Conv1d(1, WIDTH, PATCH, padding=PATCH // 2)
        self.positions = nn.Parameter(0.1 * torch.randn(WINDOW, WIDTH))
        self.blocks = blocks(LAYERS, WIDTH, attention, 2.0, dropout=0.0)
        self.head = nn.Linear(WIDTH, 1)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, window: Tensor) -> Tensor:
        last = window[:, -1:]
        x = self.embed((window - last).mT).mT + self.positions
        for block in self.blocks:
            x = block(x)
        return last + self.head(x)


def last_value(window: Tensor) -> Tensor:
    """The last value, for ever."""
    return window[:, -1:].expand_as(window)


def last_season(window: Tensor, period: int) -> Tensor:
    """The last season, again and again."""
    n = window.shape[1]
    return window[:, n - period + torch.arange(n) % period]


def autoregression(known: Tensor, order: int) -> Callable[[Tensor], Tensor]:
    """x_t = a + sum over `order` lags of b_i x_{t-i}, least squares on `known`, iterated."""
    rows = known.double().unfold(0, order + 1, 1)
    lags = torch.cat([rows[:, :-1], torch.ones(len(rows), 1)], dim=1)
    weights = torch.linalg.lstsq(lags, rows[:, -1:]).solution[:, 0]

    def forecast(window: Tensor) -> Tensor:
        n = window.shape[1]
        values = window[..., 0].double()
        for _ in range(n):
            following = values[:, -order:] @ weights[:-1] + weights[-1]
            values = torch.cat([values, following[:, None]], dim=1)
        return values[:, n:, None]

    return forecast


def scaled_error(answer: Tensor, targets: Tensor, known: Tensor, period: int) -> float:
    """Mean absolute error over that of the last season within `known`."""
    season = (known[period:] - known[:-period]).double().abs().mean()
    return float((answer.double() - targets).abs().mean() / season)


def peers(name: str) -> dict[str, float]:
    """MASE of what a user would try first."""
    parts, period = series.split(series.load(name), WINDOW), series.PERIOD[name]
    answers = {
        "last value": last_value,
        "last season": lambda window: last_season(window, period),
        "autoregression": autoregression(parts.known, WINDOW),
    }
    return {
        peer: scaled_error(answer(parts.test.inputs), parts.test.targets, parts.known, period)
        for peer, answer in answers.items()
    }


def trained(name: str, score: str, seed: int, steps: int) -> dict[str, float]:
    """MASE on validation and test of the step that was best on validation."""
    parts, period = series.split(series.load(name), WINDOW), series.PERIOD[name]
    data = States(parts.train, parts.validation)
    torch.manual_seed(seed)
    model, best = Forecaster(score), (float("inf"), {})

    @torch.no_grad()
    def look(step: int) -> None:
        nonlocal best
        if (step + 1) % (steps // LOOKS) == 0:
            answer = model(parts.validation.inputs)
            found = scaled_error(answer, parts.validation.targets, parts.known, period)
            best = min(best, (found, copied(model)), key=lambda seen: seen[0])

    train(model, lambda step: data.train_batch(seed, step, BATCH), RATES, steps, look)
    model.load_state_dict(best[1])
    with torch.no_grad():
        answer = model(parts.test.inputs)
    found = scaled_error(answer, parts.test.targets, parts.known, period)
    return {"MASE": found, "MASE, validation": best[0], "parameters": models.parameters(model)}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--runs", type=Path, default=Path("runs/forecast"))
    arguments.add_argument("--seeds", type=int, default=5)
    arguments.add_argument("--steps", type=int, default=STEPS)
    arguments.add_argument("--only", nargs="*", help="series by name; all of them without it")
    given = arguments.parse_args()
    settings = record.config_hash(
        {"steps": given.steps, "batch": BATCH, "window": WINDOW, "rates": asdict(RATES)}
    )
    origin = Provenance(record.device_name(), record.commit(), settings)
    for name in series.PERIOD:
        if given.only is not None and name not in given.only:
            continue
        rows = [row("forecast", f"{name}, {peer}", "MASE", [v]) for peer, v in peers(name).items()]
        for score in SCORES:
            found = [
                remembered(
                    given.runs / settings, f"{name}-{score}-{seed}",
                    lambda seed=seed, name=name, score=score: trained(name, score, seed, given.steps),
                )
                for seed in range(given.seeds)
            ]  # fmt: skip
            case = f"{name}, {score}"
            rows += [
                row("forecast", case, metric, [f[metric] for f in found]) for metric in found[0]
            ]
        for r in rows:
            print(f"{r.case:<28} {r.metric:<16} {r.value:9.4g} ± {r.spread:.3g}", flush=True)
        publish(RESULTS, rows, origin)


if __name__ == "__main__":
    main()
