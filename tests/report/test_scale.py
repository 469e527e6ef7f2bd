import math
import random

import pytest

from sixfold.report.scale import (
    Scale,
    decimate,
    duration,
    kind_of,
    log_ticks,
    number,
    smooth,
    tick_labels,
    ticks,
    with_gaps,
)


@pytest.mark.parametrize("low, high", [(0, 1), (-3, 7), (1e-7, 3e-7), (12, 1.3e9), (5, 5.001)])
def test_ticks_are_round_and_inside(low, high):
    found = ticks(low, high, 5)
    assert 2 <= len(found) <= 11
    assert all(low - 1e-9 * abs(low) <= tick <= high * 1.000001 for tick in found)
    step = found[1] - found[0]
    digit = step / 10 ** math.floor(math.log10(step) + 1e-6)
    assert min(abs(digit - d) for d in (1, 2, 5)) < 1e-4


def test_log_ticks_are_powers_of_ten_over_many_decades():
    assert log_ticks(1e-6, 1e6, 5) == (1e-6, 1e-3, 1.0, 1e3, 1e6)
    # within one decade there are none: round numbers instead
    assert log_ticks(2.1, 4.2, 4) == ticks(2.1, 4.2, 4)


def test_scale_keeps_ratios_when_logarithmic():
    scale = Scale(1, 10_000, 0, 400, "log")
    assert scale(10) - scale(1) == pytest.approx(scale(1000) - scale(100)) == pytest.approx(100)
    assert scale(0.1) == 0
    assert Scale(0, 10, 100, 0)(2.5) == 75


def test_symlog_is_odd_and_logarithmic_far_from_zero():
    scale = Scale(-1e4, 1e4, -1, 1, "symlog")
    assert scale(0) == pytest.approx(0)
    assert scale(-50) == pytest.approx(-scale(50))
    decade = math.log(10) / math.asinh(1e4)
    assert scale(1e4) - scale(1e3) == pytest.approx(decade, rel=1e-5)
    assert scale.ticks(10) == (-1e4, -1e3, -100, -10, 0, 10, 100, 1e3, 1e4)


def test_labels():
    assert tick_labels((0.0, 0.05, 0.1)) == ["0.00", "0.05", "0.10"]
    assert tick_labels((0.0, 50_000.0)) == ["0", "50,000"]
    assert tick_labels((1e-6, 1e-3), "log") == ["1e-6", "0.001"]
    assert tick_labels((0.0, 1e-6)) == ["0", "1e-6"]


def test_numbers_as_text():
    values = (0, 1234567, 0.0, 1.48319, 123456.7, -0.5, 3.2e9, float("inf"), -float("inf"))
    assert [number(v) for v in values] == [
        "0", "1,234,567", "0", "1.483", "123,457", "-0.5", "3.2e9", "∞", "-∞",
    ]  # fmt: skip
    assert duration(59.94) == "59.9 s"
    assert duration(3600 * 30 + 61) == "30 h 1 min"


def test_decimation_keeps_extremes_and_gaps():
    chance = random.Random(0)
    points = [(float(i), chance.gauss(0, 1)) for i in range(100_000)]
    points[31_415] = (31_415.0, 99.0)
    points[50_000:52_000] = [(float(i), math.nan) for i in range(50_000, 52_000)]
    thin = decimate(points, 600)
    assert len(thin) <= 600
    assert (31_415.0, 99.0) in thin
    known = [y for _, y in points if math.isfinite(y)]
    kept = [y for _, y in thin if math.isfinite(y)]
    assert (min(kept), max(kept)) == (min(known), max(known))
    assert not any(50_000 <= x < 52_000 and math.isfinite(y) for x, y in thin)
    assert any(math.isnan(y) for _, y in thin)
    assert [x for x, _ in thin] == sorted(x for x, _ in thin)
    # even one lost value out of a hundred thousand breaks the line
    points = [(float(i), math.nan if i == 7 else 1.0) for i in range(100_000)]
    assert sum(math.isnan(y) for _, y in decimate(points, 600)) == 1


def test_a_rhythm_is_no_gap_but_a_pause_is():
    slow = [(float(step), 1.0) for step in range(0, 400, 40)]
    assert with_gaps(slow) == slow
    paused = [p for p in slow if p[0] not in (160, 200)]
    assert sum(math.isnan(y) for _, y in with_gaps(paused)) == 1
    assert with_gaps([]) == []
    # calm, then watched closely, then calm again: three rhythms, no gap
    rhythms = [*range(0, 100, 10), *range(100, 140, 2), *range(140, 200, 10)]
    points = [(float(step), 1.0) for step in rhythms]
    assert with_gaps(points) == points


def test_smoothing_is_the_mean_of_its_window_even_beside_a_huge_value():
    points = [(i, float(i % 3)) for i in range(99)]
    points[50] = (50, 1e30)
    mean = dict(smooth(points, 3))
    assert mean[10] == pytest.approx(1.0)
    assert mean[53] == pytest.approx(1.0)
    assert mean[51] > 1e29


def test_smoothing_leaves_what_is_not_finite_a_gap():
    points = [(i, math.nan if 40 <= i < 60 else 2.0) for i in range(100)]
    mean = dict(smooth(points, 9))
    assert mean[41] != mean[41]
    assert mean[39] == mean[60] == 2.0


def test_log_is_chosen_for_wide_positive_values_only():
    assert kind_of([1.0, 41.0]) == "log"
    assert kind_of([1.0, 39.0]) == "linear"
    assert kind_of([0.0, 900.0, 1000.0]) == "linear"
    assert kind_of([0.0, 1.0, 1000.0]) == "symlog"
    assert kind_of([0.0, 1e-5, 1e-2]) == "linear"
    assert kind_of([]) == "linear"
