"""Linear bounds (CROWN) on a network's outputs over a box of inputs, KAFs included.

Every activation is replaced by two lines around it; the bound is then a linear function, carried back to the input.
What an affine layer does to the coefficients is its vector-Jacobian product, which ``torch.func`` knows for all.

Source: Zhang et al., NeurIPS 2018, arXiv:1811.00866.
"""

import torch
from torch import nn
from torch.nn import functional as F

from ..kwta import KWTA
from .bounds import SHAPES, WEIGHTED, bias_of, interval, linear, unroll
from .curves import curve, relaxation


def _back(function, coefficient, like):
    """coefficient (N, S, *out) of a linear map's output -> of its input (N, S, *in); ``like``: one input (N, *in)."""
    n, s = coefficient.shape[:2]
    _, pull = torch.func.vjp(function, like.new_zeros(1, *like.shape[1:]).expand(n * s, *like.shape[1:]))
    return pull(coefficient.flatten(0, 1))[0].unflatten(0, (n, s))


def _windows(layer, x, fill):
    """Every window of a max pooling: (N, C, H, W) -> (N, C, kernel size, P)."""
    pad = [layer.padding] * 4 if isinstance(layer.padding, int) else [p for p in layer.padding[::-1] for _ in (0, 1)]
    padded = F.pad(x, pad, value=fill)
    return F.unfold(padded.flatten(0, 1)[:, None], layer.kernel_size, stride=layer.stride).unflatten(0, x.shape[:2])


def _max_pool_lines(layer, low, high):
    """Max pooling lies above the input with the best lower bound; below it too, where that beats all others."""
    best_low, index = F.max_pool2d(low, layer.kernel_size, layer.stride, layer.padding, return_indices=True)
    place = torch.arange(low[0, 0].numel(), dtype=low.dtype, device=low.device).view(1, 1, *low.shape[2:])
    own = _windows(layer, place, -1.0) == index.flatten(2)[:, :, None]
    others = _windows(layer, high, -torch.inf).masked_fill(own, -torch.inf).amax(2).view_as(best_low)
    wins = (best_low >= others).to(low)
    lower = torch.ones_like(wins), torch.zeros_like(wins)
    return lower, (wins, (1 - wins) * layer(high)), index.flatten(2)


def _select(flat):
    """The linear map that picks, of each image, the inputs at ``flat`` (N, C, P); for S stacked copies of the batch."""

    def pick(x):
        index = flat.repeat_interleave(len(x) // len(flat), 0)
        return x.flatten(2).gather(2, index)

    return pick


def _through(layer, coefficient, box, lines):
    """(coefficient on the input, constant (N, S)) of a lower bound that is linear in the layer's output."""
    if isinstance(layer, (*SHAPES, *WEIGHTED)):
        bias = bias_of(layer)
        constant = (coefficient * bias).flatten(2).sum(2) if isinstance(bias, torch.Tensor) else 0.0
        return _back(lambda x: linear(layer, x), coefficient, box[0]), constant
    (a_low, b_low), (a_high, b_high), *flat = lines
    plus, minus = coefficient.clamp_min(0), coefficient.clamp_max(0)
    constant = (plus * b_low[:, None] + minus * b_high[:, None]).flatten(2).sum(2)
    coefficient = plus * a_low[:, None] + minus * a_high[:, None]
    if flat:
        coefficient = _back(_select(flat[0]), coefficient.flatten(3), box[0])
    return coefficient, constant


def _lines(layer, low, high):
    if isinstance(layer, nn.MaxPool2d):
        return _max_pool_lines(layer, low, high)
    if isinstance(layer, KWTA):
        zero = torch.zeros_like(low)
        return (zero, low.clamp_max(0)), (zero, high.clamp_min(0))
    return relaxation(curve(layer), low, high)


def _lower(steps, boxes, lines, target, coefficient):
    """Least value of coefficient (N, S, *shape) times the output of node ``target``, over the input box: (N, S)."""
    pending, constant = {target: coefficient}, 0.0
    for node, parents, layer in reversed(steps):
        if node not in pending:
            continue
        c = pending.pop(node)
        if not parents:
            low, high = (b.flatten(1)[:, None] for b in boxes[node])
            c = c.flatten(2)
            return constant + (c.clamp_min(0) * low + c.clamp_max(0) * high).sum(2)
        if layer is not None:
            c, more = _through(layer, c, boxes[parents[0]], lines.get(node))
            constant = constant + more
        for parent in parents:
            pending[parent] = pending[parent] + c if parent in pending else c
    raise AssertionError("unreachable: every network has an input")


@torch.no_grad()
def crown_bounds(model, low, high, spec=None, *, inner="crown"):
    """Linear bounds of the logits, or of linear functions of them, over the box low <= x <= high.

    Every activation is replaced by two lines around it; the bound is then a linear function, carried back to the input.

    Parameters
    ----------
    low, high : Tensor, shape (N, C, H, W)
    spec : Tensor, shape (N, S, classes), optional
        Rows of weights of the logits; default the logits themselves.
    inner : {"crown", "interval"}
        How the intervals before each activation are found: by the same method from there (the tighter of it and
        intervals), or by intervals alone: faster by about the number of units, and looser (CROWN-IBP).

    Returns
    -------
    (low, high) : Tensors, shape (N, S). Never looser than the same function of ``interval_bounds``.
    """
    if inner not in ("crown", "interval"):
        raise ValueError(f"inner must be 'crown' or 'interval', got {inner!r}")
    steps, boxes, lines = unroll(model), {}, {}
    for i, (node, parents, layer) in enumerate(steps):
        boxes[node] = interval(layer, [boxes[p] for p in parents]) if parents else (low, high)
        if parents and layer is not None and not isinstance(layer, (*SHAPES, *WEIGHTED)):
            (source,) = parents
            if inner == "crown":
                a, b = boxes[source]
                eye = torch.eye(a[0].numel(), dtype=a.dtype, device=a.device).view(1, -1, *a.shape[1:])
                eye = eye.expand(len(a), *eye.shape[1:])
                tight = _lower(steps[:i], boxes, lines, source, eye).view_as(a)
                wide = -_lower(steps[:i], boxes, lines, source, -eye).view_as(b)
                boxes[source] = (a := torch.maximum(a, tight)), torch.maximum(a, torch.minimum(b, wide))
                boxes[node] = interval(layer, [boxes[source]])
            lines[node] = _lines(layer, *boxes[source])
    if spec is None:
        spec = torch.eye(boxes[node][0].shape[1], dtype=low.dtype, device=low.device).expand(len(low), -1, -1)
    a, b = (t[:, None] for t in boxes[node])
    plus, minus = spec.clamp_min(0), spec.clamp_max(0)
    plain = (plus * a + minus * b).sum(2), (plus * b + minus * a).sum(2)
    carried = _lower(steps, boxes, lines, node, spec), -_lower(steps, boxes, lines, node, -spec)
    return torch.maximum(plain[0], carried[0]), torch.minimum(plain[1], carried[1])
