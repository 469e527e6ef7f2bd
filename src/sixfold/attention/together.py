"""Which parts of a layer cannot work together, and why: every refusal of a combination."""

from __future__ import annotations

from typing import Any, NamedTuple

from sixfold.contracts import Features, Mixer, Projection, Reach, Score
from sixfold.ops.attend import choose


class Chosen(NamedTuple):
    """The parts of a layer; `names` are what the user called them, by kind."""

    projection: Projection
    score: Score
    reach: Reach
    mixer: Mixer
    names: dict[str, Any]


def check(parts: Chosen, impl: str, *, rope: bool, softcap: float | None, sinks: bool) -> None:
    """Raise ValueError, naming both sides, where two choices cannot be joined."""
    score, name = parts.score, parts.names["score"]
    choose.check(score.gives, impl)
    if parts.projection.schema != score.schema:
        raise ValueError(
            f"projection {parts.names['projection']!r} emits a {parts.projection.schema}, "
            f"score {name!r} rates a {score.schema}"
        )
    if rope and not score.rotation_invariant:
        raise ValueError(f"score {name!r} cannot be used with rope: rotating changes its value")
    if parts.mixer.mixes_logits and score.gives is not Features:
        check_held(f"mixer {parts.names['mixer']!r}", name, impl)
    if softcap is not None or sinks:
        check_reshaping(score, name, impl, sinks_alone=softcap is None)
    if parts.reach.condenses:
        check_condensing(parts, impl, reshapes=softcap is not None or sinks)


def check_reshaping(score: Score, name: Any, impl: str, *, sinks_alone: bool) -> None:
    """A cap or a sink needs logits that lack no term, and a cap all of them at once."""
    what = "sinks" if sinks_alone else "softcap"
    if score.gives is Features and not score.signed:
        raise ValueError(
            f"{what} cannot be used with score {name!r}: it is known only up to a term of the query"
        )
    if not (sinks_alone and score.gives is Features):
        check_held(what, name, impl)


def check_held(what: str, score: Any, impl: str) -> None:
    """Some implementations never hold the logits that `what` needs."""
    if impl not in ("auto", "reference"):
        raise ValueError(
            f"{what} of score {score!r} needs all logits at once, which impl {impl!r} never holds; "
            "choose from: auto, reference"
        )


def check_condensing(parts: Chosen, impl: str, *, reshapes: bool) -> None:
    """A group of tokens is seen as a whole, by an inner product and its size, head by head."""
    reach = f"reach {parts.names['reach']!r}"
    if reshapes:
        raise ValueError(f"softcap and sinks cannot be used with {reach}")
    if parts.mixer.mixes_logits:
        raise ValueError(
            f"mixer {parts.names['mixer']!r} cannot be used with {reach}: heads condense apart"
        )
    if parts.score.gives is not Features:
        check_held(reach, parts.names["score"], impl)
