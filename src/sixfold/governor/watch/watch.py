"""Watches the attention of any model: finds its layers, and shows them to probes when armed.

Between `Watch.arm` and `Watch.disarm` each training pass of the model runs under a mode that sees
every call of attention; at any other time there is no hook, no mode and no cost.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from sixfold.attention.multihead import MultiHeadAttention
from sixfold.contracts import Observation, Probe
from sixfold.governor.watch.capture import SEEN, Capture, Sight, Unreadable
from sixfold.governor.watch.hook import Hook
from sixfold.governor.watch.layer import Foreign, Layer, Own
from sixfold.governor.watch.layout import Product
from sixfold.governor.watch.probe import LayerProbe

VISIBLE = ("sdpa", "flex_attention", "sixfold_")
"""How implementations of transformers begin that come to a function of PyTorch, or show it."""


class Eager:
    """Compiled code runs as written while anyone holds it: watches let go in any order."""

    def __init__(self) -> None:
        self.holders = 0
        self._stance = ExitStack()

    def hold(self) -> None:
        """One more wants it."""
        if self.holders == 0:
            self._stance.enter_context(torch.compiler.set_stance("force_eager"))
        self.holders += 1

    def release(self) -> None:
        """One less does."""
        self.holders -= 1
        if self.holders == 0:
            self._stance.close()


EAGER = Eager()


def aside() -> AbstractContextManager[object]:
    """What is saved for backward inside is no part of an activation checkpoint around it.

    A checkpoint counts what its forward pass saves, and looking is not repeated in backward.
    """
    return saved_tensors_hooks(Tensor.detach, lambda saved: saved)


class Aside:
    """A probe that looks aside of any activation checkpoint."""

    def __init__(self, probe: Probe) -> None:
        self.probe = probe

    def observe(self, observation: Observation) -> None:
        """Pass on what the layer shows."""
        with aside():
            self.probe.observe(observation)

    def mark(self, stage: Any) -> None:
        """Pass on that a stage has ended."""
        self.probe.mark(stage)


class Watch:
    """The attention layers of a model, and the means to look at them.

    Layers of ours are known at once; others after the first watched pass, in the order of their
    first call. A layer is the innermost running module that has parameters. Only passes of
    ``model(...)`` in training mode that record gradients are watched, and of each layer the first
    call in a pass. Compiled modules run without their compilation between `arm` and `disarm`.

    Args:
        model: any module.

    Attributes:
        layers: what was found so far.
        unread: by path the modules that attend in a way that could not be read, and why.
        error: what went wrong in looking since `arm`; a pass does not fail for being watched.

    >>> model = nn.TransformerEncoderLayer(8, 2, 16)
    >>> watch, probe = Watch(model), LayerProbe(torch.device("cpu"), measure=True, hold=())
    >>> watch.arm(lambda number: probe)
    >>> out = model(torch.randn(5, 3, 8))
    >>> watch.disarm()
    >>> [(layer.name, layer.num_heads, layer.refusal) for layer in watch.layers]
    [('self_attn', 2, None)]
    >>> probe.max_logit.shape
    torch.Size([2])
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.passes = 0
        self.unread: dict[str, str] = {}
        self.error: Exception | None = None
        self._paths = {module: path for path, module in model.named_modules()}
        # the model itself is entered by hand: its hooks must not change while they are called
        self._places = [place for place in self._paths if place is not model and may_attend(place)]
        self.layers: list[Layer] = [
            Own(path, module)
            for module, path in self._paths.items()
            if isinstance(module, MultiHeadAttention)
        ]
        self._numbers = {layer.module: number for number, layer in enumerate(self.layers)}
        self._probe_of: Callable[[int], LayerProbe | None] = lambda _: None
        self._probes: dict[int, LayerProbe | None] = {}
        self._armed, self._pass = ExitStack(), ExitStack()
        # who lets go of a watch without disarming it has still given the compiler back
        weakref.finalize(self, self._armed.close)
        self._seen: set[nn.Module] | None = None
        self._settle()

    def arm(self, probe_of: Callable[[int], LayerProbe | None]) -> None:
        """Watch the next passes, each layer by the probe that its number is given, if any."""
        self.disarm()
        self._probe_of, self.error = probe_of, None
        if "torch._dynamo" in sys.modules:  # whatever is compiled has imported it
            EAGER.hold()
            self._armed.callback(EAGER.release)
        begin = Hook(self.model.register_forward_pre_hook, self._begin)
        end = Hook(self.model.register_forward_hook, self._end, always_call=True)
        # the handles alone: what is to be called when a watch is gone must not hold it
        self._armed.callback(begin.handle.remove)
        self._armed.callback(end.handle.remove)

    def disarm(self) -> None:
        """Stop watching: no hook, no mode, no probe, no stance stays behind."""
        self._leave()
        self._armed.close()
        self._probe_of, self._probes = (lambda _: None), {}

    def nothing(self) -> str | None:
        """Why there is nothing to watch, after a watched pass that showed no layer; else None."""
        if self.layers or not self.passes:
            return None
        sentence = (
            f"no attention was seen in a forward pass of {type(self.model).__name__}; looked for "
            f"sixfold.MultiHeadAttention and calls of {SEEN}; attention that is written out as "
            "matrix products and a softmax cannot be seen"
        )
        for path, reason in self.unread.items():
            sentence += f"; {path or 'the model itself'} attends, but {reason}"
        for kind, name, visible in sorted(hidden_implementations(self.model)):
            sentence += (
                f"; {kind} attends by attn_implementation {name!r}, which calls none of them"
            )
            if visible:
                sentence += ": model.set_attn_implementation('sdpa') makes it visible"
        return sentence

    def _begin(self, model: nn.Module, _: Any) -> None:
        """A pass begins; one that is no training pass, or repeats one in backward, is let be."""
        if torch.compiler.is_compiling():
            return
        repeated = torch._C._current_graph_task_id() >= 0
        training = model.training and torch.is_grad_enabled() and not repeated
        if model is not self.model or self._seen is not None or not training:
            return
        with ExitStack() as stack:
            capture = Capture(self._show, tracing=not self.passes or self._undecided)
            for number, layer in enumerate(self.layers):
                if isinstance(layer, Own) and self._probe(number) is not None:
                    stack.callback(setattr, layer.module, "probe", layer.module.probe)
                    layer.module.probe = Aside(self._probe(number))
            for place in self._places:
                stack.callback(place.register_forward_pre_hook(capture.enter).remove)
                handle = place.register_forward_hook(capture.leave, always_call=True)
                stack.callback(handle.remove)
            capture.enter(model, None)
            if capture.tracing:
                stack.callback(self._settle)
            stack.enter_context(capture)
            self._seen, self._pass = set(), stack.pop_all()

    def _end(self, model: nn.Module, _: Any, out: Any) -> None:
        """A pass has ended, or has raised and has no output."""
        if model is self.model and self._seen is not None:
            self._leave()
            self.passes += out is not None

    def _leave(self) -> None:
        self._pass.close()
        self._seen = None

    def _probe(self, number: int) -> LayerProbe | None:
        """The probe of a layer, asked for once per arming."""
        if number not in self._probes:
            self._probes[number] = self._probe_of(number)
        return self._probes[number]

    @property
    def _undecided(self) -> bool:
        return any(isinstance(layer, Foreign) and layer.undecided for layer in self.layers)

    def _show(
        self,
        running: Sequence[nn.Module],
        read: Callable[[], Sight],
        products: Sequence[Product] | None,
    ) -> None:
        """The innermost of the running modules attends; ours shows itself to its own probe."""
        module = running[-1]
        if module in self._seen or any(isinstance(part, MultiHeadAttention) for part in running):
            return
        self._seen.add(module)
        try:
            self._look(module, read, products)
        except Unreadable as reason:
            self.unread[self._paths[module]] = str(reason)
        except Exception as error:  # noqa: BLE001 - told to whoever armed, after the pass
            self.error = error

    def _look(
        self, module: nn.Module, read: Callable[[], Sight], products: Sequence[Product] | None
    ) -> None:
        """Read what a module did, trace it where that is open, and show it to its probe."""
        with aside():
            sight = read()
        number = self._numbers.setdefault(module, len(self.layers))
        if number == len(self.layers):
            self.layers.append(Foreign(self._paths[module], module, sight))
        layer, probe = self.layers[number], self._probe(number)
        layer.score = sight.score  # a model may have been converted since
        if layer.undecided and products is not None:
            layer.trace(sight, products)
        if probe is not None:
            Aside(probe).observe(sight.observation)

    def _settle(self) -> None:
        """Tell layers which of the model's parameters serve several places."""
        places = Counter(
            id(parameter) for _, parameter in self.model.named_parameters(remove_duplicate=False)
        )
        users = Counter(id(parameter) for layer in self.layers for parameter in layer.parameters())
        for layer in self.layers:
            layer.shared = [p for p in layer.parameters() if places[id(p)] > 1 or users[id(p)] > 1]


def may_attend(module: nn.Module) -> bool:
    """Whether a module can be a layer: it has parameters, and is no plain leaf of PyTorch's."""
    leaf = type(module).__module__.startswith("torch.nn.modules") and not list(module.children())
    return not leaf and next(module.parameters(), None) is not None


def hidden_implementations(model: nn.Module) -> set[tuple[str, str, bool]]:
    """Hugging Face models inside a model that call no function of PyTorch's to attend.

    Kind, implementation, and whether the kind has another that can be seen.
    """
    library = sys.modules.get("transformers.modeling_utils")
    if library is None:  # a model of transformers imports it
        return set()
    parts = (part for part in model.modules() if isinstance(part, library.PreTrainedModel))
    names = {(part, part.config._attn_implementation) for part in parts}
    return {
        (type(part).__name__, name, part._supports_sdpa)
        for part, name in names
        if name is not None and not name.startswith(VISIBLE)
    }
