"""Cost of the hierarchical reach against length, beside full attention.

Rows go to results/hierarchy.csv: a causal layer of 8 heads of 64, forward and forward+backward, and one more
token after so many in a cache, with far tokens condensed, over the same layer that sees all of them, taken
in turn: median of the ratios and half the distance between the quartiles. Beyond LARGEST_FULL tokens only the hierarchical layer is timed, over itself
at half the length: 2 is linear, 4 what full attention would do.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from timing import interleaved, ratio, typical

from sixfold import MultiHeadAttention, record
from sixfold.attention.cache import KeyValueCache
from sixfold.record import Provenance, Result, publish

RESULTS = Path(__file__).parents[1] / "results" / "hierarchy.csv"
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
LARGEST_FULL = 16384
"""Full attention takes minutes beyond."""
BUDGETS = ((64, 8), (64, 16), (128, 16))
"""Tokens of a block and meta-tokens of a cell."""
MODES = ("forward", "forward+backward", "a token more")


def layers() -> dict[str, MultiHeadAttention]:
    """The plain layer, and one for every budget."""
    found = {"full": MultiHeadAttention(512, 8)}
    for block, capacity in BUDGETS:
        reach = {"name": "hierarchical", "block": block, "capacity": capacity, "threshold": 0.0}
        found[f"block {block}, capacity {capacity}"] = MultiHeadAttention(512, 8, reach=reach)
    return found


def called(layer: MultiHeadAttention, n: int, mode: str) -> Callable[[], object]:
    """One pass over n random tokens, or over what comes after them."""
    x = torch.randn(1, n, 512, requires_grad=True)
    if mode == "a token more":
        cache = KeyValueCache()
        step = torch.no_grad()(lambda part: layer(part, is_causal=True, cache=cache))
        step(x)
        return lambda: step(x[:, :1])
    if mode == "forward":
        return torch.no_grad()(lambda: layer(x, is_causal=True))
    leaves = (x, *layer.parameters())
    return lambda: torch.autograd.grad(layer(x, is_causal=True).sum(), leaves)


def rows(n: int, mode: str, rounds: int) -> list[Result]:
    """Every budget beside full attention, or beside itself at half the length."""
    found, built, case = [], layers(), f"b1 h8 n{n} d64 fp32 causal"
    # a round of long sequences takes a minute: some are few
    patience = {"seconds": 60, "least": 3, "warm": 1 if n > LENGTHS[2] else 2}
    if n <= LARGEST_FULL:
        times = interleaved(
            {name: called(one, n, mode) for name, one in built.items()}, rounds, **patience
        )
        value, spread = typical(times["full"])
        found.append(Result(mode, case, "full", value, "ms", spread, 1))
        for name in list(built)[1:]:
            value, spread = ratio(times[name], times["full"])
            found.append(Result(mode, case, f"{name} / full", value, "1", spread, 1))
        return found
    for name, one in list(built.items())[1:]:
        calls = {"half": called(one, n // 2, mode), "whole": called(one, n, mode)}
        times = interleaved(calls, rounds, **patience)
        value, spread = ratio(times["whole"], times["half"])
        found.append(Result(mode, case, f"{name} / half the length", value, "1", spread, 1))
    return found


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--lengths", nargs="+", type=int, default=LENGTHS)
    arguments.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    arguments.add_argument("--rounds", type=int, default=7)
    arguments.add_argument("--smoke", action="store_true", help="seconds; publishes nothing")
    given = arguments.parse_args()
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    device = f"{record.device_name()}, {threads} threads, torch {torch.__version__}"
    settings = record.config_hash({"rounds": given.rounds, "budgets": BUDGETS})
    for n in (256,) if given.smoke else given.lengths:
        for mode in given.modes:
            done = rows(n, mode, given.rounds)
            for row in done:
                print(
                    f"{row.experiment:<18} {row.case:<28} {row.metric:<40} {row.value:9.3f} ± {row.spread:.3f}",
                    flush=True,
                )
            if not given.smoke:
                publish(RESULTS, done, Provenance(device, record.commit(), settings))


if __name__ == "__main__":
    main()
