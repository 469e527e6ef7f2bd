import json
import math
import re
import sys
from html.parser import HTMLParser

import pytest
import torch
from plain import batches, made, move

from sixfold import LeadMetaArchitect
from sixfold.report.actions import actions, told
from sixfold.report.compare import picture
from sixfold.report.headline import headline, where
from sixfold.report.html import write_report
from sixfold.report.read import read_run
from sixfold.report.scale import number
from sixfold.report.text import summary

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


# ---------------------------------------------------------------- somebody's own loop


def governed(folder, spoil, steps, by_hand=None):
    model, optimizer = made()
    governor = LeadMetaArchitect(model, optimizer, folder=folder)
    for number_, batch in enumerate(batches(steps), 1):
        move(model, optimizer, batch, governor, spoil=lambda m, o: spoil(number_, m))  # noqa: B023
        if by_hand is not None:
            by_hand(number_, governor)
    governor.detach()
    return folder


@pytest.fixture(scope="module")
def scaled(tmp_path_factory):
    """A head scaled by 60, and a reset by hand."""

    def spoil(step, model):
        if step == 60:
            with torch.no_grad():
                model.attention[1].qkv.weight[4:8] *= 60

    def by_hand(step, governor):
        if step == 40:
            governor.command_reset_head((1, 2))

    return governed(tmp_path_factory.mktemp("scaled"), spoil, 120, by_hand)


@pytest.fixture(scope="module")
def lost(tmp_path_factory):
    """Gradients that are not finite from some step on."""

    def spoil(step, model):
        if step >= 30:
            for parameter in model.parameters():
                parameter.grad.fill_(math.nan)

    return governed(tmp_path_factory.mktemp("lost"), spoil, 60)


def rows(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()][1:]


def test_the_loss_is_the_telemetrys_own(scaled):
    run = read_run(scaled)
    losses = [(row["step"], row["loss"]) for row in rows(scaled, "telemetry.jsonl")]
    assert run.curves["loss", "train"] == losses
    assert headline(run).final_train == losses[-1]
    assert headline(run).last_step == 120
    assert run.notes == ()


def test_before_is_the_signal_at_the_change_and_after_the_evidence(scaled):
    run = read_run(scaled)
    telemetry = {row["step"]: row["signals"] for row in rows(scaled, "telemetry.jsonl")}
    clips = [a for a in actions(run) if a.change["name"] == "qk_clip"]
    assert clips
    for clip in clips:
        change = clip.change
        layers = telemetry[change["step"]]["max_logit"]
        assert clip.before == layers[change["layer"]][change["head"]]
        assert clip.held == (clip.evidence["value"] < change["expects"]["bound"])
    said = told(clips[0], "nats")
    assert said.before == f"max_logit {number(clips[0].before)} nats"
    assert "held" in said.after


def test_the_page_lists_every_change_and_alarm(scaled):
    page = report(scaled)
    assert {"Changes, before and after", "Every head over time", "Redundancy and rank"} <= {
        *page.texts("h2")
    }
    cells = page.texts("td")
    for row in rows(scaled, "journal.jsonl"):
        text = row["text"].removeprefix(f"{row.get('level')}: ")
        assert any(text in cell for cell in cells)
    assert any("head_reset" in cell and cell.endswith("by hand") for cell in cells)
    run = read_run(scaled)
    for action in actions(run):
        said = told(action, run.signal_unit(action.signal))
        assert {said.before, said.expected, said.after} <= {*cells}
    assert "layer 1 · head 1" in cells
    assert not any("-1" in cell for cell in cells if cell.startswith("layer"))
    titles = page.texts("title")
    assert any(re.match(r"layer 1 head 1: .* \(step 61\) nats", title) for title in titles)
    assert "final validation loss" not in page.texts("dt")
    assert "Limits of the governor" in page.texts("summary")


@pytest.mark.parametrize("signal, unit", [
    ("Redundancy of heads", "cosine of weights"), ("Stable rank", ""),
    ("Distance from rank 1", "of the input's norm"), ("Size of a step", "of the weight's norm"),
    ("Mean gradient, largest head of each layer", "loss per unit weight"),
])  # fmt: skip
def test_every_signal_is_drawn_with_its_unit(scaled, signal, unit):
    page = report(scaled)
    labels = [attrs["aria-label"] for tag, attrs, _ in page.elements if tag == "svg"]
    assert f"{signal}, {unit}".removesuffix(", ") in labels


def test_the_model_is_called_the_model(lost):
    assert "the model" in report(lost).texts("td")
    assert where({"layer": -1, "head": -1}) == "the model"
    assert where({"layer": 3, "head": -1}) == "layer 3"
    text = summary(read_run(lost))
    assert "at the model" in text
    assert "-1" not in text
    (first, *_) = actions(read_run(lost))
    assert told(first, "").expected.startswith("gradient_norm is finite again")
    assert told(first, "").before == "gradient_norm NaN"


def test_the_advice_to_stop_comes_first_and_once(lost, tmp_path):
    for name in ("telemetry.jsonl", "journal.jsonl"):
        (tmp_path / name).write_text((lost / name).read_text())
    with (tmp_path / "journal.jsonl").open("a") as file:
        for step in (57, 58, 59):
            reason = (
                f"no gradient that can be used reaches the weights: {step}; tried: gradient_skip"
            )
            file.write(
                json.dumps({"step": step, "kind": "stop", "reason": reason, "text": reason}) + "\n"
            )
    page = report(tmp_path)
    (alert,) = ["".join(parts) for _, attrs, parts in page.elements if attrs.get("role") == "alert"]
    assert "reaches the weights: 57" in alert
    assert "step 57, and 2 times more up to step 59" in alert
    order = [attrs.get("class") for _, attrs, _ in page.elements]
    assert order.index("stop") < order.index("tiles")
    lines = summary(read_run(tmp_path)).splitlines()
    assert [line for line in lines if "STOP" in line] == [lines[2]]
    assert lines[2].startswith("  STOP at step 57: no gradient")


def test_an_undoing_says_when_and_why(make_run):
    folder = make_run(steps=1000)
    with (folder / "journal.jsonl").open("a") as file:
        file.write(json.dumps({"step": 900, "kind": "undo", "id": 1, "reason": "its time is over",
                               "text": "took back"}) + "\n")  # fmt: skip
    first, _ = actions(read_run(folder))
    assert told(first, "nats").end == "step 900: its time is over"


def test_what_was_only_said_is_not_called_made(tmp_path):
    model, optimizer = made()
    with torch.no_grad():
        model.attention[0].qkv.weight[4:8] *= 60
        model.attention[0].qkv.weight[20:24] *= 60
    governor = LeadMetaArchitect(model, optimizer, folder=tmp_path, mode="observe")
    for batch in batches(4):
        move(model, optimizer, batch, governor)
    governor.detach()
    run = read_run(tmp_path)
    assert actions(run)
    assert {told(action, "").after for action in actions(run)} == {"only observed"}
    page = report(tmp_path)
    assert "only said: this governor observes" in page.texts("dd")


def test_layers_of_different_sizes_and_a_layer_that_did_not_run(tmp_path):
    header = {"header": {"layers": 3, "grid_radius": None, "units": {"max_logit": "nats"}}}
    lines = [header]
    for step in range(1, 200):
        layers = [[1.0 + step / 50, 2.0], [] if step % 20 > 9 else [3.0], [4.0, 5.0, 6.0]]
        signals = (
            {"max_logit": layers, "entropy": [[0.1] * len(v) for v in layers]}
            if step % 5 == 0
            else {}
        )
        lines.append({"step": step, "loss": 1.0, "signals": signals, "scalars": {}, "times_us": {}})
    (tmp_path / "telemetry.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = report(tmp_path)
    assert "journal.jsonl: not recorded in this run" in page.texts("p")
    titles = page.texts("title")
    for layer, heads in enumerate((2, 1, 3)):
        assert (
            sum(title.startswith(f"layer {layer} head ") and "(step" in title for title in titles)
            == 2 * heads
        )
    assert "layer 0 head 0: 1.1 (step 5) to 4.9 (step 195) nats" in titles
    assert summary(read_run(tmp_path)).count("layer 2 head 2") == 1


def test_a_folder_of_nothing_is_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"not a run folder: .*metrics.jsonl is missing"):
        read_run(tmp_path)
