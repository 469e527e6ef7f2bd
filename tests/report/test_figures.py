import math
import sys

import pytest

pytest.importorskip("matplotlib")

from torch import nn

from sixfold.contracts import Snapshot
from sixfold.geometry.hexgrid import HexGrid
from sixfold.report.figures import TelemetryVisualizer, grid_of, plot_hexagonal_grid
from sixfold.report.hexmap import viridis
from sixfold.report.read import read_run


@pytest.fixture
def history(make_run):
    return read_run(make_run(steps=400)).telemetry


def lines(axes, label):
    (line,) = [line for line in axes.lines if line.get_label() == label]
    return dict(zip(line.get_xdata(), line.get_ydata(), strict=True))


def test_entropy_is_every_head_and_the_mean_of_its_layer(history, tmp_path):
    figure = TelemetryVisualizer(history).plot_entropy_evolution()
    (axes,) = figure.axes
    assert len(axes.lines) == 4 * 7 + 4
    heads = history[3].signals["entropy"][2]
    assert lines(axes, "layer 2")[history[3].step] == pytest.approx(sum(heads) / 7)
    figure.savefig(tmp_path / "entropy.png")


def test_condition_numbers_are_the_largest_of_each_layer(history):
    figure = TelemetryVisualizer(history).plot_condition_numbers()
    assert len(figure.axes) == 3
    heads = history[4].signals["condition_k"][1]
    assert lines(figure.axes[1], "layer 1")[history[4].step] == max(heads)


def test_the_profile_is_every_measured_part(history):
    (axes,) = TelemetryVisualizer(history).plot_computational_profile().axes
    for name, value in history[2].times_us.items():
        assert lines(axes, name)[history[2].step] == value


def test_gradients_flow_by_layer_and_as_a_whole(history):
    (axes,) = TelemetryVisualizer(history).plot_gradient_flow().axes
    assert lines(axes, "layer 3")[history[0].step] == max(history[0].signals["gradient_norm"][3])
    assert lines(axes, "whole model")[history[0].step] == 0.9


def test_gaps_stay_gaps():
    rows = [Snapshot(s, 1.0, {"entropy": ((0.5,),)}, {}, {}) for s in range(0, 100, 10)]
    rows = [row for row in rows if row.step not in (40, 50, 60)]
    (axes,) = TelemetryVisualizer(rows).plot_entropy_evolution().axes
    assert sum(math.isnan(y) for y in axes.lines[0].get_ydata()) == 1


def test_an_empty_history_is_an_empty_figure(tmp_path):
    empty = TelemetryVisualizer([])
    for plot in (empty.plot_entropy_evolution, empty.plot_condition_numbers,
                 empty.plot_computational_profile, empty.plot_gradient_flow):  # fmt: skip
        assert not any(axes.lines for axes in plot().axes)


class Layer(nn.Module):
    def __init__(self, radius):
        super().__init__()
        self.grid = HexGrid(radius)


class Decoy(nn.Module):
    grid = "not a grid"


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(2, 2), Decoy(), Layer(2), Layer(1))


def test_the_grid_is_the_first_in_the_model(model):
    assert grid_of(model) == HexGrid(2)
    with pytest.raises(ValueError, match="Linear has no module whose `grid` is a HexGrid"):
        grid_of(nn.Linear(2, 2))


def test_the_drawing_has_every_head_and_every_edge(model, tmp_path):
    figure = plot_hexagonal_grid(model, "Heads")
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == [repr(c) for c in HexGrid(2).coordinates]
    assert len(axes.patches) == 19
    assert len(axes.lines) == HexGrid(2).adjacency().sum() / 2
    # neighbours lie sqrt(3) apart
    for line in axes.lines:
        (x, u), (y, v) = line.get_xdata(), line.get_ydata()
        assert math.hypot(x - u, y - v) == pytest.approx(math.sqrt(3))
    figure.savefig(tmp_path / "grid.png")


def test_values_colour_the_heads(model):
    figure = plot_hexagonal_grid(model, "Heads", values=list(range(19)))
    from matplotlib.colors import to_hex

    faces = [to_hex(patch.get_facecolor()) for patch in figure.axes[0].patches]
    assert (faces[0], faces[9], faces[18]) == (viridis(0), viridis(0.5), viridis(1))
    with pytest.raises(ValueError, match="19 heads need as many values, got 3"):
        plot_hexagonal_grid(model, "Heads", values=[1, 2, 3])


def test_no_global_figure_is_made(history):
    TelemetryVisualizer(history).plot_gradient_flow()
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()


def test_without_matplotlib_the_error_names_the_extra(history, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'sixfold\[cli\]'"):
        TelemetryVisualizer(history).plot_entropy_evolution()
