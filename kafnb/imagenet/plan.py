"""The configurations: phases of growing images, the full ones and one for a CPU."""

import dataclasses
import typing

import torch

from ..recipe import Recipe
from ..store import key_of
from .network import resnet


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
    """The same training at a size for a CPU: four blocks, images of 32 to 64 pixels, four epochs in all."""
    phases = (
        Phase(32, 32, 2, (0, 1, 2), (0.0, 0.1, 0.05)),
        Phase(48, 16, 1, (0, 1), (0.05, 0.01)),
        Phase(64, 16, 1, (0, 1), (0.01, 0.001)),
    )
    return dataclasses.replace(training, phases=phases, layers=(1, 1, 1, 1), classes=classes, precision="float32")
