"""The TruthGPT names: ``from X import Y`` becomes ``from sixfold.compat.truthgpt.X import Y``."""
