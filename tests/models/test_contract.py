"""What every model owes, whatever its kind."""

import inspect

import pytest
import torch

from sixfold import discover, models
from sixfold.data import digits, heat, shakespeare, sst2
from sixfold.models._block import Block
from sixfold.train.objective import loss
from sixfold.train.optimizer import OptimizerSettings, build_optimizer
from sixfold.train.step import StepSettings, train_step

SHARED = {"d_model", "num_layers", "attention", "mlp_ratio"}
DATA = {"language": shakespeare, "classifier": sst2, "vision": digits, "simulator": heat}


def test_the_kinds_are_the_public_files():
    assert discover.names("sixfold.models") == (
        "classifier", "graph", "language", "node", "simulator", "vision",
    )  # fmt: skip


def test_the_options_that_all_models_share(kind):
    assert set(inspect.signature(discover.load("sixfold.models", kind)).parameters) >= SHARED


def test_every_parameter_gets_a_finite_gradient(kind, tiny, inputs):
    tiny(inputs).square().sum().backward()
    for name, parameter in tiny.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_rows_of_a_batch_are_independent(kind, tiny, inputs):
    tiny.double()
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    whole = tiny(inputs)
    alone = torch.cat([tiny(row[None]) for row in inputs])
    torch.testing.assert_close(whole, alone, rtol=0, atol=1e-12)


def test_evaluation_is_deterministic_to_the_bit(kind, tiny, inputs):
    tiny.eval()
    assert torch.equal(tiny(inputs), tiny(inputs))


def test_bfloat16_is_near_single_precision(kind, tiny, inputs):
    tiny.eval()
    single = tiny(inputs)
    half = inputs.bfloat16() if inputs.is_floating_point() else inputs
    # 8 bits of mantissa, a rounding in each of some 30 operations in a row, on values near 1
    torch.testing.assert_close(tiny.bfloat16()(half).float(), single, rtol=0, atol=30 * 2**-8)


def test_layers_may_attend_differently(kind, tiny, inputs):
    layers = [
        {"num_heads": 4, "score": "cosine"},
        {"num_heads": 2, "reach": {"name": "window", "width": 3}},
    ]
    model = models.build(kind, {**tiny.arguments, "attention": layers})
    first, second = (m.attention for m in model.modules() if isinstance(m, Block))
    assert (first.heads.num_heads, second.heads.num_heads) == (4, 2)
    assert type(first.score).__name__ == "Cosine"
    assert second.reach.width == 3
    assert model(inputs).shape == tiny(inputs).shape


def test_wrong_options_are_named(kind, tiny):
    with pytest.raises(ValueError, match=r"unknown mixer 'hexagonl'.*Did you mean 'hexagonal'"):
        models.build(kind, {**tiny.arguments, "attention": {"num_heads": 4, "mixer": "hexagonl"}})
    with pytest.raises(ValueError, match=r"unknown option 'mixr'.*Did you mean 'mixer'"):
        models.build(kind, {**tiny.arguments, "attention": {"num_heads": 4, "mixr": "none"}})
    with pytest.raises(ValueError, match="attention lists 1 layers, num_layers is 2"):
        models.build(kind, {**tiny.arguments, "attention": [{"num_heads": 2}]})
    with pytest.raises(ValueError, match="num_layers must be a whole number of 1 or more, got 0"):
        models.build(kind, {**tiny.arguments, "num_layers": 0})
    with pytest.raises(
        ValueError, match="attention must be options like {'num_heads': 4}, got None"
    ):
        models.build(kind, {**tiny.arguments, "attention": None})


def test_it_learns_its_miniature(kind, tiny):
    data = DATA[kind].miniature()
    own = {
        "language": lambda: {"vocab_size": data.vocab_size, "context": data.context},
        "classifier": lambda: {"vocab_size": data.tokenizer.vocab_size},
    }
    torch.manual_seed(0)
    model = models.build(kind, {**tiny.arguments, **own.get(kind, dict)()})
    optimizer = build_optimizer(model, OptimizerSettings(learning_rate=5e-3))
    batch = next(data.validation_batches(64))
    with torch.no_grad():
        before = loss(data.objective, model, batch).item()
    for step in range(40):
        train_step(model, optimizer, data.train_batch(0, step, 16), StepSettings(data.objective))
    with torch.no_grad():
        after = loss(data.objective, model, batch).item()
    assert after < 0.6 * before
