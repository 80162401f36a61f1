"""Mixtures on a CPU: tensors as matrices for the loops that numba compiles (``loops``), in several threads."""

import concurrent.futures
import contextlib
import functools
import math

import numpy as np
import torch

from .loops import BLOCK, on_any, on_grid

TASK = 2**18  # elements that one thread takes at a time; sums are added in this order, however many threads there are
LAST = torch.channels_last

# --- an even grid -----------------------------------------------------------------------------------------------


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
    dtype = _type(alpha)
    half, weights, centres, numbers = _plan(grid, dtype)
    table = np.zeros((len(alpha), len(weights)), dtype)  # the last points may be beyond the grid
    np.multiply(alpha.detach().numpy(), weights[: grid.size], out=table[:, : grid.size])
    kernel, numbers = on_grid(half, dtype, want_slope)[0], (centres, *numbers, dtype(2 * grid.gamma))
    return _element_wise(kernel, x, table, dtype, want_slope, (*numbers, dtype(grid.spacing)))


def correlation(x, g, grid, dtype):
    """h_ci = sum g k(x, d_i), (C, D), in ``dtype``."""
    dtype = _type(torch.empty(0, dtype=dtype))
    half, weights, centres, numbers = _plan(grid, dtype)
    kernel = on_grid(half, dtype, False)[1]
    h = _summed(kernel, x, g, weights.shape, dtype, (centres, *numbers))
    return torch.from_numpy((h * weights)[:, : grid.size])


# --- any dictionary ---------------------------------------------------------------------------------------------


def _tables(dictionary, gamma, channels, dtype):
    """Points (C, D) and -gamma / log 2 (C, 1)."""
    tables = dictionary, (gamma / -math.log(2))[:, None]
    return tuple(np.ascontiguousarray(t.detach().expand(channels, -1).numpy(), dtype) for t in tables)


def free_forward(x, alpha, dictionary, gamma, want_slope):
    """f and df/dx (None unless wanted) for x (N, C, *), alpha (C, D), dictionary (1 or C, D), gamma (1 or C,)."""
    dtype = _type(alpha)
    kernel, tables = on_any(dtype, want_slope)[0], _tables(dictionary, gamma, x.shape[1], dtype)
    out, slope = _element_wise(kernel, x, np.ascontiguousarray(alpha.detach().numpy()), dtype, want_slope, tables)
    return out, slope.mul_(2 * math.log(2)) if want_slope else None  # -2 gamma


def free_sums(x, g, dictionary, gamma):
    """Sums over images of g k, g k t and g k t^2, t = x - d, (3, C, D)."""
    dtype, points = _type(dictionary), dictionary.shape[1]
    tables = _tables(dictionary, gamma, x.shape[1], dtype)
    h = _summed(on_any(dtype, False)[1], x, g, (3, points), dtype, tables)
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
    if len(table) not in (1, x.shape[1]):  # the loops would not notice
        raise RuntimeError(f"alpha of {len(table)} channels, x of {x.shape[1]}")
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
