"""The spectral mixer: filters of a grid's spectrum, whatever the basis of its eigenspaces."""

import copy
import io

import pytest
import torch

from sixfold import HexagonalMultiHeadAttention, MultiHeadAttention, SpectralHexagonalAttention
from sixfold.attention.mixer._filters import FILTERS, hats, steps
from sixfold.attention.mixer.spectral import SpectralMixer, build
from sixfold.contracts import Heads
from sixfold.geometry.graph import laplacian
from sixfold.geometry.hexgrid import HexGrid
from sixfold.geometry.spectrum import polynomials
from sixfold.ops.headmix.reference import headmix

CLOSE = {"rtol": 0, "atol": 1e-12}
SIZES = {1: 7, 2: 19, 3: 37, 4: 61}


def mixer_of(make, heads=19, **options):
    """A mixer in float64, its parameters away from their starting values."""
    return make({"mixer": {"name": "spectral"} | options}, num_heads=heads).mixer


def build_fresh(heads, **options):
    """A mixer in float64 as it is built."""
    return build(Heads(24, heads, 4, heads), **options, dtype=torch.float64)


def heads_of(tokens, count=19, width=4):
    return tokens(2, 5, count * width).unflatten(-1, (count, width))


def of_matrix(mixer, group):
    """The grid's Laplacian, and the filter of a group written as a function of it, if it is one."""
    matrix = laplacian(mixer.grid.adjacency().double(), normalized=True)
    eye = torch.eye(len(matrix), dtype=torch.float64)
    a = mixer.filter.coefficients[group]
    if mixer.kind == "chebyshev":
        shifted, terms = matrix - eye, [eye, matrix - eye]
        while len(terms) < len(a):
            terms.append(2 * shifted @ terms[-1] - terms[-2])
        return sum(c * term for c, term in zip(a, terms, strict=False))
    rates = mixer.filter.log_rate[group].exp()
    parts = (c * torch.linalg.inv(eye + s * matrix) for c, s in zip(a[1:], rates, strict=True))
    return a[0] * eye + sum(parts)


def rotated_basis(radius, seed):
    """Eigenvalues and eigenvectors, these turned at random inside each eigenspace."""
    matrix = laplacian(HexGrid(radius).adjacency().double(), normalized=True)
    values, vectors = torch.linalg.eigh(matrix)
    generator = torch.Generator().manual_seed(seed)
    start = 0
    while start < len(values):
        stop = start + 1
        while stop < len(values) and values[stop] - values[start] < 1e-8:
            stop += 1
        size = stop - start
        turn = torch.randn(size, size, generator=generator, dtype=torch.float64)
        vectors[:, start:stop] = vectors[:, start:stop] @ torch.linalg.qr(turn)[0]
        start = stop
    return values, vectors


# ---------------------------------------------------------------- what a filter is


@pytest.mark.parametrize("radius", SIZES)
@pytest.mark.parametrize("kind", FILTERS)
def test_no_basis_of_an_eigenspace_is_seen(make, tokens, kind, radius):
    """Operators are U g(lambda) U^T for every U, and the mixture is what they say."""
    mixer = mixer_of(make, SIZES[radius], filter=kind, modes=SIZES[radius] * 2 // 3)
    heads = heads_of(tokens, SIZES[radius])
    found = mixer.mix_outputs(heads, "auto")
    for seed in range(3):
        values, vectors = rotated_basis(radius, seed)
        gains = mixer.response(values)
        operators = torch.einsum("ie,ge,je->gij", vectors, gains, vectors)
        torch.testing.assert_close(mixer.operators(), operators, **CLOSE)
        channels = (heads @ mixer.weight).unflatten(-1, (len(gains), -1))
        passed = torch.einsum("gij,bnjgc->bnigc", operators, channels).flatten(-2).relu()
        torch.testing.assert_close(found, heads + mixer.gate[:, None] * passed, **CLOSE)


@pytest.mark.parametrize("order", [0, 1, 5, 11])
def test_a_chebyshev_filter_is_the_polynomial_of_the_matrix(make, order):
    mixer = mixer_of(make, filter="chebyshev", order=order)
    for group, operator in enumerate(mixer.operators()):
        torch.testing.assert_close(operator, of_matrix(mixer, group), **CLOSE)


@pytest.mark.parametrize("order", [0, 1, 3, 5])
def test_a_rational_filter_is_a_sum_of_inverses(make, order):
    mixer = mixer_of(make, filter="rational", order=order)
    for group, operator in enumerate(mixer.operators()):
        torch.testing.assert_close(operator, of_matrix(mixer, group), **CLOSE)


@pytest.mark.parametrize("size", [-30.0, 0.0, 30.0])
def test_a_rational_filter_has_no_pole_whatever_it_learned(size):
    mixer = build_fresh(19, filter="rational")
    with torch.no_grad():
        mixer.filter.log_rate.fill_(size)
        found = mixer.response(torch.linspace(0, 2, 2001, dtype=torch.float64))
    assert torch.isfinite(found).all()
    assert found.abs().max() <= mixer.filter.coefficients.abs().sum(1).max() + 1e-12


def test_a_rational_filter_in_half_precision_is_a_number_at_every_rate():
    mixer = build_fresh(19, filter="rational").half()
    with torch.no_grad():
        mixer.filter.log_rate.fill_(30.0)
        assert torch.isfinite(mixer.response([0.0, 1.0, 2.0])).all()


@pytest.mark.parametrize("order", [1, 2, 3, 12])
def test_bands_are_projectors_that_sum_to_the_identity(make, order):
    mixer = mixer_of(make, filter="bands", order=order)
    atoms, eye = mixer.filter.atoms, torch.eye(19, dtype=torch.float64)
    assert len(atoms) == order
    torch.testing.assert_close(atoms.sum(0), eye, **CLOSE)
    torch.testing.assert_close(atoms @ atoms, atoms, **CLOSE)
    # slow patterns are in the first: the constant one, in the eyes of the normalised Laplacian
    constant = mixer.grid.adjacency().double().sum(0).sqrt()
    torch.testing.assert_close(atoms[0] @ constant, constant, **CLOSE)


def test_bases_cover_the_whole_interval():
    lambdas = torch.linspace(0, 2, 41, dtype=torch.float64)
    for values in (steps(lambdas, (0.4, 1.1)), hats(lambdas, (0.0, 0.4, 1.5))):
        assert (values >= 0).all()
        torch.testing.assert_close(values.sum(0), torch.ones_like(lambdas), **CLOSE)
    angles = (lambdas - 1).acos()
    expected = torch.stack([(k * angles).cos() for k in range(7)])
    torch.testing.assert_close(polynomials(lambdas, 6), expected, **CLOSE)
    knots = torch.tensor([0.0, 0.4, 1.5], dtype=torch.float64)
    torch.testing.assert_close(hats(knots, (0.0, 0.4, 1.5)), torch.eye(3).double(), **CLOSE)


@pytest.mark.parametrize("kind", FILTERS)
def test_fresh_filters_let_heads_talk_and_pass_most_of_what_is_slow(kind):
    mixer = build_fresh(19, filter=kind)
    gains = mixer.response(mixer.eigenvalues)
    assert gains.shape == (4, 12)
    assert (gains.diff(dim=1) <= 1e-12).all()
    assert (gains[:, 0] > 0.5).all() and (gains[:, 0] < 0.8).all()
    operators = mixer.operators()
    assert (operators - torch.diag_embed(operators.diagonal(dim1=1, dim2=2))).abs().max() > 0.01


@pytest.mark.parametrize("kind", FILTERS)
def test_what_is_not_kept_does_not_pass(kind):
    mixer = build_fresh(19, filter=kind, modes=5)
    beyond = [value for value in build_fresh(19).eigenvalues if value > mixer.eigenvalues[-1]]
    assert (mixer.response(beyond) == 0).all()
    assert (mixer.response(mixer.eigenvalues) != 0).all()
    fast = torch.linalg.eigh(laplacian(HexGrid(2).adjacency().double(), normalized=True))[1][:, -1]
    assert (mixer.operators() @ fast).abs().max() < 1e-12


# ---------------------------------------------------------------- what the mixer does


@pytest.mark.parametrize("options", [{}, {"spatial": True}])
@pytest.mark.parametrize("kind", FILTERS)
def test_a_closed_gate_gives_exactly_the_unmixed_heads(make, tokens, kind, options):
    mixer, heads = mixer_of(make, filter=kind, **options), heads_of(tokens)
    assert (mixer.mix_outputs(heads, "auto") - heads).abs().max() > 1e-3
    torch.nn.init.zeros_(mixer.gate)
    for impl in ("auto", "reference"):
        assert torch.equal(mixer.mix_outputs(heads, impl), heads)
    mixer.mix_outputs(heads, "auto").square().sum().backward()
    assert (mixer.gate.grad != 0).all()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_the_spatial_path_is_the_hexagonal_mixture_beside(make, tokens, impl, tied):
    mixer, heads = mixer_of(make, spatial=True, tied=tied), heads_of(tokens)
    alone, near = copy.deepcopy(mixer), mixer.spatial
    alone.spatial = None
    beside = headmix(heads, near.weight_self, near.weight_neighbour, near.graph())
    gate = (mixer.gate * near.gate)[mixer.nodes]
    expected = alone.mix_outputs(heads, impl) + gate[:, None] * beside
    torch.testing.assert_close(mixer.mix_outputs(heads, impl), expected, **CLOSE)


@pytest.mark.parametrize("spatial", [False, True])
@pytest.mark.parametrize("kind", FILTERS)
def test_tied_mixing_commutes_with_turning_the_grid(make, tokens, kind, spatial):
    heads, grid = heads_of(tokens), HexGrid(2)
    for tied in (True, False):
        mixer = mixer_of(make, filter=kind, spatial=spatial, tied=tied, modes=8)
        worst, out = 0.0, mixer.mix_outputs(heads, "auto")
        for turn in range(1, 6):
            place = grid.rotation(turn)
            turned, expected = torch.empty_like(heads), torch.empty_like(out)
            turned[:, :, place], expected[:, :, place] = heads, out
            worst = max(worst, (mixer.mix_outputs(turned, "auto") - expected).abs().max().item())
        assert (worst < 1e-12) == tied
        assert tied or worst > 1e-3


@pytest.mark.parametrize("radius", SIZES)
@pytest.mark.parametrize("kind", FILTERS)
def test_every_parameter_gets_a_gradient_for_any_number_of_modes(tokens, kind, radius):
    count = SIZES[radius]
    heads = heads_of(tokens, count)
    for modes in {1, 2, count // 2, count}:
        mixer = build_fresh(count, filter=kind, modes=modes, spatial=True)
        out = mixer.mix_outputs(heads, "auto")
        weight = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).view(out.shape)
        (out * weight).sum().backward()
        for name, parameter in mixer.named_parameters():
            assert torch.isfinite(parameter.grad).all(), (modes, name)
            # no number of a filter is dead; weights may have idle rows behind relu
            dead = (parameter.grad == 0).sum()
            assert dead == 0 if "filter" in name or "gate" in name else dead < parameter.numel()


@pytest.mark.parametrize("spatial", [False, True])
@pytest.mark.parametrize("kind", FILTERS)
def test_gradients_are_those_of_finite_differences(make, tokens, kind, spatial):
    mixer = mixer_of(make, 7, filter=kind, order=1, spatial=spatial)
    names, values = zip(*mixer.named_parameters(), strict=True)

    class Call(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mixer = mixer

        def forward(self, heads):
            return self.mixer.mix_outputs(heads, "auto")

    def function(heads, *given):
        named = {f"mixer.{name}": value for name, value in zip(names, given, strict=True)}
        return torch.func.functional_call(Call(), named, (heads,))

    heads = heads_of(tokens, 7)[:1, :2].requires_grad_()
    assert torch.autograd.gradcheck(function, (heads, *values), fast_mode=True)


@pytest.mark.parametrize("kind", FILTERS)
def test_the_frequency_penalty_is_the_roughness_of_filtered_noise(make, kind):
    mixer = mixer_of(make, filter=kind, modes=11)
    matrix = laplacian(mixer.grid.adjacency().double(), normalized=True)
    rough = [torch.trace(g @ matrix @ g) / 19 for g in mixer.operators()]
    found = mixer.frequency_penalty()
    torch.testing.assert_close(found, torch.stack(rough).mean(), **CLOSE)
    assert found.shape == () and found.requires_grad


def test_the_frequency_penalty_slows_what_passes():
    """A few steps down it: the share of the fast band falls most."""
    mixer = build_fresh(19)
    torch.nn.init.ones_(mixer.filter.coefficients)
    for _ in range(30):
        (slope,) = torch.autograd.grad(mixer.frequency_penalty(), mixer.filter.coefficients)
        mixer.filter.coefficients.data -= slope
    low, middle, high = mixer.filter.coefficients[0].tolist()
    assert 1 > low > middle > 0 and low > high > 0
    assert low > 3 * high


# ---------------------------------------------------------------- graphs that change


@pytest.mark.parametrize("kind", FILTERS)
def test_it_follows_other_weights_of_the_edges(make, tokens, kind):
    mixer, heads = mixer_of(make, filter=kind), heads_of(tokens)
    learned = dict(mixer.named_parameters())
    before = mixer.mix_outputs(heads, "auto")
    adjacency = mixer.grid.adjacency()
    changed = adjacency.clone()
    changed[0, 1] = changed[1, 0] = 0.25
    mixer.follow_(changed)
    assert all(parameter is learned[name] for name, parameter in mixer.named_parameters())
    assert len(mixer.eigenvalues) > 12
    after = mixer.mix_outputs(heads, "auto")
    assert (after - before).abs().max() > 1e-4
    values, vectors = torch.linalg.eigh(laplacian(changed.double(), normalized=True))
    operators = torch.einsum("ie,ge,je->gij", vectors, mixer.response(values), vectors)
    torch.testing.assert_close(mixer.operators(), operators, **CLOSE)
    mixer.follow_(adjacency)
    assert torch.equal(mixer.mix_outputs(heads, "auto"), before)


def test_a_graph_it_cannot_follow_changes_nothing(make, tokens):
    mixer, heads = mixer_of(make, 7, order=4), heads_of(tokens, 7)
    before = mixer.mix_outputs(heads, "auto")
    with pytest.raises(ValueError, match=r"adjacency must be \(h, h\) with h 7, got \(6, 6\)"):
        mixer.follow_(torch.ones(6, 6))
    with pytest.raises(ValueError, match=r"order of filter 'bands'.*got 4.*kept, 2"):
        mixer.follow_(torch.ones(7, 7))
    with pytest.raises(ValueError, match=r"^adjacency must be a tensor \(n, n\), got a list$"):
        mixer.follow_(mixer.grid.adjacency().tolist())
    unknown = mixer.grid.adjacency()
    unknown[2, 3] = unknown[3, 2] = float("nan")
    with pytest.raises(ValueError, match=r"^adjacency must hold finite .*, got nan at \(2, 3\)$"):
        mixer.follow_(unknown)
    assert torch.equal(mixer.mix_outputs(heads, "auto"), before)
    assert len(mixer.eigenvalues) == 4 and mixer.followed is None


def weighted(adjacency, seed=0):
    """Other weights on the same edges."""
    weights = torch.rand(adjacency.shape, generator=torch.Generator().manual_seed(seed)) + 0.5
    return adjacency * (weights + weights.T)


def assert_same_filters(one, other):
    assert torch.equal(one.operators(), other.operators())
    assert torch.equal(one.frequency_penalty(), other.frequency_penalty())
    lambdas = torch.linspace(0, 2, 101, dtype=torch.float64)
    assert torch.equal(one.response(lambdas), other.response(lambdas))
    assert torch.equal(one.response(one.eigenvalues), other.response(other.eigenvalues))


def through_a_file(state):
    """What a file keeps of a state, as it is read where nothing but tensors is trusted."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("modes", [None, 8])
@pytest.mark.parametrize("kind", FILTERS)
def test_a_state_tells_the_graph_that_is_followed(make, tokens, kind, modes, dtype):
    part = {"mixer": {"name": "spectral", "filter": kind, "modes": modes}}
    layer, fresh = make(part, num_heads=19), make(part, num_heads=19, seed=1).to(dtype)
    plain = copy.deepcopy(layer).to(dtype).state_dict()
    layer.mixer.follow_(weighted(layer.grid.adjacency()))
    layer, x = layer.to(dtype), tokens(2, 7).to(dtype)
    expected = layer(x)
    fresh.load_state_dict(through_a_file(layer.state_dict()))
    assert_same_filters(fresh.mixer, layer.mixer)
    assert torch.equal(fresh(x), expected)
    assert_same_filters(copy.deepcopy(fresh).mixer, layer.mixer)
    # a state without a graph is of the grid, and one of other parts says nothing of it
    output = {"output.weight": plain["output.weight"]}
    fresh.load_state_dict(output, strict=False)
    assert torch.equal(fresh(x), expected)
    fresh.load_state_dict(plain)
    own = make(part, num_heads=19).to(dtype)
    own.load_state_dict(plain)
    assert_same_filters(fresh.mixer, own.mixer)
    assert fresh.state_dict().keys() == plain.keys()


def test_an_empty_layer_gets_the_graph_from_the_state(make, tokens):
    part = {"mixer": {"name": "spectral", "filter": "smooth"}}
    layer, x = make(part), tokens(2, 7)
    layer.mixer.follow_(weighted(layer.grid.adjacency()))
    for assign in (False, True):
        empty = make_empty(part)
        empty = empty if assign else empty.to_empty(device="cpu")
        empty.load_state_dict(layer.state_dict(), assign=assign)
        assert torch.equal(empty(x), layer(x))
        assert_same_filters(empty.mixer, layer.mixer)


def test_a_fresh_state_holds_what_it_always_held(make):
    """No graph, for it is the grid's: older states load."""
    kept = {"weight", "gate", "nodes", "filter.coefficients", "filter.atoms"}
    assert {*mixer_of(make).state_dict()} == kept
    mixer = mixer_of(make)
    mixer.follow_(weighted(mixer.grid.adjacency()))
    assert {*mixer.state_dict()} == kept | {"followed"}
    assert mixer.followed.view(torch.float64).equal(weighted(mixer.grid.adjacency()).double())
    mixer.follow_(mixer.grid.adjacency())
    assert {*mixer.state_dict()} == kept


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"filter": "chebishev"}, "unknown filter 'chebishev'.*Did you mean 'chebyshev'"),
        ({"order": 5}, r"order of filter 'bands' must be .* in \[1, 4\], got 5.*kept, 4"),
        ({"order": 0}, r"order of filter 'bands' must be .* in \[1, 4\], got 0"),
        ({"order": "3"}, r"order of filter 'bands' must be a whole number in \[1, 4\], got '3'"),
        ({"order": 2.0}, r"order of filter 'bands' must be a whole number in \[1, 4\], got 2.0"),
        ({"order": True}, r"order of filter 'bands' must be a whole number in \[1, 4\], got True"),
        ({"order": 2, "modes": 1}, r"order of filter 'bands' .* got 2.*kept, 1"),
        ({"filter": "smooth", "order": 5}, r"'smooth' must be .* in \[1, 4\], got 5.*kept, 4"),
        ({"filter": "chebyshev", "order": 4}, r"'chebyshev' .* in \[0, 3\], got 4.*kept, 4"),
        ({"filter": "rational", "order": 2}, r"'rational' must be .* in \[0, 1\], got 2.*kept, 4"),
        ({"modes": 0}, "modes must be a whole number of 1 or more, got 0"),
        ({"modes": 2.5}, "modes must be a whole number of 1 or more, got 2.5"),
        ({"modes": "3"}, "modes must be a whole number of 1 or more, got '3'"),
        ({"modes": True}, "modes must be a whole number of 1 or more, got True"),
        ({"modes": 8}, "modes must be at most 7, the heads, got 8"),
        ({"groups": 3}, "groups must divide head_dim 4, got 3"),
        ({"groups": 0}, "groups must be a whole number of 1 or more, got 0"),
        ({"groups": 2.0}, "groups must be a whole number of 1 or more, got 2.0"),
        ({"groups": "2"}, "groups must be a whole number of 1 or more, got '2'"),
        ({"bands": 3}, "unknown option 'bands'"),
    ],
)
def test_what_cannot_be_built_is_refused_by_name(make, options, message):
    with pytest.raises(ValueError, match=f"mixer 'spectral': .*{message}"):
        mixer_of(make, 7, **options)


def test_heads_that_fill_no_grid_are_refused(make):
    with pytest.raises(ValueError, match="mixer 'spectral': no hexagonal grid has 8 heads"):
        mixer_of(make, 8)


# ---------------------------------------------------------------- the layer


@pytest.mark.parametrize("radius", SIZES)
@pytest.mark.parametrize("modes", [1, 2, 7, 32])
def test_any_radius_serves_any_number_of_modes_and_of_tokens(radius, modes):
    torch.manual_seed(0)
    layer = SpectralHexagonalAttention(16, radius, modes, d_head=4)
    assert layer.heads == (16, SIZES[radius], 4, SIZES[radius])
    assert sum(layer.mixer.multiplicities) >= min(modes, SIZES[radius])
    assert layer.grid == HexGrid(radius)
    for n in (1, 5, 40):
        assert layer(torch.randn(2, n, 16), is_causal=n == 5).shape == (2, n, 16)
    x = torch.randn(1, 6, 16, requires_grad=True)
    (slope,) = torch.autograd.grad(layer(x)[0, 5].square().sum(), x)
    assert (slope.abs().amax(-1) > 0).all()
    found = layer.materialize()
    assert {role: matrix.shape for role, matrix in found.items()} == dict.fromkeys(
        "qkv", (SIZES[radius], 4, 16)
    )


def test_the_layer_of_heads_on_a_grid_mixes_in_the_spectrum_if_asked():
    torch.manual_seed(0)
    layer = HexagonalMultiHeadAttention(16, 2, 4, use_spectral=True)
    assert isinstance(layer.mixer, SpectralMixer)
    assert layer(torch.randn(2, 11, 16)).shape == (2, 11, 16)
    large = HexagonalMultiHeadAttention(d_model=512, grid_radius=3, use_spectral=True)
    assert large(torch.randn(1, 5, 512)).shape == (1, 5, 512)
    plain = HexagonalMultiHeadAttention(16, 2, 4)
    assert type(layer.projection) is type(plain.projection)
    written = HexagonalMultiHeadAttention(16, 1, 4, use_hypernet=True, use_spectral=True)
    assert type(written.projection).__name__ == "HypernetworkProjection"
    table = {"name": "spectral", "filter": "rational"}
    assert HexagonalMultiHeadAttention(16, 1, 4, use_spectral=True, mixer=table).mixer.kind == (
        SpectralHexagonalAttention(16, 1, d_head=4, mixer=table).mixer.kind
    )


def test_a_table_says_more_of_the_mixer_and_drops_nothing():
    table = {"name": "spectral", "groups": 2}
    mixer = SpectralHexagonalAttention(16, 1, 3, 4, "smooth", spatial=True, mixer=table).mixer
    assert (mixer.kind, mixer.groups, sum(mixer.multiplicities)) == ("smooth", 2, 3)
    assert mixer.spatial is not None
    named = SpectralHexagonalAttention(16, 1, 3, 4, "smooth", mixer="spectral").mixer
    assert (named.kind, named.groups, named.spatial) == ("smooth", 4, None)


RADIUS, WHOLE = (
    "grid_radius must be a whole number of 0 or more",
    "must be a whole number of 1 or more",
)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        *(
            (
                SpectralHexagonalAttention,
                {"k_eigenvectors": k},
                f"k_eigenvectors {WHOLE}, got {k!r}",
            )
            for k in (None, "3", 0, 2.5, True)
        ),
        *(
            (named, {"grid_radius": radius}, f"{RADIUS}, got {radius!r}")
            for named in (SpectralHexagonalAttention, HexagonalMultiHeadAttention)
            for radius in (1.5, "2", True, None, -1)
        ),
        (
            SpectralHexagonalAttention,
            {"filter": "rational", "mixer": "none"},
            "mixer must be 'spectral' in SpectralHexagonalAttention, got 'none'",
        ),
        (
            SpectralHexagonalAttention,
            {"mixer": {"name": "hexagonal", "tied": True}},
            "mixer must be 'spectral' in SpectralHexagonalAttention, got {'name': 'hexagonal'",
        ),
        (
            SpectralHexagonalAttention,
            {"num_heads": 7},
            "num_heads of SpectralHexagonalAttention is given by grid_radius, got num_heads 7",
        ),
        (
            HexagonalMultiHeadAttention,
            {"use_spectral": True, "mixer": "ring"},
            "mixer must be 'spectral' where use_spectral is True, got 'ring'",
        ),
        (
            HexagonalMultiHeadAttention,
            {"use_hypernet": True, "projection": "linear"},
            "projection must be 'hypernetwork' where use_hypernet is True, got 'linear'",
        ),
        (
            HexagonalMultiHeadAttention,
            {"head_dim": 4},
            "head_dim of HexagonalMultiHeadAttention is given by d_head, got head_dim 4",
        ),
    ],
)
def test_what_a_named_layer_cannot_mean_is_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(8, **options)


FUSED = {"spatial": {"spatial": True}, "tied": {"spatial": True, "tied": True}}


@pytest.mark.parametrize("options", [*({"filter": kind} for kind in FILTERS), *FUSED.values()],
                         ids=[*FILTERS, *FUSED])  # fmt: skip
def test_it_goes_around_and_stays_itself(make, tokens, options):
    part = {"mixer": {"name": "spectral"} | options}
    layer, x = make(part), tokens(2, 7)
    expected = layer(x, is_causal=True)
    fresh = make(part, seed=1)
    assert not torch.equal(fresh(x, is_causal=True), expected)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x, is_causal=True), expected)
    empty = make_empty(part)
    assert {t.device.type for t in (*empty.parameters(), *empty.buffers())} == {"meta"}
    empty.to_empty(device="cpu").load_state_dict(layer.state_dict())
    assert torch.equal(empty(x, is_causal=True), expected)


@pytest.mark.parametrize("options", [{}, {"filter": "rational", "spatial": True}])
def test_it_compiles_as_one_graph(make, tokens, options):
    layer = make({"mixer": {"name": "spectral"} | options})
    torch.compiler.reset()
    compiled = torch.compile(copy.deepcopy(layer), backend="aot_eager", fullgraph=True)
    x = tokens(2, 7).requires_grad_()
    found, expected = (one(x, is_causal=True) for one in (compiled, layer))
    torch.testing.assert_close(found, expected, **CLOSE)
    one, two = (torch.autograd.grad(out.square().sum(), x)[0] for out in (found, expected))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-11)


def test_it_exports(make, tokens):
    layer, x = make({"mixer": {"name": "spectral", "filter": "rational"}}).eval(), tokens(2, 7)
    exported = torch.export.export(layer, (x,), {"is_causal": True}).module()
    torch.testing.assert_close(exported(x, is_causal=True), layer(x, is_causal=True), **CLOSE)


def make_empty(part):
    with torch.device("meta"):
        return MultiHeadAttention(24, 7, 4, **part, dtype=torch.float64)


@pytest.mark.parametrize("kind", FILTERS)
def test_bfloat16_keeps_the_filters_bands_and_gains(make, tokens, kind):
    """Membership of a band is no matter of rounding: it was settled in float64."""
    part = {"mixer": {"name": "spectral", "filter": kind, "spatial": True}}
    layer = make(part, num_heads=61)
    exact, low = layer.mixer, copy.deepcopy(layer.mixer).to(torch.bfloat16)
    gains = exact.response(exact.eigenvalues)
    close = (low.response(low.eigenvalues).double() - gains).abs().max()
    assert close < 0.03 * gains.abs().max()
    heads = heads_of(tokens, 61)
    out = low.mix_outputs(heads.bfloat16(), "auto")
    assert out.dtype == torch.bfloat16
    truth = exact.mix_outputs(heads, "auto")
    assert (out.double() - truth).norm() < 0.02 * truth.norm()


def test_groups_of_channels_are_filtered_apart(tokens):
    mixer, heads = build_fresh(7, filter="rational", groups=2), heads_of(tokens, 7)
    before = mixer.mix_outputs(heads, "auto")
    with torch.no_grad():
        mixer.filter.log_rate[1] += 1
    moved = (mixer.mix_outputs(heads, "auto") - before).abs().amax((0, 1, 2)) > 0
    assert moved.tolist() == [False, False, True, True]
    for width, groups in ((6, 2), (8, 4), (5, 1)):
        assert build(Heads(24, 7, width, 7)).groups == groups
