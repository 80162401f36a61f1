"""Mixtures on a CPU: loops over blocks of neighbouring elements, which numba compiles to vector instructions.

On an even grid the arithmetic is that of the CUDA kernels (``fused``): polynomials in r above a centre and in 1 / r
below it. What is compiled is kept on disk by numba, so only the first process on a machine waits for it, some seconds.
"""

import concurrent.futures
import contextlib
import functools
import math

import numpy as np
import torch
from llvmlite import ir
from numba import float32, float64, int32, int64, njit
from numba.core import config
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic, overload

if config.CPU_FEATURES is None and "+avx512f" in (features := get_host_cpu_features()):
    config.CPU_FEATURES = f"{features},-prefer-256-bit"  # the loops below are 1.5 times as fast on whole vectors

BLOCK = 64  # elements of a block
TASK = 2**18  # elements that one thread takes at a time; sums are added in this order, however many threads there are
LAST = torch.channels_last
ROUND = {"contract", "nsz"}  # what the compiler may do to the arithmetic: fuse a product with a sum

# --- powers of two, as vector instructions ----------------------------------------------------------------------


def _reinterpret(source, target, kind):
    """The bits of a number of one type as another."""

    @intrinsic
    def cast(context, x):
        return target(source), lambda _, builder, signature, values: builder.bitcast(values[0], kind)

    return cast


_bits32, _number32 = _reinterpret(float32, int32, ir.IntType(32)), _reinterpret(int32, float32, ir.FloatType())
_bits64, _number64 = _reinterpret(float64, int64, ir.IntType(64)), _reinterpret(int64, float64, ir.DoubleType())


def _coefficients(degree, dtype):
    """Of 2^f for f in [-1/2, 1/2], lowest power first."""
    nodes = np.cos(np.pi * (np.arange(200) + 0.5) / 200) / 2
    fit = np.polynomial.Chebyshev.fit(nodes, 2**nodes, degree, domain=[-0.5, 0.5])
    return tuple(dtype(c) for c in fit.convert(kind=np.polynomial.Polynomial).coef)


_P, _Q = _coefficients(6, np.float32), _coefficients(11, np.float64)
_SHIFT32, _SHIFT64 = np.float32(1.5 * 2**23), np.float64(1.5 * 2**52)  # added: the nearest integer, in the last places
_LOW32, _LOW64 = np.float32(-126), np.float64(-1022)
LEAST = {np.float32: _LOW32, np.float64: _LOW64}


def _power32(x):
    shifted = max(x, _LOW32) + _SHIFT32
    f = max(x, _LOW32) - (shifted - _SHIFT32)
    p = _P[0] + f * (_P[1] + f * (_P[2] + f * (_P[3] + f * (_P[4] + f * (_P[5] + f * _P[6])))))
    return _number32(_bits32(p) + (_bits32(shifted) << np.int32(23))) * np.float32(x >= _LOW32)


def _power64(x):
    shifted = max(x, _LOW64) + _SHIFT64
    f = max(x, _LOW64) - (shifted - _SHIFT64)
    p = _Q[5] + f * (_Q[6] + f * (_Q[7] + f * (_Q[8] + f * (_Q[9] + f * (_Q[10] + f * _Q[11])))))
    q = _Q[0] + f * (_Q[1] + f * (_Q[2] + f * (_Q[3] + f * (_Q[4] + f * p))))
    return _number64(_bits64(q) + (_bits64(shifted) << np.int64(52))) * np.float64(x >= _LOW64)


def exp2(x):
    """2^x from the smallest normal number on, below that zero; for what numba compiles."""


@overload(exp2, inline="always")
def _exp2(x):
    return {float32: _power32, float64: _power64}.get(x)


def _compiled(loops):
    """A function of numpy arrays and numbers as machine code, kept on disk where numba finds a place to write."""
    options = dict(fastmath=ROUND, nogil=True)
    try:
        return njit(loops, cache=True, **options)
    except RuntimeError:  # no such place
        return njit(loops, **options)


# --- an even grid -----------------------------------------------------------------------------------------------


@functools.cache
def _grid_kernels(half, dtype, want_slope):
    """The loops forward (with f' or without) and for the sums of g k, in chunks of 2 ``half`` points.

    ``x`` and all of its shape are (rows, width) with one channel a column, the same for ``period`` columns on end;
    blocks of one group of ``group`` columns have one table of coefficients.
    """
    size, zero, least = 2 * half, dtype(0), LEAST[dtype]

    @_compiled
    def forward(x, a, f, df, period, group, centres, gamma, kappa, slope, spacing):
        rows, width = x.shape
        t, tables = np.zeros((3, BLOCK), dtype), np.zeros((len(centres), size, BLOCK), dtype)
        for begin in range(0, width, group):
            for j in range(min(BLOCK, width - begin)):
                for k in range(len(centres)):
                    for i in range(size):
                        tables[k, i, j] = a[(begin + j) // period % len(a), k * size + i]
            for n in range(rows):
                for b in range(begin, min(width, begin + group), BLOCK):
                    wide = min(BLOCK, width - b, begin + group - b)
                    for j in range(wide):
                        t[0, j] = x[n, b + j]
                    for j in range(BLOCK):
                        t[1, j] = zero
                        t[2, j] = zero
                    for k in range(len(centres)):
                        table = tables[k]
                        for j in range(BLOCK):
                            u = t[0, j] - centres[k]
                            exponent = -gamma * u * u
                            e = exp2(exponent)
                            u = u if exponent >= least else zero  # where e is 0, r must not be so large that r^i is inf
                            r, s = exp2(kappa * u), exp2(-kappa * u)
                            above, up, below, down = zero, zero, zero, zero
                            for i in range(half):  # each polynomial p with its derivative: p' <- p' r + p, p <- p r + a
                                if want_slope:
                                    up = up * r + above
                                above = above * r + table[size - 1 - i, j]
                            for i in range(half):
                                below += table[i, j]
                                if want_slope:
                                    down = down * s + below
                                below *= s
                            part = e * (above + below)
                            t[1, j] += part
                            if want_slope:
                                t[2, j] += slope * (e * spacing * (up * r - down * s) - u * part)
                    for j in range(wide):
                        f[n, b + j] = t[1, j]
                    if want_slope:
                        for j in range(wide):
                            df[n, b + j] = t[2, j]

    @_compiled
    def sums(x, g, h, period, group, centres, gamma, kappa):
        rows, width = x.shape
        t, totals = np.zeros((2, BLOCK), dtype), np.zeros((len(centres), size, BLOCK), dtype)
        for begin in range(0, width, group):
            totals[:] = zero
            for n in range(rows):
                for b in range(begin, min(width, begin + group), BLOCK):
                    wide = min(BLOCK, width - b, begin + group - b)
                    for j in range(wide):
                        t[0, j], t[1, j] = x[n, b + j], g[n, b + j]
                    for j in range(wide, BLOCK):
                        t[1, j] = zero
                    for k in range(len(centres)):
                        total = totals[k]
                        for j in range(BLOCK):
                            u = t[0, j] - centres[k]
                            exponent = -gamma * u * u
                            e = t[1, j] * exp2(exponent)
                            u = u if exponent >= least else zero
                            r, s = exp2(kappa * u), exp2(-kappa * u)
                            power = e
                            for i in range(half):
                                total[half + i, j] += power
                                power *= r
                            power = e
                            for i in range(half):
                                power *= s
                                total[half - 1 - i, j] += power
            for j in range(min(BLOCK, width - begin)):
                for k in range(len(centres)):
                    for i in range(size):
                        h[(begin + j) // period % len(h), k * size + i] += totals[k, i, j]

    return forward, sums


@functools.lru_cache(maxsize=64)
def _plan(grid, dtype):
    """Points to each side of a centre, weights of all points, centres, and the numbers of the loops."""
    scale = math.sqrt(grid.gamma) * grid.spacing
    half = 10 if grid.size > 10 and 2 * scale * math.sqrt(87) * 10 <= 80 else 5  # r^half stays in range
    weights = np.exp(-((scale * (np.arange(2 * half) - half)) ** 2))
    centres = grid.first + grid.spacing * np.arange(half, grid.size + half, 2 * half)
    numbers = grid.gamma / math.log(2), 2 * grid.gamma * grid.spacing / math.log(2)
    return half, np.tile(weights.astype(dtype), len(centres)), centres.astype(dtype), tuple(dtype(v) for v in numbers)


def forward(x, alpha, grid, want_slope):
    """f and df/dx (None unless wanted), the latter in alpha's type."""
    if len(alpha) not in (1, x.shape[1]):
        raise RuntimeError(f"alpha of {len(alpha)} channels, x of {x.shape[1]}")
    dtype = _type(alpha)
    half, weights, centres, numbers = _plan(grid, dtype)
    table = np.zeros((len(alpha), len(weights)), dtype)  # the last points may be beyond the grid
    np.multiply(alpha.detach().numpy(), weights[: grid.size], out=table[:, : grid.size])
    kernel, numbers = _grid_kernels(half, dtype, want_slope)[0], (centres, *numbers, dtype(2 * grid.gamma))
    return _element_wise(kernel, x, table, dtype, want_slope, (*numbers, dtype(grid.spacing)))


def correlation(x, g, grid, dtype):
    """h_ci = sum g k(x, d_i), (C, D), in ``dtype``."""
    dtype = _type(torch.empty(0, dtype=dtype))
    half, weights, centres, numbers = _plan(grid, dtype)
    kernel = _grid_kernels(half, dtype, False)[1]
    h = _summed(kernel, x, g, weights.shape, dtype, (centres, *numbers))
    return torch.from_numpy((h * weights)[:, : grid.size])


# --- any dictionary ---------------------------------------------------------------------------------------------


@njit
def _fill(t, table, begin, period, width):
    """t[i, j] = table[channel of column begin + j, i]"""
    for j in range(min(BLOCK, width - begin)):
        for i in range(table.shape[1]):
            t[i, j] = table[(begin + j) // period % len(table), i]


@functools.cache
def _free_kernels(dtype, want_slope):
    """The loops forward, and for the sums of g k, g k t and g k t^2, t = x - d; columns as in ``_grid_kernels``."""
    zero, far = dtype(0), dtype(1e18)

    @_compiled
    def forward(x, a, f, df, period, group, d, exponents):
        points, rows, width = a.shape[1], *x.shape
        ta, td, t = np.zeros((points, BLOCK), dtype), np.zeros((points, BLOCK), dtype), np.zeros((4, BLOCK), dtype)
        for begin in range(0, width, group):
            _fill(ta, a, begin, period, width)
            _fill(td, d, begin, period, width)
            _fill(t, exponents, begin, period, width)
            for n in range(rows):
                for b in range(begin, min(width, begin + group), BLOCK):
                    wide = min(BLOCK, width - b, begin + group - b)
                    for j in range(wide):
                        t[1, j] = x[n, b + j]
                    for j in range(BLOCK):
                        t[2, j] = zero
                        t[3, j] = zero
                    for i in range(points):
                        for j in range(BLOCK):
                            v = min(max(t[1, j] - td[i, j], -far), far)  # v^2 stays finite
                            k = ta[i, j] * exp2(t[0, j] * v * v)
                            t[2, j] += k
                            if want_slope:
                                t[3, j] += k * v
                    for j in range(wide):
                        f[n, b + j] = t[2, j]
                    if want_slope:
                        for j in range(wide):
                            df[n, b + j] = t[3, j] * t[0, j]

    @_compiled
    def sums(x, g, h, period, group, d, exponents):
        points, rows, width = d.shape[1], *x.shape
        td, t = np.zeros((points, BLOCK), dtype), np.zeros((3, BLOCK), dtype)
        total = np.zeros((3, points, BLOCK), dtype)
        for begin in range(0, width, group):
            _fill(td, d, begin, period, width)
            _fill(t, exponents, begin, period, width)
            total[:] = zero
            for n in range(rows):
                for b in range(begin, min(width, begin + group), BLOCK):
                    wide = min(BLOCK, width - b, begin + group - b)
                    for j in range(wide):
                        t[1, j], t[2, j] = x[n, b + j], g[n, b + j]
                    for j in range(wide, BLOCK):
                        t[2, j] = zero
                    for i in range(points):
                        for j in range(BLOCK):
                            v = min(max(t[1, j] - td[i, j], -far), far)
                            k = t[2, j] * exp2(t[0, j] * v * v)
                            total[0, i, j] += k
                            total[1, i, j] += k * v
                            total[2, i, j] += k * v * v
            for j in range(min(BLOCK, width - begin)):
                for p in range(3):
                    for i in range(points):
                        h[(begin + j) // period % len(h), p, i] += total[p, i, j]

    return forward, sums


def _tables(dictionary, gamma, channels, dtype):
    """Points (C, D) and -gamma / log 2 (C, 1)."""
    tables = dictionary, (gamma / -math.log(2))[:, None]
    return tuple(np.ascontiguousarray(t.detach().expand(channels, -1).numpy(), dtype) for t in tables)


def free_forward(x, alpha, dictionary, gamma, want_slope):
    """f and df/dx (None unless wanted) for x (N, C, *), alpha (C, D), dictionary (1 or C, D), gamma (1 or C,)."""
    dtype = _type(alpha)
    kernel, tables = _free_kernels(dtype, want_slope)[0], _tables(dictionary, gamma, x.shape[1], dtype)
    out, slope = _element_wise(kernel, x, np.ascontiguousarray(alpha.detach().numpy()), dtype, want_slope, tables)
    return out, slope.mul_(2 * math.log(2)) if want_slope else None  # -2 gamma


def free_sums(x, g, dictionary, gamma):
    """Sums over images of g k, g k t and g k t^2, t = x - d, (3, C, D)."""
    dtype, points = _type(dictionary), dictionary.shape[1]
    tables = _tables(dictionary, gamma, x.shape[1], dtype)
    h = _summed(_free_kernels(dtype, False)[1], x, g, (3, points), dtype, tables)
    return torch.from_numpy(h).transpose(0, 1)


# --- going through a tensor -------------------------------------------------------------------------------------


def _type(like):
    return np.float64 if like.dtype == torch.float64 else np.float32


class _Walk:
    """x, in channels first or last, as a matrix whose columns have one channel each, the same for ``period`` on end."""

    def __init__(self, x, dtype):
        self.type = torch.float64 if dtype is np.float64 else torch.float32
        x = x.detach().to(self.type)
        self.last = x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=LAST)
        self.x = x if self.last else x.contiguous()
        (n, c), places = x.shape[:2], math.prod(x.shape[2:])
        self.shape, self.period = (n, c * places), places
        if self.last or places <= 1:
            together = math.gcd(n * places, max(1, BLOCK // c))  # few channels: several places in a block
            self.shape, self.period = (n * places // together, together * c), 1
        self.group = max(BLOCK, self.period)
        rows = max(1, TASK // max(1, self.shape[1]))
        self.tasks = [slice(i, i + rows) for i in range(0, self.shape[0], rows)]

    def matrix(self, x):
        """A tensor with the memory format of ``self.x`` as a matrix of numpy, on the same memory."""
        return x.as_strided(self.shape, (self.shape[1], 1)).numpy()

    def like(self, x):
        """A tensor of x's shape in its type and memory format."""
        return x.detach().to(self.type).contiguous(memory_format=LAST if self.last else torch.contiguous_format)

    def run(self, kernel, arguments):
        """``kernel(*arguments(rows, number of the task))`` for each task, in as many threads as PyTorch has."""

        def work(task):
            with subnormal_as_zero():
                kernel(*arguments(self.tasks[task], task))

        threads = min(torch.get_num_threads(), len(self.tasks))
        if threads < 2:
            for task in range(len(self.tasks)):
                work(task)
        else:
            with concurrent.futures.ThreadPoolExecutor(threads) as pool:
                list(pool.map(work, range(len(self.tasks))))


def _element_wise(kernel, x, table, dtype, want_slope, rest):
    """f in x's type, df/dx in ``dtype`` (None unless wanted), for coefficients ``table`` (C, points)."""
    walk = _Walk(x, dtype)
    f, slope = torch.empty_like(walk.x), torch.empty_like(walk.x) if want_slope else None
    xs, fs = walk.matrix(walk.x), walk.matrix(f)
    slopes = walk.matrix(slope) if want_slope else fs
    walk.run(kernel, lambda rows, _: (xs[rows], table, fs[rows], slopes[rows], walk.period, walk.group, *rest))
    return f.to(x.dtype), slope


def _summed(kernel, x, g, shape, dtype, rest):
    """What the kernel sums over images and places, (C, *shape)."""
    walk = _Walk(x, dtype)
    xs, gs = walk.matrix(walk.x), walk.matrix(walk.like(g))
    parts = np.zeros((len(walk.tasks), x.shape[1], *shape), dtype)
    walk.run(kernel, lambda rows, task: (xs[rows], gs[rows], parts[task], walk.period, walk.group, *rest))
    return parts.sum(0)


_SUBNORMAL = 5e-324


@contextlib.contextmanager
def subnormal_as_zero():
    """Inside, this thread's arithmetic takes subnormal numbers, below float32's 1e-38, for zero.

    They come up where a kernel's factors fade, and some processors (Intel's) need a hundred times as long for each.
    """
    if _SUBNORMAL == 0.0:  # it does already: the comparison is made by the same arithmetic
        yield
        return
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
