import json

from sixfold.report.read import read_run
from sixfold.report.scale import number
from sixfold.report.text import sparkline, summary


def test_the_summary_holds_the_numbers_of_the_files(make_run):
    folder = make_run(steps=1000)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][1:]
    losses = [row["loss"] for row in rows if row["split"] == "validation"]
    text = summary(read_run(folder))
    assert len(text.splitlines()) <= 27
    assert f"{number(losses[-1])} nats/token" in text
    assert f"{number(min(losses))} at step" in text
    assert "1 notice, 1 warning, 1 critical" in text
    assert "2 (1 of 2 judged held, 1 undone)" in text
    last = read_run(folder).telemetry[-1].signals["max_logit"]
    top = max(v for heads in last for v in heads)
    assert f"{number(top)} nats, largest: layer 2 head 3, step 1,000" in text


def test_a_destroyed_run_says_where(make_run):
    text = summary(read_run(make_run(steps=1000, nan_from=600, governed=False)))
    assert "not a number from step 600" in text
    assert "journal.jsonl: not recorded in this run" in text
    assert "×" in text


def test_nothing_measured_is_said(make_run):
    folder = make_run(steps=100, governed=False)
    header = (folder / "metrics.jsonl").read_text().splitlines()[0]
    (folder / "metrics.jsonl").write_text(header + "\n")
    assert summary(read_run(folder)).count("not measured") == 2


def test_a_sparkline_rises_where_its_curve_does():
    assert sparkline([(i, float(i)) for i in range(8)], 8) == "▁▂▃▄▅▆▇█"
    assert len(sparkline([(i, float(i)) for i in range(1000)], 40)) == 40
    assert sparkline([(0, float("nan"))]) == "×"
