"""What the governor costs: governed and bare training steps in turn, in one process.

Rows go to results/overhead.csv. Two copies of a transformer written without Sixfold (fused qkv,
scaled_dot_product_attention) train on the same batches, a step of the one and then of the other; a round is
as many steps as the governor's slowest rhythm has (50: singular values come with every fifth sample). The
figure is the processor time of a governed round over that of a bare one, median over rounds and half the
distance between the quartiles; and for each signal its share of the governed round. Run: make bench.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from sixfold import LeadMetaArchitect, record
from sixfold.governor import architect, guard, journal
from sixfold.governor.watch import collect, probe
from sixfold.record import Provenance, Result, publish

RESULTS = Path(__file__).parents[1] / "results" / "overhead.csv"
ROUND = 50


class Size(NamedTuple):
    """Layers, width, heads, tokens, batch, vocabulary."""

    layers: int
    width: int
    heads: int
    tokens: int
    batch: int
    vocabulary: int


SIZES = {"3.5M": Size(4, 256, 4, 256, 4, 512), "30M": Size(8, 512, 8, 256, 4, 8192)}


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.before(x)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.between(x))


class Model(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.embed = nn.Embedding(size.vocabulary, size.width)
        self.blocks = nn.Sequential(*(Block(size.width, size.heads) for _ in range(size.layers)))
        self.head = nn.Linear(size.width, size.vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(tokens)))


class Run:
    """A model in training, governed or not."""

    def __init__(self, size: Size, *, governed: bool) -> None:
        torch.manual_seed(0)
        self.model = Model(size)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-4)
        self.governor = LeadMetaArchitect(self.model, self.optimizer) if governed else None

    def step(self, tokens: Tensor) -> float:
        """Seconds of the processor for one step."""
        began = time.process_time()
        loss = cross_entropy(self.model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.governor is not None:
            self.governor.process_step(loss)
        return time.process_time() - began


SIGNALS: dict[str, tuple[object, str]] = {
    "logits, entropy, redundancy": (probe.LayerProbe, "_observe"),
    "gradients per head": (collect, "gradients"),
    "copies of weights": (collect, "copies"),
    "update ratio": (collect, "updates"),
    "singular values": (collect, "matrices"),
    "rank of inputs": (collect, "rank"),
    "norm of all gradients": (guard.Guard, "_before"),
    "decision": (architect, "step"),
    "arming": (architect.LeadMetaArchitect, "_arm"),
    "journal": (journal, "rows"),
}


@contextmanager
def stopwatches() -> Iterator[dict[str, float]]:
    """Processor seconds spent in each part of the governor, nested parts counted in both."""
    spent = dict.fromkeys(SIGNALS, 0.0)

    def timed(name: str, call: Callable[..., object]) -> Callable[..., object]:
        def run(*given: object, **options: object) -> object:
            began = time.process_time()
            try:
                return call(*given, **options)
            finally:
                spent[name] += time.process_time() - began

        return run

    with ExitStack() as stack:
        for name, (owner, attribute) in SIGNALS.items():
            call = timed(name, getattr(owner, attribute))
            stack.enter_context(patch.object(owner, attribute, call))
        yield spent


def measured(size: Size, rounds: int, length: int) -> list[Result]:
    """Rows of one size."""
    generator = torch.Generator().manual_seed(1)
    ratios, shares = [], {signal: [] for signal in SIGNALS}
    with stopwatches() as spent:
        bare, governed = Run(size, governed=False), Run(size, governed=True)
        parameters = sum(p.numel() for p in bare.model.parameters())
        for number in range(rounds + 1):
            for signal in spent:
                spent[signal] = 0.0
            seconds = [0.0, 0.0]
            for _ in range(length):
                shape = (size.batch, size.tokens + 1)
                tokens = torch.randint(0, size.vocabulary, shape, generator=generator)
                for place, run in enumerate((bare, governed)):
                    seconds[place] += run.step(tokens)
            if number or rounds == 0:  # the first round finds layers and warms up
                ratios.append(seconds[1] / seconds[0])
                for signal, value in spent.items():
                    shares[signal].append(value / seconds[0])
        governed.governor.detach()
    case = f"{parameters / 1e6:.1f}M parameters, {size.layers}x{size.heads} heads, {size.tokens} tokens"
    value, spread = middle(ratios)
    rows = [Result("governor", case, "governed / bare", value, "1", spread, len(ratios))]
    for signal, values in shares.items():
        value, spread = middle(values)
        rows.append(
            Result("governor", case, signal, 100 * value, "% of a step", 100 * spread, len(values))
        )
    return rows


def middle(values: list[float]) -> tuple[float, float]:
    """Median and half the distance between the quartiles."""
    if len(values) < 2:
        return values[0], 0.0
    low, median, high = statistics.quantiles(values, n=4)
    return median, (high - low) / 2


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--only", nargs="*", choices=SIZES, default=list(SIZES))
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--smoke", action="store_true", help="seconds; publishes nothing")
    given = arguments.parse_args()
    for name in given.only:
        size = SIZES[name]
        if given.smoke:
            size = size._replace(tokens=16, batch=1)
        rows = measured(size, 1 if given.smoke else given.rounds, 4 if given.smoke else ROUND)
        for row in rows:
            print(
                f"{row.case:<44} {row.metric:<30} {row.value:8.3f} {row.unit} ± {row.spread:.3f}",
                flush=True,
            )
        if not given.smoke:
            device = f"{record.device_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
            settings = record.config_hash({"rounds": given.rounds, "size": size._asdict()})
            publish(RESULTS, rows, Provenance(device, record.commit(), settings))


if __name__ == "__main__":
    main()
