"""Scores of points as attention implementations of Hugging Face models.

`register` adds ``sixfold_<score>`` for every score that rates points. A model calls it with queries
and keys as its own projections and rotations made them; what it asks for besides is honoured, or
refused by a `ValueError` that names the score, the model's module and the reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sixfold import discover
from sixfold.attention.masks import visibility_of
from sixfold.attention.multihead import build_part
from sixfold.attention.score.dot import Dot
from sixfold.contracts import Features, Heads, Observation, Rating, Visibility
from sixfold.integrations.convert._stand_in import OWN
from sixfold.ops.attend import choose, reference
from sixfold.ops.attend.logits import explicit, reshaped
from sixfold.ops.attend.show import show

try:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "sixfold.integrations.huggingface needs transformers: pip install 'sixfold[huggingface]'"
    ) from error

PREFIX = "sixfold_"
OPTIONS = ("rate", "p")
"""What ``config.sixfold`` may hold; which of them a score takes, the score itself says."""

LEARNED = "learned"
"""``sixfold_learned`` attends by the score that a converted module keeps, with rates it learns."""

HONOURED = (
    "scaling", "dropout", "is_causal", "sliding_window", "softcap", "s_aux", "position_bias",
    "cu_seq_lens_q", "cu_seq_lens_k", "output_attentions",
)  # fmt: skip
INDIFFERENT = (
    "cache_position", "deterministic", "max_length_k", "max_length_q", "num_items_in_batch",
    "output_hidden_states", "output_router_logits", "position_ids", "use_cache",
)  # fmt: skip
"""What models hand on that is in the mask already, or does not concern attention."""

Attended = tuple[Tensor, Tensor | None]


class Call(NamedTuple):
    """One call of attention: who asks, by which score, and what for."""

    score: str
    module: nn.Module
    asked: Mapping[str, Any]

    def refuse(self, name: str, reason: str) -> ValueError:
        """The error for an argument that cannot be honoured."""
        return ValueError(
            f"{PREFIX}{self.score} in {type(self.module).__name__} cannot honour {name}: {reason}"
        )


class Sight(NamedTuple):
    """Keys and values that exist, (b, h_kv, m, d), and which of them each query sees."""

    key: Tensor
    value: Tensor
    visibility: Visibility


def register() -> None:
    """Make transformers know ``sixfold_<score>`` for every score of points; twice is once.

    Its mask function is registered with it: without one a causal model would see the future.
    Sixfold's own models are registered too. Options come from ``config.sixfold``: ``rate``, the
    positive factor of the logits, and ``p`` for ``lp``.

    >>> register()
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16}
    >>> sizes |= {"vocab_size": 9, "num_attention_heads": 4, "num_key_value_heads": 2}
    >>> config = LlamaConfig(**sizes, attn_implementation="sixfold_l1", sixfold={"rate": 0.5})
    >>> LlamaForCausalLM(config)(torch.arange(8)[None]).logits.shape
    torch.Size([1, 8, 9])
    """
    from sixfold.integrations.huggingface.modeling import register_models

    register_models()
    for score in (*point_scores(), LEARNED):
        AttentionInterface.register(PREFIX + score, attention_by(score))
        AttentionMaskInterface.register(PREFIX + score, sdpa_mask)


def point_scores() -> tuple[str, ...]:
    """Scores that rate points, which is all that a foreign projection emits.

    >>> "l1" in point_scores(), "kl" in point_scores()
    (True, False)
    """
    names = discover.names("sixfold.attention.score")
    any_heads = Heads(8, 1, 8, 1)
    return tuple(n for n in names if build_part("score", n, any_heads).schema == "point")


def attention_by(score: str) -> Callable[..., Attended]:
    """The attention function of one score, as transformers calls it."""

    def forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        **asked: Any,
    ) -> Attended:
        call = Call(score, module, asked)
        check_asked(call)
        key, value, visibility = seen(call, query, key, value, attention_mask)
        part = score_of(call, query, key)
        rating = stretched(call, part(query, part.keys(key)), query.shape[-1])
        check_reshaped(call, part, rating)
        cap, sinks = asked.get("softcap"), asked.get("s_aux")
        if cap is not None:
            rating, visibility = explicit(rating, visibility, cap)
        # what heads say of keys: no clip could lower a sink
        show(Observation(rating, visibility, part.signed), (query, key, value), part)
        rating, value, visibility = reshaped(rating, value, visibility, None, sinks)
        dropout = asked.get("dropout") or 0.0
        out = choose.attend(rating, value, visibility, dropout).transpose(1, 2).contiguous()
        if not asked.get("output_attentions"):
            return out, None
        weights = reference.weights(rating, visibility)
        return out, weights if sinks is None else weights[..., 1:]

    forward.__name__ = forward.__qualname__ = PREFIX + score
    forward.__doc__ = f"Attention by the score ``{score}``: (b, n, h, d), and weights if asked for."
    return forward


def check_asked(call: Call) -> None:
    """Raise a ValueError for an argument that would be ignored although it means something."""
    for name, given in call.asked.items():
        if given is not None and given is not False and name not in HONOURED + INDIFFERENT:
            raise call.refuse(name, f"known are {', '.join(HONOURED)}")


# ---------------------------------------------------------------- which keys a query sees


def seen(call: Call, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Sight:
    """Join the model's mask or causality with biases, windows and documents.

    Without a mask causality is counted from the first key: those beyond the last query are the
    empty places of a static cache.
    """
    n, bias = query.shape[2], call.asked.get("position_bias")
    is_causal = call.asked.get("is_causal")
    if is_causal is None:
        is_causal = getattr(call.module, "is_causal", True)
    is_causal = bool(is_causal) and mask is None and n > 1
    if is_causal and key.shape[2] > n:
        key, value = key[:, :, :n], value[:, :, :n]
        bias = None if bias is None else bias[..., :n]
    shape = (*query.shape[:3], key.shape[2])
    if mask is not None and mask.ndim != 4:
        raise call.refuse("attention_mask", f"it must be {shape}, got {tuple(mask.shape)}")
    if mask is not None and mask.is_floating_point():
        # "not visible" is written as the smallest number; a row of these must not become uniform
        mask = mask.masked_fill(mask <= torch.finfo(mask.dtype).min, -math.inf)
    if bias is not None:
        mask = reference.masked(bias, mask)
    documents = same_document(call, shape)
    if documents is not None:
        mask = reference.restrict(mask, documents)
    visibility = visibility_of(mask, None, shape, is_causal=is_causal)
    return Sight(key, value, windowed(call, visibility, n, key.shape[2], query.device))


def same_document(call: Call, shape: tuple[int, ...]) -> Tensor | None:
    """(1, 1, n, m): True inside the documents whose ends are the cumulative lengths given."""
    ends = [call.asked.get(name) for name in ("cu_seq_lens_q", "cu_seq_lens_k")]
    if ends == [None, None]:
        return None
    if None in ends or shape[0] != 1:
        raise call.refuse("cu_seq_lens", f"both are needed, and a batch of 1; got {shape[0]}")
    query, key = (
        torch.bucketize(torch.arange(size, device=end.device), end, right=True)
        for size, end in zip(shape[2:], ends, strict=True)
    )
    return (query[:, None] == key)[None, None]


def windowed(
    call: Call, visibility: Visibility, n: int, m: int, device: torch.device
) -> Visibility:
    """Apply a sliding window that no mask brought."""
    width = call.asked.get("sliding_window")
    if width is None or visibility.mask is not None or m <= width:
        return visibility
    if n > 1 and not visibility.is_causal:
        raise call.refuse(
            "sliding_window", "without a mask and without causality it has two meanings"
        )
    reach = build_part("reach", {"name": "window", "width": width}, Heads(1, 1, 1, 1))
    return reach(visibility, n, m, device)


# ---------------------------------------------------------------- how it rates them


def score_of(call: Call, query: Tensor, key: Tensor) -> nn.Module:
    """The module's own score, or the constant one that the configuration describes."""
    if call.score == LEARNED:
        if not hasattr(call.module, OWN):
            raise call.refuse("its name", "the module keeps no score: use sixfold's convert")
        return getattr(call.module, OWN)
    num_heads, d = query.shape[1], query.shape[3]
    heads = (num_heads * d, num_heads, d, key.shape[1])
    # no coarser than the points are, and not in half precision
    dtype = torch.promote_types(query.dtype, torch.float32)
    return constant_score(call.score, tuple(options_of(call).items()), heads, query.device, dtype)


def options_of(call: Call) -> dict[str, Any]:
    """``config.sixfold`` of the module, or nothing."""
    options = getattr(getattr(call.module, "config", None), "sixfold", None) or {}
    for name in options:
        if name not in OPTIONS:
            raise ValueError(discover.unknown("option of config.sixfold", name, OPTIONS))
    return dict(options)


CONSTANT: dict[tuple[Any, ...], nn.Module] = {}


def constant_score(*described: Any) -> nn.Module:
    """A score without anything to learn, built once for its name, options, heads and factory."""
    if described not in CONSTANT:
        build_constant(described)
    return CONSTANT[described]


@torch.compiler.disable
def build_constant(described: tuple[Any, ...]) -> None:
    """Build a score into `CONSTANT`; a compiler cannot follow the making of modules."""
    score, options, heads, device, dtype = described
    options = {"name": score, **dict(options)}
    part = build_part("score", options, Heads(*heads), device=device, dtype=dtype)
    CONSTANT[described] = part.requires_grad_(requires_grad=False)


def stretched(call: Call, rating: Rating, d: int) -> Rating:
    """Logits times scaling sqrt(d): 1 for most models, and what T5, Gemma or Granite do besides.

    Not where a rate was given or is learned, which says all, and not for cosine: the scaling
    answers to the lengths of queries and keys, and these are divided out.
    """
    scaling = call.asked.get("scaling")
    if call.score == LEARNED:
        # a dot product is all that has no rate
        settled = not isinstance(getattr(call.module, OWN), Dot)
    else:
        settled = call.score == "cosine" or "rate" in options_of(call)
    if scaling is None or settled:
        return rating
    factor = scaling * math.sqrt(d)
    if isinstance(rating, Features):
        return rating._replace(scale=rating.scale * factor)
    return rating._replace(rate=rating.rate * factor)


# ---------------------------------------------------------------- softcap and sinks


def check_reshaped(call: Call, part: nn.Module, rating: Rating) -> None:
    """Raise a ValueError where a cap or a sink would meet logits that lack a term of the query."""
    asked = [name for name in ("softcap", "s_aux") if call.asked.get(name) is not None]
    if asked and isinstance(rating, Features) and not part.signed:
        raise call.refuse(asked[0], "this score is known only up to a term of the query")
