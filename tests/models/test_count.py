import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sixfold import LanguageModel, models

N, D = 12, 16

# the counter does not see the CPU's fused attention, so these run the reference
PLAIN = {"num_heads": 4, "impl": "reference"}
SEVEN = {"num_heads": 7, "head_dim": 6, "impl": "reference"}


def counted(model, inputs):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(inputs)
    return counter.get_total_flops()


def language(attention, **options):
    return LanguageModel(40, N, D, 2, attention, **options)


def tokens():
    return torch.zeros(1, N, dtype=torch.long)


@pytest.mark.parametrize(
    "attention",
    [PLAIN, {**PLAIN, "num_kv_heads": 2}, {**PLAIN, "score": "cosine"}, {**PLAIN, "head_dim": 8}],
)
def test_plain_layers_are_counted_to_the_last_flop(attention):
    model = language(attention, mlp_ratio=3.0)
    assert models.flops(model, N) == counted(model, tokens())


@pytest.mark.parametrize(
    ("kind", "sizes", "shape", "n"),
    [
        ("classifier", {"vocab_size": 40, "num_classes": 3, "context": N}, (1, N), N),
        (
            "vision",
            {"image_size": 12, "patch_size": 3, "num_classes": 5, "channels": 2},
            (1, 2, 12, 12),
            16,
        ),
        ("simulator", {"channels": 2, "grid_size": 8, "patch": 2}, (1, 2, 8, 8), 16),
    ],
)
def test_every_kind_is_counted_to_the_last_flop(kind, sizes, shape, n):
    model = models.build(kind, {**sizes, "d_model": D, "attention": PLAIN})
    inputs = torch.ones(shape)
    inputs = inputs.long() if kind == "classifier" else inputs
    assert models.flops(model, n) == counted(model, inputs)


@pytest.mark.parametrize("mixer", ["ring", "random", "dense", "hexagonal"])
def test_mixing_is_a_product_over_heads_and_two_over_their_width(mixer):
    heads, graph, weight = torch.ones(7, N, 6), torch.ones(7, 7), torch.ones(6, 6)
    with FlopCounterMode(display=False) as counter:
        near = (graph @ heads.flatten(1)).view_as(heads)
        near @ weight + heads @ weight
    layers = 2
    extra = models.flops(language({**SEVEN, "mixer": mixer}), N) - models.flops(language(SEVEN), N)
    assert extra == layers * counter.get_total_flops()


def test_spectral_mixing_is_a_product_over_heads_and_one_over_their_width():
    heads, operators, weight = torch.ones(7, N, 6), torch.ones(2, 7, 7), torch.ones(6, 6)
    with FlopCounterMode(display=False) as counter:
        operators @ (heads @ weight).unflatten(-1, (2, 3)).permute(2, 0, 1, 3).flatten(2)
    plain, near, alone, both = (
        models.flops(language({**SEVEN, "mixer": mixer}), N)
        for mixer in ("none", "hexagonal", "spectral", {"name": "spectral", "spatial": True})
    )
    assert alone - plain == 2 * counter.get_total_flops()
    assert both - alone == near - plain


def test_coordinates_leave_out_their_network():
    model = language({**SEVEN, "projection": "coordinate"})
    # 2 -> 64 -> 3 head_dim in two layers, at 7 places: once, or for queries, keys and values each
    left_out = 2 * 2 * 7 * 64 * (2 + 3 * 6)
    assert counted(model, tokens()) - models.flops(model, N) in (left_out, 3 * left_out)


def test_the_hypernetwork_leaves_out_its_basis():
    model = language({**SEVEN, "projection": "hypernetwork"})
    # 2 -> 64 -> 4 matrices a head, for 7 places of queries, keys and values each, in two layers
    left_out = 2 * 2 * 3 * 7 * 64 * (2 + 4 * 7)
    assert counted(model, tokens()) == models.flops(model, N) + left_out


def test_the_square_of_the_length_is_attention():
    model = language(PLAIN)
    second_difference = models.flops(model, 2) - 2 * models.flops(model, 1)
    assert second_difference == 2 * 4 * 2 * D


def test_shared_weights_count_once():
    layer = torch.nn.Linear(3, 4, bias=False)
    assert models.parameters(torch.nn.Sequential(layer, layer)) == 12
