import pytest

pytest.importorskip("matplotlib")

import torch

from sixfold.geometry.resistance import by_distance
from sixfold.report.squashing import plot_sensitivity


def test_medians_are_lines_and_quartiles_bands(tmp_path):
    distance = torch.arange(6).repeat(8).double()
    falling = torch.rand(48, generator=torch.Generator().manual_seed(0)) * 0.1**distance
    ends = falling.where(distance < 3, 0.0)
    models = {name: by_distance(x, distance) for name, x in (("far", falling), ("near", ends))}
    figure = plot_sensitivity(models, "On a ring")
    (axes,) = figure.axes
    assert axes.get_yscale() == "log"
    assert axes.get_title(loc="left") == "On a ring (|| d h_v / d x_u ||)"
    far, near = axes.lines
    assert [line.get_label() for line in axes.lines] == ["far", "near"]
    assert list(far.get_ydata()) == models["far"].median.tolist()
    # nothing arrives from three hops on
    assert list(near.get_xdata()) == [0, 1, 2]
    heights = {y for _, y in axes.collections[0].get_paths()[0].vertices.tolist()}
    assert set(models["far"].low.tolist()) | set(models["far"].high.tolist()) <= heights
    figure.savefig(tmp_path / "sensitivity.png")


def test_there_are_eight_colours():
    for models in ({}, {str(n): by_distance(torch.ones(1), torch.ones(1)) for n in range(9)}):
        with pytest.raises(ValueError, match=f"models must be 1 to 8, got {len(models)}"):
            plot_sensitivity(models)
