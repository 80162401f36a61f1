"""Mixtures over any dictionary on CUDA: one kernel forward and one backward.

An exponential a point, and no tensor of the dictionary's size: what ``free`` does tile by tile happens in registers.
"""

import math

import torch
import triton
import triton.language as tl

from .free import of_parameters
from .fused import WARPS, _read

FORWARD, BACKWARD = 1024, 1024  # elements of a program


@triton.jit
def _kernel(x, d_ptr, c, i, exponent, D: tl.constexpr):
    """t = x - d_i and k = 2^(exponent t^2)."""
    t = x - tl.load(d_ptr + c * D + i)
    t = tl.minimum(tl.maximum(t, -1e18), 1e18)  # t^2 stays finite
    return t, tl.exp2(exponent * t * t)


@triton.jit
def _forward_kernel(
    x_ptr, a_ptr, d_ptr, exponents, f_ptr, total,
    C: tl.constexpr, L: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(1)
    x, place, inside = _read(x_ptr, tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), c, total, C, L)
    exponent, f = tl.load(exponents + c), tl.zeros([BLOCK], tl.float32)
    for i in range(D):
        t, k = _kernel(x, d_ptr, c, i, exponent, D)
        f += tl.load(a_ptr + c * D + i) * k
    tl.store(f_ptr + place, f.to(f_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    x_ptr, g_ptr, m_ptr, d_ptr, exponents, dx_ptr, h_ptr, total,
    C: tl.constexpr, L: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    NEED_X: tl.constexpr, NEED_SUMS: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(1)
    x, place, inside = _read(x_ptr, tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), c, total, C, L)
    g = tl.load(g_ptr + place, mask=inside, other=0.0).to(tl.float32)
    exponent, dx = tl.load(exponents + c), tl.zeros([BLOCK], tl.float32)
    h = h_ptr + (tl.program_id(0) * 3 * C + c) * D
    for i in range(D):
        t, k = _kernel(x, d_ptr, c, i, exponent, D)
        k *= g
        if NEED_X:
            dx += tl.load(m_ptr + c * D + i) * k * t
        if NEED_SUMS:
            tl.store(h + i, tl.sum(k, 0))
            k *= t
            tl.store(h + C * D + i, tl.sum(k, 0))
            tl.store(h + 2 * C * D + i, tl.sum(k * t, 0))
    if NEED_X:
        tl.store(dx_ptr + place, dx.to(dx_ptr.dtype.element_ty), mask=inside)


def _launch(x, gamma, size, block, *tables):
    """Programs, the tables as (C, D) and -gamma / log 2 of each channel, contiguous in float32, and the shape."""
    n, c = x.shape[:2]
    total = x.numel() // c
    block = min(block, triton.next_power_of_2(total))
    exponents = (gamma.float() / -math.log(2)).expand(c).contiguous()
    tables = *(t.float().expand(c, -1).contiguous() for t in tables), exponents
    return triton.cdiv(total, block), tables, total, dict(C=c, L=total // n, D=size, BLOCK=block, num_warps=WARPS)


def forward(x, alpha, dictionary, gamma):
    """f(x), contiguous, in x's type."""
    x = x.contiguous()
    out = torch.empty_like(x)
    if x.numel():
        programs, tables, total, shape = _launch(x, gamma, alpha.shape[1], FORWARD, alpha, dictionary)
        _forward_kernel[programs, x.shape[1]](x, *tables, out, total, **shape)
    return out


def _backward(g, x, alpha, dictionary, gamma, need_x, need_sums):
    """dx, and the sums of g k, g k t and g k t^2, (3, C, D). Partial sums are added in a fixed order: repeatable."""
    x, g, (c, size) = x.contiguous(), g.contiguous(), (x.shape[1], dictionary.shape[1])
    if not x.numel():
        return torch.zeros_like(x), dictionary.new_zeros(3, c, size)
    programs, tables, total, shape = _launch(x, gamma, size, BACKWARD, -2 * gamma[:, None] * alpha, dictionary)
    dx = torch.empty_like(x) if need_x else x
    partial = torch.empty(programs, 3, c, size, dtype=torch.float32, device=x.device) if need_sums else tables[0]
    _backward_kernel[programs, c](
        x, g, *tables, dx, partial, total, **shape, NEED_X=need_x, NEED_SUMS=need_sums
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
