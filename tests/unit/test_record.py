from __future__ import annotations

import csv
import json

import pytest

from sixfold import record
from sixfold.record import Log, Provenance, Result, publish


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_log_resumes_where_the_checkpoint_stood(tmp_path):
    path = tmp_path / "a" / "log.jsonl"
    log = Log(path, {"unit": "nats"})
    log.append({"step": 1})
    position = log.position()
    log.append({"step": 2})
    log.close()
    again = Log(path, {"unit": "nats"}, position)
    again.append({"step": 2, "again": True})
    assert lines(path) == [{"header": {"unit": "nats"}}, {"step": 1}, {"step": 2, "again": True}]


def test_a_fresh_log_forgets_an_old_one(tmp_path):
    Log(tmp_path / "log.jsonl", {}).append({"step": 1})
    Log(tmp_path / "log.jsonl", {})
    assert lines(tmp_path / "log.jsonl") == [{"header": {}}]


def test_a_log_that_lost_rows_is_not_continued(tmp_path):
    path = tmp_path / "log.jsonl"
    position = Log(path, {}).position()
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(OSError, match=r"log.jsonl.*the checkpoint counts"):
        Log(path, {}, position)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write .*file/log.jsonl"):
        Log(tmp_path / "file" / "log.jsonl", {})


def test_floats_survive_a_log_to_the_bit(tmp_path):
    values = [0.1, 1 / 3, 1e-308, 123456789.123456789, float("nan")]
    Log(tmp_path / "log.jsonl", {}).append({"values": values})
    found = lines(tmp_path / "log.jsonl")[1]["values"]
    assert [v.hex() for v in found] == [v.hex() for v in values]


def test_published_rows_carry_their_origin_and_replace_their_like(tmp_path):
    path, origin = tmp_path / "r.csv", Provenance("cpu: test", "abc", "123")
    publish(
        path,
        [
            Result("e", "plain", "loss", 2.0, "nats", 0.1, 3),
            Result("e", "hex", "loss", 1.5, "nats", 0.2, 3),
        ],
        origin,
    )
    publish(path, [Result("e", "plain", "loss", 1.9, "nats", 0.1, 5)], origin)
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert [(r["case"], r["value"], r["seeds"]) for r in rows] == [
        ("hex", "1.5", "3"),
        ("plain", "1.9", "5"),
    ]
    assert {(r["device"], r["commit"], r["config"]) for r in rows} == {("cpu: test", "abc", "123")}
    assert tuple(rows[0]) == record.COLUMNS


def test_a_json_file_is_replaced_whole(tmp_path):
    record.write_json(tmp_path / "a.json", {"a": 1})
    record.write_json(tmp_path / "a.json", {"a": 2})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_the_commit_is_that_of_this_tree():
    assert record.commit() == "unversioned" or len(record.commit().rstrip("+")) == 12


def test_the_config_hash_sees_every_value():
    base = {"a": {"b": 1}, "c": [1, 2]}
    assert record.config_hash(base) == record.config_hash({"c": [1, 2], "a": {"b": 1}})
    assert record.config_hash(base) != record.config_hash({"c": [1, 2], "a": {"b": 2}})
