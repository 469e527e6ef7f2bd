import json
import math
import os
import random
import statistics
import subprocess
import sys

import pytest

pytest.importorskip("pyarrow")

import pandas
import pyarrow.parquet as parquet

from sixfold.report import telemetry
from sixfold.report.telemetry import compact

HEADER = {
    "layers": 3, "names": ["a", "b", "c"], "grid_radius": None,
    "units": {"max_logit": "nats", "sigma_max": "1", "times_us": "microseconds",
              "tokens_per_s": "tokens/s", "entropy": "1 (of log visible keys)"},
}  # fmt: skip


def rows_of(steps, heads=(2, 0, 3), every=10, seed=0):
    """Rows as the governor writes them; layers have different numbers of heads."""
    chance = random.Random(seed)

    def grid():
        return [[chance.random() for _ in range(count)] for count in heads]

    for step in range(1, steps + 1):
        sampled = (step - 1) % every == 0
        signals = {"max_logit": grid(), "entropy": grid()} if sampled else {}
        if sampled and (step - 1) % (3 * every) == 0:
            signals["sigma_max_q"] = grid()
        yield {"step": step, "loss": 2.0 / step, "signals": signals,
               "scalars": {"learning_rate": 0.1} | ({"tokens_per_s": 5.0} if sampled else {}),
               "times_us": {"step": 70.0, "mixing": 3.0} if sampled else {}}  # fmt: skip


def written(folder, rows):
    folder.mkdir(exist_ok=True)
    lines = [{"header": HEADER}, *rows]
    (folder / "telemetry.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_every_value_of_the_log_is_in_the_files_and_nothing_else(tmp_path):
    rows = list(rows_of(95))
    rows[30]["signals"]["max_logit"] = [[], [], [1.0, math.nan, None]]
    rows[30]["signals"].pop("sigma_max_q")
    rows[30]["signals"].pop("entropy")
    found = compact(written(tmp_path, rows))
    table = pandas.read_parquet(found.signals, dtype_backend="pyarrow")
    expected = {
        (row["step"], layer, head, name): value
        for row in rows
        for name, layers in row["signals"].items()
        for layer, heads in enumerate(layers)
        for head, value in enumerate(heads)
        if value is not None
    }
    long = {
        (row["step"], row["layer"], row["head"], name): row[name]
        for row in parquet.read_table(found.signals).to_pylist()
        for name in ("max_logit", "entropy", "sigma_max_q")
        if row[name] is not None
    }
    assert long.keys() == expected.keys()
    assert all(a == b or (math.isnan(a) and math.isnan(b))
               for a, b in ((long[key], expected[key]) for key in long))  # fmt: skip
    # a layer that did not run has no row; the head that was not measured is null, not a number
    assert table[table.step == 31][["layer", "head"]].values.tolist() == [[2, 0], [2, 1], [2, 2]]
    assert table.entropy[table.step == 31].isna().all()


def test_a_row_per_step_holds_loss_scalars_and_times(tmp_path):
    rows = list(rows_of(40))
    rows[6]["loss"] = math.nan
    found = parquet.read_table(compact(written(tmp_path, rows)).scalars).to_pylist()
    assert [row["step"] for row in found] == list(range(1, 41))
    assert [row["loss"] for row in found[:6]] == [2.0 / step for step in range(1, 7)]
    assert math.isnan(found[6]["loss"])
    assert (found[0]["step_us"], found[0]["mixing_us"], found[0]["tokens_per_s"]) == (
        70.0,
        3.0,
        5.0,
    )
    assert (found[1]["step_us"], found[1]["tokens_per_s"], found[1]["learning_rate"]) == (
        None,
        None,
        0.1,
    )


def test_columns_say_their_units_and_the_file_its_header(tmp_path):
    found = compact(written(tmp_path, rows_of(5)))
    schema = parquet.read_schema(found.signals)
    units = {field.name: (field.metadata or {}).get(b"unit") for field in schema}
    assert units == {"step": None, "layer": None, "head": None, "max_logit": b"nats",
                     "entropy": b"1 (of log visible keys)", "sigma_max_q": b"1"}  # fmt: skip
    assert json.loads(schema.metadata[b"sixfold"]) == HEADER
    assert parquet.read_schema(found.scalars).field("mixing_us").metadata == {
        b"unit": b"microseconds"
    }


def test_again_gives_the_same_bytes_and_a_longer_log_a_longer_table(tmp_path):
    first = compact(written(tmp_path, rows_of(50)))
    before = [path.read_bytes() for path in first[:2]]
    assert [path.read_bytes() for path in compact(tmp_path)[:2]] == before
    compact(written(tmp_path, rows_of(60)))
    assert parquet.read_table(first.scalars).num_rows == 60
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "scalars.parquet", "telemetry.jsonl", "telemetry.parquet",
    ]  # fmt: skip


def test_what_does_not_fit_into_memory_is_written_in_parts(tmp_path, monkeypatch):
    whole = compact(written(tmp_path / "whole", rows_of(300)))
    monkeypatch.setattr(telemetry, "GROUP", 32)
    parts = compact(written(tmp_path / "parts", rows_of(300)))
    assert parquet.ParquetFile(parts.signals).num_row_groups == 5
    for a, b in zip(whole[:2], parts[:2], strict=True):
        assert parquet.read_table(a).equals(parquet.read_table(b))


def test_a_column_that_comes_late_is_null_before(tmp_path, monkeypatch):
    monkeypatch.setattr(telemetry, "GROUP", 16)
    rows = list(rows_of(200))
    rows[190]["signals"]["new"] = [[1.0, 2.0], [], [3.0, 4.0, 5.0]]
    rows[195]["scalars"]["also_new"] = 7.0
    found = compact(written(tmp_path, rows))
    table = parquet.read_table(found.signals)
    assert table.num_rows == 20 * 5
    assert table.column("new").null_count == 95
    assert table.column("new").to_pylist()[95:] == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert parquet.read_table(found.scalars).column("also_new").to_pylist()[195] == 7.0


def test_a_line_cut_by_a_kill_is_left_out_and_said(tmp_path):
    folder = written(tmp_path, rows_of(20))
    path = folder / "telemetry.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    found = compact(folder)
    assert found.notes == ("telemetry.jsonl: the last line was cut off and is left out",)
    assert parquet.read_table(found.scalars).num_rows == 19


def test_damage_leaves_the_old_files_as_they_were(tmp_path):
    folder = written(tmp_path, rows_of(20))
    before = [path.read_bytes() for path in compact(folder)[:2]]
    lines = (folder / "telemetry.jsonl").read_text().splitlines()
    lines[5] = lines[5][:-4]
    (folder / "telemetry.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=r"telemetry.jsonl, line 6: not valid JSON"):
        compact(folder)
    assert [
        (folder / name).read_bytes() for name in ("telemetry.parquet", "scalars.parquet")
    ] == before
    assert not list(folder.glob("*.tmp"))


def test_a_run_that_measured_nothing_has_empty_tables(tmp_path):
    found = compact(written(tmp_path, []))
    assert parquet.read_table(found.signals).column_names == ["step", "layer", "head"]
    assert parquet.read_table(found.scalars).num_rows == 0


def test_a_folder_without_telemetry_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="was not governed: there is no telemetry.jsonl"):
        compact(tmp_path)


def test_without_pyarrow_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'sixfold\[cli\]'"):
        compact(written(tmp_path, rows_of(3)))


def test_questions_are_answered_by_pandas_and_duckdb(tmp_path):
    rows = list(rows_of(200))
    found = compact(written(tmp_path, rows))
    sampled = [row["signals"]["max_logit"] for row in rows if row["signals"]]
    expected = statistics.fmean(value[2][1] for value in sampled)
    table = pandas.read_parquet(found.signals)
    means = table.groupby(["layer", "head"]).max_logit.mean()
    assert means[2, 1] == pytest.approx(expected)
    duckdb = pytest.importorskip("duckdb")
    (answer,) = duckdb.sql(
        f"select avg(max_logit) from '{found.signals}' where layer = 2 and head = 1"
    ).fetchone()
    assert answer == pytest.approx(expected)


PEAK = """
import resource, sys
from sixfold.report import telemetry
telemetry.GROUP = 4096
telemetry.compact(sys.argv[1])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_run(tmp_path):
    def peak(steps):
        folder = written(tmp_path / str(steps), rows_of(steps, heads=(8, 8, 8, 8)))
        done = subprocess.run([sys.executable, "-c", PEAK, folder], capture_output=True, text=True,
                              check=True, env=os.environ)  # fmt: skip
        return int(done.stdout) / 1024

    assert peak(60_000) < peak(10_000) + 20
