import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sixfold.contracts import Batch
from sixfold.data._kinds import LabelledExamples, States, TokenStream
from sixfold.errors import DataError


class Counting:
    """A stand-in tokenizer: only its size is asked for."""

    def __init__(self, vocab_size):
        self.vocab_size = vocab_size


def ramp(train, validation, context):
    """A text whose every token is its own position."""
    size = max(train, validation)
    return TokenStream(torch.arange(train), torch.arange(validation), context, Counting(size))


def numbered(count):
    numbers = torch.arange(count)
    return Batch(numbers[:, None].float(), numbers)


def labelled(count):
    return LabelledExamples(numbered(count), numbered(count), num_classes=count)


def states(count):
    examples = Batch(numbered(count).inputs, -numbered(count).inputs)
    return States(examples, examples)


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("data", [ramp(500, 50, 8), labelled(50), states(50)])
def test_a_batch_depends_on_seed_and_step_alone(data):
    in_order = [data.train_batch(3, step, 16) for step in range(20)]
    for step in (13, 2, 19, 2, 0):
        assert same(data.train_batch(3, step, 16), in_order[step])
    others = [data.train_batch(4, 2, 16), *in_order[:2], *in_order[3:]]
    assert not any(same(in_order[2], other) for other in others)


def test_seeds_beyond_32_bits_and_neighbouring_steps_do_not_collide():
    data = ramp(5000, 50, 8)
    keys = [(0, 0), (0, 1), (1, 0), (1, 1), (2**32, 0), (2**32, 1), (1 + 2**32, 0)]
    drawn = {tuple(data.train_batch(seed, step, 8).inputs[:, 0].tolist()) for seed, step in keys}
    assert len(drawn) == len(keys)


@given(text=st.integers(2, 60), context=st.integers(1, 59), step=st.integers(0, 10**9))
def test_a_window_is_adjacent_text_and_its_targets_are_one_ahead(text, context, step):
    data = ramp(text, 2, min(context, text - 1))
    inputs, targets = data.train_batch(0, step, 5)
    assert inputs.shape == targets.shape == (5, data.context)
    assert torch.equal(inputs, inputs[:, :1] + torch.arange(data.context))
    assert torch.equal(targets, inputs + 1)


def test_windows_start_everywhere_equally_often():
    starts = ramp(14, 2, 4).train_batch(0, 0, 20_000).inputs[:, 0]
    counts = torch.bincount(starts, minlength=10)
    assert len(counts) == 10
    # 2,000 expected per start, standard deviation 42
    assert (counts - 2000).abs().max() < 5 * 42.5


@given(text=st.integers(2, 80), context=st.integers(1, 79), size=st.integers(1, 9))
def test_every_validation_target_comes_exactly_once(text, context, size):
    batches = list(ramp(100, text, context).validation_batches(size))
    assert all(torch.equal(b.targets, b.inputs + 1) for b in batches)
    assert all(b.inputs.shape[0] <= size and b.inputs.shape[1] <= context for b in batches)
    assert torch.equal(torch.cat([b.targets.flatten() for b in batches]), torch.arange(1, text))


@given(count=st.integers(1, 40), size=st.integers(1, 90), seed=st.integers(0, 2**40))
def test_every_epoch_holds_every_example_exactly_once(count, size, seed):
    data, epochs = labelled(count), 4
    steps = -(-epochs * count // size)
    batches = [data.train_batch(seed, step, size) for step in range(steps)]
    assert all(len(b.targets) == size for b in batches)
    assert all(torch.equal(b.inputs[:, 0].long(), b.targets) for b in batches)
    stream = torch.cat([b.targets for b in batches])
    for epoch in stream[: epochs * count].view(epochs, count):
        assert torch.equal(epoch.sort().values, torch.arange(count))


def test_epochs_and_seeds_have_their_own_order():
    data = labelled(50)
    orders = {tuple(data.train_batch(s, e, 50).targets.tolist()) for s in (0, 1) for e in (0, 1, 2)}
    assert len(orders) == 6


@pytest.mark.parametrize("data", [labelled(23), states(23)])
def test_validation_holds_every_example_once_in_order(data):
    batches = list(data.validation_batches(5))
    assert [len(b.inputs) for b in batches] == [5, 5, 5, 5, 3]
    assert same(map(torch.cat, zip(*batches, strict=True)), data.validation)


@pytest.mark.parametrize("data", [ramp(50, 50, 4), labelled(9), states(9)])
def test_a_batch_needs_a_size(data):
    with pytest.raises(DataError, match="size must be at least 1, not 0"):
        data.train_batch(0, 0, 0)
    with pytest.raises(DataError, match="size must be at least 1, not 0"):
        list(data.validation_batches(0))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((8, 8, 8), "train text has 8 tokens, but a context of 8 needs 9.*a shorter context"),
        ((9, 1, 8), "validation text has 1 tokens"),
        ((9, 9, 0), "context must be at least 1, not 0"),
    ],
)
def test_a_text_too_short(sizes, message):
    with pytest.raises(DataError, match=message):
        ramp(*sizes)
    assert ramp(9, 2, 8).train_batch(0, 0, 1).inputs.tolist() == [list(range(8))]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([0, 1, 7, -1]), r"lie in \[0, 3\), but 2 do not; the first is 7 at index 2"),
        (torch.zeros(4), "must be a 1-D int64 tensor, not 1-D torch.float32"),
        (torch.zeros(4, 1).long(), "must be a 1-D int64 tensor, not 2-D torch.int64"),
    ],
)
def test_ids_outside_the_vocabulary(ids, message):
    with pytest.raises(DataError, match=message):
        TokenStream(ids, torch.tensor([0, 1]), 2, Counting(3))


@pytest.mark.parametrize("broken", ["train", "validation"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_are_counted_and_placed(broken, value):
    parts = {"train": numbered(6), "validation": numbered(6)}
    inputs = torch.zeros(6, 3)
    inputs[2, 1] = inputs[5, 0] = value
    parts[broken] = Batch(inputs, parts[broken].targets)
    message = rf"{broken} inputs hold 2 NaN or infinite values, the first at index \(2, 1\)"
    with pytest.raises(DataError, match=message):
        LabelledExamples(**parts, num_classes=6)
    parts[broken] = Batch(torch.zeros(6, 3), inputs)
    with pytest.raises(DataError, match=f"{broken} targets hold 2 NaN"):
        States(**parts)


def test_empty_unequal_and_mislabelled_examples():
    with pytest.raises(DataError, match="validation has no examples"):
        LabelledExamples(numbered(3), numbered(0), num_classes=3)
    with pytest.raises(DataError, match="train has 3 inputs, but 2 targets"):
        States(Batch(torch.zeros(3, 1), torch.zeros(2, 1)), numbered(3))
    with pytest.raises(DataError, match=r"train labels .* \[0, 2\), .* the first is 2 at index 2"):
        LabelledExamples(numbered(3), numbered(2), num_classes=2)
    ids = Batch(torch.tensor([[0, 5]]), torch.tensor([0]))
    with pytest.raises(DataError, match=r"train tokens must lie in \[0, 5\)"):
        LabelledExamples(ids, ids, num_classes=1, tokenizer=Counting(5))
