r"""Gaussian mixtures on an even grid: all D kernels are powers of one number.

With u = x - c, c the grid's middle, spacing Delta and m = (d - c) / Delta,

.. math:: k(x, d) = e^{-\gamma u^2} r^m w_m, \qquad r = e^{2 \gamma \Delta u}, \quad w_m = e^{-\gamma m^2 \Delta^2}:

three exponentials an element instead of D. Powers up to D - 1 would overflow float32 away from the middle. The same
arithmetic runs

* on a CPU, as loops that numba compiles (``native``, ``loops``), and on CUDA, as one Triton kernel forward and one
  backward (``fused``): by Horner's scheme in r above the middle and in 1 / r below it, several middles for many points;
* under ``torch.compile`` and everywhere else, as element-wise operations on whole tensors (``compiled``): products
  r^(pq) r^s, in groups of p points, each factor carrying half of exp(-gamma u^2), which keeps it in range.

Where e^(-gamma u^2), or half of it, underflows, f is exactly zero: some 20 spacings from the middle and more.
A dictionary that is learned has no such structure (``free``, ``fused_free``).
"""

import itertools
import math
import typing

import torch

from .kept import kept

STRIDE = 4  # points of a group


class Grid(typing.NamedTuple):
    """``size`` points from ``first`` on, ``spacing`` apart, with bandwidth ``gamma``."""

    size: int
    first: float
    spacing: float
    gamma: float

    def __str__(self):
        return " ".join(map(repr, self))

    def in_range(self):
        """False for kernels so narrow (2.1 x the default bandwidth) that r^5 would leave float32: one by one, then."""
        return self.gamma * self.spacing**2 <= 0.36


class Chunk(typing.NamedTuple):
    """Dictionary points start..stop-1, few enough for one centre; m counts spacings from the centre."""

    start: int
    stop: int
    groups: int
    middle: int  # the group whose first point is the centre
    centre: float
    weights: tuple  # w_m, zero for the padding behind the last point
    offsets: tuple  # m


def chunks(grid):
    """The dictionary cut into pieces that one centre can serve, in groups of STRIDE points."""
    # Limits on m with log(max float32) = 88: r^(2m) e^(-gamma u^2 / 2) must not overflow at its peak, and
    # e^(-gamma u^2 / 2) must not underflow while the last point's kernel is above e^-60.
    most = max(1, int(10.8 / math.sqrt(grid.gamma * grid.spacing**2)))
    count = math.ceil(grid.size / most)
    edges = [round(i * grid.size / count) for i in range(count + 1)]
    pieces = []
    for a, b in itertools.pairwise(edges):
        groups = math.ceil((b - a) / STRIDE)
        middle = (groups - 1) // 2
        offsets = [j - STRIDE * middle for j in range(groups * STRIDE)]
        weights = [math.exp(-grid.gamma * (m * grid.spacing) ** 2) for m in offsets[: b - a]]
        weights += [0.0] * (len(offsets) - len(weights))
        centre = grid.first + (a + STRIDE * middle) * grid.spacing
        pieces.append(Chunk(a, b, groups, middle, centre, tuple(weights), tuple(offsets)))
    return pieces


def parsed(text):
    """The grid of ``str(grid)``."""
    size, *floats = text.split()
    return Grid(int(size), *[float(v) for v in floats])


@kept
def points(grid, dtype, device):
    """The grid's dictionary, (1, D)."""
    steps = torch.arange(grid.size, dtype=torch.float64, device=device)
    return (grid.first + grid.spacing * steps).to(dtype)[None]


@kept
def bandwidth(grid, dtype, device):
    """The grid's gamma, (1,)."""
    return torch.full((1,), grid.gamma, dtype=dtype, device=device)
