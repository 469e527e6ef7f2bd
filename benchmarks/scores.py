"""Every score as a language model's attention, at equal parameters and steps.

Rows go to results/scores.csv: loss on the whole validation split after 600 steps, mean over seeds and
half width of its 95 % interval, on tiny Shakespeare and on WikiText-2 text (characters; trained on the
first nine tenths of its validation file, measured on the last: its training split is not at hand);
with --rates, over a doubling ladder of learning rates, the largest one at which 200 steps still end below a
unigram model, and the sensitivity to the rate.
Two layers of width 64, eight heads of 8, learned positions (not every score bears rotation; dot is also
run with rotation, for frames of positions rotate too). Beliefs take their larger projections out of the
feed-forward part. Resumable: finished runs are kept.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
from collections import Counter
from pathlib import Path

from sixfold import config, recipe, record, run
from sixfold.errors import Diverged
from sixfold.governor.sandbox import interval
from sixfold.record import Provenance, Result, publish

RESULTS = Path(__file__).parents[1] / "results" / "scores.csv"
STEPS, LADDER_STEPS = 600, 200
LADDER = tuple(2.0**power * 1e-3 for power in range(9))
COMMON = (
    "model.d_model=64", "model.num_layers=2", "model.positions=learned", "attention.num_heads=8",
    "governor.mode=off", "train.device=cpu",
)  # fmt: skip
POINTS = ("dot", "cosine", "l2_squared", "l2", "l1", "lp", "chebyshev")
DIAGONAL = ("kl_diagonal", "jeffreys", "wasserstein2")


def cases() -> dict[str, tuple[str, ...]]:
    """Name of a case to its overrides."""
    found = {name: (f"attention.score={name}",) for name in POINTS}
    # frames of positions turn with the distance of two tokens: what they have to be compared with
    found["dot, rope"] = ("attention.score=dot", "model.positions=rotary")
    found["dot, rope and learned"] = ("attention.score=dot", "attention.rope_theta=1e4")
    for name in DIAGONAL:
        found[name] = (
            f"attention.score={name}", "attention.projection=gaussian_diagonal", "model.mlp_ratio=3.0",
        )  # fmt: skip
    for name, frames in (("kl, tied", None), ("kl, tied, so", "so"), ("kl, tied, gl", "gl")):
        belief = ("name=gaussian", "tied=true", *([f"frames={frames}"] if frames else []))
        projection = (f"attention.projection.{option}" for option in belief)
        found[name] = ("attention.score=kl", "model.mlp_ratio=2.25", *projection)
    return found


def texts() -> dict[str, tuple[str, ...]]:
    """Name of a text to its overrides."""
    found = {"Shakespeare": ()}
    if "SIXFOLD_DATA" in os.environ:
        path = Path(os.environ["SIXFOLD_DATA"]) / "wikitext-2" / "valid.txt"
        found["WikiText-2"] = ("data.name=corpus", f"data.path={path}")
    return found


def trained(name: str, overrides: tuple[str, ...], runs: Path) -> tuple[float, int, str]:
    """Validation loss, parameters and commit of one run, trained unless it is there."""
    done = [folder for folder in runs.glob(f"*-{name}") if validated(folder)]
    if done:
        folder = done[0]
    else:
        settings = recipe.configure(["nanogpt"], None, (*COMMON, *overrides, f"name={name}"))
        folder, _ = run.train(settings, runs)
    facts = json.loads((folder / "environment.json").read_text())
    return validated(folder)[-1], facts["parameters"], facts["commit"]


def validated(folder: Path) -> list[float]:
    """Validation losses of a run; none of one that was stopped before its first, its only one."""
    path = folder / "metrics.jsonl"
    rows = run.rows(path) if path.exists() else []
    return [row["loss"] for row in rows if row.get("split") == "validation"]


def label(*parts: object) -> str:
    """A run's name from what tells it apart."""
    return "-".join(str(part) for part in parts).replace(", ", "_").replace(" ", "")


def losses(case: str, text: str, seeds: int, runs: Path) -> list[Result]:
    """Rows of one score on one text."""
    steps = (
        f"train.steps={STEPS}",
        f"train.validate_every={STEPS}",
        f"train.checkpoint_every={STEPS}",
    )
    found = []
    for seed in range(seeds):
        overrides = (*cases()[case], *texts()[text], *steps, f"train.seed={seed}")
        found.append(trained(label(case, text, f"seed{seed}"), overrides, runs))
    values = [loss for loss, *_ in found]
    low, high = interval(values)
    name = f"{case} on {text}"
    print(
        f"{name:<28} {statistics.fmean(values):.4f} ± {(high - low) / 2:.4f}  {found[0][1]:,}",
        flush=True,
    )
    return [
        Result(
            "language model",
            name,
            "validation loss",
            statistics.fmean(values),
            "nats/char",
            (high - low) / 2,
            seeds,
        ),
        Result("language model", name, "parameters", float(found[0][1]), "1", 0.0, seeds),
    ]


def unigram(tokens: list[int]) -> float:
    """Entropy of single tokens, in nats: what a model that sees no order reaches."""
    counts = Counter(tokens).values()
    total = sum(counts)
    return -sum(n / total * math.log(n / total) for n in counts)


def ladder(case: str, bound: float, seed: int, runs: Path) -> list[float]:
    """Losses of one seed up the ladder, as far as training stays below `bound`."""
    steps = (
        f"train.steps={LADDER_STEPS}",
        f"train.validate_every={LADDER_STEPS}",
        f"train.checkpoint_every={LADDER_STEPS}",
    )
    losses: list[float] = []
    for rate in LADDER:
        overrides = (
            *cases()[case], *steps, f"train.seed={seed}", f"optimizer.learning_rate={rate}",
            f"optimizer.final_learning_rate={rate}", "optimizer.warmup=10", "train.clip_norm=none",
        )  # fmt: skip
        try:
            loss, *_ = trained(label(case, f"rate{rate}", f"seed{seed}"), overrides, runs)
        except Diverged:
            break
        if not loss < bound:
            break
        losses.append(loss)
    return losses


def sensitivity(losses: list[float], worst: float) -> float:
    """Mean over the ladder of how far a loss is above the best; a step that failed counts `worst`.

    Source: Wortsman et al., Small-scale proxies for large-scale Transformer training
    instabilities, arXiv 2309.14322, section 2.2.
    """
    failed = [worst] * (len(LADDER) - len(losses))
    return statistics.fmean(losses + failed) - min(losses + failed)


def rates(case: str, seeds: int, runs: Path) -> list[Result]:
    """One score's largest stable learning rate (median and half range) and its sensitivity."""
    tokens = recipe.build(recipe.configure(["nanogpt"])).dataset.validation.tolist()
    bound, worst = unigram(tokens), math.log(len(set(tokens)))
    found = [ladder(case, bound, seed, runs) for seed in range(seeds)]
    largest = [LADDER[len(losses) - 1] if losses else 0.0 for losses in found]
    values = [sensitivity(losses, worst) for losses in found]
    low, high = interval(values)
    mean = statistics.fmean(values)
    print(f"{case:<28} {largest} {mean:.4f} ± {(high - low) / 2:.4f}", flush=True)
    half = (max(largest) - min(largest)) / 2
    return [
        Result(
            "stability", case, "largest learning rate", statistics.median(largest), "1", half, seeds
        ),
        Result(
            "stability",
            case,
            "learning-rate sensitivity",
            mean,
            "nats/char",
            (high - low) / 2,
            seeds,
        ),
    ]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--runs", type=Path, default=Path("runs/scores"))
    arguments.add_argument("--seeds", type=int, default=3)
    arguments.add_argument("--only", nargs="*", help="scores by case; all of them without it")
    arguments.add_argument("--rates", action="store_true", help="learning rates, not losses")
    given = arguments.parse_args()
    settings = record.config_hash(config.plain(recipe.configure(["nanogpt"], None, COMMON)))
    for case in cases():
        if given.only is not None and case not in given.only:
            continue
        rows = rates(case, given.seeds, given.runs) if given.rates else [
            row for text in texts() for row in losses(case, text, given.seeds, given.runs)
        ]  # fmt: skip
        publish(RESULTS, rows, Provenance(record.device_name(), record.commit(), settings))


if __name__ == "__main__":
    main()
