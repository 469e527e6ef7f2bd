"""Measures a training step: probes before it, gradients before the move, a snapshot after it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any, SupportsFloat

import numpy
import torch
from torch import Tensor, nn

from sixfold.contracts import HeadId, Snapshot
from sixfold.governor.watch import collect, ranks
from sixfold.governor.watch.hook import Hook
from sixfold.governor.watch.layer import Layer
from sixfold.governor.watch.probe import LayerProbe, clock_us
from sixfold.governor.watch.watch import Watch

SPECTRA_EVERY = 5
"""Singular values move slowly and cost most: every fifth sample."""


class Meter:
    """What one step of a model shows.

    Armed for a step it sets hooks and probes, or none where nothing is asked; then it is told of
    the move, and asked for the snapshot. What goes wrong in looking is kept, and raised after the
    step: a pass does not fail for being watched.

    Args:
        model: what is trained.
        optimizer: what moves it; None where nobody tells of the move.
        every: steps between two samples.

    Attributes:
        sampling: whether the step now running is measured.
        probes: of this step, by layer.
        sizes: norm of every matrix at the last sample.

    >>> model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    >>> meter = Meter(model, None, every=1)
    >>> meter.arm({}, sampling=True)
    >>> out = model(torch.randn(3, 5, 8))
    >>> [len(heads) for heads in meter.snapshot(1, 0.5).signals["max_logit"]]
    [2]
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None, every: int
    ) -> None:
        self.model, self.optimizer, self.every = model, optimizer, every
        self.watch = Watch(model)
        self.sizes: list[float] = []
        groups = [] if optimizer is None else optimizer.param_groups
        self._learned = [p for group in groups for p in group["params"] if p.requires_grad]
        self._hooks: list[Hook] = []
        self._blind = False
        self.disarm()

    @property
    def layers(self) -> list[Layer]:
        """The attention layers found so far."""
        return self.watch.layers

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return next(self.model.parameters()).device

    # ------------------------------------------------------------ before a step

    def arm(self, terms: Mapping[HeadId, Any], *, sampling: bool) -> None:
        """Set the probes of the step to come; a step that nothing asks about has none.

        Args:
            terms: heads whose entropy must stay differentiable.
            sampling: whether the step is measured.
        """
        self.disarm()
        unknown_yet = not self.layers and not self.watch.passes
        if not (sampling or terms or unknown_yet):
            return
        self.sampling = sampling
        self.watch.arm(partial(self._probe, terms))
        if sampling:
            self._hooks = [Hook(self.model.register_forward_hook, self._after_forward)]
            self._hooks += [
                Hook(
                    layer.module.register_forward_pre_hook,
                    partial(self._input, number),
                    with_kwargs=True,
                )
                for number, layer in enumerate(self.layers)
            ]
            # a step that is not sampled never waits for the device
            self._began = clock_us(self.device)

    def disarm(self) -> None:
        """No hook and no probe stays behind, and nothing is known of the step to come."""
        self.watch.disarm()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self.sampling = False
        self.probes: dict[int, LayerProbe] = {}
        self._measured: collect.Signals = {}
        self._inputs: dict[int, tuple[Tensor, Tensor]] = {}
        self._weights: list[dict[str, Tensor]] = []
        self._whole: collect.Whole | None = None
        self._times: dict[str, float] = {}
        self._gradient_norm: float | None = None
        self._error: Exception | None = None
        self._began = self._forward_ended = 0.0

    def _probe(self, terms: Mapping[HeadId, Any], number: int) -> LayerProbe | None:
        """The probe of a layer on this step."""
        if number not in self.probes:
            hold = tuple(target.head for target in terms if target.layer == number)
            if not (self.sampling or hold):
                return None
            self.probes[number] = LayerProbe(self.device, measure=self.sampling, hold=hold)
        return self.probes[number]

    # ------------------------------------------------------------ during a step

    def _input(
        self,
        number: int,
        module: nn.Module,  # noqa: ARG002
        inputs: tuple[Any, ...],
        named: Mapping[str, Any],
    ) -> None:
        """Look at what a layer is given, once a step; evaluation in between is not the run's."""
        given = (x for x in (*inputs, *named.values()) if isinstance(x, Tensor))
        x = next((x for x in given if x.ndim == 3 and x.is_floating_point()), None)
        training = self.model.training and torch.is_grad_enabled()
        if x is None or x.shape[1] < 2 or number in self._inputs or not training:
            return
        try:
            self._inputs[number] = collect.rank(x.detach())
        except Exception as error:  # noqa: BLE001 - raised, and told, after the step
            self._error = error

    def _after_forward(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG002
        if self.model.training:
            self._forward_ended = clock_us(self.device)

    def before_move(self, gradient_norm: float, scale: float) -> None:
        """Read the gradients as the optimizer is about to use them.

        Args:
            gradient_norm: of all of them, without the scale.
            scale: what they are still multiplied by, where the optimizer divides it away itself.
        """
        self._gradient_norm = gradient_norm
        if not self.sampling:
            return
        try:
            self._times["gradient"] = clock_us(self.device) - self._forward_ended
            self._measured |= {
                name: [None if values is None else values / scale for values in layers]
                for name, layers in collect.gradients(self.layers).items()
            }
            self._weights = collect.copies(self.layers)
            self._whole = collect.Whole(self.optimizer)
        except Exception as error:  # noqa: BLE001 - raised, and told, after the step
            self._error = error

    # ------------------------------------------------------------ after a step

    def check(self) -> None:
        """Raise what went wrong in looking; warn of an entropy that was held and not used."""
        for error in (self._error, self.watch.error, *(p.error for p in self.probes.values())):
            if error is not None:
                raise error
        if any(probe.held is not None for probe in self.probes.values()):
            warnings.warn(
                "an entropy term is in force, but governor.penalty() was not added to the loss",
                stacklevel=5,
            )

    def snapshot(self, now: int, loss: float | Tensor | None) -> Snapshot:
        """Everything measured at this step, the worst of all processes where there are several."""
        value = number(loss)
        scalars: dict[str, float] = {}
        if loss is not None:
            scalars["loss_finite"] = float(math.isfinite(value))
        if self._gradient_norm is not None:
            scalars["gradient_norm"] = self._gradient_norm
        if self.optimizer is not None:
            scalars["learning_rate"] = float(self.optimizer.param_groups[0]["lr"])
        if self._whole is not None:
            scalars |= self._whole.moved()
            scalars |= collect.growth(self.sizes, self._whole.sizes)
            self.sizes = self._whole.sizes
        if self.sampling and self._learned:
            still = sum(p.numel() for p in self._learned if p.requires_grad)
            scalars["frozen"] = 1 - still / sum(p.numel() for p in self._learned)
        found = Snapshot(now, value, {}, scalars, {})
        if self.sampling and self.layers:
            found = self._sample(found)
        if self.sampling and not self._blind and self._nothing() is not None:
            self._blind = True
            warnings.warn(f"{self._nothing()}; only loss and gradients are watched", stacklevel=5)
        return ranks.joined(found, self.device, sampled=self.sampling)

    def _nothing(self) -> str | None:
        """Why no head is seen, or None where heads are, or may yet be."""
        if not self.model.training:
            return "the model is in eval mode, as for an evaluation: call model.train()"
        return None if self.layers else self.watch.nothing()

    def _sample(self, found: Snapshot) -> Snapshot:
        """A snapshot with all signals."""
        ended = clock_us(self.device)
        measured = collect.seen(self.layers, self.probes) | collect.responses(self.layers)
        measured |= self._measured
        if not self._measured and self.optimizer is None:
            measured |= collect.gradients(self.layers)
        if self._weights:
            measured |= collect.updates(self.layers, self._weights)
        if (found.step - 1) % (SPECTRA_EVERY * self.every) == 0:
            measured |= collect.matrices(self.layers)
        for place, name in enumerate(("rank_distance", "stable_rank")):
            inputs = [self._inputs.get(number) for number in range(len(self.layers))]
            measured[name] = [
                None if pair is None else pair[place].expand(layer.num_heads)
                for pair, layer in zip(inputs, self.layers, strict=True)
            ]
        times = collect.times(self.probes) | self._times | {"step": ended - self._began}
        times = {stage: value for stage, value in times.items() if value >= 0}
        tokens = max((probe.tokens for probe in self.probes.values()), default=0)
        scalars = dict(found.scalars)
        if tokens and times.get("step"):
            scalars["tokens_per_s"] = 1e6 * tokens / times["step"]
        return found._replace(signals=collect.to_numbers(measured), scalars=scalars, times_us=times)


def check_loss(loss: object) -> None:
    """Raise ValueError for what is no loss: a number, a tensor of one element, or None."""
    if isinstance(loss, Tensor):
        right, got = loss.numel() == 1 and not loss.is_complex(), f"one of {tuple(loss.shape)}"
    else:
        right = loss is None or (isinstance(loss, SupportsFloat) and numpy.size(loss) == 1)
        got = repr(loss)
    if not right:
        raise ValueError(f"loss must be a number, a tensor of one element, or None, got {got}")


def number(loss: float | Tensor | None) -> float:
    """A loss as a float; NaN when none was given."""
    if loss is None:
        return math.nan
    return loss.item() if isinstance(loss, Tensor) else float(loss)
