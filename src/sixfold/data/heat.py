"""Heat in a moving fluid: advection and diffusion on the unit torus.

    du/dt = kappa * (u_yy + u_xx) - c_y * u_y - c_x * u_x

A Fourier mode ``exp(2 pi i n.x)`` only feels its own rate
``lambda = -kappa |2 pi n|^2 - 2 pi i c.n``, so the solution is known, ``exp(lambda t)`` times the
mode, and an integrator can be held to it. The highest mode of an even grid has no odd derivative.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from sixfold.contracts import Batch
from sixfold.data._kinds import States
from sixfold.errors import DataError

_VALIDATION_FRACTION = 0.2


def build(
    *,
    size: int = 16,
    trajectories: int = 160,
    frames: int = 10,
    dt: float = 0.05,
    steps: int = 8,
    kappa: float = 0.005,
    velocity: tuple[float, float] = (1.0, 0.5),
    seed: int = 0,
) -> States:
    """Fields (N, 1, size, size) at a time and, as targets, `dt` later, both float32.

    Each of the `trajectories` starts from its own smooth field and gives `frames` pairs, integrated
    in float64 with `steps` steps per pair. The last fifth of the trajectories is for validation.

    Raises DataError for fewer than two trajectories, no frame, or steps too long to be stable.

    >>> data = build()
    >>> data.train.inputs.shape, data.validation.targets.shape
    (torch.Size([1280, 1, 16, 16]), torch.Size([320, 1, 16, 16]))
    """
    if trajectories < 2 or frames < 1:
        raise DataError(f"needs two trajectories and a frame, not {trajectories} and {frames}")
    fields = [initial_fields(trajectories, size, seed)]
    for _ in range(frames):
        fields.append(integrate(fields[-1], dt, steps, kappa=kappa, velocity=velocity))
    film = torch.stack(fields, dim=1).float()
    cut = trajectories - math.ceil(trajectories * _VALIDATION_FRACTION)
    return States(_pairs(film[:cut]), _pairs(film[cut:]))


def miniature(*, seed: int = 0) -> States:
    """The same equation on an 8 x 8 grid: 16 pairs for training, 4 for validation."""
    return build(size=8, trajectories=10, frames=2, seed=seed)


def exact(u0: Tensor, t: float, *, kappa: float, velocity: tuple[float, float]) -> Tensor:
    """The float64 solution at time `t` from u0 (..., y, x): modes times ``exp(lambda t)``.

    >>> wave = torch.cos(2 * torch.pi * torch.arange(8, dtype=torch.float64) / 8).expand(8, 8)
    >>> later = exact(wave, 1.0, kappa=0.01, velocity=(0.0, 1.0))
    >>> round(float(later[0, 0]), 4)  # once around, and exp(-0.01 * (2 pi)^2) of its height
    0.6738
    """
    rates = _rates(u0, kappa, velocity)
    return torch.fft.irfft2(torch.exp(rates * t) * torch.fft.rfft2(u0), s=u0.shape[-2:])


def integrate(
    u0: Tensor, t: float, steps: int, *, kappa: float, velocity: tuple[float, float]
) -> Tensor:
    """The float64 solution at `t` from u0 (..., y, x) by `steps` classical Runge-Kutta steps.

    The right-hand side is spectral, so all error is of time: it falls as ``steps ** -4``.

    Raises DataError when `steps` are so few that a mode would grow without bound.
    """
    if steps < 1:
        raise DataError(f"steps must be at least 1, not {steps}")
    rates = _rates(u0, kappa, velocity)
    h = t / steps
    growth = runge_kutta(lambda u: rates * u, torch.ones_like(rates), h).abs().max()
    if growth > 1 + 1e-9:
        raise DataError(
            f"{steps} steps for a time of {t} are unstable: a mode grows {float(growth):.3g} times "
            "per step; take more steps, a coarser grid, or a smaller kappa or velocity"
        )
    spectrum = torch.fft.rfft2(u0)
    for _ in range(steps):
        spectrum = runge_kutta(lambda u: rates * u, spectrum, h)
    return torch.fft.irfft2(spectrum, s=u0.shape[-2:])


def runge_kutta(rhs: Callable[[Tensor], Tensor], u: Tensor, h: float) -> Tensor:
    """One classical fourth-order step of length `h` of ``du/dt = rhs(u)``.

    >>> float(runge_kutta(lambda u: u, torch.tensor(1.0, dtype=torch.float64), 1.0)) * 24
    65.0
    """
    k1 = rhs(u)
    k2 = rhs(u + h / 2 * k1)
    k3 = rhs(u + h / 2 * k2)
    k4 = rhs(u + h * k3)
    return u + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


def initial_fields(count: int, size: int, seed: int) -> Tensor:
    """Smooth random fields (count, size, size), float64, each with mean 0 and variance 1.

    White noise times ``exp(-|n|^2 / 8)`` for mode n.
    """
    noise = torch.from_numpy(np.random.default_rng(seed).standard_normal((count, size, size)))
    y, x = _modes(noise)
    smooth = torch.fft.irfft2(torch.fft.rfft2(noise) * torch.exp(-(y**2 + x**2) / 8), s=(size,) * 2)
    std, mean = torch.std_mean(smooth, dim=(1, 2), correction=0, keepdim=True)
    return (smooth - mean) / std


def _modes(u: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = u.shape[-2:]
    y = torch.fft.fftfreq(rows, 1 / rows, dtype=torch.float64, device=u.device)
    x = torch.fft.rfftfreq(columns, 1 / columns, dtype=torch.float64, device=u.device)
    return y[:, None], x[None, :]


def _rates(u: Tensor, kappa: float, velocity: tuple[float, float]) -> Tensor:
    if kappa < 0:
        raise DataError(f"kappa must not be negative, not {kappa}: heat would gather by itself")
    y, x = _modes(u)
    # a real wave of the highest mode has zeros on every point where its derivative does not
    odd_y, odd_x = (
        n.where(2 * n.abs() != extent, 0) for n, extent in zip((y, x), u.shape[-2:], strict=True)
    )
    drift = 2 * math.pi * (velocity[0] * odd_y + velocity[1] * odd_x)
    return torch.complex(-kappa * (2 * math.pi) ** 2 * (y**2 + x**2), -drift)


def _pairs(film: Tensor) -> Batch:
    now, later = film[:, :-1], film[:, 1:]
    return Batch(now.flatten(0, 1)[:, None], later.flatten(0, 1)[:, None])
