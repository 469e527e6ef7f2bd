"""Associative recall and block finding, held to solvers that read nothing but the inputs."""

import itertools
from collections import Counter

import pytest
import torch

from sixfold.contracts import Batch
from sixfold.data import associative_recall, block_finding
from sixfold.errors import DataError
from sixfold.train.objective import compare

BOTH = pytest.mark.parametrize("task", [associative_recall, block_finding])


def rows(batch):
    return zip(*(x.tolist() for x in batch), strict=True)


def close(share, expected, count):
    """Within five standard deviations of a share of `count` draws."""
    return abs(share - expected) < 5 * (expected * (1 - expected) / count) ** 0.5


# ---------------------------------------------------------------- associative recall


def test_a_dictionary_of_the_first_pairs_answers_everything():
    pairs = 5
    data = associative_recall.build(vocab_size=40, pairs=pairs, length=36)
    for inputs, targets in rows(data.train_batch(seed=3, step=8, size=200)):
        known = dict(zip(inputs[: 2 * pairs : 2], inputs[1 : 2 * pairs : 2], strict=True))
        asked = [place for place, target in enumerate(targets) if target != -100]
        assert [targets[place] for place in asked] == [known[inputs[place]] for place in asked]
        assert sorted(inputs[place] for place in asked) == sorted(known)
        assert all(place >= 2 * pairs and place % 2 == 0 for place in asked)
        assert len(set(known.values())) == pairs
        assert max(known) < 20 <= min(known.values()) and max(known.values()) < 40


def test_questions_come_by_the_power_law_without_replacement():
    """Which of three slots hold the two questions, and in which order, of weights g^(a - 1)."""
    count, power = 20_000, 0.2
    data = associative_recall.build(vocab_size=4, pairs=2, length=10, power=power)
    _, targets = data.train_batch(seed=0, step=0, size=count)
    slots = (targets[:, 4::2] != -100).nonzero()[:, 1].view(count, 2)
    weights = [g ** (power - 1) for g in (1, 2, 3)]
    for pair in itertools.combinations(range(3), 2):
        share = (slots == torch.tensor(pair)).all(1).float().mean().item()
        first, second = (weights[slot] / sum(weights) for slot in pair)
        assert close(share, first * second / (1 - first) + second * first / (1 - second), count)


def test_keys_do_not_tell_their_values():
    count = 20_000
    data = associative_recall.build(vocab_size=8, pairs=2, length=8)
    inputs, _ = data.train_batch(seed=0, step=0, size=count)
    seen = Counter(map(tuple, inputs[:, :2].tolist()))
    assert len(seen) == 16
    assert all(close(times / count, 1 / 16, count) for times in seen.values())


# ---------------------------------------------------------------- block finding


@pytest.mark.parametrize(
    ("letters", "block", "query"), [(8, 3, 2), (26, 5, 2), (6, 4, 3), (5, 2, 1)]
)
def test_one_block_alone_holds_the_question_and_is_the_answer(letters, block, query):
    blocks = 6
    data = block_finding.build(letters=letters, block=block, query=query, blocks=blocks)
    assert data.vocab_size == letters + 2
    for inputs, targets in rows(data.train_batch(seed=1, step=5, size=200)):
        mark = inputs.index(letters + 1)
        question = inputs[mark + 1 : mark + 1 + query]
        found = "".join(map(chr, inputs[:mark])).split(chr(letters))
        assert [len(set(text)) for text in found] == [block] * blocks
        right = [text for text in found if all(chr(letter) in text for letter in question)]
        answer = [ord(letter) for text in right for letter in text]
        assert targets == [-100] * (mark + query) + answer
        assert inputs[mark + 1 + query :] == answer[:-1]


def test_blocks_and_questions_are_uniform():
    """All ways to draw two blocks of 2 of 4 letters, a question of one, and the place."""
    count = 60_000
    data = block_finding.build(letters=4, block=2, query=1, blocks=2)
    inputs, _ = data.train_batch(seed=0, step=0, size=count)
    seen = Counter(map(tuple, inputs[:, [0, 1, 3, 4, 6]].tolist()))
    words = list(itertools.permutations(range(4), 2))
    # which block is sought, where it stands, which of its letters is asked, and the other block
    ways = {
        (*((one + other) if first else (other + one)), letter)
        for one in words
        for letter in one
        for other in words
        if letter not in other
        for first in (True, False)
    }
    assert set(seen) == ways and len(ways) == 12 * 2 * 6 * 2
    assert all(close(times / count, 1 / len(ways), count) for times in seen.values())


def test_a_question_comes_in_every_order():
    count = 20_000
    data = block_finding.build(letters=5, block=3, query=2, blocks=2)
    inputs, targets = data.train_batch(seed=0, step=0, size=count)
    answer, question = targets[:, -3:], inputs[:, -4:-2]
    places = (question[:, :, None] == answer[:, None, :]).long().argmax(2)
    seen = Counter(map(tuple, places.tolist()))
    assert set(seen) == set(itertools.permutations(range(3), 2))
    assert all(close(times / count, 1 / 6, count) for times in seen.values())


# ---------------------------------------------------------------- both


@BOTH
def test_what_is_asked_for_is_the_next_token(task):
    inputs, targets = task.miniature().train_batch(seed=0, step=0, size=50)
    told = targets[:, :-1] != -100
    assert torch.equal(inputs[:, 1:][told], targets[:, :-1][told])
    assert inputs.dtype == targets.dtype == torch.int64


@BOTH
def test_seed_step_and_world_decide_a_batch(task):
    data, again, other = task.miniature(), task.miniature(), task.miniature(seed=1)
    batch = data.train_batch(2, 7, 4)
    assert all(map(torch.equal, batch, again.train_batch(2, 7, 4)))
    for another in (
        data.train_batch(2, 8, 4), data.train_batch(3, 7, 4), other.train_batch(2, 7, 4),
        Batch(data.validation.inputs[:4], data.validation.targets[:4]),
    ):  # fmt: skip
        assert not torch.equal(batch.inputs, another.inputs)
    assert not torch.equal(data.validation.inputs, other.validation.inputs)


@BOTH
def test_a_model_of_the_sizes_told_can_be_judged(task):
    """Sure of every answer and of nothing else: no loss; uniform: the logarithm of the vocabulary."""
    data = task.miniature()
    (batch,) = data.validation_batches(1000)
    assert batch.inputs.shape == batch.targets.shape == (32, data.context)
    assert int(batch.inputs.min()) >= 0 and int(batch.inputs.max()) < data.vocab_size
    sure = 100 * torch.nn.functional.one_hot(batch.targets.clamp(min=0), data.vocab_size)
    assert float(compare(data.objective, sure, batch)) == 0
    uniform = torch.zeros(sure.shape)
    expected = torch.tensor(float(data.vocab_size)).log()
    torch.testing.assert_close(compare(data.objective, uniform, batch), expected)


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        (associative_recall, {"pairs": 0}, "got length 64, pairs 0"),
        (associative_recall, {"pairs": 3, "length": 10}, r"4 \* pairs = 12 or more.*got length 10"),
        (associative_recall, {"length": 63}, "must be even.*got length 63"),
        (associative_recall, {"vocab_size": 7}, r"vocab_size must be 2 \* pairs = 8 or more, not 7"),
        (associative_recall, {"power": 0.0}, "power must be positive, not 0.0"),
        (associative_recall, {"validation": 0}, "validation must be at least 1 sequence, not 0"),
        (block_finding, {"query": 6}, "query 6, block 5, letters 26"),
        (block_finding, {"query": 0}, "query 0, block 5, letters 26"),
        (block_finding, {"letters": 4}, "query 2, block 5, letters 4"),
        (block_finding, {"letters": 5}, "got 52 blocks of 5 of 5 letters"),
        (block_finding, {"blocks": 0}, "got 0 blocks of 5 of 26 letters"),
    ],
)  # fmt: skip
def test_impossible_requests(task, options, message):
    with pytest.raises(DataError, match=message):
        task.build(**options)


@BOTH
def test_no_empty_batches(task):
    for call in (lambda data: data.train_batch(0, 0, 0), lambda data: data.validation_batches(0)):
        with pytest.raises(DataError, match="size must be at least 1, not 0"):
            call(task.miniature())
