"""Fast adversarial training on ImageNet: a ResNet50 with any activation, images streamed, growing from 128 to 288.

    torchrun --nproc-per-node 8 -m kafnb.imagenet /data/imagenet --activation kaf_elu --eps 4 --workers 12

/data/imagenet is a tree train/<class>/*, test/<class>/* (or val/). ``--small`` is the same code with a network, images
and phases that a laptop manages. Stopped, it resumes after its last epoch, on any number of processes.

Source of the recipe: Wong, Rice, Kolter, "Fast is better than free", ICLR 2020, arXiv:2001.03994, appendix, and its
code's first phase (rate 0 -> 0.4 in one epoch, then down to 0.04). The later phases go on down by a factor of 10 each.
"""

import argparse
import contextlib
import dataclasses
import time
import typing
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler
from torch.utils.flop_counter import FlopCounterMode

from . import evaluate
from .activations import activation as named
from .attacks import pgd
from .distributed import group, learn, synchronised, wrapped
from .methods import METHODS
from .provenance import code_fingerprint, device_name, provenance
from .recipe import Recipe, optimizer_of
from .store import Folder, default_store, key_of

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGES = 1_281_167  # training images of ILSVRC 2012, image-net.org
BYTES = 147_897_477_120  # of their archive


class Phase(typing.NamedTuple):
    """Some epochs at one image size; the learning rate goes linearly through ``rates``, one more than its parts."""

    size: int
    batch: int
    epochs: int
    at: tuple
    rates: tuple


@dataclasses.dataclass(frozen=True)
class Training:
    """One training on images of ImageNet's kind; the defaults are the full configuration.

    Attributes
    ----------
    eps : float, pixel units
    phases : tuple of Phase
        Batches are global: divided among the processes.
    layers : tuple of int
        Bottleneck blocks of each stage.
    """

    activation: str = "relu"
    eps: float = 4 / 255
    method: str = "fgsm_rs"
    phases: tuple = (
        Phase(128, 512, 6, (0, 1, 6), (0.0, 0.4, 0.04)),
        Phase(224, 224, 6, (0, 6), (0.04, 0.004)),
        Phase(288, 128, 3, (0, 3), (0.004, 0.0004)),
    )
    layers: tuple = (3, 4, 6, 3)
    precision: str = "bfloat16"
    classes: int = 1000
    seed: int = 0

    @property
    def name(self):
        return f"imagenet-{self.activation}-eps{round(255 * self.eps)}-{key_of(self)}"

    @property
    def recipe(self):
        return Recipe(self.method, eps=self.eps, momentum=0.9, precision=self.precision, lr=(0.0, 0.4))

    def build(self):
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            return resnet(self.activation, self.layers, self.classes)


FULL = tuple(Training(a, eps / 255) for a in ("relu", "swish", "kaf_elu") for eps in (2, 4))


def small(training, classes):
    """The same training at a size for a CPU: four blocks, images of 32 to 64 pixels, one epoch a phase."""
    phases = (
        Phase(32, 32, 2, (0, 1, 2), (0.0, 0.1, 0.05)),
        Phase(48, 16, 1, (0, 1), (0.05, 0.01)),
        Phase(64, 16, 1, (0, 1), (0.01, 0.001)),
    )
    return dataclasses.replace(training, phases=phases, layers=(1, 1, 1, 1), classes=classes, precision="float32")


class Normalise(nn.Module):
    """Images in [0, 1] to the mean and spread that the network expects: inside it, so that eps stays in pixel units."""

    def forward(self, x):
        mean, std = (x.new_tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
        return (x - mean) / std


def resnet(activation="relu", layers=(3, 4, 6, 3), num_classes=1000):
    """torchvision's bottleneck ResNet (ResNet50 by default) with an activation of its own behind each layer.

    Source: He et al., CVPR 2016, arXiv:1512.03385, stride in the 3x3 convolution as torchvision has it.
    """
    from torchvision.models.resnet import Bottleneck, ResNet

    class Block(Bottleneck):
        def __init__(self, inplanes, planes, *arguments, **options):
            super().__init__(inplanes, planes, *arguments, **options)
            del self.relu  # one module for three places cannot learn three functions
            self.act1, self.act2, self.act3 = (
                named(activation, c.out_channels) for c in (self.conv1, self.conv2, self.conv3)
            )

        def forward(self, x):
            out = self.act1(self.bn1(self.conv1(x)))
            out = self.act2(self.bn2(self.conv2(out)))
            out = self.bn3(self.conv3(out))
            return self.act3(out + (x if self.downsample is None else self.downsample(x)))

    net = ResNet(Block, list(layers), num_classes=num_classes)
    net.relu = named(activation, 64)
    model = nn.Sequential(Normalise(), net)
    model.l2, model.l2_layers = 5e-5, (nn.Conv2d, nn.Linear)  # a weight decay of 1e-4
    return model


# --- images --------------------------------------------------------------------------------------------------------


def images(root, train, size):
    """The folder's images as a torchvision data set at one size: random crops and flips, or centre crops."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    names = ("train",) if train else ("test", "val")
    found = [Path(root) / n for n in names if (Path(root) / n).is_dir()]
    if not found:
        raise FileNotFoundError(f"no folder {Path(root) / names[0]}: the tree must be train/<class>/*, test/<class>/*")
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


# --- training ------------------------------------------------------------------------------------------------------


def train(training, root, *, device="cpu", workers=0, store=None, sync_batchnorm=False, test_images=500):
    """Train on the processes of torchrun's group; the first keeps the store.

    Parameters
    ----------
    root : path or list of paths
        The images; of several, one a phase (resized beforehand, they are read and decoded faster).
    workers : int
        Decoding processes of each process.
    test_images : int
        That the trained network is measured on, by the first process.

    Returns
    -------
    DataFrame
        The history, a row an epoch: phase's size, loss, accuracy (on perturbed batches), images_per_s of all
        processes, and waiting, the share of time in which the first process had no images to learn from. A last row
        has the accuracy on test images, clean and under PGD-10.
    """
    with group(device) as (rank, processes, device), contextlib.ExitStack() as stack:
        folder = Folder(Path(store or default_store()) / training.name)
        if rank == 0:
            stack.enter_context(folder.lock())
        origin = {"code": code_fingerprint("imagenet")}
        known = [(folder.has("history.csv"), folder.read_checkpoint(**origin))] if rank == 0 else [None]
        if processes > 1:
            dist.broadcast_object_list(known)
        (finished, state), model = known[0], training.build().to(device)
        if finished:
            return folder.read_table("history.csv") if rank == 0 else None
        optimizer, rows = optimizer_of(model, training.recipe), []
        if state:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            rows = list(state["history"])
        with synchronised(model, sync_batchnorm and processes > 1):
            ddp = wrapped(model, training.precision)
            roots = [root] if isinstance(root, str | Path) else list(root)
            plan = [
                (p, e, roots[min(i, len(roots) - 1)]) for i, p in enumerate(training.phases) for e in range(p.epochs)
            ]
            for phase, epoch, root in plan[len(rows) :]:
                torch.manual_seed(1_000_003 * (training.seed * processes + rank) + len(rows))
                data = images(root, True, phase.size)
                rows.append(_epoch(ddp, data, training, phase, epoch, len(rows), optimizer, rank, processes, workers))
                if rank == 0:
                    states = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                    folder.write_checkpoint(states | origin | {"history": rows})
        if rank == 0:
            return _keep(folder, training, model.eval(), roots[-1], rows, device, test_images)


def _epoch(ddp, data, training, phase, epoch, done, optimizer, rank, processes, workers):
    learner, net = ddp
    device, recipe = next(net.parameters()).device, training.recipe
    batch = max(1, phase.batch // processes)
    sampler = DistributedSampler(data, processes, rank, seed=training.seed, drop_last=True)
    sampler.set_epoch(done)
    generator = torch.Generator().manual_seed(1_000_003 * rank + done)
    loader = DataLoader(
        data, batch, sampler=sampler, num_workers=workers, drop_last=True, pin_memory=device.type == "cuda",
        generator=generator,
    )  # fmt: skip
    scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision == "float16")
    net.train()
    sums, state, start, waiting = torch.zeros(3, dtype=torch.float64), {}, time.perf_counter(), 0.0
    asked = start
    for i, (x, y) in enumerate(loader):
        waiting += time.perf_counter() - asked
        x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
        now = epoch + (i + 0.5) / len(loader)
        part = [(x, y, slice(0, len(y)), len(y) * processes)]
        rate = lambda now=now: float(np.interp(now, phase.at, phase.rates))  # noqa: E731
        for step in learn(learner, net, part, processes, optimizer, scaler, recipe, rate, [state], same_draws=False):
            sums += step
        asked = time.perf_counter()
    seconds = time.perf_counter() - start
    if processes > 1:
        sums = sums.to(device)
        dist.all_reduce(sums)
    loss, correct, n = sums.tolist()
    if not n:
        raise ValueError(f"not one batch of {phase.batch} in {len(data)} images on {processes} processes")
    return {
        "epoch": done + 1, "size": phase.size, "loss": loss / n, "accuracy": correct / n, "images": int(n),
        "images_per_s": n / seconds, "waiting": waiting / seconds, "processes": processes,
    }  # fmt: skip


def _keep(folder, training, model, root, rows, device, n):
    """Measure the trained model, and write weights, history and record."""
    data = images(root, False, training.phases[-1].size)
    order = np.random.RandomState(0).permutation(len(data))[:n]
    x, y = zip(*(data[i] for i in order), strict=True)
    pair = torch.stack(x), torch.tensor(y)
    attack = lambda m, x, y: pgd(m, x, y, eps=training.eps, steps=10)  # noqa: E731
    scores = (
        evaluate.clean_accuracy(model, pair, batch_size=64),
        evaluate.robust_accuracy(model, pair, attack, batch_size=64),
    )
    last = {"epoch": len(rows), "clean": scores[0].rate, "pgd": scores[1].rate, "images": len(order)}
    history = pd.DataFrame([*rows, last])
    folder.write_weights(model)
    record = {"training": dataclasses.asdict(training), "device": device_name(device)}
    folder.write_json("experiment.json", record | provenance())
    folder.write_table("history.csv", history)
    folder.drop(*folder.checkpoints())
    return history


# --- cost ----------------------------------------------------------------------------------------------------------


class _NoModules:
    parents = frozenset({"Global"})

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


def flops(training, size):
    """Floating-point operations of convolutions and dense layers to learn from one image, counted while it is done."""
    recipe = dataclasses.replace(training.recipe, precision="float32")
    with torch.device("meta"):  # shapes without numbers; what an activation costs is not counted, so any will do
        model = resnet("relu", training.layers, training.classes).train()
        x, y = torch.rand(2, 3, size, size), torch.zeros(2, dtype=torch.long)
    counter = FlopCounterMode(display=False)
    # its count by module hangs hooks on the graph, which fail where a method calls autograd.grad: the total is enough
    counter.mod_tracker = _NoModules()
    with counter:
        for _, loss in METHODS[training.method](model, x, y, recipe, {}):
            loss.backward()
    return counter.get_total_flops() / 2


def cost(training, flops_per_s, count=IMAGES, size_of_all=BYTES):
    """What a training takes, by phase: images, operations, hours at ``flops_per_s``, bytes read."""
    rows = []
    for phase in training.phases:
        per_image, seen = flops(training, phase.size), phase.epochs * count
        rows.append(
            {
                "size": phase.size, "epochs": phase.epochs, "images": seen, "GFLOP an image": per_image / 1e9,
                "EFLOP": per_image * seen / 1e18, "images/s": flops_per_s / per_image,
                "hours": per_image * seen / flops_per_s / 3600, "TB read": phase.epochs * size_of_all / 1e12,
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m kafnb.imagenet", description=__doc__.splitlines()[0])
    parser.add_argument("root", nargs="+", help="a tree train/<class>/*, test/<class>/*; of several, one a phase")
    parser.add_argument("--activation", default="relu")
    parser.add_argument("--eps", type=float, default=4, help="in 255ths")
    parser.add_argument("--workers", type=int, default=8, help="decoding processes of each training process")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sync-batchnorm", action="store_true")
    parser.add_argument("--small", action="store_true", help="the same code at a size for a CPU")
    parser.add_argument("--store")
    a = parser.parse_args(argv)
    chosen = Training(a.activation, a.eps / 255, classes=len(images(a.root[-1], True, 32).classes))
    chosen = small(chosen, chosen.classes) if a.small else chosen
    where = dict(device=a.device, workers=a.workers, store=a.store, sync_batchnorm=a.sync_batchnorm)
    history = train(chosen, a.root, **where)
    if history is not None:
        print(history.to_string(index=False))


if __name__ == "__main__":
    main()
