"""A certified local Lipschitz bound: intervals forward for the slopes, intervals backward for the gradients."""

import copy

import torch
from torch import nn

from ..checks import forward, labels
from ..models import out_of_place
from .local import check_ball, check_images, dual
from .maps import expand, linear_map, through
from .units import ranges

# linear, and no coefficient is negative: an interval's ends go through by themselves
MONOTONE = (nn.Flatten, nn.AdaptiveAvgPool2d, nn.AvgPool2d, nn.Dropout, nn.Dropout2d, nn.Identity)


def _times(low, high, a, b):
    """Interval product, element-wise."""
    corners = torch.stack([low * a, low * b, high * a, high * b])
    return corners.amin(0), corners.amax(0)


def _linear(layer, low, high, tape):
    """W c + b, give or take |W| r; and back with the transposes."""
    shape = low.shape[1:]
    apply, transpose, _ = linear_map(layer, shape)
    spread, gather, _ = linear_map(layer, shape, absolute=True)
    middle, radius = apply((low + high) / 2), spread((high - low) / 2)
    if layer.bias is not None:
        middle = middle + layer.bias.view(-1, *[1] * (middle.ndim - 2))

    def back(low, high):
        c, r = transpose((low + high) / 2), gather((high - low) / 2)
        return c - r, c + r

    tape.append(back)
    return middle - radius, middle + radius


def _max_pool(layer, low, high, tape):
    """A gradient goes to the largest of a window: surely, perhaps, or surely not."""
    k = layer.kernel_size if isinstance(layer.kernel_size, tuple) else (layer.kernel_size,) * 2
    stride = layer.stride if isinstance(layer.stride, tuple) else (layer.stride,) * 2
    plain = layer.padding in (0, (0, 0)) and layer.dilation in (1, (1, 1))
    if stride != k or not plain or low.shape[2] % k[0] or low.shape[3] % k[1]:
        raise ValueError("the interval rule for max pooling needs windows that tile the image exactly")

    def up(v):
        return v.repeat_interleave(k[0], 2).repeat_interleave(k[1], 3)

    out = layer(low), layer(high)
    possible = (high >= up(out[0])).double()
    alone = up(nn.functional.avg_pool2d(possible, k, divisor_override=1)) == 1
    tape.append(lambda a, b: _times(up(a), up(b), possible * alone, possible))
    return out


def _walk(layers, low, high, tape):
    """Bounds of the outputs; ``tape`` gets, for each layer, the way back for bounds of a gradient."""
    for layer in layers:
        if (parts := expand(layer)) is not None:
            tapes = [[] for _ in parts[0]]
            ends = [_walk(b, low, high, t) for b, t in zip(parts[0], tapes, strict=True)]
            low, high = (sum(e) for e in zip(*ends, strict=True))
            tape.append(lambda a, b, tapes=tapes: [sum(e) for e in zip(*(_back(t, a, b) for t in tapes), strict=True)])
            low, high = _walk(parts[1], low, high, tape)
        elif isinstance(layer, nn.Linear | nn.Conv2d):
            low, high = _linear(layer, low, high, tape)
        elif isinstance(layer, nn.MaxPool2d):
            low, high = _max_pool(layer, low, high, tape)
        elif isinstance(layer, MONOTONE) or type(layer).__name__ == "_PadShortcut":
            back = lambda a, b, f=layer, s=low.shape[1:]: (through(f, s, a), through(f, s, b))  # noqa: E731
            tape.append(back)
            low, high = layer(low), layer(high)
        else:
            if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
                if layer.running_var is None:
                    raise ValueError("the bound needs batch normalisation with running statistics")
                ends = layer(low), layer(high)
                gain = layer(torch.ones_like(low[:1])) - layer(torch.zeros_like(low[:1]))
                low, high, a, b = torch.minimum(*ends), torch.maximum(*ends), gain, gain
            else:
                low, high, a, b = ranges(layer, low, high)
            tape.append(lambda c, d, a=a, b=b: _times(c, d, a, b))
    return low, high


def _back(tape, low, high):
    for step in reversed(tape):
        low, high = step(low, high)
    return low, high


def local_bound(model, x, y, *, eps, norm="linf"):
    """Certified upper bound of the local Lipschitz constant of every margin f_y - f_j in the ball around each image.

    Interval arithmetic forward bounds every pre-activation in the ball (cut to [0, 1]), so every slope; interval
    arithmetic backward, through those slopes, bounds the gradient. As eps goes to 0 the bound goes to the gradient's
    norm at x; for a wide ball or a deep network it is far above the truth. Same idea as Weng et al., ICML 2018,
    arXiv:1804.09699, with the slope of each unit bounded where the ball can take it.

    Parameters
    ----------
    model : Module
        Layers as ``network_bound`` takes them, with KAF, ReLU, leaky ReLU, PReLU, ELU, Swish, GELU, softplus,
        sigmoid or tanh. A copy in float64 is used.
    x, y, eps, norm : as ``gradient_norms``; for "l2" the ball's enclosing cube is what is searched.

    Returns
    -------
    Tensor, shape (N, classes), float64
        0 in column y.
    """
    check_ball(norm, eps)
    check_images(model, x)
    with torch.no_grad(), forward(x):
        classes = copy.deepcopy(model).eval()(x[:1]).shape[1]
    labels(y, len(x), classes)
    net = out_of_place(copy.deepcopy(model)).double().eval().requires_grad_(False)
    x, tape = x.double(), []
    with torch.no_grad():
        out, _ = _walk([net], (x - eps).clamp_min(0), (x + eps).clamp_max(1), tape)
        answer = nn.functional.one_hot(y, out.shape[1]).double()
        columns = []
        for j in range(out.shape[1]):
            start = answer.clone()
            start[:, j] -= 1
            low, high = _back(tape, start, start)
            columns.append(dual(torch.maximum(low.abs(), high.abs()), norm))
    return torch.stack(columns, 1)
