"""A tokenizer as one JSON file; its "kind" is the name of the module that reads it."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

from sixfold import discover
from sixfold.data._kinds import Tokenizer
from sixfold.errors import DataError, DataMissing

_PACKAGE = "sixfold.data.tokenizer"


def save_tokenizer(tokenizer: Tokenizer, path: str | Path) -> None:
    """Write `tokenizer` to `path` as ``{"kind": ..., "tokenizer": ...}``."""
    kind = type(tokenizer).__module__.rpartition(".")[2]
    content = {"kind": kind, "tokenizer": json.loads(tokenizer.to_json())}
    Path(path).write_text(json.dumps(content), encoding="utf-8")


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer that `save_tokenizer` wrote to `path`.

    Raises DataMissing without the file, DataError for anything but such a file or an unknown kind.
    """
    path = Path(path)
    if not path.is_file():
        raise DataMissing(f"there is no tokenizer at {path}; save_tokenizer writes one")
    try:
        content = json.loads(path.read_bytes())
        kind, payload = content["kind"], content["tokenizer"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not a tokenizer that save_tokenizer wrote") from error
    known = discover.names(_PACKAGE)
    if kind not in known:
        raise DataError(discover.unknown(f"tokenizer in {path}", kind, known))
    return importlib.import_module(f"{_PACKAGE}.{kind}").from_json(json.dumps(payload))
