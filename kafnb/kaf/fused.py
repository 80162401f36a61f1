"""The even-grid mixture on CUDA: one kernel forward, one backward, each reading its inputs once.

Beside e = exp(-gamma u^2) and r = exp(2 gamma Delta u) a third exponential, s = 1 / r: the points above a centre are a
polynomial in r, those below one in s, both by Horner's scheme. Both have e before them, so centres stand closer than
in ``grid``. The coefficients, and the sums for the gradient in alpha, stay in a thread's registers from tile to tile
(``walk``).
"""

import math

import torch
import triton
import triton.language as tl

from .kept import kept
from .walk import channels, column, keep, layout, like, places, programs, read


@triton.jit
def _powers(x, centre, gamma, kappa):
    """u = x - centre, e = 2^(-gamma u^2), r = 2^(kappa u) and 1 / r; u is 0 where e is no normal number."""
    u = x - centre
    e = tl.exp2(-gamma * u * u)
    u = tl.where(e < 1.1754944e-38, 0.0, u)  # there r^i must not be infinite, nor times a large coefficient
    return u, e, tl.exp2(kappa * u), tl.exp2(-kappa * u)


@triton.jit
def _weighted(a_ptr, w_ptr, c, k, C: tl.constexpr, D: tl.constexpr, STEP: tl.constexpr):
    """Coefficients of the points around a centre, each (1, threads)."""
    a = ()
    for i in tl.static_range(STEP):
        a = a + (column(a_ptr, c, k + i, C, D) * tl.load(w_ptr + i),)
    return a


@triton.jit
def _forward_kernel(
    x_ptr, a_ptr, w_ptr, f_ptr, total, first, spacing, gamma, kappa,
    C: tl.constexpr, L: tl.constexpr, LAST: tl.constexpr, D: tl.constexpr, STEP: tl.constexpr, MIDDLE: tl.constexpr,
    ROWS: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    c = channels(LANES, WIDTH)
    if STEP == D:
        whole = _weighted(a_ptr, w_ptr, c, 0, C, D, STEP)
    for tile in range(tl.program_id(0), tl.cdiv(total, ROWS * LANES), tl.num_programs(0)):
        place, inside = places(tile, c, total, C, L, LAST, ROWS, LANES, WIDTH)
        x = read(x_ptr, place, inside)
        f = tl.zeros_like(x)
        for k in range(0, D, STEP):
            a = whole if STEP == D else _weighted(a_ptr, w_ptr, c, k, C, D, STEP)
            _, e, r, s = _powers(x, first + (k + MIDDLE) * spacing, gamma, kappa)
            above, below = tl.zeros_like(x), tl.zeros_like(x)
            for i in tl.static_range(STEP - MIDDLE):
                above = above * r + a[STEP - 1 - i]
            for i in tl.static_range(MIDDLE):
                below = (below + a[i]) * s
            f += e * (above + below)
        tl.store(f_ptr + place, f.to(f_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    x_ptr, g_ptr, a_ptr, w_ptr, dx_ptr, h_ptr, k, total, first, spacing, gamma, kappa, slope,
    C: tl.constexpr, L: tl.constexpr, LAST: tl.constexpr, D: tl.constexpr, STEP: tl.constexpr, MIDDLE: tl.constexpr,
    ROWS: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
    NEED_X: tl.constexpr, NEED_ALPHA: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    c, sums = channels(LANES, WIDTH), ()
    if NEED_X:
        a = _weighted(a_ptr, w_ptr, c, k, C, D, STEP)
    for _ in tl.static_range(STEP if NEED_ALPHA else 0):
        sums = sums + (tl.zeros([LANES * WIDTH], tl.float32),)
    for tile in range(tl.program_id(0), tl.cdiv(total, ROWS * LANES), tl.num_programs(0)):
        place, inside = places(tile, c, total, C, L, LAST, ROWS, LANES, WIDTH)
        x, g = read(x_ptr, place, inside), read(g_ptr, place, inside)
        u, e, r, s = _powers(x, first + (k + MIDDLE) * spacing, gamma, kappa)
        if NEED_X:  # each polynomial p with its derivative: p' <- p' r + p, p <- p r + a
            above, below, up, down = tl.zeros_like(x), tl.zeros_like(x), tl.zeros_like(x), tl.zeros_like(x)
            for i in tl.static_range(STEP - MIDDLE):
                up = up * r + above
                above = above * r + a[STEP - 1 - i]
            for i in tl.static_range(MIDDLE):
                below += a[i]
                down = down * s + below
                below *= s
            dx = g * e * (slope * spacing * (up * r - down * s) - slope * u * (above + below))
            if ADD:
                dx += read(dx_ptr, place, inside)
            tl.store(dx_ptr + place, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        if NEED_ALPHA:
            power, upper, lower = g * e, (), ()
            for i in tl.static_range(MIDDLE, STEP):
                upper = upper + (sums[i] + tl.sum(power, 0),)
                power *= r
            power = g * e
            for i in tl.static_range(MIDDLE):
                power *= s
                lower = (sums[MIDDLE - 1 - i] + tl.sum(power, 0),) + lower
            sums = lower + upper
    if NEED_ALPHA:
        h = h_ptr + tl.program_id(0) * C * D
        for i in tl.static_range(STEP):
            keep(h, k + i, sums[i] * tl.load(w_ptr + i), C, D, LANES, WIDTH)


def _centres(grid):
    """Points that one centre serves, and which of them is the centre.

    Within sqrt(87 / gamma), beyond which e underflows, and with m points to a side, r^m <= e^80 leaves room in float32.
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


def _described(x, alpha, grid):
    """x and how to go through it; tables, numbers and constants of the grid, for both kernels."""
    x, total, shape = layout(x)
    (step, middle), log2 = _centres(grid), math.log(2)
    numbers = grid.first, grid.spacing, grid.gamma / log2, 2 * grid.gamma * grid.spacing / log2
    tables = alpha.float().contiguous(), _weights(grid, alpha.float())
    shape |= dict(D=grid.size, STEP=step, MIDDLE=middle)
    return x, total, tables, numbers, shape


def forward(x, alpha, grid):
    """f(x) in x's type, and in its memory format where that is channels first or last."""
    x, total, tables, numbers, shape = _described(x, alpha, grid)
    out = torch.empty_like(x)
    if x.numel():
        _forward_kernel[programs(shape, total, 4)](x, *tables, out, total, *numbers, **shape)
    return out


def gradients(g, x, alpha, grid, need_x=True, need_alpha=True):
    """(dx, dalpha) of sum(g f), None where not needed. Partial sums are added in a fixed order: repeatable."""
    x, total, tables, numbers, shape = _described(x, alpha, grid)
    if not x.numel():
        return torch.zeros_like(x) if need_x else None, torch.zeros_like(alpha) if need_alpha else None
    g, where = like(g, x), programs(shape, total, 16)
    # several centres add into dx one after the other: then it must not be rounded in between
    dx = torch.empty_like(x, dtype=x.dtype if shape["STEP"] == grid.size else torch.float32) if need_x else x
    partial = torch.empty(where[0], *alpha.shape, dtype=torch.float32, device=x.device) if need_alpha else tables[0]
    for k in range(0, grid.size, shape["STEP"]):
        _backward_kernel[where](
            x, g, *tables, dx, partial, k, total, *numbers, 2 * grid.gamma,
            **shape, NEED_X=need_x, NEED_ALPHA=need_alpha, ADD=k > 0,
        )  # fmt: skip
    return dx.to(x.dtype) if need_x else None, partial.sum(0).to(alpha.dtype) if need_alpha else None
