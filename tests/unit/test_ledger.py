"""The ledger of the seeds: complete, ordered, and nothing in it is claimed without a test."""

from __future__ import annotations

import ast
import functools
import itertools
import tomllib
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LEDGER = tomllib.loads((ROOT / "docs" / "seeds.toml").read_text())["entry"]
REQUIRED = {"seed": str, "line": int, "kind": str, "name": str, "status": str, "room": str}
OPTIONAL = {"test": str, "note": str, "reason": str}
SHOWN, DECLINED = ("works", "adapted"), ("refused", "refuted")
STATUSES = (*SHOWN, *DECLINED, "later")
KINDS = (
    "argument", "claim", "class", "command", "field", "figure", "file", "flag", "function", "row", "task",
)  # fmt: skip
NOT_ALWAYS_RUN = {"slow", "gpu", "data", "skip", "skipif", "xfail"}


def where(entry) -> str:
    return f"seed {entry.get('seed')} line {entry.get('line')}: {entry.get('kind')} {entry.get('name')!r}"


def of(*statuses):
    return [entry for entry in LEDGER if entry["status"] in statuses]


def marks(decorators: list[ast.expr]) -> set[str]:
    """Names of the marks among decorators, or in a list of marks."""
    return {
        node.attr for d in decorators for node in ast.walk(d) if isinstance(node, ast.Attribute)
    }


@functools.cache
def functions_of(file: Path) -> dict[str, set[str]]:
    """The test functions a file defines, each with its marks and those of the file."""
    tree, shared, found = ast.parse(file.read_text()), set(), {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark":
            shared = marks([node.value])
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            found[node.name] = marks(node.decorator_list)
    return {name: own | shared for name, own in found.items()}


def test_every_entry_has_its_keys():
    for entry in LEDGER:
        assert REQUIRED.keys() <= entry.keys(), where(entry)
        for key, value in entry.items():
            assert isinstance(value, {**REQUIRED, **OPTIONAL}.get(key, ())), (where(entry), key)
            assert value, (where(entry), key)
        assert entry["kind"] in KINDS, where(entry)
        assert entry["status"] in STATUSES, where(entry)


def test_entries_follow_the_seeds_and_none_comes_twice():
    for before, after in itertools.pairwise(LEDGER):
        assert (before["seed"], before["line"]) <= (after["seed"], after["line"]), where(after)
    count = Counter((entry["seed"], entry["kind"], entry["name"]) for entry in LEDGER)
    assert not [key for key, times in count.items() if times > 1]
    assert {entry["seed"] for entry in LEDGER} == {"000", "001", "002", "003", "004"}


@pytest.mark.parametrize("status", SHOWN)
def test_what_works_is_shown_by_a_test_that_always_runs(status):
    assert of(status)
    for entry in of(status):
        path, _, name = entry.get("test", "").partition("::")
        file = ROOT / path
        assert path.startswith("tests/") and file.is_file(), (where(entry), path)
        function = name.partition("[")[0]
        assert function in functions_of(file), (where(entry), entry["test"])
        assert not functions_of(file)[function] & NOT_ALWAYS_RUN, (where(entry), entry["test"])


def test_what_works_lives_where_it_is_said_to_live():
    for entry in of(*SHOWN):
        rooms = (ROOT / "src" / "sixfold" / entry["room"], ROOT / entry["room"])
        assert any(room.exists() for room in rooms), (where(entry), entry["room"])
        assert "reason" not in entry, where(entry)


def test_what_was_adapted_says_how():
    for entry in of("adapted"):
        assert "note" in entry, where(entry)


def test_what_is_declined_has_a_reason():
    for entry in of(*DECLINED):
        assert "reason" in entry, where(entry)
        assert "test" not in entry, where(entry)
    assert all(entry["room"] == "none" for entry in of("refused"))


def test_what_comes_later_claims_nothing():
    for entry in of("later"):
        assert not entry.keys() & {"test", "reason"}, where(entry)
        assert entry["room"] != "none", where(entry)


def test_a_test_that_is_not_there_would_be_noticed():
    tests = functions_of(Path(__file__))
    assert "test_every_entry_has_its_keys" in tests
    assert "parametrize" in tests["test_what_works_is_shown_by_a_test_that_always_runs"]
    assert "where" not in tests
    slow = functions_of(ROOT / "tests" / "train" / "test_kill.py")
    assert "slow" in slow["test_killed_at_a_random_moment_and_resumed"]
