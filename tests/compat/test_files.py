"""What stands at the root of the repository: licence, dependencies, the suite itself."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_licence_is_mit():
    text = " ".join((ROOT / "LICENSE").read_text().split())
    assert text.startswith("MIT License Copyright (c)")
    assert "to deal in the Software without restriction, including without limitation" in text
    assert "The above copyright notice and this permission notice shall be included" in text
    assert 'THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND' in text
    assert PROJECT["license"] == "MIT"
    assert PROJECT["license-files"] == ["LICENSE"]


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[<>=\[; ]", requirement)[0] for requirement in requirements}


def test_what_is_installed():
    extras = PROJECT["optional-dependencies"]
    assert names(PROJECT["dependencies"]) == {"torch", "numpy", "safetensors"}
    assert "matplotlib" in names(extras["cli"])
    wanted = names([*PROJECT["dependencies"], *(r for extra in extras.values() for r in extra)])
    assert not wanted & {"scipy", "networkx", "seaborn"}


def functions_of(file: Path) -> list[str]:
    tree = ast.parse(file.read_text())
    functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    return [name for name in functions if name.startswith("test_")]


def test_the_suite_lies_where_pytest_looks_for_it(request):
    """`python -m pytest tests/`: this very test runs from there, and no other lies hidden."""
    assert request.config.rootpath == ROOT
    assert "tests" in request.config.getini("testpaths")
    assert request.node.nodeid.startswith("tests/compat/")
    for file in (ROOT / "tests").rglob("*.py"):
        assert bool(functions_of(file)) == file.name.startswith("test_"), file


@pytest.mark.parametrize("parts", [("attention", "geometry", "ops/test_headmix.py"), ("governor",)])
def test_the_layer_and_the_governor_have_suites_of_their_own(parts):
    for part in parts:
        place = ROOT / "tests" / part
        files = [place] if place.suffix else list(place.glob("test_*.py"))
        assert sum(len(functions_of(file)) for file in files) >= 4, part
