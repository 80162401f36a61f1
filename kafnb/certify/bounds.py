"""Interval bounds on a network's outputs over a box of inputs, KAFs included; ``crown`` has the linear ones.

Batch normalisation counts as in eval mode, dropout as the identity, whatever the model's mode. Any network that
``torch.fx`` can trace and that is made of the layers below and ``+`` will do: all of ``models`` are. In float64 the
bounds are never wrong beyond rounding (``curves.SLACK``); in float32 they are for training.

Source: Gowal et al., 2018, arXiv:1810.12715.
"""

import operator

from torch import fx, nn
from torch.nn import functional as F

from ..attacks.fast import affine
from ..kwta import KWTA
from ..models import _PadShortcut
from .curves import CURVES, PIECES, curve, value_range

# x -> W x + b, with W = |W| except for the three that carry weights
SHAPES = (nn.Flatten, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Identity, nn.Dropout, _PadShortcut)
WEIGHTED = (nn.Linear, nn.Conv2d, nn.BatchNorm2d)


KNOWN = {*SHAPES, *WEIGHTED, nn.MaxPool2d, KWTA, *CURVES}


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module, name):
        # one without parts is whole, known or not: what is not known is then named
        return type(module) in KNOWN or not any(module.children()) or super().is_leaf_module(module, name)


def unroll(model):
    """The network as a list of (node, parents, layer), inputs before outputs; layer None for the input and for ``+``.

    Raises
    ------
    ValueError
        It does something that no bound is known for.
    """
    graph, steps = _Tracer().trace(model), []
    for node in graph.nodes:
        if node.op == "call_module":
            layer = model.get_submodule(node.target)
            dilated = isinstance(layer, nn.MaxPool2d) and layer.dilation not in (1, (1, 1))
            unsteady = isinstance(layer, nn.BatchNorm2d) and layer.running_var is None
            if type(layer) not in KNOWN or getattr(layer, "ceil_mode", False) or dilated or unsteady:
                raise ValueError(f"no bounds are known for the layer {layer} ({node.target})")
            steps.append((node, node.all_input_nodes, layer))
        elif node.op == "placeholder" or (node.target is operator.add and len(node.all_input_nodes) == 2):
            steps.append((node, node.all_input_nodes, None))
        elif node.op == "output":
            if node.args[0] is not steps[-1][0]:
                raise ValueError("bounds are for networks that return what their last layer gives, and nothing else")
        else:
            raise ValueError(f"no bounds are known for the operation {node.format_node()}")
    return steps


def linear(layer, x, absolute=False):
    """W x of an affine layer, without its bias; |W| x if ``absolute``."""
    if isinstance(layer, nn.BatchNorm2d):
        scale = affine(layer)[0][:, None, None]
        return x * (scale.abs() if absolute else scale)
    if isinstance(layer, nn.Dropout):
        return x
    if not isinstance(layer, WEIGHTED):
        return layer(x)
    weight = layer.weight.abs() if absolute else layer.weight
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight)
    if layer.padding_mode != "zeros":
        raise ValueError(f"bounds of a convolution need padding_mode 'zeros', got {layer.padding_mode!r}")
    return F.conv2d(x, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)


def bias_of(layer):
    """b of an affine layer, shaped to broadcast over its output; 0 without one."""
    if isinstance(layer, nn.BatchNorm2d):
        return affine(layer)[1][:, None, None]
    bias = getattr(layer, "bias", None)
    return 0.0 if bias is None else (bias if isinstance(layer, nn.Linear) else bias[:, None, None])


def interval(layer, boxes, pieces=PIECES):
    """Bounds behind one layer from those of its parents."""
    (low, high), *other = boxes
    if layer is None:  # the sum of two branches
        return low + other[0][0], high + other[0][1]
    if isinstance(layer, KWTA):  # a value or zero
        return low.clamp_max(0), high.clamp_min(0)
    if isinstance(layer, nn.MaxPool2d):
        return layer(low), layer(high)
    if (shape := curve(layer)) is not None:
        return value_range(shape, low, high, pieces)
    middle = linear(layer, (low + high) / 2) + bias_of(layer)
    radius = linear(layer, (high - low) / 2, absolute=True)
    return middle - radius, middle + radius


def interval_bounds(model, low, high, pieces=PIECES):
    """Interval bounds of the logits over the box low <= x <= high; differentiable, for training too.

    Parameters
    ----------
    low, high : Tensor, shape (N, C, H, W)
    pieces : int
        Into how many an interval is split where a function is not monotone (``curves``): fewer are faster and looser.

    Returns
    -------
    (low, high) : Tensors, shape (N, classes)
    """
    boxes = {}
    for node, parents, layer in unroll(model):
        boxes[node] = interval(layer, [boxes[p] for p in parents], pieces) if parents else (low, high)
    return boxes[node]
