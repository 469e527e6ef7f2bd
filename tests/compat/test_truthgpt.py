"""Attention by distance under the fifth document's names: its lines run, its numbers are checked."""

# ruff: noqa: T201 - the document's lines print

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

import sixfold
from sixfold import DistanceBasedAttention, DistanceType, LeadMetaArchitect, MultiHeadAttention
from sixfold.compat.truthgpt import distance_attention_tests, distance_based_attention
from sixfold.compat.truthgpt import truthgpt_distance_attention_integration as integration
from sixfold.compat.truthgpt.distance_attention_tests import DistanceAttentionTester, TestConfig
from sixfold.compat.truthgpt.distance_based_attention import (
    DistanceAttentionConfig,
    create_distance_attention,
)
from sixfold.compat.truthgpt.truthgpt_distance_attention_integration import (
    DistanceAttentionOptimizer,
    TruthGPTAttentionConfig,
    TruthGPTDistanceAttentionModel,
)
from sixfold.errors import ConfigError

EXACT = {"rtol": 0, "atol": 1e-13}
KINDS = list(DistanceType)
P = 2.5


def tokens(n=6, width=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, n, width, dtype=torch.float64, generator=generator)


def layer_of(kind, lambda_param=1.7, **options):
    options = {"dtype": torch.float64, "impl": "reference"} | options
    return DistanceBasedAttention(12, 3, kind, lambda_param, p_norm=P, **options)


def distance(kind, q, k):
    """One pair, by its definition."""
    if kind is DistanceType.COSINE:
        return 1 - (q @ k) / (q.norm() * k.norm())
    gaps = [abs(a - b) for a, b in zip(q.tolist(), k.tolist(), strict=True)]
    return {
        DistanceType.L1: sum(gaps),
        DistanceType.L2: math.sqrt(sum(gap**2 for gap in gaps)),
        DistanceType.L2_SQUARED: sum(gap**2 for gap in gaps),
        DistanceType.LP: sum(gap**P for gap in gaps) ** (1 / P),
        DistanceType.CHEBYSHEV: max(gaps),
    }[kind]


def by_definition(layer, x, kind, lambdas, *, is_causal=False, real=None):
    """O_i = W_O sum_j softmax_j(lambda_h L_ij / sqrt(d)) V_j, pair by pair."""
    roles = layer.attention.materialize()
    heads, d = layer.attention.heads.num_heads, layer.attention.heads.head_dim
    q, k, v = (torch.einsum("hcd,bnd->bhnc", roles[role].detach(), x) for role in "qkv")
    n = x.shape[1]
    weights = torch.zeros(2, heads, n, n, dtype=x.dtype)
    for b in range(2):
        for h in range(heads):
            for i in range(n):
                row = torch.full((n,), -math.inf, dtype=x.dtype)
                for j in range(i + 1 if is_causal else n):
                    if real is None or real[b, j]:
                        L = -distance(kind, q[b, h, i], k[b, h, j])
                        row[j] = lambdas[h] * L / math.sqrt(d)
                weights[b, h, i] = row.softmax(-1)
    out = (weights @ v).transpose(1, 2).flatten(2)
    return out @ layer.attention.output.weight.detach().T, weights


# ---------------------------------------------------------------- the layer


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_the_softmax_of_lambda_times_minus_distance_over_root_d(kind):
    layer, x = layer_of(kind), tokens()
    out, weights = layer(x, output_attentions=True)
    expected = by_definition(layer, x, kind, [1.7] * 3)
    torch.testing.assert_close(out, expected[0], **EXACT)
    torch.testing.assert_close(weights, expected[1], **EXACT)


@pytest.mark.parametrize("kind", [DistanceType.L1, DistanceType.COSINE, DistanceType.L2_SQUARED])
def test_padding_and_the_future_are_left_out_of_the_softmax(kind):
    layer, x = layer_of(kind), tokens()
    mask = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 0, 1, 1, 1]])
    for given in (mask, mask.bool(), mask.double()):
        out, weights = layer(x, given, True, is_causal=True)
        expected = by_definition(layer, x, kind, [1.7] * 3, is_causal=True, real=mask)
        torch.testing.assert_close(out, expected[0], **EXACT)
        torch.testing.assert_close(weights, expected[1], **EXACT)
    pairs = torch.ones(6, 6, dtype=torch.bool).tril() & mask.bool()[:, None]
    torch.testing.assert_close(layer(x, pairs)[0], out, **EXACT)


def test_a_mask_that_cannot_be_meant_is_named():
    layer, x = layer_of("l1"), tokens()
    with pytest.raises(ValueError, match=r"attention_mask of tokens must hold 1 .real. and 0"):
        layer(x, torch.full((2, 6), -1e9))
    with pytest.raises(ValueError, match="key_mask must be boolean"):
        layer(x, torch.ones(2, 5))


def test_every_implementation_that_auto_may_choose_gives_the_same():
    x = tokens()
    for kind in KINDS:
        slow, fast = layer_of(kind), layer_of(kind, impl="auto")
        fast.load_state_dict(slow.state_dict())
        torch.testing.assert_close(fast(x)[0], slow(x)[0], rtol=0, atol=1e-12)


def test_a_learned_lambda_is_one_per_head_positive_and_in_the_formula():
    layer, x = layer_of("l1"), tokens()
    assert layer.learnable_lambda is None
    assert not layer.attention.score.log_rate.requires_grad
    layer.set_learnable_lambda(True)
    torch.testing.assert_close(layer.learnable_lambda, torch.full((3,), 1.7, dtype=x.dtype))
    optimizer = torch.optim.SGD([layer.attention.score.log_rate], lr=50.0)
    (-layer(x, output_attentions=True)[1].square().sum()).backward()  # sharper rows, larger lambda
    optimizer.step()
    moved = layer.learnable_lambda.detach()
    assert (moved > 1.7).all()
    expected = by_definition(layer, x, DistanceType.L1, moved)
    torch.testing.assert_close(layer(x)[0], expected[0], **EXACT)
    with torch.no_grad():
        layer.attention.score.log_rate -= 100
    assert (layer.lambda_param > 0).all()
    layer.set_learnable_lambda(False)
    assert layer.learnable_lambda is None
    assert not layer.attention.score.log_rate.requires_grad


def test_lambda_has_the_gradient_of_finite_differences():
    layer, x = layer_of("l2"), tokens()
    layer.set_learnable_lambda(True)
    rate, aim = layer.attention.score.log_rate, torch.randn(2, 6, 12, dtype=torch.float64)
    (found,) = torch.autograd.grad((layer(x)[0] * aim).sum(), rate)
    for head in range(3):
        ends = []
        for step in (1e-5, -1e-5):
            other = layer_of("l2")
            other.load_state_dict(layer.state_dict())
            with torch.no_grad():
                other.attention.score.log_rate[head] += step
            ends.append((other(x)[0] * aim).sum().item())
        assert found[head].item() == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-7, abs=1e-9)


def test_lambda_and_p_are_checked():
    for wrong in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="lambda_param must be positive"):
            DistanceBasedAttention(12, 3, "l1", wrong)
    with pytest.raises(ValueError, match=r"lambda_param must be at most 100.0 sqrt\(4\)"):
        DistanceBasedAttention(12, 3, "cosine", 201.0)
    with pytest.raises(ValueError, match=r"p_norm must be in \[1, inf\], got 0.5"):
        DistanceBasedAttention(12, 3, "lp", p_norm=0.5)
    with pytest.raises(ValueError, match=r"unknown distance_type 'l3'.*chebyshev"):
        DistanceBasedAttention(12, 3, "l3")
    with pytest.raises(ValueError, match="not a multiple of num_heads"):
        DistanceBasedAttention(13, 3)


def test_lp_meets_its_neighbours():
    x = tokens()
    for p, kind in ((1.0, "l1"), (2.0, "l2"), (math.inf, "chebyshev")):
        one = DistanceBasedAttention(12, 3, "lp", p_norm=p, dtype=torch.float64)
        two = DistanceBasedAttention(12, 3, kind, dtype=torch.float64)
        two.load_state_dict(one.state_dict())
        torch.testing.assert_close(one(x)[0], two(x)[0], rtol=0, atol=1e-12)


def test_where_a_query_meets_a_key_every_distance_has_a_finite_gradient():
    """The p-th root of a sum of powers has an infinite slope at 0; the subgradient here is 0."""
    for kind in KINDS:
        layer = layer_of(kind, impl="auto")
        same = tokens()[:, :1].expand(2, 6, 12).clone().requires_grad_()
        weight = layer.attention.projection.qkv.weight
        weight.data[:24] = 0  # every query and key is the origin
        layer(same)[0].square().sum().backward()
        assert same.grad.isfinite().all()
        assert weight.grad.isfinite().all()


def test_the_cosine_with_lambda_one_is_nearly_uniform():
    """1 - cos lies in [0, 2]: with lambda 1 and d = 64 no two weights differ by more than e^(1/4)."""
    layer = DistanceBasedAttention(128, 2, DistanceType.COSINE, 1.0)
    weights = layer(torch.randn(2, 50, 128), output_attentions=True)[1]
    assert weights.amax() / weights.amin() < math.exp(0.25)


def test_the_weights_are_those_before_dropout_and_dropout_acts_in_training():
    layer, x = layer_of("l1", dropout=0.5), tokens()
    out, weights = layer(x, output_attentions=True)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 6, dtype=x.dtype))
    assert not torch.equal(out, layer(x)[0])
    layer.eval()
    torch.testing.assert_close(layer(x)[0], layer(x)[0], **EXACT)


def test_the_governor_sees_its_heads():
    layer = DistanceBasedAttention(24, 4)
    lma = LeadMetaArchitect(layer)
    layer(torch.randn(2, 9, 24))
    assert len(lma.process_step().snapshot.signals["entropy"][0]) == 4
    assert isinstance(layer.attention, MultiHeadAttention)


def test_adding_a_distance_needs_an_implementation():
    assert {kind.value for kind in DistanceType} <= set(
        sixfold.discover.names("sixfold.attention.score")
    )


# ---------------------------------------------------------------- the document's lines


def test_basic_usage():
    from sixfold.compat.truthgpt.distance_based_attention import (
        DistanceBasedAttention,
        DistanceType,
    )

    # Create attention mechanism
    attention = DistanceBasedAttention(
        hidden_size=768,
        num_heads=12,
        distance_type=DistanceType.L1,
        lambda_param=1.0
    )  # fmt: skip

    # Forward pass
    x = torch.randn(2, 128, 768)  # (batch_size, seq_len, hidden_size)
    output, attn_weights = attention(x, output_attentions=True)

    assert output.shape == x.shape
    assert attn_weights.shape == (2, 12, 128, 128)
    torch.testing.assert_close(attn_weights.sum(-1), torch.ones(2, 12, 128))
    assert attention(x)[1] is None
    assert DistanceBasedAttention is sixfold.DistanceBasedAttention
    assert distance_based_attention.DistanceType is sixfold.DistanceType


def test_learnable_lambda_parameters(capsys):
    attention = DistanceBasedAttention(
        hidden_size=768,
        num_heads=12,
        distance_type=DistanceType.L1,
        lambda_param=1.0
    )  # fmt: skip

    # Enable learnable lambda
    attention.set_learnable_lambda(True)

    # Lambda parameter is now trainable
    print(f"Learnable lambda: {attention.learnable_lambda}")

    assert attention.learnable_lambda.shape == (12,)
    assert "Learnable lambda: tensor([1" in capsys.readouterr().out


@pytest.fixture(scope="module")
def tested():
    """The document's own lines, once for all who look at what they found."""
    torch.manual_seed(0)
    printed = io.StringIO()
    with redirect_stdout(printed):
        # Create test configuration
        config = TestConfig(device="cuda" if torch.cuda.is_available() else "cpu")

        # Run comprehensive test suite
        tester = DistanceAttentionTester(config)
        results = tester.run_all_tests()

        # Print results
        summary = results['summary']  # fmt: skip
        print(f"Success Rate: {summary['success_rate']:.2%}")
    return results, printed.getvalue()


def test_run_all_tests(tested):
    results, printed = tested
    assert printed == "Success Rate: 100.00%\n"
    assert results["summary"] == {"total": 36, "passed": 36, "failed": 0, "success_rate": 1.0}
    for check in ("distance_metrics", "gradient_flow", "numerical_stability", "masks", "causality"):
        assert set(results[check]) == {kind.value for kind in KINDS}


def test_the_speed_is_a_measurement_and_no_check(tested):
    rows = tested[0]["benchmark"]
    assert set(rows) == {kind.value for kind in KINDS}
    for row in rows.values():
        assert row["seconds"] > 0
        assert row["speedup"] == pytest.approx(row["standard_seconds"] / row["seconds"])


def test_a_wrong_distance_a_leak_and_a_dead_gradient_are_found(monkeypatch):
    tester = DistanceAttentionTester(TestConfig(seq_len=8, hidden_size=16))
    monkeypatch.setitem(distance_attention_tests.ORDERS, DistanceType.L1, 2.0)
    assert not tester.check_distance(DistanceType.L1)["passed"]
    honest = DistanceBasedAttention.forward

    def leaking(layer, x, attention_mask=None, output_attentions=False, *, is_causal=False):
        return honest(layer, x, None, output_attentions)

    monkeypatch.setattr(DistanceBasedAttention, "forward", leaking)
    assert not tester.check_masks(DistanceType.L2)["passed"]
    assert not tester.check_causality(DistanceType.L2)["passed"]

    def exploding(layer, x, *masks, **options):
        out, weights = honest(layer, x, *masks, **options)
        return out / (0 * out), weights

    monkeypatch.setattr(DistanceBasedAttention, "forward", exploding)
    assert not tester.check_stability(DistanceType.L2)["passed"]

    def tilted(layer, x, *masks, **options):
        out, weights = honest(layer, x, *masks, **options)
        return out * (1.01 if layer.attention.impl == "auto" else 1.0), weights

    monkeypatch.setattr(DistanceBasedAttention, "forward", tilted)
    assert not tester.check_gradients(DistanceType.L2)["passed"]


def test_one_failure_lowers_the_success_rate(monkeypatch):
    fail = {"passed": False, "error": 1.0, "bound": 0.0}
    fine = {"passed": True, "error": 0.0, "bound": 0.0}
    for check in ("gradients", "stability", "masks", "causality", "model"):
        monkeypatch.setattr(DistanceAttentionTester, f"check_{check}", lambda self, kind: fine)
    monkeypatch.setattr(
        DistanceAttentionTester,
        "check_distance",
        lambda self, kind: fail if kind is DistanceType.LP else fine,
    )
    monkeypatch.setattr(DistanceAttentionTester, "benchmark_performance", lambda self: {})
    summary = DistanceAttentionTester().run_all_tests()["summary"]
    assert summary == {"total": 36, "passed": 35, "failed": 1, "success_rate": 35 / 36}


def test_every_field_of_the_configuration():
    config = DistanceAttentionConfig(
        hidden_size=768,           # Model hidden size
        num_heads=12,              # Number of attention heads
        distance_type="l1",        # Distance metric: "l1", "l2", "lp", "cosine", "chebyshev"
        lambda_param=1.0,          # Tuning parameter lambda
        p_norm=2.0,               # P value for Lp distance
        dropout=0.1,              # Dropout probability
        use_learnable_lambda=True, # Enable learnable lambda parameter
        use_residual=True,        # Use residual connections
        use_layer_norm=True       # Use layer normalization
    )  # fmt: skip
    layer = create_distance_attention(config)
    assert layer.attention.attention.heads == (768, 12, 64, 12)
    assert layer.attention.attention.dropout == 0.1
    assert layer.attention.learnable_lambda.shape == (12,)
    assert json.loads(json.dumps(config.to_dict())) == config.to_dict()
    assert DistanceAttentionConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ConfigError, match="Did you mean 'lambda_param'"):
        DistanceAttentionConfig.from_dict({"lambda_para": 1.0})
    with pytest.raises(ValueError, match="unknown distance_type"):
        DistanceAttentionConfig(distance_type="l3")
    with pytest.raises(ValueError, match="not both"):
        create_distance_attention(config, hidden_size=12)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("norm", [True, False])
def test_residual_and_norm_are_what_they_say(residual, norm):
    layer = create_distance_attention(
        hidden_size=12, num_heads=3, distance_type="lp", lambda_param=1.2, p_norm=P, dropout=0.0,
        use_residual=residual, use_layer_norm=norm,
    ).double()  # fmt: skip
    x, inner = tokens(), layer.attention
    mean, deviation = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
    read = (x - mean) / (deviation + 1e-5).sqrt() if norm else x
    expected = by_definition(inner, read, DistanceType.LP, inner.lambda_param.detach())
    found, weights = layer(x, output_attentions=True)
    torch.testing.assert_close(found, expected[0] + (x if residual else 0), rtol=0, atol=1e-11)
    torch.testing.assert_close(weights, expected[1], rtol=0, atol=1e-11)
    assert inner.learnable_lambda is None


@pytest.mark.parametrize(
    ("kind", "strength"), [("l1", 1.0), ("l2", 1.2), ("cosine", 0.8)], ids=["text", "vision", "series"]
)  # fmt: skip
def test_the_use_cases_are_configurations(kind, strength):
    config = DistanceAttentionConfig(
        distance_type=kind,
        lambda_param=strength
    )  # fmt: skip
    inner = create_distance_attention(config).attention
    assert inner.distance_type.value == kind
    torch.testing.assert_close(inner.lambda_param, torch.full((12,), strength))


# ---------------------------------------------------------------- the model


def small(**fields):
    sizes = {"hidden_size": 16, "num_heads": 2, "num_layers": 2, "vocab_size": 11}
    config = TruthGPTAttentionConfig(**{**sizes, "max_position_embeddings": 12, **fields})
    return config, TruthGPTDistanceAttentionModel(config)


def test_every_field_of_the_model_configuration():
    config = TruthGPTAttentionConfig(
        hidden_size=768,                    # Model hidden size
        num_heads=12,                       # Number of attention heads
        num_layers=6,                       # Number of transformer layers
        vocab_size=1000,                    # Vocabulary size
        distance_type="l1",                 # Distance metric
        lambda_param=1.0,                   # Tuning parameter
        enable_performance_monitoring=True, # Enable performance tracking
        log_attention_weights=False         # Log attention weights
    )  # fmt: skip
    model = TruthGPTDistanceAttentionModel(config)
    layers = [m for m in model.modules() if isinstance(m, MultiHeadAttention)]
    assert [layer.heads for layer in layers] == [(768, 12, 64, 12)] * 6
    assert model.model.embedding.weight.shape == (1000, 768)
    for layer in layers:
        torch.testing.assert_close(layer.score.rate(), torch.full((12,), 1 / 8))
    # four projections a layer; the document's figure for the whole model is smaller
    assert sum(p.numel() for p in model.parameters()) > 6 * 4 * 768**2 > 6_241_796


@pytest.mark.parametrize("kind", ["l2", "lp"])
def test_the_model_is_a_language_model_with_that_score(kind):
    _, model = small(distance_type=kind, lambda_param=2.0, p_norm=P)
    plain = sixfold.LanguageModel(
        11, 12, 16, 2, positions="learned",
        attention={"num_heads": 2, "score": {"name": kind, "rate": 2 / 8**0.5} | ({"p": P} if kind == "lp" else {})},
    )  # fmt: skip
    plain.load_state_dict(model.model.state_dict())
    ids = torch.randint(11, (3, 7))
    out = model(ids)
    torch.testing.assert_close(out["logits"], plain(ids))
    assert out["attentions"] is None
    assert out["hidden_states"] is None


def test_what_the_model_returns_when_asked():
    _, model = small()
    ids, mask = torch.randint(11, (2, 7)), torch.tensor([[1] * 7, [1] * 5 + [0] * 2])
    out = model(ids, attention_mask=mask, output_attentions=True, output_hidden_states=True)
    assert [w.shape for w in out["attentions"]] == [(2, 2, 7, 7)] * 2
    future = torch.ones(7, 7).triu(1).bool()
    for weights in out["attentions"]:
        assert not weights[..., future].any()
        assert not weights[1, ..., 5:].any()
    states = model.model.norm(out["hidden_states"][-1])
    torch.testing.assert_close(states @ model.model.embedding.weight.T, out["logits"])
    torch.testing.assert_close(model(ids, attention_mask=mask)["logits"], out["logits"])
    shorter = model(ids[1:, :5])["logits"]
    torch.testing.assert_close(out["logits"][1:, :5], shorter)


def test_the_switch_logs_attention_weights():
    config, model = small(log_attention_weights=True)
    ids = torch.randint(11, (1, 5))
    assert model(ids)["attentions"] is None
    asked = model(ids, output_attentions=True)["attentions"]
    for logged, weights in zip(model.attention_weights, asked, strict=True):
        assert torch.equal(logged, weights)
        assert not logged.requires_grad
    config.log_attention_weights = False
    kept = model.attention_weights
    model(torch.randint(11, (1, 6)))
    assert model.attention_weights is kept


def test_performance_monitoring(capsys):
    config, model = small(enable_performance_monitoring=False)
    model(torch.randint(11, (2, 7)))
    with pytest.raises(RuntimeError, match="set enable_performance_monitoring"):
        model.get_performance_stats()

    # Enable performance monitoring
    config.enable_performance_monitoring = True
    model(torch.randint(11, (2, 7)))
    model(torch.randint(11, (2, 7)))

    # After training/inference
    perf_stats = model.get_performance_stats()
    print(f"Average forward time: {perf_stats['layer_0']['avg_forward_time']:.4f}s")

    assert "Average forward time: 0." in capsys.readouterr().out
    assert set(perf_stats) == {"layer_0", "layer_1"}
    assert perf_stats["layer_1"]["calls"] == 2


def test_times_are_those_of_the_layer_that_took_them(monkeypatch):
    _, model = small()
    ticks = iter([0.0, 3e6, 10e6, 15e6])
    monkeypatch.setattr(integration, "clock_us", lambda device: next(ticks))
    model(torch.randint(11, (2, 7)))
    stats = model.get_performance_stats()
    assert stats["layer_0"]["avg_forward_time"] == pytest.approx(3)
    assert stats["layer_1"]["avg_forward_time"] == pytest.approx(5)


def test_nothing_stays_hooked_when_a_pass_fails():
    _, model = small()
    with pytest.raises(ValueError, match="longer than the context"):
        model(torch.randint(11, (1, 13)), output_attentions=True)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# ---------------------------------------------------------------- the optimizer


def batches(count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(11, (4, 9), generator=generator) for _ in range(count)]


def test_attention_pattern_analysis(capsys):
    _, model = small(num_layers=3)
    dataloader = torch.utils.data.DataLoader(torch.randint(11, (20, 9)), batch_size=8)

    optimizer = DistanceAttentionOptimizer(model)
    analysis = optimizer.analyze_attention_patterns(dataloader, num_samples=100)

    for layer_idx, metrics in analysis.items():
        print(f"Layer {layer_idx}: entropy={metrics['attention_entropy']:.4f}")

    assert capsys.readouterr().out.count("entropy=") == 3
    assert list(analysis) == [0, 1, 2]


def test_the_analysis_is_computed_from_the_weights():
    _, model = small(lambda_param=40.0)
    ids = batches(2)
    ids[1] = ids[1][:, :6]
    mask = torch.tensor([[1] * 6, [1] * 6, [1] * 3 + [0] * 3, [1] * 6])
    found = DistanceAttentionOptimizer(model).analyze_attention_patterns(
        [ids[0], {"input_ids": ids[1], "attention_mask": mask}], num_samples=7
    )
    model.eval()
    for layer in range(2):
        entropies, seen = [], []
        for part, real in ((ids[0], torch.ones(4, 9)), (ids[1][:3], mask[:3])):
            weights = model(part, real, output_attentions=True)["attentions"][layer].double()
            for b in range(len(part)):
                for i in range(part.shape[1]):
                    if real[b, i]:
                        for h in range(2):
                            row = [weights[b, h, i, j].item() for j in range(i + 1) if real[b, j]]
                            seen += row
                            entropies.append(-sum(a * math.log(a) for a in row if a > 0))
        expected = {
            "attention_entropy": sum(entropies) / len(entropies),
            "mean_attention": sum(seen) / len(seen),
            "sparsity": sum(a < 0.01 for a in seen) / len(seen),
        }
        assert found[layer] == pytest.approx(expected, rel=1e-5)
        assert 0 < expected["sparsity"] < 1


def test_only_the_lambdas_are_trained_and_the_losses_are_measured():
    _, model = small(lambda_param=0.3)
    repeated = [torch.arange(9).remainder(3).repeat(4, 1) + 3 * i for i in range(3)]
    adam = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(15):  # with random weights no lambda is better than another
        for batch in repeated:
            adam.zero_grad()
            integration.loss_of(model, batch).backward()
            adam.step()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def mean_loss():
        model.eval()
        losses = [
            cross_entropy(model(ids)["logits"][:, :-1].transpose(1, 2), ids[:, 1:]).item()
            for ids in repeated
        ]
        return sum(losses) / 3

    start = mean_loss()
    model.train()
    found = DistanceAttentionOptimizer(model).optimize_lambda_parameters(repeated, num_epochs=5)
    assert found["loss_before"] == pytest.approx(start, abs=1e-6)
    assert model.training
    assert found["loss_after"] == pytest.approx(mean_loss(), abs=1e-6)
    assert found["loss_after"] < found["loss_before"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) != name.endswith("log_rate"), name
    assert found["lambdas"]["layer_1"] != pytest.approx([0.3, 0.3], abs=1e-3)
    assert all(rate > 0 for rates in found["lambdas"].values() for rate in rates)
    assert not any(p.requires_grad for name, p in model.named_parameters() if "log_rate" in name)


def test_padding_is_no_target():
    _, model = small()
    model.eval()
    ids = batches(1)[0]
    mask = torch.ones_like(ids)
    mask[:, 6:] = 0
    alone = integration.loss_of(model, ids[:, :6])
    padded = integration.loss_of(model, {"input_ids": ids, "attention_mask": mask})
    torch.testing.assert_close(padded, alone)
    torch.testing.assert_close(integration.loss_of(model, (ids[:, :6], None)), alone)


def test_an_empty_dataloader_is_named():
    optimizer = DistanceAttentionOptimizer(small()[1])
    for call in (optimizer.optimize_lambda_parameters, optimizer.analyze_attention_patterns):
        with pytest.raises(ValueError, match="dataloader holds no batch"):
            call([])


def test_lambdas_can_be_learned_with_the_rest():
    _, model = small()
    model.set_learnable_lambda()
    integration.loss_of(model, batches(1)[0]).backward()
    rates = [p for name, p in model.named_parameters() if name.endswith("log_rate")]
    assert len(rates) == 2
    assert all(rate.grad.any() for rate in rates)


# ---------------------------------------------------------------- the example


def test_the_example_runs(tmp_path):
    example = Path(__file__).parents[2] / "examples" / "distance_attention.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("SIXFOLD_DATA", None)
    command = [sys.executable, "-W", "error", str(example), "--smoke"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    for kind in KINDS:
        assert f"\n{kind.value:12}" in done.stdout
    assert not [*tmp_path.iterdir()]
