import math

import pytest

pytest.importorskip("matplotlib")

from sixfold.attention.hierarchy import Group
from sixfold.report.hierarchy import plot_hierarchy

WORDS = ["the", "cat", "sat", "on"]
FOUND = (
    Group(0, 0, 0, 3, 0.2, math.inf),
    Group(0, 0, 3, 4, 0.0, 1.25),
    Group(1, 0, 0, 4, 0.7, math.inf),
    Group(0, 1, 0, 4, 0.1, math.inf),
    Group(0, 1, 0, 2, 0.1, math.inf, row=1),
)


def test_every_group_is_a_bar_over_its_tokens_at_its_scale(tmp_path):
    figure = plot_hierarchy(FOUND, WORDS, title="Groups")
    (axes,) = figure.axes
    bars = [patch.get_bbox() for patch in axes.patches]
    assert [(round(b.x0), round(b.x1), math.floor(b.y0)) for b in bars] == [
        (0, 3, 0), (3, 4, 0), (0, 4, 1),
    ]  # fmt: skip
    assert [label.get_text() for label in axes.get_xticklabels()] == WORDS
    assert [label.get_text() for label in axes.get_yticklabels()] == ["scale 0", "scale 1"]
    assert axes.get_title(loc="left") == "Groups, head 0"
    figure.savefig(tmp_path / "hierarchy.png")


def test_a_divergence_that_began_a_group_stands_at_its_edge():
    (axes,) = plot_hierarchy(FOUND, WORDS).axes
    (text,) = axes.texts
    assert text.get_text() == "1.2"
    assert math.floor(text.get_position()[0]) == 3


def test_a_head_and_a_row_are_shown_alone():
    assert len(plot_hierarchy(FOUND, WORDS, head=1).axes[0].patches) == 1
    (bar,) = plot_hierarchy(FOUND, WORDS, head=1, row=1).axes[0].patches
    assert round(bar.get_bbox().x1) == 2
    with pytest.raises(ValueError, match="head 2 of row 0 has no groups"):
        plot_hierarchy(FOUND, WORDS, head=2)


def test_tokens_that_are_too_few_are_refused():
    with pytest.raises(ValueError, match="groups span 4 tokens, got 3"):
        plot_hierarchy(FOUND, WORDS[:3])
