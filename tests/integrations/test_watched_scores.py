"""The governor sees Sixfold's scores inside Hugging Face models as what they are."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.nn.functional import normalize, softplus

pytest.importorskip("transformers", reason="needs the extra huggingface")

from transformers import (
    AttentionInterface,
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from sixfold import LeadMetaArchitect, MultiHeadAttention
from sixfold.governor.watch.probe import LayerProbe
from sixfold.governor.watch.watch import Watch
from sixfold.integrations.convert import convert, revert
from sixfold.integrations.huggingface.attention import PREFIX, attention_by, point_scores, register

D, HEADS, TOKENS = 8, 4, 10
SIZES = {
    "vocab_size": 31,
    "hidden_size": HEADS * D,
    "head_dim": D,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SCORES = ("chebyshev", "cosine", "dot", "l1", "l2", "l2_squared", "lp")
ORDERS = {"l1": 1.0, "l2": 2.0, "lp": 3.0, "chebyshev": math.inf}
RATES = {  # where scores start at d = 8, written out once more
    "cosine": 10.0,
    "dot": D**-0.5,
    "l1": D**-0.5,
    "l2": 1.0,
    "lp": D ** (1 / 6),
    "chebyshev": math.sqrt(6 * math.log(2 * D)) / math.pi,
    "l2_squared": 0.5 * D**-0.5,
}
SIGNED = ("dot", "cosine")
CAUSAL = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()

scores = pytest.mark.parametrize("score", SCORES)


def rated(score: str, query: Tensor, key: Tensor, rate: Tensor | float) -> Tensor:
    """Logits (h, n, m) of queries and keys (h, n, d), by the definition of each score."""
    if score == "dot":
        return rate * query @ key.mT
    if score == "cosine":
        return rate * normalize(query, dim=-1) @ normalize(key, dim=-1).mT
    gaps = query[:, :, None] - key[:, None]
    if score == "l2_squared":
        return -rate * gaps.square().sum(-1)
    return -rate * torch.linalg.vector_norm(gaps, ORDERS[score], dim=-1)


def explicit(logits: Tensor, visible: Tensor, *, signed: bool) -> dict[str, Tensor]:
    """Largest logit, or range within a query; entropy and redundancy; all from whole weights."""
    n = logits.shape[1]
    rows = [[head[i][visible[i]] for i in range(n) if visible[i].any()] for head in logits]
    size = (lambda row: row.max()) if signed else (lambda row: row.max() - row.min())
    found = {"max_logit": [max(size(row) for row in head) for head in rows], "entropy": []}
    for head in rows:
        several = [row.softmax(0) for row in head if len(row) > 1]
        shares = [-(p * p.log()).sum() / math.log(len(p)) for p in several]
        found["entropy"].append(sum(shares) / len(shares))
    weights = logits.masked_fill(~visible, -math.inf)[:, visible.sum(-1) > 1].softmax(-1)
    alike = torch.cosine_similarity(weights[:, None], weights[None], -1).mean(-1)
    found["redundancy"] = alike.fill_diagonal_(-math.inf).amax(1).unbind()
    return {name: torch.stack(list(values)) for name, values in found.items()}


CAUGHT: list[tuple[Tensor, Tensor]] = []
"""Queries and keys of each call of attention, the first sequence's, one key head for each query's."""


def caught(score: str):
    """The attention function that is registered, which keeps what it is given."""
    attend = attention_by(score)

    def forward(module, query, key, value, attention_mask=None, **asked):
        whole = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        CAUGHT.append((query[0].detach().double(), whole[0].detach().double()))
        return attend(module, query, key, value, attention_mask, **asked)

    return forward


def catch() -> None:
    """Let the registered names lead to functions that keep queries and keys."""
    register()
    for score in (*SCORES, "learned"):
        AttentionInterface.register(PREFIX + score, caught(score))


@pytest.fixture(autouse=True)
def catching():
    catch()
    yield
    register()
    CAUGHT.clear()


def sharpened(model: nn.Module) -> nn.Module:
    """Attention far from uniform: a library's own start is not."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                weight.normal_(std=weight.shape[-1] ** -0.5)
    return model.train()


def llama(implementation: str = "sdpa", **options) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, attn_implementation=implementation, **options)
    return sharpened(LlamaForCausalLM(config))


def ids(batch: int = 2) -> Tensor:
    return torch.randint(3, 31, (batch, TOKENS), generator=torch.Generator().manual_seed(1))


def convert_(model: nn.Module, score: str) -> nn.Module:
    """Converted, with rates and widths that training has moved: each head has its own."""
    convert(model, score)
    catch()  # after the converter, which registers
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "log_rate" in name:
                parameter.add_(torch.linspace(-0.5, 0.5, HEADS))
            elif "width" in name:
                parameter.normal_(std=0.1)
    return model


def watched(model: nn.Module, run=None, hold: tuple[int, ...] = ()) -> tuple[Watch, dict]:
    """A watch after one watched pass, and its probes."""
    CAUGHT.clear()
    watch, probes = Watch(model), {}

    def probe_of(number):
        return probes.setdefault(number, LayerProbe(torch.device("cpu"), measure=True, hold=hold))

    watch.arm(probe_of)
    try:
        (run or (lambda: model(ids())))()
    finally:
        watch.disarm()
    assert watch.error is None and all(probe.error is None for probe in probes.values())
    return watch, probes


def check(probe: LayerProbe, logits: Tensor, visible: Tensor = CAUSAL, *, signed: bool) -> None:
    for name, expected in explicit(logits, visible, signed=signed).items():
        found = getattr(probe, name).double()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5, msg=name)


# ---------------------------------------------------------------- registered scores


def test_every_registered_score_is_here():
    assert sorted(SCORES) == sorted(point_scores())


@pytest.mark.parametrize("padded", [False, True])
@scores
def test_signals_are_those_of_the_explicit_weights(score, padded):
    model, mask, visible = llama(PREFIX + score), torch.ones(2, TOKENS).long(), CAUSAL
    if padded:
        mask[0, :3] = 0
        visible = CAUSAL & mask[0].bool()
    watch, probes = watched(model, lambda: model(ids(), attention_mask=mask))
    assert [layer.name for layer in watch.layers] == [f"model.layers.{n}.self_attn" for n in (0, 1)]
    for number, (query, key) in enumerate(CAUGHT):
        check(probes[number], rated(score, query, key, RATES[score]), visible,
              signed=score in SIGNED)  # fmt: skip
        assert probes[number].tokens == 2 * TOKENS


@scores
def test_they_are_those_of_a_layer_of_ours(score):
    model = llama(PREFIX + score)
    _, probes = watched(model)
    layer = MultiHeadAttention(HEADS * D, HEADS, num_kv_heads=2, score=score)
    shown = LayerProbe(torch.device("cpu"), measure=True, hold=())
    query, key = (points.float()[None] for points in CAUGHT[0])
    layer.projection.forward = lambda *_: (query, key[:, ::2], key[:, ::2])
    layer.train().probe = shown
    layer(torch.zeros(1, TOKENS, HEADS * D), is_causal=True)
    for name in ("max_logit", "entropy", "redundancy"):
        torch.testing.assert_close(getattr(probes[0], name), getattr(shown, name))


@scores
def test_weights_are_traced_and_touched_only_where_they_scale_logits(score):
    model = llama(PREFIX + score)
    watch, _ = watched(model)
    for number, layer in enumerate(watch.layers):
        attention = model.model.layers[number].self_attn
        assert layer.num_kv_heads == 2
        for role, weight in layer.matrices().items():
            assert torch.equal(weight.flatten(0, 1), getattr(attention, f"{role}_proj").weight)
    layer = watch.layers[0]
    assert layer.scales is (score == "dot")
    if score == "dot":
        assert layer.refusal is None
        check_clip(watch, model)
        return
    for touch in (lambda: layer.scale_head_(0, -1), lambda: layer.pieces(0)):
        with pytest.raises(ValueError, match="no power of its weights scales the logits"):
            touch()


def check_clip(watch: Watch, model: nn.Module) -> None:
    """One head's logits are scaled by a power of two, no other's, and taking it back is exact."""
    before, kept = watched(model)[1][0], copy.deepcopy(model.state_dict())
    watch.layers[0].scale_head_(1, -2)
    after = watched(model)[1][0]
    expected = before.max_logit * torch.tensor([1, 0.25, 1, 1])
    torch.testing.assert_close(after.max_logit, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(after.entropy[[0, 2, 3]], before.entropy[[0, 2, 3]])
    assert after.entropy[1] > before.entropy[1]
    watch.layers[0].scale_head_(1, 2)
    assert all(torch.equal(a, kept[name]) for name, a in model.state_dict().items())
    with pytest.raises(ValueError, match=r"head must be in \[0, 4\)"):
        watch.layers[0].scale_head_(4, 1)


# ---------------------------------------------------------------- converted modules


@scores
def test_converted_modules_are_seen_by_the_rates_they_learned(score):
    model = convert_(llama(), score)
    watch, probes = watched(model)
    for number, (query, key) in enumerate(CAUGHT):
        rate = RATES[score] * torch.linspace(-0.5, 0.5, HEADS).double().exp()[:, None, None]
        rate = RATES[score] if score == "dot" else rate
        check(probes[number], rated(score, query, key, rate), signed=score in SIGNED)
    assert [layer.refusal for layer in watch.layers] == [None, None]
    check_clip(watch, model)
    assert model.model.layers[0].self_attn.sixfold_score.power.tolist() == [0] * HEADS


def test_a_converted_divergence_is_seen_by_its_range():
    model = convert_(llama(), "kl_diagonal")
    watch, probes = watched(model)
    start = math.log(math.expm1(0.95))  # deviations of points at the origin are 1
    for number, (query, key) in enumerate(CAUGHT):
        score = model.model.layers[number].self_attn.sixfold_score
        pairs = []
        for points, width in ((query, score.query_width), (key, score.key_width)):
            width = width.detach().double().repeat_interleave(HEADS // len(width), 0)
            pairs.append((points, 0.05 + softplus(points @ width.mT + start)))
        (mean, std), (mean_k, std_k) = pairs
        own = Normal(mean[:, :, None], std[:, :, None])
        apart = kl_divergence(own, Normal(mean_k[:, None], std_k[:, None])).sum(-1)
        rate = score.score.rate().detach().double()[:, None, None]
        check(probes[number], -rate * apart, signed=False)
    check_clip(watch, model)


def test_a_model_that_is_converted_or_reverted_is_clipped_as_it_attends_now():
    model = llama()
    watch, _ = watched(model)
    again = lambda: (watch.arm(lambda _: None), model(ids()), watch.disarm())  # noqa: E731
    convert_(model, "l1")
    again()
    watch.layers[0].scale_head_(1, -1)
    assert model.model.layers[0].self_attn.sixfold_score.power.tolist() == [0, -1, 0, 0]
    revert(model)
    again()
    rows = model.model.layers[0].self_attn.q_proj.weight[D : 2 * D].detach().clone()
    watch.layers[0].scale_head_(1, -1)
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight[D : 2 * D], rows / 2)


# ---------------------------------------------------------------- caps, sinks


@pytest.mark.parametrize("score", ["dot", "l1"])
def test_capped_logits_are_seen_capped(score):
    config = Gemma2Config(
        **SIZES, query_pre_attn_scalar=2, attn_logit_softcapping=1.5, sliding_window=32,
        attn_implementation=PREFIX + score,
    )  # fmt: skip
    watch, probes = watched(sharpened(Gemma2ForCausalLM(config)))
    query, key = CAUGHT[0]
    logits = rated(score, query, key, RATES[score] * 2**-0.5 * D**0.5)
    check(probes[0], 1.5 * torch.tanh(logits / 1.5), signed=score == "dot")
    assert len(watch.layers[0].matrices()) == 3


@pytest.mark.parametrize("score", ["dot", "l1"])
def test_sinks_are_not_seen(score):
    options = {**SIZES, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 32}
    options |= {"experts_implementation": "eager"}
    options |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    model = sharpened(
        GptOssForCausalLM(GptOssConfig(**options, attn_implementation=PREFIX + score))
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "sinks" in name:
                weight.fill_(30.0)
    _, probes = watched(model)
    check(probes[0], rated(score, *CAUGHT[0], RATES[score]), signed=score == "dot")


# ---------------------------------------------------------------- nothing changes


def trained(model: nn.Module, *, governed: bool, steps: int = 9) -> list[Tensor]:
    """Parameters after some steps, and a random number after the last."""
    torch.manual_seed(3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    governor = LeadMetaArchitect(model, optimizer, every=2) if governed else None
    for step in range(steps):
        batch = torch.randint(3, 31, (2, TOKENS), generator=torch.Generator().manual_seed(step))
        loss = model(batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if governor is not None:
            assert not governor.process_step(loss.item()).acted
    if governor is not None:
        assert len(governor.layers) == 2
        governor.detach()
    return [*(p.detach() for p in model.parameters()), torch.rand(1)]


@pytest.mark.parametrize("made", ["registered", "converted", "checkpointed"])
@scores
def test_a_healthy_governed_run_keeps_its_bits(score, made):
    model = llama("sdpa" if made == "converted" else PREFIX + score, attention_dropout=0.1)
    if made == "converted":
        convert_(model, score)
    if made == "checkpointed":
        model.activation_checkpointing_enable()
    alone = trained(copy.deepcopy(model), governed=False)
    for a, b in zip(alone, trained(model, governed=True), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("score", ["l1", "l2_squared"])
def test_a_checkpointed_layer_is_seen_once_and_its_held_entropy_is_differentiable(score):
    gradients = []
    for checkpointed in (False, True):
        model = llama(PREFIX + score, use_cache=False)
        if checkpointed:
            model.activation_checkpointing_enable()
        probes = {}

        def run(model=model, probes=probes):
            loss = model(ids(), labels=ids()).loss
            (loss + sum(probe.held.sum() for probe in probes.values())).backward()

        watch = Watch(model)
        watch.arm(
            lambda n, probes=probes: probes.setdefault(
                n, LayerProbe(torch.device("cpu"), measure=True, hold=(1,))
            )
        )
        run()
        watch.disarm()
        assert [probe.tokens for probe in probes.values()] == [2 * TOKENS] * 2
        gradients.append(model.model.layers[0].self_attn.q_proj.weight.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("score", ["l1", "l2_squared", "cosine"])
def test_a_compiled_model_is_seen_as_written_and_compiled_otherwise(score):
    torch.compiler.reset()
    graphs = []

    def backend(graph, _):
        def run(*args):
            graphs.append(graph)
            return graph(*args)

        return run

    model = llama(PREFIX + score)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    register()  # what keeps queries and keys is no part of a graph
    torch.testing.assert_close(compiled(ids()).logits, model(ids()).logits)
    called = len(graphs)
    assert called
    watch, probes = watched(model, lambda: compiled(ids()))
    assert len(graphs) == called and len(watch.layers) == 2
    assert torch.equal(probes[0].max_logit, watched(model)[1][0].max_logit)
    compiled(ids())
    assert len(graphs) == 2 * called
    torch.compiler.reset()


def test_generation_and_evaluation_are_not_watched():
    model = llama(PREFIX + "l1").eval()
    generate = lambda: model.generate(ids(), max_new_tokens=3, do_sample=False)  # noqa: E731
    alone, watch, probes = generate(), *watched(model, lambda: (generate(), model(ids())))
    assert not watch.layers and not probes and not watch.passes
    watch.arm(lambda _: None)
    assert torch.equal(generate(), alone)
    watch.disarm()
    assert watch.nothing() is None
