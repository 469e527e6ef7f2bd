"""Run a model over a loader and say what its attention heads do."""

from __future__ import annotations

import json
import math
import os
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sixfold import discover
from sixfold.analysis.families._watch import STAGES, Family, Log
from sixfold.analysis.measure import STATISTICS, Tally
from sixfold.analysis.result import Analysis, Layer, Spread
from sixfold.contracts import Batch
from sixfold.report import heatmaps

PLACE = "sixfold.analysis.families"
PATIENCE_S = 2.0
"""A progress bar is shown where the job lasts longer."""


class Found(NamedTuple):
    """What the whole batches so far gave of one layer."""

    tally: Tally
    times_us: list[dict[str, float]]


def analyze(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    batches: int | None = None,
    queries: int | None = 256,
    pictures: str | os.PathLike[str] | None = None,
) -> Analysis:
    """What every attention head of a model does, averaged over the tokens of a loader.

    Entropy, sparsity, distance travelled, weight on the first token, logits, how alike heads are
    and times, as `Layer` and `sixfold.analysis.measure` define them. Weights are never held whole:
    memory is linear in the tokens. The model runs in evaluation mode without gradients; then its
    modes, its hooks and the random numbers are what they were. Ctrl-C ends it with a warning and
    what the whole batches gave, or as usual where there is none.

    Args:
        model: with layers of `sixfold.MultiHeadAttention`, `torch.nn.MultiheadAttention`, timm's
            `Attention` or of Hugging Face (``sdpa``, ``eager`` or ``sixfold_<score>``).
        loader: batches. A mapping is passed by name; of a tuple or list, inputs and targets, the
            first; anything else as it is.
        batches: at most so many of them; all where None.
        queries: at most so many of a sequence, evenly spaced; all where None.
        pictures: a folder for `heads.png`, `redundancy.png`, `times.png` and `analysis.json`.

    Raises:
        ValueError: where the model has no attention that is known or one that cannot be followed,
            for an empty loader, and for counts below 1.

    >>> from sixfold import MultiHeadAttention
    >>> layer = MultiHeadAttention(32, 4)
    >>> found = analyze(layer, [torch.zeros(2, 10, 32)])  # all keys alike
    >>> round(found.layers[0].entropy[0].mean, 4), round(found.layers[0].first[0].mean, 4)
    (1.0, 0.1)
    """
    for name, count in (("batches", batches), ("queries", queries)):
        if count is not None and count < 1:
            raise ValueError(f"{name} must be 1 or more, or None, got {count}")
    if pictures is not None:
        heatmaps.check()  # before the work, not after it
    model = getattr(model, "_orig_mod", model)  # of a compiled model, which calls no hooks
    found, done, interrupted = observe(model, loader, batches, queries)
    order = [name for name in names_of(model).values() if name in found]
    layers = tuple(layer_of(name, *found[name]) for name in order)
    analysis = Analysis(type(model).__name__, layers, done, interrupted)
    if pictures is not None:
        save(analysis, Path(pictures))
    return analysis


def observe(
    model: nn.Module, loader: Iterable[Any], batches: int | None, queries: int | None
) -> tuple[dict[str, tuple[str, Found]], int, bool]:
    """What each layer did, by its name with its family; the batches done; whether interrupted."""
    found: dict[str, tuple[str, Found]] = {}
    done = 0
    with ExitStack() as stack:
        device = calm(model, stack)
        logs = watched(model, device, queries, stack)
        progress = stack.enter_context(bar(total(loader, batches)))
        try:
            for batch in loader:
                run(model, batch, device)
                collect(logs, found)
                if not found:
                    raise ValueError(nothing(model))
                done += 1
                progress(done)
                if done == batches:
                    break
        except KeyboardInterrupt:
            if not done:
                raise
            text = f"interrupted: {done} whole batches were measured, the rest was not"
            warnings.warn(text, RuntimeWarning, stacklevel=3)
            return found, done, True
    if not done:
        raise ValueError("loader has no batches")
    return found, done, False


def calm(model: nn.Module, stack: ExitStack) -> torch.device:
    """Evaluation mode, no gradients and random numbers of its own; the model's device."""
    place = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    beyond = [] if place.type == "cpu" else [place.index or 0]
    kind = "cuda" if place.type == "cpu" else place.type
    stack.enter_context(torch.random.fork_rng(beyond, device_type=kind))
    stack.enter_context(torch.no_grad())
    for module in model.modules():
        stack.callback(setattr, module, "training", module.training)
    model.eval()
    return place


def watched(
    model: nn.Module, device: torch.device, queries: int | None, stack: ExitStack
) -> dict[nn.Module, Log]:
    """Let every family watch the model; the logs fill up as it runs."""
    names = names_of(model)
    logs: dict[nn.Module, Log] = {}

    def log_of(module: nn.Module, family: str) -> Log | None:
        if module not in logs and module in names:
            logs[module] = Log(names[module], family, device, queries)
        log = logs.get(module)
        # one module is of one family: its attention would be counted twice
        return log if log is not None and log.family == family else None

    for family in families():
        family.watch(model, stack, log_of)
    return logs


def names_of(model: nn.Module) -> dict[nn.Module, str]:
    """Where each module is in the model."""
    return {module: name or "(the model)" for name, module in model.named_modules()}


def families() -> list[Family]:
    """Every file of `sixfold.analysis.families`."""
    return [discover.load(PLACE, name)() for name in discover.names(PLACE)]


def nothing(model: nn.Module) -> str:
    """The message for a model in which no attention was seen."""
    known = "; ".join(family.what for family in families())
    return f"{type(model).__name__} called no attention that can be analysed; known are: {known}"


def run(model: nn.Module, batch: Any, device: torch.device) -> None:
    """One pass over a batch, however it is packed."""
    if isinstance(batch, Mapping):
        model(**{name: moved(entry, device) for name, entry in batch.items()})
        return
    if isinstance(batch, Batch):
        batch = batch.inputs
    elif isinstance(batch, tuple | list):
        batch = batch[0]
    model(moved(batch, device))


def moved(entry: Any, device: torch.device) -> Any:
    """A tensor on the model's device; anything else as it is."""
    return entry.to(device) if isinstance(entry, Tensor) else entry


def collect(logs: Mapping[nn.Module, Log], found: dict[str, tuple[str, Found]]) -> None:
    """Add what the logs hold of a whole batch; an interrupted one leaves nothing behind."""
    for log in logs.values():
        tally, times = log.collect()
        if tally is None:
            continue
        if log.name in found:
            _, before = found[log.name]
            tally, times = before.tally + tally, [*before.times_us, times]
        else:
            times = [times]
        found[log.name] = log.family, Found(tally, times)


def layer_of(name: str, family: str, found: Found) -> Layer:
    """Means, their spread over tokens, and medians over batches."""
    tally = found.tally
    mean = tally.total / tally.count
    deviation = (tally.square / tally.count - mean.square()).clamp(min=0).sqrt()
    spreads = {
        statistic: tuple(map(Spread, mean[i].tolist(), deviation[i].tolist()))
        for i, statistic in enumerate(STATISTICS)
    }
    times = {
        stage: median(took[stage] for took in found.times_us if stage in took)
        for stage in STAGES
        if any(stage in took for took in found.times_us)
    }
    redundancy = tuple(map(tuple, (tally.alike / tally.pairs).tolist()))
    largest = tuple(v if math.isfinite(v) else math.nan for v in tally.largest.tolist())
    queries = tuple(int(count) for count in tally.count.tolist())
    return Layer(name, family, queries, **spreads, largest=largest, redundancy=redundancy,
                 times_us=times)  # fmt: skip


def save(analysis: Analysis, folder: Path) -> None:
    """Pictures of the analysis, and its values."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "analysis.json").write_text(json.dumps(analysis.to_dict(), indent=1) + "\n")
    analysis.figure().savefig(folder / "heads.png", dpi=150)
    analysis.redundancy_figure().savefig(folder / "redundancy.png", dpi=150)
    analysis.times_figure().savefig(folder / "times.png", dpi=150)


def total(loader: Iterable[Any], batches: int | None) -> int | None:
    """How many batches there will be, where that is known."""
    try:
        length = len(loader)  # type: ignore[arg-type]
    except TypeError:
        return batches
    return length if batches is None else min(length, batches)


@contextmanager
def bar(count: int | None) -> Iterator[Any]:
    """A function to call with the batches done: it opens a bar once the job takes long."""
    start = time.monotonic()
    with ExitStack() as shown:
        moving: list[Any] = []

        def step(done: int) -> None:
            if not moving and time.monotonic() - start > PATIENCE_S and done != count:
                moving.append(open_bar(count, shown))
            for update in moving:
                update(done)

        yield step


def open_bar(count: int | None, stack: ExitStack) -> Any:
    """A bar of rich on the standard error, or nothing without rich or without a terminal."""
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ModuleNotFoundError:
        return lambda done: None  # noqa: ARG005
    console = Console(stderr=True)
    if not console.is_terminal:
        return lambda done: None  # noqa: ARG005
    progress = stack.enter_context(Progress(console=console, transient=True))
    task = progress.add_task("attention", total=count)
    return lambda done: progress.update(task, completed=done)
