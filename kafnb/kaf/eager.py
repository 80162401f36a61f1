"""The even-grid mixture in eager mode: element-wise steps on blocks that fit the cache, and small matrix products."""

import functools
import math
import threading

import torch
from torch.nn import functional as F

from .grid import chunks

STRIDE = 5  # powers r^0 .. r^4 are stored, r^(5q) link the groups
BLOCK = 65_536  # elements worked on at a time
KEEP = 2**24  # largest workspace, in elements, that a thread keeps


@functools.lru_cache(maxsize=64)
def _chunks(grid):
    return chunks(grid, STRIDE)


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


def forward(x, alpha, grid, want_slope):
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


def correlation(x, g, grid, dtype):
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
