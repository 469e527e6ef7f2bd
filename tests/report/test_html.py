import json
import math
import re
import sys
from html.parser import HTMLParser

import pytest

from sixfold.report.compare import picture
from sixfold.report.html import write_report
from sixfold.report.read import read_run
from sixfold.report.scale import number

VOID = {"meta", "input", "link", "br", "img", "hr"}


class Page(HTMLParser):
    """Elements with their attributes and direct text; complains about tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict, list[str]]] = []
        self.open: list[tuple[str, dict, list[str]]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        element = (tag, dict(attrs), [])
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), []))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for element in self.open:
            element[2].append(data)

    def texts(self, tag: str) -> list[str]:
        return ["".join(parts).strip() for name, _, parts in self.elements if name == tag]


def report(folder, compare=()) -> Page:
    return Page(write_report(folder, compare).read_text("utf-8"))


def test_headline_numbers_are_those_of_the_files(make_run):
    folder = make_run(steps=1200)
    page = report(folder)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][1:]
    losses = [row["loss"] for row in rows if row["split"] == "validation"]
    train = [row["loss"] for row in rows if row["split"] == "train"]
    shown = page.texts("dd")
    assert page.texts("dt") == [
        "final validation loss", "training loss", "alarms", "changes", "steps", "wall time",
        "parameters",
    ]  # fmt: skip
    for text in (number(losses[-1]), number(train[-1]), "1,200", "12 min 34 s", "1,234,567"):
        assert text in shown
    assert any(f"best {number(min(losses))}" in text for text in shown)
    assert "1 notice, 1 warning, 1 critical" in shown
    assert "1 of 2 judged expectations held, 1 undone" in shown


def test_every_validation_loss_is_a_point(make_run):
    folder = make_run(steps=1200)
    page = report(folder)
    run = read_run(folder)
    titles = page.texts("title")
    for row in run.metrics.rows:
        if row["split"] == "validation":
            assert f"validation {number(row['loss'])} at step {row['step']:,}" in titles


def test_every_cell_shows_its_heads_value(make_run):
    folder = make_run(steps=400)
    titles = report(folder).texts("title")
    last = read_run(folder).telemetry[-1]
    for signal, unit in (("max_logit", "nats"), ("entropy", "of log n")):
        value = last.signals[signal][2][3]
        assert f"layer 2 head 3 H(0,0): {number(value)} {unit} at step 400" in titles
    # layers x heads x moments x two signals, and the slider's own maps
    cells = [title for title in titles if re.search(r"H\(.*(nats|of log n) at step", title)]
    assert len(cells) == 4 * 7 * 6 * 2 + 4 * 7 * 2


def test_marks_say_what_the_journal_says(make_run):
    titles = report(make_run(steps=1000)).texts("title")
    assert any(
        t.startswith("step 500 critical alarm: max_logit of layer 2 head 3 is 131") for t in titles
    )
    (clip,) = {t for t in titles if t.startswith("step 550 change qk_clip")}
    assert "expects: max_logit falls past 60 within 30 steps" in clip
    assert clip.endswith("held: 41 at step 570")


def test_the_journal_is_a_table(make_run):
    folder = make_run(steps=1000)
    page = report(folder)
    cells = page.texts("td")
    for entry in read_run(folder).journal:
        assert any(entry["text"] in cell for cell in cells)
    assert "entropy rises past 0.8 within 40 steps; did not hold: 0.71 at step 750" in cells


def test_a_flood_of_alarms_hides_the_mildest_and_says_how_many(make_run):
    folder = make_run(steps=2000)
    alarm = {"kind": "alarm", "signal": "max_logit", "level": "notice", "layer": 0, "head": 0,
             "value": 1.0, "limit": 2.0, "text": "again"}  # fmt: skip
    with (folder / "journal.jsonl").open("a") as file:
        for step in range(2000):
            file.write(json.dumps({"step": step, **alarm}) + "\n")
    page = report(folder)
    assert "1,608 more of the mildest alarms" in "".join(page.texts("p"))
    assert "change 1" in page.texts("td")
    assert "alarm critical" in page.texts("td")


def test_the_slider_holds_the_measured_values(make_run):
    folder = make_run(steps=400)
    page = report(folder)
    (data,) = [parts for tag, attrs, parts in page.elements if attrs.get("id") == "frames"]
    frames = json.loads("".join(data))
    run = read_run(folder)
    assert frames["steps"] == [row.step for row in run.telemetry]
    flat = [v for heads in run.telemetry[5].signals["max_logit"] for v in heads]
    assert frames["signals"][0]["values"][5] == pytest.approx(flat, rel=1e-3)
    (slider,) = [attrs for tag, attrs, _ in page.elements if tag == "input"]
    assert int(slider["max"]) == len(frames["steps"]) - 1


def test_nothing_is_fetched(make_run):
    other = make_run("ungoverned", steps=400, governed=False, nan_from=300)
    page = report(make_run(steps=400), [other])
    for tag, attrs, parts in page.elements:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "image")
        assert not {"src", "href", "xlink:href", "srcset", "action"} & attrs.keys()
        assert "url(" not in attrs.get("style", "")
        if tag in ("style", "script"):
            assert not re.search(r"url\(|@import|https?:|fetch|import\(", "".join(parts))


def test_text_from_outside_stays_text(make_run):
    evil = "</pre></script><script>alert(1)</script><img src=x onerror=alert(2)>"
    folder = make_run(steps=400, sample=evil)
    (folder / "config.json").write_text(json.dumps({evil: {evil: evil}}))
    with (folder / "journal.jsonl").open("a") as file:
        file.write(json.dumps({"step": 390, "kind": "alarm", "level": evil, "signal": evil,
                               "layer": 0, "head": 0, "text": evil}) + "\n")  # fmt: skip
    page = report(folder)
    assert page.texts("pre") == [evil]
    assert [tag for tag, _, _ in page.elements].count("script") == 2
    assert not any(tag == "img" or "onerror" in attrs for tag, attrs, _ in page.elements)


def test_a_destroyed_run_is_shown_as_destroyed(make_run):
    page = report(make_run(steps=1000, nan_from=600))
    assert "NaN" in page.texts("dd")
    assert "step 600" in page.texts("dd")
    assert "loss is NaN from step 600" in page.texts("text")
    # the smoothed line ends before the break
    line = next(
        attrs["d"] for _, attrs, parts in page.elements
        if attrs.get("class") == "line s0" and "".join(parts).startswith("training: ")
    )  # fmt: skip
    xs = [float(x) for x in re.findall(r"[M ](\d+\.\d) \d", line)]
    start, end = xs[0], 1080 - 12
    assert max(xs) <= start + (600 - 20) / (1000 - 20) * (end - start) + 0.2


def test_gaps_in_the_telemetry_are_gaps_in_the_lines(make_run):
    folder = make_run(steps=1000)
    lines = (folder / "telemetry.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    for row in rows[21:31]:
        del row["signals"]["max_logit"]
    (folder / "telemetry.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = report(folder)
    (clipped,) = [
        attrs["d"] for _, attrs, parts in page.elements
        if attrs.get("class") == "line s0" and "".join(parts).startswith("head 3: ")
    ]  # fmt: skip
    assert clipped.count("M") == 2
    # condition numbers are measured on every fourth row: their rhythm is no gap
    (condition,) = [
        attrs["d"] for _, attrs, parts in page.elements
        if attrs.get("class") == "line s0" and "".join(parts).startswith("layer 0: 18.")
    ][:1]  # fmt: skip
    assert condition.count("M") == 1


def test_runs_side_by_side(make_run):
    other = make_run("ungoverned", steps=1000, governed=False, nan_from=600)
    page = report(make_run("governed", steps=1000), [other])
    assert "ungoverned is NaN from step 600" in page.texts("text")
    assert "Side by side" in page.texts("h2")
    names = page.texts("th")
    assert "governed" in names
    assert "ungoverned" in names
    assert "NaN" in page.texts("td")
    assert "never" in page.texts("td")
    assert "Side by side" not in report(other).texts("h2")


def test_runs_of_one_name_are_told_apart_by_folder(make_run):
    first, second = make_run("a", steps=200), make_run("b", steps=200)
    text = (second / "metrics.jsonl").read_text().replace('"run": "b"', '"run": "a"')
    (second / "metrics.jsonl").write_text(text)
    assert {"a (a)", "a (b)"} <= set(report(first, [second]).texts("th"))


def test_too_many_runs_are_refused(make_run):
    folder = make_run(steps=100)
    with pytest.raises(ValueError, match="at most 8 runs"):
        write_report(folder, [folder] * 8)


@pytest.mark.parametrize("options", [
    {"radius": None, "heads": 8}, {"layers": 1}, {"layers": 9, "heads": 19, "radius": 2},
    {"governed": False, "sample": None}, {"steps": 20}, {"nan_from": 0},
])  # fmt: skip
def test_every_kind_of_run_has_a_report(make_run, options):
    page = report(make_run(**{"steps": 400, **options}))
    assert "Loss and learning rate" in page.texts("h2")


def test_a_run_killed_before_its_first_row_has_a_report(make_run):
    folder = make_run(steps=100)
    for name in ("metrics", "telemetry", "journal"):
        path = folder / f"{name}.jsonl"
        path.write_text(path.read_text()[:20])
    page = report(folder)
    assert "not measured" in page.texts("dd")
    assert sum("cut off" in text for text in page.texts("p")) == 3


def test_a_long_run_is_a_small_file(make_run):
    folder = make_run(steps=100_000, every=50, layers=8)
    assert write_report(folder).stat().st_size < 2_000_000


def test_the_config_is_folded_and_flat(make_run):
    page = report(make_run(steps=100))
    assert "model.d_model" in page.texts("th")
    assert page.texts("summary") == ["Configuration", "Environment"]


def test_without_jinja2_the_error_names_the_extra(make_run, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'sixfold\[cli\]'"):
        write_report(make_run(steps=100))


def test_a_picture_stands_alone(make_run, tmp_path):
    import xml.etree.ElementTree as ElementTree

    good, bad = make_run("good", steps=1000), make_run("bad", steps=1000, nan_from=600)
    path = picture([("governed", good), ("ungoverned <twin>", bad)], tmp_path / "twins.svg")
    root = ElementTree.fromstring(path.read_text("utf-8"))
    texts = ["".join(e.itertext()) for e in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "ungoverned <twin> is NaN from step 600" in texts
    assert any(text.endswith("seed 0 · commit 0a1b2c3 · cpu: made up, 8 threads") for text in texts)
    final = [r["loss"] for r in read_run(good).metrics.rows if r["split"] == "validation"][-1]
    assert any(f"governed {number(final)}; ungoverned <twin> NaN" in text for text in texts)
    assert "var(" not in path.read_text("utf-8")
    assert not re.search(r"(href|src|url\()", path.read_text("utf-8"))
    assert root.find("{http://www.w3.org/2000/svg}rect").get("fill") == "#ffffff"
    assert not math.isnan(final)
    with pytest.raises(ValueError, match="at least one run"):
        picture([], tmp_path / "none.svg")
