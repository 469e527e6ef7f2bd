"""The examples run as a reader would run them, and say something true."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))


def smoke(name, folder):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("SIXFOLD_DATA", None)
    command = [sys.executable, "-W", "error", str(EXAMPLES / f"{name}.py"), "--smoke"]
    found = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )
    assert found.returncode == 0, found.stderr
    assert not [*folder.iterdir()], "an example leaves files behind"
    return found.stdout


def numbers(line):
    return [float(number) for number in re.findall(r"\d+\.\d+", line)]


def test_examples_are_short_and_say_how_to_run_them():
    assert len(NAMES) >= 5
    for name in NAMES:
        text = (EXAMPLES / f"{name}.py").read_text()
        assert len(text.splitlines()) < 80
        assert f"python examples/{name}.py [--smoke]" in text


def test_image_classification_beats_nothing_yet_but_counts(tmp_path):
    text = smoke("image_classification", tmp_path)
    assert "digits: 1,437 images of 8 x 8, 16 patches each" in text
    # the commonest of ten classes in training is 28 of the 360 held out
    assert "always the commonest class    7.8% right" in text


def test_text_classification_says_that_its_data_are_generated(tmp_path):
    text = smoke("text_classification", tmp_path)
    assert "SIXFOLD_DATA is not set" in text
    assert "GENERATED" in text
    guess, ours = (numbers(line)[0] for line in text.splitlines() if "% right" in line)
    assert ours > guess


@pytest.mark.slow
def test_physics_beats_no_change_at_every_time(tmp_path):
    rows = smoke("physics", tmp_path).partition("field\n")[2].splitlines()[:-1]
    assert len(rows) >= 3
    for row in rows:
        _, ours, no_change, _ = numbers(row)
        assert ours < no_change


@pytest.mark.slow
def test_swapping_reaches_every_mixer_score_and_projection(tmp_path):
    text = smoke("swap_attention", tmp_path)
    for swap in ("mixer=hexagonal", "mixer=ring", "score=cosine", "projection=hypernetwork"):
        assert swap in text
    plain = re.search(r"plain +([\d,]+)", text)[1]
    # 2 layers x (2 matrices of 8 x 8, 7 + 7 gains, 24 edges)
    hexagonal = re.search(r"mixer=hexagonal +([\d,]+)", text)[1]
    difference = int(hexagonal.replace(",", "")) - int(plain.replace(",", ""))
    assert difference == 2 * (2 * 64 + 7 + 7 + 24)


@pytest.mark.slow
def test_language_modelling_is_governed_and_learns(tmp_path):
    text = smoke("language_modelling", tmp_path)
    assert "Sixfold governor (act)" in text
    alike, ours = (
        numbers(next(line for line in text.splitlines() if start in line))[0]
        for start in ("every character alike", "this model")
    )
    assert ours < alike - 0.5


@pytest.mark.parametrize("name", NAMES)
def test_examples_use_public_names_only(name):
    text = (EXAMPLES / f"{name}.py").read_text()
    assert not re.search(r"(import|\.)\s*_[a-z]", text)
