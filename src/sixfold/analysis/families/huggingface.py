"""Hugging Face models: what their attention modules hand to transformers' attention interface.

For as long as a model is watched the implementation that it uses goes by the same name through a
function that calls it and looks; masks are made by that name and stay what they were.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from sixfold.analysis.families._watch import Family, LogOf, after, before
from sixfold.analysis.measure import Sight, sight, tokens_of
from sixfold.contracts import Observation, Visibility
from sixfold.ops.attend.reference import logits, masked
from sixfold.ops.distance.tiled import distance
from sixfold.ops.statistics.reference import widened
from sixfold.ops.statistics.sampled import at

EAGER = "eager"
OTHER_TOKENS = ("key_value_states", "encoder_hidden_states")
"""The arguments by which a module of transformers is given the source of its keys."""


class Watcher:
    """Looks at every call of the attention interface that a module of one model makes."""

    def __init__(self, log_of: LogOf) -> None:
        self.log_of = partial(log_of, family="huggingface")
        self.across: set[int] = set()

    def start(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A module begins that may turn out to be attention."""
        given = dict(zip(parameters(type(module)), args, strict=False)) | kwargs
        if any(given.get(name) is not None for name in OTHER_TOKENS):
            self.across.add(id(module))
        log = self.log_of(module)
        if log is not None:
            log.start()

    def end(self, module: nn.Module, *_: Any) -> None:
        """A module has ended; only one that called the interface is attention."""
        log = self.log_of(module)
        if log is not None and log.tally is not None:
            log.end("output")

    def look(
        self, name: str, own: Callable[..., Any], module: nn.Module, *given: Any, **asked: Any
    ) -> Any:
        """Attend as the model does, and measure it if it is of the model that is watched."""
        log = self.log_of(module)
        if log is None:
            return own(module, *given, **asked)
        log.mark("projection")
        out = own(module, *given, **asked)
        log.mark("attention")
        found = seen_by(name, module, *given, **asked)
        log.show(found._replace(together=id(module) not in self.across))
        return out


@cache
def parameters(kind: type[nn.Module]) -> tuple[str, ...]:
    """The names of what a module is called with, in order."""
    return tuple(inspect.signature(kind.forward).parameters)[1:]


def watch(model: nn.Module, stack: ExitStack, log_of: LogOf) -> None:
    """Stand in for the implementations the model uses, and hooks for the times of its modules."""
    library = sys.modules.get("transformers.modeling_utils")
    if library is None:  # a model of transformers imports it
        return
    parts = [part for part in model.modules() if isinstance(part, library.PreTrainedModel)]
    names = {part.config._attn_implementation for part in parts} - {None}
    if not names:
        return
    refuse_unknown(names)
    watcher = Watcher(log_of)
    for module in model.modules():
        if any(True for _ in module.children()):
            before(module, watcher.start, stack)
            after(module, watcher.end, stack)
    interface = library.ALL_ATTENTION_FUNCTIONS
    # what an instance keeps itself goes before what is registered for all, and can be deleted
    local = dict(interface._local_mapping)
    for name in names:
        stack.callback(put_back, interface, name, local.get(name))
        interface[name] = partial(watcher.look, name, interface.get(name, eager))


def put_back(interface: Any, name: str, own: Callable[..., Any] | None) -> None:
    """The interface as it was."""
    if own is None:
        del interface[name]
    else:
        interface[name] = own


def refuse_unknown(names: set[str]) -> None:
    """Raise a ValueError for an implementation whose masks say nothing key by key."""
    from sixfold.integrations.huggingface.attention import PREFIX

    for name in sorted(names):
        if name not in (EAGER, "sdpa") and not name.startswith(PREFIX):
            raise ValueError(
                f"attention implementation {name!r} cannot be analysed; load the model with "
                f"attn_implementation='sdpa', 'eager' or '{PREFIX}<score>'"
            )


def eager(module: nn.Module, *given: Any, **asked: Any) -> Any:
    """The plain attention beside a module's class, on which transformers falls back."""
    for kind in type(module).__mro__:
        own = getattr(sys.modules[kind.__module__], "eager_attention_forward", None)
        if own is not None:
            return own(module, *given, **asked)
    raise ValueError(
        f"{type(module).__name__} has no eager_attention_forward beside it: "
        "load the model with attn_implementation='sdpa'"
    )


@torch.no_grad()
def seen_by(
    name: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    **asked: Any,
) -> Sight:
    """Rating and visibility, as `sixfold.integrations.huggingface` reads such a call.

    Raises ValueError for a learned sink, which is no token, and for what is refused there.
    """
    from sixfold.integrations.huggingface import attention as calls

    if name == EAGER:  # it knows causality from its mask alone
        asked["is_causal"] = False
    score = name.removeprefix(calls.PREFIX) if name.startswith(calls.PREFIX) else "dot"
    call = calls.Call(score, module, asked)
    calls.check_asked(call)
    if asked.get("s_aux") is not None:
        raise call.refuse("s_aux", "a learned sink is no token")
    key, value, visibility = calls.seen(call, query, key, value, attention_mask)
    part = calls.score_of(call, query, key)
    rating = calls.stretched(call, part(query, part.keys(key)), query.shape[-1])
    observation = Observation(rating, visibility, part.signed)
    found = sight(observation, tokens_of(visibility.mask), together=True)
    cap = asked.get("softcap")
    return found if cap is None else found._replace(rows=capped(observation, cap))


def capped(observation: Observation, cap: float) -> Callable[[Tensor], Tensor]:
    """Rows of cap tanh(logit / cap), where visible."""
    whole = observation._replace(rating=widened(observation.rating))

    def rows(numbers: Tensor) -> Tensor:
        few = at(whole, numbers)
        scores = logits(few.rating, Visibility(None, is_causal=False), distance)
        return masked(cap * torch.tanh(scores / cap), few.visibility.mask)

    return rows


def build() -> Family:
    """Every model whose modules ask transformers' attention interface how to attend."""
    return Family("Hugging Face models (attention interface of transformers)", watch)
