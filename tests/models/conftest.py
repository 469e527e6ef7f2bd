import pytest
import torch

from sixfold import models

HEX = {"num_heads": 7, "head_dim": 4, "projection": "coordinate", "mixer": "hexagonal"}

TINY = {
    "language": {"vocab_size": 40, "context": 16, "d_model": 16, "num_layers": 2, "attention": HEX},
    "classifier": {
        "vocab_size": 40,
        "num_classes": 2,
        "context": 16,
        "d_model": 16,
        "attention": HEX,
    },
    "vision": {
        "image_size": 8,
        "patch_size": 4,
        "num_classes": 10,
        "d_model": 16,
        "num_layers": 2,
        "attention": HEX,
    },
    "simulator": {"channels": 1, "grid_size": 8, "d_model": 16, "attention": HEX},
}
"""The smallest model of every kind, with heads on a hexagonal grid."""


def inputs_of(kind, batch=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if kind in ("language", "classifier"):
        return torch.randint(1, 40, (batch, 10), generator=generator)
    return torch.randn(batch, 1, 8, 8, generator=generator)


@pytest.fixture(params=sorted(TINY))
def kind(request):
    return request.param


@pytest.fixture
def tiny(kind):
    torch.manual_seed(0)
    return models.build(kind, TINY[kind])


@pytest.fixture
def inputs(kind):
    return inputs_of(kind)
