"""Every score against its definition, written out pair by pair, and what it must not depend on."""

import math

import pytest
import torch
from torch.distributions import Independent, MultivariateNormal, Normal, kl_divergence

from sixfold import MultiHeadAttention
from sixfold.attention.multihead import build_part
from sixfold.contracts import Belief, Heads, Visibility
from sixfold.geometry import gaussian as gaussians
from sixfold.geometry.frames import cayley
from sixfold.geometry.gaussian import half
from sixfold.ops.attend import fused
from sixfold.ops.attend.reference import logits

B, H, N, M, D = 2, 3, 5, 6, 4
ALL = Visibility(None, is_causal=False)
EXACT = {"rtol": 0, "atol": 1e-12}


def score(name, rate=0.7, dtype=torch.float64, heads=H, kv=H, **options):
    """A score whose rates differ from head to head."""
    part = build_part("score", {"name": name, **options}, Heads(8, heads, D, kv), dtype=dtype)
    if hasattr(part, "log_rate"):
        with torch.no_grad():
            part.log_rate.copy_(math.log(rate) + 0.1 * torch.arange(heads, dtype=torch.float64))
    return part


def rows(part, query, key):
    """Logits of a score, each row relative to its mean: what a softmax can see."""
    found = logits(part(query, part.keys(key)), ALL)
    return found - found.mean(-1, keepdim=True)


def points(n, heads=H, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, heads, n, D, dtype=torch.float64, generator=generator).to(dtype)


def diagonal(n, seed=0):
    return Belief(points(n, seed=seed), 0.3 + points(n, seed=seed + 10).abs())


def factors(n, seed):
    """Cholesky factors of well-conditioned covariances: 1e-12 is to mean an error, not a matrix."""
    generator = torch.Generator().manual_seed(seed)
    raw = 0.3 * torch.randn(B, H, n, D, D, dtype=torch.float64, generator=generator)
    return raw.tril(-1) + torch.diag_embed(0.7 + raw.diagonal(dim1=-2, dim2=-1).abs())


def frames(n, seed, *, rotations):
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randn(B, H, n, D, D, dtype=torch.float64, generator=generator)
    return cayley(raw - raw.mT) if rotations else torch.eye(D, dtype=torch.float64) + 0.15 * raw


def full(n, seed=0, rotations=None):
    belief = Belief(points(n, seed=seed), factors(n, seed + 10))
    if rotations is None:
        return belief
    frame = frames(n, seed + 20, rotations=rotations)
    volume = torch.linalg.slogdet(frame).logabsdet
    return belief._replace(frame=frame, inverse=torch.linalg.inv(frame), log_volume=volume)


def covariance(factor):
    return factor @ factor.mT


def gaussian(belief, *at):
    if belief.factor.ndim == belief.mean.ndim:
        return Independent(Normal(belief.mean[at], belief.factor[at]), 1)
    return MultivariateNormal(belief.mean[at], covariance(belief.factor[at]))


def transported(belief, at, to):
    """The belief at `at`, moved into the frame `to`: Omega = U_to U_at^-1."""
    omega = to @ torch.linalg.inv(belief.frame[at])
    moved = omega @ covariance(belief.factor[at]) @ omega.mT
    return MultivariateNormal(omega @ belief.mean[at], (moved + moved.mT) / 2)


def cosine(query, key, i, j):
    return -torch.cosine_similarity(query[i], key[j], dim=-1)


def norm(p):
    return lambda query, key, i, j: torch.linalg.vector_norm(query[i] - key[j], p)


def divergence(query, key, i, j):
    return kl_divergence(gaussian(query, *i), gaussian(key, *j))


def symmetric(query, key, i, j):
    return divergence(query, key, i, j) + kl_divergence(gaussian(key, *j), gaussian(query, *i))


def transport_cost(query, key, i, j):
    one, two = gaussian(query, *i).base_dist, gaussian(key, *j).base_dist
    return (one.mean - two.mean).square().sum() + (one.stddev - two.stddev).square().sum()


def moved(query, key, i, j):
    return kl_divergence(gaussian(query, *i), transported(key, j, query.frame[i]))


POINTS = (points(N), points(M, seed=1))
DIAGONALS = (diagonal(N), diagonal(M, seed=1))
DEFINITIONS = {
    "cosine": ("cosine", cosine, POINTS),
    "l2_squared": ("l2_squared", lambda *a: norm(2)(*a) ** 2, POINTS),
    "l2": ("l2", norm(2), POINTS),
    "l1": ("l1", norm(1), POINTS),
    "lp": ("lp", norm(3.0), POINTS),
    "chebyshev": ("chebyshev", norm(math.inf), POINTS),
    "kl_diagonal": ("kl_diagonal", divergence, DIAGONALS),
    "jeffreys": ("jeffreys", symmetric, DIAGONALS),
    "wasserstein2": ("wasserstein2", transport_cost, DIAGONALS),
    "kl": ("kl", divergence, (full(N), full(M, seed=1))),
    "kl, so": ("kl", moved, (full(N, rotations=True), full(M, 1, rotations=True))),
    "kl, gl": ("kl", moved, (full(N, rotations=False), full(M, 1, rotations=False))),
}


@pytest.mark.parametrize("name", DEFINITIONS)
def test_it_is_its_definition(name):
    part, definition, (query, key) = score(DEFINITIONS[name][0]), *DEFINITIONS[name][1:]
    expected = torch.empty(B, H, N, M, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            for i in range(N):
                for j in range(M):
                    value = definition(query, key, (b, h, i), (b, h, j))
                    expected[b, h, i, j] = -part.rate()[h].detach() * value
    expected -= expected.mean(-1, keepdim=True)
    torch.testing.assert_close(rows(part, query, key), expected, **EXACT)


def test_every_score_has_a_definition_here(names_of):
    named = {part for part, *_ in DEFINITIONS.values()}
    assert named | {"dot"} == set(names_of("sixfold.attention.score"))


@pytest.mark.parametrize("rotations", [True, False])
def test_a_gauge_transformation_changes_nothing_but_the_frame_of_the_output(rotations):
    """Local invertible maps g_i of means, covariances, frames and values."""
    part, belief, value = score("kl"), full(N, rotations=rotations), points(N, seed=3)
    g = frames(N, 99, rotations=False)

    def turned(vectors):
        return (g @ vectors[..., None])[..., 0]

    other = Belief(
        turned(belief.mean),
        torch.linalg.cholesky(g @ covariance(belief.factor) @ g.mT),
        g @ belief.frame,
        belief.inverse @ torch.linalg.inv(g),
        belief.log_volume + torch.linalg.slogdet(g).logabsdet,
    )
    torch.testing.assert_close(rows(part, other, other), rows(part, belief, belief), **EXACT)
    outs = []
    for each, values in ((belief, value), (other, turned(value))):
        weights = rows(part, each, each).softmax(-1)
        outs.append(part.readout(weights @ part.carry(values, each), each))
    torch.testing.assert_close(outs[1], turned(outs[0]), **EXACT)


def test_values_are_transported_to_the_query():
    part, belief, value = score("kl"), full(N, rotations=False), points(N, seed=3)
    weights = rows(part, belief, belief).softmax(-1)
    omega = belief.frame[:, :, :, None] @ belief.inverse[:, :, None]
    expected = torch.einsum("bhij,bhijcd,bhjd->bhic", weights, omega, value)
    found = part.readout(weights @ part.carry(value, belief), belief)
    torch.testing.assert_close(found, expected, **EXACT)


def test_unit_covariances_in_flat_frames_are_half_a_squared_distance():
    query, key = POINTS
    eye = torch.eye(D, dtype=torch.float64)
    flat = [Belief(x, eye.expand(*x.shape, D)) for x in (query, key)]
    ones = [Belief(x, torch.ones_like(x)) for x in (query, key)]
    distance = rows(score("l2_squared", rate=0.35), query, key)
    torch.testing.assert_close(rows(score("kl"), *flat), distance, **EXACT)
    torch.testing.assert_close(rows(score("kl_diagonal"), *ones), distance, **EXACT)
    torch.testing.assert_close(rows(score("wasserstein2", rate=0.35), *ones), distance, **EXACT)
    torch.testing.assert_close(rows(score("jeffreys", rate=0.35), *ones), distance, **EXACT)


def test_a_diagonal_covariance_is_a_covariance():
    query, key = DIAGONALS
    whole = [Belief(x.mean, torch.diag_embed(x.factor)) for x in DIAGONALS]
    expected = rows(score("kl_diagonal"), query, key)
    torch.testing.assert_close(rows(score("kl"), *whole), expected, **EXACT)


def test_the_squared_distance_of_unit_vectors_is_their_cosine():
    query, key = (torch.nn.functional.normalize(x, dim=-1) for x in POINTS)
    found, expected = score("l2_squared", rate=0.5), score("cosine", rate=1.0)
    torch.testing.assert_close(rows(found, query, key), rows(expected, query, key), **EXACT)


def test_minkowski_contains_its_neighbours():
    for p, name in ((1.0, "l1"), (2.0, "l2"), (math.inf, "chebyshev")):
        torch.testing.assert_close(rows(score("lp", p=p), *POINTS), rows(score(name), *POINTS), **EXACT)  # fmt: skip


def test_half_vectors_multiply_as_matrices_do():
    one, two = (covariance(factors(3, seed)) for seed in (0, 1))
    trace = (one @ two).diagonal(dim1=-2, dim2=-1).sum(-1)
    found = (half(one, weighted=True) * half(two)).sum(-1)
    torch.testing.assert_close(found, trace, rtol=1e-13, atol=0)


@pytest.mark.parametrize("name", DEFINITIONS)
def test_gradients_of_coincident_tokens_are_finite(name):
    kind, _, (query, _) = DEFINITIONS[name]
    leaves = [
        t.clone().requires_grad_() for t in ([query] if torch.is_tensor(query) else query[:2])
    ]
    same = leaves[0] if torch.is_tensor(query) else query._replace(mean=leaves[0], factor=leaves[1])
    part = score(kind)
    found = torch.autograd.grad(rows(part, same, same).softmax(-1).square().sum(), [*leaves, *part.parameters()])  # fmt: skip
    assert all(torch.isfinite(g).all() for g in found)


CENTRED = ("l2_squared", "kl_diagonal", "jeffreys", "wasserstein2", "kl", "kl, so")


@pytest.mark.parametrize("name", CENTRED)
def test_a_centre_changes_nothing_but_rounding(name):
    kind, _, (query, key) = DEFINITIONS[name]
    part = score(kind)
    expected = rows(part, query, key)
    part.recenter_(key)
    assert part.center.abs().max() > 0.01
    torch.testing.assert_close(rows(part, query, key), expected, **EXACT)


def test_a_centre_keeps_the_digits_of_half_precision():
    """Queries and keys 16 away from the origin, half precision against float64 of the same."""
    far = [x.to(torch.bfloat16) + 16 for x in (points(64), points(64, seed=1))]
    part = score("l2_squared", dtype=torch.bfloat16)
    golden = score("l2_squared", rate=1.0)
    golden.log_rate.data = part.rate().double().log()
    truth = rows(golden, *(x.double() for x in far))
    before = (rows(part, *far).double() - truth).abs().mean()
    part.recenter_(far[1])
    after = (rows(part, *far).double() - truth).abs().mean()
    assert after < before / 8


def test_the_norm_column_is_split_in_half_precision():
    key = points(64).to(torch.bfloat16) * 8
    kept = score("l2_squared", dtype=torch.bfloat16).keys(key)
    assert kept.shape[-1] == 8
    norm_kept = kept[..., D : D + 2].double().sum(-1)
    exact = -0.5 * key.double().square().sum(-1)
    assert ((norm_kept - exact) / exact).abs().max() < 2.0**-14
    assert (kept[..., D + 2 :] == 0).all()


@pytest.mark.parametrize("head_dim", [8, 32, 128])
def test_a_fresh_layer_is_neither_uniform_nor_one_hot(names_of, head_dim):
    projections = {"kl": "gaussian"} | dict.fromkeys(
        ("kl_diagonal", "jeffreys", "wasserstein2"), "gaussian_diagonal"
    )
    for name in names_of("sixfold.attention.score"):
        if name == "kl" and head_dim > 32:
            continue  # half vectors of width 8,385
        torch.manual_seed(0)
        made = MultiHeadAttention(
            4 * head_dim, 4, score=name, projection=projections.get(name, "linear")
        )
        _, weights = made(torch.randn(2, 64, 4 * head_dim), need_weights=True)
        entropy = -(weights * weights.clamp(min=1e-30).log()).sum(-1).mean() / math.log(64)
        assert 0.4 < entropy < 0.97, (name, entropy)


@pytest.mark.parametrize("name", ["l2_squared", "l1", "kl_diagonal", "cosine"])
def test_a_fixed_rate_is_no_parameter(name):
    part = score(name, learned=False)
    assert not list(part.parameters())
    assert "log_rate" in part.state_dict()


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ({"name": "lp", "p": 0.5}, "score 'lp': p must be a number in \\[1, inf\\], got 0.5"),
        ({"name": "lp", "p": math.nan}, "p must be a number in \\[1, inf\\], got nan"),
        ({"name": "lp", "p": True}, "p must be a number in \\[1, inf\\], got True"),
        ({"name": "cosine", "rate": "a"}, "'cosine': rate must be positive and finite, got 'a'"),
        ({"name": "kl", "rate": "a"}, "score 'kl': rate must be positive and finite, got 'a'"),
        ({"name": "l1", "rate": -1.0}, "score 'l1': rate must be positive and finite, got -1.0"),
        ({"name": "l3"}, "unknown score 'l3'; choose from: chebyshev, cosine, dot"),
        ({"name": "dot", "rate": 1.0}, "score 'dot': unknown option 'rate'"),
    ],
)
def test_what_cannot_be_built_is_refused(part, says):
    with pytest.raises(ValueError, match=says):
        build_part("score", part, Heads(8, H, D, H))


@pytest.mark.parametrize(
    ("projection", "says"),
    [
        ({"name": "gaussian", "frames": "sl"}, "unknown frames 'sl'; choose from: gl, so"),
        ({"name": "gaussian", "frames": "so", "per": "head"}, "unknown per 'head'"),
        ({"name": "gaussian", "tied": True}, "num_heads and num_kv_heads must be equal"),
    ],
)
def test_projections_of_beliefs_refuse_what_they_cannot(projection, says):
    with pytest.raises(ValueError, match=says):
        MultiHeadAttention(16, 4, num_kv_heads=2, projection=projection, score="kl")


def eager(name, query, key, rate, value):
    """Attention by the definition, every step in the dtype of its inputs."""
    if name in ("kl_diagonal", "jeffreys", "wasserstein2"):
        (mq, sq), (mk, sk) = ((t.mean[..., :, None, :], t.factor[..., :, None, :]) for t in (query, key))  # fmt: skip
        mk, sk = mk.transpose(-2, -3), sk.transpose(-2, -3)
        if name == "wasserstein2":
            apart = gaussians.wasserstein2_diagonal(mq, sq, mk, sk)
        else:
            apart = gaussians.kl_diagonal(mq, sq, mk, sk)
        if name == "jeffreys":
            apart = apart + gaussians.kl_diagonal(mk, sk, mq, sq)
    elif name == "cosine":
        apart = -torch.nn.functional.cosine_similarity(query[..., :, None, :], key[..., None, :, :], dim=-1)  # fmt: skip
    else:
        apart = (query[..., :, None, :] - key[..., None, :, :]).square().sum(-1)
    return (-rate[:, None, None] * apart).softmax(-1) @ value


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name", ["cosine", "l2_squared", "wasserstein2", "kl_diagonal", "jeffreys"]
)
def test_low_precision_errs_no_more_than_the_definition_in_low_precision(name, dtype):
    """Output and gradients, in the mean: 10 x the eager error in float32, 1.1 x below, as PyTorch asks.

    On top of it one rounding of the result, which eager makes too but may make luckily.
    """
    fudge = 10 if dtype == torch.float32 else 1.1
    given = DEFINITIONS[name][2]
    leaves = [
        t.to(dtype) for part in given for t in ((part,) if torch.is_tensor(part) else part[:2])
    ]
    leaves.append(points(M, seed=7).to(dtype))
    part = score(name, dtype=dtype)
    rate = part.rate().detach()

    def run(kind, how):
        tensors = [t.detach().to(kind).requires_grad_() for t in leaves]
        *sides, value = tensors
        if len(sides) == 4:
            sides = [Belief(*sides[:2]), Belief(*sides[2:])]
        if how == "fused":
            rating = part(sides[0], part.keys(sides[1]))
            out = fused.attend(rating, value, ALL, 0.0)
        else:
            out = eager(name, *sides, rate.to(kind), value)
        return [out, *torch.autograd.grad(out.square().sum(), tensors)]

    golden, plain, ours = run(torch.float64, "eager"), run(dtype, "eager"), run(dtype, "fused")
    for gold, low, found in zip(golden, plain, ours, strict=True):
        allowed = fudge * (low.double() - gold).abs().mean()
        rounding = torch.finfo(dtype).eps * gold.abs().mean()
        assert (found.double() - gold).abs().mean() <= allowed + rounding


def test_a_centre_that_is_no_number_is_refused():
    part, key = score("l2_squared"), points(M)
    key[0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="the mean of these keys is not finite"):
        part.recenter_(key)
    assert (part.center == 0).all()
    with pytest.raises(ValueError, match="takes no centre"):
        score("l1").recenter_(points(M))


@pytest.mark.parametrize("algebra", ["so", "gl"])
@pytest.mark.parametrize("per", ["position", "token"])
def test_frames_that_are_projected_know_their_inverse_and_volume(algebra, per):
    projection = {"name": "gaussian", "frames": algebra, "per": per}
    layer = MultiHeadAttention(24, 4, num_kv_heads=2, projection=projection, score="kl")
    layer = layer.double()
    with torch.no_grad():
        for parameter in layer.projection.frames.parameters():
            parameter.mul_(20)
    x = torch.randn(2, 9, 24, dtype=torch.float64)
    belief = layer.projection(x, x, ALL, None).query
    eye = torch.eye(6, dtype=torch.float64).expand_as(belief.frame)
    torch.testing.assert_close(belief.frame @ belief.inverse, eye, rtol=0, atol=1e-11)
    key = layer.projection(x, x, ALL, None).key
    frames = key.frame if key.frame.ndim == 5 else key.frame[None]
    volume = torch.linalg.slogdet(frames).logabsdet
    given = torch.as_tensor(key.log_volume, dtype=torch.float64).expand_as(volume)
    torch.testing.assert_close(given, volume, rtol=0, atol=1e-11)
    assert (volume.abs().max() > 1e-3) == (algebra == "gl")
