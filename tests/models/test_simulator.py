import pytest
import torch

from sixfold import PhysicsSimulator
from sixfold.models.simulator import torus_offsets

PARTS = {
    "linear": {"num_heads": 4},
    "hexagonal": {"num_heads": 7, "head_dim": 4, "projection": "coordinate", "mixer": "hexagonal"},
    "cosine": {"num_heads": 4, "score": "cosine", "num_kv_heads": 2},
}


def model_of(attention="linear", **options):
    torch.manual_seed(0)
    sizes = {"channels": 2, "grid_size": 8, "patch": 2, "d_model": 16, "num_layers": 2}
    model = PhysicsSimulator(**{**sizes, "attention": PARTS[attention], **options}).double()
    for offsets in model.offsets:
        torch.nn.init.normal_(offsets)
    torch.nn.init.normal_(model.head.weight)
    return model


def test_offsets_are_differences_on_the_torus():
    side = 3
    found = torus_offsets(side)
    for i in range(9):
        for j in range(9):
            dy, dx = (j // side - i // side) % side, (j % side - i % side) % side
            assert found[i, j] == dy * side + dx


@pytest.mark.parametrize("patch", [1, 2, 4])
@pytest.mark.parametrize("attention", PARTS)
def test_a_shifted_field_is_answered_by_the_shifted_answer(attention, patch):
    model, field = model_of(attention, patch=patch), torch.randn(2, 2, 8, 8).double()
    for shift in ((patch, 0), (0, -patch), (3 * patch, 2 * patch)):
        moved = model(field.roll(shift, (2, 3)))
        torch.testing.assert_close(moved, model(field).roll(shift, (2, 3)), rtol=0, atol=1e-11)


def test_directions_are_told_apart():
    model, field = model_of(), torch.randn(1, 2, 8, 8).double()
    for mirrored in (field.flip(2), field.flip(3), field.transpose(2, 3)):
        assert (model(mirrored).sum() - model(field).sum()).abs() > 1e-3


def test_a_rollout_is_repeated_application():
    model, field = model_of(), torch.randn(3, 2, 8, 8).double()
    with torch.no_grad():
        film = model.rollout(field, 4)
        for frame in film.unbind(1):
            field = model(field)
            assert torch.equal(frame, field)
    assert film.shape == (3, 4, 2, 8, 8)
    with pytest.raises(ValueError, match="steps must be 1 or more, got 0"):
        model.rollout(field, 0)


def test_without_a_head_nothing_changes():
    model, field = model_of(), torch.randn(1, 2, 8, 8).double()
    with torch.no_grad():
        model.head.weight.zero_()
    assert torch.equal(model(field), field)


def test_a_fresh_model_changes_little():
    torch.manual_seed(0)
    field = torch.randn(4, 1, 16, 16)
    change = PhysicsSimulator(channels=1, grid_size=16)(field) - field
    assert 0 < change.std() < 0.5


@pytest.mark.parametrize(("grid", "patch"), [(9, 2), (8, 0), (0, 1)])
def test_a_grid_that_is_no_multiple_of_the_patch_is_refused(grid, patch):
    message = f"grid_size must be a multiple of patch, got {grid} and {patch}"
    with pytest.raises(ValueError, match=message):
        PhysicsSimulator(1, grid, patch)


def test_another_field_is_refused():
    with pytest.raises(ValueError, match=r"fields must be \(b, 2, 8, 8\), got \(1, 1, 8, 8\)"):
        model_of()(torch.zeros(1, 1, 8, 8))
