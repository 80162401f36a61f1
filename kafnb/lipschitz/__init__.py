r"""Lipschitz constants of layers and networks, in the L2 norm.

A chain of layers stretches the difference of two inputs at most by the product of what each can,

.. math:: \lVert F(x) - F(y)\rVert_2 \le \prod_l L_l \; \lVert x - y\rVert_2,

a residual block by the sum over its branches. A linear layer's factor is its spectral norm, computed for the layer as
it acts (``layers``), an activation's is in ``units``, a KAF's in ``kaf``.
Batch normalisation, with its running statistics, and the activation behind it stretch each channel by itself. *Folded*
into the layer before them, ||diag(s) W|| instead of max|s| ||W||, they give a smaller factor that still bounds.

What is true near given images: from below in ``local``, from above in ``intervals``.

Source: Szegedy et al., ICLR 2014, arXiv:1312.6199, section 4.3.
"""

import math

import torch
from torch import nn

from ..models import _PadShortcut
from ..probes import shapes
from .intervals import local_bound
from .kaf import kaf_bound, kaf_constant
from .layers import spectral_norm
from .local import clever, gradient_norms, jacobian_norms
from .maps import expand
from .units import CONSTANTS, activation_constant

__all__ = [
    "activation_constant", "clever", "gradient_norms", "jacobian_norms", "kaf_bound", "kaf_constant",
    "local_bound", "network_bound", "spectral_norm",
]  # fmt: skip


def _diagonal(layer, constant):
    """What a layer that treats each channel by itself stretches it by, (C,) or (); None for any other layer."""
    if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
        if layer.running_var is None:
            raise ValueError("the bound needs batch normalisation with running statistics (track_running_stats=True)")
        gain = 1.0 if layer.weight is None else layer.weight.double()
        return (gain / (layer.running_var.double() + layer.eps).sqrt()).abs()
    if isinstance(layer, nn.Dropout | nn.Dropout2d | nn.Identity):
        return torch.ones((), dtype=torch.float64)
    return constant(layer) if type(layer) in CONSTANTS else None


def _pooling(layer, shape):
    """Factor of a pooling or reshaping layer on inputs of ``shape``; None for any other layer."""
    if isinstance(layer, nn.Flatten | _PadShortcut):
        return 1.0
    if isinstance(layer, nn.AdaptiveAvgPool2d) and layer.output_size in (1, (1, 1)):
        return 1 / math.sqrt(shape[1] * shape[2])
    if isinstance(layer, nn.MaxPool2d | nn.AvgPool2d):
        if isinstance(layer, nn.AvgPool2d) and (
            layer.ceil_mode or layer.divisor_override or not (layer.count_include_pad or layer.padding in (0, (0, 0)))
        ):
            raise ValueError("AvgPool2d has a rule without ceil_mode and divisor_override, with count_include_pad only")
        if isinstance(layer, nn.MaxPool2d) and layer.dilation not in (1, (1, 1)):
            raise ValueError(f"MaxPool2d has a rule without dilation only: {layer}")
        size, stride = (v if isinstance(v, tuple) else (v, v) for v in (layer.kernel_size, layer.stride))
        windows = math.prod(-(-k // s) for k, s in zip(size, stride, strict=True))  # that an input is in, at most
        return math.sqrt(windows) / (math.sqrt(math.prod(size)) if isinstance(layer, nn.AvgPool2d) else 1)
    return None


def chain_bound(layers, shape_of, norm, constant, fold=True):
    """Product over a list of layers, with sums over residual branches: what ``network_bound`` calls.

    Differentiable where ``norm`` (layer, input shape, scale or None) and ``constant`` (activation) are. ``shape_of``
    is from ``probes.shapes``.
    """
    total, rest = 1.0, list(layers)
    while rest:
        layer = rest.pop(0)
        shape = shape_of.get(layer, ("", None))[1]
        if (parts := expand(layer)) is not None:
            branches, tail = parts
            # the tail acts on a sum of branches, channel by channel: it may be counted with each
            total = total * sum(chain_bound([*b, *tail], shape_of, norm, constant, fold) for b in branches)
            continue
        linear = isinstance(layer, nn.Linear | nn.Conv2d)
        factor = None if linear else _pooling(layer, shape)
        if factor is None:
            scale = None if linear else _diagonal(layer, constant)
            if not linear and scale is None:
                raise ValueError(f"no Lipschitz rule for {type(layer).__name__}: add it to lipschitz.units.CONSTANTS")
            while fold and rest and (more := _diagonal(rest[0], constant)) is not None:
                scale = more if scale is None else scale * more
                rest.pop(0)
            factor = norm(layer, shape, scale) if linear else scale.amax()
        total = total * factor
    return total


def _norm(method):
    def norm(layer, shape, scale):
        if scale is not None and not torch.isfinite(scale).all():  # k-WTA
            return float("inf")
        return spectral_norm(layer, shape, method, scale=scale).value

    return norm


def network_bound(model, x, *, norm="certified", constant=activation_constant, fold=True):
    """Global L2 Lipschitz bound of a network's logits, by the product and sum rules.

    Parameters
    ----------
    model : Module
        Made of dense and convolutional layers, batch normalisation, the activations of ``kafnb``, pooling, dropout,
        flattening and the residual blocks of ``kafnb.models``.
    x : Tensor, shape (N, C, H, W)
        Images; only their shape counts.
    norm : str
        Method of ``spectral_norm``; with "power" or "svd" the norms are no larger than they must be, and with "power"
        a bound only as far as the iteration has converged.
    constant : callable
        Activation -> its constants, (C,) or ().
    fold : bool
        Fold batch normalisation and activation into the layer before them; else every factor by itself.

    Returns
    -------
    float

    Raises
    ------
    ValueError
        A layer that no rule covers.
    """
    with torch.no_grad():
        return float(chain_bound([model], shapes(model, x), _norm(norm), constant, fold))
