"""Every figure against explicit weights in float64, whoever's model they come from."""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from torch import nn

import sixfold
from sixfold import LanguageModel, MultiHeadAttention, analyze
from sixfold.analysis import measure as measured
from sixfold.analysis.run import families
from sixfold.contracts import Batch

# ---------------------------------------------------------------- the oracle


def by_hand(weights, visible=None, tokens=None, *, together=True):
    """All statistics of explicit weights (b, h, n, m), one query after the other."""
    weights = weights.detach()
    b, h, n, m = weights.shape
    visible = torch.ones_like(weights, dtype=torch.bool) if visible is None else visible
    visible = visible.expand(weights.shape)
    tokens = torch.ones(b, m, dtype=torch.bool) if tokens is None else tokens
    found = [{name: [] for name in ("entropy", "sparsity", "distance", "first")} for _ in range(h)]
    alike = torch.zeros(h, h, dtype=torch.float64)
    pairs = 0
    for s in range(b):
        start = int(tokens[s].nonzero()[0])
        for i in range(n):
            if visible[s, 0, i].sum() < 2 or (together and not tokens[s, i + m - n]):
                continue
            rows = weights[s, :, i]
            alike += torch.cosine_similarity(rows[:, None], rows[None], dim=-1)
            pairs += 1
            for head, row in enumerate(rows):
                p = [float(row[j]) for j in range(m) if visible[s, head, i, j]]
                found[head]["entropy"].append(
                    -sum(x * math.log(x) for x in p if x > 0) / math.log(len(p))
                )
                mass, k = 0.0, 0
                for x in sorted(p, reverse=True):
                    k, mass = k + 1, mass + x
                    if mass >= 0.99 - 1e-6:
                        break
                found[head]["sparsity"].append(1 - k / len(p))
                far = [float(row[j]) * abs(i + m - n - j) for j in range(m)]
                found[head]["distance"].append(sum(far) if together else math.nan)
                found[head]["first"].append(float(row[start]))
    return found, alike / pairs


def check(layer, weights, visible=None, tokens=None, *, together=True, rel=1e-9):
    found, alike = by_hand(weights, visible, tokens, together=together)
    for head, statistics in enumerate(found):
        for name, values in statistics.items():
            values = torch.tensor(values, dtype=torch.float64)
            got = getattr(layer, name)[head]
            expected = pytest.approx(float(values.mean()), rel=rel, abs=rel, nan_ok=True)
            assert got.mean == expected, name
            spread = float(values.std(correction=0))
            assert got.deviation == pytest.approx(spread, rel=1e-5, abs=1e-6, nan_ok=True), name
        assert layer.queries[head] == len(statistics["first"])
    torch.testing.assert_close(
        torch.tensor(layer.redundancy, dtype=torch.float64), alike, rtol=rel, atol=rel
    )


def loud(model):
    """Weights large enough that attention is neither uniform nor one key."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
    return model.double()


# ---------------------------------------------------------------- our own


@pytest.mark.parametrize("score", ["dot", "l2", "cosine", "l2_squared"])
@pytest.mark.parametrize("is_causal", [True, False])
def test_our_attention(score, is_causal):
    layer = loud(MultiHeadAttention(16, 4, num_kv_heads=2, score=score))
    x, key_mask = torch.randn(3, 9, 16).double(), torch.ones(3, 9, dtype=torch.bool)
    key_mask[1, 6:], key_mask[2, :2] = False, False
    given = {"x": x, "key_mask": key_mask, "is_causal": is_causal}
    found = analyze(layer, [given])
    _, weights = layer(**given, need_weights=True)
    visible = key_mask[:, None, None] & torch.ones(9, 9, dtype=torch.bool).tril(
        0 if is_causal else 9
    )
    check(found.layers[0], weights, visible, key_mask)
    assert found.layers[0].name == "(the model)"
    assert set(found.layers[0].times_us) == {"projection", "attention", "mixing", "output", "whole"}


def test_a_reach_is_no_padding():
    layer = loud(MultiHeadAttention(16, 4, reach="others"))
    x = torch.randn(2, 6, 16).double()
    _, weights = layer(x, is_causal=True, need_weights=True)
    visible = torch.ones(6, 6, dtype=torch.bool).tril(-1)
    check(analyze(layer, [{"x": x, "is_causal": True}]).layers[0], weights, visible)


def test_across_two_sequences_there_is_no_distance():
    layer = loud(MultiHeadAttention(16, 4))
    x, context = torch.randn(2, 3, 16).double(), torch.randn(2, 5, 16).double()
    _, weights = layer(x, context, need_weights=True)
    found = analyze(layer, [{"x": x, "context": context}])
    check(found.layers[0], weights, together=False)
    assert found.to_dict()["layers"][0]["distance"][0]["mean"] is None
    json.dumps(found.to_dict(), allow_nan=False)


def test_logits_are_those_of_the_score():
    layer = loud(MultiHeadAttention(16, 4))
    x = torch.randn(2, 6, 16).double()
    seen = layer.statistics(x, largest=True, impl="reference")
    (found,) = analyze(layer, [x]).layers
    assert found.largest == pytest.approx(seen.largest.amax(0).tolist())
    assert [s.mean for s in found.log_sum_exp] == pytest.approx(
        seen.log_sum_exp.mean((0, 2)).tolist()
    )
    distance = loud(MultiHeadAttention(16, 4, score="l2"))
    (found,) = analyze(distance, [x]).layers
    seen = distance.statistics(x, largest=True, impl="reference")
    assert found.largest == pytest.approx(seen.largest.amax(0).tolist())
    assert math.isnan(found.log_sum_exp[0].mean)


def test_several_batches_are_one_average():
    layer, x = loud(MultiHeadAttention(16, 4)), torch.randn(5, 6, 16).double()
    whole, parts = analyze(layer, [x]), analyze(layer, [x[:2], [x[2:], None]])
    assert (whole.batches, parts.batches) == (1, 2)
    for name in ("entropy", "sparsity", "distance", "first", "log_sum_exp", "redundancy"):
        one, two = (getattr(a.layers[0], name) for a in (whole, parts))
        assert [v for row in two for v in row] == pytest.approx([v for row in one for v in row])
    assert analyze(layer, [Batch(x, x)] * 3, batches=2).batches == 2
    # the spread of one batch repeated is that of the batch
    assert analyze(layer, [x] * 2).layers[0].entropy[0] == pytest.approx(whole.layers[0].entropy[0])


def test_tiles_change_nothing_and_bound_what_is_held(monkeypatch):
    layer, x = loud(MultiHeadAttention(16, 4)), torch.randn(2, 40, 16).double()
    given = [{"x": x, "is_causal": True}]
    whole = analyze(layer, given)
    held = []
    tally = measured.tally
    monkeypatch.setattr(measured, "CELLS", 2 * 4 * 40 * 3)
    monkeypatch.setattr(
        measured, "tally", lambda seen, rows: held.append(len(rows)) or tally(seen, rows)
    )
    tiled = analyze(layer, given)
    assert held == [3] * 13 + [1]
    assert [s.mean for s in tiled.layers[0].entropy] == pytest.approx(
        [s.mean for s in whole.layers[0].entropy]
    )
    assert tiled.layers[0].redundancy[0] == pytest.approx(whole.layers[0].redundancy[0])


def test_sampled_queries_are_spaced_and_hold_the_last():
    assert measured.spaced(10, None, torch.device("cpu")).tolist() == list(range(10))
    assert measured.spaced(9, 4, torch.device("cpu")).tolist() == [2, 4, 6, 8]
    layer = loud(MultiHeadAttention(16, 4))
    found = analyze(layer, [torch.randn(2, 40, 16).double()], queries=10)
    assert found.layers[0].queries == (20,) * 4


# ---------------------------------------------------------------- what is known beforehand


class Fixed(nn.Module):
    """Attention by given logits (h, n, n), through a mask that adds to zeros."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits
        self.attention = MultiHeadAttention(8, len(logits)).requires_grad_(requires_grad=False)
        for projection in self.attention.projection.parameters():
            projection.zero_()

    def forward(self, x):
        return self.attention(x, attn_mask=self.logits.expand(len(x), -1, -1, -1))


def heads_of(*logits):
    return analyze(Fixed(torch.stack(logits)), [torch.randn(2, len(logits[0]), 8)]).layers[0]


def test_uniform_attention():
    n = 250
    layer = heads_of(torch.zeros(n, n), torch.zeros(n, n))
    far = sum(abs(i - j) for i in range(n) for j in range(n)) / n**2
    assert layer.entropy[0] == pytest.approx((1.0, 0.0), abs=1e-3)
    assert layer.sparsity[0].mean == pytest.approx(1 - math.ceil(0.99 * n) / n, abs=1e-6)
    assert layer.distance[0].mean == pytest.approx(far, rel=1e-5)
    assert layer.first[0].mean == pytest.approx(1 / n, rel=1e-5)
    assert layer.log_sum_exp[0].mean == pytest.approx(math.log(n), rel=1e-5)


def test_the_token_before_and_the_sink():
    n = 12
    before = 60.0 * torch.eye(n).roll(-1, 1)  # of the first token the last: n - 1 away
    sink = torch.zeros(n, n)
    sink[:, 0] = 60.0
    layer = heads_of(before, before.clone(), sink, sink.roll(1, 1))
    assert layer.distance[0].mean == pytest.approx((n - 1 + (n - 1)) / n)
    assert layer.entropy[0].mean == pytest.approx(0, abs=1e-9)
    assert layer.sparsity[0].mean == pytest.approx(1 - 1 / n)
    assert layer.first[2].mean == pytest.approx(1)
    assert layer.first[3].mean == pytest.approx(0, abs=1e-9)
    assert layer.largest == pytest.approx((60.0,) * 4)
    assert layer.redundancy[0][1] == pytest.approx(1)
    assert layer.redundancy[2][3] == pytest.approx(0, abs=1e-9)
    assert layer.redundancy[0][2] == pytest.approx(1 / n)
    assert layer.alike[0] == pytest.approx((1 + 1 / n + 1 / n) / 3)


def test_causal_previous_token_attention_is_one_token_away():
    n = 10
    before = 80.0 * torch.eye(n).roll(-1, 1)
    before = before.masked_fill(torch.ones(n, n).triu(1).bool(), -math.inf)
    layer = heads_of(before, before)
    assert layer.distance[0] == pytest.approx((1.0, 0.0), abs=1e-6)
    assert layer.queries == (2 * (n - 1),) * 2


# ---------------------------------------------------------------- PyTorch


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("masks", ["padding", "boolean", "float and padding", "per head", "none"])
@pytest.mark.parametrize("widths", [{}, {"kdim": 6, "vdim": 6}])
def test_multihead_attention_of_pytorch(batch_first, masks, widths):
    layer = loud(nn.MultiheadAttention(16, 4, batch_first=batch_first, **widths))
    n = m = 7
    x = torch.randn(2, n, 16).double()
    context = torch.randn(2, m, 6).double() if widths else x
    hidden, padding = torch.ones(n, m).triu(1).bool(), torch.zeros(2, m, dtype=torch.bool)
    padding[1, 5:] = True
    given = {}
    if "padding" in masks:
        given["key_padding_mask"] = padding
    if masks == "boolean":
        given["attn_mask"] = hidden
    if "float" in masks:
        given["attn_mask"] = torch.randn(n, m).double().masked_fill(hidden, -math.inf)
    if masks == "per head":
        given["attn_mask"] = hidden[None] & (torch.rand(8, 1, m) < 1)
    if "key_padding_mask" in given and "float" in masks:
        zeros = torch.zeros(2, m).double()
        given["key_padding_mask"] = zeros.masked_fill(padding, -math.inf)
    sources = [x, context] if batch_first else [x.transpose(0, 1), context.transpose(0, 1)]
    source = sources[0] if context is x else sources[1]
    batch = {"query": sources[0], "key": source, "value": source, **given}
    _, weights = layer(**batch, average_attn_weights=False)
    visible = torch.ones(2, 1, n, m, dtype=torch.bool)
    if "attn_mask" in given:
        visible &= ~hidden
    if "key_padding_mask" in given:
        visible &= ~padding[:, None, None]
    tokens = ~padding if "key_padding_mask" in given else None
    (found,) = analyze(layer, [batch]).layers
    check(found, weights, visible, tokens, together=not widths)
    assert list(found.times_us) == ["whole"]


@pytest.mark.parametrize("training", [True, False])
def test_the_fast_path_of_encoders_hides_nothing(training):
    block = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    model = nn.TransformerEncoder(block, 2).train(training)
    hidden = torch.zeros(2, 6, dtype=torch.bool)
    hidden[0, 4:] = True
    found = analyze(model, [{"src": torch.randn(2, 6, 16), "src_key_padding_mask": hidden}])
    assert [layer.name for layer in found.layers] == ["layers.0.self_attn", "layers.1.self_attn"]
    assert found.short_names() == ["0", "1"]
    assert found.layers[1].queries == (10,) * 4
    assert torch.backends.mha.get_fastpath_enabled()


def test_added_keys_are_refused():
    with pytest.raises(ValueError, match="add_bias_kv or add_zero_attn cannot be analysed"):
        analyze(nn.MultiheadAttention(16, 4, add_zero_attn=True), [torch.zeros(1, 2, 16)])


# ---------------------------------------------------------------- Hugging Face

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 16, "vocab_size": 50}


def padded(side):
    ids, mask = torch.randint(3, 50, (3, 8)), torch.ones(3, 8, dtype=torch.long)
    if side == "left":
        mask[1, :3] = 0
    else:
        mask[1, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["Llama", "Bert", "Gemma2", "GPT2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_models_of_hugging_face(implementation, kind, side):
    transformers = pytest.importorskip("transformers")
    sizes = SIZES | {"num_attention_heads": 4, "hidden_act": "gelu"}
    if kind == "Gemma2" and implementation == "sdpa":
        pytest.skip("its softcap is honoured by eager attention alone")
    if kind == "Llama":
        sizes |= {"num_key_value_heads": 2}
    if kind == "Gemma2":
        sizes |= {"num_key_value_heads": 2, "head_dim": 4, "attn_logit_softcapping": 0.5}
    if kind == "GPT2":
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 4, "vocab_size": 50, "n_positions": 16}
    config = getattr(transformers, f"{kind}Config")(**sizes, attn_implementation=implementation)
    # in float64 the eager attention of transformers gives NaN where a query sees nothing
    model = loud(getattr(transformers, f"{kind}Model")(config)).float().eval()
    batch = padded(side)
    before = model(**batch)[0]
    found = analyze(model, [batch])
    assert torch.equal(model(**batch)[0], before)
    assert model.config._attn_implementation == implementation
    model.set_attn_implementation("eager")
    weights = model(**batch, output_attentions=True).attentions
    tokens = batch["attention_mask"].bool()
    visible = tokens[:, None, None]
    if kind != "Bert":
        visible = visible & torch.ones(8, 8, dtype=torch.bool).tril()
    assert len(found.layers) == 2
    for layer, explicit in zip(found.layers, weights, strict=True):
        check(layer, explicit.double(), visible, tokens, rel=1e-5)
        assert set(layer.times_us) == {"projection", "attention", "output", "whole"}


def test_an_encoder_and_a_decoder_of_hugging_face():
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=4, vocab_size=50,
        decoder_start_token_id=0, attn_implementation="eager",
    )  # fmt: skip
    model = loud(transformers.T5ForConditionalGeneration(config)).eval()
    batch = {"input_ids": torch.randint(3, 50, (2, 7)), "labels": torch.randint(3, 50, (2, 5))}
    try:
        found = analyze(model, [batch])
    except ValueError as error:
        pytest.skip(str(error))
    out = model(**batch, output_attentions=True)
    encoder, decoder, across = found.layers
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    check(encoder, out.encoder_attentions[0].double(), rel=1e-5)
    check(decoder, out.decoder_attentions[0].double(), causal, rel=1e-5)
    check(across, out.cross_attentions[0].double(), together=False, rel=1e-5)


def test_hugging_face_by_a_score_of_ours():
    transformers = pytest.importorskip("transformers")
    from sixfold.integrations.huggingface.attention import register

    register()
    sizes = SIZES | {"num_attention_heads": 4, "attn_implementation": "sixfold_l1"}
    model = loud(transformers.LlamaModel(transformers.LlamaConfig(**sizes))).eval()
    batch = padded("right")
    found = analyze(model, [batch])
    weights = model(**batch, output_attentions=True).attentions
    tokens = batch["attention_mask"].bool()
    visible = tokens[:, None, None] & torch.ones(8, 8, dtype=torch.bool).tril()
    for layer, explicit in zip(found.layers, weights, strict=True):
        check(layer, explicit, visible, tokens, rel=1e-6)


def test_what_transformers_cannot_show_is_refused_and_its_interface_restored():
    transformers = pytest.importorskip("transformers")

    interface = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
    config = transformers.LlamaConfig(**SIZES, num_attention_heads=4)
    model, before = transformers.LlamaModel(config), dict(interface._local_mapping)
    own = interface["sdpa"]
    with pytest.raises(IndexError):
        analyze(model, [torch.full((1, 3), 50)])
    assert (interface._local_mapping, interface["sdpa"]) == (before, own)
    model.set_attn_implementation("eager")
    with pytest.raises(IndexError):
        analyze(model, [torch.full((1, 3), 50)])
    assert "eager" not in interface
    model.config._attn_implementation_internal = "flex_attention"
    with pytest.raises(ValueError, match=r"'flex_attention' cannot be analysed; load the model"):
        analyze(model, [torch.ones(1, 3).long()])


@pytest.mark.parametrize(("name", "hidden"), [("eager", 0), ("sdpa", 10)])
def test_eager_attention_without_a_mask_is_not_causal(name, hidden):
    pytest.importorskip("transformers")
    from sixfold.analysis.families.huggingface import seen_by

    module, points = nn.Module(), torch.randn(1, 1, 5, 4)
    module.is_causal = True
    rows = seen_by(name, module, points, points, points).rows(torch.arange(5))
    assert rows.isneginf().sum() == hidden


# ---------------------------------------------------------------- timm


class Nowhere(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Something in place of torchvision, which timm imports and its attention does not use."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] != "torchvision":
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return MagicMock(__name__=spec.name, __path__=[], __spec__=spec)

    def exec_module(self, module):
        pass


@pytest.fixture
def timm_layers(monkeypatch):
    if importlib.util.find_spec("timm") is None:
        pytest.skip("needs timm")
    if importlib.util.find_spec("torchvision") is not None or "timm" in sys.modules:
        return importlib.import_module("timm.layers")
    finder = Nowhere()
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, finder])
    try:
        return importlib.import_module("timm.layers")
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]


@pytest.mark.parametrize("masks", ["none", "causal", "boolean"])
def test_attention_of_timm(timm_layers, masks):
    layer = loud(timm_layers.Attention(16, 4, qk_norm=True, norm_layer=nn.LayerNorm))
    layer.fused_attn = False
    kept = []
    layer.attn_drop.register_forward_hook(lambda *passed: kept.append(passed[-1]))
    batch = {"x": torch.randn(2, 6, 16).double()}
    visible = torch.ones(6, 6, dtype=torch.bool)
    if masks == "causal":
        batch["is_causal"], visible = True, visible.tril()
    if masks == "boolean":
        batch["attn_mask"] = visible = visible.tril(2)
    (found,) = analyze(layer, [batch]).layers
    check(found, kept[0], visible)
    assert set(found.times_us) == {"projection", "attention", "output", "whole"}


# ---------------------------------------------------------------- the model and its user


def state_of(model):
    flags = [module.training for module in model.modules()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    own = [(m.probe, m.dropout) for m in model.modules() if isinstance(m, MultiHeadAttention)]
    return flags, hooks, own, torch.get_rng_state().tolist(), torch.is_grad_enabled()


class Both(nn.Module):
    """Two families in one model, with dropout and a norm that keeps averages."""

    def __init__(self):
        super().__init__()
        self.one = LanguageModel(20, 8, 16, 1, {"num_heads": 4, "dropout": 0.5}, dropout=0.5)
        self.two = nn.MultiheadAttention(20, 4, batch_first=True, dropout=0.5)
        self.norm = nn.BatchNorm1d(20)

    def forward(self, x):
        y = self.one(x)
        y = self.two(y, y, y, need_weights=False)[0]
        return self.norm(y.flatten(0, 1))


@pytest.mark.parametrize("training", [True, False])
def test_a_model_is_left_as_it_was(training):
    model, ids = Both().train(training), torch.randint(0, 20, (2, 8))
    model.two.eval()
    before, weights = state_of(model), {k: v.clone() for k, v in model.state_dict().items()}
    seeded = torch.get_rng_state()
    expected = model(ids)
    model.load_state_dict(weights)
    torch.set_rng_state(seeded)
    found = analyze(model, [ids, ids])
    assert state_of(model) == before
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert torch.equal(model(ids), expected)
    assert [(layer.family, layer.num_heads) for layer in found.layers] == [
        ("sixfold", 4),
        ("torch", 4),
    ]


def test_nothing_is_dropped_while_it_is_watched():
    model = LanguageModel(20, 8, 16, 2, {"num_heads": 4, "dropout": 0.9}, dropout=0.9).train()
    ids = torch.randint(0, 20, (2, 8))
    found = analyze(model, [ids])
    for layer in model.modules():
        if isinstance(layer, MultiHeadAttention):
            layer.dropout = 0.0
    assert found.layers[1].entropy == analyze(model.eval(), [ids]).layers[1].entropy


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_no_hooks(failure):
    model, ids = Both(), torch.randint(0, 20, (2, 8))

    class Breaks(nn.Module):
        def forward(self, x):
            raise failure("stop")

    model.norm = Breaks()
    before = state_of(model)
    with pytest.raises(failure):
        analyze(model, [ids])
    assert state_of(model) == before


def test_an_interrupt_gives_what_was_measured():
    layer, x = MultiHeadAttention(16, 4), torch.randn(2, 6, 16)

    def loader():
        yield x
        yield x
        raise KeyboardInterrupt

    with pytest.warns(RuntimeWarning, match="2 whole batches were measured"):
        found = analyze(layer, loader())
    assert found.interrupted and found.batches == 2
    assert "interrupted" in found.table().splitlines()[0]
    assert found.layers[0].queries == (24,) * 4


@pytest.mark.parametrize(("patience", "shown"), [(0.0, True), (60.0, False)])
def test_a_bar_is_shown_where_it_takes_long(patience, shown, monkeypatch, capsys):
    pytest.importorskip("rich")
    monkeypatch.setattr("sixfold.analysis.run.PATIENCE_S", patience)
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes any output for a terminal
    analyze(MultiHeadAttention(16, 4), [torch.randn(2, 6, 16)] * 3)
    assert ("attention" in capsys.readouterr().err) is shown


def test_nothing_found_says_what_is_known():
    with pytest.raises(
        ValueError, match="Linear called no attention that can be analysed"
    ) as error:
        analyze(nn.Linear(4, 4), [torch.zeros(2, 4)])
    assert all(family.what in str(error.value) for family in families())
    assert len(families()) == 4


@pytest.mark.parametrize("given", [{"batches": 0}, {"queries": 0}])
def test_counts_are_positive(given):
    with pytest.raises(ValueError, match=f"{next(iter(given))} must be 1 or more, or None, got 0"):
        analyze(nn.Linear(4, 4), [torch.zeros(2, 4)], **given)


def test_an_empty_loader_is_an_error():
    with pytest.raises(ValueError, match="loader has no batches"):
        analyze(MultiHeadAttention(16, 4), [])


def test_a_query_that_sees_one_key_is_not_counted():
    (found,) = analyze(MultiHeadAttention(16, 4), [torch.randn(2, 1, 16)]).layers
    assert found.queries == (0,) * 4
    assert math.isnan(found.entropy[0].mean)
    assert "-" in analyze(MultiHeadAttention(16, 1), [torch.randn(2, 1, 16)]).table()


def test_pictures_and_values_are_written(tmp_path):
    pytest.importorskip("matplotlib")
    model = Both().eval()
    found = analyze(model, [torch.randint(0, 20, (2, 8))], pictures=tmp_path / "new")
    assert {p.name for p in (tmp_path / "new").iterdir()} == {
        "heads.png", "redundancy.png", "times.png", "analysis.json",
    }  # fmt: skip
    assert json.loads((tmp_path / "new" / "analysis.json").read_text()) == found.to_dict()
    panels = found.figure().axes[:6]
    shown = panels[0].images[0].get_array()
    assert shown.tolist() == [[s.mean for s in layer.entropy] for layer in found.layers]
    assert len(found.redundancy_figure().axes) == 3
    stages = {bar.get_label() for bar in found.times_figure().axes[0].containers}
    assert stages == {"projection", "attention", "mixing", "output", "whole"}


@pytest.mark.slow
def test_the_example(tmp_path):
    file = Path(__file__).parents[2] / "examples" / "analyze.py"
    command = [sys.executable, "-W", "error", str(file), "--smoke"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "3 layers, 12 heads, 2 batches" in done.stdout
    assert not [*tmp_path.iterdir()]


def test_what_draws_is_asked_for_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'sixfold\[cli\]'"):
        analyze(MultiHeadAttention(16, 4), [], pictures=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_public_name_is_this_function():
    assert sixfold.analyze is analyze
