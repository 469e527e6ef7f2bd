"""Attention swapped inside models that exist: what they computed, what they learn, and the way back."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
from unittest.mock import MagicMock

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from torch import Tensor, nn

from sixfold.contracts import Heads
from sixfold.integrations.convert import convert, revert
from sixfold.integrations.convert._stand_in import FLOOR, point_score

POINTS = ("chebyshev", "cosine", "dot", "l1", "l2", "l2_squared", "lp")
BELIEFS = ("jeffreys", "kl_diagonal", "wasserstein2")


class Holder(nn.Module):
    """A model with one layer of attention."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, *inputs, **options):
        return self.attention(*inputs, **options)


def mha(**options) -> Holder:
    layer = nn.MultiheadAttention(16, 4, **{"batch_first": True, **options}).double().eval()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return Holder(layer)


def copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    after = model.state_dict()
    return list(after) == list(before) and all(torch.equal(after[n], before[n]) for n in before)


# ---------------------------------------------------------------- nn.MultiheadAttention

FUTURE = torch.ones(5, 5).triu(1).bool()
PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
MASKS = {
    "none": {},
    "future": {"attn_mask": FUTURE},
    "future hinted": {"attn_mask": FUTURE, "is_causal": True},
    "per head": {"attn_mask": (torch.arange(200).reshape(8, 5, 5) % 5 == 1)},
    "floats": {"attn_mask": torch.linspace(-2, 2, 25).double().reshape(5, 5)},
    "padding": {"key_padding_mask": PADDING},
    "padding in floats": {"key_padding_mask": torch.linspace(-2, 2, 10).double().reshape(2, 5)},
    "both": {"attn_mask": FUTURE, "key_padding_mask": PADDING},
    "both in floats": {
        "attn_mask": torch.zeros(5, 5).double().masked_fill(FUTURE, -torch.inf),
        "key_padding_mask": torch.linspace(-2, 2, 10).double().reshape(2, 5),
    },
}


@pytest.mark.parametrize("weights", ["none", "averaged", "per head"])
@pytest.mark.parametrize("masks", MASKS)
def test_multihead_computes_what_it_computed_under_every_mask(masks, weights):
    model, x = mha(), torch.randn(2, 5, 16, dtype=torch.double)
    options = {"need_weights": weights != "none", "average_attn_weights": weights == "averaged"}
    expected = model(x, x, x, **MASKS[masks], **options)
    before = copied(model)
    (kept,) = convert(model)
    assert (kept.name, kept.family, kept.same, kept.new) == ("attention", "mha", True, ())
    found = model(x, x, x, **MASKS[masks], **options)
    assert torch.allclose(found[0], expected[0], atol=1e-12)
    assert (found[1] is None) == (expected[1] is None)
    if found[1] is not None:
        assert torch.allclose(found[1], expected[1], atol=1e-12)
    assert revert(model) == 1
    assert unchanged(model, before)
    assert torch.equal(model(x, x, x, **MASKS[masks], **options)[0], expected[0])


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shapes", [((2, 2), (2, 2)), ((2, 3), (2, 4)), ((3,), (4,))])
def test_layouts_and_contexts(batch_first, bias, shapes):
    model = mha(batch_first=batch_first, bias=bias)
    query, key = (torch.randn(*shape, 16, dtype=torch.double) for shape in shapes)
    if not batch_first and query.ndim == 3:
        query, key = query.transpose(0, 1), key.transpose(0, 1)
    expected = model(query, key, key)
    convert(model)
    for found, wanted in zip(model(query, key, key), expected, strict=True):
        assert torch.allclose(found, wanted, atol=1e-12)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("nested", [True, False])
def test_a_stack_of_encoders_has_no_way_past_the_swapped_layer(nested):
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True).eval()
    stack = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).eval()
    model, x, calls = Holder(stack), torch.randn(2, 5, 16), []
    before = copied(model)
    with torch.no_grad():
        expected = model(x, src_key_padding_mask=PADDING)
        assert [kept.name for kept in convert(model)] == [
            f"attention.layers.{i}.self_attn" for i in range(2)
        ]
        # not by hooks: these close the shortcut themselves
        for inner in stack.layers:
            attend = inner.self_attn.attention.forward
            inner.self_attn.attention.forward = lambda *a, attend=attend, **k: (
                calls.append(1) or attend(*a, **k)
            )
        found = model(x, src_key_padding_mask=PADDING)
        assert len(calls) == 2
        assert torch.allclose(found[~PADDING], expected[~PADDING], atol=1e-5)
        assert revert(model) == 2
        assert stack.use_nested_tensor == nested
        assert torch.equal(model(x, src_key_padding_mask=PADDING), expected)
    assert unchanged(model, before)


def drops(model: nn.Module, *inputs: Tensor) -> bool:
    """Whether two passes differ in training, and only there."""

    def passes(mode: bool) -> list[Tensor]:
        found = [model.train(mode)(*inputs) for _ in range(2)]
        return [out[0] if isinstance(out, tuple) else out for out in found]

    assert torch.equal(*passes(False))
    return not torch.equal(*passes(True))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dropout_is_kept(dropout):
    model, x = mha(dropout=dropout), torch.randn(2, 5, 16).double()
    convert(model)
    assert drops(model, x, x, x) == (dropout > 0)


def test_a_decoder_with_causality_and_memory():
    layer = nn.TransformerDecoderLayer(16, 4, 24).double().eval()
    model = nn.TransformerDecoder(layer, 2)
    x, memory = torch.randn(5, 2, 16).double(), torch.randn(7, 2, 16).double()
    options = {"tgt_mask": FUTURE, "tgt_is_causal": True}
    expected = model(x, memory, **options)
    assert len(convert(model)) == 4
    assert torch.allclose(model(x, memory, **options), expected, atol=1e-12)


def test_weights_stay_the_same_parameters():
    model = mha()
    before = {id(p) for p in model.parameters()}
    assert [kept.new for kept in convert(model, "l1")] == [("attention.score.log_rate",)]
    assert before < {id(p) for p in model.parameters()}
    revert(model)
    assert {id(p) for p in model.parameters()} == before


def test_what_is_learned_meanwhile_is_kept():
    model, x = mha(), torch.randn(2, 5, 16).double()
    convert(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    expected = model(x, x, x)[0]
    revert(model)
    assert torch.allclose(model(x, x, x)[0], expected, atol=1e-12)
    assert not model.attention.training


def test_rows_that_see_nothing_give_the_bias_of_the_output():
    model, x = mha(), torch.randn(1, 3, 16).double()
    convert(model, "l2")
    out, weights = model(x, x, x, attn_mask=torch.tensor([[True] * 3, [False] * 3, [False] * 3]))
    assert torch.equal(out[0, 0], model.attention.attention.output.bias)
    assert not weights[0, 0].any()


@pytest.mark.parametrize("score", [*POINTS, *BELIEFS])
def test_every_score_learns(score):
    model, x = mha(dropout=0.1).train(), torch.randn(4, 6, 16).double()
    (kept,) = convert(model, score)
    assert kept.same == (score == "dot")
    losses, optimizer = [], torch.optim.Adam(model.parameters(), lr=0.02)
    new = dict(model.attention.named_parameters())
    before = {name: new[name].detach().clone() for name in kept.new}
    for _ in range(12):
        losses.append((model(x, x, x)[0] - x.flip(1)).square().mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert (score == "dot") == (not before)
    assert all(not torch.equal(new[name], before[name]) for name in before)


def test_beliefs_of_points_are_rated_as_they_should_be():
    score = point_score("kl_diagonal", Heads(6, 2, 3, 1), dtype=torch.double)
    query, key = torch.randn(1, 2, 4, 3).double(), torch.randn(1, 1, 5, 3).double()
    with torch.no_grad():
        for width in (score.query_width, score.key_width):
            width.normal_(std=0.5)
    rating = score(query, score.keys(key))
    found = rating.scale * rating.query @ rating.key.mT

    def normal(point, width):
        std = FLOOR + nn.functional.softplus(point @ width.mT + torch.tensor(0.95).expm1().log())
        return torch.distributions.Normal(point, std)

    pairs = (
        normal(query[..., None, :], score.query_width[:, None]),
        normal(key[..., None, :, :], score.key_width[:, None]),
    )
    apart = torch.distributions.kl_divergence(*pairs).sum(-1)
    expected = -score.score.rate()[:, None, None] * apart
    assert torch.allclose(found.softmax(-1), expected.softmax(-1), atol=1e-12)


def test_a_mixer_starts_silent_and_is_heard_later():
    model = Holder(nn.MultiheadAttention(28, 7, batch_first=True).double())
    x = torch.randn(2, 5, 28).double()
    expected = model(x, x, x)[0]
    (kept,) = convert(model, mixer="hexagonal")
    found = model(x, x, x)[0]
    assert kept.same
    assert torch.allclose(found, expected, atol=1e-12)
    found.square().mean().backward()
    assert model.attention.attention.mixer.gate.grad.any()


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (mha(kdim=8), {}, "attention: kdim 8 and vdim 16 must be embed_dim"),
        (mha(add_bias_kv=True), {}, "attention: add_bias_kv"),
        (mha(add_zero_attn=True), {}, "attention: add_bias_kv and add_zero_attn"),
        (mha(), {"score": "kl"}, "attention: score 'kl' rates beliefs with frames"),
        (mha(), {"score": "l3"}, "attention: unknown score 'l3'"),
        (mha(), {"score": "l1", "impl": "fused"}, "attention: impl 'fused' cannot serve"),
        (mha(), {"mixer": "hexagonal"}, "attention: mixer 'hexagonal'"),
        (mha().attention, {}, "the model is attention itself"),
        (nn.Linear(2, 2), {}, "Linear holds no attention that one of these families knows: "),
    ],
)
def test_refused(model, options, message):
    before = copied(model)
    with pytest.raises(ValueError, match=message):
        convert(model, **options)
    assert unchanged(model, before)


def test_all_or_nothing():
    model = nn.ModuleList([mha(), mha(add_zero_attn=True)])
    with pytest.raises(ValueError, match=r"1\.attention"):
        convert(model)
    assert type(model[0].attention) is nn.MultiheadAttention


def test_not_twice_and_not_with_other_values_than_keys():
    model, x = mha(), torch.randn(1, 3, 16).double()
    convert(model)
    with pytest.raises(ValueError, match="attention is converted: revert the model first"):
        convert(model, "l1")
    with pytest.raises(ValueError, match="key and value must be one tensor"):
        model(x, x, x.clone())


# ---------------------------------------------------------------- timm


class Nowhere(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Something in place of torchvision, which timm imports and its attention does not use."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return MagicMock(__name__=spec.name, __path__=[], __spec__=spec)

    def exec_module(self, module):
        pass


@pytest.fixture(scope="module")
def timm():
    if importlib.util.find_spec("timm") is None:
        pytest.skip("needs the extra timm")
    if importlib.util.find_spec("torchvision") is not None:
        return importlib.import_module("timm")
    # its wheels are for one build of PyTorch, which need not be the one at hand
    finder = Nowhere()
    sys.meta_path.append(finder)
    try:
        return importlib.import_module("timm")
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]


@pytest.mark.parametrize("qk_norm", [True, False])
def test_a_vision_transformer_of_timm(timm, qk_norm):
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=4, num_classes=3, qk_norm=qk_norm
    )
    model, x = model.double().eval(), torch.randn(2, 3, 8, 8).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    before, expected = copied(model), model(x)
    report = convert(model)
    assert [(k.name, k.family, k.same) for k in report] == [
        (f"blocks.{i}.attn", "timm", True) for i in range(2)
    ]
    assert torch.allclose(model(x), expected, atol=1e-12)
    assert revert(model) == 2
    assert unchanged(model, before)
    assert torch.equal(model(x), expected)
    convert(model, "chebyshev")
    model(x).square().mean().backward()
    assert model.blocks[0].attn.attention.score.log_rate.grad.any()


@pytest.mark.parametrize("masks", [{}, {"is_causal": True}, {"attn_mask": ~FUTURE}])
def test_masks_of_timm_have_our_sense(timm, masks):
    model, x = Holder(timm.layers.Attention(16, 4)).double(), torch.randn(2, 5, 16).double()
    expected = model(x, **masks)
    convert(model)
    assert torch.allclose(model(x, **masks), expected, atol=1e-12)


@pytest.mark.parametrize("name", ["attn_drop", "proj_drop"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dropout_of_timm_is_kept(timm, name, dropout):
    model = Holder(timm.layers.Attention(16, 4, **{name: dropout})).double()
    convert(model)
    assert drops(model, torch.randn(2, 5, 16).double()) == (dropout > 0)


@pytest.mark.parametrize("option", ["gated", "scale_norm"])
def test_what_timm_adds_is_refused(timm, option):
    model = Holder(timm.layers.Attention(16, 4, norm_layer=nn.LayerNorm, **{option: True}))
    with pytest.raises(ValueError, match=f"attention: {option}"):
        convert(model)


# ---------------------------------------------------------------- Hugging Face

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
}
TEXT = {"vocab_size": 31, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 4}
MODELS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**SIZES, **TEXT, "num_key_value_heads": 2}),
    "bert": ("BertForMaskedLM", "BertConfig", {**SIZES, **TEXT}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {**TEXT, "n_embd": 32, "n_layer": 2, "n_head": 4}),
    "t5": ("T5ForConditionalGeneration", "T5Config", {**TEXT, **T5, "decoder_start_token_id": 0}),
    "vit": ("ViTForImageClassification", "ViTConfig", {**SIZES, "image_size": 8, "patch_size": 4}),
}
NUMBER = {"llama": 2, "bert": 2, "gpt2": 2, "t5": 6, "vit": 2}
kinds = pytest.mark.parametrize("kind", MODELS)


def asks(model: type) -> bool:
    return hasattr(sys.modules[model.__module__], "ALL_ATTENTION_FUNCTIONS")


def hugging_face(kind: str) -> tuple[nn.Module, dict[str, Tensor]]:
    transformers = pytest.importorskip("transformers", reason="needs the extra huggingface")
    model, config, sizes = MODELS[kind]
    if not asks(getattr(transformers, model)):
        pytest.skip("this transformers does not let it choose how to attend")
    model = getattr(transformers, model)(getattr(transformers, config)(**sizes)).double().eval()
    if kind == "vit":
        return model, {"pixel_values": torch.randn(2, 3, 8, 8).double()}
    inputs = {"input_ids": torch.randint(3, 31, (2, 7))}
    inputs["attention_mask"] = torch.tensor([[0] * 3 + [1] * 4, [1] * 7])
    if kind == "t5":
        inputs["decoder_input_ids"] = torch.randint(3, 31, (2, 4))
    return model, inputs


def real(kind: str, logits: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    return logits if kind in ("t5", "vit") else logits[inputs["attention_mask"].bool()]


@kinds
def test_models_compute_what_they_computed_and_come_back(kind):
    model, inputs = hugging_face(kind)
    before, expected = copied(model), model(**inputs).logits
    attended = model.config._attn_implementation
    report = convert(model)
    assert len(report) == NUMBER[kind]
    assert all(kept.same and not kept.new and kept.family == "huggingface" for kept in report)
    gap = real(kind, model(**inputs).logits - expected, inputs).abs().max()
    assert gap < 1e-12
    assert revert(model) == NUMBER[kind]
    assert model.config._attn_implementation == attended
    assert unchanged(model, before)
    assert torch.equal(model(**inputs).logits, expected)


@kinds
@pytest.mark.parametrize("score", ["l1", "cosine", "kl_diagonal"])
def test_rates_are_learned(kind, score):
    model, inputs = hugging_face(kind)
    report = convert(model, score)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(2):
        optimizer.zero_grad()
        real(kind, model(**inputs).logits, inputs).logsumexp(-1).mean().backward()
        optimizer.step()
    for kept in report:
        for name in kept.new:
            whole = f"{kept.name}.sixfold_score.{name}"
            assert not torch.equal(model.get_parameter(whole), before[whole]), whole


@pytest.mark.parametrize("score", ["lp", "kl_diagonal"])
@pytest.mark.parametrize("kind", ["llama", "t5", "gpt2"])
def test_a_converted_model_generates_from_its_cache(kind, score):
    model, inputs = hugging_face(kind)
    inputs.pop("decoder_input_ids", None)
    convert(model, score)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "width" in name:
                parameter.normal_()
    shared = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    cached = model.generate(**inputs, **shared)
    assert torch.equal(cached, model.generate(**inputs, **shared, use_cache=False))


def test_rates_start_where_registered_ones_stay():
    for kind in ("llama", "t5"):
        model, inputs = hugging_face(kind)
        convert(model, "l2")
        converted = model(**inputs).logits
        revert(model)
        model.set_attn_implementation("sixfold_l2")
        assert torch.allclose(model(**inputs).logits, converted, atol=1e-12)


def test_weights_with_rates_are_saved_and_loaded(tmp_path):
    model, inputs = hugging_face("llama")
    convert(model, "l1")
    with torch.no_grad():
        model.model.layers[1].self_attn.sixfold_score.log_rate.fill_(0.3)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    again, _ = hugging_face("llama")
    convert(again, "l1")
    again.load_state_dict(torch.load(tmp_path / "weights.pt"))
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_a_model_that_was_not_converted_cannot_attend_by_what_it_learned():
    model, inputs = hugging_face("llama")
    convert(model)
    revert(model)
    model.set_attn_implementation("sixfold_learned")
    with pytest.raises(
        ValueError, match="sixfold_learned in LlamaAttention.*use sixfold's convert"
    ):
        model(**inputs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixer": "ring"}, "mixer 'ring': only the score"),
        ({"score": "kl"}, "rates beliefs with frames"),
    ],
)
def test_hugging_face_refuses(options, message):
    model, inputs = hugging_face("llama")
    expected = model(**inputs).logits
    with pytest.raises(ValueError, match=rf"model.layers.0.self_attn: .*{message}"):
        convert(model, **options)
    assert torch.equal(model(**inputs).logits, expected)


def test_attention_that_asks_nobody_is_refused():
    model, _ = hugging_face("llama")
    kind = type(model.model.layers[1].self_attn)
    model.model.layers[1].self_attn.__class__ = type("DeafAttention", (kind,), {})
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn: DeafAttention does not ask"):
        convert(model)


def test_a_module_that_two_places_share_is_swapped_in_both():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = self.two = nn.MultiheadAttention(16, 4, batch_first=True)

    model = Twice()
    convert(model, "l1")
    assert not isinstance(model.one, nn.MultiheadAttention)
    assert not isinstance(model.two, nn.MultiheadAttention)
    revert(model)
    assert isinstance(model.one, nn.MultiheadAttention)
    assert isinstance(model.two, nn.MultiheadAttention)
