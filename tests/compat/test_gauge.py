"""Beliefs that listen to one another, pair by pair as the third document writes it."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import MultivariateNormal, kl_divergence
from torch.nn.functional import cross_entropy

import sixfold
from sixfold import GaugeAttention, LanguageModel
from sixfold.attention.beliefs import Update, believe
from sixfold.compat.gauge.agents import Agent, stack, tokens_as_agents
from sixfold.compat.gauge.attention import (
    KL,
    aggregate_beliefs,
    compute_kl_attention,
    compute_kl_matrix,
    transport,
)
from sixfold.geometry.frames import element

CLOSE = {"rtol": 0, "atol": 1e-11}
N, D = 6, 3
KAPPA = 0.8
COORDINATES = {"so": 3, "gl": 9}


def random(*size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*size, dtype=torch.float64, generator=generator)


def beliefs(algebra="so", n=N, seed=0, lead=()):
    """Means, well-conditioned covariances and frames."""
    root = 0.3 * random(*lead, n, D, D, seed=seed + 1).tril(-1)
    root = root + torch.diag_embed(0.7 + random(*lead, n, D, seed=seed + 2).abs())
    phi = 0.5 * random(*lead, n, COORDINATES[algebra], seed=seed + 3)
    return random(*lead, n, D, seed=seed), root @ root.mT, phi


def frame(phi, algebra):
    return torch.linalg.matrix_exp(element(phi, algebra, D).contiguous())


def pushed(omega, mean, covariance):
    moved = omega @ covariance @ omega.mT
    return omega @ mean, (moved + moved.mT) / 2


def omega_of(phi, i, j, algebra):
    return frame(phi[i], algebra) @ torch.linalg.inv(frame(phi[j], algebra))


def pair_by_pair(mu, Sigma, phi, algebra="so", kappa=KAPPA, sees=lambda i, j: True):
    """beta, means and covariances of the mixtures, by the document's loop."""
    n = len(mu)
    divergence = torch.full((n, n), math.inf, dtype=mu.dtype)
    for i in range(n):
        for j in range(n):
            if sees(i, j):
                there = pushed(omega_of(phi, i, j, algebra), mu[j], Sigma[j])
                here = MultivariateNormal(mu[i], Sigma[i])
                divergence[i, j] = kl_divergence(here, MultivariateNormal(*there))
    beta = (-divergence / kappa).softmax(-1)
    means, covariances = torch.zeros_like(mu), torch.zeros_like(Sigma)
    for i in range(n):
        parts = [pushed(omega_of(phi, i, j, algebra), mu[j], Sigma[j]) for j in range(n)]
        for j, (m, _) in enumerate(parts):
            means[i] += beta[i, j] * m
        for j, (m, s) in enumerate(parts):
            covariances[i] += beta[i, j] * (s + torch.outer(m - means[i], m - means[i]))
    return divergence, beta, means, covariances


def listener(algebra="so", **options):
    return GaugeAttention(D, frames=algebra, kappa=KAPPA, dtype=torch.float64, **options)


# ---------------------------------------------------------------- given beliefs


@pytest.mark.parametrize("algebra", ["so", "gl"])
@pytest.mark.parametrize("reach", ["full", "others"])
def test_beliefs_are_updated_pair_by_pair(algebra, reach):
    mu, Sigma, phi = beliefs(algebra)
    layer = listener(algebra, reach=reach)
    found = layer.update(mu, Sigma, phi, covariances=True, need_weights=True)
    sees = (lambda i, j: True) if reach == "full" else (lambda i, j: i != j)
    _, beta, means, covariances = pair_by_pair(mu, Sigma, phi, algebra, sees=sees)
    torch.testing.assert_close(found.weights[0, 0], beta, **CLOSE)
    torch.testing.assert_close(found.mean, means, **CLOSE)
    torch.testing.assert_close(found.covariance, covariances, **CLOSE)
    assert torch.linalg.eigvalsh(found.covariance).min() > 0


def test_only_what_was_asked_for_is_returned():
    mu, Sigma, phi = beliefs()
    found = listener().update(mu, Sigma, phi)
    assert isinstance(found, Update)
    assert found.covariance is None
    assert found.weights is None
    whole = listener().update(mu, Sigma, phi, covariances=True)
    torch.testing.assert_close(found.mean, whole.mean, **CLOSE)


def test_what_listened_can_listen_again():
    mu, Sigma, phi = beliefs("gl")
    once = listener("gl").update(mu, Sigma, phi, covariances=True)
    again = listener("gl").update(once.mean, once.covariance, phi, covariances=True)
    expected = pair_by_pair(once.mean, (once.covariance + once.covariance.mT) / 2, phi, "gl")
    torch.testing.assert_close(again.mean, expected[2], **CLOSE)
    torch.testing.assert_close(again.covariance, expected[3], **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_is_near(dtype):
    mu, Sigma, phi = beliefs()
    exact = listener().update(mu, Sigma, phi, covariances=True)
    found = listener().update(mu.to(dtype), Sigma.to(dtype), phi.to(dtype), covariances=True)
    assert found.mean.dtype == dtype
    bound = 20 * torch.finfo(dtype).eps
    assert (found.mean.double() - exact.mean).abs().max() < bound
    assert (found.covariance.double() - exact.covariance).abs().max() < bound


def test_causal_and_masked_beliefs():
    mu, Sigma, phi = beliefs()
    layer = listener()
    expected = pair_by_pair(mu, Sigma, phi, sees=lambda i, j: j <= i)
    found = layer.update(mu, Sigma, phi, is_causal=True, covariances=True)
    torch.testing.assert_close(found.mean, expected[2], **CLOSE)
    torch.testing.assert_close(found.covariance, expected[3], **CLOSE)
    torch.testing.assert_close(found.mean[0], mu[0], **CLOSE)
    real = torch.tensor([[True, True, False, True, True, False]])
    expected = pair_by_pair(mu, Sigma, phi, sees=lambda i, j: bool(real[0, j]))
    found = layer.update(mu[None], Sigma[None], phi[None], key_mask=real)
    torch.testing.assert_close(found.mean[0], expected[2], **CLOSE)


def test_who_sees_none_hears_nothing():
    mu, Sigma, phi = beliefs()
    layer = listener(reach="others")
    found = layer.update(mu, Sigma, phi, is_causal=True, covariances=True)
    assert not found.mean[0].any()
    assert not found.covariance[0].any()
    assert found.mean[1].any()


def test_heads_and_batches_do_not_meet():
    mu, Sigma, phi = beliefs(lead=(2, 4))
    layer = GaugeAttention(4 * D, 4, kappa=KAPPA, dtype=torch.float64)
    found = layer.update(mu, Sigma, phi, covariances=True, need_weights=True)
    assert found.weights.shape == (2, 4, N, N)
    for b, h in ((0, 0), (1, 2), (1, 3)):
        _, beta, means, covariances = pair_by_pair(mu[b, h], Sigma[b, h], phi[b, h])
        torch.testing.assert_close(found.weights[b, h], beta, **CLOSE)
        torch.testing.assert_close(found.mean[b, h], means, **CLOSE)
        torch.testing.assert_close(found.covariance[b, h], covariances, **CLOSE)


def test_a_factor_is_a_covariance():
    mu, Sigma, phi = beliefs()
    layer = listener()
    one = layer.update(mu, Sigma, phi, covariances=True)
    two = layer.update(mu, phi=phi, factor=torch.linalg.cholesky(Sigma), covariances=True)
    torch.testing.assert_close(one.mean, two.mean, **CLOSE)
    torch.testing.assert_close(one.covariance, two.covariance, **CLOSE)


def test_a_change_of_gauge_changes_only_how_results_are_read():
    """mu to g mu, Sigma to g Sigma g^T, U to g U, with a rotation g_i of every agent."""
    mu, Sigma, phi = beliefs()
    turn = frame(random(N, 3, seed=9), "so")
    other = [pushed(turn[i], mu[i], Sigma[i]) for i in range(N)]
    turned = torch.stack([frame_coordinates(turn[i] @ frame(phi[i], "so")) for i in range(N)])
    layer = listener()
    before = layer.update(mu, Sigma, phi, covariances=True, need_weights=True)
    after = layer.update(
        *(torch.stack(part) for part in zip(*other, strict=True)), turned,
        covariances=True, need_weights=True,
    )  # fmt: skip
    torch.testing.assert_close(after.weights, before.weights, rtol=0, atol=1e-9)
    for i in range(N):
        mean, covariance = pushed(turn[i], before.mean[i], before.covariance[i])
        torch.testing.assert_close(after.mean[i], mean, rtol=0, atol=1e-9)
        torch.testing.assert_close(after.covariance[i], covariance, rtol=0, atol=1e-9)


def frame_coordinates(rotation):
    """Coordinates in so(3) whose exponential is this rotation: axis times angle."""
    angle = math.acos(min(1.0, max(-1.0, (rotation.trace().item() - 1) / 2)))
    generator = (rotation - rotation.mT) * angle / (2 * math.sin(angle))
    return torch.stack([generator[1, 0], generator[2, 0], generator[2, 1]])


def test_an_agent_attends_to_itself_most_unless_it_is_left_out():
    """KL(q_i || q_i) = 0 is the largest logit of every row."""
    mu, Sigma, phi = beliefs()
    own = listener().update(mu, Sigma, phi, need_weights=True).weights[0, 0]
    assert torch.equal(own.argmax(-1), torch.arange(N))
    others = listener(reach="others").update(mu, Sigma, phi, need_weights=True).weights
    assert not others[0, 0].diagonal().any()
    torch.testing.assert_close(others.sum(-1), torch.ones(1, 1, N, dtype=torch.float64))


def test_gradients_reach_every_part_of_a_belief():
    mu, Sigma, phi = beliefs("gl", n=3)
    layer = listener("gl")

    def gathered(mu, raw, phi):
        symmetric = (raw + raw.mT) / 2  # what is differentiated may not leave the covariances
        found = layer.update(mu, symmetric, phi, covariances=True)
        return found.mean, found.covariance

    inputs = tuple(part.clone().requires_grad_() for part in (mu, Sigma, phi))
    assert torch.autograd.gradcheck(gathered, inputs, fast_mode=True)


def test_what_is_no_covariance_is_named():
    mu, Sigma, phi = beliefs()
    layer = listener()
    wrong = Sigma.clone()
    wrong[4] = torch.diag(torch.tensor([1.0, -1.0, 1.0]))
    with pytest.raises(ValueError, match=r"covariance must be positive definite.*\(4,\) is not"):
        layer.update(mu, wrong, phi)
    for broken, said in (
        (Sigma + torch.ones(D, D).triu(1), "symmetric"),
        (Sigma * math.nan, "finite"),
    ):
        with pytest.raises(ValueError, match=f"covariance must be {said}"):
            layer.update(mu, broken, phi)
    with pytest.raises(ValueError, match="factor must be lower triangular with a positive"):
        layer.update(mu, phi=phi, factor=-torch.linalg.cholesky(Sigma))
    with pytest.raises(ValueError, match="factor must be lower triangular"):
        layer.update(mu, phi=phi, factor=Sigma)
    with pytest.raises(ValueError, match="covariance or factor: one of them"):
        layer.update(mu, phi=phi)
    with pytest.raises(ValueError, match="covariance or factor: one of them"):
        layer.update(mu, Sigma, phi, factor=Sigma)
    with pytest.raises(ValueError, match="covariance must be positive definite"):
        compute_kl_attention(mu, wrong, phi)
    with pytest.raises(ValueError, match="covariance must be positive definite"):
        KL(mu[4], wrong[4], mu[0], Sigma[0])


def test_shapes_that_cannot_be_meant_are_named():
    mu, Sigma, phi = beliefs()
    layer = listener()
    with pytest.raises(ValueError, match=r"covariance must be \(6, 3, 3\), got \(6, 3\)"):
        layer.update(mu, mu, phi)
    with pytest.raises(ValueError, match=r"phi must be \(6, 3\), got \(6, 9\)"):
        layer.update(mu, Sigma, random(6, 9))
    with pytest.raises(ValueError, match=r"mean must be \(n, d\)"):
        layer.update(mu[0], Sigma, phi)
    with pytest.raises(ValueError, match="mean must have 2 heads of width 3, got 1 of width 3"):
        GaugeAttention(2 * D, 2).double().update(mu, Sigma, phi)
    with pytest.raises(ValueError, match="phi needs frames"):
        listener(None).update(mu, Sigma, phi)
    with pytest.raises(ValueError, match="mean, covariance and phi must share a dtype"):
        layer.update(mu, Sigma.float(), phi)
    with pytest.raises(TypeError, match="is_casual"):
        layer.update(mu, Sigma, phi, is_casual=True)


# ---------------------------------------------------------------- the layer


def test_the_layer_is_the_composition_of_its_parts():
    layer = GaugeAttention(12, 2, kappa=0.7, dtype=torch.float64)
    plain = sixfold.MultiHeadAttention(
        12, 2, dtype=torch.float64,
        projection={"name": "gaussian", "tied": True, "frames": "so"},
        score={"name": "kl", "rate": 1 / 0.7, "learned": False},
    )  # fmt: skip
    plain.load_state_dict(layer.state_dict())
    x = random(2, 5, 12)
    torch.testing.assert_close(layer(x, is_causal=True), plain(x, is_causal=True), **CLOSE)


@pytest.mark.parametrize("per", ["position", "token"])
def test_projected_beliefs_attend_as_given_ones_do(per):
    """beta of the layer against the loop over its own means, covariances and frames."""
    layer = GaugeAttention(6, 2, per=per, kappa=KAPPA, dtype=torch.float64)
    x = random(1, 5, 6)
    weights = layer(x, is_causal=True, need_weights=True)[1]
    belief = layer.projection(x, x, None, None).query
    for h in range(2):
        mu, Sigma = belief.mean[0, h], (belief.factor @ belief.factor.mT)[0, h]
        frames = belief.frame.expand(1, -1, -1, -1, -1)[0, h]
        logits = torch.full((5, 5), -math.inf, dtype=torch.float64)
        for i in range(5):
            for j in range(i + 1):
                omega = frames[i] @ torch.linalg.inv(frames[j])
                moved = MultivariateNormal(*pushed(omega, mu[j], Sigma[j]))
                here = MultivariateNormal(mu[i], Sigma[i])
                logits[i, j] = -kl_divergence(here, moved) / KAPPA
        torch.testing.assert_close(weights[0, h], logits.softmax(-1), **CLOSE)


def test_kappa():
    layer = GaugeAttention(12, 3)
    torch.testing.assert_close(layer.kappa, torch.full((3,), 2.0))
    assert not any("rate" in name for name, _ in layer.named_parameters())
    learned = GaugeAttention(12, 3, kappa=0.5, learn_kappa=True)
    torch.testing.assert_close(learned.kappa, torch.full((3,), 0.5))
    learned(torch.randn(2, 5, 12)).square().sum().backward()
    assert learned.score.log_rate.grad.all()
    for wrong in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="kappa must be positive"):
            GaugeAttention(12, 3, kappa=wrong)


def test_a_cold_agent_hears_itself_and_a_hot_one_the_mean():
    mu, Sigma, phi = beliefs()
    cold = GaugeAttention(D, kappa=1e-3).double().update(mu, Sigma, phi)
    torch.testing.assert_close(cold.mean, mu, **CLOSE)
    hot = compute_kl_attention(mu, Sigma, phi, kappa=1e9)
    torch.testing.assert_close(
        hot, torch.full((N, N), 1 / N, dtype=torch.float64), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("per", ["position", "token"])
def test_a_language_model_of_beliefs_learns_by_backpropagation(per):
    model = LanguageModel(
        11, 16, 16, 2, positions="learned",
        attention={
            "num_heads": 2,
            "projection": {"name": "gaussian", "tied": True, "frames": "so", "per": per},
            "score": "kl",
        },
    )  # fmt: skip
    ids = torch.arange(12).remainder(4).repeat(4, 1) + torch.arange(4)[:, None]
    adam, losses = torch.optim.Adam(model.parameters(), lr=1e-2), []
    for _ in range(30):
        loss = cross_entropy(model(ids[:, :-1]).transpose(1, 2), ids[:, 1:])
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    parameters = dict(model.named_parameters())
    assert all(p.grad.any() for p in parameters.values() if p.grad is not None)
    assert all(p.grad is not None for p in parameters.values())


def test_low_layers_may_attend_locally_and_high_ones_globally():
    """Interpretation A of the document: a reach per layer, with any score."""
    for score in ("dot", "kl"):
        projection = "linear" if score == "dot" else "gaussian"
        shared = {"num_heads": 2, "score": score, "projection": projection}
        layers = [{**shared, "reach": {"name": "window", "width": 3}}, {**shared, "reach": "full"}]
        model = LanguageModel(11, 16, 8, 2, layers, positions="learned")
        x = torch.randn(1, 9, 8)
        seen = [block.attention(x, is_causal=True, need_weights=True)[1] for block in model.blocks]
        far = torch.ones(9, 9).tril(-3).bool()
        assert not seen[0][..., far].any()
        assert seen[1][..., far].all()


# ---------------------------------------------------------------- the document's names


def test_transport_takes_one_frame_to_another():
    _, _, phi = beliefs()
    one, two = transport(phi[0], phi[1]), transport(phi[1], phi[2])
    torch.testing.assert_close(one, omega_of(phi, 0, 1, "so"), **CLOSE)
    torch.testing.assert_close(one @ two, transport(phi[0], phi[2]), **CLOSE)  # no holonomy
    torch.testing.assert_close(one @ one.mT, torch.eye(3, dtype=torch.float64), **CLOSE)
    torch.testing.assert_close(
        transport(phi[0], phi[0]), torch.eye(3, dtype=torch.float64), **CLOSE
    )
    wide = random(2, 9)
    expected = frame(wide[0], "gl") @ torch.linalg.inv(frame(wide[1], "gl"))
    torch.testing.assert_close(transport(wide[0], wide[1], "gl"), expected, **CLOSE)
    with pytest.raises(ValueError, match="phi_i has 4 coordinates"):
        transport(random(4), random(4))
    with pytest.raises(ValueError, match="unknown algebra 'sl'"):
        transport(phi[0], phi[1], "sl")
    with pytest.raises(ValueError, match="phi_i has 3 coordinates, phi_j 1"):
        transport(random(3), random(1))


def test_beliefs_are_aggregated_over_all_pairs():
    mu, _, phi = beliefs()
    for frames in (None, phi):
        with pytest.raises(ValueError, match=r"beta must be \(..., n, n\) beside mu"):
            aggregate_beliefs(mu, torch.ones(len(mu), 1).double(), frames)


def test_the_divergence_is_that_of_the_standard_library():
    mu, Sigma, _ = beliefs()
    expected = kl_divergence(
        MultivariateNormal(mu[:3], Sigma[:3]), MultivariateNormal(mu[3:], Sigma[3:])
    )
    torch.testing.assert_close(KL(mu[:3], Sigma[:3], mu[3:], Sigma[3:]), expected, **CLOSE)


def test_the_documents_loop_over_pairs():
    """Its five lines with its own names, the divergence as a call."""
    mu, Sigma, phi = beliefs()
    kappa = KAPPA
    all_pairs = [(i, j) for i in range(N) for j in range(N)]
    kl = torch.empty(N, N, dtype=torch.float64)
    for i, j in all_pairs:
        Omega_ij = transport(phi[i], phi[j])
        kl[i, j] = KL(mu[i], Sigma[i], Omega_ij @ mu[j], Omega_ij @ Sigma[j] @ Omega_ij.T)
    beta = torch.softmax(-kl / kappa, dim=-1)
    torch.testing.assert_close(compute_kl_matrix(mu, Sigma, phi), kl, **CLOSE)
    torch.testing.assert_close(compute_kl_attention(mu, Sigma, phi, kappa), beta, **CLOSE)
    mean = torch.stack(
        [sum(beta[i, j] * transport(phi[i], phi[j]) @ mu[j] for j in range(N)) for i in range(N)]
    )
    torch.testing.assert_close(aggregate_beliefs(mu, beta, phi), mean, **CLOSE)
    torch.testing.assert_close(listener().update(mu, Sigma, phi).mean, mean, **CLOSE)


def test_the_transport_written_in_the_document_would_mix_frames():
    """Omega_ji mu_j turns mu_j away from the frame of i: a change of gauge would change the sum."""
    mu, _, phi = beliefs(n=2)
    beta = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    turn = frame(random(2, 3, seed=9), "so")
    turned = torch.stack([frame_coordinates(turn[i] @ frame(phi[i], "so")) for i in range(2)])
    moved = torch.stack([turn[i] @ mu[i] for i in range(2)])

    def written(mu, phi):
        return transport(phi[1], phi[0]) @ mu[1]

    right = aggregate_beliefs(moved, beta, turned)[0]
    torch.testing.assert_close(
        right, turn[0] @ aggregate_beliefs(mu, beta, phi)[0], rtol=0, atol=1e-9
    )
    assert not torch.allclose(written(moved, turned), turn[0] @ written(mu, phi), atol=0.1)


def test_batches_of_agents():
    mu, Sigma, phi = beliefs(lead=(2,))
    beta = compute_kl_attention(mu, Sigma, phi, KAPPA, is_causal=True)
    for b in range(2):
        _, expected, means, _ = pair_by_pair(mu[b], Sigma[b], phi[b], sees=lambda i, j: j <= i)
        torch.testing.assert_close(beta[b], expected, **CLOSE)
        torch.testing.assert_close(aggregate_beliefs(mu, beta, phi)[b], means, **CLOSE)
    torch.testing.assert_close(
        compute_kl_matrix(mu, Sigma)[1], pair_by_pair(mu[1], Sigma[1], 0 * phi[1])[0], **CLOSE
    )
    torch.testing.assert_close(aggregate_beliefs(mu, beta), beta @ mu, **CLOSE)


def test_agents_are_tokens_with_a_position():
    mu, Sigma, phi = beliefs()
    agents = tokens_as_agents(mu, Sigma, phi)
    assert [agent.pos for agent in agents] == list(range(N))
    assert agents[2]._fields == ("mu", "Sigma", "phi", "pos")
    for found, part in zip(stack(agents[::-1]), (mu, Sigma, phi), strict=True):
        assert torch.equal(found, part)
    alone = Agent(mu[0], Sigma[0], phi[0], pos=0)
    torch.testing.assert_close(
        aggregate_beliefs(*stack([alone])[:1], torch.ones(1, 1).double()), mu[:1]
    )
    with pytest.raises(ValueError, match="agents must hold one or more"):
        stack([])


def test_a_belief_is_lifted_to_a_batch_and_heads():
    mu, Sigma, phi = beliefs()
    belief = believe(mu, Sigma, phi)
    assert belief.mean.shape == (1, 1, N, D)
    assert belief.factor.shape == belief.frame.shape == (1, 1, N, D, D)
    assert believe(mu[None].expand(4, N, D), Sigma.expand(4, N, D, D)).mean.shape == (4, 1, N, D)


@pytest.mark.parametrize("algebra", ["so", "gl"])
def test_settling_ends_where_the_free_energy_has_no_slope(algebra):
    """F_i = strength KL(q || q_i) + sum_j beta_ij KL(q || Omega_ij q_j), by automatic derivatives."""
    layer, strength = listener(algebra, reach="others"), 0.6
    mu, Sigma, phi = beliefs(algebra)
    beta = layer.update(mu, Sigma, phi, need_weights=True).weights[0, 0].detach()
    found = layer.settle(mu, Sigma, phi, strength=strength)
    moved = {
        (i, j): pushed(omega_of(phi, i, j, algebra), mu[j], Sigma[j])
        for i in range(N)
        for j in range(N)
    }
    for i in range(N):
        mean = found.mean[i].detach().clone().requires_grad_()
        root = torch.linalg.cholesky(found.covariance[i].detach()).requires_grad_()
        q = MultivariateNormal(mean, scale_tril=root)
        energy = strength * kl_divergence(q, MultivariateNormal(mu[i], Sigma[i]))
        for j in range(N):
            energy = energy + beta[i, j] * kl_divergence(q, MultivariateNormal(*moved[i, j]))
        by_mean, by_root = torch.autograd.grad(energy, (mean, root))
        for slope in (by_mean, by_root.tril()):
            torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-9)


def test_settling_keeps_the_belief_of_who_sees_none():
    layer = listener(reach="others")
    mu, Sigma, phi = beliefs()
    found = layer.settle(mu, Sigma, phi, is_causal=True)
    torch.testing.assert_close(found.mean[0], mu[0], **CLOSE)
    torch.testing.assert_close(found.covariance[0], Sigma[0], **CLOSE)
    assert not torch.allclose(found.mean[1], mu[1])


def test_a_strength_that_is_not_positive_is_refused():
    mu, Sigma, phi = beliefs()
    with pytest.raises(ValueError, match="strength must be positive and finite, got 0"):
        listener().settle(mu, Sigma, phi, strength=0.0)


def test_a_centre_changes_nothing_of_what_is_believed():
    layer = listener()
    mu, Sigma, phi = beliefs()
    before = layer.settle(mu, Sigma, phi), layer.update(mu, Sigma, phi)
    layer.recenter_(random(1, 9, D, seed=5) + 2)
    after = layer.settle(mu, Sigma, phi), layer.update(mu, Sigma, phi)
    for one, two in zip(before, after, strict=True):
        torch.testing.assert_close(two.mean, one.mean, **CLOSE)
    torch.testing.assert_close(after[0].covariance, before[0].covariance, **CLOSE)


def test_settling_is_wide_inside():
    layer = listener().float()
    mu, Sigma, phi = (part.to(torch.bfloat16) for part in beliefs())
    found = layer.settle(mu, Sigma, phi)
    exact = layer.settle(mu.float(), Sigma.float(), phi.float())
    assert found.mean.dtype == torch.bfloat16
    torch.testing.assert_close(found.mean.float(), exact.mean, rtol=0.01, atol=0.01)
