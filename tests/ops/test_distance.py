"""Attention by distance: every implementation against the definition, the definition against loops."""

import itertools
import math
import os
import subprocess
import sys

import pytest
import torch
from torch.autograd import forward_ad

from sixfold.contracts import Distances, Visibility
from sixfold.discover import names
from sixfold.geometry import metrics
from sixfold.ops.attend.reference import weights as explicit_weights
from sixfold.ops.distance import reference, tiled

INF = math.inf
POWERS = (1.0, 1.5, 2.0, 3.0, INF)
PACKAGE = "sixfold.ops.distance"
TILED = tuple(n for n in names(PACKAGE) if n not in ("reference", "triton"))
EVERYTHING = Visibility(None, is_causal=False)


def implementation(name):
    """`attend` of a file of the package; skips what this machine cannot run."""
    if name == "numba":
        pytest.importorskip("numba", reason="needs sixfold[cpu]")
    module = __import__(f"{PACKAGE}.{name}", fromlist=["attend"])
    return module.attend


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles that no length here is a multiple of."""
    monkeypatch.setattr(tiled, "ROWS", 4)
    monkeypatch.setattr(tiled, "KEYS", 5)


def inputs(n, m, kv_heads=2, width=6, dtype=torch.float64):
    """Query, key, value of another width, and rate, with gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, n, width), (2, kv_heads, m, width), (2, kv_heads, m, 3))
    made = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    made.append(torch.rand(4, generator=generator, dtype=torch.float64) + 0.5)
    return [tensor.to(dtype).requires_grad_() for tensor in made]


def run(attend, tensors, visibility, p):
    """Output and all gradients of a fixed weighted sum of it, that of a float mask last."""
    query, key, value, rate = tensors
    sources = list(tensors)
    mask = visibility.mask
    if mask is not None and mask.is_floating_point():
        mask = mask.detach().clone().requires_grad_()
        sources.append(mask)
    seen = Visibility(mask, visibility.is_causal)
    out = attend(Distances(query, key, rate, p), value, seen, 0.0)
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)
    return (out, *torch.autograd.grad((out * weight).sum(), sources))


def loop(tensors, visibility, p):
    """One pair at a time, in plain arithmetic."""
    query, key, value, rate = (t.detach() for t in tensors)
    batch, heads, n, _ = query.shape
    m, group = key.shape[2], heads // key.shape[1]
    out = torch.zeros(batch, heads, n, value.shape[-1], dtype=query.dtype)
    mask = visibility.mask
    whole = None if mask is None else mask.expand(batch, heads, n, m)
    for b, h, i in itertools.product(range(batch), range(heads), range(n)):
        scores = {}
        for j in range(m):
            bias = 0.0
            if whole is not None:
                cell = whole[b, h, i, j]
                bias = float(cell) if mask.dtype != torch.bool else (0.0 if cell else -INF)
            if visibility.is_causal and j > i + m - n:
                bias = -INF
            if bias > -INF:
                gap = torch.linalg.vector_norm(query[b, h, i] - key[b, h // group, j], p)
                scores[j] = float(-rate[h] * gap) + bias
        if scores:
            top = max(scores.values())
            total = sum(math.exp(s - top) for s in scores.values())
            for j, s in scores.items():
                out[b, h, i] += math.exp(s - top) / total * value[b, h // group, j]
    return out


def by_cdist(rating, value, visibility, dropout):
    """The attention of `torch.cdist`, for masks and p where its gradient has no ties to share."""
    query, key, rate, p = rating
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    scores = -rate[:, None, None] * torch.cdist(query, key, p)
    if visibility.is_causal:
        n, m = scores.shape[-2:]
        scores = scores + torch.full((n, m), -INF, dtype=scores.dtype).triu(1 + m - n)
    if visibility.mask is not None:
        scores = scores + visibility.mask
    return scores.softmax(-1) @ value


@pytest.mark.parametrize("p", POWERS)
def test_the_reference_is_the_loop(masks, p, kind):
    for n, m, kv_heads in ((3, 4, 2), (4, 3, 1)):
        tensors, seen = inputs(n, m, kv_heads), masks(n, m)[kind]
        found = reference.attend(Distances(*tensors[:2], tensors[3], p), tensors[2], seen, 0.0)
        torch.testing.assert_close(found.detach(), loop(tensors, seen, p), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["reference", *TILED])
@pytest.mark.parametrize("p", POWERS)
def test_gradients_are_those_of_cdist(masks, name, p, small_tiles):
    for kind in ("none", "causal", "float"):
        tensors, seen = inputs(7, 9), masks(7, 9)[kind]
        expected, found = (run(a, tensors, seen, p) for a in (by_cdist, implementation(name)))
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", TILED)
@pytest.mark.parametrize("p", POWERS)
def test_every_implementation_is_the_reference(masks, p, kind, name, small_tiles):
    attend = implementation(name)
    for n, m, kv_heads in ((9, 11, 2), (11, 6, 4), (1, 6, 1)):
        tensors, seen = inputs(n, m, kv_heads), masks(n, m)[kind]
        expected, found = (run(a, tensors, seen, p) for a in (reference.attend, attend))
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["none", "keys", "causal_float", "blind"])
@pytest.mark.parametrize("p", [*POWERS, 2.4])
@pytest.mark.parametrize("name", TILED)
def test_low_precision_errs_no_more_than_eager(masks, name, p, kind, dtype, monkeypatch):
    """At most 10 (float32) or 1.1 (half) times the eager error against float64.

    The budget added is the rounding of the result itself: one unit in the last place of the dtype,
    and of float32 for each of the m keys and d features that are summed.
    """
    monkeypatch.setattr(tiled, "ROWS", 16)
    monkeypatch.setattr(tiled, "KEYS", 24)
    n, width = 37, 12
    tensors, seen = inputs(n, n, 2, width, dtype), masks(n, n, dtype)[kind]
    exact = None if seen.mask is None else seen.mask
    exact = exact.double() if exact is not None and exact.is_floating_point() else exact
    golden_tensors = [t.detach().double().requires_grad_() for t in tensors]
    golden = run(reference.attend, golden_tensors, Visibility(exact, seen.is_causal), p)
    eager = run(reference.attend, tensors, seen, p)
    found = run(implementation(name), tensors, seen, p)
    fudge = 10 if dtype == torch.float32 else 1.1
    budget = torch.finfo(dtype).eps + math.sqrt(n + width) * torch.finfo(torch.float32).eps
    for gold, low, ours in zip(golden, eager, found, strict=True):
        assert ours.dtype == dtype
        for error in (lambda x: x.abs().mean(), lambda x: x.abs().max()):
            allowed = fudge * error(low.double() - gold) + budget * error(gold)
            assert error(ours.double() - gold) <= allowed


@pytest.mark.parametrize("name", ["reference", *TILED])
@pytest.mark.parametrize("p", POWERS)
def test_blind_rows_are_zero_and_so_are_their_gradients(masks, name, p, small_tiles):
    tensors, kinds = inputs(9, 6), masks(9, 6)
    for kind, rows in (("blind", [0, 4]), ("blind_float", [0, 4]), ("causal", [0, 1, 2])):
        out, grad_query, *others = run(implementation(name), tensors, kinds[kind], p)
        assert (out[:, :, rows] == 0).all()
        assert (grad_query[:, :, rows] == 0).all()
        assert (out[:, :, 5:] != 0).all()
        assert all(torch.isfinite(g).all() for g in others)


@pytest.mark.parametrize("name", ["reference", *TILED])
@pytest.mark.parametrize("p", POWERS)
def test_gradient_is_that_of_finite_differences(masks, name, p, small_tiles):
    tensors, seen = inputs(5, 6, 2, 3), masks(5, 6)["causal_float"]
    bias = seen.mask.clone().requires_grad_()
    attend = implementation(name)

    def function(query, key, value, rate, mask):
        return attend(Distances(query, key, rate, p), value, Visibility(mask, True), 0.0)

    assert torch.autograd.gradcheck(function, (*tensors, bias), fast_mode=True)
    if name == "reference":
        assert torch.autograd.gradgradcheck(function, (*tensors, bias), fast_mode=True)


def derivatives(attend):
    """Every kind of derivative of a distance by its queries that is no plain backward pass."""
    query, key, value, rate = (t.detach() for t in inputs(3, 4))

    def out(point):
        return attend(Distances(point, key, rate, 1.5), value, EVERYTHING, 0.0)

    def energy(point):
        return out(point).square().sum()

    def twice():
        point = query.clone().requires_grad_()
        first = torch.autograd.grad(energy(point), point, create_graph=True)[0]
        return torch.autograd.grad(first.square().sum(), point)[0]

    def dual():
        with forward_ad.dual_level():
            moved = out(forward_ad.make_dual(query, torch.ones_like(query)))
            return forward_ad.unpack_dual(moved).tangent

    return {
        "twice": twice,
        "dual": dual,
        "jvp": lambda: torch.func.jvp(out, (query,), (torch.ones_like(query),))[1],
        "grad": lambda: torch.func.grad(energy)(query),
        "hessian": lambda: torch.func.hessian(energy)(query),
    }


DERIVATIVES = tuple(derivatives(reference.attend))
# PyTorch's own, where it first meets a forward derivative
forward_mode = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")


def refuses_all_but_one_backward_pass(name, found):
    with pytest.raises(
        RuntimeError, match=f"impl '{name}' can be .* once.*impl='reference' serves"
    ):
        found()


@forward_mode
@pytest.mark.parametrize("derivative", DERIVATIVES)
@pytest.mark.parametrize("name", TILED)
def test_only_the_reference_has_other_derivatives_than_one_backward(name, derivative):
    assert derivatives(reference.attend)[derivative]().abs().sum() > 0
    refuses_all_but_one_backward_pass(name, derivatives(implementation(name))[derivative])


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", ["reference", *TILED])
def test_vmap_maps(name):
    query, key, value, rate = inputs(3, 4)
    points = torch.stack([query, 2 * query]).detach().requires_grad_()

    def out(point):
        return implementation(name)(Distances(point, key, rate, 1.5), value, EVERYTHING, 0.0)

    sources, results = (points, key, value, rate), []
    for result in (torch.vmap(out)(points), torch.stack([out(point) for point in points])):
        results.append((result, *torch.autograd.grad(result.square().sum(), sources)))
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two)


@forward_mode
@pytest.mark.parametrize("name", TILED)
def test_a_compiled_forward_derivative_is_not_lost_in_silence(name):
    attend = implementation(name)
    query, key, value, rate = (t.detach() for t in inputs(3, 4))

    @torch.compile(fullgraph=True, backend="eager")
    def tangent(point):
        def out(moved):
            return attend(Distances(moved, key, rate, 1.5), value, EVERYTHING, 0.0)

        return torch.func.jvp(out, (point,), (torch.ones_like(point),))[1]

    with pytest.raises(RuntimeError, match="impl='reference' serves"):
        tangent(query)


def drowned(attend, p):
    """Output and gradient of the queries; all logits of one head overflow, and two rows are masked."""
    query, key, value, rate = (t.detach().float() for t in inputs(9, 9))
    query.requires_grad_()
    rate[1] = 3e38
    seen = torch.ones(9, 9, dtype=torch.bool)
    seen[[2, 7]] = False
    found = []
    for mask, is_causal in (
        (None, False),
        (seen, False),
        (seen, True),
        (torch.zeros(9, 9).masked_fill(~seen, -INF), False),
    ):
        visibility = Visibility(mask, is_causal)
        out = attend(Distances(query, key * 100, rate, p), value, visibility, 0.0)
        found.append((mask is not None, out, torch.autograd.grad(out.sum(), query)[0]))
    return found


def broken_shows(attend, p):
    rows = torch.tensor([2, 7])
    others = torch.tensor([0, 1, 3, 4, 5, 6, 8])
    for masked, *tensors in drowned(attend, p):
        for each in tensors:
            assert each[:, [0, 2, 3]].isfinite().all()
            assert each[:, 1, others].isnan().all()
            assert (each[:, 1, rows] == 0).all() if masked else each[:, 1, rows].isnan().all()


@pytest.mark.parametrize("name", ["reference", *TILED])
@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 2.4, INF])
def test_logits_that_overflow_are_no_mask(name, p, small_tiles):
    broken_shows(implementation(name), p)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["reference", *TILED])
@pytest.mark.parametrize("p", [*POWERS, 2.4, 20.0])
def test_where_points_meet_the_gradient_is_zero(p, name, dtype):
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(1, 2, 1, 5, generator=generator, dtype=dtype)
    query = one.expand(1, 2, 4, 5).clone().requires_grad_()
    key = one.expand(1, 2, 7, 5).clone().requires_grad_()
    value = torch.randn(1, 2, 7, 3, generator=generator, dtype=dtype, requires_grad=True)
    rate = torch.ones(2, dtype=dtype, requires_grad=True)
    out, *grads = run(implementation(name), (query, key, value, rate), EVERYTHING, p)
    torch.testing.assert_close(out, value.mean(2, keepdim=True).expand_as(out))
    assert (grads[0] == 0).all()
    assert (grads[1] == 0).all()
    assert (grads[3] == 0).all()


@pytest.mark.parametrize("name", ["reference", *TILED])
def test_features_that_tie_share_the_gradient(name):
    """Gaps 2, -2, 1 of query and key: half each, with its sign; the other key lies elsewhere."""
    query = torch.zeros(1, 1, 1, 3, dtype=torch.float64, requires_grad=True)
    key = torch.tensor([[[[2.0, -2.0, 1.0], [5.0, 0.0, 0.0]]]], dtype=torch.float64)
    key.requires_grad_()
    value = torch.tensor([[[[1.0], [0.0]]]], dtype=torch.float64)
    rate = torch.ones(1, dtype=torch.float64)
    out = implementation(name)(Distances(query, key, rate, INF), value, EVERYTHING, 0.0)
    weight = 1 / (1 + math.exp(2 - 5))
    slope = weight * (1 - weight)
    assert out.item() == pytest.approx(weight)
    grad_query, grad_key = torch.autograd.grad(out.sum(), (query, key))
    expected = torch.tensor([[-0.5, 0.5, 0.0], [1.0, 0.0, 0.0]], dtype=torch.float64) * slope
    torch.testing.assert_close(grad_key[0, 0], expected)
    torch.testing.assert_close(grad_query[0, 0, 0], -expected.sum(0))


@pytest.mark.parametrize("name", ["reference", *TILED])
@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 2.4, 3.0, 6.0, 20.0, 400.0, INF])
@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1.0, 1e15, 1e18, 1e19, 1e36])
def test_distances_keep_their_precision_at_every_scale(name, p, scale):
    """In float32 from 1e-25 to 1e36, where plain powers vanish or overflow."""
    implementation(name)
    if name == "tiled" and p == 2 and not 1e-12 <= scale <= 1e18:
        pytest.skip("torch.cdist squares what float32 cannot hold squared")
    if name == "reference":
        module = metrics
    else:
        module = __import__(f"{PACKAGE}.{name}", fromlist=["distance"])
    x, y = torch.randn(2, 1, 9, 13) * scale
    found = module.distance(x, y, p).double()
    gaps = (x.double()[:, :, None] - y.double()[:, None]) / scale
    exact = torch.linalg.vector_norm(gaps, p, dim=-1) * scale
    assert ((found - exact).abs() <= 1e-6 * exact).all()


@pytest.mark.parametrize("name", ["reference", *TILED])
@pytest.mark.parametrize("place", ["query", "key", "value", "rate"])
@pytest.mark.parametrize("p", [*POWERS, 2.4])
def test_nan_is_not_lost(p, place, name):
    tensors = [t.detach().float() for t in inputs(5, 7)]
    spoiled = tensors[["query", "key", "value", "rate"].index(place)]
    spoiled.view(-1)[0] = math.nan
    out = implementation(name)(Distances(*tensors[:2], tensors[3], p), tensors[2], EVERYTHING, 0.0)
    assert out[0, 0, 0].isnan().any()
    assert not out[1, 3].isnan().any()


@pytest.mark.parametrize("name", ["reference", *TILED])
def test_what_cannot_be_meant_is_refused(name):
    attend = implementation(name)
    query, key, value, rate = inputs(3, 4)
    with pytest.raises(ValueError, match=r"p must be in \[1, inf\], got 0.5"):
        attend(Distances(query, key, rate, 0.5), value, EVERYTHING, 0.0)
    with pytest.raises(ValueError, match=r"p must be in \[1, inf\], got nan"):
        attend(Distances(query, key, rate, math.nan), value, EVERYTHING, 0.0)
    with pytest.raises(TypeError, match="query must be one of float16.*got torch.int64"):
        attend(Distances(query.long(), key.long(), rate, 1.0), value.long(), EVERYTHING, 0.0)
    with pytest.raises(TypeError, match="one dtype"):
        attend(Distances(query, key.float(), rate, 1.0), value, EVERYTHING, 0.0)
    with pytest.raises(ValueError, match="must divide the 4 query heads"):
        attend(Distances(query, key[:, [0, 1, 1]], rate, 1.0), value, EVERYTHING, 0.0)


@pytest.mark.parametrize("name", ["reference", *TILED])
def test_dropout_keeps_the_mean_and_drops_the_share(name):
    """Values are one-hot, so the output shows the dropped weights: 0 or w / (1 - dropout)."""
    dropout, m = 0.3, 64
    query, key = torch.randn(2, 4, 4, m, 8)
    rating = Distances(query, key, torch.full((4,), 0.3), 1.0)
    shown = implementation(name)(rating, torch.eye(m).expand(4, 4, m, m), EVERYTHING, dropout)
    weights = explicit_weights(rating, EVERYTHING)
    dropped = shown == 0
    count = dropped.numel()
    # four standard deviations of a binomial share
    assert abs(dropped.double().mean() - dropout) < 4 * math.sqrt(dropout * (1 - dropout) / count)
    torch.testing.assert_close(shown[~dropped], weights[~dropped] / (1 - dropout))


@pytest.mark.parametrize("name", TILED)
def test_the_backward_pass_drops_what_the_forward_pass_dropped(name, small_tiles):
    """With the seed held, attention with dropout is a function: finite differences apply."""
    tensors, attend = inputs(5, 6, 2, 3), implementation(name)

    def function(query, key, value, rate):
        torch.manual_seed(3)
        return attend(Distances(query, key, rate, 1.5), value, EVERYTHING, 0.4)

    assert not torch.equal(function(*tensors), attend(
        Distances(*tensors[:2], tensors[3], 1.5), tensors[2], EVERYTHING, 0.0
    ))  # fmt: skip
    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize("name", TILED)
def test_causality_skips_the_tiles_it_hides(name, small_tiles, monkeypatch):
    seen = []
    metric = tiled.METRICS[name]
    counted = metric._replace(
        distance=lambda x, y, p: seen.append((x.shape[1], y.shape[1])) or metric.distance(x, y, p)
    )
    monkeypatch.setitem(tiled.METRICS, name, counted)
    tensors = inputs(8, 8)
    rating = Distances(*tensors[:2], tensors[3], 1.0)
    tiled.attend_by(name, rating, tensors[2], Visibility(None, is_causal=True), 0.0)
    assert seen == [(4, 4), (4, 5), (4, 3)]


def test_threads_change_nothing(masks):
    attend = implementation("numba")
    tensors, seen = inputs(33, 31, dtype=torch.float32), masks(33, 31, torch.float32)["causal"]
    alone = run(attend, tensors, seen, 3.0)
    try:
        torch.set_num_threads(3)
        together, again = (run(attend, tensors, seen, 3.0) for _ in range(2))
    finally:
        torch.set_num_threads(1)
    for one, two, three in zip(alone, together, again, strict=True):
        torch.testing.assert_close(one, two)
        assert torch.equal(two, three)


def test_autocast_does_not_lower_the_precision_inside():
    query, key, value, rate = inputs(9, 9, dtype=torch.float32)
    rating = Distances(query, key, rate, 2.0)
    expected = tiled.attend(rating, value, EVERYTHING, 0.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = tiled.attend(rating, value, EVERYTHING, 0.0)
        found.sum().backward()
    assert torch.equal(found, expected)


@pytest.mark.parametrize("missing", ["numba"])
def test_a_missing_extra_is_named(missing):
    code = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        f"from sixfold.ops.distance import {missing} as files\n"
        "import torch\n"
        "from sixfold.contracts import Distances, Visibility\n"
        "x = torch.randn(1, 1, 2, 3)\n"
        "files.attend(Distances(x, x, torch.ones(1), 1.0), x, Visibility(None, False), 0.0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (
        "ModuleNotFoundError: impl 'numba' needs Numba: pip install 'sixfold[cpu]'" in done.stderr
    )


def compare_triton(masks, p, kind, dtype, device, sizes):
    """Output and gradients of the Triton programs within the error of the eager reference."""
    attend = implementation("triton")
    for n, m, kv_heads in sizes:
        tensors, seen = inputs(n, m, kv_heads, 3, dtype), masks(n, m, torch.float32)[kind]
        golden_tensors = [t.detach().double().requires_grad_() for t in tensors]
        exact = seen.mask
        exact = exact.double() if exact is not None and exact.is_floating_point() else exact
        golden = run(reference.attend, golden_tensors, Visibility(exact, seen.is_causal), p)
        eager = run(reference.attend, tensors, seen, p)
        moved = [t.detach().to(device).requires_grad_() for t in tensors]
        mask = None if seen.mask is None else seen.mask.to(device)
        found = run(attend, moved, Visibility(mask, seen.is_causal), p)
        fudge = 10 if dtype == torch.float32 else 1.1
        budget = torch.finfo(dtype).eps + math.sqrt(n + 3) * torch.finfo(torch.float32).eps
        for gold, low, ours in zip(golden, eager, found, strict=True):
            assert ours.dtype == low.dtype
            allowed = fudge * (low.double() - gold).abs().max() + budget * gold.abs().max()
            assert (ours.cpu().double() - gold).abs().max() <= allowed


interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1",
    reason="Triton's interpreter is chosen per process: test_triton_programs_run_interpreted",
)


@interpreted
class TestInterpreted:
    @pytest.mark.parametrize(
        ("p", "kind"),
        [(p, "causal_float") for p in POWERS]
        + [(1.0, kind) for kind in ("none", "per_head", "keys", "row_bias", "blind_float")],
    )
    def test_programs_are_the_reference(self, masks, p, kind, monkeypatch):
        monkeypatch.setattr("sixfold.ops.distance.triton.BLOCK", 16)
        compare_triton(masks, p, kind, torch.float32, "cpu", ((5, 18, 2),))

    def test_more_queries_than_keys(self, masks, monkeypatch):
        monkeypatch.setattr("sixfold.ops.distance.triton.BLOCK", 16)
        compare_triton(masks, 2.0, "causal", torch.float32, "cpu", ((35, 17, 4),))

    def test_half_precision(self, masks):
        compare_triton(masks, 2.0, "causal_keys", torch.bfloat16, "cpu", ((5, 9, 1),))

    @pytest.mark.parametrize("p", POWERS)
    def test_gradients_are_finite_where_points_meet_and_nan_is_not_lost(self, p):
        attend = implementation("triton")
        points = torch.ones(1, 2, 5, 3, requires_grad=True)
        value, rate = torch.randn(1, 2, 5, 3, requires_grad=True), torch.ones(2, requires_grad=True)
        out, *grads = run(attend, (points, points, value, rate), EVERYTHING, p)
        torch.testing.assert_close(out, value.mean(2, keepdim=True).expand_as(out))
        assert (grads[0] == 0).all()
        spoiled = points.detach().clone()
        spoiled[0, 0, 0, 0] = math.nan
        out = attend(Distances(spoiled, points, rate, p), value, EVERYTHING, 0.0)
        assert out[0, 0, 0].isnan().all()
        assert not out[0, 1].isnan().any()

    @forward_mode
    @pytest.mark.parametrize("derivative", DERIVATIVES)
    def test_it_has_one_backward_pass(self, derivative):
        def attend(rating, value, *others):
            query, key, rate, p = rating
            rating = Distances(query.float(), key.float(), rate.float(), p)
            return implementation("triton")(rating, value.float(), *others)

        refuses_all_but_one_backward_pass("triton", derivatives(attend)[derivative])

    def test_vmap_is_refused(self):
        x = torch.randn(2, 1, 1, 3, 2)

        def out(point):
            rating = Distances(point, point, torch.ones(1), 1.0)
            return implementation("triton")(rating, point, EVERYTHING, 0.0)

        refuses_all_but_one_backward_pass("triton", lambda: torch.vmap(out)(x))

    @pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
    @pytest.mark.parametrize("p", [1.0, 1.5, 2.0, INF])
    def test_logits_that_overflow_are_no_mask(self, p, monkeypatch):
        monkeypatch.setattr("sixfold.ops.distance.triton.BLOCK", 16)
        broken_shows(implementation("triton"), p)


def test_triton_programs_run_interpreted():
    pytest.importorskip("triton", reason="Triton is not installed")
    command = [sys.executable, "-m", "pytest", __file__, "-k", "TestInterpreted", "-q"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout
    assert "skipped" not in done.stdout, done.stdout


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", POWERS)
def test_triton_programs_run_on_a_gpu(masks, p, kind, dtype):
    compare_triton(masks, p, kind, dtype, "cuda", sizes=((67, 131, 2), (131, 67, 4)))


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter takes it")
def test_triton_refuses_what_it_cannot_run():
    attend = implementation("triton")
    x = torch.randn(1, 1, 2, 3)
    rating = Distances(x, x, torch.ones(1), 1.0)
    with pytest.raises(ValueError, match="impl 'triton' has no dropout, got 0.1"):
        attend(rating, x, EVERYTHING, 0.1)
    with pytest.raises(ValueError, match="impl 'triton' needs a GPU, got query on cpu"):
        attend(rating, x, EVERYTHING, 0.0)
    x = x.double()
    with pytest.raises(TypeError, match="computes in float32, got float64"):
        attend(Distances(x, x, torch.ones(1), 1.0), x, EVERYTHING, 0.0)


def test_the_files_import_neither_numba_nor_triton():
    modules = ", ".join(f"{PACKAGE}.{name}" for name in names(PACKAGE))
    code = f"import {modules}, sys; print({{'numba', 'triton'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("name", TILED)
@pytest.mark.parametrize("kind", ["none", "float", "causal"])
def test_it_is_an_operator_that_compilers_can_take(name, kind):
    g, n, m, d = 4, 5, 7, 3
    query, key, value = (torch.randn(g, size, d, dtype=torch.float64, requires_grad=True) for size in (n, m, m))  # fmt: skip
    rate = torch.rand(g, 1, 1, dtype=torch.float64, requires_grad=True)
    mask = torch.randn(1, 2, n, m, dtype=torch.float64, requires_grad=True) if kind == "float" else None  # fmt: skip
    seed = torch.zeros((), dtype=torch.int64)
    torch.library.opcheck(
        tiled.attention, (query, key, value, rate, mask, name, 1.0, 2, kind == "causal", 0.0, seed)
    )


@pytest.mark.parametrize("name", TILED)
def test_it_compiles_as_one_graph(name):
    tensors, attend = inputs(5, 7), implementation(name)

    def function(query, key, value, rate):
        return attend(Distances(query, key, rate, 1.0), value, EVERYTHING, 0.0)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    found, expected = compiled(*tensors), function(*tensors)
    torch.testing.assert_close(found, expected)
    grads = [torch.autograd.grad(out.square().sum(), tensors) for out in (found, expected)]
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two)
