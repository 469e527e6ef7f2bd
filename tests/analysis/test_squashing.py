"""Sensitivity against finite differences and against a model whose Jacobian is known."""

import pytest
import torch
from torch import nn

from sixfold.analysis.squashing import sensitivity, sensitivity_by_distance
from sixfold.attention.graph import SpectralGraphAttention
from sixfold.contracts import Graph
from sixfold.geometry.graph import ring
from sixfold.geometry.hexgrid import HexGrid
from sixfold.geometry.resistance import hop_distance


def graph_of(adjacency, width, seed=0):
    nodes = torch.randn(
        len(adjacency), width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    return Graph(nodes, adjacency.nonzero().T, torch.zeros(len(adjacency), dtype=torch.int64))


def walk(graph):
    """D^-1/2 (A + I) D^-1/2, from the edges."""
    size = len(graph.nodes)
    matrix = torch.eye(size, dtype=graph.nodes.dtype)
    matrix[graph.edges[0], graph.edges[1]] = 1.0
    scale = matrix.sum(1).rsqrt()
    return scale[:, None] * matrix * scale


class Passing(nn.Module):
    """h <- act(A h W), so many times."""

    def __init__(self, width, layers, act):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weights = nn.ParameterList(
            torch.randn(width, width, dtype=torch.float64, generator=generator)
            for _ in range(layers)
        )
        self.act = act

    def forward(self, graph):
        h = graph.nodes
        for weight in self.weights:
            h = self.act(walk(graph) @ h @ weight)
        return h


GRAPHS = {"ring": ring(9), "hexagonal": HexGrid(2).adjacency()}


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("layers", [1, 3])
def test_a_linear_model_has_powers_of_the_walk(name, layers):
    graph = graph_of(GRAPHS[name], 3)
    model = Passing(3, layers, lambda h: h)
    through = torch.linalg.multi_dot([torch.eye(3).double(), *model.weights, torch.eye(3).double()])
    expected = torch.linalg.matrix_power(walk(graph), layers) * through.norm()
    torch.testing.assert_close(sensitivity(model, graph), expected)


def test_finite_differences_agree():
    graph, model = graph_of(HexGrid(1).adjacency(), 2), Passing(2, 3, torch.tanh)
    step, slopes = 1e-5, torch.zeros(7, 7, dtype=torch.float64)
    for node in range(7):
        for channel in range(2):
            ends = []
            for sign in (1, -1):
                nodes = graph.nodes.clone()
                nodes[node, channel] += sign * step
                with torch.no_grad():
                    ends.append(model(graph._replace(nodes=nodes)))
            slopes[:, node] += ((ends[0] - ends[1]) / (2 * step)).square().sum(1)
    torch.testing.assert_close(sensitivity(model, graph), slopes.sqrt(), rtol=1e-6, atol=1e-9)


def test_nothing_arrives_from_farther_than_there_are_layers():
    graph = graph_of(ring(12), 2)
    found, hops = sensitivity(Passing(2, 3, torch.tanh), graph), hop_distance(ring(12))
    assert (found[hops <= 3] > 0).all()
    assert found[hops > 3].abs().max() == 0


def test_chosen_targets_are_rows_of_all():
    graph, model = graph_of(ring(8), 2), Passing(2, 2, torch.tanh)
    targets = torch.tensor([5, 0])
    every = sensitivity(model, graph)
    torch.testing.assert_close(sensitivity(model, graph, targets), every[targets])
    found = sensitivity_by_distance(model, graph, targets)
    assert found.count.tolist() == [2, 4, 4, 4, 2]
    at_one = torch.cat([every[5, [4, 6]], every[0, [1, 7]]])
    assert found.median[1].item() == pytest.approx(at_one.quantile(0.5).item())


def test_a_ring_of_equal_nodes_has_one_value_for_each_distance():
    graph = graph_of(ring(8), 2)
    graph = graph._replace(nodes=torch.ones_like(graph.nodes))
    found = sensitivity_by_distance(Passing(2, 4, torch.tanh), graph)
    torch.testing.assert_close(found.low, found.high)
    assert (found.median.diff() < 0).all()


def test_two_graphs_side_by_side_do_not_meet():
    graph = graph_of(torch.block_diag(ring(4), ring(5)), 2)
    member = torch.tensor([0] * 4 + [1] * 5)
    found = sensitivity_by_distance(Passing(2, 3, torch.tanh), graph._replace(member=member))
    assert found.distance.tolist() == [0, 1, 2] and int(found.count.sum()) == 4 * 4 + 5 * 5


def test_the_model_is_left_as_it_was_and_gradients_are_not_needed_outside():
    graph, model = graph_of(ring(5), 2), Passing(2, 2, torch.tanh)
    with torch.no_grad():
        inside = sensitivity(model, graph)
    torch.testing.assert_close(inside, sensitivity(model, graph))
    assert all(weight.grad is None for weight in model.parameters())
    assert not graph.nodes.requires_grad and not inside.requires_grad


def test_an_output_that_ignores_the_nodes_has_no_sensitivity():
    graph, bias = graph_of(ring(4), 2), nn.Parameter(torch.ones(4, 3))
    for constant in (lambda graph: torch.ones(4, 3), lambda graph: bias * 2):
        assert torch.equal(sensitivity(constant, graph), torch.zeros(4, 4).double())


def test_what_cannot_be_differentiated_is_refused():
    graph, model = graph_of(ring(4), 2), Passing(2, 1, torch.tanh)
    with pytest.raises(ValueError, match=r"nodes must be real.*got torch.int64"):
        sensitivity(model, graph._replace(nodes=graph.nodes.long()))
    with pytest.raises(
        ValueError, match=r"targets must be nodes in \[0, 4\), one or more, got \[4, -1\]"
    ):
        sensitivity(model, graph, torch.tensor([4, 1, -1]))
    with pytest.raises(ValueError, match=r"one or more, got \[\]"):
        sensitivity(model, graph, torch.tensor([], dtype=torch.int64))
    with pytest.raises(ValueError, match=r"outputs must be \(4, d\), got \(1, 2\)"):
        sensitivity(lambda graph: graph.nodes.mean(0, keepdim=True), graph)
    with pytest.raises(ValueError, match="must be symmetric"):
        one_way = graph._replace(edges=torch.tensor([[0], [1]]))
        sensitivity_by_distance(lambda graph: graph.nodes, one_way)


@pytest.mark.parametrize(
    ("targets", "shown"),
    [
        (torch.ones(4, dtype=torch.bool), r"torch.bool \(4,\)"),
        (torch.ones(2), r"torch.float32 \(2,\)"),
        (torch.tensor(1), r"torch.int64 \(\)"),
        ([1], r"\[1\]"),
    ],
)
def test_targets_that_are_no_numbers_of_nodes_are_refused(targets, shown):
    for measure in (sensitivity, sensitivity_by_distance):
        with pytest.raises(
            ValueError, match=rf"targets must be a tensor \(t,\), int64.*got {shown}"
        ):
            measure(lambda graph: graph.nodes, graph_of(ring(4), 2), targets)


def test_filters_reach_as_far_as_their_order_and_attention_everywhere():
    graph, hops = graph_of(ring(14), 4), hop_distance(ring(14))

    def two_layers(**options):
        torch.manual_seed(0)
        layers = [SpectralGraphAttention(4, 2, dtype=torch.float64, **options) for _ in range(2)]
        return lambda graph: layers[1](layers[0](graph.nodes, graph).tanh(), graph)

    found = sensitivity(two_layers(order=2, score=None), graph)
    assert (found[hops <= 4] > 0).all()
    assert found[hops > 4].abs().max() == 0
    for options in ({"order": 2}, {"order": None}):
        assert (sensitivity(two_layers(**options), graph) > 0).all()
