import pytest
import torch

from sixfold import VisionTransformer


def model_of(**options):
    torch.manual_seed(0)
    sizes = {"image_size": 12, "patch_size": 3, "num_classes": 5, "channels": 2, "d_model": 16}
    return VisionTransformer(**{**sizes, "num_layers": 2, **options}).double().eval()


def shuffled(images, order, patch):
    """The same images with their patches in another order."""
    size = images.shape[-1]
    flat = torch.nn.functional.unfold(images, patch, stride=patch)[:, :, order]
    return torch.nn.functional.fold(flat, (size, size), patch, stride=patch)


def test_patches_are_read_row_by_row():
    model, images = model_of(), torch.randn(3, 2, 12, 12).double()
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model(images)
    for y in range(4):
        for x in range(4):
            patch = images[:, :, 3 * y : 3 * y + 3, 3 * x : 3 * x + 3].flatten(1)
            expected = patch @ model.patches.weight.flatten(1).T + model.patches.bias
            expected = expected + model.row[y, 0] + model.column[0, x]
            torch.testing.assert_close(seen[0][:, 4 * y + x], expected, rtol=0, atol=1e-12)


def test_without_positions_the_order_of_patches_is_nothing():
    model, images = model_of(), torch.randn(3, 2, 12, 12).double()
    other = shuffled(images, torch.randperm(16), 3)
    assert (model(images) - model(other)).abs().max() > 1e-3
    with torch.no_grad():
        model.row.zero_()
        model.column.zero_()
    torch.testing.assert_close(model(other), model(images), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("image", "patch"), [(28, 5), (4, 8)])
def test_an_image_that_is_no_multiple_of_the_patch_is_refused(image, patch):
    message = f"image_size must be a multiple of patch_size, got {image} and {patch}"
    with pytest.raises(ValueError, match=message):
        VisionTransformer(image, patch, 10)


@pytest.mark.parametrize("place", range(5))
def test_sizes_that_cannot_be_meant_are_named(place):
    sizes = [8, 4, 10, 1, 16]
    name = ("image_size", "patch_size", "num_classes", "channels", "d_model")[place]
    sizes[place] = 0
    with pytest.raises(ValueError, match=f"{name} must be a whole number of 1 or more, got 0"):
        VisionTransformer(*sizes)


@pytest.mark.parametrize("shape", [(1, 1, 12, 12), (1, 2, 12, 9), (2, 12, 12)])
def test_another_image_is_refused(shape):
    with pytest.raises(ValueError, match=r"images must be \(b, 2, 12, 12\), got"):
        model_of()(torch.zeros(shape))
