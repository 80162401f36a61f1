"""Data sets: small ones as whole tensors of 8-bit images, so that they can live on the device."""

import dataclasses
import functools
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from .checks import count, instance, labels, number, shown
from .paths import home

FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")  # 8 bits; more would be cut off
MAX_BYTES = 4 * 2**30  # what may live in memory; larger trees need streaming


@dataclasses.dataclass(frozen=True, eq=False)
class Data:
    """Training and test images.

    Attributes
    ----------
    name : str
        "digits", "cifar10" or "folder:NAME".
    x_train, x_test : uint8 Tensor, shape (N, C, H, W)
    y_train, y_test : int64 Tensor, shape (N,)
    classes : tuple of str

    Raises
    ------
    ValueError, TypeError
        Images or labels of another type or shape, or none; a label that is no class; training and test images of
        different channels or size; fewer than two classes.
    """

    name: str
    x_train: torch.Tensor
    y_train: torch.Tensor
    x_test: torch.Tensor
    y_test: torch.Tensor
    classes: tuple

    def __post_init__(self):
        if len(self.classes) < 2:
            raise ValueError(f"data {shown(self.name)} have {len(self.classes)} class: a classifier needs two")
        for part, x, y in (("train", self.x_train, self.y_train), ("test", self.x_test, self.y_test)):
            instance(x, torch.Tensor, f"x_{part}")
            if x.dtype != torch.uint8 or x.ndim != 4 or len(x) == 0:
                raise ValueError(f"x_{part} must be uint8 (N, C, H, W) with N > 0, got {x.dtype} {tuple(x.shape)}")
            labels(y, len(x), len(self.classes))
        if self.x_train.shape[1:] != self.x_test.shape[1:]:
            shapes = [tuple(x.shape[1:]) for x in (self.x_train, self.x_test)]
            raise ValueError(f"training and test images must have one size, got {shapes[0]} and {shapes[1]}")

    @property
    def in_channels(self):
        return self.x_train.shape[1]

    @property
    def image_size(self):
        return self.x_train.shape[2]

    @property
    def num_classes(self):
        return len(self.classes)

    @functools.cached_property
    def fingerprint(self):
        """First 16 hex digits of the SHA-256 of all images and labels."""
        digest = hashlib.sha256()
        for t in (self.x_train, self.y_train, self.x_test, self.y_test):
            digest.update(str(tuple(t.shape)).encode())
            digest.update(t.numpy().tobytes())
        return digest.hexdigest()[:16]

    def test(self, n=None):
        """The first n test images in [0, 1] and their labels; all for None."""
        count(n, "n", optional=True)
        return to_unit(self.x_test[:n]), self.y_test[:n]

    def train(self, n=None):
        """The first n training images in [0, 1] and their labels; all for None."""
        count(n, "n", optional=True)
        return to_unit(self.x_train[:n]), self.y_train[:n]

    def validation_split(self, fraction=0.1):
        """The same training set with its last ``fraction`` held out as the test set: for every choice made."""
        number(fraction, "fraction", above=0, high=1)
        keep = len(self.x_train) - max(1, round(fraction * len(self.x_train)))
        if keep < 1:
            raise ValueError(f"fraction {fraction} leaves none of {len(self.x_train)} training images")
        x, y = self.x_train, self.y_train
        return dataclasses.replace(
            self, name=f"{self.name}-validation", x_train=x[:keep], y_train=y[:keep], x_test=x[keep:], y_test=y[keep:]
        )


def to_unit(x):
    """uint8 images to float32 in [0, 1]."""
    return x.float() / 255


def load_data(spec, root=None):
    """Load a data set.

    Parameters
    ----------
    spec : str
        "digits" (scikit-learn's, 8x8 grey, no download), "cifar10" (torchvision, downloaded and its checksum
        verified) or "folder:PATH" (any tree train/<class>/*, test/<class>/* of images of one size); with ":validation"
        behind it, the training set alone, its last tenth in place of the test set: for every choice that is made.
    root : path, optional
        Where cifar10 is kept or put; default ``data/`` in the checkout.

    Raises
    ------
    ValueError, FileNotFoundError
        Unknown spec; nothing there and no download possible; images of several sizes, or that cannot be read.
    """
    instance(spec, str, "data", ": 'digits', 'cifar10' or 'folder:PATH'")
    root = None if root is None else os.path.abspath(instance(root, str | os.PathLike, "data_root"))
    if spec.startswith("folder:"):  # what is kept is kept by the whole path
        spec = f"folder:{os.path.abspath(os.path.expanduser(spec.removeprefix('folder:')))}"
    return _load(spec, root)


def known(spec):
    """A ``spec`` of one of the kinds that ``load_data`` takes, as it was given; whether the data are there is open."""
    name = spec.removesuffix(":validation")
    if name not in ("digits", "cifar10") and (not name.startswith("folder:") or "\0" in name):
        raise ValueError(f"unknown data {shown(spec)}: use 'digits', 'cifar10' or 'folder:PATH'")
    return spec


@functools.lru_cache(maxsize=2)
def _load(spec, root):
    if spec.endswith(":validation"):
        return _load(spec.removesuffix(":validation"), root).validation_split()
    if spec == "digits":
        return _digits()
    if spec == "cifar10":
        return _cifar10(Path(root) if root else home() / "data")
    return _folder(Path(known(spec).removeprefix("folder:")))


def _digits():
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    x = torch.from_numpy((digits.images * 255 / 16).round().astype(np.uint8))[:, None]  # (N, 8, 8) -> (N, 1, 8, 8)
    y = torch.from_numpy(digits.target).long()
    # the split is part of the data set, so it does not follow the experiment's seed
    train, test = train_test_split(np.arange(len(y)), test_size=360, stratify=y, random_state=0)
    return Data("digits", x[train], y[train], x[test], y[test], tuple("0123456789"))


def _cifar10(root):
    from torchvision.datasets import CIFAR10

    if (root / "train").is_dir():
        raise ValueError(f"{root} is a tree of images, not where CIFAR-10 is kept: name the data 'folder:{root}'")
    parts = []
    for train in (True, False):
        try:
            parts.append(CIFAR10(root, train=train, download=True))
        except (OSError, RuntimeError) as error:
            raise FileNotFoundError(
                f"CIFAR-10 is not in {root} and could not be downloaded ({error}): put cifar-10-python.tar.gz there, "
                "or take a tree of images, train/<class>/*, test/<class>/*: a notebook's data_root, data 'folder:PATH'"
            ) from None
    arrays = [(torch.from_numpy(p.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(p.targets)) for p in parts]
    return Data("cifar10", *arrays[0], *arrays[1], tuple(parts[0].classes))


def _folder(path):
    from torchvision.datasets import ImageFolder

    for part in ("train", "test"):
        if not (path / part).is_dir():
            raise FileNotFoundError(f"no folder {path / part}: the data tree must be train/<class>/*, test/<class>/*")
    try:
        parts = [ImageFolder(path / part) for part in ("train", "test")]
    except FileNotFoundError as error:  # of several lines
        raise ValueError(
            f"{path}: {str(error).splitlines()[0]}: train/<class>/* and test/<class>/* must be images"
        ) from None
    if parts[0].classes != parts[1].classes:
        raise ValueError(f"{path}: train and test have different classes: {parts[0].classes} and {parts[1].classes}")
    tensors = []
    for part in parts:
        # files come sorted by class: in a fixed random order, the first n images are a fair sample of all classes
        order = np.random.RandomState(0).permutation(len(part.samples))
        samples = [part.samples[i] for i in order]
        tensors += [_decode([f for f, _ in samples], path), torch.tensor([y for _, y in samples])]
    return Data(f"folder:{path.resolve().name}", *tensors, tuple(parts[0].classes))


def _decode(files, path):
    """Image files of one size -> uint8 (N, 3, H, W). What a file claims to be is looked at before it is decoded."""
    from PIL import Image

    def opened(file):
        try:
            # these formats alone: others are read by programmes of their own, whatever the file's name says
            return Image.open(file, formats=FORMATS)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"{file} is no image that can be read: {shown(str(error))}") from None

    with opened(files[0]) as image:
        size = image.size
    if size[0] * size[1] * 3 * len(files) > MAX_BYTES:
        gigabytes = size[0] * size[1] * 3 * len(files) / 2**30
        raise ValueError(f"{path} holds {gigabytes:.0f} GiB of pixels; at most {MAX_BYTES // 2**30} fit")
    out = np.empty((len(files), size[1], size[0], 3), np.uint8)

    def place(i):
        with opened(files[i]) as image:
            if image.size != size:
                raise ValueError(
                    f"{files[i]} is {image.size[::-1]}, {files[0]} is {size[::-1]}: resize all images to one size"
                )
            if image.mode not in MODES:
                raise ValueError(f"{files[i]} has pixels of mode {image.mode}: 8 bits a channel are needed, e.g. RGB")
            try:
                out[i] = np.asarray(image.convert("RGB"))
            except (OSError, SyntaxError, ValueError) as error:
                raise ValueError(f"{files[i]} is damaged: {shown(str(error))}") from None

    with ThreadPoolExecutor() as pool:
        list(pool.map(place, range(len(files))))
    return torch.from_numpy(out).permute(0, 3, 1, 2).contiguous()  # (N, H, W, 3) -> (N, 3, H, W)


def augment(x, kind):
    """Random crop after zero padding, and horizontal flip, drawn for each image; (N, C, H, W) -> same."""
    n, c, h, w = x.shape
    pad = h // 8
    padded = F.pad(x, (pad, pad, pad, pad))
    top, left = torch.randint(0, 2 * pad + 1, (2, n, 1), device=x.device)
    rows = (top + torch.arange(h, device=x.device))[:, None, :, None]  # (N, 1, H, 1)
    cols = (left + torch.arange(w, device=x.device))[:, None, None, :]  # (N, 1, 1, W)
    examples = torch.arange(n, device=x.device)[:, None, None, None]
    x = padded[examples, torch.arange(c, device=x.device)[:, None, None], rows, cols]
    if kind == "crop_flip":
        x = torch.where(torch.rand(n, 1, 1, 1, device=x.device) < 0.5, x.flip(-1), x)
    return x
