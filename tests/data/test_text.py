import re

import pytest
import torch

from sixfold.data import corpus, shakespeare
from sixfold.data._text import token_stream
from sixfold.data.tokenizer import bpe
from sixfold.errors import DataError, DataMissing

LINES = "to be, or not to be: that is the question.\n" * 40


def test_shakespeare_has_the_sizes_of_nanogpt():
    data = shakespeare.build()
    assert (data.vocab_size, len(data.train), len(data.validation)) == (65, 1_003_854, 111_540)
    # the 65 characters as nanoGPT's prepare script prints them
    alphabet = "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
    assert data.tokenizer.alphabet == alphabet
    assert data.tokenizer.decode(data.train[:14]) == "First Citizen:"
    assert data.tokenizer.decode(data.validation[-15:]) == "ou art waking.\n"


def test_shakespeare_as_byte_pairs_is_shorter_and_comes_back():
    data = shakespeare.build(tokenizer="bpe", vocab_size=512)
    assert data.vocab_size == 512
    assert len(data.train) < 0.6 * 1_003_854
    text = data.tokenizer.decode(torch.cat([data.train, data.validation]))
    assert (len(text), text[:14]) == (1_115_394, "First Citizen:")


def test_byte_pairs_learn_from_the_train_part_only():
    held_out = "zq" * 50
    data = token_stream("abab" * 225 + held_out, 8, "bpe", 262, 0.1)
    assert data.tokenizer.to_json() == bpe.build("abab" * 225, vocab_size=262).to_json()
    assert len(data.train) < 900 / 2
    assert len(data.validation) == len(held_out)


def test_characters_of_the_held_out_part_are_known():
    data = token_stream("a" * 18 + "b\N{SNOWMAN}", 8, "characters", None, 0.1)
    assert data.tokenizer.decode(data.validation) == "b\N{SNOWMAN}"


@pytest.mark.parametrize("fraction", [0, 1, -0.5, float("nan")])
def test_the_fraction_lies_between(fraction):
    with pytest.raises(DataError, match=r"validation_fraction must lie in \(0, 1\)"):
        shakespeare.build(validation_fraction=fraction)


def test_an_unknown_tokenizer_lists_the_known_ones():
    with pytest.raises(ValueError, match="choose from: bpe, characters, words"):
        shakespeare.build(tokenizer="letters")


def test_corpus_reads_a_file_and_a_folder_in_sorted_order(tmp_path):
    for name, part in (("b.txt", "\u00e9" * 100), ("a.txt", LINES), ("c.md", "not text")):
        (tmp_path / name).write_text(part, encoding="utf-8")
    assert corpus.read(str(tmp_path / "a.txt")) == LINES
    assert corpus.read(tmp_path) == LINES + "\u00e9" * 100
    data = corpus.build(path=tmp_path, context=8, validation_fraction=0.2)
    cut = int(len(LINES + "\u00e9" * 100) * 0.8)
    assert data.tokenizer.decode(data.train) == (LINES + "\u00e9" * 100)[:cut]
    assert data.tokenizer.decode(data.validation) == (LINES + "\u00e9" * 100)[cut:]


def test_corpus_errors_name_the_place(tmp_path):
    with pytest.raises(DataMissing, match=re.escape(str(tmp_path / "absent"))):
        corpus.build(path=tmp_path / "absent")
    with pytest.raises(DataError, match=r"is empty: its 0 \*\.txt files hold no text"):
        corpus.build(path=tmp_path)
    file = tmp_path / "a.txt"
    file.write_bytes(b"")
    with pytest.raises(DataError, match="is empty: the file holds no text"):
        corpus.build(path=file)
    file.write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(DataError, match=r"a\.txt is not UTF-8: byte 3 is 0xe9"):
        corpus.build(path=file)
    file.write_text("short")
    with pytest.raises(DataError, match=r"4 tokens, but a context of 64 needs 65.*shorter context"):
        corpus.build(path=file)
