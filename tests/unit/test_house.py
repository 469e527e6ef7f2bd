"""The house itself: what is imported when, that every setting is read, that names resolve."""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

import sixfold
from sixfold import discover
from sixfold.governor.limits import ActionLimits, AlarmLimits
from sixfold.recipe import GovernorSettings, RunConfig
from sixfold.train.loop import TrainSettings
from sixfold.train.optimizer import OptimizerSettings

SOURCE = Path(sixfold.__file__).parent
HEAVY = (
    "matplotlib",
    "jinja2",
    "rich",
    "cyclopts",
    "pyarrow",
    "tokenizers",
    "sklearn",
    "triton",
    "ray",
    "fastapi",
)


def loaded_by(code: str) -> set[str]:
    """Top-level modules that a fresh process has after running `code`."""
    script = f"{code}\nimport sys; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_importing_sixfold_loads_nothing_heavy_not_even_torch():
    assert not loaded_by("import sixfold") & {"torch", *HEAVY}


def test_one_attention_layer_needs_torch_alone():
    assert not loaded_by("from sixfold import HexagonalMultiHeadAttention") & set(HEAVY)


def test_help_does_not_load_torch():
    assert "torch" not in loaded_by("from sixfold.cli import app")


@pytest.mark.parametrize("name", [n for n in sixfold.__all__ if n != "__version__"])
def test_public_names_resolve_and_are_documented(name):
    assert getattr(sixfold, name).__doc__


def test_an_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = sixfold.Nothing


@pytest.mark.parametrize(
    "kind",
    [RunConfig, TrainSettings, OptimizerSettings, GovernorSettings, AlarmLimits, ActionLimits],
)
def test_every_setting_is_read_somewhere(kind):
    assert is_dataclass(kind)
    trees = [ast.parse(file.read_text()) for file in SOURCE.rglob("*.py")]
    read = {
        node.attr
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    assert not {field.name for field in fields(kind)} - read


def test_names_are_files_and_load_finds_build():
    assert discover.names("sixfold.attention.mixer") == (
        "dense",
        "hexagonal",
        "hexagonal_logits",
        "none",
        "random",
        "ring",
        "spectral",
    )
    assert callable(discover.load("sixfold.attention.score", "dot"))
    with pytest.raises(
        ValueError, match=r"unknown mixer 'rin'; choose from: dense.*Did you mean 'ring'"
    ):
        discover.load("sixfold.attention.mixer", "rin")
    with pytest.raises(ValueError, match="is not a package"):
        discover.names("sixfold.discover")


@pytest.mark.parametrize("preset", sorted(p.stem for p in (SOURCE / "presets").glob("*.toml")))
def test_presets_are_configurations(preset):
    from sixfold.recipe import configure

    assert configure([preset]).name == preset
