"""One attention module, four plug points.

O = mix(softmax(score(Q, K) where visible) V) W_O, with Q, K, V = projection(x). Mechanisms differ
in projection, score, reach and mixer; each is a file in the folder of that name, chosen here by the
file's name.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sixfold.attention import moments
from sixfold.attention.allowed import check_flags, check_positive, check_share, check_whole
from sixfold.attention.masks import visibility_of
from sixfold.attention.reach.hierarchical import Far
from sixfold.attention.rotary import rotate, turn
from sixfold.attention.together import Chosen, check
from sixfold.contracts import (
    Cache,
    Emission,
    Heads,
    Observation,
    Probe,
    Rating,
    Statistics,
    Visibility,
)
from sixfold.discover import load, unknown
from sixfold.geometry.hexgrid import HexGrid
from sixfold.ops.attend import choose, reference
from sixfold.ops.attend.logits import explicit, reshaped
from sixfold.ops.condense.groups import Tokens
from sixfold.ops.headmix import logits
from sixfold.ops.statistics.choose import statistics

Part = str | Mapping[str, Any]
"""A variant's name, or its name with options: ``{"name": "hexagonal", "tied": True}``."""


def build_part(kind: str, part: Part, heads: Heads, **factory: Any) -> Any:
    """Build a variant of `kind` (projection, score, reach or mixer) for `heads`.

    Raises ValueError naming the part, for an unknown name or option and for sizes it cannot serve.
    """
    if not isinstance(part, str | Mapping):
        raise ValueError(f"{kind} must be a name, or a name with options, got {part!r}")
    options = {"name": part} if isinstance(part, str) else dict(part)
    if "name" not in options:
        raise ValueError(f'{kind} needs a name: give {{"name": ...}} beside {sorted(options)}')
    name = options.pop("name")
    build = load(f"sixfold.attention.{kind}", name)
    parameters = list(inspect.signature(build).parameters.values())
    known = {p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
    for option in options:
        if option not in known:
            raise ValueError(f"{kind} {name!r}: " + unknown("option", option, known or {"none"}))
    needed = {p.name for p in parameters if p.name in known and p.default is p.empty}
    if missing := sorted(needed - options.keys()):
        raise ValueError(
            f"{kind} {name!r} needs {' and '.join(missing)}: "
            f'give {{"name": {name!r}, "{missing[0]}": ...}}'
        )
    flags = {p.name for p in parameters if isinstance(p.default, bool)}
    try:
        check_flags(**{name: options[name] for name in flags & options.keys()})
        return build(heads, **options, **factory)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{kind} {name!r}: {error}") from error


class Unwatched:
    """The probe of a layer that none is set on."""

    def observe(self, observation: Observation) -> None:
        """Look away."""

    def mark(self, stage: str) -> None:
        """Take no time."""


UNWATCHED = Unwatched()


class MultiHeadAttention(nn.Module):
    """Multi-head attention whose four parts are chosen by name.

    Args:
        d_model: width of inputs and outputs.
        num_heads: query heads.
        head_dim: width of a head, d_model // num_heads unless given.
        num_kv_heads: key and value heads (grouped-query attention), num_heads unless given.
        projection: ``linear``, ``coordinate`` or ``hypernetwork`` for points, ``gaussian`` or
            ``gaussian_diagonal`` for beliefs.
        score: of points ``dot``, ``cosine``, ``l2_squared``, ``l2``, ``l1``, ``lp`` or
            ``chebyshev``; of beliefs ``kl``, ``kl_diagonal``, ``jeffreys`` or ``wasserstein2``.
        reach: ``full``, ``others``, ``alibi``, ``{"name": "window", "width": 128}`` or
            ``hierarchical``.
        mixer: ``none``; ``ring``, ``random``, ``dense``, ``hexagonal`` or ``spectral`` for outputs;
            ``hexagonal_logits``.
        rope_theta: base of rotary position embedding, or None for none.
        softcap: logits become softcap tanh(logit / softcap); all of them are held at once.
        sinks: each head learns the logit of a sink, which takes weight and gives nothing.
        dropout: probability of dropping an attention weight in training.
        impl: ``reference``, ``fused`` (scores that are inner products), ``tiled``, ``numba`` or
            ``triton`` (the other distances) run or raise; ``auto`` takes the fastest at hand.
        batch_first: inputs are (b, n, d_model); else (n, b, d_model).
        device: as in PyTorch.
        dtype: as in PyTorch.

    Raises:
        ValueError: for numbers that cannot be meant, sizes that do not divide, unknown parts (the
            message lists what exists), and for parts that cannot work together (the message names
            both).

    Source: Vaswani et al., arXiv 1706.03762, section 3.2.2.

    >>> layer = MultiHeadAttention(64, 7, head_dim=16, projection="coordinate", mixer="hexagonal")
    >>> layer(torch.randn(2, 10, 64), is_causal=True).shape
    torch.Size([2, 10, 64])
    """

    def __init__(  # noqa: PLR0913 - the constructor of an attention module is its vocabulary
        self,
        d_model: int,
        num_heads: int,
        head_dim: int | None = None,
        num_kv_heads: int | None = None,
        *,
        projection: Part = "linear",
        score: Part = "dot",
        reach: Part = "full",
        mixer: Part = "none",
        rope_theta: float | None = None,
        softcap: float | None = None,
        sinks: bool = False,
        dropout: float = 0.0,
        impl: str = "auto",
        batch_first: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.heads = heads = check_sizes(d_model, num_heads, head_dim, num_kv_heads)
        check_share("dropout", dropout)
        check_positive("rope_theta", rope_theta, none=True)
        check_positive("softcap", softcap, none=True)
        check_flags(sinks=sinks, batch_first=batch_first)
        factory = {"device": device, "dtype": dtype}
        names = {"projection": projection, "score": score, "reach": reach, "mixer": mixer}
        parts = {kind: build_part(kind, part, heads, **factory) for kind, part in names.items()}
        check(
            Chosen(**parts, names=names),
            impl,
            rope=rope_theta is not None,
            softcap=softcap,
            sinks=sinks,
        )
        self.projection, self.score = parts["projection"], parts["score"]
        self.reach, self.mixer = parts["reach"], parts["mixer"]
        self.output = nn.Linear(heads.num_heads * heads.head_dim, d_model, bias=False, **factory)
        if rope_theta is not None and heads.head_dim % 2:
            raise ValueError(
                f"rope turns pairs of features: head_dim must be even, got {heads.head_dim}"
            )
        self.softcap, self.sinks = softcap, None
        if sinks:
            self.sinks = nn.Parameter(torch.zeros(heads.num_heads, **factory))
        self.rope_theta, self.dropout, self.impl = rope_theta, dropout, impl
        self.batch_first = batch_first
        self.probe: Probe | None = None

    @property
    def grid(self) -> HexGrid | None:
        """The hexagonal grid the heads sit on, if a part puts them there."""
        return self.mixer.grid or self.projection.grid

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        attn_mask: Tensor | None = None,
        key_mask: Tensor | None = None,
        is_causal: bool = False,
        cache: Cache | None = None,
        need_weights: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend from x to itself, or to context.

        Args:
            x: (b, n, d_model).
            context: (b, m, d_model) for cross-attention.
            attn_mask: (n, m), (b, n, m) or (b, h, n, m); boolean, True = may attend, or a float
                tensor added to the logits.
            key_mask: (b, m), True = a real key. With a cache, m counts the cached tokens too.
            is_causal: query i sees keys up to i, counted from the end (lower-right aligned).
            cache: earlier segments of the same sequence; extended in place.
            need_weights: also return the attention weights, (b, h, n, m), before dropout.

        Returns:
            (b, n, d_model), or a pair of it and the weights. Rows that may attend to nothing are
            exactly zero in both (the output before any bias).

        Raises:
            ValueError: for inputs and masks of the wrong shape or kind, and for a cache, rope or
                frames of positions with a context.
        """
        x, source = self._sources(x, context, cache)
        probe = self.probe if self.training and self.probe is not None else UNWATCHED
        past = 0 if cache is None else cache.length
        visibility = self._visibility(x, source, past, attn_mask, key_mask, is_causal=is_causal)
        probe.mark("start")
        emitted = self.projection(x, source, visibility, cache)
        query, key, value = self._rotated(emitted, past)
        keys, value = self.score.keys(key), self.score.carry(value, key)
        if cache is not None:
            keys, value = cache.append("key", keys), cache.append("value", value)
        visibility = self.reach(visibility, x.shape[1], past + source.shape[1], x.device)
        far = None
        if self.reach.condenses:
            far = self._far(emitted.key, value, visibility, cache)
        probe.mark("projection")
        # a probe is shown what heads say of keys: no clip could lower a sink
        seen = self._seen(query, keys, visibility)
        rating, value, visibility = self._with_sinks(seen, value)
        dropout = self.dropout if self.training else 0.0
        if far is None:
            out = choose.attend(rating, value, visibility, dropout, self.impl)
        else:
            out = self.reach.attend(rating, far, visibility, dropout, self.impl, cache)
        out = self.score.readout(out, query)
        probe.mark("attention")
        probe.observe(seen)
        mixed = self.mixer.mix_outputs(out.transpose(1, 2), self.impl)
        probe.mark("mixing")
        out = self.output(mixed.flatten(2))
        probe.mark("output")
        out = out if self.batch_first else out.transpose(0, 1)
        if not need_weights:
            return out
        if far is not None:
            rating, visibility = self.reach.explicit(rating, far, visibility)
        return out, self._of_keys(reference.weights(rating, visibility))

    @torch.no_grad()
    def statistics(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        attn_mask: Tensor | None = None,
        key_mask: Tensor | None = None,
        is_causal: bool = False,
        largest: bool = False,
        impl: str = "auto",
    ) -> Statistics:
        """Entropy, weight received and log-sum-exp per head and token, without the weights.

        Arguments as in `forward`; ``largest`` also finds the exact largest logit of each head.

        >>> layer = MultiHeadAttention(32, 4)
        >>> found = layer.statistics(torch.zeros(1, 8, 32))  # all keys alike: log 8 nats
        >>> round(found.entropy.mean().item(), 4), found.received.mean().item()
        (2.0794, 1.0)
        """
        x, source = self._sources(x, context, None)
        visibility = self._visibility(x, source, 0, attn_mask, key_mask, is_causal=is_causal)
        emitted = self.projection(x, source, visibility, None)
        query, key, value = self._rotated(emitted, 0)
        visibility = self.reach(visibility, x.shape[1], source.shape[1], x.device)
        seen = self._seen(query, self.score.keys(key), visibility)
        rating, _, visibility = self._with_sinks(seen, value)
        if self.reach.condenses:
            far = self._far(emitted.key, value, visibility, None)
            rating, visibility = self.reach.explicit(rating, far, visibility)
        seen = seen._replace(rating=rating, visibility=visibility)
        found = statistics(seen, largest=largest, impl=impl)
        return found._replace(received=self._of_keys(found.received))

    def _sources(
        self, x: Tensor, context: Tensor | None, cache: Cache | None
    ) -> tuple[Tensor, Tensor]:
        """Where queries and keys come from, batch first."""
        for name, tokens in (("x", x), ("context", context)):
            if tokens is not None and (tokens.ndim != 3 or tokens.shape[-1] != self.heads.d_model):
                axes = "(b, n, d_model)" if self.batch_first else "(n, b, d_model)"
                raise ValueError(
                    f"{name} must be {axes} with d_model {self.heads.d_model}, "
                    f"got {tuple(tokens.shape)}"
                )
            if tokens is not None and not tokens.is_floating_point():
                raise ValueError(f"{name} must be floating, got {tokens.dtype}: embed tokens first")
        if not self.batch_first:
            x = x.transpose(0, 1)
            context = None if context is None else context.transpose(0, 1)
        if context is not None and len(context) != len(x):
            raise ValueError(f"context has a batch of {len(context)}, x one of {len(x)}")
        ordered = self.projection.ordered or self.reach.ordered
        ordered = "rope" if self.rope_theta is not None else ordered
        if context is not None and (cache is not None or ordered):
            part = "a cache" if cache is not None else ordered
            raise ValueError(f"{part} orders the tokens of one sequence: it cannot serve a context")
        return x, x if context is None else context

    def _visibility(
        self,
        x: Tensor,
        source: Tensor,
        past: int,
        attn_mask: Tensor | None,
        key_mask: Tensor | None,
        *,
        is_causal: bool,
    ) -> Visibility:
        shape = (x.shape[0], self.heads.num_heads, x.shape[1], past + source.shape[1])
        return visibility_of(attn_mask, key_mask, shape, is_causal=is_causal)

    def _rotated(self, emitted: Emission, past: int) -> Emission:
        """What a projection emitted, rotated where this layer rotates."""
        if self.rope_theta is None:
            return emitted
        turned = (rotate(part, past, self.rope_theta) for part in (emitted.query, emitted.key))
        return Emission(*turned, emitted.value)

    def _far(self, key: Any, value: Tensor, visibility: Visibility, cache: Cache | None) -> Far:
        """What condenses: tokens that are not rotated yet; a group stands at their mean place.

        After its moments a token has its place, and 1 if it is a sink, which agrees with no other.
        """
        schema, d = self.score.schema, self.heads.head_dim
        given = moments.moments(key, schema)
        n, m = given.shape[-2], value.shape[-2]
        number = place = torch.arange(m - n, m, device=given.device)
        if visibility.mask is not None:  # of real tokens
            number = visibility.mask[:, :, 0].cumsum(-1)[..., m - n :] - 1
        sink = number < self.reach.given.sinks
        added = torch.stack(torch.broadcast_tensors(place, sink), dim=-1).to(given.dtype)
        given = torch.cat([given, added.expand(*given.shape[:-1], 2)], dim=-1)
        if cache is not None:
            given = cache.append("moments", given)

        def keys(of: Tensor) -> Tensor:
            described = moments.described(of[..., :-2], schema, d, value.dtype)
            if self.rope_theta is not None:
                described = turn(described, of[..., -2], self.rope_theta)
            return self.score.keys(described)

        def apart(one: Tensor, other: Tensor) -> Tensor:
            alone = torch.maximum(one[..., -1], other[..., -1]) > 0
            found = moments.divergence(one[..., :-2], other[..., :-2], schema, d)
            return found.masked_fill(alone, torch.inf)

        return Far(Tokens(given, value, torch.ones_like(given[..., 0])), keys, apart)

    def _seen(self, query: Any, keys: Tensor, visibility: Visibility) -> Observation:
        """What the heads say of the keys: the score's rating, mixed, then capped."""
        rating = self.score(query, keys)
        if self.mixer.mixes_logits and self.impl == "reference":
            rating = logits.explicit(rating)
        rating = self.mixer.mix_logits(rating)
        if self.softcap is not None:
            rating, visibility = explicit(rating, visibility, self.softcap)
        return Observation(rating, visibility, self.score.signed)

    def _with_sinks(self, seen: Observation, value: Tensor) -> tuple[Rating, Tensor, Visibility]:
        """The same with the sinks that this layer has."""
        if self.sinks is None:
            return seen.rating, value, seen.visibility
        return reshaped(seen.rating, value, seen.visibility, None, self.sinks)

    def _of_keys(self, per_key: Tensor) -> Tensor:
        """What is said of each key, without the sink before them."""
        return per_key if self.sinks is None else per_key[..., 1:]

    def scale_head_(self, head: int, power: int) -> None:
        """Multiply the logits of one head by 2**power, in place and exactly reversibly.

        Where logits are mixed, these are the mixed ones, which are observed: what the head tells
        its neighbours stays.
        """
        if not 0 <= head < self.heads.num_heads:
            raise ValueError(f"head must be in [0, {self.heads.num_heads}), got {head}")
        (self.mixer if self.mixer.mixes_logits else self.score).scale_head_(head, power)

    @torch.no_grad()
    def recenter_(self, x: Tensor) -> None:
        """Let the score take keys relative to the mean of those of x (b, n, d_model).

        A layer computes what it computed, with fewer digits lost to an offset that all keys share:
        worth it for squared distances and divergences in half precision. A cache that was begun
        before holds keys relative to the old centre: begin a new one.

        Raises ValueError for a score that takes no centre, and for a mean that is not finite.
        """
        everything = Visibility(None, is_causal=True)
        self.score.recenter_(self._rotated(self.projection(x, x, everything, None), 0).key)

    def materialize(self) -> dict[str, Tensor]:
        """Plain weights ``q`` (h, d, d_model), ``k`` and ``v`` (h_kv, d, d_model)."""
        return self.projection.materialize()


def check_sizes(
    d_model: int, num_heads: int, head_dim: int | None, num_kv_heads: int | None
) -> Heads:
    """Fill in the defaults of the sizes, or raise a ValueError that names the wrong one."""
    optional = {"head_dim": head_dim, "num_kv_heads": num_kv_heads}
    given = {name: size for name, size in optional.items() if size is not None}
    check_whole(d_model=d_model, num_heads=num_heads, **given)
    if head_dim is None:
        if d_model % num_heads:
            raise ValueError(
                f"d_model {d_model} is not a multiple of num_heads {num_heads}: give head_dim"
            )
        head_dim = d_model // num_heads
    num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    if num_heads % num_kv_heads:
        raise ValueError(f"num_kv_heads {num_kv_heads} does not divide num_heads {num_heads}")
    return Heads(d_model, num_heads, head_dim, num_kv_heads)
