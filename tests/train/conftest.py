from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sixfold.data import shakespeare
from sixfold.governor.architect import LeadMetaArchitect
from sixfold.models.language import LanguageModel
from sixfold.train.loop import Training, TrainSettings
from sixfold.train.optimizer import OptimizerSettings, build_optimizer

HEXAGONAL = {"num_heads": 7, "head_dim": 8, "projection": "coordinate", "mixer": "hexagonal"}


@pytest.fixture
def training(tmp_path: Path) -> Any:
    """A factory of small runs: training(governed=True, steps=12, ...)."""

    def make(
        *, governed: bool = False, folder: Path = tmp_path, rates: dict[str, Any] | None = None,
        dropout: float = 0.0, **settings: Any,
    ) -> Training:  # fmt: skip
        torch.manual_seed(0)
        dataset = shakespeare.miniature()
        model = LanguageModel(
            dataset.vocab_size, dataset.context, 28, 2, HEXAGONAL, dropout=dropout
        )
        rates = OptimizerSettings(**{"warmup": 2, **(rates or {})})
        optimizer = build_optimizer(model, rates)
        governor = LeadMetaArchitect(model, optimizer, every=2, folder=folder) if governed else None
        defaults = {"steps": 12, "batch_size": 4, "validate_every": 6, "checkpoint_every": 4}
        return Training(
            model, optimizer, dataset, TrainSettings(device="cpu", **{**defaults, **settings}),
            rates, folder, {"units": {"loss": "nats/token"}},
            observer=governor,
            logs=[] if governor is None else governor.logs,
        )  # fmt: skip

    return make
