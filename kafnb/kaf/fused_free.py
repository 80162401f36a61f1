"""Mixtures over any dictionary on CUDA: one kernel forward and one backward for every POINTS points.

An exponential a point, and no tensor of the dictionary's size: what ``free`` does tile by tile happens in registers.
"""

import math

import torch
import triton
import triton.language as tl

from .free import of_parameters
from .fused import PROGRAMS, _read

BLOCK = 256  # elements a program works on at a time; a quarter of it backward, where 3 sums a point wait in registers
POINTS = 32  # of the dictionary at a time


@triton.jit
def _table(ptr, c, i, D: tl.constexpr):
    return tl.load(ptr + c * D + i, mask=i < D, other=0.0)[:, None]


@triton.jit
def _distances(x, d):
    return tl.minimum(tl.maximum(x, -1e18), 1e18)[None, :] - d  # t^2 stays finite


@triton.jit
def _forward_kernel(
    x_ptr, a_ptr, d_ptr, exponents, f_ptr, total,
    C: tl.constexpr, L: tl.constexpr, D: tl.constexpr, POINTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(1)
    x, place, inside = _read(x_ptr, tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), c, total, C, L)
    exponent, f = tl.load(exponents + c), tl.zeros([BLOCK], tl.float32)
    for first in range(0, D, POINTS):
        i = first + tl.arange(0, POINTS)
        t = _distances(x, _table(d_ptr, c, i, D))
        f += tl.sum(_table(a_ptr, c, i, D) * tl.exp2(exponent * t * t), 0)
    tl.store(f_ptr + place, f.to(f_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    x_ptr, g_ptr, m_ptr, d_ptr, exponents, dx_ptr, h_ptr, first, total,
    C: tl.constexpr, L: tl.constexpr, D: tl.constexpr, POINTS: tl.constexpr, BLOCK: tl.constexpr,
    NEED_X: tl.constexpr, NEED_SUMS: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    c, programs = tl.program_id(1), tl.num_programs(0)
    p = tl.arange(0, POINTS)
    d, m, exponent = _table(d_ptr, c, first + p, D), _table(m_ptr, c, first + p, D), tl.load(exponents + c)
    h0 = tl.zeros([POINTS, BLOCK], tl.float32)
    h1 = tl.zeros([POINTS, BLOCK], tl.float32)
    h2 = tl.zeros([POINTS, BLOCK], tl.float32)
    for start in range(tl.program_id(0) * BLOCK, total, programs * BLOCK):
        x, place, inside = _read(x_ptr, start + tl.arange(0, BLOCK), c, total, C, L)
        g = tl.load(g_ptr + place, mask=inside, other=0.0).to(tl.float32)
        t = _distances(x, d)
        gk = g[None, :] * tl.exp2(exponent * t * t)
        if NEED_X:
            dx = tl.sum(m * gk * t, 0)
            if ADD:
                dx += tl.load(dx_ptr + place, mask=inside, other=0.0)
            tl.store(dx_ptr + place, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        if NEED_SUMS:
            h0 += gk
            h1 += gk * t
            h2 += gk * t * t
    if NEED_SUMS:
        out = h_ptr + (tl.program_id(0) * C + c) * 3 * POINTS + p
        tl.store(out, tl.sum(h0, 1))
        tl.store(out + POINTS, tl.sum(h1, 1))
        tl.store(out + 2 * POINTS, tl.sum(h2, 1))


def _tables(c, gamma, *tables):
    """-gamma / log 2 of each channel, and the tables as (C, D), all contiguous in float32."""
    exponents = (gamma.float() / -math.log(2)).expand(c).contiguous()
    return exponents, *(t.float().expand(c, -1).contiguous() for t in tables)


def forward(x, alpha, dictionary, gamma):
    """f(x), contiguous, in x's type."""
    x, (n, c) = x.contiguous(), x.shape[:2]
    out, total = torch.empty_like(x), x.numel() // c
    if total:
        exponents, a, d = _tables(c, gamma, alpha, dictionary)
        shape = dict(C=c, L=total // n, D=alpha.shape[1], POINTS=POINTS, BLOCK=BLOCK)
        _forward_kernel[triton.cdiv(total, BLOCK), c](x, a, d, exponents, out, total, **shape)
    return out


def _backward(g, x, alpha, dictionary, gamma, need_x, need_sums):
    """dx, and the sums of g k, g k t and g k t^2, (3, C, D). Partial sums are added in a fixed order: repeatable."""
    x, g, (n, c) = x.contiguous(), g.contiguous(), x.shape[:2]
    total, size, block = x.numel() // c, dictionary.shape[1], BLOCK // 4
    exponents, m, d = _tables(c, gamma, -2 * gamma[:, None] * alpha, dictionary)
    # several rounds add into dx one after the other: then it must not be rounded in between
    dx = torch.zeros_like(x, dtype=x.dtype if size <= POINTS else torch.float32) if need_x else x
    programs = max(1, min(triton.cdiv(total, block), PROGRAMS // c))
    partial, parts = torch.zeros(programs, c, 3, POINTS, dtype=torch.float32, device=x.device), []
    for first in range(0, size, POINTS):
        if total:
            _backward_kernel[programs, c](
                x, g, m, d, exponents, dx, partial, first, total, C=c, L=total // n, D=size, POINTS=POINTS,
                BLOCK=block, NEED_X=need_x, NEED_SUMS=need_sums, ADD=first > 0,
            )  # fmt: skip
        parts.append(partial.sum(0))
    return dx.to(x.dtype), torch.cat(parts, 2)[..., :size].transpose(0, 1).to(dictionary.dtype)


def correlation(x, g, dictionary, gamma):
    """h_ci = sum over n, * of g k(x, d_i), (C, D)."""
    return _backward(g, x, dictionary, dictionary, gamma, False, True)[1][0]


def gradients(g, x, alpha, dictionary, gamma, need_x=True, need_parameters=True):
    """Gradients of sum(g f) in x and in alpha, dictionary and gamma, or None."""
    dx, sums = _backward(g, x, alpha, dictionary, gamma, need_x, need_parameters)
    dx = dx if need_x else None
    return dx, *(of_parameters(sums, alpha, dictionary, gamma) if need_parameters else (None, None, None))
