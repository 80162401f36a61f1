"""Loops of the CPU's mixtures over blocks of neighbouring elements, which numba compiles to vector instructions.

A tensor comes as a matrix (rows, width), one channel a column, the same for ``period`` columns on end; the blocks of
``group`` columns share a table of coefficients. Numba keeps on disk what it compiled, some seconds once a machine.
"""

import functools

import numpy as np
from llvmlite import ir
from numba import float32, float64, int32, int64, njit
from numba.core import config
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic, overload

if config.CPU_FEATURES is None and "+avx512f" in (features := get_host_cpu_features()):
    config.CPU_FEATURES = f"{features},-prefer-256-bit"  # the loops below are 1.5 times as fast on whole vectors

BLOCK = 64  # elements of a block
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
    return _number32(_bits32(p) + (_bits32(shifted) << np.int32(23))) * np.float32(x >= _LOW32) + (f - f)  # of NaN: NaN


def _power64(x):
    shifted = max(x, _LOW64) + _SHIFT64
    f = max(x, _LOW64) - (shifted - _SHIFT64)
    p = _Q[5] + f * (_Q[6] + f * (_Q[7] + f * (_Q[8] + f * (_Q[9] + f * (_Q[10] + f * _Q[11])))))
    q = _Q[0] + f * (_Q[1] + f * (_Q[2] + f * (_Q[3] + f * (_Q[4] + f * p))))
    return _number64(_bits64(q) + (_bits64(shifted) << np.int64(52))) * np.float64(x >= _LOW64) + (f - f)


def exp2(x):
    """2^x from the smallest normal number on, below that zero; for what numba compiles."""


@overload(exp2, inline="always")
def _exp2(x):
    return {float32: _power32, float64: _power64}.get(x)


def _compiled(loops):
    """A function of numpy arrays and numbers as machine code, kept on disk where numba finds a place to write."""
    try:
        return njit(loops, cache=True, fastmath=ROUND, nogil=True)
    except RuntimeError:  # no such place
        return njit(loops, fastmath=ROUND, nogil=True)


# --- an even grid -----------------------------------------------------------------------------------------------


@functools.cache
def on_grid(half, dtype, want_slope):
    """The loops forward (with f' or without) and for the sums of g k, in chunks of 2 ``half`` points.

    The arithmetic is that of the CUDA kernels (``fused``): polynomials in r above a centre and in 1 / r below it.
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


# --- any dictionary ---------------------------------------------------------------------------------------------


@njit
def _fill(t, table, begin, period, width):
    """t[i, j] = table[channel of column begin + j, i]"""
    for j in range(min(BLOCK, width - begin)):
        for i in range(table.shape[1]):
            t[i, j] = table[(begin + j) // period % len(table), i]


@functools.cache
def on_any(dtype, want_slope):
    """The loops forward, and for the sums of g k, g k t and g k t^2, t = x - d; of any dictionary."""
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
