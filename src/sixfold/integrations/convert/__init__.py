"""Sixfold's attention inside models that exist: one file for each family of attention modules."""

from sixfold.integrations.convert._swap import Kept, convert, revert

__all__ = ["Kept", "convert", "revert"]
