"""Mixers: what the graph changes, and what it leaves."""

import pytest
import torch

from sixfold import discover
from sixfold.attention.mixer._graph import GraphMixer
from sixfold.attention.mixer.hexagonal import edge_orbits
from sixfold.contracts import Features, Heads
from sixfold.geometry.hexgrid import HexGrid
from sixfold.ops.headmix.reference import headmix

CLOSE = {"rtol": 0, "atol": 1e-12}
MIXERS = {
    name: discover.load("sixfold.attention.mixer", name)(Heads(24, 7, 4, 7))
    for name in discover.names("sixfold.attention.mixer")
}
GRAPHS = [name for name, mixer in MIXERS.items() if type(mixer) is GraphMixer]


def mixed(layer, heads):
    """H + gate * M, by the definition."""
    mixer = layer.mixer
    graph = mixer.graph()
    m = headmix(heads, mixer.weight_self, mixer.weight_neighbour, graph)
    return heads + mixer.gate[mixer.nodes][:, None] * m


@pytest.mark.parametrize("name", [name for name, m in MIXERS.items() if not m.mixes_logits])
def test_mixers_of_outputs_leave_logits_as_they_are(name):
    rating = Features(torch.randn(1, 7, 2, 4), torch.randn(1, 7, 3, 4), 1.0)
    assert MIXERS[name].mix_logits(rating) is rating


def heads_of(tokens, count=7, width=4):
    return tokens(2, 5, count * width).unflatten(-1, (count, width))


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("impl", ["auto", "fused", "reference"])
def test_mixing_is_the_definition(make, tokens, name, impl):
    layer = make({"mixer": name}, impl=impl)
    heads = heads_of(tokens)
    torch.testing.assert_close(layer.mixer.mix_outputs(heads, impl), mixed(layer, heads), **CLOSE)


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize(("num_heads", "width"), [(7, 8), (19, 40), (37, 16)])
def test_wide_and_narrow_layers_agree_with_the_definition(make, tokens, impl, num_heads, width):
    layer = make({"mixer": "hexagonal"}, num_heads=num_heads, head_dim=width)
    heads = heads_of(tokens, num_heads, width).requires_grad_()
    inputs = [heads, *layer.mixer.parameters()]
    found, expected = layer.mixer.mix_outputs(heads, impl), mixed(layer, heads)
    torch.testing.assert_close(found, expected, **CLOSE)
    weight = torch.linspace(-1, 1, heads.numel(), dtype=torch.float64).view(heads.shape)
    for one, other in zip(
        torch.autograd.grad((found * weight).sum(), inputs),
        torch.autograd.grad((expected * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", GRAPHS)
def test_a_closed_gate_gives_exactly_the_unmixed_layer(make, tokens, name):
    layer, plain = make({"mixer": name}), make({})
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if "mixer" not in k})
    x = tokens(2, 9)
    assert (layer(x) - plain(x)).abs().max() > 1e-3
    torch.nn.init.zeros_(layer.mixer.gate)
    assert torch.equal(layer(x), plain(x))
    layer(x).square().sum().backward()
    assert (layer.mixer.gate.grad != 0).all()


@pytest.mark.parametrize("name", GRAPHS)
def test_without_neighbour_weights_heads_do_not_meet(make, tokens, name):
    layer = make({"mixer": name})
    torch.nn.init.zeros_(layer.mixer.weight_neighbour)
    heads = heads_of(tokens)
    other = heads.clone()
    other[:, :, 3] += 1.0
    change = layer.mixer.mix_outputs(other, "auto") - layer.mixer.mix_outputs(heads, "auto")
    moved = change.abs().amax((0, 1, 3)) > 0
    assert moved.tolist() == [head == 3 for head in range(7)]


@pytest.mark.parametrize(("name", "touched"), [("ring", 3), ("dense", 19), ("hexagonal", 7)])
def test_a_head_reaches_its_neighbours(make, tokens, name, touched):
    """Head 9 is the centre of nineteen; relu is kept open so that nothing hides."""
    layer = make({"mixer": name}, num_heads=19)
    centre = 9
    with torch.no_grad():
        for parameter in layer.mixer.parameters():
            parameter.abs_()
    heads = heads_of(tokens, 19).abs()
    other = heads.clone()
    other[:, :, centre] += 1.0
    change = layer.mixer.mix_outputs(other, "auto") - layer.mixer.mix_outputs(heads, "auto")
    moved = set(torch.nonzero(change.abs().amax((0, 1, 3)) > 1e-9).flatten().tolist())
    assert len(moved) == touched
    if name == "hexagonal":
        grid = HexGrid(2)
        near = {grid.index[cell] for cell in grid.coordinates[centre].neighbours()}
        assert moved == near | {centre}


@pytest.mark.parametrize("radius", [1, 2])
def test_tied_mixing_commutes_with_turning_the_grid(make, tokens, radius):
    grid = HexGrid(radius)
    heads = heads_of(tokens, grid.num_heads)
    for tied in (True, False):
        part = {"name": "hexagonal", "tied": tied}
        mixer = make({"mixer": part}, num_heads=grid.num_heads).mixer
        out = mixer.mix_outputs(heads, "auto")
        worst = 0.0
        for turn in range(1, 6):
            place = grid.rotation(turn)
            turned = torch.empty_like(heads)
            turned[:, :, place] = heads
            expected = torch.empty_like(out)
            expected[:, :, place] = out
            worst = max(worst, (mixer.mix_outputs(turned, "auto") - expected).abs().max().item())
        assert (worst < 1e-12) == tied
        assert tied or worst > 1e-3


@pytest.mark.parametrize(("radius", "orbits"), [(1, 4), (2, 14), (3, 30)])
def test_edge_orbits_are_those_of_brute_force(radius, orbits):
    """Directed edges (18R^2 + 6R) in orbits of six: 3R^2 + R."""
    grid = HexGrid(radius)
    found = edge_orbits(grid)
    classes = {}
    for i, j in torch.nonzero(grid.adjacency()).tolist():
        turned = frozenset(
            (grid.index[grid.coordinates[i].rotate(t)], grid.index[grid.coordinates[j].rotate(t)])
            for t in range(6)
        )
        classes.setdefault(turned, set()).add(int(found[i, j]))
    assert len(classes) == orbits == 3 * radius**2 + radius
    assert all(len(numbers) == 1 for numbers in classes.values())
    assert len({next(iter(numbers)) for numbers in classes.values()}) == orbits
    assert (found[grid.adjacency() == 0] == -1).all()


def test_the_random_graph_has_the_grids_degrees_and_a_seed(make):
    def graph(seed):
        return (
            make({"mixer": {"name": "random", "graph_seed": seed}}, num_heads=19)
            .mixer.graph()
            .detach()
        )

    grid = HexGrid(2).adjacency().double()
    links = (graph(0) != 0).double() - torch.eye(19)
    assert torch.equal(links.sum(1), grid.sum(1))
    assert not torch.equal(links, grid)
    assert torch.equal(graph(3), graph(3))
    assert not torch.equal(graph(0), graph(3))


def test_one_gain_per_directed_edge_and_one_per_tied_orbit(make):
    free = make({"mixer": "hexagonal"}).mixer
    tied = make({"mixer": {"name": "hexagonal", "tied": True}}).mixer
    assert [len(p) for p in (free.edge_gain, free.self_gain, free.gate)] == [24, 7, 7]
    assert [len(p) for p in (tied.edge_gain, tied.self_gain, tied.gate)] == [4, 2, 2]
    assert make({"mixer": "ring"}, num_heads=1).mixer.edge_gain.numel() == 0
    graph = free.graph()
    assert torch.equal(graph.diagonal(), free.self_gain)
    links = HexGrid(1).adjacency().bool()
    assert torch.equal(graph[links], free.edge_gain)
    assert (graph - torch.diag(graph.diagonal()))[~links].abs().max() == 0


@pytest.mark.parametrize("num_heads", [1, 2])
def test_the_smallest_graphs_work(make, tokens, num_heads):
    for name in ("ring", "dense"):
        layer = make({"mixer": name}, num_heads=num_heads)
        x = tokens(2, 5).requires_grad_()
        out = layer(x)
        heads = heads_of(tokens, num_heads)
        torch.testing.assert_close(
            layer.mixer.mix_outputs(heads, "auto"), mixed(layer, heads), **CLOSE
        )
        assert torch.isfinite(torch.autograd.grad(out.square().sum(), x)[0]).all()
