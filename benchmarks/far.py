"""What stands for far keys? Small models trained from scratch on text and on facts far back. Run: see below.

    SIXFOLD_DATA=... python benchmarks/far.py [--only text book recall] [--seeds 3]

A causal decoder of two layers (width 96, three heads of 32, rotary positions) is trained under full
attention and under five reaches of which a query rates as many keys and stand-ins as under the
hierarchical one, on average over a sequence (`rated`): window (Longformer), low-rank (Linformer), hashed
(Reformer), latent (Perceiver). Beside full attention and the window, which have no blocks, all see
their own block of 64 and the one before token by token, and of finished blocks further back
hierarchical: meta-tokens, the coarser the farther; low-rank: learned fixed combinations of a block's
tokens; latent: what learned queries read in it; hashed: the latest tokens of the query's bucket.
Quality is compared, not speed: rivals are plain PyTorch, and their seconds only say what a run took.
Tasks: text, nats per token of the last halves of windows of 1,024 byte pairs of WikiText-2; book, the same of
16,384 byte pairs of Moby-Dick, by a curriculum of three lengths; recall of eight facts among fillers that are
asked for 512 to 703 tokens later, by a curriculum too. The last length is measured, of the book all of them.
What is a case's own to choose (threshold, sinks, start, buckets) is the one of three that ends lowest on
the seed `PICK`, on data that are not reported, and for the book what text chose; full attention alone chose
rates, steps and sizes. No bucket is sought in the book: `hashed` here holds a mask of all pairs.
Rows go to results/far.csv: mean over seeds and half width of its 95 % interval, and each case's difference
from full attention on the same seeds. Resumable: finished runs are kept in the runs folder.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from length import FULL, pairs, windowed
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize, pad, scaled_dot_product_attention
from trials import remembered, row

from sixfold import LanguageModel, MultiHeadAttention, models, record
from sixfold.attention.rotary import rotate, turn
from sixfold.contracts import Batch, Dataset, Visibility
from sixfold.data import corpus
from sixfold.data._questions import IGNORED, Questions, distinct
from sixfold.data._root import find
from sixfold.record import Provenance, Result, publish
from sixfold.train.objective import loss
from sixfold.train.optimizer import OptimizerSettings, build_optimizer, set_rate

RESULTS = Path(__file__).parents[1] / "results" / "far.csv"
RUNS = Path(__file__).parents[1] / "runs" / "far"
PICK = 99
"""The seed that picks settings."""
WIDTH, LAYERS, HEADS, HEAD_DIM = 96, 2, 3, 32
BLOCK, CAPACITY = 64, 16
THETA = 10_000.0
TRIES: dict[str, tuple[dict[str, Any], ...]] = {
    "full": ({},),
    "hierarchical": ({"threshold": 0.0}, {"threshold": 4.0}, {"threshold": 16.0}),
    "window": ({"sinks": 0}, {"sinks": 4}, {"sinks": 16}),
    "low-rank": (
        {"means": True, "per_head": True},
        {"means": False, "per_head": True},
        {"means": False, "per_head": False},
    ),
    "hashed": (
        {"buckets": 16, "shared": False},
        {"buckets": 16, "shared": True},
        {"buckets": 32, "shared": True},
    ),
    "latent": ({"std": 0.1}, {"std": 1.0}, {"std": 3.0}),
}
"""What a case may choose from."""

# ---------------------------------------------------------------- rivals, of what is not rotated yet


def near_and_far(
    query: Tensor, key: Tensor, value: Tensor, far: Tensor, place: Tensor, meaning: Tensor
) -> Tensor:
    """The own block and the one before token by token, and what stands for the blocks before those.

    Shapes: query, key, value (b, h, n, d), n a multiple of the block; of r stand-ins of each block their
    keys `far` and values `meaning` (b, h, n / block, r, d), and where they stand, `place` (..., n / block, r).
    A stand-in has the logarithm of how many tokens there are for each, as a group of the hierarchical reach.
    """
    query, key = rotate(query, 0, THETA), rotate(key, 0, THETA)
    far = turn(far, place, THETA)
    count, rank = far.shape[-3:-1]

    def seen(tokens: Tensor, stands: Tensor) -> Tensor:
        before = pad(tokens, (0, 0, BLOCK, 0))[..., : tokens.shape[-2], :]
        parts = [part.unflatten(-2, (count, BLOCK)) for part in (before, tokens)]
        everywhere = stands.flatten(-3, -2)[:, :, None].expand(-1, -1, count, -1, -1)
        return torch.cat([*parts, everywhere], dim=-2)

    own, number = torch.arange(BLOCK), torch.arange(count)
    near = torch.cat([torch.ones(BLOCK, BLOCK), (own[:, None] >= own).float()], dim=-1)
    logits = near.log().expand(count, -1, -1).clone()
    logits[0, :, :BLOCK] = -math.inf
    finished = (number[:, None] - 1 > number).repeat_interleave(rank, dim=-1)
    size = torch.full((), math.log(BLOCK / rank)).where(finished, -math.inf)
    mask = torch.cat([logits, size[:, None].expand(-1, BLOCK, -1)], dim=-1)
    out = scaled_dot_product_attention(
        query.unflatten(-2, (count, BLOCK)).flatten(1, 2),
        seen(key, far).flatten(1, 2),
        seen(value, meaning).flatten(1, 2),
        mask.repeat(query.shape[1], 1, 1),
    )
    return out.unflatten(1, (-1, count)).flatten(2, 3)


class LowRank(nn.Module):
    """A block's keys E^T K and values F^T V, with E and F (block, rank) learned, the same for all blocks.

    Linformer shortens a whole sequence, which no causal model can; it is done here within blocks that are
    finished. Stand-in g stands where the g-th of `rank` parts of the block is; E and F begin as the means of
    those, or at random.
    Source: Wang et al., Linformer, arXiv 2006.04768, section 4.
    """

    def __init__(self, rank: int, *, means: bool, per_head: bool) -> None:
        super().__init__()
        shape = (2, HEADS if per_head else 1, BLOCK, rank)
        part = torch.arange(BLOCK) * rank // BLOCK
        member = (part[:, None] == torch.arange(rank)).float()
        start = (member / member.sum(0)).expand(shape) if means else torch.randn(shape)
        self.mixed = nn.Parameter(start.clone() if means else start / BLOCK**0.5)
        self.register_buffer(
            "middle", (member / member.sum(0) * torch.arange(BLOCK)[:, None]).sum(0)
        )

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        blocks = (part.unflatten(-2, (-1, BLOCK)) for part in (key, value))
        far, meaning = (
            mixed.mT[:, None] @ part for mixed, part in zip(self.mixed, blocks, strict=True)
        )
        place = BLOCK * torch.arange(far.shape[2])[:, None] + self.middle
        return near_and_far(query, key, value, far, place, meaning)


class Latent(nn.Module):
    """What `rank` learned queries of a head read in each block: its keys, values and places.

    Perceiver's latents read everything before any query does, which no causal model can; here they read
    blocks that are finished, the same latents all of them, and are not processed further.
    Source: Jaegle et al., Perceiver, arXiv 2103.03206, section 3.1.
    """

    def __init__(self, rank: int, *, std: float) -> None:
        super().__init__()
        self.latents = nn.Parameter(std * torch.randn(HEADS, 1, rank, HEAD_DIM))

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys, values = (part.unflatten(-2, (-1, BLOCK)) for part in (key, value))
        read = (self.latents @ keys.mT / HEAD_DIM**0.5).softmax(-1)
        place = torch.arange(key.shape[-2], dtype=key.dtype).view(-1, BLOCK, 1)
        return near_and_far(query, key, value, read @ keys, (read @ place)[..., 0], read @ values)


def hashed(
    query: Tensor, key: Tensor, value: Tensor, *, latest: int, buckets: int, shared: bool
) -> Tensor:
    """Of blocks further back, the `latest` tokens that a random rotation puts in the query's bucket.

    As in Reformer rotations are drawn anew in every pass, and with `shared` keys are directions of the
    queries, of which the own is not rated. Unlike there tokens are not sorted into chunks of buckets of
    which a query sees two, and there is one round: the near field is seen whatever its buckets are.
    Source: Kitaev et al., Reformer, arXiv 2001.04451, section 2.
    """
    n = query.shape[-2]
    key = HEAD_DIM**0.5 * normalize(query, dim=-1) if shared else key
    turned = torch.randn(HEADS, HEAD_DIM, buckets // 2)

    def bucket(x: Tensor) -> Tensor:
        spread = x.detach() @ turned
        return torch.cat([spread, -spread], dim=-1).argmax(-1)

    own, theirs = bucket(query), bucket(key)
    place = torch.arange(n)
    begin = (place // BLOCK - 1).clamp(min=0) * BLOCK
    number = (theirs[..., None] == torch.arange(buckets)).cumsum(-2)  # of a bucket's tokens so far
    before = pad(number, (0, 0, 1, 0))[..., begin, :].gather(-1, own[..., None])
    # tokens in the order of their buckets: what is far is one run of them for each query
    order = (theirs * n + number.gather(-1, theirs[..., None])[..., 0])[..., None, :].int()
    first, last = (
        (own[..., None] * n + end).int() for end in ((before - latest).clamp(min=0), before)
    )
    near = (place >= begin[:, None]) & (place <= place[:, None])
    mask = (order > first) & (order <= last) | near
    if shared:
        mask &= (place != place[:, None]) | (place == 0)
    query, key = rotate(query, 0, THETA), rotate(key, 0, THETA)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask)


def sliding(query: Tensor, key: Tensor, value: Tensor, *, width: int, sinks: int) -> Tensor:
    """The window of `length.windowed`, of queries and keys that are rotated here."""
    query, key = rotate(query, 0, THETA), rotate(key, 0, THETA)
    return windowed(query, key, value, width=width, sinks=sinks)


class Instead(nn.Module):
    """A layer of attention that attends as a rival does, with its own projections."""

    def __init__(self, layer: MultiHeadAttention, rival: Callable[..., Tensor]) -> None:
        super().__init__()
        self.projection, self.output, self.rival = layer.projection, layer.output, rival

    def forward(self, x: Tensor, **_: object) -> Tensor:
        """Causal attention of x (b, n, d_model)."""
        whole = pad(x, (0, 0, 0, -x.shape[1] % BLOCK))  # nothing sees what follows
        emitted = self.projection(whole, whole, Visibility(None, is_causal=True), None)
        out = self.rival(*emitted)[:, :, : x.shape[1]]
        return self.output(out.transpose(1, 2).flatten(2))


# ---------------------------------------------------------------- what a query rates

OURS = {"name": "hierarchical", "block": BLOCK, "capacity": CAPACITY}


def finished(n: int) -> float:
    """Blocks that a query sees no token of one by one, on average over n tokens."""
    return sum(max(number - 1, 0) for number in range(n // BLOCK)) * BLOCK / n


def far_budget(n: int) -> float:
    """Meta-tokens that a query of the hierarchical reach rates, on average."""
    return pairs(OURS, n) - pairs({**OURS, "capacity": 0}, n)


def rank(n: int) -> int:
    """Stand-ins of a block, for as many."""
    return round(far_budget(n) / finished(n))


def latest(n: int) -> int:
    """Tokens of a bucket at most, for as many: the first two blocks have none."""
    return round(far_budget(n) / (1 - 2 * BLOCK / n))


def width(n: int, sinks: int) -> int:
    """Of a window that rates, with its sinks, as many as the hierarchical reach: w - w (w - 1) / 2n."""
    return round(n + 0.5 - math.sqrt((n + 0.5) ** 2 - 2 * n * pairs(OURS, n))) - sinks


def rated(case: str, n: int, setting: dict[str, Any]) -> float:
    """Keys and what stands for keys that a query rates, on average over n; of a bucket, at most."""
    if case == "window":
        w = width(n, setting["sinks"])
        return w - w * (w - 1) / (2 * n) + setting["sinks"] * (n - w) / n
    near = pairs({**OURS, "capacity": 0}, n)
    far = {"low-rank": rank(n) * finished(n), "latent": rank(n) * finished(n)}
    far |= {"hashed": latest(n) * (1 - 2 * BLOCK / n), "hierarchical": far_budget(n)}
    return pairs(FULL, n) if case == "full" else near + far[case]


def fresh(case: str, setting: dict[str, Any], data: Dataset) -> nn.Module:
    """A model of the case; what all share begins alike under a seed."""
    n = data.context
    reach = {**OURS, **setting} if case == "hierarchical" else "full"
    attention = {"num_heads": HEADS, "head_dim": HEAD_DIM, "reach": reach}
    model = LanguageModel(data.vocab_size, n, WIDTH, LAYERS, attention)
    made: dict[str, Callable[[], Callable[..., Tensor]]] = {
        "window": lambda: partial(sliding, **setting, width=width(n, setting["sinks"])),
        "low-rank": lambda: LowRank(rank(n), **setting),
        "hashed": lambda: partial(hashed, latest=latest(n), **setting),
        "latent": lambda: Latent(rank(n), **setting),
    }
    for block in model.blocks if case in made else ():
        block.attention = Instead(block.attention, made[case]())
    return model


# ---------------------------------------------------------------- tasks

TOLD, KINDS = 8, 8
"""Facts of a sequence; keys, values and fillers that there are of each."""
KEYS = KINDS * KINDS
VALUES, FILLERS = KEYS + KINDS, KEYS + 2 * KINDS
"""The first of each; facts are before."""


def facts(rng: np.random.Generator, count: int, *, area: int, gap: int, asked: int) -> Batch:
    """Facts among fillers in the first `area` tokens, `gap` fillers, `asked` keys.

    A fact is one token that stands for a key and its value, so that to find it is all there is to learn.
    Keys of a sequence differ. Answers are never shown: none can be taken from a question before.
    """
    n = area + gap + asked
    keys, values = distinct(rng, (count, TOLD), KINDS), rng.integers(0, KINDS, (count, TOLD))
    tokens = FILLERS + rng.integers(0, KINDS, (count, n))
    np.put_along_axis(tokens, distinct(rng, (count, TOLD), area), KINDS * keys + values, 1)
    which = rng.integers(0, TOLD, (count, asked))
    targets = np.full_like(tokens, IGNORED)
    tokens[:, n - asked :] = KEYS + np.take_along_axis(keys, which, 1)
    targets[:, n - asked :] = VALUES + np.take_along_axis(values, which, 1)
    return Batch(torch.from_numpy(tokens), torch.from_numpy(targets))


def questions(area: int, gap: int, asked: int, validation: int, seed: int) -> Questions:
    """Facts far back as a data set."""
    draw = partial(facts, area=area, gap=gap, asked=asked)
    return Questions(draw, FILLERS + KINDS, area + gap + asked, validation, seed)


SOURCES = {
    "text": ("wikitext-2/valid.txt", "https://huggingface.co/datasets/Salesforce/wikitext"),
    "book": ("literature/moby_dick.txt", "https://www.gutenberg.org/ebooks/2701"),
}


@cache
def text(name: str, context: int) -> Dataset:
    """A file in byte pairs, four fifths of it to train on."""
    return corpus.build(
        path=find(*SOURCES[name]),
        context=context,
        tokenizer="bpe",
        vocab_size=512,
        validation_fraction=0.2,
    )


class Stage(NamedTuple):
    """So many steps on sequences of this kind."""

    options: dict[str, int]
    batch: int
    steps: int


class Task(NamedTuple):
    """What is learned, shorter sequences first, and how fast."""

    stages: tuple[Stage, ...]
    rate: float
    held_out: int


TASKS = {
    "text": Task((Stage({"context": 1024}, 1, 400),), 4e-3, 40),
    "book": Task(
        (
            Stage({"context": 1024}, 1, 400),
            Stage({"context": 4096}, 1, 40),
            Stage({"context": 16384}, 1, 20),
        ),
        4e-3,
        40,
    ),
    "recall": Task(
        (
            Stage({"area": 16, "gap": 0, "asked": 8}, 64, 60),
            Stage({"area": 64, "gap": 128, "asked": 64}, 8, 40),
            Stage({"area": 128, "gap": 512, "asked": 64}, 4, 70),
        ),
        4e-3,
        64,
    ),
}
CASES = {name: [c for c in TRIES if (name, c) != ("book", "hashed")] for name in TASKS}
METRICS = {
    "text": {"loss": "nats/token"},
    "book": {f"loss at {n}": "nats/token" for n in (1024, 4096, 16384)},
    "recall": {"accuracy": "1", "loss": "nats/answer"},
}
"""What is also reported as the difference from full attention."""


def data_of(name: str, stage: Stage, seed: int) -> Dataset:
    """What a stage draws from; held out is one part for the seed that picks, another for the rest."""
    if name == "recall":
        return questions(**stage.options, validation=TASKS[name].held_out, seed=int(seed != PICK))
    data = text(name, **stage.options)
    return replace(data, validation=data.validation.chunk(2)[int(seed != PICK)])


# ---------------------------------------------------------------- runs


def read_text(model: nn.Module, data: Dataset, windows: int) -> float:
    """Nats per token of the last halves of windows, the first so many."""
    half, found = data.context // 2, []
    for batch in data.validation_batches(4):
        if batch.inputs.shape[1] == data.context and 4 * len(found) < windows:
            logits = model(batch.inputs)[:, half:]
            found.append(cross_entropy(logits.flatten(0, 1), batch.targets[:, half:].flatten()))
    return torch.stack(found).mean().item()


def read_facts(model: nn.Module, data: Questions) -> dict[str, float]:
    """Share of right answers, also by how far back the fact was told, to the next lower 64."""
    asked = int((data.validation.targets[0] != IGNORED).sum())
    right, losses, apart = [], [], []
    for inputs, targets in data.validation_batches(8):
        logits, answers = model(inputs)[:, -asked:], targets[:, -asked:]
        right.append(logits.argmax(-1) == answers)
        losses.append(cross_entropy(logits.flatten(0, 1), answers.flatten()))
        told = (inputs[:, None] // KINDS == inputs[:, -asked:, None] - KEYS).int().argmax(-1)
        apart.append(torch.arange(data.context)[-asked:] - told)
    hit, distance = torch.cat(right).double(), torch.cat(apart) // 64 * 64
    found = {"accuracy": hit.mean().item(), "loss": torch.stack(losses).mean().item()}
    by_distance = {d: hit[distance == d].mean().item() for d in distance.unique().tolist()}
    return found | {f"accuracy, {d} to {d + 63} back": value for d, value in by_distance.items()}


def trained(name: str, case: str, setting: dict[str, Any], seed: int) -> dict[str, float]:
    """What a run came to, its parameters and the processor time of a step of the last stage."""
    task, step = TASKS[name], 0
    steps = sum(stage.steps for stage in task.stages)
    data = [data_of(name, stage, seed) for stage in task.stages]
    torch.manual_seed(seed)
    model = fresh(case, setting, data[-1])
    rates = OptimizerSettings(task.rate, task.rate / 10, warmup=steps // 20)
    optimizer = build_optimizer(model, rates)
    for stage, of in zip(task.stages, data, strict=True):
        begun = time.process_time()
        for _ in range(stage.steps):
            set_rate(optimizer, rates.rate(step, steps))
            value = loss("tokens", model, of.train_batch(seed, step, stage.batch))
            optimizer.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
        seconds = (time.process_time() - begun) / stage.steps
    facts_of_run = {"seconds": seconds, "parameters": float(models.parameters(model))}
    torch.manual_seed(0)  # rotations of `hashed` are drawn in every pass
    with torch.inference_mode():
        model.eval()
        if name == "recall":
            return read_facts(model, data[-1]) | facts_of_run
        losses = [read_text(model, of, task.held_out) for of in data]
        return dict(zip(METRICS[name], losses, strict=True)) | facts_of_run


def settings(name: str) -> str:
    """What a task and its models are made of, as a hash."""
    sizes = [WIDTH, LAYERS, HEADS, HEAD_DIM, BLOCK, CAPACITY, TOLD, KINDS]
    return record.config_hash({"task": [name, TASKS[name]], "sizes": sizes, "tries": TRIES})


class Runs(NamedTuple):
    """Finished runs, and those that have yet to be made."""

    folder: Path

    def run(self, name: str, case: str, number: int, seed: int) -> dict[str, float]:
        """A run with a case's setting of that number, trained unless it is there."""
        return remembered(
            self.folder / settings(name),
            f"{name}-{case}-setting{number}-seed{seed}",
            lambda: trained(name, case, TRIES[case][number], seed),
        )

    def chosen(self, name: str, case: str) -> int:
        """The number of a case's setting: what is lowest where it picks; nothing picks from one."""
        if name == "book":  # a try would take as long as a run that counts
            return self.chosen("text", case)
        numbers = range(len(TRIES[case]))
        if len(numbers) == 1:
            return 0
        return min(numbers, key=lambda number: self.run(name, case, number, PICK)["loss"])

    def seeds(self, name: str, case: str, count: int) -> list[dict[str, float]]:
        """The runs that are reported."""
        number = self.chosen(name, case)
        return [self.run(name, case, number, seed) for seed in range(count)]


def rows_of(runs: Runs, name: str, case: str, count: int) -> list[Result]:
    """Rows of one case on one task."""
    found, full = (runs.seeds(name, of, count) for of in (case, "full"))
    units = {**METRICS[name], "seconds": "s", "parameters": "1"}
    rows = [
        replace(
            row(name, case, metric, [run[metric] for run in found]), unit=units.get(metric, "1")
        )
        for metric in found[0]
    ]
    for metric, unit in METRICS[name].items() if case != "full" else ():
        apart = [own[metric] - other[metric] for own, other in zip(found, full, strict=True)]
        rows.append(replace(row(name, case, f"{metric} - full", apart), unit=unit))
    setting = TRIES[case][runs.chosen(name, case)]
    n = sum(TASKS[name].stages[-1].options.values())  # all of them are lengths
    share = rated(case, n, setting) / rated("full", n, {})
    rows.append(row(name, case, "keys rated / full", [share]))
    return rows + [row(name, case, option, [float(value)]) for option, value in setting.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=TASKS, default=list(TASKS), help="tasks")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=RUNS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    runs = Runs(given.runs)
    for name in given.only:
        for case in CASES[name]:
            print(f"{name:7} {case:13} {TRIES[case][runs.chosen(name, case)]}", flush=True)
    # seed by seed, so that what is there at any time is a fair comparison
    for seed in range(given.seeds):
        for name in given.only:
            for case in CASES[name]:
                runs.run(name, case, runs.chosen(name, case), seed)
    for name in given.only:
        provenance = Provenance(record.device_name(), record.commit(), settings(name))
        for case in CASES[name]:
            rows = rows_of(runs, name, case, given.seeds)
            for one in rows:
                print(f"{name:7} {case:13} {one.metric:30} {one.value:10.4f} ± {one.spread:.4f}")
            publish(given.out, rows, provenance)


if __name__ == "__main__":
    main()
