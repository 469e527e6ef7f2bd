"""Graphs: filters of the spectrum, with and without attention, against the usual graph convolutions.

Rows go to results/graphs.csv: accuracy on test, on validation and processor seconds of a run, each a mean
over seeds and half the width of its 95 % interval.
Nodes: Cora and Citeseer in their public split; the RFCs of 60 working groups, 20 of each to train, drawn at
random once or the oldest. Each rival draws the same number of configurations from the same space (width, layers,
dropout, weight decay, rate, norm, residual; the i-th of one shares these with the i-th of another) and from what
is its own. The four that are best on validation with one seed get two more, and the best of these by their mean is
trained again with fresh seeds; the step that counts is the best on validation, and the accuracy on test is that of
this step.
Molecules: MUTAG, ten folds; for each the next fold validates and the other eight train. Every fold picks its
configuration and its step on its own validation fold (Errica et al., arXiv 1912.09893), and is trained again
with fresh seeds; a seed's value is the mean over the ten test folds, then none of them has picked anything.
Peers: GCN and GAT of PyTorch Geometric in the frame of Luo et al., arXiv 2406.08993 (residual by a linear map,
norm, relu, dropout, a linear head), given normalised sparse rows where they take them. Resumable: finished runs
are kept in the runs folder. Needs torch_geometric, which is no dependency of Sixfold.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, dropout, relu
from torch_geometric.nn import GATConv, GCNConv, global_add_pool, global_mean_pool
from torch_geometric.nn.conv.gcn_conv import gcn_norm
from trials import remembered, row

from sixfold import models, record
from sixfold.contracts import Graph
from sixfold.data.graphs import mutag, planetoid, rfc_citations
from sixfold.data.graphs._labelled import LabelledGraphs, LabelledNodes
from sixfold.models.graph import GraphClassifier
from sixfold.models.node import NodeClassifier
from sixfold.record import Provenance, publish

RESULTS = Path(__file__).parents[1] / "results" / "graphs.csv"
SHARED = {
    "d_model": (32, 64, 128),
    "num_layers": (1, 2, 3),
    "dropout": (0.3, 0.5, 0.7),
    "weight_decay": (0.0, 5e-4, 2e-3),
    "rate": (2e-3, 5e-3, 1e-2),
    "norm": ("none", "layer", "batch"),
    "residual": (False, True),
}
FILTERS = {"num_heads": (1, 4, 8), "order": (2, 4, 8), "per": ("head", "channel")}
OWN = {
    "gcn": {},
    "gat": {"num_heads": (1, 4, 8)},
    "filters": FILTERS,
    "filters and attention": FILTERS,
}
STEPS, PATIENCE, LOOK = 200, 40, 2
PICK, FINALISTS = (1000, 1001, 1002), 4
"""Seeds that pick a configuration, and how many are tried with all of them."""
FOLDS = 10


def draw(rival: str, number: int, pooled: bool) -> dict[str, Any]:
    """The configuration of that number: what is shared is drawn first, so that rivals share it."""
    rng = np.random.default_rng(number)
    space = SHARED | ({"pooling": ("mean", "sum")} if pooled else {}) | OWN[rival]
    return {name: values[rng.integers(len(values))] for name, values in space.items()}


# ---------------------------------------------------------------- models


class Peer(nn.Module):
    """Graph convolutions of PyTorch Geometric, as a tuned baseline has them."""

    def __init__(self, rival: str, features: int, num_classes: int, config: dict[str, Any]) -> None:
        super().__init__()
        width, layers = config["d_model"], config["num_layers"]
        sizes = [(features if i == 0 else width, width) for i in range(layers)]
        heads = config.get("num_heads", 1)
        self.sparse = rival == "gcn"
        build = partial(GCNConv, normalize=False) if self.sparse else GATConv
        extra = {} if self.sparse else {"heads": heads}
        self.convolutions = nn.ModuleList(
            build(a, b // extra.get("heads", 1), **extra) for a, b in sizes
        )
        self.around = nn.ModuleList(nn.Linear(a, b) for a, b in sizes if config["residual"])
        norms = {"none": nn.Identity, "layer": nn.LayerNorm, "batch": nn.BatchNorm1d}
        self.norms = nn.ModuleList(norms[config["norm"]](width) for _ in range(layers))
        self.dropout, self.pooling = config["dropout"], config.get("pooling")
        self.head = nn.Linear(width, num_classes)
        self.seen: tuple[Tensor, Tensor] | None = None

    def edges(self, graph: Graph) -> Tensor:
        """The edges as this convolution takes them fastest, made once for a graph."""
        if not self.sparse:
            return graph.edges
        if self.seen is None or self.seen[0] is not graph.edges:
            count = len(graph.member)
            edges, weight = gcn_norm(graph.edges, num_nodes=count)
            matrix = torch.sparse_coo_tensor(
                edges.flip(0), weight, (count, count), check_invariants=False
            )
            self.seen = (graph.edges, matrix.coalesce().to_sparse_csr())
        return self.seen[1]

    def forward(self, graph: Graph) -> Tensor:
        x, edges = graph.nodes, self.edges(graph)
        for number, (convolve, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            update = convolve(x, edges)
            if len(self.around):
                update = update + self.around[number](x)
            x = dropout(relu(norm(update)), self.dropout, self.training)
        if self.pooling is not None:
            x = {"mean": global_mean_pool, "sum": global_add_pool}[self.pooling](x, graph.member)
        return self.head(x)


def build(rival: str, features: int, num_classes: int, config: dict[str, Any]) -> nn.Module:
    """The model of a rival."""
    if rival in ("gcn", "gat"):
        return Peer(rival, features, num_classes, config)
    attention = {name: config[name] for name in FILTERS}
    attention["score"] = "dot" if rival == "filters and attention" else None
    shared = {
        name: config[name] for name in ("d_model", "num_layers", "norm", "residual", "dropout")
    }
    if "pooling" in config:
        return GraphClassifier(
            features, num_classes, attention=attention, pooling=config["pooling"], **shared
        )
    return NodeClassifier(features, num_classes, attention=attention, **shared)


# ---------------------------------------------------------------- runs


def thinned(nodes: Tensor, share: float) -> Tensor:
    """Dropout on features, dense or as compressed sparse rows."""
    if nodes.layout == torch.strided:
        return dropout(nodes, share)
    values = dropout(nodes.values(), share)
    return torch.sparse_csr_tensor(
        nodes.crow_indices(), nodes.col_indices(), values, nodes.shape, check_invariants=False
    )


class Seen(NamedTuple):
    """Logits and labels of one part."""

    logits: Tensor
    labels: Tensor

    def accuracy(self) -> float:
        return float((self.logits.argmax(-1) == self.labels).float().mean())

    def loss(self) -> float:
        return float(cross_entropy(self.logits, self.labels))


def fitted(
    model: nn.Module,
    config: dict[str, Any],
    loss: Callable[[], Tensor],
    look: Callable[[], tuple[Seen, Seen]],
) -> dict[str, float]:
    """Adam, decaying matrices, until validation stops to improve; validation and test at its best."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": matrices, "weight_decay": config["weight_decay"]}, {"params": others}]
    optimizer = torch.optim.Adam(groups, lr=config["rate"])
    best, began, step = (-1.0, 0.0, 0, 0.0), time.process_time(), 0
    while step < STEPS and step - best[2] < PATIENCE:
        model.train()
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        step += 1
        if step % LOOK == 0:
            model.eval()
            with torch.no_grad():
                validation, test = look()
            found = (validation.accuracy(), -validation.loss(), step, test.accuracy())
            best = max(best, found, key=lambda seen: seen[:2])
    return {
        "accuracy": best[3],
        "accuracy, validation": best[0],
        "loss, validation": -best[1],
        "seconds": time.process_time() - began,
        "steps": step,
        "parameters": models.parameters(model),
    }


def nodes_run(
    data: LabelledNodes, rival: str, config: dict[str, Any], seed: int
) -> dict[str, float]:
    """One training on all nodes at once."""
    torch.manual_seed(seed)
    model = build(rival, data.graph.nodes.shape[1], data.num_classes, config)
    sparse = data.graph._replace(nodes=data.graph.nodes.to_sparse_csr())

    def loss() -> Tensor:
        nodes = thinned(sparse.nodes, config["dropout"])
        return cross_entropy(
            model(sparse._replace(nodes=nodes))[data.train], data.labels[data.train]
        )

    def look() -> tuple[Seen, Seen]:
        logits = model(sparse)
        return tuple(Seen(logits[p], data.labels[p]) for p in (data.validation, data.test))

    return fitted(model, config, loss, look)


def fold_run(
    data: LabelledGraphs, fold: int, rival: str, config: dict[str, Any], seed: int
) -> dict[str, float]:
    """One training on eight folds of the graphs."""
    torch.manual_seed(seed)
    folds = data.folds(FOLDS, seed=0)
    held = (fold, (fold + 1) % FOLDS)
    train = data.part(torch.cat([part for i, part in enumerate(folds) if i not in held]))
    test, validation = (data.part(folds[i]) for i in held)
    model = build(rival, data.graph.nodes.shape[1], data.num_classes, config)

    def look() -> tuple[Seen, Seen]:
        return tuple(Seen(model(part.inputs), part.targets) for part in (validation, test))

    return fitted(model, config, lambda: cross_entropy(model(train.inputs), train.targets), look)


# ---------------------------------------------------------------- experiments


def standing(tried: list[dict[str, float]]) -> tuple[float, float]:
    """How good a configuration is on validation: mean accuracy, the lower loss where equal."""
    accuracy, loss = (
        float(np.mean([one[f"{what}, validation"] for one in tried]))
        for what in ("accuracy", "loss")
    )
    return accuracy, -loss


def of_nodes(
    name: str,
    data: LabelledNodes,
    rival: str,
    trials: int,
    seeds: int,
    folder: Path,
) -> list[dict[str, float]]:
    """Fresh seeds of the configuration that is best of `trials`."""

    def tried(number: int, seed: int) -> dict[str, float]:
        config = draw(rival, number, pooled=False)
        file = f"{name}-{rival}-try-{number}-{seed}"
        found = remembered(folder, file, lambda: nodes_run(data, rival, config, seed))
        # nobody is to see what a configuration does on the test nodes before one is chosen
        known = {key: value for key, value in found.items() if key != "accuracy"}
        print(f"{name} {rival} {number}, seed {seed}: {known} {config}", flush=True)
        return found

    by_number = {i: [tried(i, PICK[0])] for i in range(trials)}
    finalists = sorted(by_number, key=lambda i: standing(by_number[i]))[-FINALISTS:]
    for i in finalists:
        by_number[i] += [tried(i, seed) for seed in PICK[1:]]
    number = max(finalists, key=lambda i: standing(by_number[i]))
    config = draw(rival, number, pooled=False)
    return [
        remembered(
            folder,
            f"{name}-{rival}-of-{number}-{seed}",
            lambda s=seed: nodes_run(data, rival, config, s),
        )
        for seed in range(seeds)
    ]


def of_graphs(
    name: str, data: LabelledGraphs, rival: str, trials: int, seeds: int, folder: Path
) -> list[dict[str, float]]:
    """For each seed the means over folds, each fold with the configuration of its own choice."""
    by_seed: list[list[dict[str, float]]] = [[] for _ in range(seeds)]
    for fold in range(FOLDS):
        run = partial(fold_run, data, fold, rival)
        tried = [
            remembered(
                folder, f"{name}-{rival}-{fold}-try-{i}",
                lambda i=i, run=run: run(draw(rival, i, pooled=True), PICK[0]),
            )
            for i in range(trials)
        ]  # fmt: skip
        number = max(range(trials), key=lambda i: standing([tried[i]]))
        config = draw(rival, number, pooled=True)
        for seed, found in enumerate(by_seed):
            found.append(remembered(
                folder, f"{name}-{rival}-{fold}-of-{number}-{seed}",
                lambda s=seed, run=run, c=config: run(c, s),
            ))  # fmt: skip
    return [
        {metric: float(np.mean([one[metric] for one in found])) for metric in found[0]}
        for found in by_seed
    ]


def experiments(
    given: argparse.Namespace, folder: Path
) -> dict[str, Callable[[], list[dict[str, float]]]]:
    """What to run, by name of the row."""
    found: dict[str, Callable[[], list[dict[str, float]]]] = {}
    molecules = mutag.build()
    for rival in OWN:
        found[f"mutag, {rival}"] = partial(
            of_graphs, "mutag", molecules, rival, given.fold_trials, given.fold_seeds, folder
        )
    for name in planetoid.GRAPHS:
        data = planetoid.build(name=name)
        for rival in OWN:
            found[f"{name}, {rival}"] = partial(
                of_nodes, name, data, rival, given.trials, given.seeds, folder
            )
    for part in rfc_citations.SPLITS:
        data = rfc_citations.build(part=part, seed=0)
        for rival in ("gcn", "filters"):
            found[f"rfc {part}, {rival}"] = partial(
                of_nodes, f"rfc {part}", data, rival, given.large_trials, given.large_seeds, folder
            )
    return found


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--runs", type=Path, default=Path("runs/graphs"))
    arguments.add_argument("--trials", type=int, default=24, help="configurations of a rival")
    arguments.add_argument("--seeds", type=int, default=10)
    arguments.add_argument("--fold-trials", type=int, default=3)
    arguments.add_argument("--fold-seeds", type=int, default=3)
    arguments.add_argument("--large-trials", type=int, default=3, help="of the RFCs")
    arguments.add_argument("--large-seeds", type=int, default=5)
    arguments.add_argument("--only", nargs="*", help="data by name; all without it")
    arguments.add_argument("--rivals", nargs="*", default=list(OWN), choices=OWN)
    arguments.add_argument(
        "--no-publish", action="store_true", help="print and keep the runs alone"
    )
    given = arguments.parse_args()
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
    settings = record.config_hash({
        "shared": SHARED, "own": OWN, "steps": STEPS, "patience": PATIENCE, "look": LOOK, "pick": PICK,
        "finalists": FINALISTS, "trials": (given.trials, given.large_trials, given.fold_trials),
    })  # fmt: skip
    origin = Provenance(record.device_name(), record.commit(), settings)
    for case, run in experiments(given, given.runs / settings).items():
        data, _, rival = case.partition(", ")
        if rival not in given.rivals or not (given.only is None or data in given.only):
            continue
        found = run()
        metrics = ("accuracy", "accuracy, validation", "seconds", "steps", "parameters")
        rows = [row("graphs", case, metric, [f[metric] for f in found]) for metric in metrics]
        for r in rows:
            print(f"{r.case:<32} {r.metric:<22} {r.value:9.4g} ± {r.spread:.3g}", flush=True)
        if not given.no_publish:
            publish(RESULTS, rows, origin)


if __name__ == "__main__":
    main()
