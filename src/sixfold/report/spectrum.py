"""What the filters of a spectral mixer let pass, as a matplotlib figure.

>>> from sixfold import SpectralHexagonalAttention
>>> len(plot_frequency_response(SpectralHexagonalAttention(16, 1, d_head=4)).axes)
1
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sixfold.attention.mixer.spectral import SpectralMixer
from sixfold.report.plots import blank, panel, with_legend
from sixfold.report.svg import LIGHT, LOOKS

POINTS = 801


def mixers_of(model: nn.Module) -> list[SpectralMixer]:
    """Every spectral mixer of a model, from the first layer on.

    Raises ValueError where there is none.
    """
    found = [module for module in model.modules() if isinstance(module, SpectralMixer)]
    if not found:
        raise ValueError(f"{type(model).__name__} has no spectral mixer")
    return found


def plot_frequency_response(model: nn.Module, title: str = "Frequency response") -> Any:
    """One panel per spectral mixer: a line per group of channels over [0, 2].

    Dots stand at the eigenvalues of the grid, larger where an eigenspace has more dimensions; what
    is shaded lies above the modes that are kept.

    Raises ValueError for a model without a spectral mixer.
    """
    mixers = mixers_of(model)
    figure = blank(6.4, 2.9 * len(mixers) + 0.4)
    for place, mixer in enumerate(mixers):
        name = f"{title}, layer {place}" if len(mixers) > 1 else title
        axes = panel(figure, (len(mixers), 1, place + 1), name, f"{mixer.kind}, {mixer.order}")
        _responses(axes, mixer)
    return with_legend(figure)


@torch.no_grad()
def _responses(axes: Any, mixer: SpectralMixer) -> None:
    grid = torch.linspace(0, 2, POINTS, dtype=torch.float64)
    lines, dots = (mixer.response(at).float().cpu() for at in (grid, mixer.eigenvalues))
    sizes = [14 * count for count in mixer.multiplicities]
    for group, (line, dot) in enumerate(zip(lines, dots, strict=True)):
        look = LIGHT[LOOKS[group % len(LOOKS)]]
        axes.plot(grid, line, color=look, linewidth=1.6, label=f"group {group}")
        axes.scatter(mixer.eigenvalues, dot, s=sizes, color=look, zorder=3)
    if mixer.cut < 2:
        axes.axvspan(mixer.cut, 2, color=LIGHT["grid"], zorder=0)
    axes.axhline(0, color=LIGHT["axis"], linewidth=0.8)
    axes.set_xlim(-0.04, 2.0)
    axes.set_xlabel("eigenvalue of the normalised Laplacian: slow to fast over the grid")
    axes.xaxis.set_major_formatter("{x:.1f}")
    axes.xaxis.get_major_locator().set_params(integer=False, nbins=8)
