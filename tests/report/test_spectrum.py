import sys

import pytest

pytest.importorskip("matplotlib")

import torch
from torch import nn

from sixfold import HexagonalMultiHeadAttention, SpectralHexagonalAttention
from sixfold.report.spectrum import plot_frequency_response


@pytest.fixture
def layer():
    torch.manual_seed(0)
    made = SpectralHexagonalAttention(16, 2, k_eigenvectors=8, d_head=4, filter="chebyshev")
    with torch.no_grad():
        made.mixer.filter.coefficients += 0.3 * torch.randn(4, 4)
    return made


def test_every_group_has_its_response_and_a_dot_at_every_eigenvalue(layer, tmp_path):
    figure = plot_frequency_response(layer, "Filters")
    (axes,) = figure.axes
    assert axes.get_title(loc="left") == "Filters (chebyshev, 3)"
    expected = layer.mixer.response(layer.mixer.eigenvalues)
    for group in range(4):
        (line,) = [one for one in axes.lines if one.get_label() == f"group {group}"]
        x, y = torch.as_tensor(line.get_xdata()), torch.as_tensor(line.get_ydata())
        torch.testing.assert_close(y.double(), layer.mixer.response(x)[group].detach().double())
        dots = torch.as_tensor(axes.collections[group].get_offsets().data)
        assert dots[:, 0].tolist() == list(layer.mixer.eigenvalues)
        torch.testing.assert_close(dots[:, 1].float(), expected[group].detach())
        assert (axes.collections[group].get_sizes() / 14).tolist() == [1, 2, 2, 1, 1, 1]
    # what is not kept is shaded
    (shade,) = axes.patches
    assert shade.get_x() == pytest.approx(layer.mixer.cut)
    figure.savefig(tmp_path / "response.png")


def test_every_layer_has_its_panel_and_the_whole_spectrum_no_shade():
    layers = [
        SpectralHexagonalAttention(16, 1, d_head=4, filter=kind) for kind in ("bands", "rational")
    ]
    figure = plot_frequency_response(nn.Sequential(nn.Linear(2, 2), *layers))
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == [
        "Frequency response, layer 0 (bands, 3)", "Frequency response, layer 1 (rational, 1)",
    ]  # fmt: skip
    assert not any(axes.patches for axes in figure.axes)


def test_a_model_without_a_spectral_mixer_is_refused():
    with pytest.raises(ValueError, match="HexagonalMultiHeadAttention has no spectral mixer"):
        plot_frequency_response(HexagonalMultiHeadAttention(16, 1, 4))


def test_without_matplotlib_the_error_names_the_extra(layer, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'sixfold\[cli\]'"):
        plot_frequency_response(layer)
