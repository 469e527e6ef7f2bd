"""Multi-query associative recall (MQAR): keys with their values, and then some of the keys again.

    k_1 v_1 k_2 v_2 ... k_p v_p  | . . k_2 v_2 . . . . k_1 v_1 . .

The pairs come first. What follows is cut into slots of two tokens; each key is asked once more, in
a slot that is drawn by a power law: slot g = 1, 2, ... has weight g^(a - 1), so that most questions
come soon and a few late. All else is random tokens. A token is asked for where it answers a key.
Source: Arora et al., Zoology: Measuring and Improving Recall in Efficient Language Models, arXiv
2312.04927, section 3, and the generator published with it. There random tokens follow the keys
that are asked; here their values do, as in a text.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from sixfold.contracts import Batch
from sixfold.data._questions import Questions, asked, distinct
from sixfold.errors import DataError


def build(
    *,
    vocab_size: int = 256,
    pairs: int = 4,
    length: int = 64,
    power: float = 0.01,
    validation: int = 1000,
    seed: int = 0,
) -> Questions:
    """Sequences of `length` tokens: inputs and targets (N, length - 1), int64.

    Keys are the lower half of the vocabulary, values the upper; in a sequence no key and no value
    belongs to two pairs. `power` is a; 1 asks evenly.

    Raises DataError where `length` has no room for the pairs and their questions, for a vocabulary
    without that many keys, and a power that is not positive.

    >>> data = build(vocab_size=8, pairs=2, length=12)
    >>> inputs, targets = data.train_batch(seed=0, step=0, size=1)
    >>> inputs.tolist()
    [[3, 6, 1, 4, 3, 6, 0, 4, 3, 5, 1]]
    >>> targets.tolist()
    [[-100, -100, -100, -100, 6, -100, -100, -100, -100, -100, 4]]
    """
    if pairs < 1 or length < 4 * pairs or length % 2:
        raise DataError(
            f"length must be even and 4 * pairs = {4 * pairs} or more, with pairs 1 or more; "
            f"got length {length}, pairs {pairs}"
        )
    if vocab_size < 2 * pairs:
        raise DataError(f"vocab_size must be 2 * pairs = {2 * pairs} or more, not {vocab_size}")
    if not power > 0:
        raise DataError(f"power must be positive, not {power}")
    sequences = partial(draw, vocab_size=vocab_size, pairs=pairs, length=length, power=power)
    return Questions(sequences, vocab_size, length - 1, validation, seed)


def miniature(*, seed: int = 0) -> Questions:
    """The same with two pairs among 8 tokens, 12 tokens long; 32 sequences for validation."""
    return build(vocab_size=8, pairs=2, length=12, validation=32, seed=seed)


def draw(
    rng: np.random.Generator, count: int, *, vocab_size: int, pairs: int, length: int, power: float
) -> Batch:
    """`count` sequences."""
    half = vocab_size // 2
    keys = distinct(rng, (count, pairs), half)
    values = half + distinct(rng, (count, pairs), vocab_size - half)
    weights = (power - 1) * np.log(np.arange(1, length // 2 - pairs + 1))
    # the largest of the weights with Gumbel noise are a draw without replacement
    noisy = weights + rng.gumbel(size=(count, len(weights)))
    places = 2 * pairs + 2 * (-noisy).argsort(1)[:, :pairs]
    sequences = rng.integers(0, vocab_size, (count, length))
    sequences[:, 0 : 2 * pairs : 2], sequences[:, 1 : 2 * pairs : 2] = keys, values
    np.put_along_axis(sequences, places, keys, 1)
    np.put_along_axis(sequences, places + 1, values, 1)
    return asked(sequences, places)
