"""Moments of tokens: what they hold, and what the mean of several describes."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import MultivariateNormal, kl_divergence

from sixfold.attention import moments as M
from sixfold.contracts import Belief

D = 3


def belief(*, frames: bool) -> Belief:
    """Random beliefs (2, 2, 5, d)."""
    shape = (2, 2, 5, D, D)
    factor = torch.randn(shape, dtype=torch.float64).tril(-1)
    factor = factor + torch.diag_embed(0.5 + torch.rand(shape[:-1], dtype=torch.float64))
    mean = torch.randn(shape[:-1], dtype=torch.float64)
    if not frames:
        return Belief(mean, factor)
    turn = 0.3 * torch.randn(shape, dtype=torch.float64)
    frame = torch.matrix_exp(turn)
    return Belief(mean, factor, frame, frame.inverse(), turn.diagonal(dim1=-2, dim2=-1).sum(-1))


def gaussian(mean, factor) -> MultivariateNormal:
    return MultivariateNormal(mean, scale_tril=factor)


@pytest.mark.parametrize("frames", [False, True])
def test_beliefs_come_back_in_the_frame_they_share(frames):
    torch.manual_seed(0)
    given = belief(frames=frames)
    found = M.described(M.moments(given, "belief"), "belief", D, torch.float64)
    mean, root = given.mean, given.factor
    if frames:
        mean, root = (given.inverse @ mean[..., None])[..., 0], given.inverse @ root
    torch.testing.assert_close(found.mean, mean, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.factor @ found.factor.mT, root @ root.mT, rtol=0, atol=1e-12)


@pytest.mark.parametrize("frames", [False, True])
def test_the_divergence_is_that_of_torch_distributions_both_ways(frames):
    torch.manual_seed(0)
    moments = M.moments(belief(frames=frames), "belief")
    one, other = moments[:, :, :-1], moments[:, :, 1:]
    p, q = (gaussian(*M.described(x, "belief", D, torch.float64)[:2]) for x in (one, other))
    expected = kl_divergence(p, q) + kl_divergence(q, p)
    torch.testing.assert_close(M.divergence(one, other, "belief", D), expected, rtol=1e-10, atol=0)


def test_a_diagonal_belief_is_a_full_one_with_a_diagonal_factor():
    torch.manual_seed(0)
    mean, std = torch.randn(1, 1, 6, D).double(), (0.5 + torch.rand(1, 1, 6, D)).double()
    narrow = M.moments(Belief(mean, std), "diagonal belief")
    full = M.moments(Belief(mean, torch.diag_embed(std)), "belief")
    found = M.divergence(narrow[:, :, 1:], narrow[:, :, :-1], "diagonal belief", D)
    expected = M.divergence(full[:, :, 1:], full[:, :, :-1], "belief", D)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_points_are_gaussians_with_unit_covariance():
    torch.manual_seed(0)
    point = torch.randn(1, 1, 6, D, dtype=torch.float64)
    unit = Belief(point, torch.eye(D, dtype=torch.float64).expand(1, 1, 6, D, D))
    full = M.moments(unit, "belief")
    found = M.divergence(point[:, :, 1:], point[:, :, :-1], "point", D)
    expected = M.divergence(full[:, :, 1:], full[:, :, :-1], "belief", D)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_the_mean_of_moments_is_the_closest_gaussian_to_the_mixture():
    torch.manual_seed(0)
    given = belief(frames=False)
    mixed = M.described(
        M.moments(given, "belief").mean(2, keepdim=True), "belief", D, torch.float64
    )
    draws = torch.stack([gaussian(given.mean, given.factor).sample() for _ in range(20_000)])
    samples = draws.movedim(0, 3).flatten(2, 3)[0, 0]
    torch.testing.assert_close(samples.mean(0), mixed.mean[0, 0, 0], rtol=0, atol=0.03)
    covariance = (mixed.factor @ mixed.factor.mT)[0, 0, 0]
    torch.testing.assert_close(samples.T.cov(), covariance, rtol=0, atol=0.06)


def test_the_mean_of_diagonal_moments_is_the_mixture_of_each_coordinate():
    """Own variances and the spread between tokens: those at 0 and 2 with variance 1 have 2."""
    mean, std = torch.tensor([[0.0], [2.0]]).double(), torch.ones(2, 1).double()
    mixed = M.moments(Belief(mean, std), "diagonal belief").mean(0)
    found = M.described(mixed, "diagonal belief", 1, torch.float64)
    assert found.mean.item() == 1
    assert found.factor.item() == pytest.approx(2**0.5, rel=1e-15)


@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_a_covariance_that_rounding_left_indefinite_has_a_factor(scale):
    mean = torch.full((1, 1, 1, 2), scale, dtype=torch.float64)
    factor = torch.tensor([[[[[1.0, 0.0], [1.0, 1e-8]]]]], dtype=torch.float64)
    found = M.described(M.moments(Belief(mean, factor), "belief"), "belief", 2, torch.float64)
    assert found.factor.isfinite().all()
    torch.testing.assert_close(
        found.factor @ found.factor.mT, factor @ factor.mT, rtol=1e-13 * scale**2, atol=0
    )


@pytest.mark.parametrize("schema", ["point", "diagonal belief", "belief"])
def test_empty_places_describe_something_finite(schema):
    empty = torch.zeros(1, 1, 2, M.width(schema, D))
    found = M.described(empty, schema, D, torch.float32)
    parts = [found] if schema == "point" else found[:2]
    assert all(part.isfinite().all() for part in parts)
    assert M.divergence(empty, empty, schema, D).abs().max() < 1e-6


def test_what_overflows_is_the_largest_number():
    far = torch.full((1, D), 1e30)
    assert M.divergence(far, -far, "point", D).tolist() == [torch.finfo(torch.float32).max]
    mean = torch.tensor([0.0, 1e160], dtype=torch.float64)[:, None]  # whose square overflows
    one, other = M.moments(Belief(mean, torch.ones(2, 1, 1).double()), "belief")
    assert M.divergence(one, other, "belief", 1) == torch.finfo(torch.float64).max


@pytest.mark.parametrize("schema", ["diagonal belief", "belief"])
def test_a_narrow_belief_far_from_the_origin_comes_back_to_the_last_digits(schema):
    torch.manual_seed(0)
    mean = 1e4 + torch.randn(1, 1, 6, D, dtype=torch.float64)
    std = 1e-4 * (1 + torch.rand(1, 1, 6, D, dtype=torch.float64))
    factor = std if schema == "diagonal belief" else torch.diag_embed(std)
    found = M.described(M.moments(Belief(mean, factor), schema), schema, D, torch.float64)
    torch.testing.assert_close(found.factor, factor, rtol=1e-12, atol=0)


def test_what_has_no_covariance_is_not_a_number():
    torch.manual_seed(0)
    given = belief(frames=False)
    given.factor[0, 0, 0] = torch.nan
    found = M.described(M.moments(given, "belief"), "belief", D, torch.float64).factor
    assert found[0, 0, 0].isnan().any()
    assert found.flatten(0, 2)[1:].isfinite().all()
