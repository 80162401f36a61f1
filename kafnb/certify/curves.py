r"""Rigorous ranges and linear relaxations of activation functions over an interval.

One fact serves all of them. Split [l, u] into K equal pieces; on each a twice differentiable f strays from its chord by
at most

.. math:: e = \frac{1}{8} \Bigl(\frac{u - l}{K}\Bigr)^2 \sup |f''| ,

so f is enclosed by its values at the K + 1 points and e. Points where f has a kink (ReLU: 0) join the others. What is
left to know of a function is a bound on its second derivative: a number for the fixed ones; for a KAF one a channel,
computed from its coefficients.
"""

import copy
import dataclasses
import math

import torch
from torch import nn

from ..kaf import KAF
from ..lipschitz.units import exact

PIECES = 32
SLACK = 1e-9  # relative; above the rounding of float64 in all that follows, below any bound of interest


@dataclasses.dataclass(frozen=True)
class Curve:
    """What the bounds need to know of an element-wise function.

    Attributes
    ----------
    value : callable
        (N, C, *) -> same.
    curvature : float or Tensor, shape (C,)
        Upper bound of |f''| within reach, away from the kink.
    kink : bool
        Whether f' jumps at 0.
    monotone : bool
        Whether f never falls: its range is then (f(l), f(u)).
    reach, tail : float
        Beyond |x| > reach, |f| <= tail. Infinite reach: no such statement.
    """

    value: object
    curvature: object
    kink: bool = False
    monotone: bool = True
    reach: float = math.inf
    tail: float = 0.0


CURVES = {
    nn.ReLU: lambda m: Curve(m, 0.0, kink=True),
    nn.LeakyReLU: lambda m: Curve(m, 0.0, kink=True, monotone=m.negative_slope >= 0),
    nn.ELU: lambda m: Curve(m, abs(m.alpha), kink=True, monotone=m.alpha >= 0),
    nn.CELU: lambda m: Curve(m, 1 / m.alpha) if m.alpha > 0 else None,
    nn.Softplus: lambda m: Curve(exact(m), m.beta / 4),
    nn.Sigmoid: lambda m: Curve(m, 1 / (6 * math.sqrt(3))),
    nn.Tanh: lambda m: Curve(m, 4 / (3 * math.sqrt(3))),
    nn.PReLU: lambda m: Curve(m, 0.0, kink=True, monotone=bool((m.weight >= 0).all())),
    nn.SiLU: lambda m: Curve(m, 0.5, monotone=False),
    nn.GELU: lambda m: Curve(exact(m), math.sqrt(2 / math.pi), monotone=False),
    KAF: lambda m: kaf_curve(m),
}


def kaf_curve(kaf):
    r"""Bounds on a KAF's second derivative, and on its tails.

    On a grid of step h, a function g strays from the larger of its neighbouring values by at most h^2/8 sup |g''|. With
    g = f'' and :math:`|k''''| \le 12 \gamma^2` this turns values of f'' on a grid into a bound everywhere.

    Raises
    ------
    ValueError
        For a kernel other than the Gaussian.
    """
    if kaf.kernels != ("gaussian",):
        raise ValueError(f"bounds of a KAF are there for the Gaussian kernel alone, got {kaf.kernels}")
    with torch.no_grad():
        alpha, d, gamma = kaf.alpha.double(), kaf.dictionary.double(), kaf.bandwidth.double()[:, None]
        size = alpha.abs().sum(1, keepdim=True)  # (C, 1)
        # beyond reach all kernels together are below 1e-12
        reach = float((d.abs().amax() + (torch.log(1e12 * size.clamp_min(1e-9)).clamp_min(1.0) / gamma).sqrt()).max())
        spacing = float(1 / (64 * gamma.amax().sqrt()))
        x = torch.arange(-reach, reach + spacing, spacing, dtype=torch.float64, device=alpha.device)
        second = torch.zeros(len(alpha), len(x), dtype=torch.float64, device=alpha.device)
        for i in range(alpha.shape[1]):  # one dictionary point at a time: (C, G), never (C, G, D)
            s = gamma * (x - d[:, i : i + 1]) ** 2
            second += alpha[:, i : i + 1] * 2 * gamma * (2 * s - 1) * torch.exp(-s)
        between = spacing**2 / 8 * 12 * gamma**2 * size
        curvature = second.abs().amax(1) + between[:, 0]
    return Curve(kaf, curvature, monotone=False, reach=reach, tail=1e-12)


def curve(module):
    """The ``Curve`` of an activation module, or None."""
    make = CURVES.get(type(module))
    if make is not None and getattr(module, "inplace", False):  # the interval is still needed
        module = copy.copy(module)
        module.inplace = False
    return None if make is None else make(module)


def _channels(value, x):
    """A number, or (C,) -> (C, 1, ...), to broadcast along dimension 1 of x (N, C, *)."""
    return value.to(x.dtype).reshape(-1, *[1] * (x.ndim - 2)) if isinstance(value, torch.Tensor) else value


def _samples(curve, low, high, pieces=PIECES):
    """Points (P, N, C, *) of each interval, the values there, and how far f strays between them (N, C, *)."""
    inner_low, inner_high = low.clamp(-curve.reach, curve.reach), high.clamp(-curve.reach, curve.reach)
    share = torch.linspace(0, 1, pieces + 1, dtype=low.dtype, device=low.device).view(-1, *[1] * low.ndim)
    points = inner_low + share * (inner_high - inner_low)
    extra = [torch.minimum(torch.maximum(torch.zeros_like(low), low), high)] if curve.kink else []
    extra += [low, high]
    points = torch.cat([points, torch.stack(extra)])
    points = torch.minimum(torch.maximum(points, low), high)  # rounding may have left the interval
    values = curve.value(points.flatten(0, 1)).unflatten(0, points.shape[:2])
    stray = ((inner_high - inner_low) / pieces) ** 2 / 8 * _channels(curve.curvature, low) + 2 * curve.tail
    return points, values, stray + SLACK * values.abs().amax(0)


def value_range(curve, low, high, pieces=PIECES):
    """Smallest and largest value of f on [low, high], tensors (N, C, *); differentiable.

    Exact for monotone functions; else at most e (module docstring) too wide on each side, e the square of the width.
    """
    if curve.monotone:
        return curve.value(low), curve.value(high)
    _, values, stray = _samples(curve, low, high, pieces)
    return values.amin(0) - stray, values.amax(0) + stray


def relaxation(curve, low, high):
    """Two lines around f on [low, high]: a_l x + b_l <= f(x) <= a_u x + b_u.

    The slopes tried are those of the chord and of secants at both ends (for ReLU: 0 and 1); each side takes the one
    whose line is best in the middle of the interval, which is the least area, and of equals the chord.

    Returns
    -------
    (a_l, b_l), (a_u, b_u) : tensors shaped as low
    """
    points, values, stray = _samples(curve, low, high)
    width = (high - low).clamp_min(1e-12)
    chord = (values[-1] - values[-2]) / width  # the last two points are low and high
    step = 0.01 * width
    slopes = [chord, (curve.value(low + step) - values[-2]) / step, (values[-1] - curve.value(high - step)) / step]
    slopes.append(torch.zeros_like(low))
    middle, sides = (low + high) / 2, []
    for sign in (1, -1):  # the lower line; the upper one is the lower line of -f, turned round
        a = torch.stack([sign * s for s in slopes])
        b = torch.stack([(sign * values - s * points).amin(0) for s in a]) - stray
        best = (a * middle + b).argmax(0, keepdim=True)
        sides.append(tuple(sign * t.gather(0, best)[0] for t in (a, b)))
    return sides
