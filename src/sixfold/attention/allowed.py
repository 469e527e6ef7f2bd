"""What numbers and flags are taken: a refusal names the argument, its value, and what it may be."""

from __future__ import annotations

import math
from numbers import Real


def check_whole(**sizes: object) -> None:
    """Raise ValueError for a size that is no whole number of 1 or more.

    >>> check_whole(d_model=64, num_heads=True)
    Traceback (most recent call last):
    ValueError: num_heads must be a whole number of 1 or more, got True
    """
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} must be a whole number of 1 or more, got {size!r}")


def check_positive(name: str, value: object, *, none: bool = False) -> None:
    """Raise ValueError for what is no positive finite number, nor None where that is allowed.

    >>> check_positive("softcap", float("inf"), none=True)
    Traceback (most recent call last):
    ValueError: softcap must be positive and finite, or None, got inf
    """
    if none and value is None:
        return
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not (number and 0 < value < math.inf):
        otherwise = ", or None" if none else ""
        raise ValueError(f"{name} must be positive and finite{otherwise}, got {value!r}")


def check_share(name: str, value: object) -> None:
    """Raise ValueError for what is no number in [0, 1).

    >>> check_share("dropout", 1)
    Traceback (most recent call last):
    ValueError: dropout must be in [0, 1), got 1
    """
    if not (isinstance(value, Real) and 0 <= value < 1):
        raise ValueError(f"{name} must be in [0, 1), got {value!r}")


def check_flags(**flags: object) -> None:
    """Raise ValueError for what is neither True nor False: "no" read from a file would be a yes.

    >>> check_flags(tied="no")
    Traceback (most recent call last):
    ValueError: tied must be True or False, got 'no'
    """
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise ValueError(f"{name} must be True or False, got {flag!r}")
