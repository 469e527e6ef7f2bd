"""The page on speed is what its rows say, and stands only where they stand."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OPS = ROOT / "results" / "ops.csv"
ROWS = """\
experiment,case,metric,value,unit,spread,seeds,device,commit,config
score forward+backward,cosine b1 h8 n1024 d64 fp32,SDPA,90,ms,1,1,one core,abc,def
score forward+backward,cosine b1 h8 n1024 d64 fp32,fused / SDPA,1.12,1,0.02,1,one core,abc,def
score forward+backward,cosine b1 h8 n2048 d64 fp32,fused / SDPA,1.05,1,0.02,1,one core,abc,def
score forward+backward,cosine b1 h8 n1024 d64 fp32 causal,fused / SDPA,0.5,1,0.02,1,one core,abc,def
score forward+backward,l1 b1 h8 n1024 d64 fp32,tiled / SDPA,9,1,0.5,1,one core,abc,def
score forward+backward,l1 b1 h8 n1024 d64 fp32,numba / SDPA,4.5,1,0.3,1,one core,abc,def
score forward+backward,l1 b1 h8 n1024 d64 fp32,KeOps / SDPA,3.5,1,0.3,1,one core,abc,def
gauge layer forward+backward,b1 h8 n1024 d10 fp32 causal,plain layer,9,ms,1,1,one core,abc,def
gauge layer forward+backward,b1 h8 n1024 d10 fp32 causal,so per position / plain layer,2.5,1,0.1,1,one core,abc,def
gauge layer forward+backward,b1 h8 n256 d64 fp32 causal,so per position / plain layer,60,1,1,1,one core,abc,def
gauge layer forward+backward,b1 h8 n256 d64 fp32 causal,"so per position, explicit weights / plain layer",55,1,1,1,one core,abc,def
memory forward+backward,l1 b1 h8 n8192 d64 fp32,numba,120,MB,0,1,one core,abc,def
statistics,dot b1 h8 n1024 d64 fp32 causal,fused / SDPA,2.25,1,0.1,1,one core,abc,def
"""


@pytest.fixture
def page(monkeypatch):
    """benchmarks/page.py, which is no package."""
    spec = importlib.util.spec_from_file_location("page", ROOT / "benchmarks" / "page.py")
    module = importlib.util.module_from_spec(spec)
    # named tuples look their module up
    monkeypatch.setitem(sys.modules, "page", module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def rows(page, tmp_path):
    (tmp_path / "ops.csv").write_text(ROWS)
    return page.read([tmp_path / "ops.csv"])


@pytest.mark.skipif(not OPS.exists(), reason="not measured here")
def test_the_page_and_its_pictures_are_what_the_rows_say(page):
    rows = page.read(page.ROWS)
    assert page.PAGE.read_text() == page.page(rows)
    for name, drawn in page.pictures(rows).items():
        assert (page.PICTURES / name).read_text() == drawn


def test_there_is_no_page_without_rows(page):
    assert OPS.exists() or not page.PAGE.exists()


def test_targets_stand_beside_what_was_measured(page, rows):
    table = page.targets(rows)
    assert "| `cosine`, forward and backward | at most 1.15 | 1.12 ± 0.02 | met |" in table
    # the fastest of ours counts, a faster peer does not
    assert "| `l1`, forward and backward | at most 4 | 4.50 ± 0.30 | **missed** |" in table
    assert (
        "| `l1`, to its fastest peer, 1,024 tokens | at most 1 | 1.29 ± 0.20 | **missed** |"
        in table
    )
    assert "| `l2_squared`, forward and backward | at most 1.25 | not measured | open |" in table
    assert "heads of 10, to the plain layer | at most 3 | 2.50 ± 0.10 | met |" in table
    assert "| at most 300 MB | 120 MB | met |" in table


def test_the_verdict_on_distances_follows_the_rows(page, rows):
    assert page.claim(rows) == "`l1` takes 4.50 ± 0.30 times as long (numba): slower"
    faster = [r._replace(value=0.9) if r.metric == "numba / SDPA" else r for r in rows]
    assert page.claim(faster).endswith("faster")


def test_the_width_that_stops_paying_is_read_from_the_rows(page, rows):
    assert "heads of 64 and 256 tokens" in page.crossing(rows)
    assert "At no width" in page.crossing([r for r in rows if r.d != 64])


def test_every_table_is_a_table(page, rows):
    for block in re.findall(r"(?:^\|.*\|\n)+", page.page(rows), flags=re.MULTILINE):
        assert len({line.count("|") for line in block.splitlines()}) == 1


def test_curves_hold_every_length_once(page, rows):
    assert page.curve(rows, "cosine") == [(1024, 1.12), (2048, 1.05)]
