"""SST-2: phrases of film reviews, negative (0) or positive (1).

Socher et al. 2013, https://nlp.stanford.edu/sentiment. Validate on ``test``: test.tsv is GLUE's dev
set of 872 whole sentences, the one that papers report. train.tsv and dev.tsv are both cut from
GLUE's *train* phrases, and of 300 dev phrases of four words or more, 251 stood inside a train
phrase: a score on ``dev`` flatters. In GLUE's own download the 872 are dev.tsv; ask for ``dev``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from sixfold import discover
from sixfold.contracts import Batch
from sixfold.data._kinds import LabelledExamples, Tokenizer
from sixfold.data._root import find
from sixfold.errors import DataError

PAD = 0
"""The id that fills a row after its last token; no tokenizer here gives it to a token."""

FILES = tuple(f"sst2/{part}.tsv" for part in ("train", "dev", "test"))
HOME = "https://gluebenchmark.com/tasks (SST-2; two columns, sentence and label, under a header)"

Labelled = list[tuple[str, int]]


def build(
    *,
    length: int = 64,
    tokenizer: Literal["words", "characters"] = "words",
    vocab_size: int | None = None,
    validation: Literal["test", "dev"] = "test",
) -> LabelledExamples:
    """Token ids (N, length) with labels (N,): 60,614 phrases train, 872 (dev: 6,735) validate.

    A longer phrase loses its end; a shorter one is filled with `PAD`. Words are learned from
    train.tsv alone, and a word that is not there is id 1.

    Raises DataMissing without ``sst2/*.tsv``, DataError for a line that is not a phrase and 0 or 1.
    """
    if validation not in ("dev", "test"):
        raise DataError(discover.unknown("validation part", validation, ("dev", "test")))
    train, rest = (read(find(f"sst2/{part}.tsv", HOME)) for part in ("train", validation))
    return _examples(train, rest, length, tokenizer, vocab_size)


def read(path: Path) -> Labelled:
    """Phrases and labels of a ``sentence<TAB>label`` file with a header.

    Raises DataError naming the first line that is neither.
    """
    header, *lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    if header != "sentence\tlabel":
        raise DataError(f"{path} must begin with 'sentence<TAB>label', not {header!r}")
    rows = [line.split("\t") for line in lines]
    for number, row in enumerate(rows, start=2):
        if len(row) != 2 or row[1] not in ("0", "1"):
            raise DataError(f"{path}, line {number}: not a phrase, a tab and 0 or 1: {row}")
    return [(phrase, int(label)) for phrase, label in rows]


def miniature(*, length: int = 16, seed: int = 0) -> LabelledExamples:
    """Generated phrases (N, length) as words: 80 for training, 20 for validation.

    >>> data = miniature()
    >>> data.tokenizer.decode(data.train.inputs[0]), int(data.train.targets[0])
    ('a flat film', 0)
    """
    rng = np.random.default_rng(seed)
    praise, blame = ("warm", "witty", "bold"), ("dull", "flat", "stale")
    nouns = ("film", "plot", "cast")
    rows = [
        (f"a {rng.choice((blame, praise)[label])} {rng.choice(nouns)}", label)
        for label in rng.permutation(100) % 2
    ]
    return _examples(rows[:80], rows[80:], length, "words", None)


def _examples(
    train: Labelled, validation: Labelled, length: int, tokenizer: str, vocab_size: int | None
) -> LabelledExamples:
    if tokenizer not in ("words", "characters"):
        raise DataError(discover.unknown("tokenizer", tokenizer, ("words", "characters")))
    if length < 1:
        raise DataError(f"length must be at least 1, not {length}")
    build = discover.load("sixfold.data.tokenizer", tokenizer)
    # "\0" sorts first and so is PAD; an alphabet is no statistic, so both parts may add to it
    seen = ["\0", *(p for p, _ in train + validation)]
    source = "".join(seen) if tokenizer == "characters" else "\n".join(p for p, _ in train)
    codec = build(source, vocab_size=vocab_size)
    first, rest = (
        Batch(_padded(rows, codec, length), _labels(rows)) for rows in (train, validation)
    )
    return LabelledExamples(first, rest, num_classes=2, tokenizer=codec)


def _padded(rows: Labelled, codec: Tokenizer, length: int) -> Tensor:
    filled = torch.full((len(rows), length), PAD)
    for row, (phrase, _) in zip(filled, rows, strict=True):
        ids = codec.encode(phrase)[:length]
        row[: len(ids)] = ids
    return filled


def _labels(rows: Labelled) -> Tensor:
    return torch.tensor([label for _, label in rows], dtype=torch.int64)
