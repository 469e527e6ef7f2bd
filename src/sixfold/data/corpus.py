"""Your own text: one file, or the ``*.txt`` files of a folder in sorted order."""

from __future__ import annotations

from pathlib import Path

from sixfold.data._kinds import TokenStream
from sixfold.data._text import generated_text, token_stream
from sixfold.errors import DataError, DataMissing


def build(
    *,
    path: str | Path,
    context: int = 64,
    tokenizer: str = "characters",
    vocab_size: int | None = None,
    validation_fraction: float = 0.1,
) -> TokenStream:
    """The text at `path` as tokens; the last `validation_fraction` is for validation.

    Raises DataMissing when nothing is at `path`, DataError for an empty or too short text or one
    that is not UTF-8, ValueError for an unknown tokenizer.
    """
    return token_stream(read(path), context, tokenizer, vocab_size, validation_fraction)


def read(path: str | Path) -> str:
    """The text of a file, or of a folder's ``*.txt`` files one after another.

    Raises DataMissing when nothing is at `path`, DataError when the text is empty or not UTF-8.
    """
    path = Path(path)
    if not path.exists():
        raise DataMissing(f"there is no file or folder {path.absolute()}")
    found = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    text = "".join(_decode(file) for file in found)
    if not text:
        what = f"its {len(found)} *.txt files hold" if path.is_dir() else "the file holds"
        raise DataError(f"the corpus {path} is empty: {what} no text")
    return text


def miniature(*, context: int = 16, seed: int = 0) -> TokenStream:
    """A generated text of 200 lines as characters."""
    return token_stream(generated_text(seed, 200), context, "characters", None, 0.1)


def _decode(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file} is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}; "
            "convert the file to UTF-8"
        ) from error
