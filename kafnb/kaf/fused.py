"""The even-grid mixture on CUDA: one kernel forward, one backward, each reading its inputs once.

With t = sqrt(gamma / log 2) (x - c), c a centre, beside e = 2^(-t^2) and r = exp(2 gamma Delta (x - c)) a third
exponential, s = 1 / r: the points above a centre are a polynomial in r, those below one in s, both by Horner's scheme.
Both have e before them, so centres stand closer than in ``grid``. The coefficients, and the sums for the gradient in
alpha, stay in a thread's registers from tile to tile (``walk``).
"""

import math

import torch
import triton
import triton.language as tl

from .kept import kept
from .walk import channels, column, keep, layout, like, places, programs, read, turn


@triton.jit
def _powers(x, centre, spacing, root):
    """t = root x - centre, e = 2^(-t^2), r = 2^(2 spacing t) and 1 / r; t is 0 where e is no normal number."""
    t = x * root - centre
    e = tl.exp2(-(t * t))
    t = tl.where(e < 1.1754944e-38, 0.0, t)  # there r^i must not be infinite, nor times a large coefficient
    return t, e, tl.exp2(2 * spacing * t), tl.exp2(-2 * spacing * t)


@triton.jit
def _weighted(a_ptr, w_ptr, c, k, scale, C: tl.constexpr, D: tl.constexpr, STEP: tl.constexpr):
    """Coefficients of the points around a centre, each (threads, 1, 1)."""
    a = ()
    for i in tl.static_range(STEP):
        a = a + (column(a_ptr, c, k + i, C, D) * (scale * tl.load(w_ptr + i)),)
    return a


@triton.jit
def _forward_kernel(
    x_ptr, a_ptr, w_ptr, f_ptr, total, first, spacing, root,
    C: tl.constexpr, L: tl.constexpr, LAST: tl.constexpr, D: tl.constexpr, STEP: tl.constexpr, MIDDLE: tl.constexpr,
    WHOLE: tl.constexpr, ROWS: tl.constexpr, VECTOR: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    c = channels(C, LANES, WIDTH)
    start, on = turn(C, WIDTH)
    if STEP == D:
        whole = _weighted(a_ptr, w_ptr, c, 0, 1.0, C, D, STEP)
    for tile in range(start, tl.cdiv(total, ROWS * VECTOR * LANES), on):
        place, inside = places(tile, c, total, C, L, LAST, WHOLE, ROWS, VECTOR, LANES, WIDTH)
        x = read(x_ptr, place, inside)
        f = tl.zeros_like(x)
        for k in range(0, D, STEP):
            a = whole if STEP == D else _weighted(a_ptr, w_ptr, c, k, 1.0, C, D, STEP)
            _, e, r, s = _powers(x, first + (k + MIDDLE) * spacing, spacing, root)
            above, below = a[STEP - 1], a[0]
            for i in tl.static_range(1, STEP - MIDDLE):
                above = above * r + a[STEP - 1 - i]
            for i in tl.static_range(1, MIDDLE):
                below = below * s + a[i]
            f += e * (below * s + above)
        tl.store(f_ptr + place, f.to(f_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _added(sums, high, r, s, STEP: tl.constexpr, MIDDLE: tl.constexpr):
    """sums plus those of ``high`` r^m over the tile, each r^m the product of one in four powers and one of four."""
    low = (r, r * r, r * r * r)
    up, down, back = low[1] * low[1], (s * s) * (s * s), high
    upper, lower = (), ()
    for i in tl.static_range(MIDDLE, STEP):
        if i > MIDDLE and (i - MIDDLE) % 4 == 0:
            high *= up
        power = high if (i - MIDDLE) % 4 == 0 else high * low[(i - MIDDLE) % 4 - 1]
        upper = upper + (sums[i] + tl.sum(tl.sum(power, 2), 1),)
    for i in tl.static_range(1, MIDDLE + 1):
        if i % 4 == 1:
            back *= down
        power = back if i % 4 == 0 else back * low[3 - i % 4]
        lower = (sums[MIDDLE - i] + tl.sum(tl.sum(power, 2), 1),) + lower
    return lower + upper


@triton.jit
def _backward_kernel(
    x_ptr, g_ptr, a_ptr, w_ptr, dx_ptr, h_ptr, k, total, first, spacing, root,
    C: tl.constexpr, L: tl.constexpr, LAST: tl.constexpr, D: tl.constexpr, STEP: tl.constexpr, MIDDLE: tl.constexpr,
    WHOLE: tl.constexpr, ROWS: tl.constexpr, VECTOR: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
    NEED_X: tl.constexpr, NEED_ALPHA: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    c, sums = channels(C, LANES, WIDTH), ()
    start, on = turn(C, WIDTH)
    if NEED_X:
        a = _weighted(a_ptr, w_ptr, c, k, 1.3862943611198906 * root, C, D, STEP)  # 2 gamma / root
    for _ in tl.static_range(STEP if NEED_ALPHA else 0):
        sums = sums + (tl.zeros([LANES * WIDTH], tl.float32),)
    for tile in range(start, tl.cdiv(total, ROWS * VECTOR * LANES), on):
        place, inside = places(tile, c, total, C, L, LAST, WHOLE, ROWS, VECTOR, LANES, WIDTH)
        x, g = read(x_ptr, place, inside), read(g_ptr, place, inside)
        t, e, r, s = _powers(x, first + (k + MIDDLE) * spacing, spacing, root)
        if NEED_X:  # each polynomial p with its derivative: p' <- p' r + p, p <- p r + a
            above, up, below, down = a[STEP - 1], 0.0, a[0], 0.0
            for i in tl.static_range(1, STEP - MIDDLE):
                up = above if i == 1 else up * r + above
                above = above * r + a[STEP - 1 - i]
            for i in tl.static_range(1, MIDDLE):
                down = below if i == 1 else down * s + below
                below = below * s + a[i]
            down = down * s + below  # of s times the polynomial
            dx = g * e * (spacing * (up * r - down * s) - t * (below * s + above))
            if ADD:
                dx += read(dx_ptr, place, inside)
            tl.store(dx_ptr + place, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        if NEED_ALPHA:
            sums = _added(sums, g * e, r, s, STEP, MIDDLE)
    if NEED_ALPHA:
        h = h_ptr + start.to(tl.int64) * (C * D)
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
    (step, middle), root = _centres(grid), math.sqrt(grid.gamma / math.log(2))
    numbers = grid.first * root, grid.spacing * root, root
    tables = alpha.float().contiguous(), _weights(grid, alpha.float())
    shape |= dict(D=grid.size, STEP=step, MIDDLE=middle)
    return x, total, tables, numbers, shape


def forward(x, alpha, grid):
    """f(x) in x's type, and in its memory format where that is channels first or last."""
    x, total, tables, numbers, shape = _described(x, alpha, grid)
    out = torch.empty_like(x)
    if x.numel():
        with torch.cuda.device_of(x):
            _forward_kernel[programs(shape, total, 16)[1]](x, *tables, out, total, *numbers, **shape)
    return out


def gradients(g, x, alpha, grid, need_x=True, need_alpha=True):
    """(dx, dalpha) of sum(g f), None where not needed. Partial sums are added in a fixed order: repeatable."""
    x, total, tables, numbers, shape = _described(x, alpha, grid)
    if not x.numel():
        return torch.zeros_like(x) if need_x else None, torch.zeros_like(alpha) if need_alpha else None
    g, (count, where) = like(g, x), programs(shape, total, 16)
    # several centres add into dx one after the other: then it must not be rounded in between
    dx = torch.empty_like(x, dtype=x.dtype if shape["STEP"] == grid.size else torch.float32) if need_x else x
    partial = torch.empty(count, *alpha.shape, dtype=torch.float32, device=x.device) if need_alpha else tables[0]
    with torch.cuda.device_of(x):
        for k in range(0, grid.size, shape["STEP"]):
            _backward_kernel[where](
                x, g, *tables, dx, partial, k, total, *numbers,
                **shape, NEED_X=need_x, NEED_ALPHA=need_alpha, ADD=k > 0,
            )  # fmt: skip
    return dx.to(x.dtype) if need_x else None, partial.sum(0).to(alpha.dtype) if need_alpha else None
