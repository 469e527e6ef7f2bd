from __future__ import annotations

import contextlib
import copy
import gc
import importlib.abc
import importlib.machinery
import importlib.util
import math
import sys
import weakref
from unittest.mock import MagicMock

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules import module as registry
from torch.utils.checkpoint import checkpoint

from sixfold import LanguageModel, MultiHeadAttention
from sixfold.governor.watch.probe import LayerProbe
from sixfold.governor.watch.watch import Watch

WIDTH, HEADS, HEAD_DIM = 24, 4, 6


class Recorder:
    """A probe that keeps what it is shown."""

    def __init__(self):
        self.observations = []

    def mark(self, stage):
        pass

    def observe(self, observation):
        self.observations.append(observation)


def rotated(x: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of (b, h, n, d), written as complex numbers."""
    n, half = x.shape[-2], x.shape[-1] // 2
    angles = torch.outer(torch.arange(n), 100.0 ** -(torch.arange(half) / half))
    whole = torch.complex(x[..., :half].float(), x[..., half:].float())
    turned = whole * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], -1).to(x.dtype)


class Attention(nn.Module):
    """Attention as scripts write it; `layout` says how its weights lie."""

    def __init__(self, layout: str, *, kv_heads: int = HEADS, rope=False, bias=True, repeat=False):
        super().__init__()
        self.layout, self.kv, self.rope, self.repeat = layout, kv_heads, rope, repeat
        kv, rows = kv_heads * HEAD_DIM, HEADS * HEAD_DIM
        if layout == "separate":
            self.q, self.k, self.v = (nn.Linear(WIDTH, c, bias=bias) for c in (rows, kv, kv))
        elif layout in ("product", "transpose"):
            weight = torch.randn(WIDTH, rows + 2 * kv) * WIDTH**-0.5
            self.weight = nn.Parameter(weight if layout == "product" else weight.mT.contiguous())
        else:
            self.fused = nn.Linear(WIDTH, rows + 2 * kv, bias=bias)
        self.out = nn.Linear(rows, WIDTH)

    def project(self, x):
        if self.layout == "separate":
            return self.q(x), self.k(x), self.v(x)
        if self.layout in ("product", "transpose"):
            y = x @ (self.weight if self.layout == "product" else self.weight.T)
        else:
            y = self.fused(x)
        if self.layout == "interleaved":  # head by head q, k, v
            parts = y.unflatten(-1, (HEADS, 3, HEAD_DIM)).unbind(-2)
            return tuple(part.flatten(-2) for part in parts)
        if self.layout == "by group":  # key head by key head its queries, k, v
            y = y.unflatten(-1, (self.kv, HEADS // self.kv + 2, HEAD_DIM))
            return y[..., :-2, :].flatten(-3), y[..., -2, :].flatten(-2), y[..., -1, :].flatten(-2)
        kv = self.kv * HEAD_DIM
        return y.split([HEADS * HEAD_DIM, kv, kv], -1)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for part in self.project(x))
        if self.rope:
            q, k = rotated(q), rotated(k)
        if self.repeat:
            k, v = (part.repeat_interleave(HEADS // self.kv, 1) for part in (k, v))
        self.query, self.key = q, k
        grouped = k.shape[1] != HEADS
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        return self.out(y.transpose(1, 2).flatten(2))


class Net(nn.Module):
    """Residual layers of attention between dropout."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in layers)
        self.drop = nn.Dropout(0.1)

    def forward(self, x):
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + self.drop(layer(norm(x)))
        return x


LAYOUTS = {
    "fused": {"layout": "fused"},
    "separate": {"layout": "separate"},
    "separate, rotary, grouped": {"layout": "separate", "kv_heads": 2, "rope": True, "bias": False},
    "separate, rotary, repeated": {
        "layout": "separate",
        "kv_heads": 2,
        "rope": True,
        "repeat": True,
    },
    "fused, rotary, one key head": {"layout": "fused", "kv_heads": 1, "rope": True},
    "interleaved, rotary": {"layout": "interleaved", "rope": True},
    "by group, rotary": {"layout": "by group", "kv_heads": 2, "rope": True},
    "product": {"layout": "product", "rope": True},
    "product of the transpose": {"layout": "transpose", "rope": True},
}
"""nanoGPT; BERT; Llama; Llama of old; PaLM and StarCoder; GPT-NeoX; Falcon; x @ W."""


def net(name: str = "fused") -> Net:
    return Net(Attention(**LAYOUTS[name]), Attention(**LAYOUTS[name]))


def tokens(batch: int = 3, n: int = 10) -> torch.Tensor:
    return torch.randn(batch, n, WIDTH, generator=torch.Generator().manual_seed(5))


def watched(model, *args, probe=None, **kwargs):
    """A watch of the model after a watched pass, and its probes by layer."""
    watch, probes = Watch(model), {}

    def probe_of(number):
        probes[number] = (
            LayerProbe(torch.device("cpu"), measure=True, hold=()) if probe is None else probe()
        )
        return probes[number]

    watch.arm(probe_of)
    try:
        model(*args, **kwargs)
    finally:
        watch.disarm()
    return watch, probes


def explicit(query, key, scale=None, mask=None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, largest logit and normalised entropy of the first sequence; mask True = seen."""
    query, key = query[0].detach().double(), key[0].detach().double()
    key = key.repeat_interleave(len(query) // len(key), 0)
    scores = torch.einsum("hnd,hmd->hnm", query, key) * (scale or query.shape[-1] ** -0.5)
    n, m = scores.shape[1:]
    mask = torch.ones(n, m, dtype=torch.bool) if mask is None else mask.expand(n, m)
    scores = scores.masked_fill(~mask, -math.inf)
    entropies = []
    for head in scores:
        of_head = []
        for row, seen in zip(head, mask, strict=True):
            if seen.sum() > 1:
                p = row[seen].softmax(0)
                of_head.append(-(p * p.log()).sum() / math.log(seen.sum()))
        entropies.append(torch.stack(of_head).mean())
    return scores, scores.amax((1, 2)), torch.stack(entropies)


def check_signals(probe, query, key, scale=None, mask=None):
    _, largest, entropy = explicit(query, key, scale, mask)
    torch.testing.assert_close(probe.max_logit.double(), largest, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(probe.entropy.double(), entropy, rtol=1e-4, atol=1e-5)


def causal(n: int, m: int | None = None) -> torch.Tensor:
    return torch.ones(n, m or n, dtype=torch.bool).tril()


def left_behind(model) -> list:
    """Every hook, mode, probe and stance that is not as in a fresh process."""
    found = [
        (name, kind)
        for name, part in model.named_modules()
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called")
        if len(part.__dict__[kind])
    ]
    if registry._has_any_global_hook():
        found.append("global hooks")
    found += torch.overrides._get_current_function_mode_stack()
    found += [m for m in model.modules() if isinstance(m, MultiHeadAttention) and m.probe]
    stance = torch._dynamo.eval_frame._stance.stance
    return found if stance == "default" else [*found, stance]


# ---------------------------------------------------------------- signals


@pytest.mark.parametrize("name", LAYOUTS)
def test_signals_are_those_of_the_explicit_logits(name):
    model = net(name)
    watch, probes = watched(model, tokens())
    assert [layer.name for layer in watch.layers] == ["layers.0", "layers.1"]
    for number, layer in enumerate(watch.layers):
        module = model.layers[number]
        assert layer.module is module and layer.num_heads == HEADS
        assert probes[number].tokens == 30
        check_signals(probes[number], module.query, module.key, mask=causal(10))


def call(attend):
    """A model whose forward pass is one call."""

    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, *args):
            return attend(*args) * self.weight

    return Bare()


def qkv(n=7, m=7, heads=3, d=4):
    return torch.randn(2, heads, n, d), torch.randn(2, heads, m, d), torch.randn(2, heads, m, d)


@pytest.mark.parametrize("n, m", [(7, 7), (5, 9), (9, 5)])
def test_causality_is_aligned_as_pytorch_does(n, m):
    q, k, v = qkv(n, m)
    model = call(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, None, 0.0, True))
    _, probes = watched(model, q, k, v)
    check_signals(probes[0], q, k, mask=causal(n, m))


@pytest.mark.parametrize("kind", ["boolean", "infinite", "least", "heads"])
def test_masks_and_scale_are_read(kind):
    q, k, v = qkv()
    shown = torch.rand(7, 7) > 0.4
    shown[:, 0] = True
    mask = shown
    if kind in ("infinite", "least"):
        hidden = -math.inf if kind == "infinite" else torch.finfo(torch.float32).min
        mask = torch.zeros(2, 1, 7, 7).masked_fill(~shown, hidden)
    if kind == "heads":
        mask = shown.expand(3, 7, 7)
    model = call(
        lambda q, k, v: F.scaled_dot_product_attention(
            key=k, query=q, value=v, attn_mask=mask, scale=0.7
        )
    )
    _, probes = watched(model, q, k, v)
    check_signals(probes[0], q, k, 0.7, shown)


def test_a_float_mask_is_part_of_the_logits():
    q, k, v = qkv()
    bias = torch.randn(3, 7, 7)
    model = call(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, bias[None]))
    _, probes = watched(model, q, k, v)
    scores, _, _ = explicit(q, k)
    assert probes[0].max_logit.tolist() == pytest.approx(
        (scores + bias).amax((1, 2)).tolist(), rel=1e-5
    )


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("separate", [False, True])
def test_multihead_attention_of_pytorch(need_weights, batch_first, separate):
    kdim = 10 if separate else WIDTH
    layer = nn.MultiheadAttention(WIDTH, HEADS, kdim=kdim, vdim=kdim, batch_first=batch_first)
    nn.init.normal_(layer.in_proj_bias)
    x, context = tokens(2, 6), torch.randn(2, 8, kdim)
    hidden, padded = torch.rand(6, 8) > 0.7, torch.zeros(2, 8, dtype=torch.bool)
    hidden[:, 0], padded[0, -2:] = False, True
    given = (
        (x, context, context)
        if batch_first
        else (x.mT.mT.transpose(0, 1), *[context.transpose(0, 1)] * 2)
    )
    watch, probes = watched(
        layer, *given, attn_mask=hidden, key_padding_mask=padded, need_weights=need_weights
    )
    weights = (
        (layer.q_proj_weight, layer.k_proj_weight)
        if separate
        else layer.in_proj_weight.chunk(3)[:2]
    )
    q, k = (
        (source @ weight.T + bias).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        for source, weight, bias in zip(
            (x, context), weights, layer.in_proj_bias.chunk(3), strict=False
        )
    )
    check_signals(probes[0], q, k, mask=~hidden & ~padded[0])
    (found,) = watch.layers
    assert found.name == "" and found.refusal is None and probes[0].tokens == 12
    matrices = {role: m.flatten(0, 1) for role, m in found.matrices().items()}
    assert torch.equal(matrices["q"], weights[0]) and torch.equal(matrices["k"], weights[1])
    bias = layer.in_proj_bias.unflatten(0, (3, HEADS, -1))
    for number, role in enumerate("qkv"):
        assert torch.equal(found.pieces(2)[role][1].view(), bias[number, 2])


@pytest.mark.filterwarnings("ignore:Support for mismatched:UserWarning")
@pytest.mark.parametrize("kind", ["one", "each head", "padding", "mixed"])
def test_masks_of_the_function_hide_where_true(kind):
    own = nn.MultiheadAttention(WIDTH, HEADS)
    x = tokens(6, 2)  # (n, b, c)
    hidden, padding, masks = torch.rand(6, 6) > 0.6, None, {}
    hidden[:, 0] = False
    if kind == "each head":
        hidden = torch.stack([hidden.roll(h, 0) for h in range(2 * HEADS)])
    if kind in ("padding", "mixed"):
        padding = torch.zeros(2, 6, dtype=torch.bool)
        padding[0, 4:] = True
    masks = {"attn_mask": hidden, "key_padding_mask": padding}
    if kind == "mixed":
        masks["attn_mask"] = torch.zeros(6, 6).masked_fill(hidden, -math.inf)

    def attend(x):
        weights = own.in_proj_weight, own.in_proj_bias, None, None, False, 0.0
        out = own.out_proj.weight, own.out_proj.bias
        return F.multi_head_attention_forward(x, x, x, WIDTH, HEADS, *weights, *out, **masks)[0]

    model = call(attend)
    model.own = own
    _, probes = watched(model, x, probe=Recorder)
    seen = ~(hidden[:HEADS] if kind == "each head" else hidden.expand(HEADS, 6, 6))
    seen = seen if padding is None else seen & ~padding[0]
    (found,) = probes[0].observations
    shown = found.visibility.mask
    shown = shown if shown.dtype == torch.bool else shown == 0
    assert torch.equal(shown.expand(1, HEADS, 6, 6)[0], seen)


def test_float_masks_of_multihead_attention_and_encoder_layers():
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, dropout=0.0, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), tokens(2, 6)
    square = nn.Transformer.generate_square_subsequent_mask(6)
    watch, probes = watched(model, x, square, is_causal=True)
    assert [found.name for found in watch.layers] == ["layers.0.self_attn", "layers.1.self_attn"]
    own = model.layers[0].self_attn
    q, k, _ = F.linear(x, own.in_proj_weight, own.in_proj_bias).chunk(3, -1)
    q, k = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (q, k))
    check_signals(probes[0], q, k, mask=causal(6))


def test_what_cannot_be_read_is_said():
    layer = nn.MultiheadAttention(WIDTH, HEADS, add_bias_kv=True, batch_first=True)
    watch, _ = watched(layer, *[tokens()] * 3)
    assert not watch.layers and "given bias_k" in watch.nothing()
    model = call(F.scaled_dot_product_attention)
    watch, _ = watched(model, *[torch.randn(2, 5, 4)] * 3)
    assert "queries must be (b, h, n, d), got (2, 5, 4)" in watch.nothing()


def test_flex_attention_with_a_block_mask():
    from torch.nn.attention import flex_attention as flex

    block = flex.create_block_mask(lambda b, h, i, j: i - j < 5, None, None, 128, 128, device="cpu")
    model = call(lambda q, k, v: flex.flex_attention(q, k, v, block_mask=block, scale=0.3))
    q, k, v = qkv(128, 128)
    # compiled by PyTorch itself with a warning that it is slow
    with pytest.warns(UserWarning, match="flex_attention called without torch.compile"):
        watch, probes = watched(model, q, k, v, probe=Recorder)
    (seen,) = probes[0].observations
    i = torch.arange(128)
    assert torch.equal(seen.visibility.mask[0, 1], i[:, None] - i < 5)
    assert seen.rating.scale == 0.3 and torch.equal(seen.rating.query, q)
    model = call(lambda q, k, v: flex.flex_attention(q, k, v, score_mod=lambda s, *_: s * 2))
    watch, _ = watched(model, q, k, v)
    assert "score_mod" in watch.nothing()


# ---------------------------------------------------------------- layout


def head_logits(watch, model, x) -> torch.Tensor:
    """Logits of the first layer, as a recording probe sees them, without any mask."""
    model.eval()  # no dropout
    found = Recorder()
    for part in model.modules():
        part.training = True
        if isinstance(part, nn.Dropout):
            part.training = False
    watch.arm(lambda number: found if number == 0 else None)
    model(x)
    watch.disarm()
    rating = found.observations[0].rating
    key = rating.key.repeat_interleave(rating.query.shape[1] // rating.key.shape[1], 1)
    return (rating.scale * rating.query @ key.mT).detach()


def check_scaling(watch, model, x):
    """One head's logits are multiplied, no other's, and the undo restores every bit."""
    layer, before = watch.layers[0], head_logits(watch, model, x)
    kept = {name: p.detach().clone() for name, p in model.named_parameters()}
    for head, power in ((1, -3), (layer.num_heads - 1, 2)):
        layer.scale_head_(head, power)
        after = head_logits(watch, model, x)
        for other in range(layer.num_heads):
            expected = before[:, other] * (2.0**power if other == head else 1.0)
            torch.testing.assert_close(after[:, other], expected, rtol=1e-5, atol=1e-6)
            assert other == head or torch.equal(after[:, other], before[:, other])
        layer.scale_head_(head, -power)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, kept[name])


@pytest.mark.parametrize("name", LAYOUTS)
def test_scaling_a_head_of_any_layout(name):
    model = net(name)
    watch, _ = watched(model, tokens())
    assert [layer.refusal for layer in watch.layers] == [None, None]
    assert watch.layers[0].num_kv_heads == LAYOUTS[name].get("kv_heads", HEADS)
    check_scaling(watch, model, tokens())


@pytest.mark.parametrize("name", LAYOUTS)
def test_matrices_make_queries_keys_and_values(name):
    model, x = net(name), tokens()
    watch, _ = watched(model, x)
    layer, module = watch.layers[0], model.layers[0]
    given = F.layer_norm(x, (WIDTH,))
    parts = dict(zip("qkv", module.project(given), strict=True))
    for role, matrix in layer.matrices().items():
        made = torch.einsum("bnc,hdc->bnhd", given, matrix)
        pieces = [layer.pieces(h)[role] for h in range(0, HEADS, HEADS // len(matrix))]
        if len(pieces[0]) == 2:
            made = made + torch.stack([bias.view() for _, bias in pieces])
        torch.testing.assert_close(made.flatten(2), parts[role])
        for head, (weight, *_) in enumerate(pieces):
            rows = weight.view().T if LAYOUTS[name]["layout"] == "product" else weight.view()
            assert torch.equal(rows, matrix[head])


def test_gradients_and_pieces_are_shares_of_the_parameters():
    model = net("by group, rotary")
    watch, _ = watched(model, tokens())
    layer = watch.layers[1]
    assert layer.gradients() is None
    assert layer.pieces(0)["q"][0].gradient() is None
    model(tokens()).square().sum().backward()
    weight, gradient = model.layers[1].fused.weight, model.layers[1].fused.weight.grad
    by_group = gradient.unflatten(0, (2, 4, HEAD_DIM))
    found = layer.gradients()
    assert torch.equal(found["q"], by_group[:, :2].flatten(0, 1))
    assert torch.equal(found["k"], by_group[:, 2]) and torch.equal(found["v"], by_group[:, 3])
    assert torch.equal(layer.pieces(3)["v"][0].gradient(), by_group[1, 3])
    layer.pieces(3)["k"][0].view().zero_()
    assert weight.unflatten(0, (2, 4, HEAD_DIM))[1, 2].eq(0).all()
    with pytest.raises(ValueError, match=r"head must be in \[0, 4\)"):
        layer.pieces(4)


def test_scaling_refuses_what_could_not_be_taken_back():
    model = net()
    watch, _ = watched(model, tokens())
    model.half()
    before = model.layers[0].fused.weight.clone()
    with pytest.raises(ValueError, match="would not restore every bit"):
        watch.layers[0].scale_head_(0, -40)
    assert torch.equal(model.layers[0].fused.weight, before)


class Normed(Attention):
    """A norm per head of queries and keys, with a learned gain."""

    def __init__(self, gain: float):
        super().__init__("separate")
        self.norm = nn.RMSNorm(HEAD_DIM)
        nn.init.normal_(self.norm.weight, 1.0, gain)

    def forward(self, x):
        q, k, v = (p.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for p in self.project(x))
        y = F.scaled_dot_product_attention(self.norm(q), self.norm(k), v)
        return self.out(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    "gain, reason", [(0.0, "one norm for all tokens"), (0.5, "could not be traced")]
)
def test_a_norm_per_head_is_watched_and_not_touched(gain, reason):
    model = Net(Normed(gain))
    watch, probes = watched(model, tokens())
    (layer,) = watch.layers
    assert reason in layer.refusal and probes[0].max_logit.shape == (HEADS,)
    assert layer.matrices() == {} and layer.gradients() is None
    for touch in (lambda: layer.pieces(0), lambda: layer.scale_head_(0, 1)):
        with pytest.raises(ValueError, match=reason):
            touch()


def test_changed_values_and_made_up_biases_are_not_touched():
    class Gated(Attention):
        def project(self, x):
            q, k, v = super().project(x)
            return q, k, v * 2

    class Joined(Attention):
        def project(self, x):
            bias = torch.cat([self.fused.bias[:48], torch.zeros(24)])
            return F.linear(x, self.fused.weight, bias).chunk(3, -1)

    watch, _ = watched(Net(Gated("fused"), Joined("fused")), tokens())
    assert "values are changed" in watch.layers[0].refusal
    assert "bias is put together" in watch.layers[1].refusal


@pytest.mark.parametrize("roles", [(0, 0, 2), (0, 1, 1)])
def test_roles_made_by_the_same_rows_are_not_touched(roles):
    class Tied(Attention):
        def project(self, x):
            parts = super().project(x)
            return tuple(parts[role] for role in roles)

    watch, _ = watched(Net(Tied("fused", rope=True)), tokens())
    assert "share rows" in watch.layers[0].refusal


def test_heads_that_are_alike_are_not_told_apart():
    model = net()
    for parameter in (model.layers[0].fused.weight, model.layers[0].fused.bias):
        parameter.data[:HEAD_DIM] = parameter.data[HEAD_DIM : 2 * HEAD_DIM]
    watch, _ = watched(model, tokens())
    assert "several rows make the same queries" in watch.layers[0].refusal
    assert watch.layers[1].refusal is None


def test_a_pass_that_is_not_finite_traces_nothing():
    model, x = net("separate"), tokens()
    x[0, 0, 0] = math.nan
    watch, _ = watched(model, x)
    assert all("not finite" in layer.refusal for layer in watch.layers)
    watch.arm(lambda _: None)
    model(tokens())
    watch.disarm()
    assert [layer.refusal for layer in watch.layers] == [None, None]


def test_frozen_and_tied_weights_are_not_touched():
    model = net("separate")
    watch, _ = watched(model, tokens())
    layer = watch.layers[0]
    model.layers[0].k.weight.requires_grad = False
    assert "frozen" in layer.refusal and layer.matrices()["k"].shape == (4, 6, 24)
    model.layers[0].k.weight.requires_grad = True
    assert layer.refusal is None
    model.layers[1].q.weight = model.layers[0].q.weight
    watch, _ = watched(model, tokens())
    assert all("tied" in layer.refusal for layer in watch.layers)


def test_too_few_tokens_are_tried_again():
    model = net()
    watch, _ = watched(model, tokens(1, 3))
    assert "3 tokens are too few" in watch.layers[0].refusal
    watch.arm(lambda _: None)
    model(tokens())
    watch.disarm()
    assert watch.layers[0].refusal is None


def test_zero_queries_are_tried_again():
    model = net("separate")
    for part in model.layers[0].q.parameters():
        nn.init.zeros_(part)
    watch, _ = watched(model, tokens())
    assert "are zero" in watch.layers[0].refusal
    nn.init.normal_(model.layers[0].q.weight)
    watch.arm(lambda _: None)
    model(tokens())
    watch.disarm()
    assert watch.layers[0].refusal is None


def test_sequence_first_tokens_are_traced():
    class Sequential(Attention):
        def forward(self, x):
            q, k, v = (
                p.unflatten(-1, (-1, HEAD_DIM)).permute(1, 2, 0, 3)
                for p in self.project(x.transpose(0, 1))
            )
            y = F.scaled_dot_product_attention(q, k, v)
            return self.out(y.transpose(1, 2).flatten(2))

    model = Net(Sequential("fused"))
    watch, _ = watched(model, tokens())
    assert watch.layers[0].refusal is None
    check_scaling(watch, model, tokens())


def test_autocast_is_traced():
    model = net("separate, rotary, grouped")
    with torch.autocast("cpu", torch.bfloat16):
        watch, probes = watched(model, tokens(4, 16))
    assert [layer.refusal for layer in watch.layers] == [None, None]
    module = model.layers[0]
    assert module.q(tokens()).dtype == torch.float32
    check_signals(probes[0], module.query, module.key, mask=causal(16))


# ---------------------------------------------------------------- nothing changes, nothing stays


def gradients_of(model, run) -> list[torch.Tensor]:
    torch.manual_seed(3)
    model.zero_grad()
    out = run()
    out.square().sum().backward()
    return [out, torch.rand(1), *[p.grad for p in model.parameters() if p.grad is not None]]


def every_model():
    yield net("separate, rotary, grouped"), tokens()
    yield nn.TransformerEncoderLayer(WIDTH, HEADS, 32), tokens()
    attention = {"num_heads": 7, "head_dim": 4, "projection": "coordinate", "mixer": "hexagonal"}
    yield LanguageModel(11, 10, 28, 2, attention), torch.randint(0, 11, (2, 10))


@pytest.mark.parametrize("number", range(3))
def test_watching_changes_no_bit(number):
    model, x = list(every_model())[number]
    alone = gradients_of(model, lambda: model(x))
    watch = Watch(model)
    watch.arm(lambda _: LayerProbe(torch.device("cpu"), measure=True, hold=(1,)))
    seen = gradients_of(model, lambda: model(x))
    watch.disarm()
    assert watch.layers and not left_behind(model)
    for a, b in zip(alone, seen, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpoints_are_watched_once_and_kept(use_reentrant):
    class Kept(Net):
        def forward(self, x):
            for layer in self.layers:
                x = x + checkpoint(layer, x, use_reentrant=use_reentrant)
            return x

    attention = MultiHeadAttention(WIDTH, 7, head_dim=6, projection="coordinate")
    model, probes = Kept(Attention("fused"), attention, nn.TransformerEncoderLayer(WIDTH, 4, 8)), {}
    x = tokens().requires_grad_()
    alone = gradients_of(model, lambda: model(x))

    def probe_of(number):
        probes[number] = LayerProbe(torch.device("cpu"), measure=True, hold=(1,))
        return probes[number]

    watch = Watch(model)
    watch.arm(probe_of)
    seen = gradients_of(model, lambda: model(x))
    assert all(torch.equal(a, b) for a, b in zip(alone, seen, strict=True))
    assert [probes[n].tokens for n in range(3)] == [30, 30, 30]
    assert all(probe.error is None for probe in probes.values())
    assert [layer.name for layer in watch.layers] == ["layers.1", "layers.0", "layers.2.self_attn"]
    watch.disarm()
    assert not left_behind(model)


def test_held_entropy_is_differentiable_through_a_checkpoint():
    plain = Attention("fused")

    class Kept(Net):
        def forward(self, x):
            return checkpoint(self.layers[0], x, use_reentrant=False)

    found = []
    for model in (Net(plain), Kept(plain)):
        if isinstance(model, Net) and not isinstance(model, Kept):
            model.forward = plain.forward
        probe = LayerProbe(torch.device("cpu"), measure=True, hold=(2,))
        watch = Watch(model)
        watch.arm(lambda _, probe=probe: probe)
        out = model(tokens())
        plain.zero_grad()
        (out.square().sum() + probe.held.sum()).backward()
        watch.disarm()
        found.append(plain.fused.weight.grad.clone())
    torch.testing.assert_close(*found)
    plain.zero_grad()
    plain(tokens()).square().sum().backward()
    assert not torch.allclose(plain.fused.weight.grad, found[0])


def test_a_checkpoint_around_the_whole_model():
    model, probe = net(), Recorder()
    watch = Watch(model)
    watch.arm(lambda _: probe)
    checkpoint(model, tokens(), use_reentrant=False).sum().backward()
    watch.disarm()
    assert len(probe.observations) == 2 and watch.passes == 1


def test_only_training_passes_are_watched():
    model, probe = net(), Recorder()
    watch = Watch(model)
    watch.arm(lambda _: probe)
    model.eval()(tokens())
    with torch.no_grad():
        model.train()(tokens())
    assert not watch.layers and not probe.observations and watch.nothing() is None
    model(tokens())
    assert len(watch.layers) == 2 and len(probe.observations) == 2
    model(tokens())  # gradient accumulation
    assert len(watch.layers) == 2 and len(probe.observations) == 4
    watch.disarm()
    model(tokens())
    assert len(probe.observations) == 4


def test_a_layer_counts_once_in_a_pass():
    class Twice(Net):
        def forward(self, x):
            return self.layers[0](self.layers[0](x))

    watch, probes = watched(Twice(Attention("fused")), tokens(), probe=Recorder)
    assert len(watch.layers) == 1 and len(probes[0].observations) == 1


def test_attention_in_a_module_of_its_own_belongs_to_the_one_with_weights():
    class Core(nn.Module):
        def forward(self, *args):
            return F.scaled_dot_product_attention(*args)

    shared = Core()

    class Outer(Attention):
        def __init__(self):
            super().__init__("fused")
            self.core = shared

        def forward(self, x):
            q, k, v = (p.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for p in self.project(x))
            return self.out(self.core(q, k, v).transpose(1, 2).flatten(2))

    watch, _ = watched(Net(Outer(), Outer()), tokens())
    assert [(layer.name, layer.refusal) for layer in watch.layers] == [
        ("layers.0", None),
        ("layers.1", None),
    ]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_nothing_active(error):
    class Failing(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            if self.weight.item() == 0:
                raise error("failed")
            return x

    model = Net(Attention("fused"), Failing(), MultiHeadAttention(WIDTH, 4))
    watch, probes = Watch(model), []
    watch.arm(lambda _: probes.append(Recorder()) or probes[-1])
    with pytest.raises(error, match="failed"):
        model(tokens())
    if error is RuntimeError:  # an interrupt calls no hook of PyTorch's: disarming cleans up
        assert torch.overrides._get_current_function_mode_stack() == []
        with torch.no_grad():
            model.layers[1].weight.fill_(1.0)
        model(tokens())
        assert sum(len(probe.observations) for probe in probes) == 3
    watch.disarm()
    assert not left_behind(model)


def test_an_exception_caught_inside_a_model():
    class Trying(Net):
        def forward(self, x):
            with contextlib.suppress(RuntimeError):
                self.layers[1](x[..., :3])
            return self.layers[0](x)

    model = Trying(Attention("fused"), Attention("fused"))
    watch, _ = watched(model, tokens())
    assert [layer.name for layer in watch.layers] == ["layers.0"]
    assert not left_behind(model)


def test_looking_that_fails_is_told_and_the_pass_goes_on():
    class Broken(Recorder):
        def observe(self, observation):
            raise ZeroDivisionError("broken probe")

    model = net()
    watch = Watch(model)
    watch.arm(lambda _: Broken())
    model(tokens())
    watch.disarm()
    assert isinstance(watch.error, ZeroDivisionError) and not left_behind(model)
    watch.arm(lambda _: None)
    assert watch.error is None
    watch.disarm()


def test_nothing_is_held_after_a_pass():
    model = net()
    watch, probes = watched(model, tokens())
    held = [weakref.ref(layer.query) for layer in model.layers]
    held += [weakref.ref(layer.key) for layer in model.layers]
    for layer in model.layers:
        del layer.query, layer.key
    gc.collect()
    assert watch.layers and probes[0].max_logit is not None
    assert [kept() for kept in held] == [None] * 4


def test_a_copy_of_an_armed_model_is_not_watched():
    model, probe = net(), Recorder()
    watch = Watch(model)
    watch.arm(lambda _: probe)
    copy.deepcopy(model)(tokens())
    assert not probe.observations
    watch.disarm()


def test_layers_of_ours_stand_beside_others():
    inner = MultiHeadAttention(
        WIDTH, 4, num_kv_heads=2, projection={"name": "linear", "bias": True}
    )
    model = Net(Attention("fused"), inner)
    watch = Watch(model)
    assert [layer.name for layer in watch.layers] == ["layers.1"]
    recorders = {}
    watch.arm(lambda number: recorders.setdefault(number, Recorder()))
    model(tokens())
    assert [layer.name for layer in watch.layers] == ["layers.1", "layers.0"]
    assert [len(recorders[n].observations) for n in (0, 1)] == [1, 1]
    assert torch.equal(recorders[1].observations[0].rating.query, model.layers[0].query)
    watch.disarm()
    assert not left_behind(model)
    own, fused = watch.layers[0], inner.projection.qkv
    assert own.refusal is None and (own.num_heads, own.num_kv_heads) == (4, 2)
    assert torch.equal(own.pieces(3)["k"][0].view(), fused.weight[30:36])
    assert torch.equal(own.pieces(3)["v"][1].view(), fused.bias[42:48])
    assert torch.equal(own.matrices()["q"], inner.materialize()["q"])
    own.scale_head_(2, -1)
    assert inner.score.power.tolist() == [0, 0, -1, 0]


@pytest.mark.parametrize("projection", ["coordinate", "hypernetwork"])
def test_layers_of_ours_say_whose_rows_are_heads(projection):
    model = MultiHeadAttention(WIDTH, 7, head_dim=4, projection=projection)
    (layer,) = Watch(model).layers
    assert layer.grid is model.grid
    if projection == "coordinate":
        assert torch.equal(layer.pieces(6)["v"][0].view(), model.projection.base.weight[80:84])
    else:
        assert "HypernetworkProjection" in layer.refusal
        with pytest.raises(ValueError, match="more than rows"):
            layer.pieces(0)


# ---------------------------------------------------------------- compiled models


class Counting:
    """A backend that counts the graphs it compiles and the calls of them."""

    def __init__(self):
        self.compiled = self.called = 0

    def __call__(self, graph, example_inputs):
        self.compiled += 1

        def run(*args):
            self.called += 1
            return graph(*args)

        return run


def compiled_models(backend):
    model = net()
    yield model, torch.compile(model, backend=backend)
    model = net()
    wrapper = torch.compile(model, backend=backend)
    yield wrapper, wrapper
    model = net()
    model.compile(backend=backend)
    yield model, model
    model = net()
    model.layers[0] = torch.compile(model.layers[0], backend=backend)
    yield model, model
    model = net()
    model.layers[1].compile(backend=backend)
    yield model, model


# the compiler itself looks at gradients of what is no leaf
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("number", range(5))
def test_compiled_models_are_compiled_on_other_steps(number):
    torch.compiler.reset()
    backend = Counting()
    watched_model, model = list(compiled_models(backend))[number]

    def step():
        model(tokens()).sum().backward()

    watch = Watch(watched_model)
    step()
    step()
    compiled, called = backend.compiled, backend.called
    assert compiled and called == 2 * compiled
    for _ in range(2):
        probes = {}
        watch.arm(lambda number, probes=probes: probes.setdefault(number, Recorder()))
        step()
        assert (backend.compiled, backend.called) == (compiled, called)
        assert [len(probe.observations) for probe in probes.values()] == [1, 1]
        watch.disarm()
        step()
        called += compiled
        assert (backend.compiled, backend.called) == (compiled, called)
    assert not left_behind(watched_model)
    assert all(layer.refusal is None for layer in watch.layers)
    torch.compiler.reset()


# ---------------------------------------------------------------- models of other libraries


def huggingface(kind, attention="sdpa"):
    transformers = pytest.importorskip("transformers")
    sizes = {"num_hidden_layers": 2, "hidden_size": 24, "num_attention_heads": 4, "vocab_size": 31}
    if kind == "gpt2":
        config = transformers.GPT2Config(
            n_layer=2, n_embd=24, n_head=4, vocab_size=31, n_positions=32
        )
        build = transformers.GPT2LMHeadModel
    elif kind == "gptj":
        config = transformers.GPTJConfig(
            n_layer=1, n_embd=24, n_head=4, vocab_size=31, n_positions=32, rotary_dim=4,
            bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        build = transformers.GPTJModel
    elif kind == "llama":
        config = transformers.LlamaConfig(
            **sizes, num_key_value_heads=2, intermediate_size=32, max_position_embeddings=32
        )
        build = transformers.LlamaForCausalLM
    else:
        config = transformers.BertConfig(**sizes, intermediate_size=32, max_position_embeddings=32)
        build = transformers.BertModel
    config._attn_implementation = attention
    model = build(config).train()
    for parameter in model.parameters():  # the library's own start is all but uniform attention
        parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def ids() -> torch.Tensor:
    return torch.randint(0, 31, (2, 12), generator=torch.Generator().manual_seed(2))


def probabilities(kind, model, **inputs):
    """Attention weights of the eager implementation with the same weights."""
    eager = huggingface(kind, "eager")
    eager.load_state_dict(model.state_dict())
    return eager.eval()(ids(), output_attentions=True, **inputs).attentions


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
def test_models_of_huggingface(kind, padded):
    model = huggingface(kind)
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        if getattr(part, "attn_dropout", None) is None and hasattr(part, "attention_dropout"):
            part.attention_dropout = 0.0
    inputs = {}
    if padded:
        inputs["attention_mask"] = torch.ones(2, 12, dtype=torch.long)
        inputs["attention_mask"][0, -3:] = 0
    watch, probes = watched(model, ids(), **inputs)
    place = {
        "gpt2": "transformer.h.{}.attn",
        "llama": "model.layers.{}.self_attn",
        "bert": "encoder.layer.{}.attention.self",
    }
    assert [layer.name for layer in watch.layers] == [place[kind].format(n) for n in range(2)]
    assert [layer.refusal for layer in watch.layers] == [None, None]
    assert [layer.num_kv_heads for layer in watch.layers] == [2 if kind == "llama" else 4] * 2
    seen = torch.ones(12, 12, dtype=torch.bool) if kind == "bert" else causal(12)
    if padded:
        seen = seen & (torch.arange(12) < 9)
    count, weights = seen.sum(-1), probabilities(kind, model, **inputs)
    for number, p in enumerate(weights):
        p = p[0].detach().double()
        entropy = -(p * p.clamp(min=1e-300).log()).sum(-1)[:, count > 1] / count[count > 1].log()
        torch.testing.assert_close(
            probes[number].entropy.double(), entropy.mean(1), rtol=1e-3, atol=1e-5
        )
    check_scaling(watch, model, ids())
    assert not left_behind(model)


def test_largest_logit_of_gpt2_is_that_of_its_own_queries():
    model, caught = huggingface("gpt2"), []
    model.transformer.h[0].attn.c_attn.register_forward_hook(lambda m, i, out: caught.append(out))
    _, probes = watched(model, ids())
    q, k, _ = (part.unflatten(-1, (4, 6)).transpose(1, 2) for part in caught[0].chunk(3, -1))
    check_signals(probes[0], q, k, mask=causal(12))


def test_eager_attention_of_huggingface_is_explained():
    watch, _ = watched(huggingface("bert", "eager"), ids())
    assert watch.layers == []
    assert "set_attn_implementation('sdpa')" in watch.nothing()
    watch.model.set_attn_implementation("sdpa")
    watch, _ = watched(watch.model, ids())
    assert len(watch.layers) == 2 and watch.nothing() is None
    watch, _ = watched(huggingface("gptj", "eager"), ids())
    assert "GPTJModel attends by attn_implementation 'eager'" in watch.nothing()
    assert "set_attn" not in watch.nothing()
    watch, _ = watched(nn.Linear(WIDTH, 3), tokens())
    assert "no attention was seen in a forward pass of Linear" in watch.nothing()
    assert "set_attn" not in watch.nothing()


def test_gradient_checkpointing_of_huggingface():
    model = huggingface("llama")
    model.activation_checkpointing_enable()
    watch, probes = Watch(model), {}
    watch.arm(lambda number: probes.setdefault(number, Recorder()))
    model(ids(), labels=ids()).loss.backward()
    watch.disarm()
    assert [len(probe.observations) for probe in probes.values()] == [1, 1]
    assert [layer.refusal for layer in watch.layers] == [None, None]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("start", [False, True])
def test_adapters_are_watched_and_not_touched(start):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=start)
    model = peft.get_peft_model(huggingface("llama"), config)
    watch, probes = watched(model, ids())
    assert all("LoraLayer" in layer.refusal or "lora" in layer.refusal for layer in watch.layers)
    assert probes[1].max_logit.isfinite().all()


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


@pytest.fixture
def timm(monkeypatch):
    if importlib.util.find_spec("timm") is None:
        pytest.skip("needs the extra timm")
    if importlib.util.find_spec("torchvision") is not None or "timm" in sys.modules:
        return importlib.import_module("timm")
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, Nowhere()])
    try:
        return importlib.import_module("timm")
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]


@pytest.mark.parametrize("normed", [False, True])
def test_a_vision_transformer_of_timm(timm, normed):
    model = timm.models.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=4, num_classes=3, qk_norm=normed
    )
    images = torch.randn(2, 3, 16, 16)
    watch, probes = watched(model, images)
    assert [layer.name for layer in watch.layers] == ["blocks.0.attn", "blocks.1.attn"]
    assert probes[0].tokens == 2 * 17
    if normed:
        assert all("one norm for all tokens" in layer.refusal for layer in watch.layers)
    else:
        assert [layer.refusal for layer in watch.layers] == [None, None]
        check_scaling(watch, model, images)
