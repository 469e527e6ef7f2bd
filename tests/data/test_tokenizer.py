import importlib
import json
import sys

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from sixfold import discover
from sixfold.data import shakespeare
from sixfold.data.tokenizer import bpe, characters, words
from sixfold.data.tokenizer._file import load_tokenizer, save_tokenizer
from sixfold.errors import DataError, DataMissing

NAMES = discover.names("sixfold.data.tokenizer")
LINES = "to be, or not to be: that is the question.\n" * 20
BYTE_PAIRS = bpe.build(LINES, vocab_size=300)


@pytest.fixture(params=NAMES)
def module(request):
    return importlib.import_module(f"sixfold.data.tokenizer.{request.param}")


def test_ids_come_back_after_json_and_file(module, tmp_path):
    codec = module.build(LINES)
    save_tokenizer(codec, tmp_path / "t.json")
    kind = json.loads((tmp_path / "t.json").read_text())["kind"]
    assert kind == module.__name__.rpartition(".")[2]
    for copy in (module.from_json(codec.to_json()), load_tokenizer(tmp_path / "t.json")):
        assert type(copy) is type(codec)
        assert copy.vocab_size == codec.vocab_size
        assert torch.equal(copy.encode(LINES), codec.encode(LINES))
        assert copy.decode(codec.encode(LINES)) == codec.decode(codec.encode(LINES))


def test_ids_are_int64_below_the_vocabulary_size(module):
    codec = module.build(LINES)
    ids = codec.encode(LINES)
    assert ids.dtype == torch.int64 and ids.ndim == 1
    assert ids.min() >= 0 and ids.max() < codec.vocab_size
    assert codec.encode("").tolist() == []
    assert codec.decode([]) == ""


def test_ids_outside_are_named(module):
    codec = module.build(LINES)
    for strange in (-1, codec.vocab_size):
        with pytest.raises(DataError, match=f"id {strange} at index 1 is outside"):
            codec.decode([2, strange])


def test_building_is_repeatable_and_needs_text(module):
    assert module.build(LINES).to_json() == module.build(LINES).to_json()
    with pytest.raises(DataError, match="give a text"):
        module.build("")


@given(st.text(st.characters(exclude_categories=[]), min_size=1))
@example("\ud800 is half a pair")
def test_characters_round_trip(text):
    codec = characters.build(text)
    assert codec.decode(codec.encode(text)) == text
    assert codec.vocab_size == len(set(text))
    assert characters.from_json(codec.to_json()) == codec


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_byte_pairs_round_trip_text_never_seen(text):
    ids = BYTE_PAIRS.encode(text)
    assert BYTE_PAIRS.decode(ids) == text
    assert len(ids) <= len(text.encode())


def test_words_round_trip_when_known_and_single_spaced():
    codec = words.build(LINES)
    assert codec.decode(codec.encode("that is to be,")) == "that is to be,"
    assert codec.decode(codec.encode("that was")) == "that <unknown>"
    assert codec.decode([0, *codec.encode("that is"), 0]) == "that is"
    assert words.build("a b b c c c", vocab_size=4).words == ("c", "b")


@pytest.mark.parametrize("text", ["be z", "be \N{SNOWMAN}", "be \0"])
def test_a_strange_character_is_named(text):
    with pytest.raises(DataError) as caught:
        characters.build(LINES).encode(text)
    assert f"{text[-1]!r} at index 3" in str(caught.value)


@pytest.mark.parametrize("alphabet", ["ba", "aa"])
def test_an_alphabet_is_sorted_and_unique(alphabet):
    with pytest.raises(DataError, match="sorted and hold no character twice"):
        characters.Characters(alphabet)


def test_a_word_is_held_once():
    with pytest.raises(DataError, match="no word twice"):
        words.Words(("a", "a"))


def test_byte_pairs_compress():
    text = shakespeare.miniature().tokenizer.alphabet + LINES
    sizes = [len(bpe.build(LINES, vocab_size=size).encode(text)) for size in (256, 270, 300)]
    assert len(text) == sizes[0] > sizes[1] > 1.5 * sizes[2]


def test_vocabulary_sizes():
    assert bpe.build(LINES, vocab_size=270).vocab_size == 270
    assert words.build(LINES, vocab_size=5).vocab_size == 5
    with pytest.raises(DataError, match="at least the 256 bytes, not 255"):
        bpe.build(LINES, vocab_size=255)
    with pytest.raises(DataError, match="at least 3"):
        words.build(LINES, vocab_size=2)
    with pytest.raises(DataError, match="leave vocab_size out, or use 'bpe'"):
        characters.build(LINES, vocab_size=99)


def test_the_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"pip install 'sixfold\[text\]'"):
        bpe.build(LINES)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"kind": "bpe"}', "\x00"])
def test_a_file_that_is_no_tokenizer(tmp_path, content):
    path = tmp_path / "t.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"t\.json is not a tokenizer that save_tokenizer wrote"):
        load_tokenizer(path)


def test_a_file_of_an_unknown_kind_and_no_file(tmp_path):
    path = tmp_path / "t.json"
    path.write_text('{"kind": "character", "tokenizer": {}}')
    with pytest.raises(DataError, match="Did you mean 'characters'"):
        load_tokenizer(path)
    with pytest.raises(DataMissing, match="no tokenizer at"):
        load_tokenizer(tmp_path / "absent.json")
