"""Mixtures over any dictionary on CUDA: one kernel forward and one backward.

An exponential a point, and no tensor of the dictionary's size: what ``free`` does tile by tile happens in registers.
With t = sqrt(gamma / log 2) (x - d), k = 2^(-t^2). Tiles are those of ``walk``.
"""

import torch
import triton
import triton.language as tl

from .free import of_parameters
from .walk import channels, column, keep, layout, like, places, programs, read, turn

FORWARD, BACKWARD = 16, 32  # elements of a tile that a thread takes; backward, a program's sums follow each point
WIDEST = 32  # channels of a tile backward: the more places, the fewer sums go to memory


@triton.jit
def _root(gammas, c, C: tl.constexpr):
    """sqrt(gamma / log 2) of each thread's channel; at least 1e-15, by whose square can still be divided."""
    return tl.maximum(tl.sqrt(column(gammas, c, 0, C, 1) * 1.4426950408889634), 1e-15)


@triton.jit
def _near(x):
    """x within 1e18, so that no infinity meets a kernel's zero."""
    return tl.clamp(x, -1e18, 1e18, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _kernel(x, d_ptr, c, i, root, C: tl.constexpr, D: tl.constexpr):
    """t = root (x - d_i) and k = 2^(-t^2)."""
    t = x * root - column(d_ptr, c, i, C, D) * root
    return t, tl.exp2(-(t * t))


@triton.jit
def _forward_kernel(
    x_ptr, a_ptr, d_ptr, gammas, f_ptr, total, C: tl.constexpr, L: tl.constexpr, LAST: tl.constexpr,
    D: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, VECTOR: tl.constexpr, LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    c = channels(C, LANES, WIDTH)
    place, inside = places(turn(C, WIDTH)[0], c, total, C, L, LAST, WHOLE, ROWS, VECTOR, LANES, WIDTH)
    x, root = _near(read(x_ptr, place, inside)), _root(gammas, c, C)
    f = tl.zeros_like(x)
    for i in range(D):
        _, k = _kernel(x, d_ptr, c, i, root, C, D)
        f += column(a_ptr, c, i, C, D) * k
    tl.store(f_ptr + place, f.to(f_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    x_ptr, g_ptr, a_ptr, d_ptr, gammas, dx_ptr, h_ptr, total, C: tl.constexpr, L: tl.constexpr, LAST: tl.constexpr,
    D: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, VECTOR: tl.constexpr, LANES: tl.constexpr,
    WIDTH: tl.constexpr, NEED_X: tl.constexpr, NEED_SUMS: tl.constexpr,
):  # fmt: skip
    c = channels(C, LANES, WIDTH)
    tile = turn(C, WIDTH)[0]
    place, inside = places(tile, c, total, C, L, LAST, WHOLE, ROWS, VECTOR, LANES, WIDTH)
    x, g, root = _near(read(x_ptr, place, inside)), read(g_ptr, place, inside), _root(gammas, c, C)
    dx, scale, h = tl.zeros_like(x), 1 / root.reshape(LANES * WIDTH), h_ptr + tile.to(tl.int64) * (3 * C * D)
    for i in range(D):
        t, k = _kernel(x, d_ptr, c, i, root, C, D)
        k *= g
        kt = k * t
        if NEED_X:
            dx += column(a_ptr, c, i, C, D) * kt
        if NEED_SUMS:
            keep(h, i, tl.sum(tl.sum(k, 2), 1), C, D, LANES, WIDTH)
            keep(h + C * D, i, tl.sum(tl.sum(kt, 2), 1) * scale, C, D, LANES, WIDTH)
            keep(h + 2 * C * D, i, tl.sum(tl.sum(kt * t, 2), 1) * scale * scale, C, D, LANES, WIDTH)
    if NEED_X:  # -2 gamma (x - d) is -2 log 2 root t
        dx *= -1.3862943611198906 * root
        tl.store(dx_ptr + place, dx.to(dx_ptr.dtype.element_ty), mask=inside)


def _tables(c, gamma, *tables):
    """The tables as (C, D), and gamma of each channel, all contiguous in float32."""
    return *(t.float().expand(c, -1).contiguous() for t in tables), gamma.float().expand(c).contiguous()


def forward(x, alpha, dictionary, gamma):
    """f(x) in x's type, and in its memory format where that is channels first or last."""
    x, total, shape = layout(x, FORWARD)
    out = torch.empty_like(x)
    if x.numel():
        tables = _tables(x.shape[1], gamma, alpha, dictionary)
        with torch.cuda.device_of(x):
            _forward_kernel[programs(shape, total)[1]](x, *tables, out, total, D=alpha.shape[1], **shape)
    return out


def _backward(g, x, alpha, dictionary, gamma, need_x, need_sums):
    """dx, and the sums of g k, g k t and g k t^2, (3, C, D). Partial sums are added in a fixed order: repeatable."""
    x, total, shape = layout(x, *(BACKWARD, WIDEST) if need_sums else (FORWARD,))
    c, size = x.shape[1], dictionary.shape[1]
    if not x.numel():
        return torch.zeros_like(x), dictionary.new_zeros(3, c, size)
    tables, (count, where) = _tables(c, gamma, alpha, dictionary), programs(shape, total)
    dx = torch.empty_like(x) if need_x else x
    partial = torch.empty(count, 3, c, size, dtype=torch.float32, device=x.device) if need_sums else tables[0]
    with torch.cuda.device_of(x):
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
