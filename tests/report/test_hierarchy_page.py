import copy
import math
import re
from html.parser import HTMLParser
from itertools import pairwise
from xml.etree import ElementTree

import pytest
import torch
from torch.distributions import MultivariateNormal, kl_divergence

pytest.importorskip("jinja2")

from sixfold.attention.cache import KeyValueCache
from sixfold.attention.hierarchy import Group
from sixfold.contracts import Visibility
from sixfold.models.language import LanguageModel
from sixfold.report import brackets
from sixfold.report.brackets import (
    BEGINS,
    CELL,
    FULL,
    JOINS,
    SINK,
    Head,
    fates,
    lines,
    reasons,
    visible,
)
from sixfold.report.condensed import look, picture, write_condensed
from sixfold.report.scale import number

TEXT = "If <b> & </b> meet,\nwho is the elder of the two?\tSpeak, and we shall hear: a or b!"
VOID = {"meta"}


class Page(HTMLParser):
    """Elements with attributes and text; complains about tags that do not match."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), []))
        if tag not in VOID:
            self.open.append(self.elements[-1])

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), []))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for element in self.open:
            element[2].append(data)

    def all(self, tag, **wanted):
        return [
            (attrs, "".join(parts))
            for name, attrs, parts in self.elements
            if name == tag and wanted.items() <= attrs.items()
        ]


def made(threshold=5.0, capacity=3, heads=2, score="kl", **options):
    torch.manual_seed(0)
    reach = {"name": "hierarchical", "block": 8, "capacity": capacity, "threshold": threshold}
    projection = "gaussian" if score == "kl" else "linear"
    attention = {"num_heads": heads, "projection": projection, "score": score, "reach": reach}
    return LanguageModel(
        128, 96, 4 * heads, 2, attention=attention | options, positions="learned"
    ).eval()


def read(text=TEXT):
    return torch.tensor([[ord(character) for character in text]])


def test_bars_are_divergences_of_neighbours():
    model = made()
    sight = look(model, read())[0]
    layer = model.blocks[0].attention
    x = model.embedding(read()) + model.position(torch.arange(len(TEXT)))
    x = model.blocks[0].attention_norm(x)
    key = layer.projection(x, x, Visibility(None, is_causal=True), None).key
    for head in range(2):
        beliefs = [
            MultivariateNormal(key.mean[0, head, at], scale_tril=key.factor[0, head, at])
            for at in range(len(TEXT))
        ]
        gaps = sight.head(head).gaps
        assert len(gaps) == len(TEXT) // 8 * 8
        for at, (p, q) in enumerate(pairwise(beliefs[: len(gaps)]), 1):
            expected = (kl_divergence(p, q) + kl_divergence(q, p)).item()
            assert gaps[at] == (math.inf if at % 8 == 0 else pytest.approx(expected, rel=1e-4))


@pytest.mark.parametrize("threshold", [0.0, 3.0, math.inf])
def test_what_became_of_a_neighbour_follows_from_its_bar(threshold):
    head = look(made(threshold), read())[0].head(1)
    starts = {group.start for group in head.groups if group.scale == 0}
    for cell in range(0, len(head.gaps), 8):
        became = fates(head)[cell : cell + 8]
        assert became[0] == CELL
        for at, what in enumerate(became[1:], cell + 1):
            assert (what == JOINS) == (head.gaps[at] < threshold)
            assert (what == BEGINS) == (at in starts)
        begun = [head.gaps[cell + i] for i, what in enumerate(became) if what == BEGINS]
        full = [head.gaps[cell + i] for i, what in enumerate(became) if what == FULL]
        if full:
            assert len(begun) == head.capacity - 1
            assert max(full) <= min(begun)


def test_why_a_group_is_one():
    groups = [
        Group(0, 0, 0, 2, 0.25, math.inf), Group(0, 0, 2, 3, 0.0, 4.5),
        Group(0, 0, 3, 8, 2.0, 3.0), Group(1, 0, 0, 2, 0.0, math.inf),
        Group(1, 0, 2, 8, 4.5, math.inf, place=1), Group(1, 0, 8, 9, 0.0, math.inf, place=2),
    ]  # fmt: skip
    gaps = [math.inf, 0.25, 4.5, 3.0, 0.1, 2.0, 0.1, 0.1, math.inf]
    head = Head(groups, gaps, 1.0, 3)
    told = reasons(head)
    assert told[0] == "begins its cell; neighbours inside at most 0.25 nats apart: consensus"
    assert told[1] == "began 4.5 nats from what is before, not below the threshold of 1; alone"
    assert "2 nats apart: joined for want of room, a cell has 3 groups" in told[2]
    assert told[3] == "begins its cell; joined nothing more at this scale"
    assert told[4].startswith("is a sink, or stands beside one; neighbours inside at most 4.5")
    assert told[5] == "is a sink, or stands beside one; alone"  # where a finer cell begins


def test_consensus_is_strict():
    """At exactly the threshold neighbours stay apart, unless there is no room."""
    groups = [Group(0, 0, 0, 2, 1.0, math.inf)]
    head = Head(groups, [math.inf, 1.0], 1.0, 1)
    assert fates(head)[1] == FULL
    assert "joined for want of room" in reasons(head)[0]
    apart = [Group(0, 0, 0, 1, 0.0, math.inf), Group(0, 0, 1, 2, 0.0, 1.0, place=1)]
    assert fates(Head(apart, [math.inf, 1.0], 1.0, 2))[1] == BEGINS


def test_thresholds_are_rounded_as_divergences_are():
    assert look(made(threshold=0.1), read())[0].thresholds == (0.1, 0.1)
    single = torch.tensor(0.1).item()
    assert look(made(threshold=0.1, score="dot"), read())[0].thresholds == (single, single)


def test_what_no_file_can_hold_is_shown_by_a_sign(tmp_path):
    sight = look(made(), read())[0]
    tokens = [*list(TEXT), ""]
    tokens[:6] = ["\0", "\x1b[", "\x7f", "\ud800", "\ufffe", "\r\n"]
    root = ElementTree.parse(picture(tmp_path / "one.svg", sight, tokens, head=0, caption="signs"))
    shown = [e.text for e in root.iter() if e.get("class") == "token"]
    assert shown[:6] == ["␀", "␛[", "␡", "�", "�", "␍⏎"]
    page = Page(write_condensed(tmp_path / "page.html", [sight], tokens).read_bytes().decode())
    assert page.all("blockquote")[0][1].startswith("␀␛[␡��\r\n & </b>")


def beside_a_sink(threshold):
    reach = {"name": "hierarchical", "block": 4, "capacity": 3, "threshold": threshold, "sinks": 1}
    torch.manual_seed(0)
    model = LanguageModel(9, 16, 8, 1, attention={"num_heads": 1, "reach": reach})
    return look(model, torch.arange(12)[None] % 9)[0]


def test_a_sink_is_one_however_far_it_is():
    head = beside_a_sink(1e-3).head(0)
    assert head.gaps[1] > head.threshold
    assert fates(head)[:3] == [CELL, SINK, BEGINS]


def test_sinks_are_told_apart_from_the_beginning_of_a_cell(tmp_path):
    sight = beside_a_sink(1e9)
    head = sight.head(0)
    said = [why for why, group in zip(reasons(head), head.groups, strict=True) if not group.scale]
    assert said[:2] == ["begins its cell; alone", said[1]]
    assert said[1].startswith("is a sink, or stands beside one; neighbours inside at most")
    assert said[2].startswith("begins its cell; neighbours inside")
    assert fates(head)[:5] == [CELL, SINK, JOINS, JOINS, CELL]
    assert len(set(brackets.LOOK.values())) == len(brackets.LOOK)
    path = picture(tmp_path / "one.svg", sight, list("abcdefghijkl"), head=0, caption="sinks")
    legend = {e.text for e in ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}tspan")}
    shown = {what for what, name in brackets.NAMES.items() if name in legend}
    assert shown == {CELL, SINK, JOINS}


def test_the_page_tells_every_token_and_group(tmp_path):
    sights = look(made(), read())
    path = write_condensed(tmp_path / "page.html", sights, list(TEXT), title="Groups & <why>")
    page = Page(path.read_text("utf-8"))
    assert page.all("h1")[0][1] == "Groups & <why>"
    assert page.all("blockquote")[0][1] == TEXT
    assert [text.split()[0] for _, text in page.all("h2")] == [
        "blocks.0.attention", "blocks.1.attention"
    ]  # fmt: skip
    drawn = page.all("g", tabindex="0", role="img")
    assert len(drawn) == sum(len(sight.groups) for sight in sights)
    body = [text.split("\n") for _, text in page.all("tr")]
    told = 0
    for sight in sights:
        for head in map(sight.head, range(2)):
            told += len(head.gaps) + sum(group.scale > 0 for group in head.groups)
            for why in reasons(head):
                assert any(why in attrs["aria-label"] for attrs, _ in drawn)
    assert len(body) - len(page.all("thead")) == told
    cells = [text for _, text in page.all("td", **{"class": "n"})]
    for gap in sights[1].head(1).gaps:
        assert math.isinf(gap) or number(gap) in cells
    assert not {"inf", "∞"} & set(cells)


def test_shares_of_a_group_sum_to_one(tmp_path):
    sights = look(made(heads=1), read())[:1]
    text = write_condensed(tmp_path / "page.html", sights, list(TEXT)).read_text("utf-8")
    first = text[text.index("<tbody>") : text.index("</tbody>")]
    shares = re.findall(r'<td class="n">1(?:/(\d+))?</td></tr>', first)
    total = sum(1 / int(size or 1) for size in shares)
    count = sum(group.scale == 0 for group in sights[0].groups)
    assert total == pytest.approx(count)


def test_the_page_needs_nothing_else_and_serves_every_reader(tmp_path):
    path = write_condensed(tmp_path / "page.html", look(made(), read()), list(TEXT))
    text = path.read_text("utf-8")
    page = Page(text)
    assert set(re.findall(r"https?://[^\"' )]+", text)) == {"http://www.w3.org/2000/svg"}
    assert not {"script", "link", "img", "iframe"} & {tag for tag, *_ in page.elements}
    assert "prefers-color-scheme:dark" in text
    assert "@import" not in text
    assert all("aria-label" in attrs for attrs, _ in page.all("svg", role="group"))
    assert len([attrs for attrs, _ in page.all("details") if "open" in attrs]) == 1
    assert all(attrs["tabindex"] == "0" for attrs, _ in page.all("div", role="region"))


def test_a_picture_is_a_drawing_of_its_own(tmp_path):
    sight = look(made(), read())[0]
    path = picture(tmp_path / "one.svg", sight, list(TEXT), head=1, caption="seen & <told>")
    root = ElementTree.fromstring(path.read_text("utf-8"))
    name = "{http://www.w3.org/2000/svg}"
    texts = [element.text for element in root.iter(f"{name}text")]
    shown = [e.text for e in root.iter(f"{name}text") if e.get("class") == "token"]
    assert shown == [visible(token) for token in TEXT[: len(TEXT) // 8 * 8]]
    assert texts[-1] == root.find(f"{name}title").text == "seen & <told>"
    bars = [e for e in root.iter(f"{name}rect") if "bar" in e.get("class", "")]
    gaps = [gap for gap in sight.head(1).gaps if math.isfinite(gap)]
    heights = [float(bar.get("height")) for bar in bars]
    highest = max(heights) / max(gaps)
    assert max(heights) > 40
    assert heights == pytest.approx([gap * highest for gap in gaps], abs=0.15)


def test_tokens_go_on_in_another_line_where_there_is_no_room():
    tokens = ["word"] * 100
    rows = list(lines(tokens, 90.0))
    assert [row.start for row in rows[1:]] == [row.stop for row in rows[:-1]]
    assert rows[-1].stop == 100
    assert all(row.edges[-1] <= brackets.WIDE for row in rows)
    cut = Group(0, 0, rows[0].stop - 1, rows[0].stop + 1, 0.0, 1.0)
    assert rows[0].span(cut) == (rows[0].edges[-2], rows[0].edges[-1])
    assert rows[1].span(cut) == (rows[1].edges[0], rows[1].edges[1])
    assert rows[2].span(cut) is None


def test_looking_leaves_the_model_as_it_was():
    model = made(threshold=5.0).train()
    model.blocks[1].eval()
    before = copy.deepcopy(model.state_dict())
    modes = [part.training for part in model.modules()]
    sights = look(model, read())
    assert len(sights) == 2
    assert [part.training for part in model.modules()] == modes
    assert not any(block.attention._forward_pre_hooks for block in model.blocks)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.blocks[0].attention.reach.given.threshold == 5.0


def test_thresholds_are_those_of_each_head():
    model = made()
    reach = {"name": "hierarchical", "block": 8, "threshold": 2.0, "temperature": 1.0}
    learned = made(score="dot", reach=reach | {"learned": True})
    with torch.no_grad():
        learned.blocks[0].attention.reach.log_threshold[1] = math.log(7.0)
    assert look(learned, read())[0].thresholds == pytest.approx((2.0, 7.0))
    assert look(model, read())[0].thresholds == (5.0, 5.0)


def test_padding_is_of_no_group(tmp_path):
    mask = torch.ones(1, len(TEXT), dtype=torch.bool)
    mask[:, :11] = False
    head = look(made(), read(), key_mask=mask)[0].head(0)
    assert [math.isnan(gap) for gap in head.gaps[:12]] == [True] * 11 + [False]
    assert head.gaps[11] == math.inf
    sights = look(made(), read(), key_mask=mask)
    assert write_condensed(tmp_path / "page.html", sights, list(TEXT)).exists()


def test_a_token_that_is_hidden_is_of_no_group_around_it(tmp_path):
    mask = torch.ones(1, len(TEXT), dtype=torch.bool)
    mask[:, 5] = False
    sight = look(made(threshold=1e9), read(), key_mask=mask)[0]
    path = picture(tmp_path / "one.svg", sight, list(TEXT), head=0, caption="5 is hidden")
    root = ElementTree.parse(path)
    first = next(e for e in root.iter() if e.get("class", "").startswith("group"))
    assert [e.text for e in first if e.get("class") == "paper"] == ["7"]
    assert "“If␣<b␣&”" in first.get("aria-label")


def test_what_overflows_leaves_the_other_bars_their_height(tmp_path):
    sight = look(made(), read())[0]
    alone = list(sight.alone)
    alone[3] = alone[3]._replace(began=3.4e38)
    path = picture(
        tmp_path / "one.svg", sight._replace(alone=tuple(alone)), list(TEXT), head=0, caption=""
    )
    bars = [e for e in ElementTree.parse(path).iter() if "bar" in e.get("class", "")]
    heights = sorted(float(bar.get("height")) for bar in bars)
    assert heights[-1] == pytest.approx(44)
    assert heights[-2] > 40


def test_what_cannot_be_shown_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no layer of reach 'hierarchical'"):
        look(LanguageModel(128, 96, 8, 1), read())
    model = made()
    with pytest.raises(ValueError, match="without a cache"):
        look(model, read(), caches=[KeyValueCache() for _ in model.blocks])
    assert not model.blocks[0].attention._forward_pre_hooks
    sights = look(model, read())
    with pytest.raises(ValueError, match="groups span 80 tokens, got 3"):
        write_condensed(tmp_path / "page.html", sights, ["a", "b", "c"])
    with pytest.raises(ValueError, match="head 2 of row 0 has no groups in blocks.0"):
        sights[0].head(2)
