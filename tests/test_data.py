"""Data sets, with small files in the real formats."""

import dataclasses
import hashlib
import pickle
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10

from kafnb import load_data
from kafnb.data import _cifar10, _folder


def test_digits(digits):
    assert digits.x_train.shape == (1437, 1, 8, 8) and digits.x_test.shape == (360, 1, 8, 8)
    assert digits.x_train.dtype == torch.uint8 and digits.x_train.max() == 255 and digits.num_classes == 10
    assert torch.bincount(digits.y_test).min() >= 34  # stratified
    x, y = digits.test(5)
    assert x.shape == (5, 1, 8, 8) and x.min() >= 0 and x.max() <= 1 and len(y) == 5


def test_validation_split_keeps_the_test_set_out(digits):
    held = digits.validation_split(0.1)
    assert len(held.x_train) + len(held.x_test) == len(digits.x_train)
    assert torch.equal(torch.cat([held.x_train, held.x_test]), digits.x_train)
    assert held.fingerprint != digits.fingerprint and held.name != digits.name


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """CIFAR-10's own archive layout with 4 images a batch, and checksums to match."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)

    def batch(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    def images():
        return {"data": rng.integers(0, 256, (4, 3072), dtype=np.uint8), "labels": [0, 3, 9, 1]}

    train = [batch(f"data_batch_{i}", images()) for i in range(1, 6)]
    test = [batch("test_batch", images())]
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    meta = batch("batches.meta", {"label_names": names})
    monkeypatch.setattr(CIFAR10, "train_list", train)
    monkeypatch.setattr(CIFAR10, "test_list", test)
    monkeypatch.setattr(CIFAR10, "meta", {"filename": meta[0], "key": "label_names", "md5": meta[1]})
    return tmp_path


def test_cifar10_from_its_real_format(cifar):
    data = _cifar10(cifar)
    assert data.x_train.shape == (20, 3, 32, 32) and data.x_test.shape == (4, 3, 32, 32)
    assert data.classes[3] == "cat" and data.y_test.tolist() == [0, 3, 9, 1]
    raw = pickle.loads((cifar / "cifar-10-batches-py" / "test_batch").read_bytes())["data"]
    assert torch.equal(data.x_test.flatten(1), torch.from_numpy(raw))  # channels first, rows in order


def test_damaged_cifar10_is_not_used(cifar, monkeypatch):
    def no_network(self):
        if not self._check_integrity():
            raise OSError("no network")

    monkeypatch.setattr(CIFAR10, "download", no_network)
    assert len(_cifar10(cifar).x_test) == 4
    file = cifar / "cifar-10-batches-py" / "test_batch"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(FileNotFoundError, match="data_root") as error:
        _cifar10(cifar)
    assert "\n" not in str(error.value)
    with tarfile.open(cifar / "x.tar", "w"):  # an archive in the wrong place changes nothing
        pass
    with pytest.raises(FileNotFoundError):
        _cifar10(cifar)


@pytest.fixture
def tree(tmp_path):
    for part, n in (("train", 3), ("test", 2)):
        for c, name in enumerate(("cat", "dog")):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(n):
                pixels = np.full((9, 9, 3), 40 * c + i, np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / name / f"{i}.png")
    return tmp_path


def test_folder(tree):
    data = load_data(f"folder:{tree}")
    assert data.x_train.shape == (6, 3, 9, 9) and data.classes == ("cat", "dog") and data.name == f"folder:{tree.name}"
    assert sorted(data.x_test[:, 0, 0, 0].tolist()) == [0, 1, 40, 41]
    assert torch.equal(data.y_test, (data.x_test[:, 0, 0, 0] >= 40).long())  # each image kept its label


def test_the_first_images_of_a_folder_are_of_all_classes(tmp_path):
    """ImageFolder sorts by class; scored on the first n, that would be one class alone."""
    for part, n in (("train", 40), ("test", 20)):
        for c in range(3):
            (tmp_path / part / str(c)).mkdir(parents=True)
            for i in range(n):
                Image.new("RGB", (4, 4), (80 * c + i, 0, 0)).save(tmp_path / part / str(c) / f"{i}.png")
    data = _folder(tmp_path)
    assert set(data.test(20)[1].tolist()) == set(data.validation_split(0.2).y_test.tolist()) == {0, 1, 2}
    assert torch.equal(data.x_train[:, 0, 0, 0].long() // 80, data.y_train)
    assert torch.equal(data.x_train, _folder(tmp_path).x_train)  # the same order every time


def test_test_images_of_another_size_are_refused():
    data = load_data("digits")
    with pytest.raises(ValueError, match=r"one size, got \(1, 8, 8\) and \(1, 4, 4\)"):
        dataclasses.replace(data, x_test=data.x_test[:, :, :4, :4])


def test_a_tree_in_place_of_cifar10_is_named_as_what_it_is(tree):
    with pytest.raises(ValueError, match="name the data 'folder:"):
        load_data("cifar10", tree)


def test_folder_with_two_sizes_names_the_file(tree):
    Image.fromarray(np.zeros((8, 9, 3), np.uint8)).save(tree / "train" / "dog" / "odd.png")
    with pytest.raises(ValueError, match=r"odd\.png.*resize"):
        _folder(tree)


def test_folder_without_test_or_with_other_classes(tree, tmp_path):
    with pytest.raises(FileNotFoundError, match="train/<class>"):
        _folder(tmp_path / "nowhere")
    (tree / "test" / "cow").mkdir()
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tree / "test" / "cow" / "0.png")
    with pytest.raises(ValueError, match="different classes"):
        _folder(tree)


def test_unknown_spec():
    with pytest.raises(ValueError, match="folder:PATH"):
        load_data("mnist")
