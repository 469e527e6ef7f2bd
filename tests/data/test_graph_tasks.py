"""Questions put to graphs: a solver that only walks edges answers all of them, and no guess does."""

from collections import Counter, deque

import pytest
import torch

from sixfold import discover
from sixfold.data.graphs._copies import IGNORED, share_right
from sixfold.data.graphs.ring_transfer import RingTransfer
from sixfold.data.graphs.tree_match import TreeMatch
from sixfold.errors import DataError

RINGS = [
    RingTransfer(length=length, classes=classes, others=others)
    for length, classes in ((2, 3), (5, 5), (12, 4))
    for others in ("ones", "labels")
]
TREES = [TreeMatch(depth=depth) for depth in (1, 2, 3, 5)]


@pytest.fixture(params=RINGS + TREES, ids=str)
def task(request):
    return request.param


def taken_apart(graph, targets):
    """Every graph of a batch by itself: features, neighbours of each node, and what is asked."""
    for part in range(int(graph.member.max()) + 1):
        nodes = (graph.member == part).nonzero().flatten().tolist()
        neighbours = {node: set() for node in nodes}
        for a, b in graph.edges.T.tolist():
            if a in neighbours:
                neighbours[a].add(b)
        asked = [node for node in nodes if targets[node] != IGNORED]
        yield graph.nodes, neighbours, asked


def hops_from(start, neighbours):
    hops, waiting = {start: 0}, deque([start])
    while waiting:
        node = waiting.popleft()
        for other in neighbours[node] - set(hops):
            hops[other] = hops[node] + 1
            waiting.append(other)
    return hops


def solved(task, nodes, neighbours, asked):
    (start,) = asked
    hops = hops_from(start, neighbours)
    far = [node for node, distance in hops.items() if distance == max(hops.values())]
    if isinstance(task, RingTransfer):
        (source,) = far
        return int(nodes[source].argmax())
    half = task.classes
    (leaf,) = [leaf for leaf in far if torch.equal(nodes[leaf, :half], nodes[start, :half])]
    return int(nodes[leaf, half:].argmax())


def test_a_walk_over_the_edges_finds_every_answer(task):
    graph, targets = task.train_batch(seed=1, step=3, size=20)
    for nodes, neighbours, asked in taken_apart(graph, targets):
        assert solved(task, nodes, neighbours, asked) == int(targets[asked[0]])


def test_batches_depend_on_seed_and_step_alone(task):
    def batch(seed, step):
        graph, targets = task.train_batch(seed, step, 9)
        return [*graph, targets]

    first = batch(0, 5)
    batch(0, 6)
    assert all(map(torch.equal, first, batch(0, 5)))
    for other in (batch(0, 6), batch(1, 5)):
        assert not torch.equal(first[0], other[0])


def test_edges_are_undirected_and_join_no_two_graphs(task):
    graph, targets = task.train_batch(0, 0, 4)
    pairs = Counter(map(tuple, graph.edges.T.tolist()))
    assert set(pairs.values()) == {1}
    assert all((b, a) in pairs and a != b for a, b in pairs)
    assert torch.equal(*graph.member[graph.edges])
    assert graph.nodes.dtype == torch.float32 and graph.edges.dtype == torch.int64
    assert torch.equal(graph.member.diff().unique(), torch.tensor([0, 1]))
    assert int((targets != IGNORED).sum()) == 4


def test_answers_are_spread_evenly_and_guessing_is_at_chance(task):
    _, targets = task.train_batch(0, 0, 4000)
    answers = targets[targets != IGNORED]
    share = answers.bincount(minlength=task.classes) / len(answers)
    assert (share - task.chance).abs().max() < 4 * (task.chance / 4000) ** 0.5
    guess = torch.randn(len(targets), task.classes, generator=torch.Generator().manual_seed(0))
    assert share_right(guess, targets) == pytest.approx(task.chance, abs=0.04)


@pytest.mark.parametrize("length", [5, 25])
def test_sizes_are_those_of_the_graph(length):
    graph, _ = RingTransfer(length=length).train_batch(0, 0, 3)
    assert graph.nodes.shape == (3 * 2 * length, 5) and graph.edges.shape == (2, 3 * 4 * length)
    graph, _ = TreeMatch(depth=3).train_batch(0, 0, 3)
    assert graph.nodes.shape == (3 * 15, 16) and graph.edges.shape == (2, 3 * 28)


def test_only_the_source_tells_where_others_show_ones():
    graph, targets = RingTransfer(length=4, classes=5).train_batch(0, 0, 6)
    nodes = graph.nodes.view(6, 8, 5)
    assert nodes[:, 0].abs().max() == 0
    assert torch.equal(nodes[:, [1, 2, 3, 5, 6, 7]], torch.ones(6, 6, 5))
    assert torch.equal(nodes[:, 4].argmax(-1), targets.view(6, 8)[:, 0])


def test_names_are_files():
    for name, kind in (("ring_transfer", RingTransfer), ("tree_match", TreeMatch)):
        assert discover.load("sixfold.data.graphs", name) is kind


def test_what_cannot_be_asked_is_refused():
    for wrong, message in (
        (lambda: RingTransfer(length=1), "length must be a whole number of at least 2, not 1"),
        (lambda: RingTransfer(classes=1), "classes must be a whole number of at least 2, not 1"),
        (lambda: RingTransfer(length=2.5), "length must be a whole number of at least 2, not 2.5"),
        (lambda: RingTransfer(length="3"), "length must be a whole number of at least 2, not '3'"),
        (lambda: RingTransfer(classes=True), "classes must be a whole number .*, not True"),
        (lambda: RingTransfer(others="label"), "unknown others 'label'.*Did you mean 'labels'"),
        (lambda: TreeMatch(depth=0), "depth must be a whole number of at least 1, not 0"),
        (
            lambda: TreeMatch(depth=2).train_batch(0, 0, 0),
            "size must be a whole number of at least 1, not 0",
        ),
    ):
        with pytest.raises(DataError, match=message):
            wrong()
