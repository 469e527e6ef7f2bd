"""Models as folders: ``model.safetensors`` holds the weights, ``model.json`` what they belong to.

    {"format": 1, "kind": "language", "class": "LanguageModel",
     "arguments": {"vocab_size": 65, ...}, "sha256": "..."}

`kind` is a file of this package, `arguments` are those its class was built with, and every class
here keeps them as its attribute of that name. Nothing is unpickled or imported by a file's order:
a folder from a stranger is data.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sixfold.discover import load as find
from sixfold.discover import names, unknown
from sixfold.record import write_json

PACKAGE, FORMAT = "sixfold.models", 1
WEIGHTS, DESCRIPTION = "model.safetensors", "model.json"


class ModelError(ValueError):
    """A model that cannot be written or read as given; the message says what is wrong."""


def build(kind: str, arguments: Mapping[str, Any]) -> nn.Module:
    """The model of a kind: ``build("language", {"vocab_size": 65, "context": 64})``.

    Raises ValueError for an unknown kind or argument, naming what exists and the nearest match.
    """
    make = find(PACKAGE, kind)
    accepted = inspect.signature(make).parameters
    for name in arguments:
        if name not in accepted:
            raise ValueError(unknown(f"argument of {kind}", name, accepted))
    missing = [
        name
        for name, parameter in accepted.items()
        if parameter.default is parameter.empty and name not in arguments
    ]
    if missing:
        raise ValueError(f"{kind} needs {', '.join(missing)}")
    return make(**arguments)


def save(model: nn.Module, folder: str | Path) -> Path:
    """Write a model of this package, so that `load` gives an equal one; returns the folder.

    Raises:
        ModelError: for a model of another package, of several precisions, or with arguments that
            JSON cannot hold.
        OSError: if the folder cannot be written.
    """
    folder, kind = Path(folder), kind_of(model)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    precision(weights, str(folder))
    try:
        arguments = json.loads(json.dumps(model.arguments))
    except (TypeError, ValueError) as error:
        raise ModelError(f"{kind}: an argument cannot be written as JSON: {error}") from error
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / f".{WEIGHTS}.draft"
    save_file(weights, draft)
    description = {
        "format": FORMAT,
        "kind": kind,
        "class": type(model).__name__,
        "arguments": arguments,
        "sha256": digest(draft),
    }
    draft.replace(folder / WEIGHTS)
    write_json(folder / DESCRIPTION, description)
    return folder


def load(folder: str | Path) -> nn.Module:
    """The model that `save` wrote, on the CPU and in evaluation mode.

    Raises ModelError for a folder that is incomplete, damaged or not a model of this package.
    """
    folder = Path(folder)
    description = describe(folder)
    try:
        if digest(folder / WEIGHTS) != description["sha256"]:
            raise ModelError(f"{folder / WEIGHTS} is damaged: it does not match its checksum")
        weights = load_file(folder / WEIGHTS)
        model = build(description["kind"], description["arguments"])
    except FileNotFoundError as error:
        raise ModelError(f"{folder} holds no {WEIGHTS}") from error
    except (SafetensorError, TypeError, ValueError) as error:
        raise ModelError(f"{folder} cannot be read: {error}") from error
    if type(model).__name__ != description["class"]:
        raise ModelError(f"{folder} holds a {description['class']}, not a {type(model).__name__}")
    check_fit(model, weights, folder)
    model.to(precision(weights, str(folder))).load_state_dict(weights)
    return model.eval()


def describe(folder: Path) -> dict[str, Any]:
    """The description in a model's folder, checked for its fields and format."""
    path = folder / DESCRIPTION
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{folder} is no saved model: {DESCRIPTION} cannot be read") from error
    except ValueError as error:
        raise ModelError(f"{path} is damaged: {error}") from error
    fields = {"format": int, "kind": str, "class": str, "arguments": dict, "sha256": str}
    for name, kind in fields.items():
        if not isinstance(description, dict) or not isinstance(description.get(name), kind):
            raise ModelError(f"{path} is no description of a model: {name!r} is missing or wrong")
    if description["format"] != FORMAT:
        raise ModelError(f"{path} has format {description['format']}; this version reads {FORMAT}")
    return description


def kind_of(model: nn.Module) -> str:
    """The file of this package that defines a model's class.

    Raises ModelError for any other class.
    """
    package, _, name = type(model).__module__.rpartition(".")
    if package != PACKAGE or name not in names(PACKAGE) or find(PACKAGE, name) is not type(model):
        raise ModelError(
            f"{type(model).__name__} is not one of the models that can be saved by their name: "
            f"{', '.join(names(PACKAGE))}"
        )
    return name


def precision(weights: Mapping[str, Tensor], where: str) -> torch.dtype:
    """The one floating dtype of all weights.

    Raises ModelError if there are several or none.
    """
    dtypes = {str(t.dtype): t.dtype for t in weights.values() if t.is_floating_point()}
    if len(dtypes) != 1:
        raise ModelError(f"{where}: weights must have one precision, not {sorted(dtypes)}")
    return next(iter(dtypes.values()))


def check_fit(model: nn.Module, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Raise ModelError naming the tensors that are not those of `model`."""
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    other = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    wrong = sorted(name for name in own.keys() | other.keys() if own.get(name) != other.get(name))
    if wrong:
        shown = "; ".join(
            f"{name} is {other.get(name, 'absent')}, expected {own.get(name, 'nothing')}"
            for name in wrong[:3]
        )
        raise ModelError(f"{folder}: {len(wrong)} tensors do not fit the arguments: {shown}")


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
