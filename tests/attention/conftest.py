"""Layers of every combination of parts, found by name."""

import functools
import itertools

import pytest
import torch

from sixfold import MultiHeadAttention, discover

KINDS = ("projection", "score", "reach", "mixer")
OPTIONS = {"window": {"width": 5}}
"""Options without which a part cannot be built."""


def parts():
    """Every combination: a dict from kind to part."""
    found = [discover.names(f"sixfold.attention.{kind}") for kind in KINDS]
    for names in itertools.product(*found):
        chosen = ({"name": name} | OPTIONS.get(name, {}) for name in names)
        yield dict(zip(KINDS, chosen, strict=True))


COMBINATIONS = {"-".join(part["name"] for part in c.values()): c for c in parts()}


def build(combination, dtype=torch.float64, seed=0, **options):
    """A layer whose parameters are all away from their starting values."""
    torch.manual_seed(seed)
    sizes = {"d_model": 24, "num_heads": 7, "head_dim": 4}
    layer = MultiHeadAttention(**(sizes | combination | options), dtype=torch.float64)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return layer.to(dtype)


@functools.cache
def _shared(name, dtype):
    return build(COMBINATIONS[name], dtype)


def pytest_generate_tests(metafunc):
    if "combination" in metafunc.fixturenames:
        metafunc.parametrize("combination", COMBINATIONS)


@pytest.fixture
def options(combination):
    """The parts of this combination, as keywords."""
    return COMBINATIONS[combination]


@pytest.fixture
def layer(combination):
    """A float64 layer that the test leaves as it is."""
    return _shared(combination, torch.float64)


@pytest.fixture
def single(combination):
    """The same layer in float32."""
    return _shared(combination, torch.float32)


@pytest.fixture
def make():
    """Builds a layer of given parts."""
    return build


@pytest.fixture
def tokens():
    """Builds random tokens (b, n, d_model)."""

    def made(batch, n, width=24, dtype=torch.float64, seed=0):
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(batch, n, width, generator=generator, dtype=torch.float64).to(dtype)

    return made
