"""Projections against their formulas, one head and one token at a time."""

import pytest
import torch

from sixfold.attention.projection.hypernetwork import BASIS
from sixfold.contracts import Visibility
from sixfold.geometry.hexgrid import HexGrid

CLOSE = {"rtol": 0, "atol": 1e-12}
EVERYTHING = Visibility(None, is_causal=False)


@pytest.mark.parametrize("name", ["linear", "coordinate"])
@pytest.mark.parametrize("kv_heads", [7, 1])
def test_materialized_weights_reproduce_the_projection(make, tokens, name, kv_heads):
    projection = make({"projection": name}, num_kv_heads=kv_heads).projection
    x, context = tokens(2, 5), tokens(2, 6, seed=1)
    weights = projection.materialize()
    assert [tuple(w.shape) for w in weights.values()] == [(7, 4, 24)] + 2 * [(kv_heads, 4, 24)]
    for source in (x, context):
        point = projection(x, source, EVERYTHING, None)
        for found, role, given in zip(point, "qkv", (x, source, source), strict=True):
            expected = torch.einsum("bnm,hdm->bhnd", given, weights[role])
            torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("kv_heads", [7, 1])
def test_coordinate_weights_are_base_plus_pattern_times_f(make, kv_heads):
    layer = make({"projection": "coordinate"}, num_kv_heads=kv_heads)
    projection, grid = layer.projection, HexGrid(1)
    base = dict(
        zip("qkv", projection.base.weight.split([28, 4 * kv_heads, 4 * kv_heads]), strict=True)
    )
    for index, (role, weight) in enumerate(projection.materialize().items()):
        count = len(weight)
        for group in range(count):
            members = grid.coordinates[group * 7 // count : (group + 1) * 7 // count]
            place = torch.tensor(members, dtype=torch.float64).mean(0)
            f = projection.network(place)[4 * index : 4 * index + 4]
            for row in range(4):
                expected = base[role][4 * group + row] + f[row] * projection.pattern[index, row]
                torch.testing.assert_close(weight[group, row], expected, **CLOSE)


@pytest.mark.parametrize("name", ["linear", "coordinate", "hypernetwork"])
@pytest.mark.parametrize("kv_heads", [7, 1])
def test_gradients_have_the_shapes_of_the_weights(make, tokens, name, kv_heads):
    layer = make({"projection": name}, num_kv_heads=kv_heads)
    assert layer.projection.gradients() is None
    layer(tokens(2, 5)).square().sum().backward()
    gradients, weights = layer.projection.gradients(), layer.materialize()
    assert {k: v.shape for k, v in gradients.items()} == {k: v.shape for k, v in weights.items()}
    assert all((g.flatten(1).norm(dim=1) > 0).all() for g in gradients.values())


@pytest.mark.parametrize("name", ["linear", "coordinate"])
def test_gradients_are_those_of_the_materialized_weights(make, tokens, name):
    """The loss moved by a small step of one base matrix, against the gradient of that head."""
    layer = make({"projection": name})
    x = tokens(2, 5)
    layer(x).square().sum().backward()
    base = layer.projection.qkv if name == "linear" else layer.projection.base
    step = torch.zeros_like(base.weight)
    step[28 + 4 * 2 : 28 + 4 * 3] = torch.randn(4, 24, generator=torch.Generator().manual_seed(0))
    losses = []
    with torch.no_grad():
        for sign in (1, -1):
            base.weight += sign * 1e-5 * step
            losses.append(layer(x).square().sum())
            base.weight -= sign * 1e-5 * step
    slope = (losses[0] - losses[1]) / 2e-5
    found = (layer.projection.gradients()["k"][2] * step[36:40]).sum()
    torch.testing.assert_close(found, slope, rtol=1e-6, atol=1e-8)


class Adapted(torch.nn.Module):
    """A linear layer and a learned addition, as an adapter puts in its place."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.added = layer, torch.nn.Parameter(torch.randn_like(layer.weight))

    @property
    def weight(self):
        return self.layer.weight

    def forward(self, x):
        return self.layer(x) + x @ self.added.T


@pytest.mark.parametrize("name", ["linear", "coordinate"])
@pytest.mark.parametrize("kv_heads", [7, 1])
def test_an_adapter_in_place_of_the_weights_is_heard(make, tokens, name, kv_heads):
    layer = make({"projection": name}, num_kv_heads=kv_heads)
    place = "qkv" if name == "linear" else "base"
    plain = getattr(layer.projection, place)
    adapted = Adapted(plain)
    x, context = tokens(2, 5), tokens(2, 6, seed=1)
    setattr(layer.projection, place, adapted)
    for source in (x, context):
        found = layer.projection(x, source, EVERYTHING, None)
        merged = make({"projection": name}, num_kv_heads=kv_heads)
        merged.load_state_dict({k.replace(f"{place}.layer.", f"{place}."): v for k, v in layer.state_dict().items() if "added" not in k})  # fmt: skip
        with torch.no_grad():
            getattr(merged.projection, place).weight += adapted.added
        expected = merged.projection(x, source, EVERYTHING, None)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, **CLOSE)
        gradient = torch.autograd.grad(sum(part.sum() for part in found), adapted.added)[0]
        assert (gradient != 0).all()


def written(writer, tokens, summary):
    """W_h(s) x by the formula, one batch row, token and head at a time."""
    batch, n, _ = tokens.shape
    out = torch.zeros(batch, writer.count, n, writer.head_dim, dtype=tokens.dtype)
    bank = writer.bank.weight.unflatten(0, (writer.count, -1))
    for b in range(batch):
        for t in range(n):
            s = summary[b, t]
            c = torch.cat([torch.ones(1, dtype=s.dtype), writer.reader(s)])
            for h in range(writer.count):
                phi = writer.basis(writer.place[h]).view(BASIS, writer.count)
                a = (c @ phi) / writer.count**0.5
                matrix = bank[h] + torch.einsum("r,rdm->dm", a, bank)
                out[b, h, t] = matrix @ tokens[b, t]
    return out


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kv_heads", [7, 1])
def test_hypernetwork_projections_are_the_formula(make, tokens, is_causal, masked, kv_heads):
    projection = make({"projection": "hypernetwork"}, num_kv_heads=kv_heads).projection
    x = tokens(2, 5)
    real = torch.ones(2, 5, dtype=torch.bool)
    if masked:
        real[1, 1:3] = False
    summary = torch.zeros_like(x)
    for b in range(2):
        for t in range(5):
            kept = real[b] & (torch.arange(5) <= t) if is_causal else real[b]
            summary[b, t] = x[b, kept].mean(0)
    mask = real[:, None, None] if masked else None
    point = projection(x, x, Visibility(mask, is_causal), None)
    for found, writer in zip(point, (projection.q, projection.k, projection.v), strict=True):
        torch.testing.assert_close(found, written(writer, x, summary), **CLOSE)


def test_an_empty_view_materializes_the_constant_part(make, tokens):
    projection = make({"projection": "hypernetwork"}).projection
    x = torch.cat([tokens(1, 3), -tokens(1, 3)], dim=1)
    point, weights = projection(x, x, EVERYTHING, None), projection.materialize()
    for found, role in zip(point, "qkv", strict=True):
        expected = torch.einsum("bnm,hdm->bhnd", x, weights[role])
        torch.testing.assert_close(found, expected, **CLOSE)
