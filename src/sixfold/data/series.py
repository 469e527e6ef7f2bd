"""Real time series, and windows of them to forecast; they come with statsmodels.

Yearly sunspots 1700-2008 (SIDC, through the US National Geophysical Data Center); monthly CO2 on
Mauna Loa, May 1964 to December 2001 (Keeling and Whorf, CDIAC); monthly surface temperature of the
El Nino region 1+2, 1950-2010 (NOAA, ERSST.V3B); quarterly unemployment in the USA, 1959-2009 (BLS).
All are in the public domain: https://www.statsmodels.org/stable/datasets/index.html.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sixfold.contracts import Batch
from sixfold.data._kinds import States
from sixfold.discover import unknown
from sixfold.errors import DataError

TRAIN, VALIDATION = 0.6, 0.8  # where the first and the second part of a series end
PERIOD = {"co2": 12, "elnino": 12, "sunspots": 11, "unemployment": 4}
"""Name of a series to its season: months, quarters, or the years of a cycle of the sun."""


class Split(NamedTuple):
    """Windows of one series in its own unit scaled by (x - mean) / std of the training part.

    Each of the three holds windows (N, window, 1) and, as targets, the windows that follow. All
    targets lie inside their part; inputs may reach back into the part before.
    """

    train: Batch
    validation: Batch
    test: Batch
    mean: float
    std: float
    known: Tensor
    """The scaled training part itself, (n,)."""


def build(*, series: str = "sunspots", window: int = 24) -> States:
    """Windows (N, window, 1) and the windows that follow them, float32, cut by time.

    The first 60 % of the series train and the next 20 % validate; the last 20 % stay out of reach
    (`split` gives them). Everything is scaled by the training part alone.

    Raises ImportError without statsmodels, and DataError for an unknown series or one too short.

    >>> data = build()
    >>> data.train.inputs.shape, data.validation.targets.shape
    (torch.Size([138, 24, 1]), torch.Size([39, 24, 1]))
    """
    parts = split(load(series), window)
    return States(parts.train, parts.validation)


def miniature(*, seed: int = 0) -> States:
    """A generated season of 8 with noise: windows of 8, 57 for training, 17 for validation."""
    rng = np.random.default_rng(seed)
    wave = np.sin(2 * np.pi * np.arange(120) / 8) + 0.1 * rng.standard_normal(120)
    parts = split(torch.from_numpy(wave), 8)
    return States(parts.train, parts.validation)


def load(series: str) -> Tensor:
    """The values of a series from first to last, (n,) float64, in its own unit.

    Raises ImportError without statsmodels, and DataError for an unknown series.

    >>> load("sunspots")[:3]
    tensor([ 5., 11., 16.], dtype=torch.float64)
    """
    if series not in _READ:
        raise DataError(unknown("series", series, _READ))
    values = torch.tensor(_READ[series]().tolist(), dtype=torch.float64)
    if not values.isfinite().all():
        raise DataError(f"series {series!r} has gaps; another version of statsmodels may have none")
    return values


def split(values: Tensor, window: int) -> Split:
    """Three parts of a series (n,) by time, as windows scaled by the first part alone.

    Raises DataError for windows that do not fit, and for a training part without variation.
    """
    n = len(values)
    first, second = math.floor(TRAIN * n), math.floor(VALIDATION * n)
    if window < 1 or first < 2 * window or min(second - first, n - second) < window:
        raise DataError(
            f"{n} values hold no windows of {window}: the first three fifths must hold two, each "
            "of the other fifths one"
        )
    std, mean = torch.std_mean(values[:first], correction=0)
    if std == 0:
        raise DataError("the training part is constant: there is nothing to scale by")
    scaled = ((values - mean) / std).float()
    bounds = ((window, first), (first, second), (second, n))
    parts = (windows(scaled, window, start, stop) for start, stop in bounds)
    return Split(*parts, float(mean), float(std), scaled[:first])


def windows(values: Tensor, window: int, start: int, stop: int) -> Batch:
    """Every window of targets inside [start, stop), and the window before it: (N, window, 1).

    >>> inputs, targets = windows(torch.arange(6.0), 2, start=3, stop=6)
    >>> inputs[..., 0].tolist(), targets[..., 0].tolist()
    ([[1.0, 2.0], [2.0, 3.0]], [[3.0, 4.0], [4.0, 5.0]])
    """
    both = values[start - window : stop].unfold(0, 2 * window, 1)[..., None]
    return Batch(both[:, :window].contiguous(), both[:, window:].contiguous())


def _table(name: str) -> Any:
    try:
        module = importlib.import_module(f"statsmodels.datasets.{name}")
    except ImportError as error:
        raise ImportError("series need statsmodels: pip install 'sixfold[series]'") from error
    return module.load_pandas().data


def _co2() -> Any:
    # weekly means with gaps; from May 1964 on no month is without a week
    return _table("co2")["co2"].resample("MS").mean().loc["1964-05":"2001-12"]


def _elnino() -> Any:
    return _table("elnino").drop(columns="YEAR").to_numpy().reshape(-1)


_READ: dict[str, Callable[[], Any]] = {
    "co2": _co2,
    "elnino": _elnino,
    "sunspots": lambda: _table("sunspots")["SUNACTIVITY"],
    "unemployment": lambda: _table("macrodata")["unemp"],
}
