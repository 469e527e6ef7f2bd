"""What an analysis found, as text, as plain values and as pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any, NamedTuple

from sixfold.report.scale import number


class Spread(NamedTuple):
    """Mean and standard deviation over the counted queries; NaN where nothing was counted."""

    mean: float
    deviation: float


@dataclass(frozen=True)
class Layer:
    """One attention layer; every tuple has an entry for each of its heads.

    Attributes:
        name: where it is in the model.
        family: which file of `sixfold.analysis.families` watched it.
        queries: counted queries of a head.
        entropy: of the weights, over the logarithm of the visible keys; 0 is one key, 1 all alike.
        sparsity: share of the visible keys that 99 % of the weight does without.
        distance: tokens between a query and the keys it attends to; NaN across two sequences.
        first: weight on the first token of the sequence.
        log_sum_exp: of the logits, in nats; NaN for scores known up to a term of the query.
        largest: largest logit, in nats; for scores without a sign the largest range of a query.
        redundancy: mean cosine between the weights of two heads, by head and head.
        times_us: median over batches of the time in each stage; ``whole`` is all of them.
    """

    name: str
    family: str
    queries: tuple[int, ...]
    entropy: tuple[Spread, ...]
    sparsity: tuple[Spread, ...]
    distance: tuple[Spread, ...]
    first: tuple[Spread, ...]
    log_sum_exp: tuple[Spread, ...]
    largest: tuple[float, ...]
    redundancy: tuple[tuple[float, ...], ...]
    times_us: Mapping[str, float]

    @property
    def num_heads(self) -> int:
        """Its heads."""
        return len(self.entropy)

    @property
    def alike(self) -> tuple[float, ...]:
        """Mean redundancy of each head with the others of the layer; NaN for a head alone."""
        return tuple(
            fmean([*row[:head], *row[head + 1 :]]) if len(row) > 1 else math.nan
            for head, row in enumerate(self.redundancy)
        )


@dataclass(frozen=True)
class Analysis:
    """What the heads of a model do over a loader: see `sixfold.analyze`.

    interrupted: it was stopped after `batches` whole batches, and holds what these gave.
    """

    model: str
    layers: tuple[Layer, ...]
    batches: int
    interrupted: bool

    def table(self) -> str:
        """A line for each head, means with their standard deviation over tokens."""
        heads = sum(layer.num_heads for layer in self.layers)
        lines = [f"{self.model}: {len(self.layers)} layers, {heads} heads, {self.batches} batches"]
        if self.interrupted:
            lines[0] += ", interrupted: the rest of the loader was not measured"
        for layer in self.layers:
            lines += ["", _heading(layer), *_columns([HEADER, *_rows(layer)])]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold; None for what is not a finite number."""
        return _plain(asdict(self))

    def figure(self) -> Any:
        """Every head's means, layer by layer, as a matplotlib figure."""
        from sixfold.report.heatmaps import Panel, panels

        share = (0.0, 1.0)
        largest, alike = zip(*((layer.largest, layer.alike) for layer in self.layers), strict=True)
        shown = [
            Panel("Entropy", "of log of visible keys", self.means("entropy"), share),
            Panel("Sparsity", "share of keys 99 % does without", self.means("sparsity"), share),
            Panel("Distance travelled", "tokens", self.means("distance")),
            Panel("Weight on the first token", "", self.means("first"), share),
            Panel("Largest logit, or range", "nats", largest),
            Panel("Likeness to the other heads", "mean cosine", alike, share),
        ]
        return panels(shown, self.short_names())

    def redundancy_figure(self) -> Any:
        """The matrix of each layer: how alike its heads attend."""
        from sixfold.report.heatmaps import Panel, matrices

        names = self.short_names()
        shown = [
            Panel(f"layer {name}" if name.isdigit() else name, "", layer.redundancy, (0.0, 1.0))
            for name, layer in zip(names, self.layers, strict=True)
        ]
        return matrices(shown, "mean cosine of the heads' weights")

    def times_figure(self) -> Any:
        """Time per layer, by stage where stages can be told apart."""
        from sixfold.report.heatmaps import stacks

        parts = [
            {k: v for k, v in layer.times_us.items() if k != "whole" or len(layer.times_us) == 1}
            for layer in self.layers
        ]
        return stacks("Time per layer and batch", "us", parts, self.short_names())

    def means(self, statistic: str) -> list[list[float]]:
        """The means of a statistic by layer and head."""
        return [[spread.mean for spread in getattr(layer, statistic)] for layer in self.layers]

    def short_names(self) -> list[str]:
        """Names of the layers without the parts that all of them share."""
        parts = [layer.name.split(".") for layer in self.layers]
        if len({len(words) for words in parts}) > 1:
            return [layer.name for layer in self.layers]
        differs = [len(set(column)) > 1 for column in zip(*parts, strict=True)]
        return [
            ".".join(w for w, d in zip(words, differs, strict=True) if d) or words[-1]
            for words in parts
        ]


HEADER = (
    "head", "entropy", "sparsity", "distance", "first token", "log-sum-exp", "largest", "alike",
)  # fmt: skip


def _heading(layer: Layer) -> str:
    times = ", ".join(f"{stage} {number(took)} us" for stage, took in layer.times_us.items())
    counted = sorted(set(layer.queries))
    shown = " to ".join(number(n) for n in dict.fromkeys((counted[0], counted[-1])))
    return f"{layer.name} ({layer.family}), {shown} queries a head; {times}"


def _rows(layer: Layer) -> list[tuple[str, ...]]:
    spreads = (layer.entropy, layer.sparsity, layer.distance, layer.first, layer.log_sum_exp)
    return [
        (str(head), *(_spread(values[head]) for values in spreads),
         _value(layer.largest[head]), _value(layer.alike[head]))
        for head in range(layer.num_heads)
    ]  # fmt: skip


def _spread(value: Spread) -> str:
    return f"{value.mean:.3g} ± {value.deviation:.2g}" if math.isfinite(value.mean) else "-"


def _value(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "-"


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]


def _plain(value: Any) -> Any:
    """The same with NaN and infinities as None and pairs by name."""
    if isinstance(value, Spread):
        return _plain(value._asdict())
    if isinstance(value, Mapping):
        return {name: _plain(entry) for name, entry in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
