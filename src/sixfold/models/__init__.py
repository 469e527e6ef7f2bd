"""Models. Each file here without an underscore is a kind that `build` makes by its name."""

from sixfold.models._count import flops, parameters
from sixfold.models._pretrained import ModelError, build, load, save

__all__ = ["ModelError", "build", "flops", "load", "parameters", "save"]
