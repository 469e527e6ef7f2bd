"""Hold one head's attention entropy up by a term in the objective, for a while.

loss <- loss + coefficient * max(0, floor - H_h), H_h the head's normalised entropy on sampled
queries. Source of the idea: Zhai et al., Stabilizing Transformer Training by Preventing Attention
Entropy Collapse, arXiv 2303.06296.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from sixfold.contracts import Expectation, HeadId


@dataclass(frozen=True)
class EntropyTerm:
    """Keep one head's entropy above `floor` while it lasts."""

    name: ClassVar[str] = "entropy_term"
    cost: ClassVar[str] = (
        "one small softmax per step while it lasts; the objective is not the user's"
    )
    target: HeadId
    floor: float
    coefficient: float
    lasts: int
    expects: Expectation

    def apply(self, subject: Any) -> None:
        """Add the term."""
        subject.terms[self.target] = (self.floor, self.coefficient)

    def undo(self, subject: Any) -> None:
        """Remove the term."""
        subject.terms.pop(self.target, None)


def build(target: HeadId, floor: float, coefficient: float, lasts: int, within: int) -> EntropyTerm:
    """The term that holds `target` above `floor` for `lasts` steps."""
    expects = Expectation("entropy", target, "rise", 0.5 * floor, within)
    return EntropyTerm(target, floor, coefficient, lasts, expects)
