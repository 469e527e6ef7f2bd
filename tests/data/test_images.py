import gzip
import importlib
import sys

import numpy as np
import pytest
import torch

from sixfold.contracts import Batch
from sixfold.data import cifar10, digits, fashion_mnist
from sixfold.data._images import labelled_images
from sixfold.errors import DataError, DataMissing


def channels(images):
    std, mean = torch.std_mean(images.double(), dim=(0, 2, 3), correction=0)
    return mean, std


def test_digits_are_scikit_learns_cut_once():
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    data = digits.build()
    assert (len(data.train.inputs), len(data.validation.inputs)) == (1437, 360)
    images = torch.cat([data.train.inputs, data.validation.inputs])
    assert (float(images.min()), float(images.max())) == (0, 1)
    targets = torch.cat([data.train.targets, data.validation.targets])
    ours = np.column_stack([images.flatten(1).numpy() * 16, targets.numpy()])
    theirs = np.column_stack([pixels, labels])
    for column in (ours, theirs):
        assert column.shape == (1797, 65)
    np.testing.assert_array_equal(*(x[np.lexsort(x.T)] for x in (ours, theirs)))
    assert torch.equal(digits.build().train.inputs, data.train.inputs)


def test_both_parts_are_standardised_by_the_train_channels():
    train = Batch(torch.tensor([[0, 255], [51, 102]]).byte().view(2, 2, 1, 1), torch.tensor([0, 1]))
    validation = Batch(torch.tensor([[51, 0]]).byte().view(1, 2, 1, 1), torch.tensor([1]))
    data = labelled_images(train, validation, num_classes=2)
    # channels of train: 0 and 0.2 (mean 0.1, deviation 0.1); 1 and 0.4 (mean 0.7, deviation 0.3)
    torch.testing.assert_close(data.train.inputs.flatten(1), torch.tensor([[-1.0, 1], [1, -1]]))
    torch.testing.assert_close(data.validation.inputs.flatten(), torch.tensor([1, -7 / 3]))


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'sixfold\[images\]'"):
        digits.build()


def idx(path, magic, sizes, content):
    header = bytes(magic) + b"".join(size.to_bytes(4, "big") for size in sizes)
    path.write_bytes(gzip.compress(header + content))
    return path


def test_read_idx(tmp_path):
    content = np.arange(24, dtype=np.uint8)
    path = idx(tmp_path / "x.gz", (0, 0, 8, 3), (2, 3, 4), content.tobytes())
    found = fashion_mnist.read_idx(path, (2, 3, 4))
    assert found.dtype == torch.uint8
    np.testing.assert_array_equal(found.numpy(), content.reshape(2, 3, 4))


@pytest.mark.parametrize(
    ("magic", "sizes", "length"),
    [
        ((0, 0, 8, 1), (5,), 6),
        ((0, 0, 9, 1), (6,), 6),
        ((0, 0, 8, 1), (6,), 5),
        ((0, 0, 8, 1), (6,), 7),
    ],
)
def test_read_idx_refuses_another_file(tmp_path, magic, sizes, length):
    path = idx(tmp_path / "x.gz", magic, sizes, bytes(length))
    with pytest.raises(DataError, match=r"x\.gz does not hold bytes of shape \(6,\)"):
        fashion_mnist.read_idx(path, (6,))


@pytest.mark.parametrize("content", [b"not gzip", gzip.compress(bytes(10_000))[:-12], b""])
def test_read_idx_refuses_half_a_file(tmp_path, content):
    (tmp_path / "x.gz").write_bytes(content)
    with pytest.raises(DataError, match=r"x\.gz is not a whole gzip file|x\.gz does not hold"):
        fashion_mnist.read_idx(tmp_path / "x.gz", (6,))


@pytest.mark.parametrize(
    ("name", "file", "home"),
    [
        ("fashion_mnist", "fashion-mnist/train-images", "github.com/zalandoresearch/fashion-mnist"),
        ("cifar10", "cifar10-test/", "www.cs.toronto.edu/~kriz/cifar.html"),
        ("sst2", "sst2/train.tsv", "gluebenchmark.com/tasks"),
    ],
)
@pytest.mark.parametrize("is_set", [True, False])
def test_missing_data_says_what_where_and_whence(name, file, home, is_set, monkeypatch, tmp_path):
    monkeypatch.delenv("SIXFOLD_DATA", raising=False)
    where = "SIXFOLD_DATA is not set"
    if is_set:
        monkeypatch.setenv("SIXFOLD_DATA", str(tmp_path))
        where = str(tmp_path)
    with pytest.raises(DataMissing) as caught:
        importlib.import_module(f"sixfold.data.{name}").build()
    for part in (file, home, where, "let SIXFOLD_DATA name"):
        assert part in str(caught.value)


def save_cifar(folder, **arrays):
    (folder / "cifar10-test").mkdir(exist_ok=True)
    np.savez(folder / "cifar10-test/cifar10_test_from_bigbench.npz", **arrays)


def test_cifar_is_cut_by_class_and_keeps_colours_apart(monkeypatch, tmp_path):
    monkeypatch.setenv("SIXFOLD_DATA", str(tmp_path))
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 200, (10_000, 32, 32, 3), dtype=np.uint8)
    pixels[..., 2] //= 4
    labels = (np.arange(10_000) % 10).astype(np.uint8)
    pixels[:, 5, 7, 0] = labels * 20
    save_cifar(tmp_path, X=pixels, y=labels)
    data = cifar10.build()
    assert data.train.targets.bincount().tolist() == [800] * 10
    assert data.validation.targets.bincount().tolist() == [200] * 10
    mean, std = channels(data.train.inputs)
    torch.testing.assert_close(mean, torch.zeros(3).double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(std, torch.ones(3).double(), atol=1e-4, rtol=0)
    used = pixels[np.arange(10_000) // 10 % 5 != 4, ..., 0]
    # every fifth of a class validates: class 3 has images 3, 13, ..., so 43 is the first
    red = torch.from_numpy(pixels[[43, 93], ..., 0]).float()
    held_out = data.validation.inputs[data.validation.targets == 3][:2, 0]
    torch.testing.assert_close(held_out - held_out.mean(), (red - red.mean()) / used.std())
    # the marked pixel rises by 20 / 255 per class, so it still sits at row 5, column 7, red
    marked = data.train.inputs[:, 0, 5, 7]
    rise = marked[data.train.targets == 9].mean() - marked[data.train.targets == 0].mean()
    assert float(rise) == pytest.approx(180 / used.std(), rel=1e-4)


def test_cifar_refuses_another_file(monkeypatch, tmp_path):
    monkeypatch.setenv("SIXFOLD_DATA", str(tmp_path))
    save_cifar(tmp_path, X=np.zeros(3))
    with pytest.raises(DataError, match="holds no arrays X and y"):
        cifar10.build()
    save_cifar(tmp_path, X=np.zeros((2, 3)), y=np.zeros(2))
    with pytest.raises(DataError, match=r"not X \(2, 3\) float64 and y \(2,\) float64"):
        cifar10.build()
    (tmp_path / "cifar10-test/cifar10_test_from_bigbench.npz").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(DataError, match="holds no arrays X and y"):
        cifar10.build()


@pytest.mark.data
def test_fashion_mnist_has_its_published_mean_and_deviation():
    path = fashion_mnist.find("fashion-mnist/train-images-idx3-ubyte.gz", "")
    pixels = fashion_mnist.read_idx(path, (60_000, 28, 28)).float() / 255
    assert (round(float(pixels.mean()), 4), round(float(pixels.std()), 4)) == (0.2860, 0.3530)
    data = fashion_mnist.build()
    assert data.train.inputs.shape == (60_000, 1, 28, 28)
    assert data.validation.inputs.shape == (10_000, 1, 28, 28)
    assert data.train.targets.bincount().tolist() == [6000] * 10
    assert data.validation.targets.bincount().tolist() == [1000] * 10
    assert data.train.inputs.dtype == torch.float32
    mine = data.train.inputs[5, 0] * 0.3530 + 0.2860
    torch.testing.assert_close(mine, pixels[5], atol=2e-3, rtol=0)
    # the validation images use the constants of the train images, so theirs are only nearly 0 and 1
    mean, std = channels(data.validation.inputs)
    assert 1e-4 < abs(float(mean)) < 0.01 and 1e-4 < abs(float(std) - 1) < 0.01


@pytest.mark.data
def test_cifar_is_8000_and_2000():
    data = cifar10.build()
    assert data.train.inputs.shape == (8000, 3, 32, 32)
    assert data.validation.inputs.shape == (2000, 3, 32, 32)
    assert data.validation.targets.bincount().tolist() == [200] * 10
    both = torch.cat([data.train.inputs, data.validation.inputs]).flatten(1)
    assert len(both.unique(dim=0)) == 10_000


@pytest.mark.data
@pytest.mark.parametrize("module", [fashion_mnist, cifar10, digits])
def test_the_miniature_has_the_shape_of_the_real_set(module):
    real, small = module.build(), module.miniature()
    assert real.train.inputs.shape[1:] == small.train.inputs.shape[1:]
    assert real.train.inputs.dtype == small.train.inputs.dtype
    assert real.num_classes == small.num_classes
