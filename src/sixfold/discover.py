"""The file system is the registry: a variant is a file, its name is the file's name."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import pkgutil
from collections.abc import Iterable
from typing import Any


def names(package: str) -> tuple[str, ...]:
    """Names of the variants in `package`, without importing one of them.

    >>> names("sixfold.attention.projection")
    ('coordinate', 'gaussian', 'gaussian_diagonal', 'hypernetwork', 'linear')
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        raise ValueError(f"{package!r} is not a package")
    found = pkgutil.iter_modules(spec.submodule_search_locations)
    return tuple(sorted(m.name for m in found if not m.ispkg and not m.name.startswith("_")))


def load(package: str, name: str) -> Any:
    """The ``build`` function of the variant `name` of `package`.

    Raises ValueError for an unknown name; the message lists what exists and the nearest match.
    """
    known = names(package)
    if name not in known:
        raise ValueError(unknown(f"{package.rpartition('.')[2]}", name, known))
    return importlib.import_module(f"{package}.{name}").build


def unknown(what: str, given: object, allowed: Iterable[str]) -> str:
    """One sentence about a name that does not exist: what is allowed, and the nearest match.

    >>> unknown("score", "cosin", ("cosine", "dot"))
    "unknown score 'cosin'; choose from: cosine, dot. Did you mean 'cosine'?"
    """
    allowed = sorted(allowed)
    near = difflib.get_close_matches(str(given), allowed, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown {what} {given!r}; choose from: {', '.join(allowed)}.{hint}"
