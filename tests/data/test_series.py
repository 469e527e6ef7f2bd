import sys

import numpy as np
import pytest
import torch

from sixfold.data import series
from sixfold.errors import DataError

# first, last and number of values, as the sources print them
KNOWN = {
    "sunspots": (5.0, 2.9, 309),
    "elnino": (23.11, 22.07, 732),
    "unemployment": (5.8, 9.6, 203),
}


@pytest.mark.parametrize("name", KNOWN)
def test_the_real_series_are_whole(name):
    first, last, count = KNOWN[name]
    values = series.load(name)
    assert (float(values[0]), float(values[-1]), len(values)) == (first, last, count)
    assert values.dtype == torch.float64


def test_months_of_co2_are_means_of_weeks_without_a_gap():
    from statsmodels.datasets import co2

    weeks = co2.load_pandas().data["co2"]
    values = series.load("co2")
    assert len(values) == 8 + 12 * 37
    months = [(1964, 5), (1984, 2), (2001, 12)]
    for year, month in months:
        mine = values[12 * (year - 1964) + month - 5]
        inside = weeks[(weeks.index.year == year) & (weeks.index.month == month)]
        assert float(mine) == pytest.approx(float(np.nanmean(inside.to_numpy())))
    # the season: every year of these is highest in April to June, lowest in August to October
    years = values[8:].view(-1, 12)
    assert set((years.argmax(1) + 1).tolist()) <= {4, 5, 6}
    assert set((years[:-1].argmin(1) + 1).tolist()) <= {1, 8, 9, 10}


def test_every_series_has_a_season_in_its_autocorrelation():
    assert set(series.PERIOD) == set(series._READ)
    for name in ("co2", "elnino", "sunspots"):
        steps = series.load(name).diff()
        steps = steps - steps.mean()
        lags = range(2, 18)
        found = [float((steps[lag:] * steps[:-lag]).mean()) for lag in lags]
        assert lags[int(np.argmax(found))] in (series.PERIOD[name], series.PERIOD[name] - 1)


def test_windows_are_cut_by_time_and_followed_by_their_targets():
    values = torch.arange(100).double()
    parts = series.split(values, 10)
    for part, start, stop in (
        (parts.train, 10, 60),
        (parts.validation, 60, 80),
        (parts.test, 80, 100),
    ):
        inputs, targets = (x[..., 0].double() * parts.std + parts.mean for x in part)
        assert inputs.shape == targets.shape == (stop - start - 9, 10)
        torch.testing.assert_close(targets - inputs, torch.full_like(inputs, 10), atol=1e-4, rtol=0)
        ends = torch.stack([targets.min(), targets.max()])
        torch.testing.assert_close(ends, torch.tensor([start, stop - 1.0]).double())
    torch.testing.assert_close(
        parts.known.double() * parts.std + parts.mean, values[:60], atol=1e-4, rtol=0
    )


def test_nothing_of_the_later_parts_leaks_into_the_earlier():
    values = torch.randn(100, generator=torch.Generator().manual_seed(0)).double()
    before = series.split(values, 10)
    for changed, same in ((60, ("train",)), (80, ("train", "validation"))):
        other = values.clone()
        other[changed:] = 1e3 * other[changed:] + 7
        after = series.split(other, 10)
        assert (after.mean, after.std) == (before.mean, before.std)
        assert torch.equal(after.known, before.known)
        for name in same:
            for one, two in zip(getattr(before, name), getattr(after, name), strict=True):
                assert torch.equal(one, two)
    assert float(before.known.mean()) == pytest.approx(0, abs=1e-6)
    assert float(before.known.std(correction=0)) == pytest.approx(1, abs=1e-6)


def test_build_keeps_the_test_part_out_of_reach():
    data = series.build(series="elnino", window=12)
    values = series.load("elnino")
    first, second = 439, 585  # 60 and 80 % of 732
    parts = series.split(values, 12)
    assert parts.mean == pytest.approx(float(values[:first].mean()))
    for part, last in ((data.train, first), (data.validation, second)):
        end = part.targets[-1, :, 0].double() * parts.std + parts.mean
        torch.testing.assert_close(end, values[last - 12 : last], atol=1e-5, rtol=0)
    # the first forecast of the test part starts from the last target of the validation part
    assert torch.equal(data.validation.targets[-1], parts.test.inputs[0])


def test_the_miniature_is_a_season():
    data = series.miniature()
    assert (len(data.train.inputs), len(data.validation.inputs)) == (57, 17)
    change = (data.train.targets - data.train.inputs).square().mean()
    assert change < 0.1 * data.train.inputs.square().mean()


@pytest.mark.parametrize("window", [0, 13, 60])
def test_windows_that_do_not_fit(window):
    with pytest.raises(DataError, match=f"60 values hold no windows of {window}"):
        series.split(torch.arange(60.0), window)


def test_a_series_without_variation():
    with pytest.raises(DataError, match="training part is constant"):
        series.split(torch.ones(60), 4)


def test_an_unknown_series_names_the_nearest():
    with pytest.raises(DataError, match="unknown series 'sunspot'.*Did you mean 'sunspots'"):
        series.build(series="sunspot")


def test_series_without_statsmodels(monkeypatch):
    monkeypatch.setitem(sys.modules, "statsmodels.datasets.sunspots", None)
    with pytest.raises(ImportError, match=r"pip install 'sixfold\[series\]'"):
        series.build()
