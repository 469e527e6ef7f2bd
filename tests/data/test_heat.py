import math
from itertools import pairwise

import pytest
import torch

from sixfold.data import heat
from sixfold.errors import DataError

FLOW = {"kappa": 0.01, "velocity": (0.7, -0.4)}


def wave(size, row, column):
    grid = torch.arange(size, dtype=torch.float64) / size
    return torch.cos(2 * math.pi * (row * grid[:, None] + column * grid[None, :]))


@pytest.mark.parametrize(("row", "column"), [(0, 0), (1, 0), (0, 2), (3, -2)])
def test_a_wave_moves_and_decays_as_on_paper(row, column):
    t, size = 0.3, 16
    grid = torch.arange(size, dtype=torch.float64) / size
    y, x = grid[:, None] - 0.7 * t, grid[None, :] + 0.4 * t
    height = math.exp(-0.01 * 4 * math.pi**2 * (row**2 + column**2) * t)
    known = height * torch.cos(2 * math.pi * (row * y + column * x))
    torch.testing.assert_close(heat.exact(wave(size, row, column), t, **FLOW), known)


def test_without_diffusion_a_field_is_carried_along():
    noise = torch.randn(3, 9, 9, generator=torch.Generator().manual_seed(0)).double()
    moved = heat.exact(noise, 1.0, kappa=0.0, velocity=(2 / 9, -1 / 9))
    torch.testing.assert_close(moved, noise.roll((2, -1), (1, 2)))


def test_the_exact_solution_solves_the_equation_by_finite_differences():
    size, h, dt = 256, 1 / 256, 1e-4
    u0 = wave(size, 1, 2) + 0.5 * wave(size, -2, 1)
    before, now, after = (heat.exact(u0, 0.1 + s * dt, **FLOW) for s in (-1, 0, 1))

    def slope(axis):
        return (now.roll(-1, axis) - now.roll(1, axis)) / (2 * h)

    laplacian = sum(now.roll(s, axis) for s in (-1, 1) for axis in (0, 1)) - 4 * now
    known = 0.01 * laplacian / h**2 - 0.7 * slope(0) + 0.4 * slope(1)
    torch.testing.assert_close((after - before) / (2 * dt), known, atol=5e-3, rtol=0)


def test_the_integrator_converges_at_fourth_order():
    u0 = heat.initial_fields(4, 16, seed=0)
    known = heat.exact(u0, 0.5, **FLOW)
    errors = [
        float((heat.integrate(u0, 0.5, steps, **FLOW) - known).abs().max())
        for steps in (20, 40, 80, 160)
    ]
    orders = [math.log2(a / b) for a, b in pairwise(errors)]
    assert orders == pytest.approx([4, 4, 4], abs=0.15)
    assert errors[-1] < 1e-7


@pytest.mark.parametrize("size", [7, 8])
def test_integrator_and_solution_agree_on_every_mode(size):
    noise = torch.randn(size, size, generator=torch.Generator().manual_seed(1)).double()
    one, other = heat.integrate(noise, 0.1, 200, **FLOW), heat.exact(noise, 0.1, **FLOW)
    torch.testing.assert_close(one, other, atol=1e-8, rtol=0)
    torch.testing.assert_close(
        heat.exact(heat.exact(noise, 0.04, **FLOW), 0.06, **FLOW), other, atol=1e-12, rtol=0
    )


def test_heat_is_kept():
    u0 = 3 + heat.initial_fields(5, 12, seed=2)
    later = heat.integrate(u0, 0.4, 40, **FLOW)
    torch.testing.assert_close(later.mean((1, 2)), torch.full((5,), 3.0).double())
    assert (later.var((1, 2)) < u0.var((1, 2))).all()


def test_initial_fields_are_standard_smooth_and_seeded():
    fields = heat.initial_fields(6, 16, seed=5)
    std, mean = torch.std_mean(fields, dim=(1, 2), correction=0)
    torch.testing.assert_close(mean, torch.zeros(6).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(std, torch.ones(6).double())
    power = torch.fft.fft2(fields).abs().square().sum(0)
    frequency = torch.fft.fftfreq(16, 1 / 16)
    low = (frequency[:, None] ** 2 + frequency[None, :] ** 2) <= 36
    assert power[low].sum() / power.sum() > 0.999
    assert torch.equal(fields, heat.initial_fields(6, 16, seed=5))
    assert not torch.equal(fields, heat.initial_fields(6, 16, seed=6))


def test_targets_are_the_exact_solution_dt_later():
    data = heat.build(trajectories=10, frames=3)
    assert (len(data.train.inputs), len(data.validation.inputs)) == (24, 6)
    for inputs, targets in (data.train, data.validation):
        known = heat.exact(inputs, 0.05, kappa=0.005, velocity=(1.0, 0.5))
        torch.testing.assert_close(targets.double(), known, atol=1e-4, rtol=0)
        # inside a trajectory the next input is this target
        assert torch.equal(inputs.view(-1, 3, 16, 16)[:, 1:], targets.view(-1, 3, 16, 16)[:, :-1])
    start = heat.initial_fields(10, 16, seed=0).float()
    assert torch.equal(data.validation.inputs.view(-1, 3, 16, 16)[:, 0], start[8:])


def test_impossible_requests():
    u0 = wave(16, 1, 0)
    with pytest.raises(DataError, match=r"1 steps for a time of 1.0 are unstable.*take more steps"):
        heat.integrate(u0, 1.0, 1, **FLOW)
    with pytest.raises(DataError, match="steps must be at least 1, not 0"):
        heat.integrate(u0, 1.0, 0, **FLOW)
    with pytest.raises(DataError, match="kappa must not be negative"):
        heat.exact(u0, 1.0, kappa=-1.0, velocity=(0.0, 0.0))
    with pytest.raises(DataError, match="not 1 and 10"):
        heat.build(trajectories=1)
