import json
import math

import pytest

from sixfold.report.read import read_run


def test_numbers_are_those_of_the_files(make_run):
    folder = make_run(steps=400)
    run = read_run(folder)
    written = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert list(run.metrics.rows) == written[1:]
    assert run.name == "hex-7"
    telemetry = [json.loads(line) for line in (folder / "telemetry.jsonl").read_text().splitlines()]
    assert run.telemetry[3].step == telemetry[4]["step"]
    assert [list(h) for h in run.telemetry[3].signals["max_logit"]] == (
        telemetry[4]["signals"]["max_logit"]
    )
    # a signal that was not measured is absent, not zero
    assert "condition_q" in run.telemetry[0].signals
    assert "condition_q" not in run.telemetry[1].signals
    assert run.notes == ()


def test_units_are_those_of_the_files(make_run):
    run = read_run(make_run(steps=100))
    assert [run.unit(n) for n in ("loss", "learning_rate", "unknown")] == ["nats/token", "", ""]
    signals = ("max_logit", "entropy", "sigma_max_q", "unknown")
    assert [run.signal_unit(n) for n in signals] == ["nats", "of log n", "of nothing", ""]


def test_nan_loss_is_read_as_nan(make_run):
    losses = [row["loss"] for row in read_run(make_run(steps=400, nan_from=200)).metrics.rows]
    assert math.isfinite(losses[0])
    assert math.isnan(losses[-1])


@pytest.mark.parametrize("name", ["metrics.jsonl", "telemetry.jsonl", "journal.jsonl"])
def test_a_cut_last_line_is_left_out_and_noted(make_run, name):
    folder = make_run(steps=400)
    before = read_run(folder)
    text = (folder / name).read_bytes()
    (folder / name).write_bytes(text[:-9])
    after = read_run(folder)
    assert after.notes == (f"{name}: the last line was cut off and is left out",)
    rows = {"metrics": lambda r: r.metrics.rows, "telemetry": lambda r: r.telemetry,
            "journal": lambda r: r.journal}[name.removesuffix(".jsonl")]  # fmt: skip
    assert list(rows(after)) == list(rows(before))[:-1]


@pytest.mark.parametrize("name", ["metrics.jsonl", "telemetry.jsonl", "journal.jsonl"])
def test_damage_in_the_middle_names_file_and_line(make_run, name):
    folder = make_run(steps=400)
    lines = (folder / name).read_text().splitlines()
    lines[3] = lines[3][:-9]
    (folder / name).write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=rf"{name}, line 4: not valid JSON"):
        read_run(folder)


@pytest.mark.parametrize("line, message", [("[1]", "expected a JSON object"), ("{}", "no 'step'")])
def test_a_row_of_the_wrong_shape_is_an_error(make_run, line, message):
    folder = make_run(steps=400)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=rf"metrics.jsonl, line \d+: {message}"):
        read_run(folder)


def test_missing_parts_are_named(make_run, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no run folder .*nowhere"):
        read_run(tmp_path / "nowhere")
    folder = make_run(steps=100)
    (folder / "environment.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"environment.json is missing"):
        read_run(folder)
    for name in ("metrics.jsonl", "telemetry.jsonl"):
        (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=r"metrics.jsonl is missing"):
        read_run(folder)


def test_a_damaged_configuration_is_named(make_run):
    folder = make_run(steps=100)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json: not valid JSON"):
        read_run(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config.json: expected a JSON object, got list"):
        read_run(folder)


def test_a_run_without_a_governor_says_so(make_run):
    run = read_run(make_run(steps=100, governed=False, sample=None))
    assert run.notes == (
        "telemetry.jsonl: not recorded in this run",
        "journal.jsonl: not recorded in this run",
    )
    assert (run.telemetry, run.journal, run.sample) == ((), (), None)


def test_null_is_a_gap_and_a_later_header_adds(make_run):
    folder = make_run(steps=40)
    with (folder / "telemetry.jsonl").open("a") as file:
        file.write('{"header": {"resumed": true}}\n')
        file.write('{"step": 60, "loss": null, "signals": {"max_logit": [[null, 2]]}}\n')
    run = read_run(folder)
    assert math.isnan(run.telemetry[-1].signals["max_logit"][0][0])
    assert run.telemetry[-1].signals["max_logit"][0][1] == 2.0
    assert run.measured.header["resumed"] is True
    assert run.measured.header["grid_radius"] == 1
