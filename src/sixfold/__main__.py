"""``python -m sixfold``, e.g. under ``torchrun``."""

from sixfold.cli import main

main()
