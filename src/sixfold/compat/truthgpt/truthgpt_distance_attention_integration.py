"""``truthgpt_distance_attention_integration``: a language model, what it shows, and its lambdas."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sixfold.attention.named.distance import as_mask, distance_score
from sixfold.governor.watch.probe import attention_layers, clock_us
from sixfold.models.language import LanguageModel

SPARSE = 0.01  # a weight below this counts as none


@dataclass
class TruthGPTAttentionConfig:
    """A language model with attention by distance. The two switches may be turned at any time."""

    hidden_size: int = 768
    num_heads: int = 12
    num_layers: int = 12
    vocab_size: int = 1000
    max_position_embeddings: int = 2048
    distance_type: str = "l1"
    lambda_param: float = 1.0
    p_norm: float = 2.0
    enable_performance_monitoring: bool = True
    log_attention_weights: bool = False


@dataclass
class Shown:
    """What the blocks showed of one forward pass, one entry per block."""

    seconds: list[float] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)


@contextmanager
def watching(blocks: nn.ModuleList, *, clocked: bool, weighed: bool) -> Iterator[Shown]:
    """Times, outputs and attention weights of every block, while the context lasts."""
    shown, began = Shown(), []

    def enter(block: nn.Module, inputs: tuple[Tensor, ...]) -> None:  # noqa: ARG001
        began.append(clock_us(inputs[0].device))

    def leave(block: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:  # noqa: ARG001
        shown.states.append(out)
        if clocked:
            shown.seconds.append(1e-6 * (clock_us(out.device) - began.pop()))

    def ask(layer: nn.Module, inputs: Any, options: dict[str, Any]) -> Any:  # noqa: ARG001
        return inputs, options | {"need_weights": True}

    def take(layer: nn.Module, inputs: Any, found: tuple[Tensor, Tensor]) -> Tensor:  # noqa: ARG001
        shown.weights.append(found[1])
        return found[0]

    hooks = []
    for block in blocks:
        if clocked:
            hooks.append(block.register_forward_pre_hook(enter))
        hooks.append(block.register_forward_hook(leave))
        if weighed:
            hooks.append(block.attention.register_forward_pre_hook(ask, with_kwargs=True))
            hooks.append(block.attention.register_forward_hook(take))
    try:
        yield shown
    finally:
        for hook in hooks:
            hook.remove()


class TruthGPTDistanceAttentionModel(nn.Module):
    """A causal `LanguageModel` whose layers attend by distance, with learned positions."""

    def __init__(self, config: TruthGPTAttentionConfig) -> None:
        super().__init__()
        self.config = config
        head_dim = config.hidden_size // config.num_heads
        score = distance_score(config.distance_type, config.lambda_param, config.p_norm, head_dim)
        self.model = LanguageModel(
            config.vocab_size,
            config.max_position_embeddings,
            config.hidden_size,
            config.num_layers,
            {"num_heads": config.num_heads, "score": score},
            positions="learned",
        )
        self.set_learnable_lambda(False)
        self.attention_weights: list[Tensor] = []
        self._seconds, self._passes = [0.0] * config.num_layers, 0

    def set_learnable_lambda(self, enabled: bool = True) -> None:  # noqa: FBT001, FBT002
        """Learn every head's lambda, or leave them where they are."""
        for layer in attention_layers(self):
            layer.score.log_rate.requires_grad_(enabled)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> dict[str, Any]:
        """``logits`` (b, n, vocab_size), ``attentions`` and ``hidden_states`` by layer, or None.

        `attention_mask` (b, n) is 1 at real tokens. With `log_attention_weights` the weights of
        the last pass are kept in `attention_weights`, apart from its graph.
        """
        config, masks = self.config, {} if attention_mask is None else as_mask(attention_mask)
        clocked, logged = config.enable_performance_monitoring, config.log_attention_weights
        weighed = output_attentions or logged
        with watching(self.model.blocks, clocked=clocked, weighed=weighed) as shown:
            logits = self.model(input_ids, **masks)
        if clocked:
            pairs = zip(self._seconds, shown.seconds, strict=True)
            self._seconds, self._passes = [a + b for a, b in pairs], self._passes + 1
        if logged:
            self.attention_weights = [weights.detach() for weights in shown.weights]
        return {
            "logits": logits,
            "attentions": tuple(shown.weights) if output_attentions else None,
            "hidden_states": tuple(shown.states) if output_hidden_states else None,
        }

    def get_performance_stats(self) -> dict[str, dict[str, float]]:
        """Seconds that each layer took per forward pass, over the passes that were timed.

        Raises RuntimeError when none was.
        """
        if not self._passes:
            raise RuntimeError(
                "no forward pass was timed: set enable_performance_monitoring and run the model"
            )
        return {
            f"layer_{layer}": {"avg_forward_time": total / self._passes, "calls": self._passes}
            for layer, total in enumerate(self._seconds)
        }


def of_batch(batch: Any) -> tuple[Tensor, Tensor | None]:
    """Token numbers (b, n), and their mask, of a tensor, a mapping, or a tuple that starts so."""
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, dict):
        return batch["input_ids"], batch.get("attention_mask")
    return batch[0], None


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    """Mean cross-entropy of each next real token, in nats."""
    tokens, mask = of_batch(batch)
    logits, targets = model(tokens, attention_mask=mask)["logits"][:, :-1], tokens[:, 1:]
    if mask is not None:
        targets = targets.masked_fill(mask[:, 1:] == 0, -100)
    return cross_entropy(logits.flatten(0, 1), targets.flatten())


class DistanceAttentionOptimizer:
    """Trains the lambdas of a `TruthGPTDistanceAttentionModel`, and looks at its weights.

    A batch is a tensor of token numbers (b, n), a dict with ``input_ids`` and perhaps
    ``attention_mask``, or a tuple that starts with the token numbers; a dataloader is any iterable
    of batches that can be read more than once.
    """

    def __init__(self, model: TruthGPTDistanceAttentionModel) -> None:
        self.model = model

    def optimize_lambda_parameters(
        self, dataloader: Iterable[Any], num_epochs: int = 5, learning_rate: float = 0.05
    ) -> dict[str, Any]:
        """Move the lambdas, and nothing else, down the loss of the next token.

        Returns ``lambdas`` by layer (one per head) and the mean loss over the dataloader,
        ``loss_before`` and ``loss_after``, both measured.

        Raises ValueError for a dataloader without batches.
        """
        rates = [layer.score.log_rate for layer in attention_layers(self.model)]
        learned, was_training = [rate.requires_grad for rate in rates], self.model.training
        self.model.eval()
        before = self._mean_loss(dataloader)
        try:
            for rate in rates:
                rate.requires_grad_()
            adam = torch.optim.Adam(rates, lr=learning_rate)
            for _ in range(num_epochs):
                for batch in dataloader:
                    gradients = torch.autograd.grad(loss_of(self.model, batch), rates)
                    for rate, gradient in zip(rates, gradients, strict=True):
                        rate.grad = gradient
                    adam.step()
                    adam.zero_grad()
            after = self._mean_loss(dataloader)
        finally:
            for rate, enabled in zip(rates, learned, strict=True):
                rate.requires_grad_(enabled)
            self.model.train(was_training)
        return {"lambdas": self.lambdas(), "loss_before": before, "loss_after": after}

    def lambdas(self) -> dict[str, list[float]]:
        """Every head's lambda, by layer."""
        layers = attention_layers(self.model)
        scaled = [layer.score.rate() * layer.heads.head_dim**0.5 for layer in layers]
        return {f"layer_{index}": each.tolist() for index, each in enumerate(scaled)}

    @torch.no_grad()
    def analyze_attention_patterns(
        self, dataloader: Iterable[Any], num_samples: int = 100
    ) -> dict[int, dict[str, float]]:
        """Of up to `num_samples` sequences, by layer, over heads and real queries.

        ``attention_entropy``: mean of -sum_j a_ij log a_ij, in nats. ``mean_attention`` and
        ``sparsity``: of the weights of visible keys, the mean and the share below 0.01.

        Raises ValueError for a dataloader without batches.
        """
        totals, left = (
            torch.zeros(self.model.config.num_layers, 5, dtype=torch.float64),
            num_samples,
        )
        was_training = self.model.training
        self.model.eval()
        for batch in dataloader:
            if left < 1:
                break
            tokens, mask = of_batch(batch)
            tokens, mask = tokens[:left], None if mask is None else mask[:left]
            found = self.model(tokens, attention_mask=mask, output_attentions=True)["attentions"]
            real = torch.ones_like(tokens) == 1 if mask is None else mask == 1
            totals += torch.stack([sums(weights, real) for weights in found])
            left -= len(tokens)
        self.model.train(was_training)
        if left == num_samples:
            raise ValueError("dataloader holds no batch")
        return {layer: shares(total) for layer, total in enumerate(totals)}

    @torch.no_grad()
    def _mean_loss(self, dataloader: Iterable[Any]) -> float:
        losses = [loss_of(self.model, batch).item() for batch in dataloader]
        if not losses:
            raise ValueError("dataloader holds no batch")
        return sum(losses) / len(losses)


def sums(weights: Tensor, real: Tensor) -> Tensor:
    """Over real queries and visible keys: entropy, queries, weight, small weights, pairs."""
    n = real.shape[1]
    causal = torch.ones(n, n, dtype=torch.bool, device=real.device).tril()
    visible = (causal & real[:, None, :] & real[:, :, None])[:, None].expand_as(weights)
    entropy = torch.special.entr(weights).sum(-1).transpose(1, 2)[real]
    seen = weights[visible]
    found = [entropy.sum(), entropy.numel(), seen.sum(), (seen < SPARSE).sum(), seen.numel()]
    return torch.tensor([float(value) for value in found], dtype=torch.float64)


def shares(total: Tensor) -> dict[str, float]:
    """The metrics of one layer from its `sums`."""
    entropy, queries, weight, small, pairs = total.tolist()
    return {
        "attention_entropy": entropy / queries,
        "mean_attention": weight / pairs,
        "sparsity": small / pairs,
    }
