"""The LMA names: ``from lma.X import Y`` becomes ``from sixfold.compat.lma.X import Y``."""
