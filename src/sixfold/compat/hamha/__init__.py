"""The HAMHA names: ``from hamha.X import Y`` becomes ``from sixfold.compat.hamha.X import Y``."""
