"""Every activation function of the companion by name: ``activation(name, channels)``."""

import contextlib

import torch
from torch import nn

from .checks import count, pick
from .kaf import KAF
from .kwta import KWTA
from .parametric import APL, SAF, Maxout, PSSiLU, SReLU

# name -> factory of one layer's activation; factories without use for the channel count ignore it
ACTIVATIONS = {
    "identity": lambda channels: nn.Identity(),
    # fixed
    "relu": lambda channels: nn.ReLU(),
    "leaky_relu": lambda channels: nn.LeakyReLU(0.01),
    "elu": lambda channels: nn.ELU(),
    "swish": lambda channels: nn.SiLU(),
    "gelu": lambda channels: nn.GELU(),
    "softplus": lambda channels: nn.Softplus(),
    "sigmoid": lambda channels: nn.Sigmoid(),
    "tanh": lambda channels: nn.Tanh(),
    # parametric
    "prelu": lambda channels: nn.PReLU(channels),
    "srelu": SReLU,
    "apl": APL,
    "saf": SAF,
    "maxout": Maxout,
    "pssilu": PSSiLU,
    # of the thesis
    "kwta": lambda channels: KWTA(0.15),
    "kaf": KAF,
    "kaf_relu": lambda channels: KAF(channels, init="relu"),
    "kaf_elu": lambda channels: KAF(channels, init="elu"),
    "kaf_swish": lambda channels: KAF(channels, init="swish"),
    "kaf_free": lambda channels: KAF(channels, trainable_dictionary=True),
}


def activation(name, channels):
    """A new activation module for a layer of ``channels`` channels.

    Parameters
    ----------
    name : str
        A key of ``ACTIVATIONS``; add your own with ``ACTIVATIONS["mine"] = factory``. Or a KAF of other kernels, as
        "start:kernel" or "start:kernel+kernel": "unit:matern32", "elu:gaussian+laplacian", "unit:relu". The start is
        ``KAF``'s ``init``; "unit" gives every kernel the same mean square at the start, which a common recipe needs.
    channels : int
        Size of dimension 1 of the layer's output.

    Raises
    ------
    ValueError
        Unknown name; the message suggests the nearest. No channels.
    """
    count(channels, "channels")
    start, colon, kernels = name.partition(":") if isinstance(name, str) else (name, "", "")
    if colon:
        return KAF(channels, kernel=tuple(kernels.split("+")), init=start)
    return pick(ACTIVATIONS, name, "activation")(channels)


def kinds():
    """Types of the modules that ``ACTIVATIONS`` makes, but Identity and Sequential, which stand for much else too."""
    found = set()
    with torch.random.fork_rng(devices=[]):
        for make in ACTIVATIONS.values():
            with contextlib.suppress(Exception):  # one that makes nothing is told of where it is asked for
                found.add(type(make(8)))
    return tuple(found - {nn.Identity, nn.Sequential})
