"""What every loader owes, whatever its name."""

import importlib
import inspect

import pytest
import torch

from sixfold import discover
from sixfold.data._questions import IGNORED, Questions

NAMES = discover.names("sixfold.data")


@pytest.fixture(params=NAMES)
def loader(request):
    return importlib.import_module(f"sixfold.data.{request.param}")


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_loaders_are_those_promised():
    promised = {"shakespeare", "corpus", "digits", "fashion_mnist", "cifar10", "sst2", "heat"}
    assert promised <= set(NAMES)


def test_options_are_keywords_and_build_is_what_discover_loads(loader):
    for function in (loader.build, loader.miniature):
        kinds = {p.kind for p in inspect.signature(function).parameters.values()}
        assert kinds <= {inspect.Parameter.KEYWORD_ONLY}
    assert discover.load("sixfold.data", loader.__name__.rpartition(".")[2]) is loader.build


def test_the_miniature_is_small_and_seeded(loader):
    one, again, other = loader.miniature(), loader.miniature(seed=0), loader.miniature(seed=1)
    assert same(one.train_batch(0, 0, 8), again.train_batch(0, 0, 8))
    assert not same(one.train_batch(0, 0, 8), other.train_batch(0, 0, 8))
    size = sum(b.inputs.numel() for b in one.validation_batches(8))
    assert size < 100_000


def test_train_batches_are_stateless(loader):
    data = loader.miniature()
    late, early = data.train_batch(7, 11, 6), data.train_batch(7, 1, 6)
    assert same(data.train_batch(7, 11, 6), late)
    assert not same(early, late)
    assert len(late.inputs) == len(late.targets) == 6


def test_validation_does_not_depend_on_the_batch_size(loader):
    data = loader.miniature()
    by_one, by_many = (list(data.validation_batches(size)) for size in (1, 1000))
    for position in (0, 1):
        one, many = (
            torch.cat([b[position].flatten() for b in batches]) for batches in (by_one, by_many)
        )
        assert torch.equal(one, many)


def test_batches_fit_the_objective(loader):
    data = loader.miniature()
    inputs, targets = data.train_batch(0, 0, 5)
    assert torch.isfinite(inputs).all()
    match data.objective:
        case "tokens":
            assert inputs.dtype == targets.dtype == torch.int64
            asked = targets[:, :-1] != IGNORED
            assert asked.all() or isinstance(data, Questions)
            assert torch.equal(inputs[:, 1:][asked], targets[:, :-1][asked])
            assert inputs.min() >= 0 and inputs.max() < data.vocab_size
        case "labels":
            assert targets.shape == (5,) and targets.dtype == torch.int64
            assert set(data.train.targets.tolist()) == set(range(data.num_classes))
        case "states":
            assert inputs.shape == targets.shape
            assert inputs.dtype == targets.dtype == torch.float32
        case other:
            raise AssertionError(other)


def test_the_miniature_can_be_learned(loader):
    """The nearest training input, or the last token, tells more than the most frequent target."""
    data = loader.miniature()
    if isinstance(data, Questions):
        pytest.skip("what no two sequences share is not learned from the nearest: see its solver")
    if data.objective == "tokens":
        pairs = torch.zeros(data.vocab_size, data.vocab_size)
        pairs.index_put_((data.train[:-1], data.train[1:]), torch.tensor(1.0), accumulate=True)
        right = (pairs.argmax(1)[data.validation[:-1]] == data.validation[1:]).float().mean()
        often = (data.validation == data.train.mode().values).float().mean()
        assert right > 2 * often
    if data.objective == "labels":
        distance = torch.cdist(
            *(x.inputs.flatten(1).float() for x in (data.validation, data.train))
        )
        guesses = data.train.targets[distance.argmin(1)]
        assert (guesses == data.validation.targets).float().mean() > 0.8
    if data.objective == "states":
        change = (data.validation.targets - data.validation.inputs).square().mean()
        assert 0.001 < change < 2 * data.validation.inputs.square().mean()
