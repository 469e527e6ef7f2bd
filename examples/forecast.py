"""Forecasting a real series by attention, beside what costs nothing.

python examples/forecast.py [--smoke]      (needs: pip install 'sixfold[series]')
"""

import sys

import torch
from torch import nn
from torch.nn.functional import mse_loss

from sixfold import MultiHeadAttention, models
from sixfold.data import series

SMOKE = "--smoke" in sys.argv
NAME, WINDOW, WIDTH, SCORES = "elnino", 24, 32, ("dot", "cosine", "l1")
STEPS = 60 if SMOKE else 300


class Forecaster(nn.Module):
    """24 months to the next 24, all relative to the last: token i answers with the i-th to come."""

    def __init__(self, score: str) -> None:
        super().__init__()
        self.embed = nn.Conv1d(1, WIDTH, 5, padding=2)
        self.positions = nn.Parameter(0.1 * torch.randn(WINDOW, WIDTH))
        self.norm = nn.LayerNorm(WIDTH)
        self.attention = MultiHeadAttention(WIDTH, num_heads=4, score=score)
        self.answer = nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, 1))

    def forward(self, window: torch.Tensor) -> torch.Tensor:
        last = window[:, -1:]
        x = self.embed((window - last).mT).mT + self.positions
        return last + self.answer(x + self.attention(self.norm(x)))


def autoregression(known: torch.Tensor, window: torch.Tensor) -> torch.Tensor:
    """x_t = a + sum over 24 lags of b_i x_{t-i} by least squares on `known`, iterated."""
    rows = known.unfold(0, WINDOW + 1, 1)
    ones = torch.ones(len(rows), 1)
    b = torch.linalg.lstsq(torch.cat([rows[:, :-1], ones], 1), rows[:, -1:]).solution[:, 0]
    for _ in range(WINDOW):
        window = torch.cat([window, (window[:, -WINDOW:, 0] @ b[:-1] + b[-1])[:, None, None]], 1)
    return window[:, WINDOW:]


def error(answer: torch.Tensor, targets: torch.Tensor) -> float:
    """Mean absolute error in degrees."""
    return float((answer - targets).abs().mean()) * parts.std


parts, period = series.split(series.load(NAME), WINDOW), series.PERIOD[NAME]
data, (window, targets) = series.build(series=NAME, window=WINDOW), parts.test
print(f"{NAME}: sea surface temperature of the El Nino region 1+2, monthly, 1950 to 2010")
print(f"{len(data.train.inputs)} windows of {WINDOW} months for training; {len(window)} for the")
print(f"test, which none of these saw. Mean absolute error, next {WINDOW} months (degrees):")

season = window[:, WINDOW - period + torch.arange(WINDOW) % period]
print(f"  the last value           {error(window[:, -1:], targets):6.3f}")
print(f"  the last season again    {error(season, targets):6.3f}")
print(f"  a linear autoregression  {error(autoregression(parts.known, window), targets):6.3f}")

for score in SCORES:
    torch.manual_seed(0)
    model, best = Forecaster(score), (float("inf"), float("nan"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(STEPS):
        inputs, following = data.train_batch(0, step, 32)
        optimizer.zero_grad()
        mse_loss(model(inputs), following).backward()
        optimizer.step()
        if (step + 1) % 20 == 0:
            # the step to keep is chosen on the validation part
            with torch.no_grad():
                held_out = error(model(data.validation.inputs), data.validation.targets)
                best = min(best, (held_out, error(model(window), targets)))
    print(f"  attention, {score:<8}      {best[1]:6.3f}")
print(f"{models.parameters(model):,} parameters or fewer, {STEPS} steps, one seed each")
