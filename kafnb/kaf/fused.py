"""The even-grid mixture on CUDA: one kernel forward, one backward, each reading its inputs once.

Beside e = exp(-gamma u^2) and r = exp(2 gamma Delta u) a third exponential, s = 1 / r: the points above a centre are a
polynomial in r, those below one in s, both by Horner's scheme. Both have e before them, so centres stand closer than
in ``grid``. A program works on one channel, and its sums for the gradient in alpha are added to those of others after.
"""

import math

import torch
import triton
import triton.language as tl

from .tiles import kept

FORWARD, BACKWARD = 1024, 2048  # elements of a program
WARPS = 4


def usable(x):
    """float64 stays with the eager evaluation."""
    return x.dtype in (torch.float16, torch.bfloat16, torch.float32)


@triton.jit
def _read(x_ptr, j, c, total, C: tl.constexpr, L: tl.constexpr):
    """Elements j of channel c of a contiguous (N, C, L) tensor in float32, their places, and which of them exist."""
    place = (j // L).to(tl.int64) * (C * L) + c * L + j % L
    inside = j < total
    return tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32), place, inside


@triton.jit
def _powers(x, centre, gamma, kappa, reach):
    """u = x - centre within reach, e = 2^(-gamma u^2), r = 2^(kappa u) and 1 / r."""
    u = x - centre
    e = tl.exp2(-gamma * u * u)  # zero beyond the reach, where r is held
    u = tl.minimum(tl.maximum(u, -reach), reach)
    return u, e, tl.exp2(kappa * u), tl.exp2(-kappa * u)


@triton.jit
def _coefficient(a_ptr, w_ptr, c, k, j: tl.constexpr, D: tl.constexpr):
    """alpha of the point j of those from k on, times its weight; zero behind the last point."""
    return tl.load(a_ptr + c * D + k + j, mask=k + j < D, other=0.0) * tl.load(w_ptr + j)


@triton.jit
def _forward_kernel(
    x_ptr, a_ptr, w_ptr, f_ptr, total, first, spacing, gamma, kappa, reach,
    C: tl.constexpr, L: tl.constexpr, D: tl.constexpr, STEP: tl.constexpr, MIDDLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(1)
    x, place, inside = _read(x_ptr, tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), c, total, C, L)
    f = tl.zeros([BLOCK], tl.float32)
    for k in range(0, D, STEP):
        u, e, r, s = _powers(x, first + (k + MIDDLE) * spacing, gamma, kappa, reach)
        above = tl.zeros([BLOCK], tl.float32)
        below = tl.zeros([BLOCK], tl.float32)
        for i in tl.static_range(STEP - MIDDLE):
            above = above * r + _coefficient(a_ptr, w_ptr, c, k, STEP - 1 - i, D)
        for i in tl.static_range(MIDDLE):
            below = (below + _coefficient(a_ptr, w_ptr, c, k, i, D)) * s
        f += e * (above + below)
    tl.store(f_ptr + place, f.to(f_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    x_ptr, g_ptr, a_ptr, w_ptr, dx_ptr, h_ptr, total, first, spacing, gamma, kappa, reach, slope,
    C: tl.constexpr, L: tl.constexpr, D: tl.constexpr, STEP: tl.constexpr, MIDDLE: tl.constexpr, BLOCK: tl.constexpr,
    NEED_X: tl.constexpr, NEED_ALPHA: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(1)
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x, place, inside = _read(x_ptr, j, c, total, C, L)
    g = tl.load(g_ptr + place, mask=inside, other=0.0).to(tl.float32)
    dx = tl.zeros([BLOCK], tl.float32)
    for k in range(0, D, STEP):
        u, e, r, s = _powers(x, first + (k + MIDDLE) * spacing, gamma, kappa, reach)
        if NEED_X:  # each polynomial p with its derivative: p' <- p' r + p, p <- p r + a
            above = tl.zeros([BLOCK], tl.float32)
            below = tl.zeros([BLOCK], tl.float32)
            up = tl.zeros([BLOCK], tl.float32)
            down = tl.zeros([BLOCK], tl.float32)
            for i in tl.static_range(STEP - MIDDLE):
                up = up * r + above
                above = above * r + _coefficient(a_ptr, w_ptr, c, k, STEP - 1 - i, D)
            for i in tl.static_range(MIDDLE):
                below += _coefficient(a_ptr, w_ptr, c, k, i, D)
                down = down * s + below
                below *= s
            dx += e * (slope * spacing * (up * r - down * s) - slope * u * (above + below))
        if NEED_ALPHA:
            h = h_ptr + (tl.program_id(0) * C + c) * D + k
            power = g * e
            for i in tl.static_range(MIDDLE, STEP):
                tl.store(h + i, tl.sum(power, 0) * tl.load(w_ptr + i), mask=k + i < D)
                power *= r
            power = g * e
            for i in tl.static_range(1, MIDDLE + 1):
                power *= s
                tl.store(h + MIDDLE - i, tl.sum(power, 0) * tl.load(w_ptr + MIDDLE - i), mask=k + MIDDLE - i < D)
    if NEED_X:
        tl.store(dx_ptr + place, (g * dx).to(dx_ptr.dtype.element_ty), mask=inside)


def _centres(grid):
    """Points that one centre serves, and which of them is the centre.

    With reach = sqrt(87 / gamma), where e underflows, and m points to a side, r^m <= e^80 leaves room in float32.
    """
    most = max(1, int(80 / (2 * math.sqrt(87 * grid.gamma) * grid.spacing)))
    step = math.ceil(grid.size / math.ceil(grid.size / (2 * most + 1)))
    return step, step // 2


@kept
def _weights(grid, dtype, device):
    """exp(-gamma (m Delta)^2) of the points around a centre."""
    step, middle = _centres(grid)
    offsets = torch.arange(step, dtype=torch.float64, device=device) - middle
    return torch.exp(-grid.gamma * (offsets * grid.spacing) ** 2).to(dtype)


def _launch(x, alpha, grid, block):
    """Programs, and the arguments that both kernels share."""
    n, c = x.shape[:2]
    total, (step, middle) = x.numel() // c, _centres(grid)
    block = min(block, triton.next_power_of_2(total))
    numbers = (total, grid.first, grid.spacing, grid.gamma / math.log(2), 2 * grid.gamma * grid.spacing / math.log(2))
    shape = dict(C=c, L=total // n, D=grid.size, STEP=step, MIDDLE=middle, BLOCK=block, num_warps=WARPS)
    tables = alpha.float().contiguous(), _weights(grid, alpha.float())
    return triton.cdiv(total, block), tables, (*numbers, math.sqrt(87 / grid.gamma)), shape


def forward(x, alpha, grid):
    """f(x), contiguous, in x's type."""
    x = x.contiguous()
    out = torch.empty_like(x)
    if x.numel():
        programs, tables, numbers, shape = _launch(x, alpha, grid, FORWARD)
        _forward_kernel[programs, x.shape[1]](x, *tables, out, *numbers, **shape)
    return out


def gradients(g, x, alpha, grid, need_x=True, need_alpha=True):
    """(dx, dalpha) of sum(g f), None where not needed. Partial sums are added in a fixed order: repeatable."""
    x, g = x.contiguous(), g.contiguous()
    if not x.numel():
        return torch.zeros_like(x) if need_x else None, torch.zeros_like(alpha) if need_alpha else None
    programs, tables, numbers, shape = _launch(x, alpha, grid, BACKWARD)
    dx = torch.empty_like(x) if need_x else x
    partial = torch.empty(programs, *alpha.shape, dtype=torch.float32, device=x.device) if need_alpha else tables[0]
    _backward_kernel[programs, x.shape[1]](
        x, g, *tables, dx, partial, *numbers, 2 * grid.gamma, **shape, NEED_X=need_x, NEED_ALPHA=need_alpha
    )
    return dx if need_x else None, partial.sum(0).to(alpha.dtype) if need_alpha else None
