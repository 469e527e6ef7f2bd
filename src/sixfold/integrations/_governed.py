"""A governor inside a loop that is not ours: what the callbacks of all trainers share."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sixfold.governor.architect import LeadMetaArchitect, Seen
from sixfold.governor.journal import load_limits
from sixfold.governor.limits import Limits

log = logging.getLogger("sixfold.governor")
"""Where sentences go: standard error, unless the user's logging says otherwise."""

WORST = {"max_logit": max, "entropy": min}
"""Signals that are told to the trainer's log, by what is worst of them over all heads."""
COUNTED = ("governor/alarms", "governor/changes", "governor/taken_back")
"""Figures of the log that count what was decided since training began."""


@dataclass
class Options:
    """How a governor is attached: as `LeadMetaArchitect`; limits also as plain values."""

    mode: str = "act"
    limits: str | Limits | Mapping[str, Any] = "default"
    every: int = 10
    folder: Path | str | None = None

    def plain(self) -> dict[str, Any]:
        """The same as JSON values."""
        limits = asdict(self.limits) if isinstance(self.limits, Limits) else self.limits
        folder = None if self.folder is None else str(self.folder)
        return {"mode": self.mode, "limits": limits, "every": self.every, "folder": folder}


class Governed:
    """A governor at work on someone else's loop: losses go in, figures and sentences come out.

    Args:
        model: what is called once for every micro-batch.
        optimizer: the one of PyTorch, out of whatever wraps it.
        options: how the governor is attached.
        folder: where its logs go where `options` name no folder.
        leads: whether this process writes and speaks; others only decide, all alike.
        saved: what `state` gave, of a run that is resumed.
        parts: scheduler and scaler.

    Attributes:
        figures: of the run so far, as they go into the trainer's log.
        said: sentences of the last step.
        working: False once the governor has let go.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        options: Options,
        *,
        folder: Path,
        leads: bool,
        saved: str | None,
        **parts: Any,
    ) -> None:
        folder = Path(folder if options.folder is None else options.folder)
        known = {} if saved is None else json.loads(saved)
        # logs go on in the folder that has them; in another one they begin
        here = {name: n for name, n in known.get("logs", {}).items() if (folder / name).is_file()}
        limits = options.limits
        self.governor = LeadMetaArchitect(
            model,
            optimizer,
            mode=options.mode,
            limits=load_limits(limits) if isinstance(limits, Mapping) else limits,
            every=options.every,
            folder=folder if leads else None,
            positions=here,
            **parts,
        )
        self.working = True
        self.leads, self.losses, self.said = leads, list[Tensor](), tuple[str, ...]()
        self.figures = dict.fromkeys(COUNTED, 0.0)
        if known:
            self.figures = known["figures"]
            self.governor.load_state_dict(known["governor"])

    def state(self) -> str:
        """What a resumed run needs, as one line of JSON."""
        logs = {
            # a governor that let go has closed its logs, and what it wrote counts all the same
            file.path.name: file.position() if self.working else size(file.path)
            for file in self.governor.logs
        }
        return json.dumps(
            {"governor": self.governor.state_dict(), "logs": logs, "figures": self.figures}
        )

    def taught(self, loss: Tensor, share: float = 1.0, weight: float = 1.0) -> Tensor:
        """Note the loss of a micro-batch, and add its share of the entropy term, if there is one.

        Args:
            loss: as the loop is about to use it, before any filter.
            share: of the term that is added here, where the loop does not divide what it is given.
            weight: what the loop multiplies the loss by.
        """
        self.losses.append(weight * loss.detach())
        term = self.governor.penalty()
        return loss if term is None else loss + share * term

    def step(self, *, summed: bool) -> Seen:
        """Close a step of the optimizer: the governor looks, decides, acts; what it says is told.

        Args:
            summed: whether the losses of micro-batches add up to that of the step; else it is their
                mean.
        """
        loss = None
        if self.losses:
            losses = torch.stack(self.losses).float()
            loss = self.figures["governor/loss"] = float(losses.sum() if summed else losses.mean())
        self.losses = []
        seen = self.governor.process_step(loss)
        self.working = seen.snapshot is not None
        self._note(seen)
        if self.leads:
            for text in self.said:
                log.warning("step %d: %s", seen.step, text)
        return seen

    def detach(self) -> None:
        """Let go of the model; the report and the state stay."""
        self.working = False
        self.governor.detach()

    def _note(self, seen: Seen) -> None:
        """Put what was seen into figures and sentences."""
        self.said = seen.text
        if seen.decisions is None or seen.snapshot is None:
            return
        decided = seen.decisions
        for name, made in zip(
            COUNTED, (decided.alarms, decided.applied, decided.undone), strict=True
        ):
            self.figures[name] += len(made)
        for signal, worst in WORST.items():
            found = [value for heads in seen.snapshot.signals.get(signal, ()) for value in heads]
            if found:
                self.figures[f"governor/{signal}"] = worst(found)


def size(path: Path) -> int:
    """Bytes of a file; 0 where there is none."""
    return path.stat().st_size if path.is_file() else 0
