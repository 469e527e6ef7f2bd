"""The first README's lines as its reader would type them, held to its own formulas."""

from __future__ import annotations

import inspect
import itertools
import json

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import sixfold
from sixfold import (
    HexagonalMultiHeadAttention,
    HexCoordinate,
    HexGrid,
    LanguageModel,
    LeadMetaArchitect,
    VisionTransformer,
)
from sixfold.compat.hamha import core, topology, visualization
from sixfold.compat.hamha.config import HAMHAConfig, LMAConfig, SystemConfig
from sixfold.compat.hamha.training_integration import (
    LanguageModelWithHAMHA,
    PhysicsSimulator,
    VisionTransformerWithHAMHA,
)
from sixfold.compat.lma import architect
from sixfold.errors import ConfigError
from sixfold.recipe import configure

CLOSE = {"rtol": 0, "atol": 1e-12}
PNG = b"\x89PNG\r\n\x1a\n"


def test_old_modules_hold_the_public_classes():
    assert core.HexagonalMultiHeadAttention is sixfold.HexagonalMultiHeadAttention
    assert architect.LeadMetaArchitect is sixfold.LeadMetaArchitect
    assert topology.HexCoordinate is sixfold.HexCoordinate
    assert visualization.TelemetryVisualizer is sixfold.TelemetryVisualizer
    assert visualization.plot_hexagonal_grid is sixfold.plot_hexagonal_grid


# ---------------------------------------------------------------- basic usage


def test_basic_usage():
    hamha = HexagonalMultiHeadAttention(d_model=512, grid_radius=2)
    lma = LeadMetaArchitect(hamha)
    x = torch.randn(4, 128, 512)  # [batch, seq_len, d_model]
    output = hamha(x)
    result = lma.process_step()
    report = lma.generate_report()
    assert isinstance(hamha, nn.Module)
    assert output.shape == x.shape
    assert torch.isfinite(output).all()
    assert lma.model is hamha
    assert list(lma.telemetry.history) == [result.snapshot]
    assert result._asdict()["step"] == 1
    assert "step 1" in report
    assert "19 on a hexagonal grid of radius 2" in report
    least = min(result.snapshot.signals["entropy"][0])
    assert f"{least:.4g}" in report


def test_the_signature_is_that_of_the_api_reference():
    parameters = list(inspect.signature(HexagonalMultiHeadAttention).parameters.values())[:5]
    assert [(p.name, p.default) for p in parameters[1:]] == [
        ("grid_radius", 2), ("d_head", 64), ("use_hypernet", False), ("use_spectral", False),
    ]  # fmt: skip
    assert parameters[0].name == "d_model"
    assert HexagonalMultiHeadAttention(24).heads == (24, 19, 64, 19)
    assert HexagonalMultiHeadAttention(24, 1, 4, True).heads == (24, 7, 4, 7)


def near(a, b):
    """Whether two cells are neighbours: their cube coordinates differ by 1, -1 and 0."""
    dq, dr = a.q - b.q, a.r - b.r
    return sorted([dq, dr, -dq - dr]) == [-1, 0, 1]


def moved_away(layer):
    """The layer with every parameter away from its starting value."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return layer


def weights_by_the_readme(layer):
    """W_base + B * f(q, r) for Q, K and V, by head: each (d_head, d_model)."""
    projection, heads = layer.projection, layer.heads
    d, count = heads.head_dim, heads.num_heads
    first, _, second = projection.network
    made = []
    for role, head in itertools.product(range(3), range(count)):
        cell = layer.grid.coordinates[head]
        place = torch.tensor([cell.q, cell.r], dtype=torch.float64) / layer.grid.radius
        hidden = nn.functional.gelu(first.weight @ place + first.bias)
        f = (second.weight @ hidden + second.bias)[role * d : (role + 1) * d]
        row = (role * count + head) * d
        made.append(projection.base.weight[row : row + d] + projection.pattern[role] * f[:, None])
    return made[:count], made[count : 2 * count], made[2 * count :]


def mixed_by_the_readme(layer, heads):
    """H_i + gate_i * relu(lambda_i W_self H_i + sum over neighbours of g_ij W_neighbour H_j)."""
    mixer, cells, mixed, edge = layer.mixer, layer.grid.coordinates, [], 0
    for i, cell in enumerate(cells):
        total = mixer.self_gain[i] * (heads[i] @ mixer.weight_self)
        for j, other in enumerate(cells):
            if near(cell, other):
                total = total + mixer.edge_gain[edge] * (heads[j] @ mixer.weight_neighbour)
                edge += 1
        mixed.append(heads[i] + mixer.gate[i] * total.clamp(min=0))
    return mixed


def test_weights_are_base_plus_bias_times_f_of_the_coordinate():
    layer = moved_away(
        HexagonalMultiHeadAttention(24, grid_radius=2, d_head=4, dtype=torch.float64)
    )
    for expected, found in zip(
        weights_by_the_readme(layer), layer.materialize().values(), strict=True
    ):
        torch.testing.assert_close(found, torch.stack(expected), **CLOSE)


def test_mixing_is_the_formula_beside_the_head_itself():
    layer = moved_away(
        HexagonalMultiHeadAttention(24, grid_radius=2, d_head=4, dtype=torch.float64)
    )
    heads = torch.randn(2, 5, 19, 4, dtype=torch.float64)
    expected = mixed_by_the_readme(layer, [heads[:, :, i] for i in range(19)])
    torch.testing.assert_close(
        layer.mixer.mix_outputs(heads, "auto"), torch.stack(expected, 2), **CLOSE
    )
    torch.nn.init.zeros_(layer.mixer.gate)
    assert torch.equal(layer.mixer.mix_outputs(heads, "auto"), heads)


def test_a_fresh_mixer_starts_at_the_published_gains():
    mixer = HexagonalMultiHeadAttention(24, grid_radius=1, d_head=4).mixer
    assert mixer.gate.tolist() == [1.0] * 7
    assert mixer.self_gain.tolist() == pytest.approx([0.7] * 7)
    assert mixer.edge_gain.tolist() == pytest.approx([0.05] * 24)


@pytest.mark.parametrize("radius", [1, 2])
def test_the_whole_layer_is_the_readmes_formulas(radius):
    layer = moved_away(HexagonalMultiHeadAttention(24, radius, 4, dtype=torch.float64))
    x, heads = torch.randn(2, 5, 24, dtype=torch.float64), []
    for w_q, w_k, w_v in zip(*weights_by_the_readme(layer), strict=True):
        attention = (x @ w_q.T @ (x @ w_k.T).mT / 4**0.5).softmax(-1)
        heads.append(attention @ (x @ w_v.T))
    expected = torch.cat(mixed_by_the_readme(layer, heads), dim=-1) @ layer.output.weight.T
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-11)


def test_the_hypernetwork_reads_the_coordinate_and_the_sequence():
    layer = HexagonalMultiHeadAttention(24, 1, 4, use_hypernet=True, dtype=torch.float64)
    layer = moved_away(layer)
    weights = layer.materialize()
    assert (weights["q"] - weights["k"]).abs().max() > 1e-2
    assert (weights["k"] - weights["v"]).abs().max() > 1e-2
    writer = layer.projection.q
    empty, other = torch.zeros(24, dtype=torch.float64), torch.ones(24, dtype=torch.float64)
    before = writer.coefficients(empty)
    assert (writer.coefficients(other) - before).abs().max() > 1e-3
    for axis in (0, 1):
        kept = writer.place.clone()
        writer.place[:, axis] += 1
        assert (writer.coefficients(empty) - before).abs().max() > 1e-3
        writer.place.copy_(kept)
    lma = LeadMetaArchitect(layer)
    layer(torch.randn(2, 5, 24, dtype=torch.float64))
    assert len(lma.process_step().snapshot.signals["condition_q"][0]) == 7


def test_the_spectral_mode_serves_any_number_of_tokens_and_is_governed():
    layer = HexagonalMultiHeadAttention(d_model=24, grid_radius=1, d_head=4, use_spectral=True)
    lma = LeadMetaArchitect(layer)
    for n in (5, 8):
        assert layer(torch.randn(2, n, 24)).shape == (2, n, 24)
    assert len(lma.process_step().snapshot.signals["condition_q"][0]) == 7


# ---------------------------------------------------------------- topology


@pytest.mark.parametrize("radius", [0, 1, 2, 3])
def test_the_grid_as_lists_and_matrices(radius):
    cells = topology.generate_hex_grid(radius)
    assert cells == list(HexGrid(radius).coordinates)
    assert torch.equal(topology.build_adjacency_matrix(cells), HexGrid(radius).adjacency())
    expected = [[float(near(a, b)) for b in cells] for a in cells]
    assert topology.build_adjacency_matrix(cells).tolist() == expected


def test_the_drawing_of_the_readme_is_on_the_grid():
    centre = HexCoordinate(q=0, r=0)
    drawn = [HexCoordinate(q, r) for q, r in ((0, 1), (-1, 1), (1, 0), (0, -1))]
    assert [repr(cell) for cell in (centre, *drawn)] == [
        "H(0,0)",
        "H(0,1)",
        "H(-1,1)",
        "H(1,0)",
        "H(0,-1)",
    ]
    grid = HexGrid(1)
    row = grid.adjacency()[grid.index[centre]]
    assert all(row[grid.index[cell]] == 1 for cell in drawn)
    assert row.sum() == 6


# ---------------------------------------------------------------- visualization


@pytest.fixture
def trained():
    """A layer trained for a few steps under the governor."""
    hamha = HexagonalMultiHeadAttention(d_model=28, grid_radius=1, d_head=4)
    optimizer = torch.optim.AdamW(hamha.parameters())
    lma = LeadMetaArchitect(hamha, optimizer, every=1)
    for _ in range(6):
        optimizer.zero_grad()
        loss = (hamha(torch.randn(2, 6, 28)) - 1).square().mean()
        loss.backward()
        optimizer.step()
        lma.process_step(loss)
    return lma


def test_visualization(trained):
    history = trained.telemetry.history
    viz = visualization.TelemetryVisualizer(history)

    def curve(figure, panel=0):
        line = next(line for line in figure.axes[panel].lines if line.get_label() == "layer 0")
        return dict(zip(line.get_xdata(), line.get_ydata(), strict=True))

    entropies = history[-1].signals["entropy"][0]
    assert curve(viz.plot_entropy_evolution())[6] == pytest.approx(sum(entropies) / 7)
    assert curve(viz.plot_condition_numbers(), 2)[1] == max(history[0].signals["condition_v"][0])
    assert curve(viz.plot_gradient_flow())[6] == max(history[-1].signals["gradient_norm"][0])
    labels = {line.get_label() for line in viz.plot_computational_profile().axes[0].lines}
    assert labels == {"projection", "attention", "mixing", "gradient", "step"}


def test_the_grid_is_drawn_and_saved(trained, tmp_path):
    fig = visualization.plot_hexagonal_grid(trained.model, "HAMHA Architecture")
    path = tmp_path / "original_architecture.png"
    fig.savefig(path)
    assert path.read_bytes().startswith(PNG)
    (axes,) = fig.axes
    assert axes.get_title(loc="left") == "HAMHA Architecture"
    assert [text.get_text() for text in axes.texts] == [repr(c) for c in HexGrid(1).coordinates]


# ---------------------------------------------------------------- configuration

CONFIG = SystemConfig(
    hamha=HAMHAConfig(d_model=512, d_head=64, grid_radius=2, use_hypernet=False),
    lma=LMAConfig(
        kappa_threshold=100.0,
        fixation_threshold=0.3,
        drift_threshold=0.9,
        entropy_reg_increment=0.01,
        prediction_horizon=20,
    ),
)


def test_the_configuration_is_saved_and_loaded(tmp_path):
    path = tmp_path / "config.json"
    with path.open("w") as f:
        json.dump(CONFIG.to_dict(), f, indent=2)
    with path.open() as f:
        assert SystemConfig.from_dict(json.load(f)) == CONFIG == SystemConfig()
    written = json.loads(path.read_text())
    assert written["hamha"] == {
        "d_model": 512,
        "d_head": 64,
        "grid_radius": 2,
        "use_hypernet": False,
    }
    assert written["lma"]["prediction_horizon"] == 20


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hamha": {"d_modl": 3}}, "unknown key of hamha 'd_modl'.*Did you mean 'd_model'"),
        ({"lma": {"kapa_threshold": 3}}, "'kapa_threshold'.*Did you mean 'kappa_threshold'"),
        ({"hamma": {}}, "unknown key 'hamma'.*Did you mean 'hamha'"),
        ({"hamha": {"d_model": "wide"}}, "hamha.d_model must be an integer, got 'wide'"),
        ({"hamha": {"grid_radius": -2}}, "grid_radius must be a whole number of 0 or more, got -2"),
        ({"lma": {"prediction_horizon": 30}}, "lma.prediction_horizon must be 20, got 30"),
    ],
)
def test_a_configuration_that_cannot_be_meant_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        SystemConfig.from_dict(values)


def test_another_horizon_is_refused_where_it_is_written():
    with pytest.raises(
        ValueError, match=r"lma\.prediction_horizon must be 20, got 10: forecasts are not"
    ):
        LMAConfig(prediction_horizon=10)


@pytest.mark.parametrize("use_hypernet", [False, True])
def test_every_field_arrives_in_the_run(use_hypernet):
    theirs = SystemConfig(
        HAMHAConfig(d_model=56, d_head=6, grid_radius=1, use_hypernet=use_hypernet),
        LMAConfig(
            kappa_threshold=77.0,
            fixation_threshold=0.2,
            drift_threshold=0.8,
            entropy_reg_increment=0.03,
        ),
    )
    run = configure(file=theirs.to_run())
    limits = run.governor.resolve()
    assert limits.alarms.condition == 77.0
    assert (limits.alarms.entropy_fixation, limits.alarms.entropy_drift) == (0.2, 0.8)
    assert limits.actions.entropy_coefficient == 0.03
    assert (limits.alarms.gradient, limits.alarms.mixing_us) == ((1e-6, 1e3), 50.0)
    model = LanguageModel(11, 8, run.model["d_model"], 1, run.attention)
    attention = model.blocks[0].attention
    assert attention.heads == (56, 7, 6, 7)
    kind = "HypernetworkProjection" if use_hypernet else "CoordinateProjection"
    assert type(attention.projection).__name__ == kind
    assert attention.grid == HexGrid(1)


# ---------------------------------------------------------------- use cases


def is_hexagonal(attention, radius):
    """Whether a model's layer computes what the named class computes, from the same weights."""
    d_model, _, d_head, _ = attention.heads
    named = HexagonalMultiHeadAttention(
        d_model, grid_radius=radius, d_head=d_head, rope_theta=attention.rope_theta
    )
    named.load_state_dict(attention.state_dict())
    x = torch.randn(2, 5, d_model)
    return torch.equal(named(x), attention(x))


def has_gradients(model):
    return all(
        p.grad is not None and p.grad.isfinite().all() and p.grad.norm() > 0
        for p in model.parameters()
    )


def test_language_modelling():
    model = LanguageModelWithHAMHA(vocab_size=50000, d_model=512, grid_radius=2)
    tokens = torch.randint(50000, (2, 17))
    logits = model(tokens[:, :-1])
    loss = cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    # logits are 512 products of unit features with weights of 0.02: a variance of 0.2, half of which
    # the loss adds to log 50000; the mean over 32 targets errs by 0.08, of which five are allowed
    expected = torch.tensor(50000.0).log().item() + 0.5 * 512 * 0.02**2
    assert loss.item() == pytest.approx(expected, abs=0.4)
    loss.backward()
    assert has_gradients(model)
    assert model.embedding.weight.shape == (50000, 512)
    assert model.blocks[-1].attention.heads == (512, 19, 64, 19)
    assert is_hexagonal(model.blocks[-1].attention, 2)
    changed = tokens[:, :-1].clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % 50000
    with torch.no_grad():
        assert torch.equal(model(changed)[:, :9], logits[:, :9])


def test_vision_transformers():
    model = VisionTransformerWithHAMHA(img_size=16, patch_size=4, d_model=32, grid_radius=1)
    images, labels = torch.randn(3, 3, 16, 16), torch.tensor([0, 4, 9])
    logits = model(images)
    assert logits.shape == (3, 10)
    cross_entropy(logits, labels).backward()
    assert has_gradients(model)
    assert model.blocks[0].attention.heads == (32, 7, 64, 7)
    assert is_hexagonal(model.blocks[0].attention, 1)
    assert model.patches.kernel_size == (4, 4)
    patch = (
        images[:, :, :4, 4:8].flatten(1) @ model.patches.weight.flatten(1).T + model.patches.bias
    )
    torch.testing.assert_close(model.patches(images)[:, :, 0, 1], patch)


def test_scientific_computing():
    model = PhysicsSimulator(state_dim=2, grid_radius=1)
    field = torch.randn(3, 2, 16, 16)
    change = model(field) - field
    assert 0 < change.std() < 0.5
    (model(field) - field.roll(1, -1)).square().mean().backward()
    assert has_gradients(model)
    assert is_hexagonal(model.blocks[0].attention, 1)
    shifted = model(field.roll((2, -4), (2, 3)))
    torch.testing.assert_close(shifted, model(field).roll((2, -4), (2, 3)), rtol=0, atol=1e-5)


def test_it_takes_the_place_of_standard_attention():
    model = VisionTransformer(
        8, 2, 10, d_model=28, num_layers=2, attention={"num_heads": 7}
    ).double()
    images = torch.randn(2, 1, 8, 8).double()
    expected = model(images)
    for block in model.blocks:
        standard = block.attention
        hexagonal = HexagonalMultiHeadAttention(28, grid_radius=1, d_head=4, dtype=torch.float64)
        with torch.no_grad():
            hexagonal.projection.base.weight.copy_(standard.projection.qkv.weight)
            hexagonal.output.weight.copy_(standard.output.weight)
            hexagonal.projection.pattern.zero_()
            hexagonal.mixer.gate.zero_()
        block.attention = hexagonal
    torch.testing.assert_close(model(images), expected, **CLOSE)
    for block in model.blocks:
        nn.init.ones_(block.attention.mixer.gate)
    assert (model(images) - expected).abs().max() > 1e-3
