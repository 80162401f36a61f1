"""How a network is taken apart: residual branches, and each linear layer as a map with its transpose."""

import torch
from torch import nn
from torch.nn import functional as F

from ..models import HeBlock, PlainBlock, PreactBlock, ThesisBlock


def expand(layer):
    """(branches, tail) of a layer made of layers: the branches' outputs are added, then the tail acts; else None."""
    b = layer
    if isinstance(b, nn.Sequential) and type(b).forward is nn.Sequential.forward:
        return [list(b)], []
    if isinstance(b, ThesisBlock):
        return [[b.conv1, b.bn1, b.act1, b.conv2], [b.skip]], [b.bn2, b.act2]
    if isinstance(b, PlainBlock):  # a HeBlock too, but without the skip
        return [[b.conv1, b.bn1, b.act1, b.conv2, b.bn2]], [b.act2]
    if isinstance(b, HeBlock):
        return [[b.conv1, b.bn1, b.act1, b.conv2, b.bn2], [b.skip]], [b.act2]
    if isinstance(b, PreactBlock):
        return [[b.bn1, b.act1, b.conv1, b.bn2, b.act2, b.conv2], [b.skip]], []
    return None


def through(function, shape, g):
    """The transpose of a linear function at g, by automatic differentiation; inputs are (N, *shape)."""
    with torch.enable_grad():
        x = g.new_zeros(len(g), *shape).requires_grad_()
        return torch.autograd.grad(function(x), x, g)[0]


def linear_map(layer, shape, scale=None, absolute=False):
    """A dense or convolutional layer without its bias, in float64.

    Parameters
    ----------
    layer : Linear or Conv2d
    shape : tuple
        Of one example of its input.
    scale : Tensor (output channels,), optional
        Multiplies the outputs.
    absolute : bool
        Take every weight's absolute value.

    Returns
    -------
    apply : (N, *shape) -> (N, *)
    transpose : the other way
    weight : Tensor, as it is used
    """
    if not isinstance(layer, nn.Linear | nn.Conv2d):
        raise ValueError(f"a spectral norm is for dense and 2-D convolutional layers, got {type(layer).__name__}")
    weight = layer.weight.double()
    if not weight.isfinite().all():
        raise ValueError(f"the weights of {layer} are not all finite: they have no norm")
    if scale is not None:
        weight = weight * scale.to(weight.device).reshape(-1, *[1] * (weight.ndim - 1))
    if absolute:
        weight = weight.abs()
    if isinstance(layer, nn.Linear):
        return lambda v: F.linear(v, weight), lambda g: g @ weight, weight
    plain = layer.dilation == (1, 1) and layer.groups == 1 and isinstance(layer.padding, tuple)
    if not plain or layer.padding_mode not in ("zeros", "circular"):
        raise ValueError(
            f"convolutions need dilation 1, groups 1, padding in numbers and 'zeros' or 'circular': {layer}"
        )

    def apply(v):
        if layer.padding_mode == "zeros":
            return F.conv2d(v, weight, None, layer.stride, layer.padding)
        (top, left) = layer.padding
        return F.conv2d(F.pad(v, (left, left, top, top), mode="circular"), weight, None, layer.stride)

    return apply, lambda g: through(apply, shape, g), weight
