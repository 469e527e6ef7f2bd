"""The governor in Hugging Face's Trainer: ``Trainer(..., callbacks=[GovernorCallback()])``.

The loss is taken from the model's output, before the Trainer's filter puts the mean of earlier ones
in the place of a NaN; there the entropy term is added too. A rollback is not possible: the Trainer
counts steps, epochs and the place in the data by itself, and would count batches that come again.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sixfold.governor.architect import LeadMetaArchitect
from sixfold.governor.limits import Limits
from sixfold.integrations._governed import Governed, Options

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_callback import ExportableState
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "sixfold.integrations.huggingface needs transformers: pip install 'sixfold[huggingface]'"
    ) from error

WHOLE = ("NO", "MULTI_CPU", "MULTI_GPU")
"""Kinds of distribution, as accelerate calls them, under which each process holds all weights."""


class GovernorCallback(TrainerCallback, ExportableState):
    """Watches every head of a Trainer's run, and repairs what goes wrong.

    Its figures enter the rows of ``state.log_history`` as ``governor/alarms``, ``changes``,
    ``taken_back`` (so far), ``loss``, ``max_logit`` and ``entropy`` (the last, of the worst head),
    and its sentences as ``governor/text``; a step that has a sentence is always logged. Its state
    is in each checkpoint's ``trainer_state.json``, and a resumed run goes on from it.

    Args:
        mode: ``act``, or ``observe`` to decide and tell without touching anything.
        limits: a preset's name (``default``, ``seed``, ``sagemaker``), or `Limits`.
        every: a sample every so many steps of the optimizer.
        folder: where ``telemetry.jsonl`` and ``journal.jsonl`` go; ``governor`` in the Trainer's
            ``output_dir`` unless given.

    Attributes:
        governor: the `LeadMetaArchitect` of the latest run; None before the first.
        stopped: why it ended the run, or None.

    Raises:
        ValueError: as training begins, for an unknown mode or preset, and where no process holds
            the whole model (DataParallel, FSDP, DeepSpeed).

    >>> GovernorCallback(every=5).state()["args"]["every"]
    5
    """

    def __init__(
        self,
        mode: str = "act",
        limits: str | Limits | Mapping[str, Any] = "default",
        every: int = 10,
        folder: Path | str | None = None,
    ) -> None:
        self.options = Options(mode, limits, every, folder)
        self.stopped: str | None = None
        self._run: Governed | None = None
        self._hook: Any = None
        self._unsaid: list[str] = []
        self._passes, self._ranks, self._summed, self._told = 1, 1, False, False

    @property
    def governor(self) -> LeadMetaArchitect | None:
        """The governor of the latest run."""
        return None if self._run is None else self._run.governor

    # ------------------------------------------------------------ around a run

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        *,
        model: nn.Module,
        optimizer: Any,
        lr_scheduler: Any,
        **rest: Any,  # noqa: ARG002
    ) -> None:
        """Attach the governor, as it was where the run is resumed."""
        check_whole(args)
        self._let_go()
        self.stopped, self._unsaid = None, []
        self._run = Governed(
            model,
            optimizer.optimizer,
            self.options,
            folder=Path(args.output_dir) / "governor",
            leads=state.is_world_process_zero,
            saved=self._of_checkpoint(state),
            scheduler=lr_scheduler,
            scaler=optimizer.scaler,
        )
        if state.global_step and self._run.governor.now == 0:
            # resumed from a checkpoint that was made without a governor: count with the Trainer
            self._run.governor.now = state.global_step
        # a compiled model runs what is in front of it compiled, and this as it is
        after_pass = torch.compiler.disable(self._after_pass)
        self._hook = model.register_forward_hook(after_pass, with_kwargs=True)

    def _of_checkpoint(self, state: TrainerState) -> str | None:
        """Our state in the checkpoint from which a run is resumed; None in a fresh one."""
        # the Trainer saves only what the state it resumed from names
        found = state.stateful_callbacks.setdefault(type(self).__name__, {})
        if not state.global_step or not found:
            return None
        if isinstance(found, list):
            raise ValueError(f"the checkpoint was made with {len(found)} governors: give one")
        return found["attributes"]["saved"]

    def on_train_end(self, *event: Any, **rest: Any) -> None:  # noqa: ARG002
        """Let go of the model; `governor` stays, for its report."""
        self._let_go()

    def _let_go(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        if self._run is not None:
            self._run.detach()

    def state(self) -> dict[str, Any]:
        """What the Trainer keeps of this callback in a checkpoint, as JSON values."""
        saved = None if self._hook is None else self._run.state()
        return {"args": self.options.plain(), "attributes": {"saved": saved}}

    # ------------------------------------------------------------ during a step

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        *,
        train_dataloader: Any,
        **rest: Any,  # noqa: ARG002
    ) -> None:
        """Note how many micro-batches this step has."""
        self._passes = passes_of(args, state, train_dataloader)
        self._ranks = args.world_size if args.average_tokens_across_devices else 1

    def _after_pass(
        self,
        model: nn.Module,
        inputs: Any,  # noqa: ARG002
        options: Mapping[str, Any],
        output: Any,
    ) -> Any:
        """Note the loss of a training pass, and add the entropy term to it."""
        if not (model.training and torch.is_grad_enabled()):
            return None
        found = loss_in(output)
        if found is None:
            return None
        # a model that is told how many tokens the whole step has divides by them; else the Trainer
        # divides by the number of micro-batches, and the term with the loss
        self._summed = options.get("num_items_in_batch") is not None
        ranks = self._ranks if self._summed else 1
        share = 1 / (self._passes * ranks) if self._summed else 1.0
        loss = self._run.taught(found, share, weight=ranks)
        if loss is found:
            return None
        if isinstance(output, Mapping):
            output["loss"] = loss
            return output
        return (loss, *output[1:])

    def on_step_end(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,
        **rest: Any,  # noqa: ARG002
    ) -> None:
        """Close the step, whether or not the optimizer moved."""
        if not self._run.losses and not self._told:
            self._told = True
            warnings.warn(
                "the model returns no loss: it is made elsewhere (label smoothing, "
                "compute_loss_func, compute_loss of a Trainer of one's own). The governor sees "
                "heads and gradients, but no loss, and its entropy term reaches no objective",
                stacklevel=2,
            )
        seen = self._run.step(summed=self._summed)
        if self._run.said:
            self._unsaid.append(f"step {state.global_step}: {'; '.join(self._run.said)}")
            control.should_log = True
        if seen.stop is not None:
            self.stopped = seen.stop
            control.should_training_stop = True

    def on_log(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        *,
        logs: dict[str, Any],
        **rest: Any,  # noqa: ARG002
    ) -> None:
        """Put the figures into a row of the training log, and the sentences since the last one."""
        if self._hook is None or "loss" not in logs:  # a row of an evaluation, or of the end
            return
        row = state.log_history[-1]
        for place in (logs, row):
            place.update(self._run.figures)
        if self._unsaid:
            row["governor/text"] = "; ".join(self._unsaid)
            self._unsaid = []


def loss_in(output: Any) -> Tensor | None:
    """The loss where the Trainer looks for it: by name, or in the first place; None elsewhere."""
    if isinstance(output, Mapping):
        return output.get("loss")
    first = output[0] if isinstance(output, tuple) and output else None
    return first if isinstance(first, Tensor) and first.ndim == 0 else None


def check_whole(args: TrainingArguments) -> None:
    """Raise ValueError unless each process holds all of the model and steps it by itself."""
    from accelerate.state import AcceleratorState

    if args.n_gpu > 1:
        raise ValueError(
            f"the governor cannot see into DataParallel ({args.n_gpu} devices in one process): "
            "start one process for each with torchrun, or show the run one device"
        )
    kind = AcceleratorState().distributed_type.value
    if kind not in WHOLE:
        raise ValueError(
            f"the governor needs whole weights in each process, got a run of kind {kind}: "
            f"allowed are {', '.join(WHOLE)}"
        )


def passes_of(args: TrainingArguments, state: TrainerState, loader: Any) -> int:
    """Micro-batches of the step about to be made: fewer in the last of an epoch.

    Where a loader has no length the Trainer counts on full steps, and so does this.
    """
    whole = args.gradient_accumulation_steps
    try:
        batches = len(loader)
    except TypeError:
        return whole
    steps = -(-batches // whole)
    last = (state.global_step + 1) % steps == 0
    return batches - (steps - 1) * whole if last else whole
