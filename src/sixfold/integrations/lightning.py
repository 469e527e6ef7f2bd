"""The governor in Lightning: ``Trainer(callbacks=[GovernorCallback()])``.

A training step is made one pass of the LightningModule, so that the governor sees whatever it
calls; its loss is taken, and the entropy term added, where it is returned. A rollback is not
possible: the Trainer counts steps, epochs and the place in the data by itself, and would count
batches that come again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from sixfold.governor.architect import LeadMetaArchitect
from sixfold.governor.limits import Limits
from sixfold.integrations._governed import Governed, Options

try:
    from lightning.pytorch import Callback
except ModuleNotFoundError:
    try:
        from pytorch_lightning import Callback
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "sixfold.integrations.lightning needs lightning: pip install 'sixfold[lightning]'"
        ) from error


class GovernorCallback(Callback):
    """Watches every head of a Lightning run, and repairs what goes wrong.

    It logs ``governor/alarms``, ``changes``, ``taken_back`` (so far), ``loss``, ``max_logit`` and
    ``entropy`` (the last, of the worst head) by ``pl_module.log``. Its state is in each checkpoint,
    and a resumed run goes on from it. ``lightning`` and ``pytorch_lightning`` both take it.

    Args:
        mode: ``act``, or ``observe`` to decide and tell without touching anything.
        limits: a preset's name (``default``, ``seed``, ``sagemaker``), or `Limits`.
        every: a sample every so many steps of the optimizer.
        folder: where ``telemetry.jsonl`` and ``journal.jsonl`` go; ``governor`` in the Trainer's
            ``default_root_dir`` unless given.

    Attributes:
        governor: the `LeadMetaArchitect` of the latest run; None before the first.
        stopped: why it ended the run, or None.

    Raises:
        ValueError: as training begins, for an unknown mode or preset, manual optimization, an
            optimizer that calls its closure more than once (LBFGS), and a strategy under which no
            process holds the whole model (FSDP, DeepSpeed, tensor parallelism).
    """

    def __init__(
        self,
        mode: str = "act",
        limits: str | Limits = "default",
        every: int = 10,
        folder: Path | str | None = None,
    ) -> None:
        self.options = Options(mode, limits, every, folder)
        self.stopped: str | None = None
        self._saved: str | None = None
        self._run: Governed | None = None
        self._module: Any = None
        self._own: Any = None
        self._steps = 0

    @property
    def governor(self) -> LeadMetaArchitect | None:
        """The governor of the latest run."""
        return None if self._run is None else self._run.governor

    # ------------------------------------------------------------ around a run

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach the governor, as it was where the run is resumed."""
        check_fit(trainer, pl_module)
        self._let_go()
        self.stopped, self._steps = None, trainer.global_step
        schedulers = [known.scheduler for known in trainer.lr_scheduler_configs]
        self._run = Governed(
            pl_module,
            AfterClosure(trainer.optimizers[0]),
            self.options,
            folder=Path(trainer.default_root_dir) / "governor",
            leads=trainer.is_global_zero,
            saved=self._saved,
            scheduler=schedulers[0] if schedulers else None,
        )
        self._saved = None
        if trainer.global_step and self._run.governor.now == 0:
            # resumed from a checkpoint that was made without a governor: count with the Trainer
            self._run.governor.now = trainer.global_step
        self._module, self._own = pl_module, vars(pl_module).get("training_step")
        pl_module.training_step = one_pass(pl_module, self._taught)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:  # noqa: ARG002
        """Let go of the model; `governor` stays, for its report."""
        self._let_go()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:  # noqa: ARG002
        """Let go of the model."""
        self._let_go()

    def _let_go(self) -> None:
        if self._module is not None:
            put_back(self._module, "training_step", self._own)
            self._module = self._own = None
        if self._run is not None:
            self._run.detach()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of this callback."""
        return {"saved": self._saved if self._run is None else self._run.state()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Have the next run continue from `state_dict`."""
        self._saved = state_dict["saved"]

    # ------------------------------------------------------------ during a step

    def _taught(self, output: Any) -> Any:
        """What a training step returns, with the entropy term in its loss."""
        if isinstance(output, Mapping):
            return {**output, "loss": self._run.taught(output["loss"])}
        return None if output is None else self._run.taught(output)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *batch: Any) -> None:  # noqa: ARG002
        """Close the step once the optimizer was asked to move, whether or not it did."""
        if trainer.global_step == self._steps:
            return
        self._steps = trainer.global_step
        seen = self._run.step(summed=False)
        pl_module.log_dict(self._run.figures, on_step=True, on_epoch=False, batch_size=1)
        if seen.stop is not None:
            self.stopped, trainer.should_stop = seen.stop, True


class AfterClosure:
    """An optimizer whose hooks before a step see the gradients that the step itself makes.

    Lightning hands forward and backward to ``optimizer.step`` as a closure. A hook before a step
    comes before it, and would read the gradients of the step before.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.state_dict, self.load_state_dict = optimizer.state_dict, optimizer.load_state_dict
        self.register_step_post_hook = optimizer.register_step_post_hook

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of the optimizer."""
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:
        """The moments of the optimizer."""
        return self.optimizer.state

    def register_step_pre_hook(self, hook: Callable[..., Any]) -> RemovableHandle:
        """Have `hook` called when gradients are there: behind the closure where there is one."""

        def before(optimizer: torch.optim.Optimizer, args: Any, options: dict[str, Any]) -> Any:
            closure = options.get("closure")
            if closure is None:
                return hook(optimizer, args, options)

            def with_hook() -> Any:
                loss = closure()
                hook(optimizer, args, options)
                return loss

            return args, {**options, "closure": with_hook}

        return self.optimizer.register_step_pre_hook(before)


def one_pass(module: Any, taught: Callable[[Any], Any]) -> Callable[..., Any]:
    """The module's training step as a call of the module itself, whose hooks then surround it.

    Lightning does the same where it wraps a module for several processes.
    """
    whole = module.training_step

    @wraps(whole)
    def training_step(*args: Any, **options: Any) -> Any:
        with forward_is(module, lambda *args, **options: taught(whole(*args, **options))):
            return module(*args, **options)

    return training_step


@contextmanager
def forward_is(module: nn.Module, step: Callable[..., Any]) -> Iterator[None]:
    """The next call of `module` runs `step`; calls inside it are as ever."""
    own = vars(module).get("forward")

    def once(*args: Any, **options: Any) -> Any:
        put_back(module, "forward", own)
        return step(*args, **options)

    module.forward = once
    try:
        yield
    finally:
        put_back(module, "forward", own)


def put_back(module: nn.Module, name: str, own: Any) -> None:
    """Give a module the method it had: one of its own, or that of its class."""
    vars(module).pop(name, None)
    if own is not None:
        setattr(module, name, own)


def check_fit(trainer: Any, module: Any) -> None:
    """Raise ValueError for a run that the governor cannot see or step into."""
    if not module.automatic_optimization:
        raise ValueError(
            f"{type(module).__name__} optimizes by hand: attach sixfold.LeadMetaArchitect inside "
            "its training_step, or let automatic_optimization be True"
        )
    if isinstance(trainer.optimizers[0], torch.optim.LBFGS):
        raise ValueError("LBFGS makes several passes in one step: the governor needs one")
    wrapped = trainer.model is not module and not isinstance(trainer.model, DistributedDataParallel)
    if wrapped or any(isinstance(parameter, DTensor) for parameter in module.parameters()):
        raise ValueError(
            "the governor needs whole weights in each process, got strategy "
            f"{type(trainer.strategy).__name__}: allowed are those of one device and DDP"
        )
