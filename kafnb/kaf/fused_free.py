"""Mixtures over any dictionary on CUDA: one kernel forward and one backward.

An exponential a point, and no tensor of the dictionary's size: what ``free`` does tile by tile happens in registers.
Tiles are those of ``walk``.
"""

import math

import torch
import triton
import triton.language as tl

from .free import of_parameters
from .walk import channels, column, keep, layout, like, places, programs, read

ROWS = 16  # of a tile backward, where sums of the whole program follow each point


@triton.jit
def _kernel(x, d_ptr, c, i, exponent, C: tl.constexpr, D: tl.constexpr):
    """t = x - d_i and k = 2^(exponent t^2)."""
    t = x - column(d_ptr, c, i, C, D)
    t = tl.clamp(t, -1e18, 1e18, propagate_nan=tl.PropagateNan.ALL)  # t^2 stays finite
    return t, tl.exp2(exponent * t * t)


@triton.jit
def _forward_kernel(
    x_ptr, a_ptr, d_ptr, exponents, f_ptr, total, C: tl.constexpr, L: tl.constexpr, LAST: tl.constexpr,
    D: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    c = channels(LANES, WIDTH)
    place, inside = places(tl.program_id(0), c, total, C, L, LAST, ROWS, LANES, WIDTH)
    x, exponent = read(x_ptr, place, inside), column(exponents, c, 0, C, 1)
    f = tl.zeros_like(x)
    for i in range(D):
        _, k = _kernel(x, d_ptr, c, i, exponent, C, D)
        f += column(a_ptr, c, i, C, D) * k
    tl.store(f_ptr + place, f.to(f_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    x_ptr, g_ptr, m_ptr, d_ptr, exponents, dx_ptr, h_ptr, total, C: tl.constexpr, L: tl.constexpr, LAST: tl.constexpr,
    D: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
    NEED_X: tl.constexpr, NEED_SUMS: tl.constexpr,
):  # fmt: skip
    c = channels(LANES, WIDTH)
    place, inside = places(tl.program_id(0), c, total, C, L, LAST, ROWS, LANES, WIDTH)
    x, g, exponent = read(x_ptr, place, inside), read(g_ptr, place, inside), column(exponents, c, 0, C, 1)
    dx = tl.zeros_like(x)
    for i in range(D):
        t, k = _kernel(x, d_ptr, c, i, exponent, C, D)
        k *= g
        kt = k * t
        if NEED_X:
            dx += column(m_ptr, c, i, C, D) * kt
        if NEED_SUMS:
            h = h_ptr + tl.program_id(0) * 3 * C * D
            keep(h, i, tl.sum(k, 0), C, D, LANES, WIDTH)
            keep(h + C * D, i, tl.sum(kt, 0), C, D, LANES, WIDTH)
            keep(h + 2 * C * D, i, tl.sum(kt * t, 0), C, D, LANES, WIDTH)
    if NEED_X:
        tl.store(dx_ptr + place, dx.to(dx_ptr.dtype.element_ty), mask=inside)


def _tables(c, gamma, *tables):
    """The tables as (C, D), and -gamma / log 2 of each channel, all contiguous in float32."""
    exponents = (gamma.float() / -math.log(2)).expand(c).contiguous()
    return *(t.float().expand(c, -1).contiguous() for t in tables), exponents


def forward(x, alpha, dictionary, gamma):
    """f(x) in x's type, and in its memory format where that is channels first or last."""
    x, total, shape = layout(x)
    out = torch.empty_like(x)
    if x.numel():
        tables = _tables(x.shape[1], gamma, alpha, dictionary)
        _forward_kernel[programs(shape, total)](x, *tables, out, total, D=alpha.shape[1], **shape)
    return out


def _backward(g, x, alpha, dictionary, gamma, need_x, need_sums):
    """dx, and the sums of g k, g k t and g k t^2, (3, C, D). Partial sums are added in a fixed order: repeatable."""
    x, total, shape = layout(x)
    c, size = x.shape[1], dictionary.shape[1]
    if not x.numel():
        return torch.zeros_like(x), dictionary.new_zeros(3, c, size)
    shape["ROWS"] = ROWS
    where, tables = programs(shape, total), _tables(c, gamma, -2 * gamma[:, None] * alpha, dictionary)
    dx = torch.empty_like(x) if need_x else x
    partial = torch.empty(where[0], 3, c, size, dtype=torch.float32, device=x.device) if need_sums else tables[0]
    _backward_kernel[where](
        x, like(g, x), *tables, dx, partial, total, D=size, **shape, NEED_X=need_x, NEED_SUMS=need_sums
    )  # fmt: skip
    return dx, partial.sum(0).to(dictionary.dtype) if need_sums else None


def correlation(x, g, dictionary, gamma):
    """h_ci = sum over n, * of g k(x, d_i), (C, D)."""
    return _backward(g, x, dictionary, dictionary, gamma, False, True)[1][0]


def gradients(g, x, alpha, dictionary, gamma, need_x=True, need_parameters=True):
    """Gradients of sum(g f) in x and in alpha, dictionary and gamma, or None."""
    dx, sums = _backward(g, x, alpha, dictionary, gamma, need_x, need_parameters)
    dx = dx if need_x else None
    return dx, *(of_parameters(sums, alpha, dictionary, gamma) if need_parameters else (None, None, None))
