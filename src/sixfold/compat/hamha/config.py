"""``config``: the system configuration, and its translation into a run's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from sixfold.config import build
from sixfold.errors import ConfigError
from sixfold.geometry.hexgrid import HexGrid

HORIZON = 20


@dataclass(frozen=True)
class HAMHAConfig:
    """The attention layer."""

    d_model: int = 512
    d_head: int = 64
    grid_radius: int = 2
    use_hypernet: bool = False

    def __post_init__(self) -> None:
        HexGrid(self.grid_radius)


@dataclass(frozen=True)
class LMAConfig:
    """The governor's limits."""

    kappa_threshold: float = 100.0
    fixation_threshold: float = 0.3
    drift_threshold: float = 0.9
    entropy_reg_increment: float = 0.01
    prediction_horizon: int = HORIZON

    def __post_init__(self) -> None:
        if self.prediction_horizon != HORIZON:
            raise ValueError(
                f"lma.prediction_horizon must be {HORIZON}, got {self.prediction_horizon}: "
                "forecasts are not part of this version"
            )


@dataclass(frozen=True)
class SystemConfig:
    """Attention and governor together, as in ``config.json``."""

    hamha: HAMHAConfig = field(default_factory=HAMHAConfig)
    lma: LMAConfig = field(default_factory=LMAConfig)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SystemConfig:
        """The inverse of `to_dict`; an unknown key raises ConfigError naming the nearest."""
        return build(cls, values, "SystemConfig")

    def to_run(self) -> dict[str, Any]:
        """The same as a run's configuration, for ``sixfold train``."""
        attention, limits = self.hamha, self.lma
        return {
            "model": {"kind": "language", "d_model": attention.d_model},
            "attention": {
                "num_heads": HexGrid(attention.grid_radius).num_heads,
                "head_dim": attention.d_head,
                "projection": "hypernetwork" if attention.use_hypernet else "coordinate",
                "mixer": "hexagonal",
            },
            "governor": {
                "limits": "seed",
                "alarms": {
                    "condition": limits.kappa_threshold,
                    "entropy_fixation": limits.fixation_threshold,
                    "entropy_drift": limits.drift_threshold,
                },
                "actions": {"entropy_coefficient": limits.entropy_reg_increment},
            },
        }


def translate(values: Mapping[str, Any]) -> dict[str, Any]:
    """A run's configuration from a file that may be a `SystemConfig`; others pass unchanged.

    Raises ConfigError for a file that mixes both forms.
    """
    theirs = values.keys() & {"hamha", "lma"}
    if not theirs:
        return dict(values)
    if values.keys() - theirs:
        raise ConfigError(
            f"a SystemConfig holds only 'hamha' and 'lma', not {sorted(values.keys() - theirs)}"
        )
    return SystemConfig.from_dict(values).to_run()
