"""``lma.architect``."""

from sixfold.governor.architect import LeadMetaArchitect

__all__ = ["LeadMetaArchitect"]
