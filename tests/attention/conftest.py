"""Layers of every combination of parts, found by name."""

import functools
import itertools

import pytest
import torch

from sixfold import MultiHeadAttention, discover
from sixfold.attention import multihead
from sixfold.contracts import Heads

KINDS = ("projection", "score", "reach", "mixer")
OPTIONS = {
    "window": {"width": 5},
    "hierarchical": {"block": 4, "capacity": 2, "threshold": 0.1},
}
"""Options without which a part cannot be built, or has nothing to do with a few tokens."""
APART = {("hierarchical", "hexagonal_logits")}
"""Reaches and mixers that cannot be joined."""


def rated(projection, score):
    """Whether the score can rate what the projection emits."""
    heads = Heads(24, 7, 4, 7)
    emitted = multihead.build_part("projection", {"name": projection}, heads).schema
    return multihead.build_part("score", {"name": score}, heads).schema == emitted


def combine():
    """Every combination of names by kind, those that fit and those that must be refused."""
    found = itertools.product(*(discover.names(f"sixfold.attention.{kind}") for kind in KINDS))
    pairs = functools.cache(rated)
    fit, refused = {}, {}
    for names in found:
        chosen = {k: {"name": n} | OPTIONS.get(n, {}) for k, n in zip(KINDS, names, strict=True)}
        joined = pairs(*names[:2]) and names[2:] not in APART
        (fit if joined else refused)["-".join(names)] = chosen
    return fit, refused


def covering(combinations):
    """A few combinations in which every two parts that fit meet at least once.

    Greedy: the next one shows the most new pairs.
    """
    pairs = {name: set(itertools.combinations(name.split("-"), 2)) for name in combinations}
    open_pairs, chosen = set().union(*pairs.values()), {}
    while open_pairs:
        best = max(pairs, key=lambda name: len(pairs[name] & open_pairs))
        chosen[best] = combinations[best]
        open_pairs -= pairs[best]
    return chosen


FITTING, REFUSED = combine()
FRAMED = {"projection": {"name": "gaussian", "per": "token"}, "score": {"name": "kl"}}
COMBINATIONS = covering(FITTING) | {
    f"gaussian, {algebra}-kl-{reach}-none": FRAMED
    | {"projection": FRAMED["projection"] | {"frames": algebra}}
    | {"reach": {"name": reach}, "mixer": {"name": "none"}}
    for algebra, reach in (("so", "full"), ("gl", "others"))
}


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
    for kind, found in (("fitting", FITTING), ("refused", REFUSED)):
        if kind in metafunc.fixturenames:
            metafunc.parametrize(kind, found.values(), ids=found)


@pytest.fixture
def masked(combination):
    """Whether the layer takes any mask; a reach that condenses sees a group as a whole."""
    return COMBINATIONS[combination]["reach"]["name"] != "hierarchical"


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


@pytest.fixture
def names_of():
    """Names of the variants of a package."""
    return discover.names
