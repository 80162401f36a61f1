"""Mixtures over any dictionary, one a channel or one for all, on tiles that fit the cache.

All D kernels k of a tile at a time: products of k and k t, t = x - d, with the coefficients for f and f'; sums of g k,
g k t and g k t^2 for the other gradients. Under ``torch.compile`` the same one dictionary point at a time, which the
compiler fuses.
"""

import math

import torch

from .channels import column, per_channel
from .tiles import subnormal_as_zero, temporaries, tiles, with_shapes

BLOCK = 131_072  # kernels worked on at a time: some 1 MB of temporaries


class _Tile:
    """Temporaries for a tile of x, (C, n, l), and D points."""

    def __init__(self, memory, shape, points):
        c, size = shape[0], shape[1] * shape[2]
        self.t, self.k = memory[: 2 * c * points * size].view(2, c, points, size)
        self.row = memory[2 * c * points * size :][: c * size].view(c, 1, size)
        self.image = self.row.view(shape)

    def kernels(self, x, dictionary, exponent):
        """Fills t = x - d and k = 2^(exponent t^2), (C, D, elements), by columns (1 or C, D or 1, 1)."""
        torch.sub(self.image.copy_(x).view_as(self.row), dictionary, out=self.t)
        torch.mul(self.t, self.t, out=self.k).mul_(exponent).exp2_()


def _tiles(x, dictionary):
    """The pieces of x, and the temporaries of each."""
    points = dictionary.shape[1]

    def of_shape(shape):
        return temporaries(x, dictionary.dtype, math.prod(shape) * (2 * points + 1), _Tile, shape, points)

    pieces = _pieces(x, dictionary)
    return zip(pieces, with_shapes(pieces, of_shape), strict=True)


def _pieces(x, dictionary):
    return tiles(x, max(1, BLOCK // dictionary.shape[1]))


def _columns(dictionary, gamma):
    return dictionary[:, :, None], (gamma / -math.log(2))[:, None, None]


def forward(x, alpha, dictionary, gamma, want_slope):
    """f and df/dx (None unless wanted) for x (N, C, *), alpha (C, D), dictionary (1 or C, D), gamma (1 or C,)."""
    if torch.compiler.is_compiling():
        return _forward_by_points(x, alpha, dictionary, gamma, want_slope)
    d, exponent = _columns(dictionary, gamma)
    a, moments = alpha[:, None], (-2 * gamma[:, None] * alpha)[:, None]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    slope = torch.empty_like(out, dtype=alpha.dtype) if want_slope else None
    outs = _pieces(out, dictionary)
    slopes = _pieces(slope, dictionary) if want_slope else outs
    with subnormal_as_zero(x):
        for (xb, tile), f, df in zip(_tiles(x, dictionary), outs, slopes, strict=True):
            tile.kernels(xb, d, exponent)
            torch.bmm(a, tile.k, out=tile.row)
            f.copy_(tile.image)
            if want_slope:
                torch.bmm(moments, tile.k.mul_(tile.t), out=tile.row)
                df.copy_(tile.image)
    return out, slope


def _sums(x, g, dictionary, gamma, powers):
    """Sums over images of g k t^p for p < ``powers``, (C, D, powers)."""
    sums = dictionary.new_zeros(powers, x.shape[1], dictionary.shape[1])
    d, exponent = _columns(dictionary, gamma)
    with subnormal_as_zero(x):
        for (xb, tile), gb in zip(_tiles(x, dictionary), _pieces(g, dictionary), strict=True):
            tile.kernels(xb, d, exponent)
            tile.k.mul_(tile.image.copy_(gb).view_as(tile.row))
            for p, total in enumerate(sums):  # the product of k and g as a matrix and a vector would take longer
                total += (tile.k.mul_(tile.t) if p else tile.k).sum(2)
    return sums


def correlation(x, g, dictionary, gamma):
    """h_ci = sum over n, * of g k(x, d_i), (C, D)."""
    return _sums(x, g, dictionary, gamma, 1)[0]


def gradients(g, x, alpha, dictionary, gamma, slope, need_x, need_parameters):
    """Gradients of sum(g f) in x and in alpha, dictionary and gamma, or None; ``slope`` is ``forward``'s, or None."""
    if torch.compiler.is_compiling():
        return _gradients_by_points(g, x, alpha, dictionary, gamma, slope)
    if need_x and slope is None:
        slope = forward(x, alpha, dictionary, gamma, True)[1]
    dx = (g * slope).to(x.dtype) if need_x else None
    if not need_parameters:
        return dx, None, None, None
    return dx, *of_parameters(_sums(x, g, dictionary, gamma, 3), alpha, dictionary, gamma)


def of_parameters(sums, alpha, dictionary, gamma):
    """Gradients in alpha, dictionary and gamma by the sums of g k, g k t and g k t^2, (3, C, D)."""
    h0, h1, h2 = sums
    dd = (2 * gamma[:, None] * alpha * h1).sum_to_size(dictionary.shape)
    return h0, dd, -(alpha * h2).sum(1).sum_to_size(gamma.shape)


# --- one point at a time, for the compiler ---------------------------------------------------------------------------


def _forward_by_points(x, alpha, dictionary, gamma, want_slope):
    scale = -gamma.reshape(-1, *[1] * (x.ndim - 2))
    out, slope = torch.zeros_like(x), torch.zeros_like(x) if want_slope else None
    for i in range(alpha.shape[1]):
        t = x - column(dictionary, i, x)
        k = torch.exp(scale * t * t) * column(alpha, i, x)
        out = out + k
        slope = slope + t * k if want_slope else None
    return out, 2 * scale * slope if want_slope else None


def _gradients_by_points(g, x, alpha, dictionary, gamma, slope):
    scale = -gamma.reshape(-1, *[1] * (x.ndim - 2))
    sums, dx = [], g * slope if slope is not None else torch.zeros_like(x)
    for i in range(alpha.shape[1]):
        t = x - column(dictionary, i, x)
        gk = g * torch.exp(scale * t * t)
        if slope is None:
            dx = dx + gk * t * (2 * scale * column(alpha, i, x))
        sums.append(torch.stack([per_channel(v, alpha) for v in (gk, gk * t, gk * t * t)]))
    return dx, *of_parameters(torch.stack(sums, 2), alpha, dictionary, gamma)
