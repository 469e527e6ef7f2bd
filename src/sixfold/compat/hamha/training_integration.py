"""``examples.training_integration``: the three uses of hexagonal attention, by their old names.

They build Sixfold's models: with positions, residuals, norms and, for text, a causal mask.
"""

from __future__ import annotations

from typing import Any

from sixfold.geometry.hexgrid import HexGrid
from sixfold.models.language import LanguageModel
from sixfold.models.simulator import PhysicsSimulator as FieldSimulator
from sixfold.models.vision import VisionTransformer


def hexagonal(grid_radius: int, d_head: int) -> dict[str, Any]:
    """Options of the attention layer on a grid."""
    return {
        "num_heads": HexGrid(grid_radius).num_heads,
        "head_dim": d_head,
        "projection": "coordinate",
        "mixer": "hexagonal",
    }


def LanguageModelWithHAMHA(  # noqa: N802 - a class elsewhere
    vocab_size: int, d_model: int = 512, grid_radius: int = 2, d_head: int = 64, **options: Any
) -> LanguageModel:
    """A causal language model with hexagonal attention; context 512 unless given."""
    options = {"context": 512, **options}
    return LanguageModel(
        vocab_size, d_model=d_model, attention=hexagonal(grid_radius, d_head), **options
    )


def VisionTransformerWithHAMHA(  # noqa: N802 - a class elsewhere
    img_size: int, patch_size: int, d_model: int, grid_radius: int, d_head: int = 64, **options: Any
) -> VisionTransformer:
    """A vision transformer with hexagonal attention; 10 classes of RGB images unless given."""
    options = {"num_classes": 10, "channels": 3, **options}
    return VisionTransformer(
        img_size, patch_size, d_model=d_model, attention=hexagonal(grid_radius, d_head), **options
    )


def PhysicsSimulator(  # noqa: N802 - a class elsewhere
    state_dim: int, grid_radius: int, d_head: int = 16, **options: Any
) -> FieldSimulator:
    """A simulator of fields with `state_dim` numbers per cell, on a 16 x 16 grid unless given."""
    options = {"grid_size": 16, **options}
    return FieldSimulator(state_dim, attention=hexagonal(grid_radius, d_head), **options)
