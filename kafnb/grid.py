r"""Gaussian mixtures on an even grid: all D kernels are powers of one number.

With u = x - c, c the grid's middle, spacing Delta and m = (d - c) / Delta,

.. math:: k(x, d) = e^{-\gamma u^2} r^m w_m, \qquad r = e^{2 \gamma \Delta u}, \quad w_m = e^{-\gamma m^2 \Delta^2}:

two exponentials an element instead of D. Powers up to D - 1 would overflow float32 away from the middle; they are
products r^(5q) r^s instead, each carrying half of exp(-gamma u^2), which keeps every factor in range. Where the far
half underflows, some 20 spacings beyond the grid, f is exactly zero. Three ways to run the same arithmetic:

* eager, block by block in the cache, the sums over s as small matrix products,
* under ``torch.compile``, element-wise operations that the compiler fuses (``fused``),
* on CUDA, one Triton kernel forward and one backward (``grid_triton``).
"""

import functools
import itertools
import math
import threading
import typing

import torch
from torch.nn import functional as F

STRIDE = 5  # powers r^0 .. r^4 are stored, r^(5q) link the groups
BLOCK = 65_536  # elements worked on at a time, so that the temporaries stay in the cache
KEEP = 2**24  # largest workspace, in elements, that a thread keeps


class Grid(typing.NamedTuple):
    """``size`` points from ``first`` on, ``spacing`` apart, with bandwidth ``gamma``."""

    size: int
    first: float
    spacing: float
    gamma: float

    def __str__(self):
        return " ".join(map(repr, self))

    def in_range(self):
        """False for kernels so narrow (2.5 x the default bandwidth) that r^5 would leave float32: one by one, then."""
        return self.gamma * self.spacing**2 <= 0.42


class _Chunk(typing.NamedTuple):
    """Dictionary points start..stop-1, few enough for one centre; m counts spacings from the centre."""

    start: int
    stop: int
    groups: int
    middle: int  # the group whose first point is the centre
    centre: float
    weights: tuple  # w_m, zero for the padding behind the last point
    offsets: tuple  # m


@functools.lru_cache(maxsize=64)
def _chunks(grid):
    return chunks(grid, STRIDE)


def chunks(grid, stride):
    """The dictionary cut into pieces that one centre can serve, in groups of ``stride`` points."""
    # Limits on m with log(max float32) = 88: r^(2m) e^(-gamma u^2 / 2) must not overflow at its peak, and
    # e^(-gamma u^2 / 2) must not underflow while the last point's kernel is above e^-60.
    most = max(1, int(10.8 / math.sqrt(grid.gamma * grid.spacing**2)))
    count = math.ceil(grid.size / most)
    edges = [round(i * grid.size / count) for i in range(count + 1)]
    pieces = []
    for a, b in itertools.pairwise(edges):
        groups = math.ceil((b - a) / stride)
        middle = (groups - 1) // 2
        offsets = [j - stride * middle for j in range(groups * stride)]
        weights = [math.exp(-grid.gamma * (m * grid.spacing) ** 2) for m in offsets[: b - a]]
        weights += [0.0] * (len(offsets) - len(weights))
        centre = grid.first + (a + stride * middle) * grid.spacing
        pieces.append(_Chunk(a, b, groups, middle, centre, tuple(weights), tuple(offsets)))
    return pieces


_arenas = threading.local()


class _Workspace:
    """Temporaries of one block, channels first: (C, elements), cut from memory that the thread keeps for the next call.

    (Asking the allocator for fresh pages at every call costs more than the arithmetic on small layers.)
    """

    def __init__(self, channels, elements, grid, x, dtype, inner=0):
        self.groups = max(c.groups for c in _chunks(grid))
        rows = (1, 1, 1, 1, 1, STRIDE, self.groups, inner * self.groups)
        size = channels * elements * sum(rows)
        key = f"{x.device}-{dtype}"
        arena = getattr(_arenas, key, None)
        if arena is None or len(arena) < size:
            arena = torch.empty(size, dtype=dtype, device=x.device)
            if size <= KEEP:
                setattr(_arenas, key, arena)
        parts = arena[:size].split([channels * elements * r for r in rows])
        self.u, self.t, self.r, self.f, self.d = (p.view(channels, elements) for p in parts[:5])
        self.low, self.high, self.inner = (p.view(channels, -1, elements) for p in parts[5:])
        self.zero = torch.zeros((), dtype=dtype, device=x.device)

    def factors(self, x, chunk, grid, g=None):
        """u, and the two factors of the kernels: low e r^s (times g), high e r^(4q), with e = exp(-gamma u^2 / 2)."""
        n, c, length = x.shape
        u, t, r = (v[:, : n * length] for v in (self.u, self.t, self.r))
        low, high = self.low[..., : n * length], self.high[:, : chunk.groups, : n * length]
        if x.dtype == u.dtype:
            torch.sub(x.transpose(0, 1), chunk.centre, out=u.view(c, n, length))
        else:
            u.view(c, n, length).copy_(x.transpose(0, 1))
            u.sub_(chunk.centre)
        smallest = math.log(torch.finfo(u.dtype).tiny)
        torch.addcmul(self.zero, u, u, value=-grid.gamma / 2, out=t)
        F.threshold_(t, smallest, -math.inf)  # e is normal or zero, never a (slow) denormal
        highs = list(high.unbind(1))
        if g is None:
            highs[chunk.middle] = torch.exp(t, out=low[:, 0])
        else:
            low[:, 0].view(c, n, length).copy_(g.transpose(0, 1))
            low[:, 0].mul_(torch.exp(t, out=highs[chunk.middle]))
        reach = math.sqrt(-2 * smallest / grid.gamma)  # where e becomes zero; r stays finite from there on
        u.clamp_(-reach, reach)
        torch.mul(u, 2 * grid.gamma * grid.spacing, out=r).exp_()
        for s in range(1, STRIDE):
            torch.mul(low[:, s - 1], r, out=low[:, s])
        if chunk.groups > 1:
            link = torch.mul(r, r, out=t).square_().mul_(r)  # r^STRIDE
            for q in range(chunk.middle + 1, chunk.groups):
                torch.mul(highs[q - 1], link, out=highs[q])
            if chunk.middle:
                link.reciprocal_()
            for q in range(chunk.middle - 1, -1, -1):
                torch.mul(highs[q + 1], link, out=highs[q])
        return u, t, low, high, highs


def _coefficients(alpha, chunk, grid, want_slope):
    """alpha w, and m alpha w for the slope, as matrices (C, groups or 2 groups, STRIDE) that meet the powers r^s."""
    a = F.pad(alpha[:, chunk.start : chunk.stop], (0, len(chunk.weights) - (chunk.stop - chunk.start)))
    a = a * alpha.new_tensor(chunk.weights)
    if want_slope:
        a = torch.cat([a, a * alpha.new_tensor(chunk.offsets) * (2 * grid.gamma * grid.spacing)], 1)
    return a.view(len(a), -1, STRIDE)


def _flat(x):
    """x as (N, C, L)."""
    return x.reshape(*x.shape[:2], -1) if x.numel() else x.new_empty(0, x.shape[1], 1)


def _tiles(n, c, length):
    """Pairs of slices, over examples and over places, of at most BLOCK elements; the first is the largest."""
    wide = min(length, max(1, BLOCK // c))
    tall = max(1, min(n, BLOCK // (c * wide)))
    return [
        (slice(i, i + tall), slice(j, j + wide)) for i in range(0, n, tall) for j in range(0, length, wide)
    ], tall * wide


def _cpu_forward(x, alpha, grid, want_slope):
    """f and df/dx (None unless wanted), the latter in alpha's type."""
    flat = _flat(x)
    n, c, length = flat.shape
    out, slope = torch.empty_like(flat), torch.empty_like(flat, dtype=alpha.dtype) if want_slope else None
    tiles, largest = _tiles(n, c, length)
    work = _Workspace(c, largest, grid, x, alpha.dtype, inner=1 + want_slope)
    plan = [(chunk, _coefficients(alpha, chunk, grid, want_slope)) for chunk in _chunks(grid)]
    for tile in tiles:
        xb = flat[tile[0], :, tile[1]]
        size, shape = xb.shape[0] * xb.shape[2], (c, xb.shape[0], xb.shape[2])
        f, d = work.f[:, :size], work.d[:, :size]
        for chunk, a in plan:
            u, part, low, _, highs = work.factors(xb, chunk, grid)
            inner = torch.bmm(a, low, out=work.inner[:, : a.shape[1], :size])  # (C, groups, 5) x (C, 5, size)
            first = chunk.start == 0
            part = torch.mul(highs[0], inner[:, 0], out=f if first else part)
            for q in range(1, chunk.groups):
                part.addcmul_(highs[q], inner[:, q])
            if want_slope:  # f' = 2 gamma (spacing sum m alpha k - u f)
                if first:
                    torch.mul(highs[0], inner[:, chunk.groups], out=d)
                for q in range(first, chunk.groups):
                    d.addcmul_(highs[q], inner[:, chunk.groups + q])
                d.addcmul_(u, part, value=-2 * grid.gamma)
            if not first:
                f.add_(part)
        out[tile[0], :, tile[1]].copy_(f.view(shape).transpose(0, 1))
        if want_slope:
            slope[tile[0], :, tile[1]].copy_(d.view(shape).transpose(0, 1))
    return out.view(x.shape), slope.view(x.shape) if want_slope else None


def _cpu_correlation(x, g, grid, dtype):
    """h_ci = sum g k(x, d_i), (C, D), in ``dtype``."""
    flat = _flat(x)
    n, c, length = flat.shape
    g = g.reshape(flat.shape)
    tiles, largest = _tiles(n, c, length)
    work = _Workspace(c, largest, grid, x, dtype)
    sums = [torch.zeros(c, chunk.groups, STRIDE, dtype=dtype, device=x.device) for chunk in _chunks(grid)]
    for tile in tiles:
        xb, gb = flat[tile[0], :, tile[1]], g[tile[0], :, tile[1]]
        for chunk, h in zip(_chunks(grid), sums, strict=True):
            _, _, low, high, _ = work.factors(xb, chunk, grid, gb)
            h.baddbmm_(high, low.transpose(1, 2))
    parts = [
        (h.view(c, -1) * h.new_tensor(chunk.weights))[:, : chunk.stop - chunk.start]
        for chunk, h in zip(_chunks(grid), sums, strict=True)
    ]
    return torch.cat(parts, 1)


def points(grid, like):
    """The grid's dictionary, (1, D), in the type and place of ``like``."""
    return _points(grid, like.dtype, like.device)


@functools.lru_cache(maxsize=64)
def _points(grid, dtype, device):
    steps = torch.arange(grid.size, dtype=torch.float64, device=device)
    return (grid.first + grid.spacing * steps).to(dtype)[None]


# --- for torch.compile -----------------------------------------------------------------------------------------


def _powers(x, chunk, grid):
    """u, the factors high e r^(4q), and low e r^s, as element-wise operations."""
    u = x - chunk.centre
    smallest = math.log(torch.finfo(u.dtype).tiny)
    exponent = -grid.gamma / 2 * u * u
    e = torch.where(exponent > smallest, torch.exp(exponent), 0.0)
    reach = math.sqrt(-2 * smallest / grid.gamma)
    u = u.clamp(-reach, reach)
    r = torch.exp(2 * grid.gamma * grid.spacing * u)
    low = [e, e * r, e * r * r, e * r * r * r]
    link, high = (r * r) * (r * r), {chunk.middle: e}
    for q in range(chunk.middle + 1, chunk.groups):
        high[q] = high[q - 1] * link
    back = 1 / link
    for q in range(chunk.middle - 1, -1, -1):
        high[q] = high[q + 1] * back
    return u, low, high


class _Fused(torch.autograd.Function):
    """f without loops over blocks or reused memory: the compiler makes one pass of it.

    The grid comes as text: numbers that differ between two layers would become symbols of the graph, text does not.
    """

    @staticmethod
    def forward(x, alpha, text):
        grid = _parsed(text)
        xs, f, slope = x.to(alpha.dtype), 0.0, 0.0
        # (D, C), by a matrix product: the compiler then reads a ready table, contiguous in the channels, whichever
        # memory format x has
        pieces = chunks(grid, 4)
        weights = [w for chunk in pieces for w in chunk.weights[: chunk.stop - chunk.start]]
        table = torch.diag(alpha.new_tensor(weights)) @ alpha.t()
        for chunk in pieces:
            u, low, high = _powers(xs, chunk, grid)
            part = moment = 0.0
            for j in range(chunk.stop - chunk.start):
                row = table[chunk.start + j].view(-1, *[1] * (x.ndim - 2))
                term = row * low[j % 4] * high[j // 4]
                part, moment = part + term, moment + chunk.offsets[j] * term
            f = f + part
            slope = slope + 2 * grid.gamma * (grid.spacing * moment - u * part)
        return f.to(x.dtype), slope

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, alpha, ctx.text = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, alpha, output[1])

    @staticmethod
    def backward(ctx, g, _):
        x, alpha, slope = ctx.saved_tensors
        dx = (g * slope).to(x.dtype)
        if not ctx.needs_input_grad[1]:
            return dx, None, None
        # behind the barrier the D sums below are one loop of their own; fused with what stands around them in a
        # network (batch normalisation's sums), the compiler makes D loops
        x, g = barrier(x.to(alpha.dtype), g.to(alpha.dtype))
        grid, dims, columns = _parsed(ctx.text), [d for d in range(x.ndim) if d != 1], []
        for chunk in chunks(grid, 4):
            _, low, high = _powers(x, chunk, grid)
            low = [g * v for v in low]
            for j in range(chunk.stop - chunk.start):
                columns.append((low[j % 4] * high[j // 4]).sum(dims) * chunk.weights[j])
        return dx, torch.stack(columns, 1), None


@torch.library.custom_op("kafnb::barrier", mutates_args=())
def barrier(x: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Copies that the compiler cannot see through."""
    return x.contiguous().clone(), g.contiguous().clone()


@barrier.register_fake
def _(x, g):
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(
        g, memory_format=torch.contiguous_format
    )


def _parsed(text):
    size, *floats = text.split()
    return Grid(int(size), *[float(v) for v in floats])


def fused(x, alpha, text):
    """f(x), as ``forward``, written for ``torch.compile``; differentiable once. ``text`` is ``str(grid)``."""
    return _Fused.apply(x, alpha, text)[0]


# --- dispatch --------------------------------------------------------------------------------------------------


def _triton(x):
    """The module of CUDA kernels if it can serve x, else None."""
    if not x.is_cuda:
        return None
    try:
        from . import grid_triton
    except ImportError:  # a torch without Triton: the eager evaluation runs on CUDA as well
        return None
    return grid_triton if grid_triton.usable(x) else None


def forward(x, alpha, grid, want_slope):
    """f, and df/dx in alpha's type where ``gradients`` will want it again (on CUDA it does not)."""
    if kernels := _triton(x):
        return kernels.forward(x, alpha, grid), None
    return _cpu_forward(x, alpha, grid, want_slope)


def correlation(x, g, grid, dtype):
    """h_ci = sum over n, * of g k(x, d_i), (C, D), in ``dtype``."""
    if kernels := _triton(x):
        alpha = torch.zeros(x.shape[1], grid.size, dtype=dtype, device=x.device)
        return kernels.gradients(g, x, alpha, grid, need_x=False)[1]
    return _cpu_correlation(x, g, grid, dtype)


def gradients(g, x, alpha, grid, slope, need_x, need_alpha):
    """First derivatives of sum(g f) in x and alpha, None where not needed."""
    if kernels := _triton(x):
        return kernels.gradients(g, x, alpha, grid, need_x, need_alpha)
    if need_x and slope is None:
        slope = _cpu_forward(x, alpha, grid, True)[1]
    dx = (g * slope).to(x.dtype) if need_x else None
    return dx, _cpu_correlation(x, g, grid, alpha.dtype) if need_alpha else None
