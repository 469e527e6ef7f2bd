import math
import random
from itertools import pairwise

import numpy as np
import pytest

from sixfold.report.heat import gridded, placed
from sixfold.report.scale import with_gaps
from sixfold.report.thin import KEPT, Track


def filled(rows, steps=None):
    track = Track()
    for step, layers in zip(steps or range(len(rows)), rows, strict=True):
        track.add(step, layers)
    return track


def noise(count, shape=(3, 2), seed=0):
    chance = random.Random(seed)
    return [[[chance.gauss(0, 1) for _ in range(heads)] for heads in shape] for _ in range(count)]


def test_a_short_run_is_kept_as_it_is():
    rows = noise(2 * KEPT)
    track = filled(rows)
    for layer, head in ((0, 0), (0, 2), (1, 1)):
        assert track.points(layer, head) == [(n, row[layer][head]) for n, row in enumerate(rows)]
    assert track.points(1) == [(n, max(row[1])) for n, row in enumerate(rows)]


@pytest.mark.parametrize("count", [513, 1000, 7777, 20_001])
def test_a_long_run_keeps_the_extremes_of_every_stretch_and_head(count):
    rows = noise(count)
    rows[count // 3][1][0], rows[count // 2][0][1] = 99.0, -99.0
    track = filled(rows)
    found = track.extremes()
    assert KEPT <= len(found.end) <= 2 * KEPT
    assert (count // 3, 99.0) in track.points(1, 0)
    assert (count // 3, 99.0) in track.points(1)
    assert (count // 2, -99.0) in track.points(0, 1)
    # what is kept of every stretch is what plain Python finds in it
    starts = [0, *(found.end[:-1] + 1).tolist()]
    for place, (start, end) in enumerate(zip(starts, found.end.tolist(), strict=True)):
        values = [row[0][2] for row in rows[start : end + 1]]
        assert (found.low[place, 2], found.high[place, 2]) == (min(values), max(values))
        assert values[found.low_at[place, 2] - start] == min(values)


def test_memory_is_that_of_a_short_run():
    short, long = filled(noise(600)), filled(noise(6000))
    assert long.extremes().low.size <= 2 * short.extremes().low.size


def test_one_lost_number_breaks_the_line_and_nothing_else():
    rows = noise(9000)
    rows[4321][0][1] = math.nan
    rows[1234][1][0] = math.inf
    track = filled(rows)

    def broken(layer, head):
        return [x for x, y in track.points(layer, head) if math.isnan(y)]

    assert len(broken(0, 1)) == len(broken(1, 0)) == 1
    assert 0 <= broken(0, 1)[0] - 4321 < 64
    assert not broken(0, 0)
    assert not broken(0, None)
    assert max(track.values()) < 10


def test_pauses_are_those_of_all_samples():
    steps = [n for n in range(0, 60_000, 10) if not 20_000 < n < 23_000]
    track = filled(noise(len(steps)), steps)
    exact = with_gaps([(step, 0.0) for step in steps])
    gaps = [x for x, y in exact if math.isnan(y)]
    assert len(gaps) == 1
    assert [x for x, y in track.points(0, 0) if math.isnan(y)] == gaps


def test_a_layer_that_did_not_run_has_no_point_and_no_gap():
    rows = noise(40)
    for n in range(0, 40, 2):
        rows[n][1] = ()
    track = filled(rows)
    assert track.points(1, 0) == [(n, rows[n][1][0]) for n in range(1, 40, 2)]
    assert [x for x, _ in track.points(1)] == list(range(1, 40, 2))
    assert track.points(0, 2) == [(n, rows[n][0][2]) for n in range(40)]


def test_a_head_that_is_grown_has_its_own_column():
    rows = noise(700) + noise(700, (3, 4, 1), seed=1)
    track = filled(rows)
    assert track.shape == [3, 4, 1]
    grown = track.points(1, 3)
    assert grown[0][0] >= 700
    assert max(y for _, y in grown) == max(row[1][3] for row in rows[700:])
    assert max(y for _, y in track.points(0, 1)) == max(row[0][1] for row in rows)


def test_a_heat_map_has_the_worst_of_every_stretch():
    rows = noise(400)
    steps = list(range(0, 4000, 10))
    for least, worst in ((False, max), (True, min)):
        grid = gridded(filled(rows, steps), least=least)
        assert grid.values.shape == (5, 96)
        for column in (0, 40, 95):
            own = [r for s, r in zip(steps, rows, strict=True) if grid.column(s) == column]
            expected = [
                worst(r[a][b] for r in own) for a, b in [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
            ]
            assert grid.values[:, column].tolist() == expected
    assert np.isfinite(gridded(filled(noise(5), [0, 10, 20, 30, 40]), least=False).values).all()


def test_rows_of_a_heat_map_do_not_meet():
    rows = list(placed([12] * 12))
    assert len(rows) == 144
    assert all(b[1] >= a[1] + a[2] - 1e-9 for a, b in pairwise(rows))
    assert [cell for cell, _, _ in placed([2, 0, 1])] == [(0, 0), (0, 1), (2, 0)]
