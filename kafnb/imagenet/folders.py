"""Images from a folder, streamed at one size; and a small folder to try it on."""

from pathlib import Path

import numpy as np
import torch


def images(root, train, size):
    """The folder's images as a torchvision data set at one size: random crops and flips, or centre crops."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    names = ("train",) if train else ("val", "test")
    found = [Path(root) / n for n in names if (Path(root) / n).is_dir()]
    if not found:
        said = " or ".join(str(Path(root) / n) for n in names)
        raise FileNotFoundError(f"no folder {said}: the tree must be train/<class>/*, val/<class>/* (or test/)")
    crop = [v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()]
    centre = [v2.Resize(round(size * 1.14), antialias=True), v2.CenterCrop(size)]
    steps = [v2.ToImage(), *(crop if train else centre), v2.ToDtype(torch.float32, scale=True)]
    return ImageFolder(found[0], v2.Compose(steps))


def toy_folder(root, classes=4, train=48, test=12, shape=(96, 128), seed=0):
    """Write a small tree of JPEG files: stripes, a direction and a colour a class, in noise. Returns ``root``."""
    from PIL import Image

    rng, (h, w) = np.random.default_rng(seed), shape
    rows, columns = np.mgrid[:h, :w]
    for part, n in (("train", train), ("test", test)):
        for c in range(classes):
            folder = Path(root) / part / f"class{c}"
            folder.mkdir(parents=True, exist_ok=True)
            angle, tint = np.pi * c / classes, 0.5 + 0.5 * np.cos(2 * np.pi * (c / classes + np.arange(3) / 3))
            for i in range(n):
                phase = 2 * np.pi * rng.random()
                wave = np.sin(0.4 * (rows * np.sin(angle) + columns * np.cos(angle)) + phase)
                picture = 128 + 70 * wave[..., None] * tint + 20 * rng.standard_normal((h, w, 3))
                Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.jpg", quality=90)
    return Path(root)
