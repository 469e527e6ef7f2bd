"""Checkpoints: atomic, checksummed, and never unpickled.

A checkpoint is a folder ``step-00000250`` with the model and the optimizer as safetensors, all else
as JSON, and a manifest of SHA-256 sums. It is written beside its place and renamed into it, so that
a killed process leaves the earlier ones as they were.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sixfold.errors import CheckpointError

FORMAT = 2
FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
KEEP = 2


class Saved(NamedTuple):
    """A verified checkpoint."""

    step: int
    folder: Path
    state: dict[str, Any]


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Make a file or folder durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def parameter_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Names of the optimizer's parameters, in its order."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by parameter name: ``blocks.0.mlp.0.weight/exp_avg``."""
    state = optimizer.state_dict()["state"]
    names = parameter_names(model, optimizer)
    return {
        f"{names[number]}/{key}": value.contiguous()
        for number, entries in state.items()
        for key, value in entries.items()
    }


def random_states() -> dict[str, Tensor]:
    """States of PyTorch's generators."""
    states = {"random/cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"random/cuda{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return states


def set_random_states(states: Mapping[str, Tensor]) -> None:
    """Put the generators back where `random_states` found them."""
    torch.set_rng_state(states["random/cpu"])
    cuda = [states[f"random/cuda{number}"] for number in range(len(states) - 1)]
    if cuda:
        torch.cuda.set_rng_state_all(cuda)


def save(
    root: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    keep: frozenset[int] = frozenset(),
) -> Path:
    """Write a checkpoint; older ones go, except the last `KEEP` and the steps in `keep`.

    Raises OSError naming the folder when it cannot be written; earlier checkpoints stay.
    """
    folder = place(root, step)
    draft = root / f".{folder.name}.draft"
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        save_file(weights, draft / "model.safetensors")
        save_file(
            optimizer_tensors(model, optimizer) | random_states(), draft / "optimizer.safetensors"
        )
        (draft / "state.json").write_text(json.dumps({"step": step, **state}))
        sums = {file.name: digest(file) for file in sorted(draft.iterdir())}
        manifest = {"format": FORMAT, "step": step, "sha256": sums}
        (draft / "manifest.json").write_text(json.dumps(manifest, indent=1))
        for file in draft.iterdir():
            sync(file)
        sync(draft)
        shutil.rmtree(folder, ignore_errors=True)
        draft.rename(folder)
        sync(root)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise OSError(
            f"cannot write checkpoint {folder}: {error}; earlier checkpoints are intact"
        ) from error
    for number, old in steps(root)[:-KEEP]:
        if number not in keep:
            shutil.rmtree(old)
    return folder


def place(root: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return root / f"step-{step:08d}"


def steps(root: Path) -> list[tuple[int, Path]]:
    """All finished checkpoints below `root`, oldest first."""
    return sorted((int(folder.name[5:]), folder) for folder in root.glob("step-*"))


def latest(root: Path) -> Saved | None:
    """The newest checkpoint, verified, or None if there is none yet.

    Raises CheckpointError if it is damaged: an older one is never taken silently.
    """
    found = steps(root)
    return verify(found[-1][1]) if found else None


def verify(folder: Path) -> Saved:
    """Check a checkpoint against its manifest and read its state."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        given, expected = manifest["format"], {name: manifest["sha256"][name] for name in FILES}
        sums = {name: digest(folder / name) for name in FILES}
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(damaged(folder, str(error))) from error
    if given != FORMAT:
        raise CheckpointError(
            f"checkpoint {folder} has format {given}; this version reads {FORMAT}"
        )
    for name in FILES:
        if sums[name] != expected[name]:
            raise CheckpointError(damaged(folder, f"{name} does not match its checksum"))
    state = json.loads((folder / "state.json").read_text())
    return Saved(state["step"], folder, state)


def damaged(folder: Path, reason: str) -> str:
    """What to tell the user about a damaged checkpoint."""
    return (
        f"checkpoint {folder} is damaged ({reason}); delete that folder to go on from the one "
        "before it, or start a new run"
    )


def load_model(saved: Saved, model: nn.Module) -> None:
    """Put a checkpoint's weights into `model`.

    Raises CheckpointError if they belong to another architecture, naming what differs.
    """
    weights = load_file(saved.folder / "model.safetensors")
    own = model.state_dict()
    problems = [f"{name} is missing" for name in own.keys() - weights.keys()]
    problems += [f"{name} is unknown here" for name in weights.keys() - own.keys()]
    problems += [
        f"{name} is {tuple(weights[name].shape)} there and {tuple(own[name].shape)} here"
        for name in own.keys() & weights.keys()
        if own[name].shape != weights[name].shape
    ]
    if problems:
        shown = "; ".join(sorted(problems)[:3])
        raise CheckpointError(
            f"checkpoint {saved.folder} is of another architecture, "
            f"{len(problems)} tensors differ: "
            f"{shown}"
        )
    model.load_state_dict(weights)


def load_training(saved: Saved, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Restore weights, optimizer and random generators, all to the bit."""
    load_model(saved, model)
    tensors = load_file(saved.folder / "optimizer.safetensors")
    set_random_states({key: tensors.pop(key) for key in list(tensors) if key.startswith("random/")})
    entries: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, field = key.rpartition("/")
        entries.setdefault(name, {})[field] = tensor
    names = parameter_names(model, optimizer)
    numbered = {i: entries[name] for i, name in enumerate(names) if name in entries}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": numbered})
