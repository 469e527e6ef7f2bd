"""What this machine has: versions, devices, extras and data sets."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterator

import torch

from sixfold.data._root import find
from sixfold.discover import names
from sixfold.errors import DataMissing
from sixfold.run import environment

EXTRAS = {
    "cli": ("cyclopts", "rich", "jinja2", "matplotlib"),
    "text": ("tokenizers",),
    "images": ("sklearn",),
    "series": ("statsmodels",),
    "cpu": ("numba",),
    "huggingface": ("transformers",),
    "timm": ("timm",),
    "tensorboard": ("tensorboard",),
    "mlflow": ("mlflow",),
}


def diagnosis() -> Iterator[tuple[str, str]]:
    """What this machine has: versions, devices, extras and data sets."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    facts = environment(torch.device("cpu"))
    yield from (
        (name, str(facts[name])) for name in ("sixfold", "commit", "python", "platform", "torch")
    )
    yield "device", facts["device"]
    yield "threads", f"{facts['threads']} used by torch"
    yield "accelerator", "none" if found is None else found.type
    for extra, packages in EXTRAS.items():
        missing = [name for name in packages if importlib.util.find_spec(name) is None]
        yield (
            f"extra {extra}",
            f"missing: pip install 'sixfold[{extra}]'" if missing else "installed",
        )
    root = os.environ.get("SIXFOLD_DATA")
    yield "SIXFOLD_DATA", root or "not set; bundled text, digits and generated physics still work"
    for name in names("sixfold.data"):
        yield f"data {name}", availability(name)


def availability(name: str) -> str:
    """Whether the files of a data set are here; sets without files are bundled or generated."""
    module = importlib.import_module(f"sixfold.data.{name}")
    try:
        for file in vars(module).get("FILES", ()):
            find(file, module.HOME)
    except DataMissing as error:
        return str(error)
    return "found"
