import math

import numpy as np
import pytest
import torch

from sixfold.data import fusion
from sixfold.errors import DataError


def sequences(count=3, seed=0, **options):
    return fusion.draw(np.random.default_rng(seed), count, **options)


def test_the_posterior_is_that_of_a_grid_by_brute_force():
    """Prior times likelihoods on a fine grid of the hidden value, normalised by their sum."""
    values, rounds = 3, 4
    readings, _ = sequences(values=values, rounds=rounds)
    found = fusion.posterior(readings, values)
    grid = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    for sequence, beliefs in zip(readings, found, strict=True):
        for token, belief in enumerate(beliefs):
            log_density = -(grid**2) / 2
            for reading, log_deviation in sequence[token % values :: values]:
                log_density = log_density - ((reading - grid) / log_deviation.exp()) ** 2 / 2
            density = log_density.softmax(0)
            mean = (density * grid).sum()
            deviation = (density * (grid - mean) ** 2).sum().sqrt()
            torch.testing.assert_close(
                belief, torch.stack([mean, deviation.log()]), rtol=0, atol=1e-7
            )


def test_the_posterior_is_that_of_the_joint_gaussian():
    """All hidden values at once, conditioned on all readings by one matrix."""
    values, rounds = 4, 3
    readings, _ = sequences(values=values, rounds=rounds, seed=1)
    measures = torch.eye(values).double().repeat(rounds, 1)
    for sequence, beliefs in zip(readings, fusion.posterior(readings, values), strict=True):
        noise = torch.diag(torch.exp(2 * sequence[:, 1]))
        gain = torch.linalg.solve(measures @ measures.T + noise, measures).T
        mean, covariance = gain @ sequence[:, 0], torch.eye(values) - gain @ measures
        known = torch.stack([mean, 0.5 * covariance.diagonal().log()], dim=-1)
        torch.testing.assert_close(beliefs[:values], known)
        torch.testing.assert_close(beliefs[values:], beliefs[:-values])


def test_no_other_weights_come_closer():
    """Against the hidden values: the posterior's own variance, and less than other powers of p."""
    readings, hidden = sequences(20_000, seed=2)
    mean, log_deviation = fusion.posterior(readings, 4).unbind(-1)
    best = (mean - hidden).square().mean()
    assert float(best) == pytest.approx(float(torch.exp(2 * log_deviation).mean()), rel=0.03)
    reading, log_noise = readings.unflatten(1, (8, 4)).unbind(-1)
    for power in (0.0, 0.7, 1.3):
        weight = torch.exp(-2 * power * log_noise)
        total = torch.exp(-2 * log_noise).sum(1)
        guess = (weight * reading).sum(1) / weight.sum(1) * total / (1 + total)
        assert (guess.repeat(1, 8) - hidden).square().mean() > 1.02 * best


def test_readings_are_as_noisy_as_they_say():
    readings, hidden = sequences(20_000, seed=3, quietest=0.2, loudest=0.8)
    noise = (readings[..., 0] - hidden) / readings[..., 1].exp()
    assert abs(float(noise.mean())) < 0.01 and float(noise.var()) == pytest.approx(1, abs=0.01)
    assert math.log(0.2) <= float(readings[..., 1].min()) < math.log(0.201)
    assert math.log(0.799) < float(readings[..., 1].max()) <= math.log(0.8)
    assert float(readings[..., 1].mean()) == pytest.approx(math.log(0.4), abs=0.01)
    assert torch.equal(hidden[:, :4].repeat(1, 8), hidden)
    assert float(hidden[:, :4].var()) == pytest.approx(1, abs=0.02)


def test_a_perfect_and_a_useless_sensor():
    readings = torch.tensor([[0.75, -20.0], [5.0, 0.0]]).double()
    assert float(fusion.posterior(readings, 1)[1, 0]) == pytest.approx(0.75, abs=1e-9)
    readings = torch.tensor([[9.0, 20.0], [1.0, 0.0]]).double()
    torch.testing.assert_close(
        fusion.posterior(readings, 1)[0], torch.tensor([0.5, -0.5 * math.log(2)]).double()
    )


def test_order_within_a_value_does_not_matter():
    readings, _ = sequences(seed=4)
    order = torch.arange(32).view(8, 4).flip(0).flatten()
    torch.testing.assert_close(
        fusion.posterior(readings[:, order], 4), fusion.posterior(readings, 4)
    )


def test_targets_are_the_posterior_and_parts_do_not_overlap():
    data = fusion.build(sequences=10, values=2, rounds=5, seed=6)
    assert (len(data.train.inputs), len(data.validation.inputs)) == (8, 2)
    for inputs, targets in (data.train, data.validation):
        known = fusion.posterior(inputs.double(), 2)
        torch.testing.assert_close(targets.double(), known, atol=1e-5, rtol=1e-4)
    readings, _ = sequences(10, seed=6, values=2, rounds=5)
    together = torch.cat([data.train.inputs, data.validation.inputs])
    assert torch.equal(together, readings.float())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequences": 1}, "sequences must be at least 2, not 1"),
        ({"values": 0}, "values must be at least 1, not 0"),
        ({"rounds": 0}, "rounds must be at least 1, not 0"),
        ({"quietest": 0.0}, "not 0.0 and 3.0"),
        ({"quietest": 2.0, "loudest": 1.0}, "not 2.0 and 1.0"),
        ({"loudest": math.inf}, "not 0.1 and inf"),
    ],
)
def test_impossible_requests(options, message):
    with pytest.raises(DataError, match=message):
        fusion.build(**options)


def test_readings_that_are_not_in_turn():
    with pytest.raises(DataError, match="7 readings cannot be of 2 values in turn"):
        fusion.posterior(torch.zeros(7, 2), 2)
