"""Lipschitz constants of the activation functions, and the ranges of each and its slope over intervals.

A layer of element-wise functions is Lipschitz per channel: |f_c(x) - f_c(y)| <= L_c |x - y|.
"""

import torch
from torch import nn

from ..kaf import KAF
from ..kwta import KWTA
from ..parametric import APL, SAF, Maxout, PSSiLU, SReLU
from .kaf import KafRanges, kaf_constant

# x sigmoid(x) and x Phi(x): where they are steepest, where lowest, and the steepest slope, rounded up
SWISH_STEEPEST, SWISH_LOWEST, SWISH_SLOPE = 2.39935728051546767, -1.27846454276107380, 1.09983932012887
GELU_STEEPEST, GELU_LOWEST, GELU_SLOPE = 2**0.5, -0.75179152469356446, 1.12890414518516

# type -> (places where f can turn, places where f' can turn): between them both are monotone
TURNS = {
    nn.Identity: ((), ()),
    nn.ReLU: ((), ()),
    nn.LeakyReLU: ((0.0,), ()),
    nn.PReLU: ((0.0,), ()),
    nn.ELU: ((0.0,), (0.0,)),
    nn.SiLU: ((SWISH_LOWEST,), (-SWISH_STEEPEST, SWISH_STEEPEST)),
    nn.GELU: ((GELU_LOWEST,), (-GELU_STEEPEST, GELU_STEEPEST)),
    nn.Softplus: ((), ()),
    nn.Sigmoid: ((), (0.0,)),
    nn.Tanh: ((), (0.0,)),
}


def _srelu(f):
    left, right = f.left_slope.detach().abs(), f.right_slope.detach().abs()
    crossed = torch.maximum(torch.maximum(left, right), (f.left_slope + f.right_slope).detach().abs())
    return torch.where(f.left <= f.right, torch.maximum(torch.maximum(left, right), torch.ones_like(left)), crossed)


def _apl(f):
    """The slope between any two neighbouring kinks (the hinges, and 0)."""
    slopes, hinges = f.slopes.detach().double(), f.hinges.detach().double()
    kinks = torch.cat([hinges, torch.zeros_like(hinges[:1])]).sort(0).values  # (S + 1, C)
    between = torch.cat([kinks[:1] - 1, (kinks[1:] + kinks[:-1]) / 2, kinks[-1:] + 1])  # (S + 2, C)
    pieces = (between > 0).double() - (slopes * (between[:, None] < hinges)).sum(1)
    return pieces.abs().amax(0)


def _saf(f):
    """The slope of each cubic piece is a parabola: its ends and its vertex."""
    v = f.values.detach().double()
    spacing = 2 * f.boundary / (v.shape[1] - 1)
    v = torch.cat([2 * v[:, :1] - v[:, 1:2], v, 2 * v[:, -1:] - v[:, -2:-1]], 1)
    p0, p1, p2, p3 = (v[:, j : v.shape[1] - 3 + j] for j in range(4))
    a, b, c = 3 * (3 * (p1 - p2) + p3 - p0), 2 * (2 * p0 - 5 * p1 + 4 * p2 - p3), p2 - p0  # a t^2 + b t + c
    vertex = torch.where(a == 0, torch.zeros_like(a), -b / (2 * a)).clamp(0, 1)
    ends = torch.stack([c, a + b + c, (a * vertex + b) * vertex + c]).abs().amax((0, 2)) / (2 * spacing)
    low, high = (v[:, 2] - v[:, 0]).abs(), (v[:, -1] - v[:, -3]).abs()
    return torch.maximum(ends, torch.maximum(low, high) / (2 * spacing))


def _pssilu(f):
    b = f.b.detach().double().clamp(0, 0.99)
    steep = torch.maximum(SWISH_SLOPE - b, b - 1 + SWISH_SLOPE) / (1 - b)
    return torch.where(f.a == 0, (0.5 - b).abs() / (1 - b), steep)


def exact(module):
    """The module, if it is the function of its name."""
    if isinstance(module, nn.Softplus) and module.threshold < 20:
        raise ValueError(f"bounds of softplus need a threshold of 20 at least, got {module.threshold}: below it jumps")
    if isinstance(module, nn.GELU) and module.approximate != "none":
        raise ValueError(f"bounds of GELU need approximate='none', got {module.approximate!r}")
    return module


# type -> constant: a number, or one a channel
CONSTANTS = {
    nn.Identity: lambda f: 1.0,
    nn.ReLU: lambda f: 1.0,
    nn.LeakyReLU: lambda f: max(1.0, abs(f.negative_slope)),
    nn.ELU: lambda f: max(1.0, abs(f.alpha)),
    nn.SiLU: lambda f: SWISH_SLOPE,
    nn.GELU: lambda f: GELU_SLOPE,
    nn.Softplus: lambda f: 1.0,
    nn.Sigmoid: lambda f: 0.25,
    nn.Tanh: lambda f: 1.0,
    nn.PReLU: lambda f: f.weight.detach().abs().clamp_min(1),
    SReLU: _srelu,
    APL: _apl,
    SAF: _saf,
    Maxout: lambda f: f.weight.detach().abs().amax(0),
    PSSiLU: _pssilu,
    KAF: kaf_constant,
    KWTA: lambda f: float("inf") if f.ratio < 1 else 1.0,
}


def activation_constant(module):
    """Lipschitz constant of an activation, one a channel (or one for all).

    Parameters
    ----------
    module : Module
        Any of ``kafnb.ACTIVATIONS``, or a type added to ``CONSTANTS``.

    Returns
    -------
    Tensor, shape (C,) or (), float64
        Exact but for KAF (``kaf_constant``, at most 0.1 % above) and Maxout (a line of it may never be the largest).
        Infinite for k-WTA: where two values change places in the ranking, one jumps to 0 and the other from 0.

    Raises
    ------
    ValueError
        No rule for this type.
    """
    rule = CONSTANTS.get(type(module))
    if rule is None:
        known = ", ".join(t.__name__ for t in CONSTANTS)
        raise ValueError(f"no Lipschitz constant known for {type(module).__name__}; known: {known}")
    return torch.as_tensor(rule(exact(module)), dtype=torch.float64)


def _values(module, x):
    """f and f' in float64."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        f = module(x)
        return f.detach(), torch.autograd.grad(f.sum(), x)[0]


def ranges(module, low, high):
    """Smallest and largest value and slope of an activation over intervals.

    Parameters
    ----------
    module : Module
        KAF, or a type in ``TURNS``, in float64.
    low, high : Tensor, shape (N, C, *), float64

    Returns
    -------
    (f_low, f_high, slope_low, slope_high), same shape each

    Raises
    ------
    ValueError
        No rule for this type.
    """
    if isinstance(module, KAF):
        return KafRanges(module)(low, high)
    if type(module) not in TURNS:
        raise ValueError(f"no interval rule for {type(module).__name__}; known: KAF, {[t.__name__ for t in TURNS]}")
    exact(module)
    sides = _values(module, low), _values(module, high)
    out = []
    for which in (0, 1):
        values = [sides[0][which], sides[1][which]]
        for turn in TURNS[type(module)][which]:
            inside = (low <= turn) & (turn <= high)
            at = _values(module, torch.full_like(low, turn))[which]
            values.append(torch.where(inside, at, values[0]))
        stack = torch.stack(values)
        out += [stack.amin(0), stack.amax(0)]
    return tuple(out)
