"""What a run is made from: its configuration, and the data and the model it names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from sixfold import config
from sixfold.attention.multihead import MultiHeadAttention
from sixfold.contracts import Dataset
from sixfold.data._kinds import LabelledExamples, States, TokenStream
from sixfold.data._questions import Questions
from sixfold.discover import load, unknown
from sixfold.errors import ConfigError
from sixfold.governor.architect import MODES
from sixfold.governor.limits import ActionLimits, AlarmLimits, Limits, preset
from sixfold.train.loop import TrainSettings
from sixfold.train.optimizer import OptimizerSettings

PRESETS = Path(__file__).parent / "presets"


@dataclass(frozen=True)
class GovernorSettings:
    """Whether and how a run is governed; `alarms` and `actions` change single limits."""

    mode: str = "act"
    limits: str = "default"
    every: int = 10
    alarms: dict[str, Any] = field(default_factory=dict)
    actions: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.mode not in (*MODES, "off"):
            raise ValueError(unknown("governor.mode", self.mode, (*MODES, "off")))
        if self.every < 1:
            raise ValueError(f"governor.every must be 1 or more, got {self.every}")
        self.resolve()

    def resolve(self) -> Limits:
        """The preset with the single limits changed."""
        base = preset(self.limits)
        alarms = config.plain(base.alarms) | self.alarms
        actions = config.plain(base.actions) | self.actions
        return Limits(
            config.build(AlarmLimits, alarms, "configuration", "governor.alarms."),
            config.build(ActionLimits, actions, "configuration", "governor.actions."),
        )


@dataclass(frozen=True)
class TrackSettings:
    """Other places the metrics go: TensorBoard events, an MLflow tracking URI."""

    tensorboard: bool = False
    mlflow: str | None = None

    def names(self) -> list[str]:
        """The trackers that are wanted, by their file in ``sixfold.integrations``."""
        wanted = {"tensorboard": self.tensorboard, "mlflow": self.mlflow is not None}
        return [name for name, on in wanted.items() if on]


@dataclass(frozen=True)
class RunConfig:
    """Everything a run is made from.

    `model`, `attention` and `data` name a variant and its options; they are checked against what
    the variant takes.
    """

    name: str = "run"
    model: dict[str, Any] = field(default_factory=lambda: {"kind": "language"})
    attention: dict[str, Any] = field(default_factory=lambda: {"num_heads": 4})
    data: dict[str, Any] = field(default_factory=lambda: {"name": "shakespeare"})
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    governor: GovernorSettings = field(default_factory=GovernorSettings)
    track: TrackSettings = field(default_factory=TrackSettings)

    def __post_init__(self) -> None:
        if not self.name or self.name != Path(self.name).name:
            raise ValueError(f"name must be one part of a path, got {self.name!r}")


class Built(NamedTuple):
    """A model and the data it is made for."""

    model: nn.Module
    dataset: Any


def configure(
    presets: Sequence[str] = (),
    file: Path | Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
) -> RunConfig:
    """Presets in order, then a file (or what one held), then ``section.key=value`` overrides.

    Raises ConfigError for anything that is not understood.
    """
    values: dict[str, Any] = {}
    sources = []
    known = sorted(path.stem for path in PRESETS.glob("*.toml"))
    for name in presets:
        if name not in known:
            raise ConfigError(unknown("preset", name, known))
        values = config.merge(values, config.read(PRESETS / f"{name}.toml"))
        sources.append(f"preset {name}")
    if file is not None:
        values = config.merge(values, config.read(file) if isinstance(file, Path) else file)
        sources.append(str(file) if isinstance(file, Path) else "file")
    for assignment in overrides:
        values = config.override(values, assignment)
        sources.append(assignment)
    return config.build(RunConfig, values, ", ".join(sources) or "defaults")


def build_dataset(settings: Mapping[str, Any]) -> Any:
    """The data set that ``[data]`` names."""
    options = dict(settings)
    try:
        loader = load("sixfold.data", options.pop("name", "shakespeare"))
    except ValueError as error:
        raise ConfigError(f"data.name: {error}") from error
    return loader(**config.check_call(loader, options, "configuration", "data"))


def sizes_of(dataset: Dataset, kind: str) -> dict[str, int]:
    """What a model must know of its data.

    Raises ConfigError where the kind of model cannot be trained on the data.
    """
    if isinstance(dataset, TokenStream | Questions) and kind == "language":
        return {"vocab_size": dataset.vocab_size, "context": dataset.context}
    if isinstance(dataset, LabelledExamples):
        inputs, classes = dataset.train.inputs, dataset.num_classes
        if kind == "vision" and inputs.ndim == 4:
            return {
                "image_size": inputs.shape[-1],
                "channels": inputs.shape[1],
                "num_classes": classes,
            }
        if kind == "classifier" and dataset.tokenizer is not None:
            length = inputs.shape[1]
            return {
                "vocab_size": dataset.tokenizer.vocab_size,
                "context": length,
                "num_classes": classes,
            }
    if isinstance(dataset, States) and kind == "simulator":
        return {
            "channels": dataset.train.inputs.shape[1],
            "grid_size": dataset.train.inputs.shape[-1],
        }
    raise ConfigError(
        f"model.kind {kind!r} cannot be trained on {type(dataset).__name__} data; "
        "language goes with text and questions, vision with images, classifier with labelled text, "
        "simulator with states"
    )


def build(settings: RunConfig) -> Built:
    """Data and a model of fresh weights."""
    dataset = build_dataset(settings.data)
    options = dict(settings.model)
    kind = options.pop("kind", "language")
    try:
        make = load("sixfold.models", kind)
    except ValueError as error:
        raise ConfigError(f"model.kind: {error}") from error
    sizes = sizes_of(dataset, kind)
    source, taken = "configuration", {*sizes, "attention"}
    attention = config.check_call(
        MultiHeadAttention, settings.attention, source, "attention", {"d_model"}
    )
    options = config.check_call(make, options, source, "model", taken)
    torch.manual_seed(settings.train.seed)
    try:
        return Built(make(**sizes, **options, attention=attention), dataset)
    except ValueError as error:
        raise ConfigError(f"configuration: {error}") from error


def read_config(folder: Path) -> RunConfig:
    """The configuration of a run.

    Raises FileNotFoundError where there is no run.
    """
    path = folder / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{folder} holds no run: there is no {path.name} in it")
    return config.build(RunConfig, config.read(path), str(path))
