import pytest
import torch

from sixfold.data import sst2
from sixfold.errors import DataError

TRAIN = [("a warm film ", 1), ("a dull , dull film ", 0), ("warm ", 1)]
DEV = [("a strange film ", 0), ("a ", 1)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SIXFOLD_DATA", str(tmp_path))
    (tmp_path / "sst2").mkdir()
    for name, rows in (("train", TRAIN), ("dev", DEV), ("test", DEV[:1])):
        lines = ["sentence\tlabel", *(f"{phrase}\t{label}" for phrase, label in rows)]
        (tmp_path / f"sst2/{name}.tsv").write_text("\n".join(lines) + "\n")
    return tmp_path / "sst2"


def test_words_come_back_and_the_rest_is_padding(folder):
    data = sst2.build(length=6)
    assert data.train.inputs.shape == (3, 6)
    assert data.train.targets.tolist() == [1, 0, 1]
    decoded = [data.tokenizer.decode(row) for row in data.train.inputs]
    assert decoded == ["a warm film", "a dull , dull film", "warm"]
    assert [(row != sst2.PAD).sum().item() for row in data.train.inputs] == [3, 5, 1]
    assert data.train.inputs[2, 1:].tolist() == [sst2.PAD] * 5
    assert [data.tokenizer.decode(row) for row in data.validation.inputs] == ["a <unknown> film"]


def test_a_long_phrase_loses_its_end(folder):
    data = sst2.build(length=2)
    assert [data.tokenizer.decode(row) for row in data.train.inputs] == ["a warm", "a dull", "warm"]


def test_characters_of_both_parts_come_back(folder):
    data = sst2.build(length=30, tokenizer="characters")
    for part, rows in ((data.train, TRAIN), (data.validation, DEV[:1])):
        for ids, (phrase, _) in zip(part.inputs, rows, strict=True):
            assert data.tokenizer.decode(ids) == phrase.ljust(30, "\0")
            assert torch.equal(ids == sst2.PAD, torch.arange(30) >= len(phrase))


def test_the_vocabulary_keeps_the_frequent_words(folder):
    data = sst2.build(length=6, vocab_size=5)
    assert data.tokenizer.vocab_size == 5
    assert set(data.tokenizer.words) < {"a", "warm", "film", "dull"}


def test_the_validation_part_can_be_chosen(folder):
    assert len(sst2.build(validation="dev").validation.inputs) == 2
    with pytest.raises(DataError, match="unknown validation part 'train'; choose from: dev, test"):
        sst2.build(validation="train")


def test_wrong_options(folder):
    with pytest.raises(DataError, match="choose from: characters, words"):
        sst2.build(tokenizer="bpe")
    with pytest.raises(DataError, match="length must be at least 1, not 0"):
        sst2.build(length=0)


@pytest.mark.parametrize("row", ["no label", "a\t2", "a\tb\t1", ""])
def test_a_broken_line_is_numbered(folder, row):
    (folder / "dev.tsv").write_text(f"sentence\tlabel\na\t1\n{row}\nb\t0\n")
    with pytest.raises(DataError, match=r"dev\.tsv, line 3: not a phrase, a tab and 0 or 1"):
        sst2.build(validation="dev")


def test_a_file_without_its_header(folder):
    (folder / "train.tsv").write_text("a\t1\n")
    with pytest.raises(DataError, match=r"train\.tsv must begin with 'sentence<TAB>label'"):
        sst2.build()


@pytest.mark.data
def test_the_real_set():
    data = sst2.build()
    assert data.train.targets.bincount().tolist() == [26_786, 33_828]
    assert data.validation.targets.bincount().tolist() == [428, 444]
    assert data.tokenizer.decode(data.train.inputs[0]) == "when are bears bears and"
    # 52 words are the longest phrase, so 64 places cut nothing
    assert int((data.train.inputs != sst2.PAD).sum(1).max()) == 52
    assert len(sst2.build(validation="dev").validation.inputs) == 6735
