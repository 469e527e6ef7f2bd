"""What condensed in a model, and why: one HTML file that needs nothing else, and fetches nothing.

built = load_run("runs/...")
tokens = built.dataset.tokenizer.encode(text)
write_condensed("condensed.html", look(built.model, tokens[None]), list(text))
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sixfold.attention.hierarchy import Group, hierarchy
from sixfold.attention.multihead import MultiHeadAttention
from sixfold.attention.reach.hierarchical import Hierarchical
from sixfold.ops.precision import wide
from sixfold.report import brackets
from sixfold.report.brackets import Head, fates, legible, reasons, spelled, there, visible
from sixfold.report.html import _jinja2, _packaged
from sixfold.report.scale import number
from sixfold.report.svg import DARK, FONT, LIGHT, style


class Sight(NamedTuple):
    """What one layer condensed: its groups, and those it had if no token joined another (`alone`).

    thresholds: of consensus, by key head, nats; block: tokens of a cell; capacity: groups of one.
    """

    layer: str
    groups: tuple[Group, ...]
    alone: tuple[Group, ...]
    thresholds: tuple[float, ...]
    block: int
    capacity: int

    def head(self, head: int, row: int = 0) -> Head:
        """What one head made of one row of the batch.

        Raises ValueError for a head or row in which nothing is of a cell.
        """
        groups = [group for group in self.groups if (group.head, group.row) == (head, row)]
        if not groups:
            raise ValueError(
                f"head {head} of row {row} has no groups in {self.layer}: a cell needs "
                f"{self.block} tokens, and to be seen two blocks away"
            )
        gaps = [math.nan] * max(group.stop for group in groups)
        for group in self.alone:
            if (group.head, group.row) == (head, row):
                gaps[group.start] = group.began
        return Head(groups, gaps, self.thresholds[head], self.capacity)


@torch.no_grad()
def look(model: nn.Module, *given: Any, **options: Any) -> tuple[Sight, ...]:
    """Run a model once in `eval`, and see what its layers of reach ``hierarchical`` condense.

    Args:
        model: is left as it was.
        given: what it is called with; sequences in one pass, without a cache.
        options: as `given`.

    Raises:
        ValueError: for a model without such a layer, and for a call with a cache.

    >>> from sixfold.models.language import LanguageModel
    >>> reach = {"name": "hierarchical", "block": 4, "capacity": 2}
    >>> model = LanguageModel(9, 16, 8, 1, attention={"num_heads": 1, "reach": reach})
    >>> (sight,) = look(model, torch.zeros(1, 12, dtype=torch.int64))
    >>> [(group.scale, group.start, group.stop) for group in sight.groups]
    [(0, 0, 4), (0, 4, 8), (0, 8, 12)]
    """
    layers = {
        name: part
        for name, part in model.named_modules()
        if isinstance(part, MultiHeadAttention) and part.reach.condenses
    }
    if not layers:
        raise ValueError(
            "model has no layer of reach 'hierarchical': in any other nothing condenses"
        )
    seen: dict[nn.Module, tuple[Tensor, dict[str, Any]]] = {}

    def note(layer: nn.Module, positional: tuple[Tensor, ...], named: dict[str, Any]) -> None:
        if named.get("cache") is not None:
            raise ValueError("give the whole sequence in one pass, without a cache")
        kept = ("key_mask", "is_causal")
        seen[layer] = positional[0], {name: named[name] for name in kept if name in named}

    hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers.values()]
    modes = {part: part.training for part in model.modules()}
    model.eval()
    try:
        model(*given, **options)
        return tuple(
            _sight(name, layer, *seen[layer]) for name, layer in layers.items() if layer in seen
        )
    finally:
        for hook in hooks:
            hook.remove()
        for part, training in modes.items():
            part.training = training


def _sight(name: str, layer: MultiHeadAttention, x: Tensor, masks: dict[str, Any]) -> Sight:
    rules = layer.reach.decided
    apart = copy.deepcopy(layer)
    apart.reach = Hierarchical(
        rules._replace(threshold=0.0, capacity=rules.block, scales=1, sinks=0)
    )
    dtype = torch.float64 if layer.score.schema != "point" else wide(x).dtype  # of divergences
    thresholds = torch.as_tensor(rules.threshold, dtype=dtype).flatten()
    thresholds = thresholds.expand(layer.heads.num_kv_heads)
    return Sight(
        name,
        hierarchy(layer, x, **masks),
        hierarchy(apart, x, **masks),
        tuple(thresholds.tolist()),
        rules.block,
        rules.capacity,
    )


def write_condensed(
    path: str | Path,
    sights: Sequence[Sight],
    tokens: Sequence[str],
    *,
    row: int = 0,
    title: str = "What condensed, and why",
) -> Path:
    """Write the page of one sequence: every layer and head, drawn and as tables.

    Args:
        path: of the file.
        sights: layers, as `look` returns them.
        tokens: the text of each token of the sequence.
        row: of the batch.
        title: of the page.

    Raises:
        ValueError: for a row without groups, and for fewer tokens than groups span.
        ModuleNotFoundError: naming the extra, without jinja2.
    """
    jinja2 = _jinja2()
    page = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).from_string(_packaged("condensed.html"))
    layers = [
        (sight, [_told(sight, head, row, tokens) for head in range(len(sight.thresholds))])
        for sight in sights
    ]
    dark = f"@media (prefers-color-scheme:dark){{{style(DARK)}{brackets.style(DARK)}}}"
    path = Path(path)
    path.write_text(
        page.render(
            title=legible(title),
            sentence=legible("".join(tokens)),
            length=len(tokens),
            layers=layers,
            css=_packaged("page.css") + style(LIGHT) + brackets.style(LIGHT) + dark,
        ),
        encoding="utf-8",
    )
    return path


def picture(
    path: str | Path, sight: Sight, tokens: Sequence[str], *, head: int, caption: str, row: int = 0
) -> Path:
    """One head of one layer as an SVG file of its own; `caption` says where it comes from.

    Raises ValueError as `write_condensed`.
    """
    given = _checked(sight, head, row, tokens)
    title = f"{sight.layer}, head {head}"
    body, height = brackets.brackets(given, tokens, title)
    width, tall = brackets.WIDE + 32, height + 28
    path = Path(path)
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{tall:.0f}" '
        f'viewBox="0 0 {width:.0f} {tall:.0f}" role="img" aria-label="{escape(caption)}">'
        f"<title>{escape(caption)}</title><style>{style(LIGHT)}{brackets.style(LIGHT)}"
        f".source{{font:11px {FONT};fill:{LIGHT['muted']}}}</style>"
        f'<rect x=".5" y=".5" width="{width - 1:.0f}" height="{tall - 1:.0f}" rx="12" '
        f'fill="{LIGHT["paper"]}" stroke="{LIGHT["grid"]}"/>'
        f'<g class="chart" transform="translate(16 14)">{body}</g>'
        f'<text class="source" x="18" y="{tall - 12:.0f}">{escape(caption)}</text></svg>\n',
        encoding="utf-8",
    )
    return path


def _checked(sight: Sight, head: int, row: int, tokens: Sequence[str]) -> Head:
    given = sight.head(head, row)
    if len(given.gaps) > len(tokens):
        raise ValueError(f"groups span {len(given.gaps)} tokens, got {len(tokens)}")
    return given


def _told(sight: Sight, number_: int, row: int, tokens: Sequence[str]) -> dict[str, Any]:
    """What the page says of one head; a key that ends in ``svg`` is a drawing, the rest escaped."""
    head = _checked(sight, number_, row, tokens)
    body, height = brackets.brackets(head, tokens, f"{sight.layer}, head {number_}")
    scales = sorted({group.scale for group in head.groups})
    told = zip(head.groups, reasons(head), strict=True)
    counts = [sum(group.scale == scale for group in head.groups) for scale in scales]
    return {
        "name": f"head {number_}",
        "counts": ", ".join(
            f"{count} groups at scale {scale}" for scale, count in zip(scales, counts, strict=True)
        ),
        "spanned": len(head.gaps),
        "drawing_svg": (
            f'<svg class="chart" xmlns="http://www.w3.org/2000/svg" role="group" '
            f'aria-label="{escape(sight.layer)}, head {number_}: groups of tokens" '
            f'viewBox="0 0 {brackets.WIDE:.0f} {height:.0f}">{body}</svg>'
        ),
        "tokens": _tokens(head, tokens),
        "groups": [_group(head, group, tokens, why) for group, why in told if group.scale > 0],
        "threshold": number(head.threshold),
    }


def _tokens(head: Head, tokens: Sequence[str]) -> list[tuple[str, ...]]:
    """By token: place, text, nats from the one before, what that led to, its group and share."""
    rows, became = [], fates(head)
    for group in (group for group in head.groups if group.scale == 0):
        own = there(head, group)
        of = spelled(head, group, tokens), share(len(own))
        for at in own:
            gap = number(head.gaps[at]) if math.isfinite(head.gaps[at]) else ""
            rows.append((str(at), visible(tokens[at]), gap, brackets.NAMES[became[at]], *of))
    return rows


def _group(head: Head, group: Group, tokens: Sequence[str], why: str) -> tuple[str, ...]:
    size = len(there(head, group))
    return (str(group.scale), spelled(head, group, tokens), str(size), share(size), why)


def share(size: int) -> str:
    """What each token of a group has of its meta-token.

    >>> share(1), share(4)
    ('1', '1/4')
    """
    return "1" if size == 1 else f"1/{size}"
