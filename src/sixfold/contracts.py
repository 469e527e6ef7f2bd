"""Every interface of Sixfold and the small tuples they exchange.

Axes: ``b`` batch, ``h`` heads, ``n`` queries, ``m`` keys, ``d`` head width. A mask is True where a
query may attend. The layers meet only here: training knows an `Observer`, not the governor.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sixfold.geometry.hexgrid import HexGrid

# ---------------------------------------------------------------- attention


class Heads(NamedTuple):
    """The sizes every part of an attention layer is built from."""

    d_model: int
    num_heads: int
    head_dim: int
    num_kv_heads: int


class Belief(NamedTuple):
    """What is believed of each token: a Gaussian, in the token's own frame.

    mean (b, h, n, d); factor: standard deviations (b, h, n, d) or a lower Cholesky factor of the
    covariance (b, h, n, d, d); frame U (..., n, d, d), which takes the common frame to the token's
    own, with its inverse and log |det U|, or None where all share one frame.
    """

    mean: Tensor
    factor: Tensor
    frame: Tensor | None = None
    inverse: Tensor | None = None
    log_volume: Tensor | float = 0.0


Schema = Literal["point", "diagonal belief", "belief"]
"""What a projection emits and a score asks for; a plain "belief" has a full covariance."""


class Emission(NamedTuple):
    """What a projection emits: for each query and key a point (b, h, n, d) or a `Belief`.

    Keys and values have h_kv heads and m tokens; value (b, h_kv, m, d).
    """

    query: Any
    key: Any
    value: Tensor


class Features(NamedTuple):
    """A score as an inner product: logit = scale * <query, key>, ready for fused attention."""

    query: Tensor
    key: Tensor
    scale: float


class Distances(NamedTuple):
    """A score that is no inner product: logit = -rate_h ||query - key||_p, p in [1, inf].

    query (b, h, n, d), key (b, h_kv, m, d), rate (h,) positive.
    """

    query: Tensor
    key: Tensor
    rate: Tensor
    p: float


Rating = Features | Distances
"""How queries rate keys, ready for an implementation of attention."""


class Visibility(NamedTuple):
    """Which keys each query sees: a mask broadcastable to (b, h, n, m), or plain causality."""

    mask: Tensor | None
    is_causal: bool


class Statistics(NamedTuple):
    """What attention did, per head and token, in float32 and nats.

    entropy (b, h, n) of a query's weights; received (b, h, m): the weight a key receives from all
    queries together; log_sum_exp (b, h, n) of a query's logits, which the largest of them cannot
    exceed; largest (b, h): the largest logit of a head, or the largest range within a query where
    the score has no sign; None unless asked for. Of a query that sees nothing entropy is 0 and
    log_sum_exp -inf.
    """

    entropy: Tensor
    received: Tensor
    log_sum_exp: Tensor
    largest: Tensor | None = None


class Observation(NamedTuple):
    """What a layer shows a probe on a sampled step: the rating and who sees whom."""

    rating: Rating
    visibility: Visibility
    signed: bool = True


class Cache(Protocol):
    """Per-token tensors of earlier segments: append-only, cut and reordered as a whole."""

    length: int

    def filled(self, name: str) -> int:
        """Places of the named entry, 0 of one that there is not."""

    def entry(self, name: str) -> Tensor:
        """All of the named entry, (..., places, width)."""

    def append(self, name: str, entry: Tensor, span: int = 1) -> Tensor:
        """Add (..., n, width) to the named entry, a place for every `span` tokens, return all."""

    def crop(self, length: int) -> None:
        """Forget everything after the first `length` tokens."""

    def reorder(self, rows: Tensor) -> None:
        """Select batch rows, as beam search does."""


class Projection(Protocol):
    """Where queries, keys and values come from."""

    heads: Heads
    grid: HexGrid | None
    schema: Schema
    ordered: str | None
    """What orders the tokens of one sequence in this projection, so that it serves no context."""

    def __call__(
        self, x: Tensor, context: Tensor, visibility: Visibility, cache: Cache | None
    ) -> Emission:
        """Project x (b, n, d_model) to queries and context (b, m, d_model) to keys and values."""

    def materialize(self) -> dict[str, Tensor]:
        """Plain weights ``q`` (h, d, d_model), ``k`` and ``v`` (h_kv, d, d_model)."""

    def gradients(self) -> dict[str, Tensor] | None:
        """Gradients of each head's own matrices, as `materialize`; None where there are none."""


class Score(Protocol):
    """How a query rates a key: what it keeps of a key, and how it rates what it kept."""

    schema: Schema
    gives: type
    rotation_invariant: bool
    signed: bool
    """False where the rating is never positive, or known only up to a term of the query alone."""

    def keys(self, key: Any) -> Tensor:
        """What is kept of each key, (b, h_kv, m, width); a cache holds this."""

    def __call__(self, query: Any, keys: Tensor) -> Rating:
        """The rating of kept keys."""

    def carry(self, value: Tensor, key: Any) -> Tensor:
        """Values taken from the frames of their tokens to the common one."""

    def readout(self, out: Tensor, query: Any) -> Tensor:
        """Outputs taken from the common frame to those of the queries."""

    def recenter_(self, key: Any) -> None:
        """Take keys relative to the mean of these, where the score does not depend on it."""

    def scale_head_(self, head: int, power: int) -> None:
        """Multiply one head's logits by 2**power, exactly: what a QK-clip means for this score."""


class Reach(Protocol):
    """Which keys a query can see."""

    ordered: str | None
    """As of a projection: a reach by position serves no context."""
    condenses: bool
    """Whether it attends by itself, to groups of tokens, instead of narrowing what is seen."""

    def __call__(self, visibility: Visibility, n: int, m: int, device: torch.device) -> Visibility:
        """Narrow what the caller allows."""


class Mixer(Protocol):
    """How heads talk to each other."""

    grid: HexGrid | None
    mixes_logits: bool
    """Whether heads talk before the softmax: then the mixer scales heads, as a `Score` does."""

    def mix_logits(self, rating: Rating) -> Rating:
        """The rating with each head's logits a sum over heads, or as it is."""

    def mix_outputs(self, heads: Tensor, impl: str) -> Tensor:
        """Mix head outputs (b, n, h, d), same shape out, by the layer's implementation."""


class Probe(Protocol):
    """A visitor that a layer calls on the steps on which it is set."""

    def observe(self, observation: Observation) -> None:
        """Receive the rating of this forward pass."""

    def mark(self, stage: Literal["start", "projection", "attention", "mixing", "output"]) -> None:
        """A stage of the layer has just ended (``start``: is about to begin)."""


# ---------------------------------------------------------------- training


class Batch(NamedTuple):
    """Model inputs and what they are scored against."""

    inputs: Tensor
    targets: Tensor


class Graph(NamedTuple):
    """Nodes and what joins them; several graphs lie side by side as one whose parts do not meet.

    nodes (n, f): what is known of each; edges (2, e), int64: from and to, an undirected edge twice;
    member (n,), int64: which graph a node belongs to, ascending from 0, zeros for one graph.
    """

    nodes: Tensor
    edges: Tensor
    member: Tensor


class Dataset(Protocol):
    """Batches that depend on (seed, step) alone, so that a step number is a data position."""

    objective: Literal["tokens", "labels", "states"]

    def train_batch(self, seed: int, step: int, size: int) -> Batch:
        """The whole batch of one step, for all ranks and all accumulation slices."""

    def validation_batches(self, size: int) -> Iterator[Batch]:
        """Every validation example exactly once."""


class Seen(Protocol):
    """What an observer has to say about a step."""

    @property
    def text(self) -> tuple[str, ...]:
        """Sentences for whoever is watching."""

    @property
    def stop(self) -> str | None:
        """Why going on is no use, or None."""

    @property
    def acted(self) -> bool:
        """Whether something was done about it."""


class Observer(Protocol):
    """What the loop calls once per step: the governor is one."""

    @property
    def again(self) -> Sequence[Any]:
        """Batches of `data` that will come again before new ones."""

    def data(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The batches in the order they are to be trained on; some of them more than once."""

    def penalty(self) -> Tensor | None:
        """A term to add to this step's loss, or None."""

    def process_step(self, loss: float | None = None) -> Seen:
        """Close the step after the optimizer has moved."""

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs, as plain JSON values."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`."""


# ---------------------------------------------------------------- governing

PerHead = tuple[tuple[float, ...], ...]
"""A signal by layer, then head; () for a layer that did not run."""


class HeadId(NamedTuple):
    """One attention head of a model."""

    layer: int
    head: int


WHOLE = HeadId(-1, -1)
"""The target of what concerns the whole model."""


def layer_of(number: int) -> HeadId:
    """The target of what concerns all heads of a layer."""
    return HeadId(number, -1)


class Snapshot(NamedTuple):
    """What the governor sees at one step. A signal that was not measured is absent.

    Between samples only the loss and a few scalars are there.
    """

    step: int
    loss: float
    signals: Mapping[str, PerHead]
    scalars: Mapping[str, float]
    times_us: Mapping[str, float]

    def signal(self, name: str, target: HeadId) -> float | None:
        """The value of a signal at a head, None where it was not measured.

        At a whole layer it is the median of its heads, at the whole model the loss or a scalar.
        """
        if target == WHOLE:
            if name == "loss":
                return None if math.isnan(self.loss) else self.loss
            return self.scalars.get(name)
        layers = self.signals.get(name)
        heads = layers[target.layer] if layers is not None else ()
        if not heads:
            return None
        return statistics.median(heads) if target.head < 0 else heads[target.head]


@dataclass(frozen=True)
class Expectation:
    """What a change promises: `signal` at `target` moves past `bound` within `within` steps."""

    signal: str
    target: HeadId
    direction: Literal["fall", "rise"]
    bound: float
    within: int


class Change(Protocol):
    """Anything that alters a running model: expected, applied, undone, paid for, proven."""

    name: str
    cost: str
    lasts: int | None
    target: HeadId
    expects: Expectation

    def apply(self, subject: Any) -> None:
        """Alter the running model."""

    def undo(self, subject: Any) -> None:
        """Take the alteration back."""


@dataclass(frozen=True)
class Evidence:
    """What came of a change, against what it promised."""

    held: bool
    value: float
    step: int


@dataclass(frozen=True)
class Effect:
    """A paired effect: the same batches with and without a change."""

    with_change: tuple[float, ...]
    without: tuple[float, ...]
    mean: float
    interval: tuple[float, float]
