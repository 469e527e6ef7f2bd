"""Block finding: blocks of letters, then some letters of one of them; which block was it?

    d k l s r . g p a m f . ... . r m z x q # a g g p a m f

One block alone holds all letters of the question; what is asked for is that block, letter by
letter. A head that looks for one letter finds it in many blocks: to find the right one, what heads
look for has to meet.
Source: Golovneva et al., Multi-Token Attention, arXiv 2504.00927, the toy task of section 4, and
the generator published with it: 52 blocks of 5 of 26 letters, questions of 2, as by default here.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from sixfold.contracts import Batch
from sixfold.data._questions import Questions, asked, distinct
from sixfold.errors import DataError


def build(
    *,
    letters: int = 26,
    block: int = 5,
    query: int = 2,
    blocks: int = 52,
    validation: int = 1000,
    seed: int = 0,
) -> Questions:
    """Inputs and targets (N, blocks * (block + 1) + query + block - 1), int64.

    Letters are [0, letters), then come the separator and the mark of a question. No letter stands
    twice in a block; the letters of a question come in any order.

    Raises DataError for a block without room for the question or longer than the alphabet, and for
    several blocks that would all hold every letter.

    >>> data = build(letters=6, block=3, query=2, blocks=2)
    >>> inputs, targets = data.train_batch(seed=0, step=0, size=1)
    >>> inputs.tolist()
    [[3, 1, 4, 6, 2, 5, 3, 7, 3, 4, 3, 1]]
    >>> targets.tolist()
    [[-100, -100, -100, -100, -100, -100, -100, -100, -100, 3, 1, 4]]
    """
    if not 1 <= query <= block <= letters:
        raise DataError(
            "needs 1 <= query <= block <= letters, not "
            f"query {query}, block {block}, letters {letters}"
        )
    if blocks < 1 or (blocks > 1 and block == letters):
        raise DataError(
            f"blocks must be 1 or more, and 1 where a block holds every letter; got {blocks} "
            f"blocks of {block} of {letters} letters"
        )
    sequences = partial(draw, letters=letters, block=block, query=query, blocks=blocks)
    context = blocks * (block + 1) + query + block - 1
    return Questions(sequences, letters + 2, context, validation, seed)


def miniature(*, seed: int = 0) -> Questions:
    """The same with three blocks of 3 of 8 letters; 32 sequences for validation."""
    return build(letters=8, block=3, query=2, blocks=3, validation=32, seed=seed)


def draw(
    rng: np.random.Generator, count: int, *, letters: int, block: int, query: int, blocks: int
) -> Batch:
    """`count` sequences."""
    sought = distinct(rng, (count, block), letters)
    question = np.take_along_axis(sought, distinct(rng, (count, query), block), 1)
    found = distinct(rng, (count, blocks, block), letters)
    while len(again := np.argwhere(holding(found, question))):
        found[again[:, 0], again[:, 1]] = distinct(rng, (len(again), block), letters)
    found[np.arange(count), rng.integers(0, blocks, count)] = sought
    ended = np.concatenate([found, np.full((count, blocks, 1), letters)], axis=2)
    ended[:, -1, -1] = letters + 1
    sequences = np.concatenate([ended.reshape(count, -1), question, sought], axis=1)
    first = blocks * (block + 1) + query - 1
    return asked(sequences, np.tile(np.arange(first, first + block), (count, 1)))


def holding(blocks: np.ndarray, question: np.ndarray) -> np.ndarray:
    """Which blocks (N, blocks, block) hold every letter of their question (N, query)."""
    return (blocks[:, :, :, None] == question[:, None, None, :]).any(2).all(2)
