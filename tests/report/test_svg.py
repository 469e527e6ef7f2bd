import math
import re
import xml.etree.ElementTree as ElementTree

import pytest

from sixfold.geometry.hexgrid import HexGrid, cartesian
from sixfold.report.hexmap import (
    MapStyle,
    Moment,
    colour_scale,
    head_name,
    hex_maps,
    hex_row,
    places,
    viridis,
)
from sixfold.report.svg import DARK, LIGHT, LOOKS, Axes, Line, Mark, line_chart, style

SVG = "{http://www.w3.org/2000/svg}"


def by_class(drawing: str, name: str) -> list[ElementTree.Element]:
    root = ElementTree.fromstring(drawing)
    return [e for e in root.iter() if name in e.get("class", "").split()]


def tooltip(element: ElementTree.Element) -> str:
    return element.find(f"{SVG}title").text


def pairs(data: str) -> list[list[tuple[float, float]]]:
    """The strokes of a path, as lists of places."""
    numbers = [re.findall(r"-?[\d.]+", part.replace("h0", "")) for part in data.split("M")[1:]]
    return [list(zip(map(float, n[::2]), map(float, n[1::2]), strict=True)) for n in numbers]


def test_a_line_is_drawn_to_scale_between_its_ticks():
    points = [(float(x), 5.0 * x) for x in range(101)]
    drawing = line_chart([Line("double", points, "s0")], [], Axes("Doubles", "m"))
    (path,) = by_class(drawing, "line")
    (stroke,) = pairs(path.get("d"))
    assert len(stroke) == 101
    texts = {t.text: t for t in ElementTree.fromstring(drawing).iter(f"{SVG}text")}
    # the label of 300 stands 4 below the height of the value 300, which is at step 60
    assert float(texts["300"].get("y")) - 4 == pytest.approx(stroke[60][1], abs=0.11)
    ratio = (stroke[50][0] - stroke[0][0]) / (stroke[100][0] - stroke[0][0])
    assert ratio == pytest.approx(0.5, abs=1e-3)
    assert tooltip(path) == "double: 500 at step 100"
    assert "Doubles" in drawing
    assert ">m<" in drawing


def test_equal_ratios_are_equal_distances_on_a_logarithmic_axis():
    points = [(0.0, 1.0), (1.0, 10.0), (2.0, 100.0)]
    (path,) = by_class(line_chart([Line("", points, "s0")], [], Axes("t", "", scale="log")), "line")
    heights = [y for _, y in pairs(path.get("d"))[0]]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.11)


def test_logarithms_of_nothing_are_refused():
    with pytest.raises(ValueError, match="no place for 0"):
        line_chart([Line("", [(0, 0.0), (1, 1.0)], "s0")], [], Axes("t", "", scale="log"))


def test_gaps_are_kept_and_lone_points_are_seen():
    points = [(float(x), math.nan if x in (4, 6) else 1.0 + x) for x in range(12)]
    (path,) = by_class(line_chart([Line("", points, "s0")], [], Axes("t", "")), "line")
    assert [len(stroke) for stroke in pairs(path.get("d"))] == [4, 1, 5]
    assert path.get("d").count("h0") == 1


def test_marks_stand_at_their_steps():
    line = Line("loss", [(0.0, 1.0), (1000.0, 0.0)], "s0")
    marks = [
        Mark(250, "critical", "too high"),
        Mark(500, "held", "clipped", "change"),
        Mark(600, "change", "tried", "change"),
        Mark(750, "broken", "NaN", "s0", "NaN from 750"),
    ]
    drawing = line_chart([line], marks, Axes("t", ""))
    (path,) = by_class(drawing, "line")
    (start, end) = pairs(path.get("d"))[0]

    def at(step: float) -> float:
        return start[0] + step / 1000 * (end[0] - start[0])

    found = {tooltip(e): e for e in ElementTree.fromstring(drawing).iter(f"{SVG}path")
             if e.find(f"{SVG}title") is not None and e is not path}  # fmt: skip
    place = {text: float(re.match(r"M([\d.]+)", e.get("d"))[1]) for text, e in found.items()}
    assert place["too high"] == pytest.approx(at(250), abs=0.11)
    assert place["clipped"] == pytest.approx(at(500), abs=0.11)
    assert place["NaN"] + 4 == pytest.approx(at(750), abs=0.11)
    assert "held" in found["clipped"].get("class").split()
    assert "held" not in found["tried"].get("class").split()
    assert "NaN from 750" in drawing


def test_many_alarms_in_one_place_are_one_line_of_the_worst():
    line = Line("", [(0.0, 1.0), (1e6, 0.0)], "s0")
    marks = [Mark(5e5 + i, "notice", f"n{i}") for i in range(500)] + [
        Mark(5e5, "critical", "worst")
    ]
    drawing = line_chart([line], marks, Axes("t", ""))
    assert [tooltip(e) for e in by_class(drawing, "alarm")] == ["worst"]


def test_text_is_escaped():
    evil = '<script>alert("x")</script>'
    line = Line(evil, [(0.0, 1.0), (1.0, 2.0)], "s0")
    drawing = line_chart([line, line], [Mark(0, "notice", evil)], Axes(evil, evil))
    assert "<script" not in drawing
    assert ElementTree.fromstring(drawing).get("aria-label") == f"{evil}, {evil}"


def test_an_empty_chart_says_so():
    assert "nothing measured" in line_chart([], [], Axes("t", ""))
    assert "nothing measured" in line_chart([Line("", [(0, math.nan)], "s0")], [], Axes("t", ""))


def test_a_long_legend_takes_as_many_rows_as_it_needs():
    lines = [Line(f"a rather long name {i}", [(0.0, 0.0), (1.0, 1.0)], f"s{i}") for i in range(6)]
    drawing = line_chart(lines, [], Axes("t", "", 400))
    rows = [t for t in ElementTree.fromstring(drawing).iter(f"{SVG}text")
            if "rather long" in "".join(t.itertext())]  # fmt: skip
    assert ["".join(t.itertext()).count("rather") for t in rows] == [2, 2, 2]
    heights = [float(t.get("y")) for t in rows]
    highest = min(y for path in by_class(drawing, "line") for _, y in pairs(path.get("d"))[0])
    assert sorted(heights) == heights
    assert heights[-1] < highest


def test_limits_are_dashed_and_their_labels_do_not_meet():
    line = Line("x", [(0.0, 0.0), (1.0, 1000.0)], "s0")
    drawing = line_chart([line], [], Axes("t", "", limits=(500.0, 505.0, 100.0)))
    assert len(by_class(drawing, "limit")) == 3
    assert [n for n in ("100", "500", "505") if f"limit {n}<" in drawing] == ["100", "505"]


def contrast(a: str, b: str) -> float:
    """The ratio of WCAG 2.2."""

    def light(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    high, low = sorted((light(a), light(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
def test_colours_can_be_read(colours):
    assert contrast(colours["ink"], colours["paper"]) > 7
    assert contrast(colours["muted"], colours["paper"]) > 4.5
    for look in (*LOOKS, "critical", "warning", "change"):
        assert contrast(colours[look], colours["paper"]) > 3, look
    assert all(colour in style(colours) for colour in colours.values())


# ---------------------------------------------------------------- maps


def look(radius: int | None, values: list[float]) -> MapStyle:
    return MapStyle("Signal", "nats", colour_scale(values), radius)


def cells(drawing: str) -> dict[str, ElementTree.Element]:
    root = ElementTree.fromstring(drawing)
    found = [
        e for e in root.iter(f"{SVG}path") if {"cell", "hole"} & set(e.get("class", "").split())
    ]
    return {tooltip(e): e for e in found}


def test_cells_lie_where_the_grid_says():
    values = [float(v) for v in range(7)]
    found = list(cells(hex_maps([Moment(5, [values])], look(1, values))).values())
    tops = [tuple(map(float, re.match(r"M([\d.]+) ([\d.]+)", e.get("d")).groups())) for e in found]
    size = (tops[4][1] - tops[3][1]) / 1.5
    centre = tops[3]
    for (x, y), cell in zip(tops, HexGrid(1).coordinates, strict=True):
        dx, dy = cartesian(*cell)
        assert x - centre[0] == pytest.approx(size * dx, abs=0.3)
        assert y - centre[1] == pytest.approx(size * dy, abs=0.3)


def test_cells_carry_their_value_and_colour():
    values = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    found = cells(hex_maps([Moment(1234, [values])], look(1, values)))
    assert found["layer 0 head 0 H(-1,0): 1 nats at step 1,234"].get("fill") == viridis(0)
    assert found["layer 0 head 3 H(0,0): 4 nats at step 1,234"].get("fill") == viridis(0.5)
    assert found["layer 0 head 6 H(1,0): 7 nats at step 1,234"].get("fill") == viridis(1)


def test_what_was_not_measured_is_hollow():
    values = [1.0, math.nan, 3.0]
    found = cells(hex_row(Moment(0, [values]), look(None, values)))
    assert len(found) == 3
    hollow = found["layer 0 head 1: no finite value at step 0"]
    assert hollow.get("fill") is None
    assert hollow.get("class") == "hole"


def test_alarmed_cells_are_outlined_and_changed_ones_dotted():
    values = [float(v) for v in range(7)]
    moment = Moment(0, [values], frozenset({(0, 2)}), frozenset({(0, 5)}))
    drawing = hex_maps([moment], look(1, values))
    (rung,) = by_class(drawing, "rung")
    assert tooltip(rung).startswith("layer 0 head 2 ")
    assert len(by_class(drawing, "touched")) == 1


def test_without_a_grid_or_with_another_number_of_heads_cells_are_a_row():
    assert {y for _, y in places(None, 8)} == {0.0}
    assert {y for _, y in places(1, 6)} == {0.0}
    assert places(2, 19) == [cartesian(*cell) for cell in HexGrid(2).coordinates]
    assert head_name(0, 5, 1, 6) == "layer 0 head 5"


def test_colour_scales():
    assert colour_scale([1.0, 100.0]).kind == "log"
    assert colour_scale([1.0, 7.0]).kind == "linear"
    assert colour_scale([-3.0, 4.0, 900.0]).kind == "symlog"
    assert colour_scale([1.0, 100.0], (0.0, 1.0))[:2] == (0.0, 1.0)
    flat = colour_scale([3.0, 3.0])
    assert flat.low < 3 < flat.high
    assert colour_scale([math.nan])[:2] == (0.0, 1.0)
