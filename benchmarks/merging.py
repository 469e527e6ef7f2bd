"""Is consensus a good reason to merge? Far tokens condensed by one rule or another, at equal rate.

Rows go to results/merging.csv, mean over seeds and half width of its 95 % interval.

Merging: models trained with full attention see, at evaluation, their own block of tokens and its
neighbours one by one, and of every other block only so many groups of neighbours: 75 % to 25 % of its
tokens. Rules differ in where groups begin, and in nothing else: where neighbours diverge most (consensus),
where the cosine of their keys is least (of each head, or of the mean key of all heads, ToMe's measure), at
random, or at equal lengths. For keys of unit covariance consensus is the distance of keys; for beliefs the
distance of their means is one more rule, which tells what covariances add. Losses are of what sees a far
token, less the loss of full attention or of a rival in the same model; "whole blocks" makes one group of a
block, where no rule has a choice, and "nothing far" leaves far tokens out. Text: tiny Shakespeare, 512 windows
of 64 characters of its validation split, blocks of 8. Digits: 8 x 8 images, a pixel a token, blocks of one row.

Boundaries: of a window with k words the k neighbours that are farthest apart, against where words begin, and
against where they end (F1, which is both precision and recall). Beside what random cuts are expected to
find, equal lengths, and the characters that surprise the model most. One head is chosen on windows of the training split.

Nothing is tuned. Resumable: finished runs and seeds are kept in the runs folder.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy
from trials import remembered, row

from sixfold import recipe, record, run
from sixfold.attention.multihead import MultiHeadAttention
from sixfold.attention.reach.hierarchical import Far, Hierarchical
from sixfold.contracts import Batch, Visibility
from sixfold.ops.condense import cells
from sixfold.ops.condense.groups import Divergence, apart
from sixfold.ops.condense.pyramid import Rules
from sixfold.record import Provenance, Result, publish
from sixfold.report.condensed import look, picture, write_condensed

RESULTS = Path(__file__).parents[1] / "results" / "merging.csv"
PICTURE = Path(__file__).parents[1] / "docs" / "pictures" / "hierarchy.svg"
SENTENCE = "Mistake me not; I speak but as I find.\nWhence are you, sir? what"
"""Of the validation split."""
KEPT = (0.75, 0.5, 0.375, 0.25)
CONTEXT, WINDOWS = 64, 512
UNITS = {"text": "nats/char", "digits": "nats/image"}
ONCE = ("governor.mode=off", "train.device=cpu", "train.clip_norm=1.0")


class Task(NamedTuple):
    """Data with the models that learn it: tokens of a block, steps, overrides, scores by name."""

    block: int
    is_causal: bool
    steps: int
    presets: tuple[str, ...]
    overrides: tuple[str, ...]
    scores: dict[str, tuple[str, ...]]


BELIEFS = (
    "attention.score=kl_diagonal",
    "attention.projection=gaussian_diagonal",
    "model.mlp_ratio=3.0",
)
"""They take their larger projections out of the feed-forward part, so that parameters are equal."""
TASKS = {
    "text": Task(
        8, True, 1000, ("nanogpt",),
        ("data.name=shakespeare", f"data.context={CONTEXT}", "model.d_model=64", "model.num_layers=2",
         "model.positions=learned", "attention.num_heads=8", "optimizer.learning_rate=3e-3"),
        {"dot": (), "kl_diagonal": BELIEFS},
    ),
    "digits": Task(
        8, False, 600, (),
        ("data.name=digits", "model={kind='vision', patch_size=1, d_model=32, num_layers=2}",
         "attention.num_heads=4", "train.batch_size=32", "optimizer.learning_rate=3e-3",
         "optimizer.warmup=50"),
        {"dot": (), "kl_diagonal": BELIEFS},
    ),
}  # fmt: skip

Rule = Callable[[Tensor, Tensor, Far], Tensor]
"""How far neighbours with these moments are apart; the last moment is their place in the sequence."""


def of_means(far: Far) -> int:
    """How many of the moments before the place are means: keys are as wide as values here."""
    return far.tokens.value.shape[-1]


def consensus(one: Tensor, other: Tensor, far: Far) -> Tensor:
    """KL(p || q) + KL(q || p)."""
    return far.divergence(one, other)


def distance(one: Tensor, other: Tensor, far: Far) -> Tensor:
    """Squared distance of means."""
    return (one - other)[..., : of_means(far)].square().sum(-1)


def cosine(one: Tensor, other: Tensor, far: Far) -> Tensor:
    """1 - cos of means, head by head."""
    d = of_means(far)
    return 1 - cosine_similarity(one[..., :d], other[..., :d], dim=-1)


def cosine_of_mean(one: Tensor, other: Tensor, far: Far) -> Tensor:
    """1 - cos of the mean over heads: all heads merge the same tokens."""
    pair = (part.mean(1, keepdim=True) for part in (one, other))
    return cosine(*pair, far).expand(one.shape[:-1])


def random(one: Tensor, other: Tensor, far: Far) -> Tensor:  # noqa: ARG001
    """A number drawn for each pair."""
    return torch.rand_like(one[..., 0])


def equal(one: Tensor, other: Tensor, far: Far, *, length: float) -> Tensor:  # noqa: ARG001
    """1 where a group of `length` tokens ends between the two, else 0."""
    # half a token: no place lies on a fraction that rounding could put on either side
    first, second = (((part[..., -1] + 0.5) / length).floor() for part in (one, other))
    return (first != second).to(one.dtype)


def rules(score: str, kept: float) -> dict[str, Rule]:
    """Name of a rule to how far it says neighbours are apart."""
    found: dict[str, Rule] = {"consensus": consensus, "cosine": cosine}
    found["cosine of the mean head"] = cosine_of_mean
    if score == "kl_diagonal":
        found["distance of means"] = distance
    return found | {"random": random, "equal lengths": partial(equal, length=1 / kept)}


class Ruled(nn.Module):
    """The hierarchical reach at one scale, with groups that another rule begins.

    Threshold 0 asks every cell for as many groups as it has room for: those that the
    `capacity` - 1 farthest neighbours begin.
    """

    ordered, condenses = "groups", True

    def __init__(self, rule: Rule, block: int, capacity: int) -> None:
        super().__init__()
        self.rule, self.far = rule, None
        self.reach = Hierarchical(Rules(block, capacity, 0.0, 1))

    def forward(self, *given: Any) -> Visibility:
        return self.reach(*given)

    def attend(self, rating: Any, far: Far, *given: Any) -> Tensor:
        rule: Divergence = lambda one, other: self.rule(one, other, far).clamp(min=0.0)  # noqa: E731
        self.far = far._replace(divergence=rule)
        return self.reach.attend(rating, self.far, *given)


class Near(nn.Module):
    """Only what `Ruled` sees token by token."""

    ordered, condenses = "blocks", False

    def __init__(self, block: int) -> None:
        super().__init__()
        self.block = block

    def forward(self, visibility: Visibility, n: int, m: int, device: torch.device) -> Visibility:
        query, key = (torch.arange(count, device=device) // self.block for count in (n, m))
        near = (query[:, None] - key).abs() <= cells.NEAR
        if visibility.is_causal:
            near = near.tril()
        return Visibility(near[None, None], is_causal=False)


def layers(model: nn.Module) -> list[MultiHeadAttention]:
    """The attention layers of a model."""
    return [part for part in model.modules() if isinstance(part, MultiHeadAttention)]


def reaching(model: nn.Module, make: Callable[[], nn.Module]) -> nn.Module:
    """The model with other reaches, in place."""
    for layer in layers(model):
        layer.reach = make()
    return model.eval()


def trained(task: str, score: str, seed: int, steps: int, runs: Path) -> recipe.Built:
    """One model, trained unless it is there, and its data."""
    name = f"{task}-{score}-{steps}-seed{seed}"
    done = [folder for folder in runs.glob(f"*-{name}") if (folder / "checkpoints").exists()]
    if not done:
        given = TASKS[task]
        ends = (f"train.{when}={steps}" for when in ("steps", "validate_every", "checkpoint_every"))
        overrides = (*ONCE, *given.overrides, *given.scores[score], *ends)
        overrides += (f"train.seed={seed}", f"name={name}")
        done = [run.train(recipe.configure(given.presets, None, overrides), runs)[0]]
    return run.load_run(done[0])


def examples(dataset: Any, task: str) -> list[Batch]:
    """What is measured: batches of the validation split."""
    found = list(dataset.validation_batches(32))
    if task == "digits":
        return found
    whole = [batch for batch in found if batch.inputs.shape == (32, CONTEXT)]
    step = 32 * len(whole) // WINDOWS
    inputs, targets = (torch.cat(parts)[::step][:WINDOWS] for parts in zip(*whole, strict=True))
    return [Batch(*pair) for pair in zip(inputs.split(32), targets.split(32), strict=True)]


@torch.no_grad()
def measured(model: nn.Module, batches: list[Batch], task: Task) -> dict[str, float]:
    """Loss of what sees a far token, in nats, and accuracy where there are labels."""
    torch.manual_seed(0)
    logits = torch.cat([model(batch.inputs) for batch in batches])
    targets = torch.cat([batch.targets for batch in batches])
    if task.is_causal:
        first = (1 + cells.NEAR) * task.block
        logits, targets = logits[:, first:].flatten(0, 1), targets[:, first:].flatten()
        return {"loss": cross_entropy(logits, targets).item()}
    right = (logits.argmax(-1) == targets).double().mean().item()
    return {"loss": cross_entropy(logits, targets).item(), "accuracy": right}


def merging(name: str, score: str, built: recipe.Built) -> dict[str, float]:
    """Every rule at every rate, less full attention; and what that came to."""
    task, batches = TASKS[name], examples(built.dataset, name)
    full = measured(built.model.eval(), batches, task)
    found = {f"full attention; {metric}": value for metric, value in full.items()}

    def keep(case: str, rate: str, make: Callable[[], nn.Module]) -> None:
        for metric, value in measured(reaching(built.model, make), batches, task).items():
            found[f"{case}; {metric} less full attention, {rate}"] = value - full[metric]

    keep("nothing far", "0 % kept", lambda: Near(task.block))
    # of one group a block there is nothing to decide: all rules are this one
    keep("whole blocks", f"{100 / task.block:g} % kept", partial(Ruled, random, task.block, 1))
    for kept in KEPT:
        rate = f"{100 * kept:g} % kept"
        for case, rule in rules(score, kept).items():
            keep(case, rate, partial(Ruled, rule, task.block, round(kept * task.block)))
    return found


def paired(found: dict[str, float]) -> dict[str, float]:
    """What a seed came to, and in the same model how far consensus is below its rivals."""
    rivals = ("random", "equal lengths", "cosine", "distance of means")
    less, more = "loss less full attention", {}
    for rate in (f"{100 * kept:g} % kept" for kept in KEPT):
        for rival in rivals:
            if (name := f"{rival}; {less}, {rate}") in found:
                gain = found[f"consensus; {less}, {rate}"] - found[name]
                more[f"consensus; loss less {rival}, {rate}"] = gain
    return found | more


# ---------------------------------------------------------------- boundaries


def edges(text: str) -> dict[str, Tensor]:
    """Where words begin and end: of character t > 0, whether the one before is on the other side."""
    space = torch.tensor([character.isspace() for character in text])
    return {"words begin": space[:-1] & ~space[1:], "words end": ~space[:-1] & space[1:]}


def found_of(rated: Tensor, truth: Tensor) -> Tensor:
    """F1 over windows of rated cuts (..., windows, n) against the truth (windows, n).

    Of a window with k true ones the k that are rated highest are cut.
    """
    rank = rated.argsort(-1, descending=True).argsort(-1)
    hits = (rank < truth.sum(-1, keepdim=True)) & truth
    return hits.sum((-2, -1)) / truth.sum()


def evenly(truth: Tensor) -> Tensor:
    """Ratings that cut each window (windows, n) into equal lengths, as many as true cuts ask for."""
    n, count = truth.shape[-1], truth.sum(-1, keepdim=True)
    place = torch.arange(n + 1)
    part = (place * (count + 1)).div(n + 1, rounding_mode="floor")
    return part.diff(dim=-1).double()


@torch.no_grad()
def rated(model: nn.Module, inputs: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    """How far neighbours are apart, (layers, heads, windows, n - 1), and how much each surprises."""
    n = inputs.shape[1]
    reaching(model, partial(Ruled, rule, n, 1))  # one block: attention is exact
    parts, surprise = [], []
    for some in inputs.split(32):
        logits = model(some)[:, :-1]
        surprise.append(cross_entropy(logits.mT, some[:, 1:], reduction="none"))
        far = [layer.reach.far for layer in layers(model)]
        gaps = [apart(each.tokens.cells(n, 1), each.divergence)[:, :, 0, 1:] for each in far]
        parts.append(torch.stack(gaps).transpose(1, 2))
    return torch.cat(parts, dim=2), torch.cat(surprise)


def truths(built: recipe.Built, inputs: Tensor) -> dict[str, Tensor]:
    """Edges of all windows, by their kind."""
    all_edges = [edges(built.dataset.tokenizer.decode(window)) for window in inputs]
    return {kind: torch.stack([each[kind] for each in all_edges]) for kind in all_edges[0]}


def boundaries(score: str, built: recipe.Built) -> dict[str, float]:
    """F1 of every rule and layer against where words begin and where they end."""
    shown = torch.cat([batch.inputs for batch in examples(built.dataset, "text")])
    seen = built.dataset.train_batch(0, 0, WINDOWS).inputs
    kinds, chosen_on = truths(built, shown), truths(built, seen)
    found: dict[str, float] = {}
    for name, rule in rules(score, 1.0).items():
        if name in ("random", "equal lengths", "cosine of the mean head"):
            continue
        (now, surprise), (before, _) = (rated(built.model, of, rule) for of in (shown, seen))
        for kind, truth in kinds.items():
            for layer, (heads, old) in enumerate(zip(now, before, strict=True)):
                f1 = found_of(heads, truth)
                best = int(found_of(old, chosen_on[kind]).argmax())
                found[f"{name}, layer {layer}; F1 where {kind}, mean of heads"] = f1.mean().item()
                found[f"{name}, layer {layer}; F1 where {kind}, one head"] = f1[best].item()
    for kind, truth in kinds.items():
        count = truth.sum(-1)
        expected = count.square().sum() / truth.shape[-1] / count.sum()
        found[f"random cuts; F1 where {kind}"] = expected.item()
        found[f"equal lengths; F1 where {kind}"] = found_of(evenly(truth), truth).item()
        found[f"surprise; F1 where {kind}"] = found_of(surprise, truth).item()
    return found


def drawn(score: str, runs: Path) -> None:
    """The picture of the documentation, and its page: what condenses in one sentence, and why.

    Of the head whose farthest neighbours are most often the edges of words in the training split;
    the threshold is its median there.
    """
    built = trained("text", score, 0, TASKS["text"].steps, runs)
    seen = built.dataset.train_batch(0, 0, WINDOWS).inputs
    gaps, _ = rated(built.model, seen, consensus)
    f1 = torch.stack([found_of(gaps, truth) for truth in truths(built, seen).values()]).amax(0)
    layer, head = divmod(int(f1.argmax()), f1.shape[1])
    threshold = round(gaps[layer, head].median().item(), 1)
    block = TASKS["text"].block
    reaching(built.model, lambda: Hierarchical(Rules(block, block // 2, threshold)))
    sights = look(built.model, built.dataset.tokenizer.encode(SENTENCE)[None])
    caption = f"tiny Shakespeare, score {score}, {TASKS['text'].steps} steps, seed 0, layer {layer}"
    picture(PICTURE, sights[layer], list(SENTENCE), head=head, caption=caption)
    print(PICTURE, write_condensed(runs / "condensed.html", sights, list(SENTENCE)), sep="\n")


def experiments() -> Iterator[
    tuple[str, str, str, Callable[[str, recipe.Built], dict[str, float]]]
]:
    """Name, task, score and what is measured of the trained model."""
    for task, given in TASKS.items():
        for score in given.scores:
            yield f"merging in {task}", task, score, partial(merging, task)
            if task == "text":
                yield "boundaries", task, score, boundaries


def told(experiment: str, task: str, score: str, seeds: list[dict[str, float]]) -> Iterator[Result]:
    """A row for everything that every seed came to; printed too."""
    for name in seeds[0]:
        case, metric = name.split("; ")
        one = row(experiment, f"{score}, {case}", metric, [each[name] for each in seeds])
        one = replace(one, unit=UNITS[task] if metric.startswith("loss") else "1")
        print(
            f"{experiment:<18} {one.case:<38} {metric:<46} {one.value:8.4f} ± {one.spread:.4f}",
            flush=True,
        )
        yield one


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--runs", type=Path, default=Path("runs/merging"))
    arguments.add_argument("--into", type=Path, default=RESULTS)
    arguments.add_argument("--seeds", type=int, default=3)
    arguments.add_argument("--only", nargs="*", help="tasks by name; all of them without it")
    arguments.add_argument("--smoke", action="store_true", help="20 steps, publishes nothing")
    arguments.add_argument("--picture", action="store_true", help="draws one sentence, no more")
    given = arguments.parse_args()
    if given.picture:
        drawn("kl_diagonal", given.runs)
        return
    for experiment, task, score, measure in experiments():
        if given.only is not None and task not in given.only:
            continue
        steps = 20 if given.smoke else TASKS[task].steps
        found = [
            remembered(
                given.runs / "seeds", f"{experiment} {score} {steps} seed{seed}",
                lambda: measure(score, trained(task, score, seed, steps, given.runs)),  # noqa: B023
            )
            for seed in range(given.seeds)
        ]  # fmt: skip
        rows = list(told(experiment, task, score, [paired(each) for each in found]))
        if not given.smoke:
            settings = record.config_hash({"tasks": TASKS, "kept": KEPT, "windows": WINDOWS})
            publish(given.into, rows, Provenance(record.device_name(), record.commit(), settings))


if __name__ == "__main__":
    main()
