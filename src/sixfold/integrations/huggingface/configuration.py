"""What a Sixfold model is made of, as a Hugging Face configuration."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from sixfold import discover

try:
    from transformers import PreTrainedConfig
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "sixfold.integrations.huggingface needs transformers: pip install 'sixfold[huggingface]'"
    ) from error

PARTS = ("projection", "score", "reach", "mixer")
OPTIONS = ("num_heads", "head_dim", "num_kv_heads", *PARTS, "impl")
"""Words that mean the same here and in `MultiHeadAttention`."""

NEAR = 0.85
"""How alike an unknown word and one of ours are, when the one was meant for the other."""


class SixfoldConfig(PreTrainedConfig):
    """The words of `LanguageModel`, `SequenceClassifier` and `MultiHeadAttention`, in one place.

    Hugging Face's own words are read and written as well: ``hidden_size``, ``num_hidden_layers``,
    ``num_attention_heads``, ``num_key_value_heads``, ``max_position_embeddings``.

    Args:
        vocab_size: number of tokens.
        context: longest sequence seen in training.
        d_model: width.
        num_layers: blocks.
        num_heads: query heads of a layer.
        head_dim: width of a head, d_model // num_heads unless given.
        num_kv_heads: key and value heads, num_heads unless given.
        projection: a projection's name, or its name with options.
        score: the same for the score.
        reach: the same for the reach.
        mixer: the same for the mixer.
        positions: ``rotary`` or ``learned``; a classifier's are rotary.
        rope_theta: base of rotary positions, the model's own unless given.
        mlp_ratio: hidden width of the MLP over d_model.
        dropout: probability of dropping a residual update.
        attention_dropout: probability of dropping an attention weight.
        impl: ``auto``, or one that runs or raises.
        attention: for each layer the options of `MultiHeadAttention` that differ from these.
        use_cache: whether a pass in evaluation mode returns a cache.
        kwargs: what every Hugging Face configuration takes, e.g. ``num_labels``, ``pad_token_id``.

    Raises:
        ValueError: for an unknown part or a misspelt word, naming the nearest, and for
            ``tie_word_embeddings=False``: the head of these models is their embedding.

    >>> config = SixfoldConfig(vocab_size=65, hidden_size=28, num_heads=7, mixer="hexagonal")
    >>> config.d_model, config.num_attention_heads
    (28, 7)
    """

    model_type = "sixfold"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "num_key_value_heads": "num_kv_heads",
        "max_position_embeddings": "context",
    }

    def __init__(  # noqa: PLR0913 - the constructor of a model is its vocabulary
        self,
        vocab_size: int = 256,
        context: int = 256,
        d_model: int = 128,
        num_layers: int = 4,
        num_heads: int = 4,
        head_dim: int | None = None,
        num_kv_heads: int | None = None,
        *,
        projection: str | Mapping[str, Any] = "linear",
        score: str | Mapping[str, Any] = "dot",
        reach: str | Mapping[str, Any] = "full",
        mixer: str | Mapping[str, Any] = "none",
        positions: str = "rotary",
        rope_theta: float | None = None,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        impl: str = "auto",
        attention: Sequence[Mapping[str, Any]] | None = None,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        own = {name: value for name, value in locals().items() if name not in ("self", "kwargs")}
        own.pop("__class__", None)
        check_words(kwargs, own)
        check_layers(attention)
        for name, value in own.items():
            setattr(self, name, value)
        # there is no other head; loading code asks for this word
        self.tie_word_embeddings = kwargs.pop("tie_word_embeddings", True)
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            setattr(self, name, kwargs.pop(name, None))
        super().__init__(**kwargs)
        if not self.tie_word_embeddings:
            raise ValueError(
                "tie_word_embeddings must be True: the head of these models is their embedding"
            )
        for layer in self.layers():
            check_parts(layer)

    def layers(self) -> list[dict[str, Any]]:
        """Options of `MultiHeadAttention` for every layer."""
        shared = {name: getattr(self, name) for name in OPTIONS}
        shared["dropout"] = self.attention_dropout
        if self.rope_theta is not None:
            shared["rope_theta"] = self.rope_theta
        return [{**shared, **own} for own in self.attention or [{}] * self.num_layers]


def check_words(given: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise a ValueError for a word that is nearly one of ours, or said in both languages.

    Other words pass: Hugging Face keeps whatever a configuration is given.
    """
    defaults = inspect.signature(SixfoldConfig).parameters
    for alias, name in SixfoldConfig.attribute_map.items():
        if alias in given and own[name] != defaults[name].default:
            raise ValueError(f"{alias} is {name}: give one of them")
    ours = [*own, *SixfoldConfig.attribute_map]
    for name in given:
        near = difflib.get_close_matches(name, ours, n=1, cutoff=NEAR)
        if name not in ours and near:
            raise ValueError(discover.unknown("option", name, ours))


def check_layers(attention: object) -> None:
    """Raise a ValueError for what does not list options."""
    listed = isinstance(attention, Sequence) and all(isinstance(o, Mapping) for o in attention)
    if attention is not None and not listed:
        raise ValueError(
            "attention must list options for each layer, as in [{'num_heads': 4}, {}], or be None, "
            f"got {attention!r}"
        )


def check_parts(options: Mapping[str, Any]) -> None:
    """Raise a ValueError for a part or an option of a layer that does not exist."""
    known = (*OPTIONS, "dropout", "rope_theta")
    for option in options:
        if option not in known:
            raise ValueError(discover.unknown("option of attention", option, known))
    for kind in PARTS:
        part = options[kind]
        name = part.get("name") if isinstance(part, Mapping) else part
        exist = discover.names(f"sixfold.attention.{kind}")
        if name not in exist:
            raise ValueError(discover.unknown(kind, name, exist))
