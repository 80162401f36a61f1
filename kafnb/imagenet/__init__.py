"""Fast adversarial training on ImageNet: a ResNet50 with any activation, images streamed, growing from 128 to 288.

    torchrun --nproc-per-node 8 -m kafnb.imagenet /data/imagenet --activation kaf_elu --eps 4 --workers 12

/data/imagenet is a tree train/<class>/*, test/<class>/* (or val/). ``--small`` is the same code with a network, images
and phases that a laptop manages. Stopped, it resumes after its last epoch, on any number of processes.

Source of the recipe: Wong, Rice, Kolter, "Fast is better than free", ICLR 2020, arXiv:2001.03994, appendix, and its
code's first phase (rate 0 -> 0.4 in one epoch, then down to 0.04). The later phases go on down by a factor of 10 each.
"""

from .costs import BYTES, IMAGES, cost, flops
from .folders import images, toy_folder
from .loop import train
from .network import MEAN, STD, Normalise, resnet
from .plan import FULL, Phase, Training, small

__all__ = [
    "BYTES", "FULL", "IMAGES", "MEAN", "STD", "Normalise", "Phase", "Training", "cost", "flops", "images", "resnet",
    "small", "toy_folder", "train",
]  # fmt: skip
