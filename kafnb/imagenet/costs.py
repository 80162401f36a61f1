"""What a training costs: operations counted, hours and bytes from them."""

import dataclasses

import pandas as pd
import torch
from torch.utils.flop_counter import FlopCounterMode

from ..methods import METHODS
from .network import resnet

IMAGES = 1_281_167  # training images of ILSVRC 2012, image-net.org
BYTES = 147_897_477_120  # of their archive


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
