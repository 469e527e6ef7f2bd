"""Attention over graphs: what it computes, what it keeps apart, and what it refuses."""

import pytest
import torch

from sixfold import MultiHeadAttention
from sixfold.attention.graph import SpectralGraphAttention, Topology, walk
from sixfold.contracts import Graph
from sixfold.geometry.graph import laplacian

WIDTH, HEADS = 12, 3


def random_graph(seed, sizes=(7,), chance=0.4):
    """Graphs of these sizes side by side, float64, at least one node of each without edges."""
    generator = torch.Generator().manual_seed(seed)
    edges, member, start = [], [], 0
    for number, size in enumerate(sizes):
        joined = torch.rand(size, size, generator=generator) < chance
        joined = torch.triu(joined, 1)
        joined[:, -1] = False
        pairs = joined.nonzero().T + start
        edges += [pairs, pairs.flip(0)]
        member += [number] * size
        start += size
    nodes = torch.randn(start, WIDTH, generator=generator, dtype=torch.float64)
    return Graph(nodes, torch.cat(edges, dim=1), torch.tensor(member))


def made(seed=0, gate=0.7, **options):
    """A layer in float64 whose filters are not those it starts with."""
    torch.manual_seed(seed)
    layer = SpectralGraphAttention(WIDTH, HEADS, dtype=torch.float64, **options)
    if layer.gate is not None:
        torch.nn.init.constant_(layer.gate, gate)
    if layer.coefficients is not None:
        torch.nn.init.normal_(layer.coefficients)
    return layer


def close(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


KINDS = {
    "both": {},
    "filters": {"score": None},
    "attention": {"order": None},
    "a filter per channel": {"per": "channel", "order": 2},
    "another score": {"score": "l2"},
}


@pytest.fixture(params=KINDS)
def layer(request):
    return made(**KINDS[request.param])


@pytest.mark.parametrize("sizes", [(9,), (5, 8, 3)])
def test_renumbering_the_nodes_renumbers_the_output(layer, sizes):
    graph = random_graph(1, sizes)
    # within each graph, for members ascend
    shuffled = torch.cat([p + int((graph.member < g).sum()) for g, size in enumerate(sizes)
                          for p in [torch.randperm(size)]])  # fmt: skip
    where = torch.empty_like(shuffled)
    where[shuffled] = torch.arange(len(shuffled))
    order = torch.randperm(graph.edges.shape[1])
    other = graph._replace(nodes=graph.nodes[shuffled], edges=where[graph.edges[:, order]])
    close(layer(other.nodes, other), layer(graph.nodes, graph)[shuffled])


def test_graphs_side_by_side_do_not_meet(layer):
    sizes = (5, 8, 1, 6)
    graph = random_graph(2, sizes)
    together, start = layer(graph.nodes, graph), 0
    for size in sizes:
        own = slice(start, start + size)
        inside = (graph.edges[0] >= start) & (graph.edges[0] < start + size)
        member = torch.zeros(size, dtype=torch.int64)
        alone = Graph(graph.nodes[own], graph.edges[:, inside] - start, member)
        close(layer(alone.nodes, alone), together[own])
        start += size


def test_a_change_in_one_graph_changes_no_bit_of_another(layer):
    graph = random_graph(3, (6, 7))
    other = graph.nodes.clone()
    other[6:] += 1.0
    one, two = (layer(nodes, graph) for nodes in (graph.nodes, other))
    assert torch.equal(one[:6], two[:6])
    assert not torch.equal(one[6:], two[6:])


def test_filters_are_functions_of_the_eigenvalues():
    """The formula with the eigenvectors of the Laplacian, which the layer never finds."""
    layer, graph = made(order=4, score=None), random_graph(4)
    adjacency = torch.zeros(7, 7, dtype=torch.float64)
    adjacency[graph.edges[0], graph.edges[1]] = 1.0
    lambdas, vectors = torch.linalg.eigh(laplacian(adjacency, normalized=True))
    value = layer.value(graph.nodes).view(7, HEADS, -1)
    heads = []
    for head, gains in enumerate(layer.response(lambdas)[:, 0]):
        heads.append(vectors @ torch.diag(gains) @ vectors.T @ value[:, head])
    close(layer(graph.nodes, graph), torch.cat(heads, dim=-1))


def test_of_order_one_it_is_a_graph_convolution():
    """Kipf and Welling, arXiv 1609.02907, section 2: D^(-1/2) A D^(-1/2) X W, edge by edge."""
    layer, graph = made(order=1, score=None), random_graph(4)
    with torch.no_grad():
        layer.coefficients.copy_(torch.tensor([0.0, -1.0])[:, None, None])
    degree = graph.edges[1].bincount(minlength=7).double()
    expected = torch.zeros_like(graph.nodes)
    for source, target in graph.edges.T.tolist():
        expected[target] += graph.nodes[source] / (degree[source] * degree[target]).sqrt()
    joined = degree > 0
    close(layer(graph.nodes, graph)[joined], (expected @ layer.value.weight.T)[joined])


@pytest.mark.parametrize("head", range(HEADS))
def test_a_head_fills_channels_of_its_own(layer, head):
    graph, own = random_graph(16), torch.arange(WIDTH) // (WIDTH // HEADS) == head
    before = layer(graph.nodes, graph)
    with torch.no_grad():
        layer.value.weight[own] *= 2
    after = layer(graph.nodes, graph)
    close(after[:, own], 2 * before[:, own])
    assert torch.equal(after[:, ~own], before[:, ~own])


def test_without_filters_it_is_plain_attention():
    layer, plain = made(order=None), MultiHeadAttention(WIDTH, HEADS, dtype=torch.float64)
    with torch.no_grad():
        plain.projection.qkv.weight.copy_(
            torch.cat([layer.queries_keys.weight, layer.value.weight])
        )
        torch.nn.init.eye_(plain.output.weight)
    graph = random_graph(5)
    expected = plain(graph.nodes[None])[0]
    close(layer(graph.nodes, graph), expected)
    both = made(gate=1.0)
    with torch.no_grad():
        both.coefficients.zero_()
        for name in ("queries_keys", "value"):
            getattr(both, name).weight.copy_(getattr(layer, name).weight)
    close(both(graph.nodes, graph), expected)


def test_both_paths_add_up_under_the_gate_of_each_head():
    layer, graph = made(), random_graph(6, (4, 5))
    gate = torch.nn.init.normal_(layer.gate.data)
    there = Topology.of(graph)
    value = layer.value(graph.nodes).view(9, HEADS, -1)
    out = layer.filtered(value, there)
    out = out + gate[:, None] * layer.attended(graph.nodes, value, there)
    close(layer(graph.nodes, graph), out.flatten(1))


def test_a_fresh_layer_walks_and_looks_elsewhere_from_the_first_step():
    torch.manual_seed(0)
    layer, graph = SpectralGraphAttention(WIDTH, HEADS, order=3).double(), random_graph(7)
    lambdas = torch.linspace(0, 2, 9, dtype=torch.float64)
    expected = ((1 - lambdas / 2) ** 3).expand(HEADS, 1, 9)
    torch.testing.assert_close(layer.response(lambdas), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(layer.gate.detach(), torch.full((HEADS,), 0.1).double())
    layer(graph.nodes, graph).square().sum().backward()
    assert layer.gate.grad.all()
    assert layer.queries_keys.weight.grad.any(1).all()


@pytest.mark.parametrize("steps", [0, 1, 2, 5, 20])
def test_walks_are_powers_of_one_lazy_step(steps):
    lambdas = torch.linspace(0, 2, 17, dtype=torch.float64)
    terms = (torch.arange(steps + 1)[:, None] * (lambdas - 1).acos()).cos()
    torch.testing.assert_close(walk(steps) @ terms, (1 - lambdas / 2) ** steps, rtol=0, atol=1e-13)


def test_attention_reaches_what_no_filter_can():
    path = torch.tensor([[i, i + 1] for i in range(9)]).T
    nodes = torch.randn(10, WIDTH, dtype=torch.float64, requires_grad=True)
    graph = Graph(nodes, torch.cat([path, path.flip(0)], dim=1), torch.zeros(10, dtype=torch.int64))
    for gate, reached in ((0.0, 4), (0.5, 10)):
        out = made(order=3, gate=gate)(nodes, graph)
        (gradient,) = torch.autograd.grad(out[0].sum(), nodes)
        assert int(gradient.any(1).sum()) == reached


def test_nodes_without_edges_keep_to_themselves():
    layer = made(score=None, order=3)
    nodes = torch.randn(4, WIDTH, dtype=torch.float64)
    alone = Graph(nodes, torch.zeros(2, 0, dtype=torch.int64), torch.zeros(4, dtype=torch.int64))
    gain = layer.response([0.0])[:, 0]
    value = layer.value(nodes).view(4, HEADS, -1)
    close(layer(nodes, alone), (gain * value).flatten(1))


@pytest.mark.parametrize("sizes", [(7,), (4, 6)])
def test_the_reference_agrees_and_so_do_its_gradients(sizes):
    graph, found = random_graph(8, sizes), []
    for impl in ("auto", "reference"):
        layer = made(impl=impl)
        x = graph.nodes.clone().requires_grad_()
        out = layer(x, graph)
        gradients = torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])
        found.append((out, *gradients))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_gradients_are_those_of_finite_differences():
    layer, graph = made(impl="reference"), random_graph(9, (3, 4))
    x = graph.nodes.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: layer(x, graph), (x,), fast_mode=True)


def test_every_parameter_gets_a_gradient(layer):
    graph = random_graph(10, (6, 5))
    layer(graph.nodes, graph).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_a_topology_serves_as_its_graph(layer):
    graph = random_graph(11, (6, 5))
    assert torch.equal(layer(graph.nodes, Topology.of(graph)), layer(graph.nodes, graph))


def test_rows_come_back():
    graph = random_graph(12, (2, 4, 1))
    there = Topology.of(graph)
    rows = there.rows(graph.nodes)
    assert rows.shape == (3, 4, WIDTH)
    assert not rows[~there.real].any()
    assert torch.equal(there.nodes(rows), graph.nodes)


def test_dropout_is_of_training_alone():
    layer, graph = made(dropout=0.5), random_graph(13)
    assert not torch.equal(layer(graph.nodes, graph), layer(graph.nodes, graph))
    layer.eval()
    assert torch.equal(layer(graph.nodes, graph), layer(graph.nodes, graph))


def test_autocast_gives_one_dtype_whatever_a_head_does():
    graph = random_graph(14, (6, 5))
    graph = graph._replace(nodes=graph.nodes.float())
    for options in KINDS.values():
        layer = made(**options).float()
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(graph.nodes, graph).dtype == torch.bfloat16


def test_bfloat16_is_near_single_precision():
    torch.manual_seed(0)
    layer, graph = SpectralGraphAttention(WIDTH, HEADS), random_graph(14, (6, 5))
    single = layer(graph.nodes.float(), graph)
    half = layer.bfloat16()(graph.nodes.bfloat16(), graph).float()
    torch.testing.assert_close(half, single, rtol=0, atol=10 * 2**-8)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"order": None, "score": None}, "order and score cannot both be None"),
        ({"order": -1}, "order must be a whole number of 0 or more, or None, got -1"),
        ({"order": 2.5}, "order must be a whole number of 0 or more, or None, got 2.5"),
        ({"per": "channel", "order": None}, "per says whose a filter is, and order None has none"),
        ({"dropout": 0.5, "score": None}, "dropout drops weights of a score, which is None"),
        ({"impl": "nonsense", "score": None}, "unknown impl 'nonsense'"),
        ({"per": "chanel"}, "unknown per 'chanel'; choose from: channel, head. Did you mean 'channel'"),
        ({"score": "kl"}, "score 'kl' rates a belief"),
        ({"score": "dott"}, "unknown score 'dott'"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"impl": "tiled"}, "impl 'tiled' cannot serve Features"),
        ({"num_heads": 5}, "d_model 12 is not a multiple of num_heads 5"),
    ],
)  # fmt: skip
def test_wrong_options_are_named(options, said):
    with pytest.raises(ValueError, match=said):
        SpectralGraphAttention(**{"d_model": WIDTH, "num_heads": HEADS} | options)


def test_wrong_graphs_are_named():
    layer, graph = made(), random_graph(15, (3, 4))
    across = torch.tensor([[0, 5], [5, 0]])
    for other, said in (
        (graph._replace(member=graph.member[:4]), r"member must be int64 .* beside \(7, 12\)"),
        (graph._replace(member=graph.member + 1), "member must ascend from 0 by steps of 1"),
        (graph._replace(member=graph.member * 2), "every graph has nodes"),
        (graph._replace(edges=across), "nodes 0 and 5 belong to graphs 0 and 1"),
        (graph._replace(edges=across[:, :1]), "every edge both ways"),
        (graph._replace(edges=[[0, 1], [1, 0]]), "edges of a graph must be a tensor"),
        (graph._replace(member=None), "member of a graph must be a tensor, got None"),
        (tuple(graph), r"must be a Graph of nodes, edges and member, got \(tensor"),
        (None, "must be a Graph of nodes, edges and member, got None"),
    ):
        with pytest.raises(ValueError, match=said):
            layer(graph.nodes, other)
    with pytest.raises(
        ValueError, match=r"x must be floating \(n, d_model\) = \(7, 12\), got .* \(7, 11\)"
    ):
        layer(graph.nodes[:, 1:], graph)
    with pytest.raises(ValueError, match="order None has no filters"):
        made(order=None).response([0.0])
