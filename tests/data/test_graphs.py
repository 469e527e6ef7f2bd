"""Graphs with labels: what the loaders read, and what their parts keep apart."""

import inspect

import numpy as np
import pytest
import torch

from sixfold import discover
from sixfold.contracts import Graph
from sixfold.data.graphs import mutag, planetoid, rfc_citations
from sixfold.data.graphs._labelled import LabelledGraphs, LabelledNodes, undirected
from sixfold.errors import DataError, DataMissing

LOADERS = [planetoid, rfc_citations, mutag]
NODES = [planetoid, rfc_citations]


def check_graph(graph):
    """Nodes, edges that stay inside, come back and are there once, members that ascend."""
    n = len(graph.nodes)
    assert graph.nodes.dtype == torch.float32
    assert graph.edges.min() >= 0 and graph.edges.max() < n
    pairs = set(map(tuple, graph.edges.T.tolist()))
    assert len(pairs) == graph.edges.shape[1]
    assert all((b, a) in pairs and a != b for a, b in pairs)
    assert (graph.member[graph.edges[0]] == graph.member[graph.edges[1]]).all()
    assert set(graph.member.diff().tolist()) <= {0, 1}


@pytest.mark.parametrize("loader", LOADERS, ids=lambda m: m.__name__)
def test_options_are_keywords_and_build_is_what_discover_loads(loader):
    for function in (loader.build, loader.miniature):
        kinds = {p.kind for p in inspect.signature(function).parameters.values()}
        assert kinds <= {inspect.Parameter.KEYWORD_ONLY}
    name = loader.__name__.rpartition(".")[2]
    assert discover.load("sixfold.data.graphs", name) is loader.build


@pytest.mark.parametrize("loader", LOADERS, ids=lambda m: m.__name__)
def test_miniatures_are_seeded_graphs(loader):
    one, again, other = loader.miniature(), loader.miniature(seed=0), loader.miniature(seed=1)
    check_graph(one.graph)
    assert all(torch.equal(a, b) for a, b in zip(one.graph, again.graph, strict=True))
    assert not torch.equal(one.graph.edges, other.graph.edges)


@pytest.mark.parametrize("loader", NODES, ids=lambda m: m.__name__)
def test_neighbours_in_a_miniature_tell_the_class(loader):
    data = loader.miniature()
    known = data.labels[data.graph.edges]
    known = known[:, (known >= 0).all(0)]
    assert (known[0] == known[1]).float().mean() > 2 / data.num_classes


@pytest.mark.parametrize("loader", LOADERS, ids=lambda m: m.__name__)
def test_missing_files_are_named_with_their_home(loader, tmp_path, monkeypatch):
    monkeypatch.setenv("SIXFOLD_DATA", str(tmp_path))
    with pytest.raises(DataMissing, match=f"{loader.FILES[0]} was not found.*https"):
        loader.build()


def test_unknown_names():
    with pytest.raises(DataError, match="unknown graph 'pubmed'; choose from: citeseer, cora"):
        planetoid.build(name="pubmed")
    with pytest.raises(DataError, match="unknown part 'last'; choose from: first, random"):
        rfc_citations.build(part="last")


# ---------------------------------------------------------------- files


def terms(**more):
    """Three nodes of two words: the first has word 0 once and word 1 thrice, the last none."""
    return {
        "x_data": np.array([1, 3, 2], dtype=np.float32),
        "x_indices": np.array([0, 1, 1], dtype=np.int32),
        "x_indptr": np.array([0, 2, 3, 3], dtype=np.int32),
        "shape": np.array([3, 2]),
        **more,
    }


def test_planetoid_is_read_as_it_is_stored(tmp_path, monkeypatch):
    monkeypatch.setenv("SIXFOLD_DATA", str(tmp_path))
    (tmp_path / "planetoid").mkdir()
    np.savez(
        tmp_path / "planetoid/cora.npz",
        **terms(label=np.array([1, 0, 1], dtype=np.int16), edges=np.array([[0, 1], [1, 1], [1, 0]]),
                train=np.array([0]), val=np.array([1]), test=np.array([2])),
    )  # fmt: skip
    data = planetoid.build()
    assert data.graph.nodes.tolist() == [[0.25, 0.75], [0, 1], [0, 0]]
    assert data.graph.edges.tolist() == [[0, 1], [1, 0]]
    assert (data.labels.tolist(), data.num_classes) == ([1, 0, 1], 2)
    assert [p.tolist() for p in (data.train, data.validation, data.test)] == [[0], [1], [2]]


def test_the_first_rfcs_of_a_group_train(tmp_path, monkeypatch):
    monkeypatch.setenv("SIXFOLD_DATA", str(tmp_path))
    monkeypatch.setattr(rfc_citations, "EACH", 2)
    monkeypatch.setattr(rfc_citations, "HELD", 3)
    (tmp_path / "rfc-citations").mkdir()
    n = 12
    np.savez(
        tmp_path / "rfc-citations/rfc.npz",
        x_data=np.ones(n, dtype=np.float32), x_indices=np.zeros(n, dtype=np.int32),
        x_indptr=np.arange(n + 1, dtype=np.int32), shape=np.array([n, 1]),
        label=np.array([0, 1] * 5 + [-1, -1], dtype=np.int16), edges=np.array([[3, 1]]),
        year=np.array([2009, 2008, 2007, 2006, 2005, 2004, 2003, 2002, 2001, 2000, 1990, 1990]),
    )  # fmt: skip
    data = rfc_citations.build(part="first")
    assert data.train.tolist() == [6, 7, 8, 9]
    assert (len(data.validation), len(data.test)) == (3, 3)
    drawn = rfc_citations.build(part="random", seed=3)
    assert data.labels[drawn.train].bincount().tolist() == [2, 2]
    assert not torch.equal(drawn.train, rfc_citations.build(part="random", seed=4).train)


def test_mutag_is_read_as_it_is_stored(tmp_path, monkeypatch):
    monkeypatch.setenv("SIXFOLD_DATA", str(tmp_path))
    (tmp_path / "mutag/MUTAG").mkdir(parents=True)
    written = ("2, 1\n1, 2\n4, 5\n5, 4\n", "1\n1\n1\n2\n2\n", "-1\n1\n", "0\n2\n0\n1\n1\n")
    for file, text in zip(mutag.FILES, written, strict=True):
        (tmp_path / file).write_text(text)
    data = mutag.build()
    assert data.graph.edges.tolist() == [[0, 1, 3, 4], [1, 0, 4, 3]]
    assert data.graph.member.tolist() == [0, 0, 0, 1, 1]
    assert data.graph.nodes.argmax(1).tolist() == [0, 2, 0, 1, 1]
    assert data.labels.tolist() == [0, 1]
    (tmp_path / mutag.FILES[2]).write_text("-1\none\n")
    with pytest.raises(DataError, match="MUTAG_graph_labels.txt must hold whole numbers"):
        mutag.build()


@pytest.mark.data
def test_the_real_graphs_are_those_that_are_described():
    sizes = {"cora": (2708, 1433, 10556, 7), "citeseer": (3327, 3703, 9104, 6)}
    for name, size in sizes.items():
        data = planetoid.build(name=name)
        check_graph(data.graph)
        assert (*data.graph.nodes.shape, data.graph.edges.shape[1], data.num_classes) == size
        assert data.labels[data.train].bincount().tolist() == [20] * data.num_classes
        assert (len(data.validation), len(data.test)) == (500, 1000)
    for part in ("random", "first"):
        data = rfc_citations.build(part=part)
        assert data.labels[data.train].bincount().tolist() == [20] * 60
        assert (len(data.validation), len(data.test)) == (500, 1186)
    data = mutag.build()
    check_graph(data.graph)
    assert data.labels.bincount().tolist() == [63, 125]


# ---------------------------------------------------------------- parts


def test_a_part_holds_its_graphs_and_nothing_else():
    data = mutag.miniature()
    which = torch.tensor([7, 2, 31])
    graph, labels = data.part(which)
    check_graph(graph)
    assert labels.tolist() == data.labels[[2, 7, 31]].tolist()
    for new, old in enumerate((2, 7, 31)):
        mine, whole = graph.member == new, data.graph.member == old
        assert torch.equal(graph.nodes[mine], data.graph.nodes[whole])
        first, start = int(mine.nonzero()[0]), int(whole.nonzero()[0])
        inside = mine[graph.edges[0]]
        expected = data.graph.edges[:, whole[data.graph.edges[0]]] - start
        assert torch.equal(graph.edges[:, inside] - first, expected)


def test_folds_part_all_graphs_and_spread_the_classes():
    data = mutag.miniature()
    folds = data.folds(10, seed=1)
    assert sorted(torch.cat(folds).tolist()) == list(range(40))
    assert all(data.labels[fold].bincount().tolist() == [2, 2] for fold in folds)
    assert all(torch.equal(a, b) for a, b in zip(folds, data.folds(10, seed=1), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(folds, data.folds(10, seed=2), strict=True))
    with pytest.raises(DataError, match=r"count must be in \[2, 40\], not 1"):
        data.folds(1, seed=0)


def test_undirected_edges_come_both_ways_once():
    pairs = np.array([[2, 1], [1, 2], [0, 0], [0, 3]])
    assert undirected(pairs).tolist() == [[0, 1, 2, 3], [3, 2, 1, 0]]


def test_wrong_labels_and_parts_are_named():
    graph = Graph(torch.zeros(3, 1), torch.zeros(2, 0).long(), torch.tensor([0, 0, 1]))
    nodes = [torch.tensor([i]) for i in range(3)]
    labels = torch.tensor([0, 1, -1])
    with pytest.raises(DataError, match="test must hold nodes, all of them with a label"):
        LabelledNodes(graph, labels, 2, *nodes)
    with pytest.raises(DataError, match="must not share a node"):
        LabelledNodes(graph, labels, 2, nodes[0], nodes[1], nodes[0])
    with pytest.raises(DataError, match=r"labels must lie in \[0, 1\), or be -1"):
        LabelledNodes(graph, labels, 1, *nodes)
    with pytest.raises(DataError, match="there are 2 graphs, but 3 labels"):
        LabelledGraphs(graph, labels, 2)
    with pytest.raises(DataError, match=r"labels must lie in \[0, 2\)"):
        LabelledGraphs(graph, labels[1:], 2)
    for kind, given in ((LabelledNodes, (labels, 2, *nodes)), (LabelledGraphs, (labels[:2], 2))):
        with pytest.raises(DataError, match="features of the nodes must be finite"):
            kind(graph._replace(nodes=torch.full((3, 1), torch.nan)), *given)
