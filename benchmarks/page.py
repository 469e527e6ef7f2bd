"""Writes docs/speed.md and docs/pictures/cost_*.svg from results/ops.csv. Run: make pictures.

Nothing is measured here and nothing is typed in by hand but targets: the page is what the rows say.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from sixfold.report.svg import FONT, LIGHT, LOOKS, Axes, Line, line_chart, style

ROOT = Path(__file__).parents[1]
ROWS = (ROOT / "results" / "ops.csv", ROOT / "results" / "speed.csv")
PAGE = ROOT / "docs" / "speed.md"
PICTURES = PAGE.parent / "pictures"
BASE = "SDPA"
BOTH = "score forward+backward"
FEATURES = ("dot", "cosine", "l2_squared", "kl_diagonal", "jeffreys", "wasserstein2", "kl")
DISTANCES = ("l1", "l2", "lp2.5", "lp3", "chebyshev")
OURS = ("fused", "numba", "tiled")
PEERS = ("cdist + softmax", "KeOps")
NOT_MEASURED = "not measured"
GAUGE, MEMORY, LAYER = (
    "gauge layer forward+backward",
    "memory forward+backward",
    "layer forward+backward",
)


class Row(NamedTuple):
    """One figure: of what (a score, or nothing), at which shape, by whom."""

    experiment: str
    name: str
    shape: str
    n: int
    d: int
    causal: bool
    metric: str
    value: float
    spread: float
    origin: tuple[str, str]

    def __str__(self) -> str:
        return f"{self.value:.2f} ± {self.spread:.2f}"


class Target(NamedTuple):
    """What was to be reached, and the row that says whether it was."""

    text: str
    most: float
    unit: str
    row: Row | None

    def cells(self) -> tuple[str, ...]:
        """What, target, measured, verdict."""
        wanted = f"at most {self.most:g}{self.unit}"
        if self.row is None:
            return self.text, wanted, NOT_MEASURED, "open"
        shown = f"{self.row.value:.0f}{self.unit}" if self.unit else str(self.row)
        return self.text, wanted, shown, "met" if self.row.value <= self.most else "**missed**"


def read(paths: Iterable[Path]) -> list[Row]:
    """Rows of the files, in order."""
    rows = []
    for path in paths:
        for row in csv.DictReader(path.read_text().splitlines()):
            sizes = {key: int(size) for key, size in re.findall(r"\b([nd])(\d+)", row["case"])}
            if not sizes:
                continue
            name, shape = re.fullmatch(r"(?:(\S+) )?(b\d+ .*?)(?: causal)?", row["case"]).groups()
            rows.append(
                Row(row["experiment"], name or "", shape, sizes["n"], sizes["d"],
                    row["case"].endswith("causal"), row["metric"], float(row["value"]),
                    float(row["spread"]), (row["device"], row["commit"]))
            )  # fmt: skip
    return rows


def of(rows: Sequence[Row], **wanted: object) -> list[Row]:
    """Rows whose fields have these values."""
    return [r for r in rows if all(getattr(r, key) == value for key, value in wanted.items())]


def one(rows: Sequence[Row], **wanted: object) -> Row | None:
    """The row with these values, or None where it was not measured."""
    found = of(rows, **wanted)
    return found[0] if found else None


def best(rows: Sequence[Row], **wanted: object) -> Row | None:
    """The fastest of our implementations."""
    found = [r for r in of(rows, **wanted) if r.metric in [f"{impl} / {BASE}" for impl in OURS]]
    return min(found, key=lambda row: row.value, default=None)


def table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shown(row: Row | None) -> str:
    """A cell."""
    return "" if row is None else str(row)


# ---------------------------------------------------------------- the tables


def targets(rows: Sequence[Row]) -> str:
    """What was to be reached beside what was."""
    main = {"experiment": BOTH, "n": 1024, "causal": False}
    limits = {"cosine": 1.15, "l2_squared": 1.25, "kl_diagonal": 2.3} | dict.fromkeys(
        DISTANCES, 4.0
    )
    found = [
        Target(f"`{name}`, forward and backward", most, "", best(rows, name=name, **main))
        for name, most in limits.items()
    ]
    for name in DISTANCES:
        row = beside_peers(rows, name)
        at = f", {row.n:,} tokens" if row else ""
        found.append(Target(f"`{name}`, to its fastest peer{at}", 1.0, "", row))
    wide = "so per position / plain layer"
    gauge = one(rows, experiment=GAUGE, d=10, metric=wide)
    found.append(Target("gauge layer, heads of 10, to the plain layer", 3.0, "", gauge))
    for row in of(rows, experiment=LAYER, metric="hexagonal layer / plain"):
        text = f"hexagonal layer, {row.shape}, to the plain layer"
        found.append(Target(text, 1.10, "", row))
    for name in DISTANCES:
        row = next((r for r in of(rows, experiment=MEMORY, name=name) if r.metric in OURS), None)
        at = f", {row.n:,} tokens" if row else ""
        found.append(Target(f"`{name}`, memory beyond the inputs{at}", 300, " MB", row))
    return table(("what", "target", "measured", ""), (target.cells() for target in found))


def beside_peers(rows: Sequence[Row], name: str) -> Row | None:
    """Ours as a multiple of the fastest that others offer: a quotient of two ratios.

    At the main length, or at the longest below it that a peer was measured at.
    """
    main = {"experiment": BOTH, "causal": False, "name": name}
    known = [f"{peer} / {BASE}" for peer in PEERS]
    theirs = [row for row in of(rows, **main) if row.metric in known and row.n <= 1024]
    if not theirs:
        return None
    peer = min(theirs, key=lambda row: (-row.n, row.value))
    ours = best(rows, n=peer.n, **main)
    if ours is None:
        return None
    value = ours.value / peer.value
    # relative spreads add up at most
    return ours._replace(
        value=value, spread=value * (ours.spread / ours.value + peer.spread / peer.value)
    )


def misses(rows: Sequence[Row]) -> str:
    """Why targets were missed, as far as it is known."""
    whole = best(rows, experiment=BOTH, n=1024, causal=False, name="lp3")
    return f"""- `lp2.5`: a power that is no whole number costs a logarithm and an exponential for every coordinate of
  every pair; `lp3`, the same loop by multiplication, takes {shown(whole) or NOT_MEASURED}.
- `l2` beside its peer: `cdist` forms inner products by a matrix product, which fills the vector units, and
  pays with a matrix of tokens by tokens.
- Gauge layer: heads of 10 rate 66 features. SDPA wants one width for keys and values, a multiple of 8: 72
  here and 16 in the plain layer, 4.5 times the arithmetic.
- Hexagonal layer: mixing reads and writes the outputs of all heads once more, linear in the tokens where
  attention is quadratic, so that short sequences of narrow heads pay most."""


def scores(rows: Sequence[Row], names: Sequence[str]) -> str:
    """Every way to compute a score, at the main shape."""
    columns = [(f"score {mode}", causal) for causal in (False, True)
               for mode in ("forward", "forward+backward")]  # fmt: skip
    head = ("score", "by", "forward", "with backward", "causal forward", "causal with backward")
    body = []
    for name in names:
        mine = of(rows, name=name, n=1024)
        ways = dict.fromkeys(r.metric for r in mine if r.experiment.startswith("score "))
        ways.pop(BASE, None)
        for way in ways:
            cells = [one(mine, experiment=e, causal=c, metric=way) for e, c in columns]
            label = way.removesuffix(f" / {BASE}")
            body.append(
                (f"`{name}`", f"**{label}**" if label in OURS else label, *map(shown, cells))
            )
    return table(head, body)


def claim(rows: Sequence[Row]) -> str:
    """What became of the claim that distances are faster than products."""
    said = []
    for name in ("l1", "chebyshev"):
        row = best(rows, experiment=BOTH, n=1024, causal=False, name=name)
        if row is not None:
            verdict = "slower" if row.value > 1 else "faster"
            way = row.metric.removesuffix(f" / {BASE}")
            said.append(f"`{name}` takes {row} times as long ({way}): {verdict}")
    return "; ".join(said) or NOT_MEASURED


def gauge(rows: Sequence[Row]) -> str:
    """Layers of beliefs by width of a head, and the fastest of them."""
    mine = of(rows, experiment=GAUGE)
    ways = dict.fromkeys(r.metric for r in mine if r.metric.endswith(" / plain layer"))
    head = (
        "head",
        "tokens",
        "width of features",
        *(w.removesuffix(" / plain layer") for w in ways),
    )
    body = [
        (str(d), f"{of(mine, d=d)[0].n:,}", f"{d * (d + 1) // 2 + d + 1:,}",
         *(shown(one(mine, d=d, metric=way)) for way in ways))
        for d in sorted({row.d for row in mine})
    ]  # fmt: skip
    return table(head, body)


def crossing(rows: Sequence[Row]) -> str:
    """The width from which explicit weights are as fast as wide features."""
    way = "so per position{} / plain layer"
    for d in sorted({row.d for row in of(rows, experiment=GAUGE)}):
        fused = one(rows, experiment=GAUGE, d=d, metric=way.format(""))
        explicit = one(rows, experiment=GAUGE, d=d, metric=way.format(", explicit weights"))
        if fused is None or explicit is None:
            continue
        # beyond the spread of both
        if explicit.value + explicit.spread < fused.value - fused.spread:
            return (
                f"Explicit weights first win at heads of {d} and {fused.n:,} tokens: fused attention "
                "asks for values as wide as the features, explicit weights do not."
            )
    return "At no width measured are explicit weights faster than fused features by more than both spreads."


def every_pair(rows: Sequence[Row]) -> str:
    """One divergence per pair of tokens beside the same by features."""
    mine = of(rows, experiment=BOTH, name="kl", causal=False)
    explicit = next((row for row in mine if row.metric == f"every pair / {BASE}"), None)
    if explicit is None:
        return f"One divergence for every pair of tokens: {NOT_MEASURED}."
    fused = one(mine, n=explicit.n, metric=f"fused / {BASE}")
    return (
        f"One divergence for every pair of tokens, without frames, costs {explicit} times {BASE} at "
        f"heads of {explicit.d} and {explicit.n} tokens; by features, {shown(fused)}."
    )


def statistic(rows: Sequence[Row]) -> str:
    """Statistics beside the attention whose statistics they are."""
    mine = of(rows, experiment="statistics")
    ways = dict.fromkeys(r.metric for r in mine if r.metric != BASE)
    head = ("score", "tokens", *(way.removesuffix(f" / {BASE}") for way in ways))
    cases = dict.fromkeys((row.name, row.n) for row in mine)
    return table(head, [
        (f"`{name}`", f"{n:,}", *(shown(one(mine, name=name, n=n, metric=way)) for way in ways))
        for name, n in cases
    ])  # fmt: skip


def memory(rows: Sequence[Row]) -> str:
    """Megabytes, by score and length."""
    body = (
        (f"`{row.name}`", row.metric, f"{row.n:,}", f"{row.value:.0f} MB")
        for row in of(rows, experiment=MEMORY)
    )
    return table(("score", "by", "tokens", "beyond the inputs"), body)


# ---------------------------------------------------------------- the pictures


def curve(rows: Sequence[Row], name: str) -> list[tuple[float, float]]:
    """Ratio of our fastest against length."""
    lengths = sorted({row.n for row in of(rows, name=name, experiment=BOTH, causal=False)})
    found = (best(rows, name=name, experiment=BOTH, causal=False, n=n) for n in lengths)
    return [(row.n, row.value) for row in found if row is not None]


def picture(rows: Sequence[Row], names: Sequence[str], title: str) -> str:
    """Cost against length as an SVG file on a white card."""
    width, height = 880, 400
    axes = Axes(title, f"times {BASE}, forward and backward", width=width - 48, height=height - 40,
                scale="log", values=(1.0,), steps=(128.0, 1024.0), along="tokens", spacing="log")  # fmt: skip
    curves = [(name, points) for name in names if (points := curve(rows, name))]
    lines = [Line(name, p, look, "dots") for (name, p), look in zip(curves, LOOKS, strict=False)]
    chart = line_chart(lines, [], axes).replace("<svg ", '<svg x="24" y="20" ', 1)
    chart = chart.replace(f'style="max-width:{axes.width}px"',
                          f'width="{axes.width}" height="{axes.height}"')  # fmt: skip
    label = escape(f"{title}: {', '.join(name for name, _ in curves)}")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" role="img" aria-label="{label}">'
        f"<title>{label}</title><style>{style(LIGHT)}.source{{font:11px {FONT}}}</style>"
        f'<rect x=".5" y=".5" width="{width - 1}" height="{height - 1}" rx="12" '
        f'fill="{LIGHT["paper"]}" stroke="{LIGHT["grid"]}"/>{chart}</svg>\n'
    )


def pictures(rows: Sequence[Row]) -> dict[str, str]:
    """File names and what they hold."""
    return {
        "cost_features.svg": picture(rows, FEATURES, "Scores that are inner products"),
        "cost_distances.svg": picture(rows, DISTANCES, "Distances in tiles"),
    }


# ---------------------------------------------------------------- the page


def origins(rows: Sequence[Row]) -> str:
    """Where the rows come from."""
    found = dict.fromkeys(row.origin for row in rows)
    return "\n".join(f"- {device}; commit {commit}" for device, commit in found)


def baseline(rows: Sequence[Row]) -> str:
    """Milliseconds behind the ratios."""
    found = of(rows, name="dot", n=1024, causal=False, metric=BASE)
    return (
        ", ".join(f"{row.experiment.removeprefix('score ')} {row} ms" for row in found)
        or NOT_MEASURED
    )


def page(rows: Sequence[Row]) -> str:
    """The whole page."""
    return f"""# Speed

What structured attention costs beside PyTorch's `scaled_dot_product_attention` (SDPA) at the same
shapes, both taken in turn in one process: medians of the ratios, ± half the distance between the
quartiles. One sequence, 8 heads of width 64 (`kl`: of 10), 1,024 tokens and float32 unless a table
says otherwise. This page is generated from `results/ops.csv` and `results/speed.csv`; misses stand
where hits do.

{origins(rows)}

SDPA itself at the main shape: {baseline(rows)}.

## Targets

{targets(rows)}

What was missed, and why:

{misses(rows)}

## Scores on features

Bold are Sixfold's own implementations; *explicit weights* is the reference, the others are peers.
`dot` shows what calling through a score costs.

{scores(rows, FEATURES)}

![Cost of scores on features against length](pictures/cost_features.svg)

## Distances

{scores(rows, DISTANCES)}

The claim that distances are *faster* than the dot product does not hold. Forward and backward,
1,024 tokens: {claim(rows)}.

![Cost of distances against length](pictures/cost_distances.svg)

## Gauge layers

Whole causal layers with beliefs of full covariance in frames, 8 heads, forward and backward, beside the
plain layer with the same heads. Features grow with the square of a head's width.

{gauge(rows)}

{crossing(rows)} {every_pair(rows)}

## Statistics without weights

Beside the causal forward pass of SDPA. *Explicit weights* hold the matrix.

{statistic(rows)}

## Memory

What one forward and backward pass holds at most beyond its inputs, outputs and gradients included
(8 heads of 64, float32). Each row is a process of its own that first runs the same pass over 64 tokens,
so that interpreter, imports and compiled code are not counted; then the kernel's high-water mark of
resident memory is reset (`/proc/self/clear_refs`) and read after the pass. `cdist + softmax` and explicit
weights hold several matrices of tokens by tokens.

{memory(rows)}

## How to repeat it

```bash
python benchmarks/ops.py          # about a quarter of an hour; --lengths 16384, --only NAMES
python benchmarks/speed.py        # hexagonal layers, the training loop, the import
python benchmarks/page.py         # this page and its pictures
```

Peers (KeOps, x-transformers, FlexAttention where it compiles) are measured where they are installed.
An empty cell was not measured: an implementation that would take too long at a length is left out, causal
rows have no peers, FlexAttention has no backward pass on a CPU.
"""


def main() -> None:
    rows = read(ROWS)
    PAGE.write_text(page(rows), encoding="utf-8")
    for name, drawn in pictures(rows).items():
        (PICTURES / name).write_text(drawn, encoding="utf-8")
    print(PAGE, *(PICTURES / name for name in pictures(rows)), sep="\n")


if __name__ == "__main__":
    main()
