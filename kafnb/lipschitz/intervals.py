"""A certified local Lipschitz bound: intervals forward for the slopes, intervals backward for the gradients."""

import copy

import torch
from torch import nn

from ..checks import forward, labels
from ..kaf import KAF
from ..models import out_of_place
from .local import check_ball, check_images, dual
from .maps import expand, linear_map, through
from .units import ranges

# linear, and no coefficient is negative: an interval's ends go through by themselves
MONOTONE = (nn.Flatten, nn.AdaptiveAvgPool2d, nn.AvgPool2d, nn.Dropout, nn.Dropout2d, nn.Identity)


def _size(low, high):
    return torch.maximum(low.abs(), high.abs())


def _outward(low, high, size, terms=1):
    """Ends moved apart by what rounding can change in sums of ``terms`` products whose absolute values add to ``size``.

    n roundings of 2^-53 each come to at most n 2^-52 (N. Higham, Accuracy and Stability of Numerical Algorithms, 3.1).
    """
    slack = (terms + 8) * 2.0**-52 * size
    return low - slack, high + slack


def _times(low, high, a, b):
    """Interval product, element-wise."""
    corners = torch.stack([low * a, low * b, high * a, high * b])
    return _outward(corners.amin(0), corners.amax(0), corners.abs().amax(0))


def _add(ends):
    """Sum of intervals."""
    low, high = (sum(e) for e in zip(*ends, strict=True))
    return _outward(low, high, sum(_size(*e) for e in ends), len(ends))


def _linear(layer, low, high, tape):
    """W c + b, give or take |W| r; and back with the transposes."""
    shape = low.shape[1:]
    apply, transpose, weight = linear_map(layer, shape)
    spread, gather, _ = linear_map(layer, shape, absolute=True)

    def both(signed, absolute, low, high, terms, shift=0.0):
        middle = signed((low + high) / 2) + shift
        wider = (high - low) / 2 + (terms + 8) * 2.0**-51 * _size(low, high)  # the rounding of both sums
        radius = absolute(wider) + 2.0**-50 * abs(shift)
        return middle - radius, middle + radius

    tape.append(lambda a, b: both(transpose, gather, a, b, len(weight) * weight[0, 0].numel()))
    bias = 0.0 if layer.bias is None else layer.bias.view(-1, *[1] * (len(shape) - 1))
    return both(apply, spread, low, high, weight[0].numel(), bias)


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


def _batch_norm(layer, low, high):
    """Its gain is taken from its numbers: a difference of two outputs would lose it next to a large shift."""
    if layer.running_var is None:
        raise ValueError("the bound needs batch normalisation with running statistics")
    column = (-1, *[1] * (low.ndim - 2))
    gain = (layer.running_var + layer.eps).rsqrt() * (1.0 if layer.weight is None else layer.weight)
    gain, mean = gain.view(column), layer.running_mean.view(column)
    shift = torch.zeros_like(gain) if layer.bias is None else layer.bias.view(column)
    ends, size = (layer(low), layer(high)), gain.abs() * (_size(low, high) + mean.abs()) + shift.abs()
    slopes = _outward(gain, gain, gain.abs())
    return *_outward(torch.minimum(*ends), torch.maximum(*ends), size), [s.expand_as(low[:1]) for s in slopes]


def _walk(layers, low, high, tape):
    """Bounds of the outputs; ``tape`` gets, for each layer, the way back for bounds of a gradient."""
    for layer in layers:
        if (parts := expand(layer)) is not None:
            tapes = [[] for _ in parts[0]]
            ends = [_walk(b, low, high, t) for b, t in zip(parts[0], tapes, strict=True)]
            tape.append(lambda a, b, tapes=tapes: _add([_back(t, a, b) for t in tapes]))
            low, high = _walk(parts[1], *_add(ends), tape)
        elif isinstance(layer, nn.Linear | nn.Conv2d):
            low, high = _linear(layer, low, high, tape)
        elif isinstance(layer, nn.MaxPool2d):
            low, high = _max_pool(layer, low, high, tape)
        elif isinstance(layer, MONOTONE) or type(layer).__name__ == "_PadShortcut":
            terms = low[0, 0].numel()  # the most that a pool can add up
            push = lambda f, a, b, n=terms: _outward(f(a), f(b), f(_size(a, b)), n)  # noqa: E731
            tape.append(lambda a, b, f=layer, s=low.shape[1:], push=push: push(lambda v: through(f, s, v), a, b))
            low, high = push(layer, low, high)
        else:
            size = _size(low, high)
            if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
                low, high, slopes = _batch_norm(layer, low, high)
            else:
                low, high, *slopes = ranges(layer, low, high)
                if not isinstance(layer, KAF):  # whose ranges have their own rounding in them
                    slopes = _outward(*slopes, 1 + _size(*slopes))
                    low, high = _outward(low, high, 1 + size)
            tape.append(lambda c, d, slopes=slopes: _times(c, d, *slopes))
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
    arXiv:1804.09699, with the slope of each unit bounded where the ball can take it. Rounding is part of the bound: it
    is for the stored weights and pixels in exact arithmetic (where torch sums products as they are written: on CPU).

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
        low, high = _outward(x - eps, x + eps, x.abs() + eps)
        out, _ = _walk([net], low.clamp_min(0), high.clamp_max(1), tape)
        answer = nn.functional.one_hot(y, out.shape[1]).double()
        columns = []
        for j in range(out.shape[1]):
            start = answer.clone()
            start[:, j] -= 1
            low, high = _back(tape, start, start)
            columns.append(dual(_size(low, high), norm))
    return torch.stack(columns, 1) * (1 + (x[0].numel() + 8) * 2.0**-52)
