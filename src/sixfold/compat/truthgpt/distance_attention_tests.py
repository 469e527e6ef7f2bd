"""``distance_attention_tests``: checks that a user can run on the machine at hand.

Every check computes what it claims; one that fails says by how much. Speed is measured beside
`torch.nn.MultiheadAttention` and reported as it is: it is no check, and cannot fail.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sixfold.attention.named.distance import DistanceBasedAttention, DistanceType
from sixfold.compat.truthgpt.truthgpt_distance_attention_integration import (
    TruthGPTAttentionConfig,
    TruthGPTDistanceAttentionModel,
    loss_of,
)
from sixfold.governor.watch.probe import clock_us

ORDERS = {
    DistanceType.L1: 1.0,
    DistanceType.L2: 2.0,
    DistanceType.LP: 3.0,
    DistanceType.CHEBYSHEV: math.inf,
}
LAMBDA = 1.3
REPEATS = 5
Result = dict[str, Any]


@dataclass(frozen=True)
class TestConfig:
    """Sizes at which the checks run, and where."""

    __test__: ClassVar[bool] = False

    batch_size: int = 2
    seq_len: int = 32
    hidden_size: int = 64
    num_heads: int = 4
    device: str = "cpu"


def definition(kind: DistanceType, query: Tensor, key: Tensor) -> Tensor:
    """Distances (b, h, n, m) of queries and keys, pair by pair."""
    query, key = query[..., :, None, :], key[..., None, :, :]
    if kind is DistanceType.COSINE:
        return 1 - torch.cosine_similarity(query, key, dim=-1, eps=1e-12)
    if kind is DistanceType.L2_SQUARED:
        return (query - key).square().sum(-1)
    return torch.linalg.vector_norm(query - key, ORDERS[kind], dim=-1)


def judged(error: float, bound: float) -> Result:
    """Passed where the error is within the bound."""
    return {"passed": error <= bound, "error": error, "bound": bound}


class DistanceAttentionTester:
    """Runs every check of attention by distance at the sizes of a `TestConfig`.

    >>> tester = DistanceAttentionTester(TestConfig(seq_len=8))
    >>> tester.check_distance(DistanceType.L1)["passed"]
    True
    """

    def __init__(self, config: TestConfig | None = None) -> None:
        self.config = config or TestConfig()
        self.device = torch.device(self.config.device)

    def run_all_tests(self) -> dict[str, Result]:
        """Results by check and distance, ``benchmark``, and a ``summary`` of what passed."""
        checks: dict[str, Callable[[DistanceType], Result]] = {
            "distance_metrics": self.check_distance,
            "gradient_flow": self.check_gradients,
            "numerical_stability": self.check_stability,
            "masks": self.check_masks,
            "causality": self.check_causality,
            "integration": self.check_model,
        }
        results = {
            name: {kind.value: check(kind) for kind in DistanceType}
            for name, check in checks.items()
        }
        verdicts = [found["passed"] for by_kind in results.values() for found in by_kind.values()]
        summary = {
            "total": len(verdicts),
            "passed": sum(verdicts),
            "failed": len(verdicts) - sum(verdicts),
            "success_rate": sum(verdicts) / len(verdicts),
        }
        return results | {"benchmark": self.benchmark_performance(), "summary": summary}

    def check_distance(self, kind: DistanceType) -> Result:
        """Weights are softmax(-lambda distance / sqrt(d)) of the layer's own queries and keys."""
        layer, x = self._layer(kind, torch.float64), self._tokens().double()
        roles = layer.attention.materialize()
        query, key = (torch.einsum("hcd,bnd->bhnc", roles[role], x) for role in "qk")
        distance = definition(kind, query, key)
        expected = (-LAMBDA * distance / math.sqrt(query.shape[-1])).softmax(-1)
        found = layer(x, output_attentions=True)[1]
        return judged((found - expected).abs().max().item(), 1e-10)

    def check_gradients(self, kind: DistanceType) -> Result:
        """Every parameter, lambda included, has the gradient that autograd has of the formula."""
        layer, x = self._layer(kind, torch.float64), self._tokens().double()
        formula = self._layer(kind, torch.float64, impl="reference")
        formula.load_state_dict(layer.state_dict())
        aim, found = torch.randn_like(x), []
        for each in (layer, formula):
            each.set_learnable_lambda(True)
            found.append(torch.autograd.grad((each(x)[0] * aim).sum(), tuple(each.parameters())))
        errors = [(a - b).abs().max() / b.abs().max() for a, b in zip(*found, strict=True)]
        return judged(torch.stack(errors).nan_to_num(math.inf).max().item(), 1e-8)

    def check_stability(self, kind: DistanceType) -> Result:
        """Rows are finite and sum to 1 from tiny to huge tokens, and where all are the same."""
        layer, x = self._layer(kind), self._tokens()
        worst = 0.0
        for tokens in (x, 0 * x, 1e-4 * x, 1e4 * x, x[:, :1].expand_as(x)):
            tokens = tokens.clone().requires_grad_()
            out, weights = layer(tokens, output_attentions=True)
            out.sum().backward()
            worst = max(worst, (weights.sum(-1) - 1).abs().max().item())
            if not (out.isfinite().all() and tokens.grad.isfinite().all()):
                worst = math.inf
        return judged(worst, 1e-5)

    def check_masks(self, kind: DistanceType) -> Result:
        """Padding is given no weight, and what stands there changes nothing."""
        layer, x = self._layer(kind), self._tokens()
        mask = torch.ones(x.shape[:2], device=x.device)
        mask[:, -3:] = 0
        out, weights = layer(x, attention_mask=mask, output_attentions=True)
        changed = torch.cat([x[:, :-3], 1 + x[:, -3:]], dim=1)
        other = layer(changed, attention_mask=mask)[0]
        leak = (out - other)[:, :-3].abs().max().item()
        return judged(max(leak, weights[..., -3:].abs().max().item()), 1e-6)

    def check_causality(self, kind: DistanceType) -> Result:
        """With `is_causal` the last token changes nothing before it."""
        layer, x = self._layer(kind), self._tokens()
        changed = torch.cat([x[:, :-1], 1 + x[:, -1:]], dim=1)
        apart = layer(x, is_causal=True)[0] - layer(changed, is_causal=True)[0]
        moved = apart[:, -1].abs().max().item() > 0
        return judged(apart[:, :-1].abs().max().item() if moved else math.inf, 1e-6)

    def check_model(self, kind: DistanceType) -> Result:
        """A language model fits one batch: its loss after 20 steps over that before, within 0.9."""
        config = self.config
        model = TruthGPTDistanceAttentionModel(
            TruthGPTAttentionConfig(
                hidden_size=config.hidden_size,
                num_heads=config.num_heads,
                num_layers=2,
                vocab_size=50,
                max_position_embeddings=config.seq_len,
                distance_type=kind.value,
            )
        ).to(self.device)
        tokens = torch.randint(50, (config.batch_size, config.seq_len), device=self.device)
        adam, losses = torch.optim.Adam(model.parameters(), lr=1e-2), []
        for _ in range(21):
            losses.append(loss_of(model, tokens))
            adam.zero_grad()
            losses[-1].backward()
            adam.step()
        return judged((losses[-1] / losses[0]).item(), 0.9)

    def benchmark_performance(self) -> Result:
        """Seconds of a forward and backward pass, and how many times faster than the standard."""
        config, x = self.config, self._tokens()
        standard = nn.MultiheadAttention(
            config.hidden_size, config.num_heads, batch_first=True, device=self.device
        )
        base = self._seconds(lambda: standard(x, x, x, need_weights=False)[0])
        rows = {}
        for kind in DistanceType:
            layer = self._layer(kind)
            took = self._seconds(lambda layer=layer: layer(x)[0])
            rows[kind.value] = {"seconds": took, "standard_seconds": base, "speedup": base / took}
        return rows

    def _layer(
        self, kind: DistanceType, dtype: torch.dtype = torch.float32, impl: str = "auto"
    ) -> DistanceBasedAttention:
        config, p = self.config, ORDERS[DistanceType.LP]
        options = {"impl": impl, "device": self.device, "dtype": dtype}
        return DistanceBasedAttention(
            config.hidden_size, config.num_heads, kind, LAMBDA, p, **options
        )

    def _tokens(self) -> Tensor:
        config = self.config
        size = (config.batch_size, config.seq_len, config.hidden_size)
        return torch.randn(size, device=self.device)

    def _seconds(self, forward: Callable[[], Tensor]) -> float:
        """Median of `REPEATS`, after one that is not counted."""
        took = []
        for _ in range(REPEATS + 1):
            began = clock_us(self.device)
            forward().sum().backward()
            took.append(1e-6 * (clock_us(self.device) - began))
        return sorted(took[1:])[REPEATS // 2]
