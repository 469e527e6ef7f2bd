"""Hooks that stay with their model: in a copy or a file of it they do nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Hook:
    """A hook of a module; a copy of the module is not looked at, and no file keeps who looked.

    Args:
        register: the module's method that takes a hook.
        look: what is called as a hook is, and changes nothing.
        options: of the registration.

    Attributes:
        handle: takes the hook off the module, and knows nothing of who looks.

    >>> import copy
    >>> from torch import nn, zeros
    >>> model, seen = nn.Linear(2, 1), []
    >>> hook = Hook(model.register_forward_hook, lambda *pass_made: seen.append(pass_made))
    >>> out, out = model(zeros(2)), copy.deepcopy(model)(zeros(2))
    >>> len(seen)
    1
    """

    def __init__(
        self, register: Callable[..., Any], look: Callable[..., None], **options: Any
    ) -> None:
        self.look: Callable[..., None] | None = look
        self.handle = register(self, **options)

    def __call__(self, *given: Any) -> None:
        """Look, in the model that was hooked."""
        if self.look is not None:
            self.look(*given)

    def __getstate__(self) -> dict[str, Any]:
        """The handle alone: in the process that reads it, its number must not be given again."""
        return {"look": None, "handle": self.handle}

    def remove(self) -> None:
        """Take the hook off the module."""
        self.handle.remove()
