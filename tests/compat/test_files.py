"""What stands at the root of the repository: licence, dependencies, the suite itself."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

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


def test_the_suite_is_collected_whole():
    """Every file of tests that lies below tests/ is found, imports, and holds tests."""
    command = [sys.executable, "-m", "pytest", "tests/", "--collect-only", "-q", "-p", "no:cacheprovider"]
    environment = {**os.environ, "PYTEST_ADDOPTS": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:]
    collected = dict(re.findall(r"^(tests/\S+\.py): (\d+)$", done.stdout, re.MULTILINE))
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py")}
    assert collected.keys() == files
    for part in ("attention", "geometry", "governor", "ops"):
        assert sum(int(n) for file, n in collected.items() if file.startswith(f"tests/{part}/")) > 10
