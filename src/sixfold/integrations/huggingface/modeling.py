"""Sixfold models as Hugging Face models.

`SixfoldForCausalLM` holds a `LanguageModel`, `SixfoldForSequenceClassification` a
`SequenceClassifier`; both compute what these compute, under the names that `Trainer`, `pipeline`,
`generate`, PEFT and `AutoModel` ask for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sixfold.attention.cache import KeyValueCache
from sixfold.discover import unknown
from sixfold.integrations.huggingface.configuration import SixfoldConfig
from sixfold.models._block import Block
from sixfold.models.classifier import SequenceClassifier
from sixfold.models.language import LanguageModel

# after our own files, whose error names the extra where transformers is missing
from transformers import (  # isort: skip
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DynamicCache,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.cache_utils import Cache, CacheLayerMixin  # isort: skip
from transformers.modeling_layers import GradientCheckpointingLayer  # isort: skip
from transformers.modeling_outputs import (  # isort: skip
    CausalLMOutputWithPast,
    SequenceClassifierOutput,
)
from transformers.utils import can_return_tuple  # isort: skip

OF_THE_LOSS = ("num_items_in_batch", "shift_labels", "ignore_index")
REASONS = {
    "position_ids": "positions are counted over the real tokens of attention_mask, so packed "
    "sequences cannot be told apart",
    "token_type_ids": "these models know no token types; give the tokenizer "
    "model_input_names=['input_ids', 'attention_mask']",
}


class CheckpointedBlock(GradientCheckpointingLayer, Block):
    """A `Block` that can forget its activations and compute them again in the backward pass."""


class RememberedLayer(CacheLayerMixin):
    """One layer of a Hugging Face cache that holds one of ours."""

    # attention writes to the cache itself, under names of its own: a projection may keep more
    # than keys and values, which is why these layers replace those of a `DynamicCache`
    supports_early_init = False
    is_croppable = True

    def __init__(self) -> None:
        super().__init__()
        self.memory = KeyValueCache()

    def lazy_initialization(self, *states: Tensor) -> None:
        """Nothing to prepare: the first entry decides."""

    def update(self, *states: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        """Raise NotImplementedError: only the attention of these models writes here."""
        raise NotImplementedError("a cache that a Sixfold model fills cannot serve another model")

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self.memory.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that queries will see, and where these begin."""
        return self.memory.length + query_length, 0

    def get_max_length(self) -> int:
        """-1: there is no longest."""
        return -1

    # the name of `get_max_length` in older transformers
    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        """Forget everything."""
        self.memory = KeyValueCache()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget so many of the last tokens, given as -n; n > 0 is how many to keep, as it was."""
        held = self.memory.length
        kept = tokens_to_remove if tokens_to_remove > 0 else held + tokens_to_remove
        self.memory.crop(min(kept, held))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select rows of the batch."""
        self.memory.reorder(beam_idx)


def caches_in(past: Cache, blocks: nn.ModuleList) -> list[KeyValueCache]:
    """Our caches inside a `DynamicCache`, which gets one for each block while it is empty.

    Raises ValueError for every other cache, and for one that another model has filled.
    """
    if type(past) is not DynamicCache or past.offloading:
        raise ValueError(
            f"past_key_values must be a DynamicCache on the model's own device, not "
            f"{type(past).__name__}{' with offloading' if past.offloading else ''}: these models "
            "keep entries of their own, which grow"
        )
    if [type(layer) for layer in past.layers] != [RememberedLayer] * len(blocks):
        if past.get_seq_length():
            raise ValueError(
                f"past_key_values holds {past.get_seq_length()} tokens of another model"
            )
        past.layers = [RememberedLayer() for _ in blocks]
    return [layer.memory for layer in past.layers]


def key_mask_of(attention_mask: Tensor | None, batch: int, keys: int) -> Tensor | None:
    """`attention_mask` as our key mask (b, m); None where every token is real.

    Raises ValueError for any other shape, and for floats, which could mean two things.
    """
    if attention_mask is None:
        return None
    if attention_mask.shape != (batch, keys) or attention_mask.is_floating_point():
        raise ValueError(
            f"attention_mask must be (b, m) = {(batch, keys)}, cached tokens included, 1 at real "
            f"tokens and 0 at padding; got {attention_mask.dtype} {tuple(attention_mask.shape)}"
        )
    mask = attention_mask != 0
    # the fused causal kernel takes no mask; a compiler cannot branch on values, and keeps it
    return None if not torch.compiler.is_compiling() and bool(mask.all()) else mask


def check_extra(given: Mapping[str, Any]) -> None:
    """Raise a TypeError for an argument that would be ignored."""
    for name, value in given.items():
        if value is not None and name not in OF_THE_LOSS:
            reason = REASONS.get(name) or unknown("argument", name, (*OF_THE_LOSS, *REASONS))
            raise TypeError(f"{name} is not taken: {reason}")


class SixfoldModel(PreTrainedModel):
    """What both Hugging Face models share; `model` is one of ours."""

    config_class = SixfoldConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["CheckpointedBlock"]  # noqa: RUF012 - Hugging Face reads a list
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012

    def __init__(self, config: SixfoldConfig, model: LanguageModel | SequenceClassifier) -> None:
        super().__init__(config)
        self.model = model
        for block in model.blocks:
            # the same weights and forward; a wrapper would rename every weight
            block.__class__ = CheckpointedBlock
        for tensor in chain(model.parameters(), model.buffers()):
            # drawn by their own constructors, except where a checkpoint is about to be read
            tensor._is_hf_initialized = not tensor.is_meta

    @classmethod
    def fresh(cls, config: SixfoldConfig) -> nn.Module:
        """The model of ours that a configuration describes, with new weights."""
        raise NotImplementedError

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Draw what a checkpoint did not hold as our own constructors draw it."""
        own = chain(self.model.named_parameters(), self.model.named_buffers())
        absent = {
            name: held for name, held in own if not getattr(held, "_is_hf_initialized", False)
        }
        if absent:
            fresh = self.fresh(self.config)
            drawn = dict(chain(fresh.named_parameters(), fresh.named_buffers()))
            for name, held in absent.items():
                held.copy_(drawn[name])

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding."""
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the token embedding."""
        self.model.embedding = value
        self.model.arguments["vocab_size"] = value.num_embeddings

    def embedded(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """Embedded tokens (b, n, d_model), given as these or as ids.

        Raises ValueError for both or neither.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give one of input_ids and inputs_embeds")
        return self.model.embedding(input_ids) if inputs_embeds is None else inputs_embeds

    @property
    def recomputing(self) -> bool:
        """Whether blocks will run a second time, in the backward pass."""
        return self.training and any(block.gradient_checkpointing for block in self.model.blocks)

    @contextmanager
    def recorded(
        self, *, hidden_states: bool | None, attentions: bool | None
    ) -> Iterator[tuple[list[Tensor] | None, list[Tensor] | None]]:
        """States (b, n, d_model) and weights (b, h, n, m) of the pass made inside, where wanted.

        States are the input of every block and the output of the last norm. None means as the
        configuration says.

        Raises ValueError for weights while blocks are to run twice.
        """
        wanted = self.config.output_hidden_states if hidden_states is None else hidden_states
        states: list[Tensor] | None = [] if wanted else None
        wanted = self.config.output_attentions if attentions is None else attentions
        weights: list[Tensor] | None = [] if wanted else None
        if weights is not None and self.recomputing:
            raise ValueError("output_attentions cannot be had with gradient checkpointing")
        handles = [
            *([] if states is None else watch_states(self.model, states)),
            *([] if weights is None else watch_weights(self.model, weights)),
        ]
        try:
            yield states, weights
        finally:
            for handle in handles:
                handle.remove()


def watch_states(model: nn.Module, states: list[Tensor]) -> Iterator[RemovableHandle]:
    """Hooks that note every block's input and what the last norm makes of the last output."""
    for block in model.blocks:
        yield block.register_forward_pre_hook(lambda block, inputs: states.append(inputs[0]))  # noqa: ARG005
    yield model.norm.register_forward_hook(lambda norm, inputs, out: states.append(out))  # noqa: ARG005


def watch_weights(model: nn.Module, weights: list[Tensor]) -> Iterator[RemovableHandle]:
    """Hooks that ask every attention layer for its weights, note them and hand on the output."""

    def ask(layer: nn.Module, inputs: tuple, options: dict) -> tuple[tuple, dict]:  # noqa: ARG001
        return inputs, {**options, "need_weights": True}

    def note(layer: nn.Module, inputs: tuple, found: tuple[Tensor, Tensor]) -> Tensor:  # noqa: ARG001
        weights.append(found[1])
        return found[0]

    for block in model.blocks:
        yield block.attention.register_forward_pre_hook(ask, with_kwargs=True)
        yield block.attention.register_forward_hook(note)


class SixfoldForCausalLM(SixfoldModel, GenerationMixin):
    """A `LanguageModel` that Hugging Face's tools can train, generate with and save.

    >>> config = SixfoldConfig(vocab_size=65, d_model=28, num_heads=7, mixer="hexagonal")
    >>> model = SixfoldForCausalLM(config).eval()
    >>> ids = torch.tensor([[1, 2, 3]])
    >>> model(ids, labels=ids).logits.shape
    torch.Size([1, 3, 65])
    """

    _tied_weights_keys = {"lm_head.weight": "model.embedding.weight"}  # noqa: RUF012

    def __init__(self, config: SixfoldConfig) -> None:
        super().__init__(config, self.fresh(config))
        # the head that LanguageModel takes from its embedding, as the module that tools look for
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def fresh(cls, config: SixfoldConfig) -> LanguageModel:
        """A `LanguageModel` of this configuration."""
        return LanguageModel(
            config.vocab_size,
            config.context,
            config.d_model,
            config.num_layers,
            config.layers(),
            config.positions,
            config.mlp_ratio,
            config.dropout,
        )

    @can_return_tuple
    def forward(  # noqa: PLR0913 - Hugging Face's arguments
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,  # noqa: FBT001
        output_attentions: bool | None = None,  # noqa: FBT001
        output_hidden_states: bool | None = None,  # noqa: FBT001
        logits_to_keep: int | Tensor = 0,
        **loss_options: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (b, n, vocab_size) of the token after each, and the loss against `labels`.

        Args:
            input_ids: (b, n).
            attention_mask: (b, m), 1 at real tokens, 0 at padding on either side; m counts cached
                tokens too.
            past_key_values: a `DynamicCache` of this model, extended in place.
            inputs_embeds: (b, n, d_model) instead of `input_ids`.
            labels: (b, n), the same tokens, -100 where none counts; shifted here.
            use_cache: return a cache; None means as the configuration says, and never in training.
            output_attentions: also the weights (b, h, n, m) of every layer, which costs n m memory.
            output_hidden_states: also every block's input and the last norm's output.
            logits_to_keep: logits of so many last tokens, or of these; 0 for all.
            loss_options: ``num_items_in_batch``, ``shift_labels``, ``ignore_index``.

        Raises:
            ValueError: for a mask or a cache that cannot be meant, and for a cache or weights while
                blocks are recomputed.
            TypeError: for arguments that would be ignored.
        """
        check_extra(loss_options)
        x = self.embedded(input_ids, inputs_embeds)
        past_key_values = self.cache_for(past_key_values, use_cache)
        # an empty cache is false, and still a cache
        caches = None if past_key_values is None else caches_in(past_key_values, self.model.blocks)
        keys = x.shape[1] + (caches[0].length if caches else 0)
        key_mask = key_mask_of(attention_mask, x.shape[0], keys)
        with self.recorded(hidden_states=output_hidden_states, attentions=output_attentions) as (
            states,
            weights,
        ):
            last = self.model.hidden(x, caches=caches, key_mask=key_mask)
        whole = isinstance(logits_to_keep, int)
        logits = self.lm_head(last[:, slice(-logits_to_keep, None) if whole else logits_to_keep])
        loss = None
        if labels is not None:
            size = self.config.vocab_size
            loss = self.loss_function(logits, labels, vocab_size=size, **loss_options)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=past_key_values,
            hidden_states=states and tuple(states),
            attentions=weights and tuple(weights),
        )

    def cache_for(self, past: Cache | None, use_cache: bool | None) -> Cache | None:  # noqa: FBT001
        """The cache of this pass: the one given, a new one, or none.

        Raises ValueError where blocks run twice: they would write twice.
        """
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if self.recomputing and (use_cache or past is not None):
            raise ValueError("use_cache and past_key_values cannot be had with checkpointing")
        return DynamicCache() if use_cache and past is None else past


class SixfoldForSequenceClassification(SixfoldModel):
    """A `SequenceClassifier` that Hugging Face's tools can train and save.

    `attention_mask` says which tokens are real; without one these are all but ``pad_token_id``.
    Its head is ``model.head``: PEFT trains it when named in ``modules_to_save=["head"]``.

    Raises:
        ValueError: for ``positions="learned"``.

    >>> config = SixfoldConfig(vocab_size=65, d_model=16, num_layers=1, num_labels=3)
    >>> SixfoldForSequenceClassification(config)(torch.tensor([[1, 2, 3]])).logits.shape
    torch.Size([1, 3])
    """

    def __init__(self, config: SixfoldConfig) -> None:
        super().__init__(config, self.fresh(config))
        self.post_init()

    @classmethod
    def fresh(cls, config: SixfoldConfig) -> SequenceClassifier:
        """A `SequenceClassifier` of this configuration."""
        if config.positions != "rotary":
            raise ValueError(f"a classifier's positions must be rotary, got {config.positions!r}")
        return SequenceClassifier(
            config.vocab_size,
            config.num_labels,
            config.context,
            config.d_model,
            config.num_layers,
            config.layers(),
            config.pad_token_id or 0,
            config.mlp_ratio,
            config.dropout,
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,  # noqa: FBT001
        output_hidden_states: bool | None = None,  # noqa: FBT001
        **loss_options: Any,
    ) -> SequenceClassifierOutput:
        """Logits (b, num_labels), and the loss against `labels`.

        Args:
            input_ids: (b, n).
            attention_mask: (b, n), 1 at real tokens.
            inputs_embeds: (b, n, d_model) instead of `input_ids`.
            labels: (b,) classes; floats (b, num_labels) for several at once, (b,) to regress.
            output_attentions: also the weights (b, h, n, n) of every layer.
            output_hidden_states: also every block's input and the last norm's output.
            loss_options: ``num_items_in_batch``.

        Raises:
            ValueError: for a mask that cannot be meant, or sequences longer than the context.
            TypeError: for arguments that would be ignored.
        """
        check_extra(loss_options)
        x = self.embedded(input_ids, inputs_embeds)
        pad = self.config.pad_token_id
        if attention_mask is None and input_ids is not None and pad is not None:
            attention_mask = input_ids != pad
        real = key_mask_of(attention_mask, *x.shape[:2])
        real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if real is None else real
        with self.recorded(hidden_states=output_hidden_states, attentions=output_attentions) as (
            states,
            weights,
        ):
            logits = self.model.head(self.model.pooled(x, real))
        loss = None
        if labels is not None:
            given = {"pooled_logits": logits, "config": self.config}
            loss = self.loss_function(logits=logits, labels=labels, **given, **loss_options)
        return SequenceClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=states and tuple(states),
            attentions=weights and tuple(weights),
        )


def register_models() -> None:
    """Make ``AutoConfig`` and ``AutoModelFor...`` know these models; twice is once.

    >>> register_models()
    >>> type(AutoModelForCausalLM.from_config(SixfoldConfig(num_layers=1))).__name__
    'SixfoldForCausalLM'
    """
    AutoConfig.register(SixfoldConfig.model_type, SixfoldConfig, exist_ok=True)
    for auto, model in (
        (AutoModelForCausalLM, SixfoldForCausalLM),
        (AutoModelForSequenceClassification, SixfoldForSequenceClassification),
    ):
        auto.register(SixfoldConfig, model, exist_ok=True)
