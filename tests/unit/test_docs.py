"""What the documents say is what the code does: tables name every variant, code blocks run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sixfold import discover
from sixfold.governor.ladder import PROTOCOLS
from sixfold.governor.limits import PRESETS
from sixfold.governor.watch.collect import UNITS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def first_cells(page: str) -> set[str]:
    """Names in backticks in the first cell of any table row."""
    rows = re.findall(r"^\| (`[^|]*`) \|", (ROOT / "docs" / page).read_text(), flags=re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


@pytest.mark.parametrize("kind", ["projection", "score", "reach", "mixer"])
def test_every_part_has_a_row_and_stands_in_the_readme(kind):
    names = set(discover.names(f"sixfold.attention.{kind}"))
    assert names <= first_cells("attention.md")
    row = re.search(rf"^\| {kind} \|.*$", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    assert set(re.findall(r"`([^`]+)`", row[0])) == names


def test_every_part_says_what_it_computes():
    for kind in ("projection", "score", "reach", "mixer"):
        for name in discover.names(f"sixfold.attention.{kind}"):
            module = discover.load(f"sixfold.attention.{kind}", name).__module__
            assert __import__(module, fromlist=["build"]).__doc__, name


def test_every_data_set_has_a_row():
    known = {*discover.names("sixfold.data"), *discover.names("sixfold.data.graphs")}
    assert known == first_cells("data.md")


def test_every_signal_and_protocol_has_a_row():
    rows = first_cells("governor.md")
    signals = {"max_logit", "entropy", "gradient_norm"}
    signals |= {f"{name}_{role}" for name in ("sigma_max", "condition") for role in "qkv"}
    assert signals | set(PROTOCOLS) <= rows
    assert {
        name.rpartition("_")[0] if name[-2:] in ("_q", "_k", "_v") else name for name in signals
    } <= set(UNITS)


def test_presets_of_limits_are_named():
    page = (ROOT / "docs" / "governor.md").read_text()
    assert all(f"`{name}`" in page for name in PRESETS)


def blocks(language: str) -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        for number, code in enumerate(
            re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.DOTALL)
        ):
            found.append(pytest.param(code, id=f"{page.name}-{number}"))
    return found


@pytest.mark.parametrize("code", blocks("python"))
def test_python_blocks_run(code, capsys):
    exec(compile(code, "block", "exec"), {})


@pytest.mark.parametrize("code", blocks("toml"))
def test_toml_blocks_are_configurations(code, tmp_path):
    from sixfold.recipe import configure

    (tmp_path / "block.toml").write_text(code)
    assert configure((), tmp_path / "block.toml").name == "mine"


def test_the_readme_shows_only_commands_that_parse():
    from sixfold.cli import app

    text = "\n".join(
        re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    )
    commands = re.findall(
        r"^(?:torchrun .*-m )?sixfold (.*?)(?:\s{2,}#.*)?$", text, flags=re.MULTILINE
    )
    assert len(commands) >= 8
    for words in commands:
        app.parse_args(words, exit_on_error=False)


@pytest.mark.parametrize("page", ["README.md", "docs/attention.md"])
def test_a_page_shows_the_results_as_they_stand(page):
    import csv

    # a bold number, and behind it in a comment which row of which file it is
    shown = re.findall(
        r"\*\*([\d.]+)[^*]*\*\*[^*]*?<!-- (\S+): (.+?) / (.+?) -->", (ROOT / page).read_text()
    )
    assert shown
    for digits, file, case, metric in shown:
        rows = csv.DictReader((ROOT / "results" / file).read_text().splitlines())
        names = [(r, (r["case"], f"{r['experiment']}: {r['case']}")) for r in rows]
        (row,) = [r for r, cases in names if case in cases and r["metric"] == metric]
        assert float(digits) == pytest.approx(
            float(row["value"]), abs=0.5 * 10 ** -len(digits.partition(".")[2])
        ), (case, metric)


def test_pictures_are_there_and_complete():
    for name in re.findall(r"\]\((docs/pictures/[^)]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / name).read_text().strip().endswith("</svg>")


def test_the_changelog_names_the_version():
    import sixfold

    assert f"## {sixfold.__version__}" in (ROOT / "CHANGELOG.md").read_text()
