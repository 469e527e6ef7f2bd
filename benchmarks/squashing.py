"""Over-squashing: who still hears a node that is far away, and what does it cost?

Rows go to results/squashing.csv. Tasks are drawn anew for every step. "ring d": what label does the
node d hops away show, the others showing ones. "ring of labels d": the others show labels too, so
that only the place tells which one is meant. "told places": every node is also told where it is, by
four pairs of the ring's lowest eigenvectors, turned and mirrored at random in every graph. "tree r":
Tree-NeighborsMatch of depth r. Where places are not told no model knows more than the edges.
Full and spectral attention are the same module without and with filters, two layers; filters alone
are a third. GCN and GAT are PyTorch Geometric's, with as many layers as there are hops (on trees one
more, as published). All stand in one shell, relu(norm(layer(x) + x)), and have 25,000 parameters
within 7 %: width pays for depth. The learning rate is picked by the validation accuracy of a seed that
is not reported, then by the steps that took; training ends early once validation is perfect twice in a row.
Accuracy is of 512 graphs, mean over seeds and half width of its 95 % interval. "sensitivity at d
hops" is the median of ||d logits_v / d x_u|| over nodes u that far from the node v that is asked;
"beyond 10 hops" is the share that comes from there, medians weighted by the number of nodes.
Times of one step are taken in turn with full attention's. Resumable: finished runs are kept.
"""

from __future__ import annotations

import argparse
import math
from bisect import bisect_left
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from timing import interleaved, ratio
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, relu
from trials import remembered, row

from sixfold import models, record
from sixfold.analysis.squashing import sensitivity_by_distance
from sixfold.contracts import Batch, Graph
from sixfold.data.graphs._copies import IGNORED, share_right
from sixfold.data.graphs.ring_transfer import RingTransfer
from sixfold.data.graphs.tree_match import TreeMatch
from sixfold.geometry.resistance import Quartiles
from sixfold.models.node import NodeClassifier
from sixfold.record import Provenance, Result, publish
from sixfold.train.optimizer import OptimizerSettings, build_optimizer, set_rate

RESULTS = Path(__file__).parents[1] / "results" / "squashing.csv"
PARAMETERS, HEADS, FREQUENCIES = 25_000, 2, 4
LOOK = 20
PICK = 99
"""The seed that picks learning rates."""
STEPS = {"ring": 300, "ring of labels": 300, "told places": 300, "tree": 800}
BATCH = {"ring": 16, "ring of labels": 16, "told places": 16, "tree": 128}
RATES = (3e-3, 6e-3, 1e-2)
SHOWN = [
    f"sensitivity at {d} hops, {when}" for d in (1, 10, 20) for when in ("untrained", "trained")
]
VALIDATION, TEST = 2**32, 2**32 + 1  # no seeds of training
NAMES = ("full", "spectral", "filters", "GCN", "GAT")


class Task(NamedTuple):
    """A name, its batches by (seed, step, size), what a node shows, and how far the answer is."""

    name: str
    batch: Callable[[int, int, int], Batch]
    features: int
    classes: int
    hops: int

    @property
    def kind(self) -> str:
        return self.name.rpartition(" ")[0]


class Passing(nn.Module):
    """PyTorch Geometric's GCN or GAT in the shell of `NodeClassifier`."""

    def __init__(self, task: Task, width: int, layers: int, *, attends: bool) -> None:
        super().__init__()
        from torch_geometric.nn import GATConv, GCNConv

        self.attends = attends
        self.embedding, self.head = nn.Linear(task.features, width), nn.Linear(width, task.classes)
        self.layers = nn.ModuleList(
            GATConv(width, width // HEADS, HEADS)
            if attends
            else GCNConv(width, width, normalize=False)
            for _ in range(layers)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))

    def forward(self, graph: Graph) -> Tensor:
        from torch_geometric.nn.conv.gcn_conv import gcn_norm

        x = self.embedding(graph.nodes)
        # once for all layers, as ours finds its topology
        there = (graph.edges,) if self.attends else gcn_norm(graph.edges, num_nodes=len(x))
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = relu(norm(layer(x, *there) + x))
        return self.head(x)


def built(name: str, task: Task, width: int) -> nn.Module:
    """A model of some width."""
    if name in ("GCN", "GAT"):
        layers = task.hops + (task.kind == "tree")
        return Passing(task, width, layers, attends=name == "GAT")
    # where only the place tells, two filters must reach as far as the answer is; else the default
    order = 3 if task.kind in ("ring", "tree") else math.ceil(task.hops / 2)
    options = {"num_heads": HEADS, "order": None if name == "full" else order}
    if name == "filters":
        options["score"] = None
    return NodeClassifier(task.features, task.classes, width, 2, options, dropout=0.0)


def model(name: str, task: Task) -> nn.Module:
    """The model whose number of parameters is nearest to `PARAMETERS`, initialised."""
    multiple = 1 if name == "GCN" else HEADS
    state = torch.get_rng_state()
    size = lambda width: models.parameters(built(name, task, width))  # noqa: E731
    widths = range(multiple, 201, multiple)
    above = bisect_left(widths, PARAMETERS, key=size)
    best = min(widths[above - 1 : above + 1], key=lambda width: abs(size(width) - PARAMETERS))
    torch.set_rng_state(state)
    return built(name, task, best)


def tasks() -> list[Task]:
    """Every task, by name."""
    found = []
    for hops in (3, 5, 10, 15, 20, 25):
        ring = RingTransfer(length=hops)
        found.append(Task(f"ring {hops}", ring.train_batch, ring.classes, ring.classes, hops))
    for depth in (2, 3, 4, 5):
        tree = TreeMatch(depth=depth)
        found.append(Task(f"tree {depth}", tree.train_batch, 2 * tree.classes, tree.classes, depth))
    for hops in (5, 15, 25):
        ring = RingTransfer(length=hops, others="labels")
        width = ring.classes + 2 * FREQUENCIES
        found += [
            Task(f"ring of labels {hops}", ring.train_batch, ring.classes, ring.classes, hops),
            Task(f"told places {hops}", placed(ring), width, ring.classes, hops),
        ]
    return found


def placed(ring: RingTransfer) -> Callable[[int, int, int], Batch]:
    """The batches of a ring with eigenvectors: no direction of an eigenspace is better than another."""

    def batch(seed: int, step: int, size: int) -> Batch:
        graph, targets = ring.train_batch(seed, step, size)
        generator = torch.Generator().manual_seed((seed << 20) + step)
        turns = 2 * math.pi * torch.rand(size, 1, FREQUENCIES, generator=generator)
        mirrors = 1 - 2 * torch.randint(2, (size, 1, FREQUENCIES), generator=generator)
        place = torch.arange(2 * ring.length)[:, None] / (2 * ring.length)
        angle = turns + 2 * math.pi * mirrors * place * torch.arange(1, FREQUENCIES + 1)
        places = torch.cat([angle.cos(), angle.sin()], dim=-1).flatten(0, 1)
        return Batch(graph._replace(nodes=torch.cat([graph.nodes, places], dim=-1)), targets)

    return batch


def loss_of(net: nn.Module, batch: Batch) -> Tensor:
    """Cross entropy of the nodes that are asked."""
    return cross_entropy(net(batch.inputs), batch.targets, ignore_index=IGNORED)


@torch.no_grad()
def accuracy(net: nn.Module, task: Task, seed: int, batches: int) -> float:
    """The share of right answers in so many batches of 64 graphs."""
    found = [task.batch(seed, step, 64) for step in range(batches)]
    return sum(share_right(net(graph), targets) for graph, targets in found) / batches


def heard(net: nn.Module, task: Task) -> Quartiles:
    """Sensitivity of the answers to every node of eight rings, by distance."""
    graph, targets = task.batch(TEST, 0, 8)
    return sensitivity_by_distance(net, graph, (targets != IGNORED).nonzero().flatten())


def told(found: Quartiles, when: str) -> dict[str, float]:
    """What is kept of a sensitivity: its share from beyond 10 hops, and its medians."""
    weight = found.median * found.count
    share = weight[found.distance > 10].sum() / weight.sum()
    medians = {
        f"sensitivity at {int(d)} hops, {when}": m
        for d, m in zip(found.distance.tolist(), found.median.tolist(), strict=True)
    }
    return {f"sensitivity beyond 10 hops, {when}": float(share)} | medians


def trained(name: str, task: Task, seed: int, rate: float) -> dict[str, float]:
    """Train one model, and say how well it answers and from how far it hears."""
    torch.manual_seed(seed)
    net, found, perfect = model(name, task), {}, 0
    if task.name == "ring 20":
        found |= told(heard(net, task), "untrained")
    steps = STEPS[task.kind]
    settings = OptimizerSettings(rate, rate / 10, warmup=20, weight_decay=0.0)
    optimizer = build_optimizer(net, settings)
    for step in range(steps):
        set_rate(optimizer, settings.rate(step, steps))
        optimizer.zero_grad()
        loss_of(net, task.batch(seed, step, BATCH[task.kind])).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % LOOK == 0 or step + 1 == steps:
            validation = accuracy(net, task, VALIDATION, 2)
            perfect = perfect + 1 if validation == 1 else 0
            if perfect == 2:
                break
    if task.name == "ring 20":
        found |= told(heard(net, task), "trained")
    return found | {
        "accuracy": accuracy(net, task, TEST, 8),
        "validation accuracy": validation,
        "steps": step + 1,
        "learning rate": rate,
        "parameters": models.parameters(net),
    }


def seeds_of(name: str, task: Task, seeds: int, folder: Path) -> list[dict[str, float]]:
    """Every seed at the rate that served another one best."""

    def run(seed: int, rate: float) -> dict[str, float]:
        file = f"{name}, {task.name}-{rate:g}-{seed}"
        return remembered(folder, file, lambda: trained(name, task, seed, rate))

    best = max(
        (run(PICK, rate) for rate in RATES), key=lambda r: (r["validation accuracy"], -r["steps"])
    )
    return [run(seed, best["learning rate"]) for seed in range(seeds)]


def times(task: Task, names: Iterable[str], rounds: int) -> list[Result]:
    """One training step of each model over one of full attention, taken in turn."""
    batch, calls = task.batch(0, 0, BATCH[task.kind]), {}
    for name in names:
        net = model(name, task)
        optimizer = build_optimizer(net, OptimizerSettings())

        def call(net: nn.Module = net, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.zero_grad()
            loss_of(net, batch).backward()
            optimizer.step()

        calls[name] = call
    found = interleaved(calls, rounds)
    return [
        Result("squashing", f"{name}, {task.name}", "step / full", *ratio(found[name], found["full"])[:1],
               "1", ratio(found[name], found["full"])[1], 1)
        for name in calls if name != "full"
    ]  # fmt: skip


def rivals(task: Task) -> tuple[str, ...]:
    """Filters alone are asked only where a place has to be found."""
    return tuple(
        n for n in NAMES if n != "filters" or task.kind in ("ring of labels", "told places")
    )


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--runs", type=Path, default=Path("runs/squashing"))
    arguments.add_argument("--results", type=Path, default=RESULTS)
    arguments.add_argument("--seeds", type=int, default=3)
    arguments.add_argument("--rounds", type=int, default=20, help="of taking times; 0 takes none")
    arguments.add_argument("--models", nargs="*", default=NAMES, choices=NAMES)
    arguments.add_argument("--only", nargs="*", help="kinds of tasks or tasks; all without it")
    given = arguments.parse_args()
    settings = record.config_hash({
        "parameters": PARAMETERS, "batch": BATCH, "steps": STEPS, "rates": RATES, "look": LOOK, "pick": PICK,
    })  # fmt: skip
    origin = Provenance(record.device_name(), record.commit(), settings)
    chosen = [t for t in tasks() if given.only is None or {t.kind, t.name} & set(given.only)]
    for name, task in product(given.models, chosen):
        if name not in rivals(task):
            continue
        found = seeds_of(name, task, given.seeds, given.runs / settings)
        case = f"{name}, {task.name}"
        metrics = [m for m in found[0] if not m.startswith("sensitivity at") or m in SHOWN]
        rows = [row("squashing", case, metric, [f[metric] for f in found]) for metric in metrics]
        by = {r.metric: r for r in rows}
        print(f"{case:<28} {by['accuracy'].value:.3f} ± {by['accuracy'].spread:.3f}",
              *(f"{m} {by[m].value:.4g}" for m in ("steps", "learning rate", "parameters")),
              flush=True)  # fmt: skip
        publish(given.results, rows, origin)
    for task in chosen if given.rounds else ():
        rows = times(task, rivals(task), given.rounds)
        for r in rows:
            print(f"{r.case:<28} {r.value:.3f} ± {r.spread:.3f} of full attention", flush=True)
        publish(given.results, rows, origin)


if __name__ == "__main__":
    main()
