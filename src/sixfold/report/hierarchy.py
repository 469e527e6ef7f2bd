"""Which tokens of a sequence condensed, as a matplotlib figure.

>>> from sixfold.attention.hierarchy import Group
>>> found = [Group(0, 0, 0, 2, 0.01, float("inf")), Group(0, 0, 2, 3, 0.0, 0.4)]
>>> len(plot_hierarchy(found, ["the", "cat", "sat"]).axes[0].patches)
2
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from sixfold.attention.hierarchy import Group
from sixfold.report.plots import blank, load, with_legend
from sixfold.report.svg import LIGHT, LOOKS

WIDEST = 40.0
"""Inches; tokens get narrower beyond."""


def plot_hierarchy(
    hierarchy: Sequence[Group],
    tokens: Sequence[str],
    *,
    head: int = 0,
    row: int = 0,
    title: str = "Meta-tokens",
) -> Any:
    """The tokens of one head in a row, and above them its groups, a row per scale.

    A group of one is pale; the number at the left edge of a group is the divergence that began it,
    which the first of a cell has none of.

    Args:
        hierarchy: groups, as `sixfold.attention.hierarchy.hierarchy` returns them.
        tokens: the text of each token.
        head: whose groups.
        row: of the batch.
        title: of the figure.

    Raises:
        ValueError: for a head and row without groups, and for fewer tokens than they span.
    """
    shown = [group for group in hierarchy if (group.head, group.row) == (head, row)]
    if not shown:
        raise ValueError(f"head {head} of row {row} has no groups: is the sequence too short?")
    if (end := max(group.stop for group in shown)) > len(tokens):
        raise ValueError(f"groups span {end} tokens, got {len(tokens)}")
    scales = 1 + max(group.scale for group in shown)
    figure = blank(min(WIDEST, 1.6 + 0.32 * len(tokens)), 1.8 + 0.5 * scales)
    axes = figure.add_subplot(1, 1, 1)
    axes.set_title(f"{title}, head {head}", loc="left", fontsize=11)
    for group in shown:
        _bar(axes, group)
    axes.set_xlim(-0.2, len(tokens) + 0.2)
    axes.set_ylim(-0.1, scales + 0.1)
    turned = 90 if max(map(len, tokens)) > 2 else 0
    axes.set_xticks([at + 0.5 for at in range(len(tokens))], tokens, rotation=turned, fontsize=9)
    axes.set_xlabel("a number is the divergence that began a group, nats", fontsize=8, loc="left")
    axes.xaxis.label.set_color(LIGHT["muted"])
    axes.set_yticks([s + 0.5 for s in range(scales)], [f"scale {s}" for s in range(scales)])
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
    axes.tick_params(colors=LIGHT["muted"], length=0)
    axes.tick_params(axis="x", colors=LIGHT["ink"])
    return with_legend(figure)


def _bar(axes: Any, group: Group) -> None:
    """A group from its first to its last token, at the height of its scale."""
    alone = group.stop - group.start == 1
    width = group.stop - group.start - 0.12
    corner = (group.start + 0.06, group.scale + 0.14)
    shape = load("matplotlib.patches").Rectangle(corner, width, 0.72)
    shape.set_facecolor(LIGHT["grid"] if alone else LIGHT[LOOKS[group.scale % len(LOOKS)]])
    shape.set_edgecolor("none")
    axes.add_patch(shape)
    if math.isfinite(group.began):
        ink = LIGHT["muted"] if alone else LIGHT["paper"]
        axes.text(group.start + 0.12, group.scale + 0.5, f"{group.began:.2g}",
                  fontsize=7, va="center", color=ink)  # fmt: skip
