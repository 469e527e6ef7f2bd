"""Where real data sets lie: the folder that SIXFOLD_DATA names."""

from __future__ import annotations

import os
from pathlib import Path

from sixfold.errors import DataMissing


def find(relative: str, home: str) -> Path:
    """The file `relative` to the folder that SIXFOLD_DATA names; `home` is where to get it.

    Raises DataMissing when the variable is not set or the file is not there.
    """
    root = os.environ.get("SIXFOLD_DATA")
    if root and (path := Path(root) / relative).is_file():
        return path
    where = f"in {Path(root).absolute()}" if root else "because SIXFOLD_DATA is not set"
    raise DataMissing(
        f"{relative} was not found {where}; get it from {home}, and let SIXFOLD_DATA name the "
        f"folder that holds {relative}"
    )
