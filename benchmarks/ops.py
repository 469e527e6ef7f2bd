"""Cost of every score, of gauge layers and of statistics beside fused dot-product attention.

Rows go to results/ops.csv, each a ratio to `F.scaled_dot_product_attention` of the same shapes, taken
in turn with it in one process: medians and half the distance between the quartiles, and the absolute
milliseconds of SDPA itself. Memory is measured in fresh processes. Each case replaces its own rows
when it is done, so that a run that was stopped is continued with --only. Run: make bench.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import peers
import torch
from timing import LEAST, interleaved, ratio, typical
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from sixfold import MultiHeadAttention, record
from sixfold.attention.multihead import Part, build_part
from sixfold.contracts import Belief, Distances, Features, Heads, Observation, Rating, Visibility
from sixfold.geometry.gaussian import kl
from sixfold.ops.attend import choose
from sixfold.ops.statistics.choose import statistics
from sixfold.record import Provenance, Result, publish

RESULTS = Path(__file__).parents[1] / "results" / "ops.csv"
SCORES: dict[str, Part] = {
    "dot": "dot",
    "cosine": "cosine",
    "l2_squared": "l2_squared",
    "kl_diagonal": "kl_diagonal",
    "jeffreys": "jeffreys",
    "wasserstein2": "wasserstein2",
    "kl": "kl",
    "l1": "l1",
    "l2": "l2",
    "lp2.5": {"name": "lp", "p": 2.5},
    "lp3": {"name": "lp", "p": 3.0},
    "chebyshev": "chebyshev",
}
NARROW = ("kl",)
"""Scores whose features grow with the square of the width: heads of 10."""
TILED = ("l1", "l2", "lp2.5", "lp3", "chebyshev")
WIDTHS = {8: 1024, 10: 1024, 16: 1024, 20: 1024, 32: 512, 48: 256, 64: 256}
"""Widths of the heads of gauge layers, and how many tokens they see."""
FRAMES = (("so", "position"), ("so", "token"), ("gl", "position"), ("gl", "token"))
LARGEST = 2**27
"""Entries of the largest tensor that explicit weights may take: half a gigabyte in float32."""
RUNS_HERE = ("fused", "tiled", *(("numba",) if choose.NUMBA else ()))
MODES = ("forward", "forward+backward")
BASE = "SDPA"


class Effort(NamedTuple):
    """How long to measure: rounds and seconds of a case, the longest call of what is not `fastest`."""

    rounds: int
    seconds: float
    patience: float
    length: int
    lengths: tuple[int, ...]
    remembered: int
    least: int = LEAST
    warm: int = 2


SMOKE = Effort(2, 0.2, 1.0, 64, (64, 128), 256)
SHORT = Effort(25, 5.0, 3.0, 1024, (128, 512, 1024, 2048), 8192)
LONG = Effort(25, 30.0, 15.0, 1024, (), 8192, least=3, warm=1)


class Shape(NamedTuple):
    """Batch, heads, tokens, width of a head."""

    b: int
    h: int
    n: int
    d: int

    def __str__(self) -> str:
        return f"b{self.b} h{self.h} n{self.n} d{self.d}"


class Contestant(NamedTuple):
    """A way to compute an output, and what it is differentiated by."""

    call: Callable[[], Tensor]
    leaves: tuple[Tensor, ...]

    def timed(self, mode: str) -> Callable[[], object]:
        """One forward pass, or one with its backward pass."""
        if mode == "forward":
            return torch.no_grad()(self.call)
        flow = torch.randn_like(self.call())
        return lambda: torch.autograd.grad(self.call(), self.leaves, flow)


# ---------------------------------------------------------------- scores


def points(shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values."""
    return tuple(torch.randn(shape, requires_grad=True) for _ in range(3))


def beliefs(schema: str, means: tuple[Tensor, ...]) -> list[Belief]:
    """Random covariances, factors of them as leaves, around some means."""
    found = []
    for mean in means:
        factor = 0.5 + torch.rand_like(mean)
        if schema == "belief":
            small = 0.1 * torch.randn(*mean.shape, mean.shape[-1])
            factor = small.tril(-1) + torch.diag_embed(factor)
        found.append(Belief(mean, factor.detach().requires_grad_()))
    return found


class Subject(NamedTuple):
    """A score with something to rate."""

    rate: Callable[[], Rating]
    value: Tensor
    leaves: tuple[Tensor, ...]
    head_rate: Tensor
    ends: tuple[object, object]


def subject(name: str, query: Tensor, key: Tensor, value: Tensor) -> Subject:
    """The score of that name over these points, or over beliefs around them."""
    h, d = query.shape[1], query.shape[-1]
    score = build_part("score", SCORES[name], Heads(h * d, h, d, h))
    ends, leaves = (query, key), (query, key, value, *score.parameters())
    if score.schema != "point":
        ends = tuple(beliefs(score.schema, ends))
        leaves += tuple(belief.factor for belief in ends)
    head_rate = torch.ones(h) if name == "dot" else score.rate().detach()
    return Subject(lambda: score(ends[0], score.keys(ends[1])), value, leaves, head_rate, ends)


def explicit_fits(rating: Rating) -> bool:
    """Whether all weights may be held at once; distances are held feature by feature too."""
    entries = math.prod(rating.query.shape[:3]) * rating.key.shape[2]
    if isinstance(rating, Distances):
        return entries * rating.query.shape[-1] <= LARGEST
    return entries <= LARGEST


def ours(found: Subject, *, is_causal: bool) -> dict[str, Contestant]:
    """Every implementation that can serve this score here."""
    seen = Visibility(None, is_causal)
    rating = found.rate()
    impls = {impl: impl for impl in choose.SERVES[type(rating)] if impl in RUNS_HERE}
    if explicit_fits(rating):
        impls["explicit weights"] = "reference"

    def contestant(impl: str) -> Contestant:
        return Contestant(
            lambda: choose.attend(found.rate(), found.value, seen, 0.0, impl), found.leaves
        )

    return {label: contestant(impl) for label, impl in impls.items()}


def theirs(name: str, found: Subject, mode: str) -> dict[str, Contestant]:
    """What others offer for this score; none of them is causal here."""
    query, key = found.ends
    if isinstance(query, Belief):
        return by_pair(found) if name == "kl" else {}
    given = (query, key, found.value)
    rate, calls = found.head_rate, {}
    small = math.prod(query.shape[:3]) * key.shape[2] <= LARGEST
    rating = found.rate()
    if isinstance(rating, Distances):
        if small:
            calls["cdist + softmax"] = peers.by_cdist(*given, rate, rating.p)
        if "KeOps" not in peers.missing():
            calls["KeOps"] = peers.by_keops(*given, rate, rating.p)
    if name == "l2_squared":
        if small:
            calls["cdist + softmax"] = peers.by_cdist_squared(*given, rate)
        if "x-transformers" not in peers.missing():
            for flash in (False, True) if small else (True,):
                label = "x-transformers" + (" flash" if flash else "")
                calls[label] = peers.by_x_transformers(*given, rate[0].item(), flash=flash)
    flex = name in ("l2", "l2_squared") and "FlexAttention" not in peers.missing()
    if flex and mode == "forward":
        plain = tuple(tensor.detach() for tensor in given)
        calls["FlexAttention"] = peers.by_flex(*plain, rate, squared=name == "l2_squared")
    return {label: Contestant(call, given) for label, call in calls.items()}


def by_pair(found: Subject) -> dict[str, Contestant]:
    """One divergence of Gaussians for every pair of tokens, where that fits."""
    query, key = found.ends
    b, h, n, d = query.mean.shape
    if b * h * n * n * d * d > LARGEST:
        return {}

    def call() -> Tensor:
        rated = kl(*(t.unsqueeze(3) for t in query[:2]), *(t.unsqueeze(2) for t in key[:2]))
        return (-found.head_rate[:, None, None] * rated).softmax(-1) @ found.value

    return {"every pair": Contestant(call, found.leaves[:3] + found.leaves[-2:])}


def agree(contest: dict[str, Contestant]) -> None:
    """Raise unless all compute the same: times of different things are no ratio."""
    with torch.no_grad():
        outputs = {name: c.call() for name, c in contest.items() if name != BASE}
    if not outputs:
        return
    first = next(iter(outputs.values()))
    for name, out in outputs.items():
        torch.testing.assert_close(out, first, rtol=1e-3, atol=1e-4, msg=f"{name} differs")


def rows_of(
    experiment: str, case: str, calls: dict[str, Callable[[], object]], effort: Effort
) -> list[Result]:
    """Milliseconds of the first call, and the ratio of every other one to it."""
    times = interleaved(calls, effort.rounds, effort.seconds, effort.least, effort.warm)
    base, *others = calls
    value, spread = typical(times[base])
    rows = [Result(experiment, case, base, value, "ms", spread, 1)]
    for name in others:
        value, spread = ratio(times[name], times[base])
        rows.append(Result(experiment, case, f"{name} / {base}", value, "1", spread, 1))
    return rows


def fused(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool = False) -> Contestant:
    """What everything is measured against."""
    given = (query, key, value)
    return Contestant(lambda: sdpa(*given, is_causal=is_causal), given)


def score_rows(name: str, effort: Effort) -> Iterator[list[Result]]:
    """One score at every length, and causal at the main one."""
    cases = [(n, is_causal) for n in effort.lengths for is_causal in {False, n == effort.length}]
    # seconds of one call at a length say what a longer one will take
    known: dict[tuple[str, str], tuple[float, int]] = {}
    for n, is_causal in cases:
        shape = Shape(1, 8, n, 10 if name in NARROW else 64)
        given = points(shape)
        found = subject(name, *given)
        for mode in MODES:
            contest = ours(found, is_causal=is_causal)
            if not is_causal:
                contest |= theirs(name, found, mode)
            for label in list(contest):
                slow = predicted(known.get((label, mode)), n) > effort.patience
                if slow and label != choose.fastest(found.rate(), 0.0):
                    print(f"{name} {shape} {mode}: {label} left out, it would take too long")
                    del contest[label]
            agree(contest)
            contest = {BASE: fused(*given, is_causal=is_causal)} | contest
            calls = {label: one.timed(mode) for label, one in contest.items()}
            case = f"{name} {shape} fp32{' causal' if is_causal else ''}"
            rows = rows_of(f"score {mode}", case, calls, effort)
            if not is_causal:
                seconds = rows[0].value / 1e3
                for row in rows[1:]:
                    label = row.metric.removesuffix(f" / {BASE}")
                    known[label, mode] = (row.value * seconds, n)
            yield rows


def predicted(earlier: tuple[float, int] | None, n: int) -> float:
    """Seconds of a call at length n: the square of the length, from one that was measured."""
    return 0.0 if earlier is None else earlier[0] * (n / earlier[1]) ** 2


# ---------------------------------------------------------------- gauge layers


def gauge_layers(h: int, d: int) -> dict[str, MultiHeadAttention]:
    """The plain layer, then layers of beliefs in each kind of frame."""
    sizes = {"d_model": h * d, "num_heads": h, "head_dim": d}
    layers = {"plain layer": MultiHeadAttention(**sizes)}
    for frames, per in FRAMES:
        projection = {"name": "gaussian", "frames": frames, "per": per}
        for impl in ("fused", "reference") if (frames, per) == FRAMES[0] else ("fused",):
            label = f"{frames} per {per}" + (", explicit weights" if impl == "reference" else "")
            layers[label] = MultiHeadAttention(
                **sizes, projection=projection, score="kl", impl=impl
            )
    return layers


def gauge_rows(effort: Effort) -> Iterator[list[Result]]:
    """Gauge layers beside the plain layer with the same heads, shorter where heads are wide."""
    for d, longest in WIDTHS.items():
        shape = Shape(1, 8, min(effort.length, longest), d)
        x = torch.randn(1, shape.n, shape.h * d, requires_grad=True)
        calls = {
            name: layer_call(layer, x).timed("forward+backward")
            for name, layer in gauge_layers(shape.h, d).items()
        }
        yield rows_of("gauge layer forward+backward", f"{shape} fp32 causal", calls, effort)


def layer_call(layer: MultiHeadAttention, x: Tensor) -> Contestant:
    """A causal layer, differentiated by its input and its parameters."""
    return Contestant(lambda: layer(x, is_causal=True), (x, *layer.parameters()))


# ---------------------------------------------------------------- statistics


def statistics_calls(name: str, shape: Shape) -> dict[str, Callable[[], object]]:
    """Causal attention without a gradient, then its statistics by every implementation."""
    given = tuple(tensor.detach() for tensor in points(shape))
    rating = subject(name, *given).rate()
    seen = Observation(rating, Visibility(None, is_causal=True))
    impls = {"fused": "fused"} if isinstance(rating, Features) else {}
    impls["tiled"] = "tiled"
    if explicit_fits(rating):
        impls["explicit weights"] = "reference"
    calls: dict[str, Callable[[], object]] = {
        label: lambda impl=impl: statistics(seen, impl=impl) for label, impl in impls.items()
    }
    return {BASE: fused(*given, is_causal=True).timed("forward")} | calls


def statistics_rows(effort: Effort) -> Iterator[list[Result]]:
    """Statistics of attention beside attention itself, forward."""
    lengths = (effort.length, 2 * effort.length)
    for name in ("dot", "l2_squared", "l1"):
        for n in lengths:
            shape = Shape(1, 8, n, 64)
            case = f"{name} {shape} fp32 causal"
            yield rows_of("statistics", case, statistics_calls(name, shape), effort)


# ---------------------------------------------------------------- memory


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def extra_memory(name: str, chosen: str, n: int) -> float:
    """Megabytes that a forward and backward pass holds at most beyond its inputs.

    The same pass over a few tokens has run before, so that code and compilers are not counted.
    """
    for length in (64, n):
        given = points(Shape(1, 8, length, 64))
        found = subject(name, *given)
        one = ({BASE: fused(*given)} | ours(found, is_causal=False))[chosen]
        flow = torch.randn_like(found.value)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts here
        before = resident("VmRSS")
        torch.autograd.grad(one.call(), one.leaves, flow)
    return (resident("VmHWM") - before) / 1e6


def memory_rows(effort: Effort) -> Iterator[list[Result]]:
    """Every tiled score, each in a process of its own; explicit weights at half the length."""
    if not Path("/proc/self/clear_refs").exists():
        print("memory: left out, there is no /proc/self/clear_refs to reset the high-water mark")
        return
    n, impl = effort.remembered, "numba" if choose.NUMBA else "tiled"
    cases = [("dot", BASE, n), *((name, impl, n) for name in TILED)]
    cases += [("dot", "explicit weights", n // 2), ("dot", BASE, n // 2)]
    for name, chosen, length in cases:
        command = [sys.executable, __file__, "--memory", name, chosen, str(length)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        case = f"{name} {Shape(1, 8, length, 64)} fp32"
        found = json.loads(done.stdout.splitlines()[-1])
        yield [Result("memory forward+backward", case, chosen, found, "MB", 0.0, 1)]


# ---------------------------------------------------------------- all of them

OTHERS = {"gauge": gauge_rows, "statistics": statistics_rows, "memory": memory_rows}


def measured(name: str, effort: Effort) -> Iterator[list[Result]]:
    """The rows of one subject, a case at a time."""
    return OTHERS[name](effort) if name in OTHERS else score_rows(name, effort)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--only", nargs="*", choices=(*SCORES, *OTHERS), metavar="NAME",
                           default=(*SCORES, *OTHERS), help="; ".join((*SCORES, *OTHERS)))  # fmt: skip
    length = arguments.add_mutually_exclusive_group()
    length.add_argument("--smoke", action="store_true", help="seconds; publishes nothing")
    length.add_argument("--lengths", nargs="+", type=int, metavar="N", default=(),
                        help="of scores, instead of the usual ones: 16384 takes minutes a call")  # fmt: skip
    arguments.add_argument("--memory", nargs=3, help=argparse.SUPPRESS)
    given = arguments.parse_args()
    torch.manual_seed(0)
    if given.memory:
        name, impl, n = given.memory
        print(json.dumps(extra_memory(name, impl, int(n))))
        return
    long = LONG._replace(lengths=tuple(given.lengths))
    effort = SMOKE if given.smoke else long if given.lengths else SHORT
    threads = torch.get_num_threads()
    print(f"{threads} threads; peers not installed: {', '.join(peers.missing()) or 'none'}")
    settings = record.config_hash(
        {"rounds": effort.rounds, "seconds": effort.seconds, "least": effort.least}
    )
    device = f"{record.device_name()}, {threads} threads, torch {torch.__version__}"
    for name in given.only:
        for rows in measured(name, effort):
            for row in rows:
                print(f"{row.experiment:<30} {row.case:<38} {row.metric:<32} {row.value:9.3f} "
                      f"{row.unit:<3} ± {row.spread:.3f}", flush=True)  # fmt: skip
            if not given.smoke:
                publish(RESULTS, rows, Provenance(device, record.commit(), settings))


if __name__ == "__main__":
    main()
