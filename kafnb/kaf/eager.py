"""The even-grid mixture in eager mode: element-wise steps on blocks that fit the cache, and small matrix products."""

import functools
import math
import threading

import torch
from torch.nn import functional as F

from .grid import chunks

STRIDE = 5  # powers r^0 .. r^4 are stored, R = r^5 links the groups
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

    def __init__(self, channels, elements, grid, x, dtype, inner=1):
        groups = max(c.groups for c in _chunks(grid))
        rows = (1, 1, 1, STRIDE, inner * groups)
        size = channels * elements * sum(rows)
        key = f"{x.device}-{dtype}"
        arena = getattr(_arenas, key, None)
        if arena is None or len(arena) < size:
            arena = torch.empty(size, dtype=dtype, device=x.device)
            if size <= KEEP:
                setattr(_arenas, key, arena)
        parts = arena[:size].split([channels * elements * r for r in rows])
        self.u, self.t, self.r = (p.view(channels, elements) for p in parts[:3])
        self.low, self.high = (p.view(-1, channels, elements) for p in parts[3:])  # slices of one power lie together
        self.inner = parts[4].view(channels, -1, elements)  # the same memory, as a matrix product wants it
        # r = 2^u and e = 2^(-kappa u^2), as PyTorch's exp2 takes a quarter of exp's time; at u = +-far e is 0, r finite
        self.scale = 2 * grid.gamma * grid.spacing / math.log(2)
        self.kappa = grid.gamma / (2 * self.scale**2) / math.log(2)
        limits = torch.finfo(dtype)
        self.far = math.sqrt((2 - math.log2(limits.tiny) - math.log2(limits.eps)) / self.kappa)
        self.zero = torch.zeros((), dtype=dtype, device=x.device)

    def factors(self, x, chunk, g=None):
        """For x and g (C, n, l): u, a multiple of x - c; g e r^s for s < 5, as (C, 5, elements); R = r^5, and 1/R.

        With g also e, in the middle of ``high``.
        """
        size = x.shape[1] * x.shape[2]
        u, t, r, low = (v[..., :size] for v in (self.u, self.t, self.r, self.low))
        if x.dtype != u.dtype:
            x = u.view(x.shape).copy_(x)
        torch.add(self.zero - self.scale * chunk.centre, x, alpha=self.scale, out=u.view(x.shape))
        u.clamp_(-self.far, self.far)
        torch.addcmul(self.zero, u, u, value=-self.kappa, out=t)
        if g is None:
            torch.exp2(t, out=low[0])
        else:
            e = torch.exp2(t, out=self.high[chunk.middle, :, :size])
            torch.mul(e.view(x.shape), g, out=low[0].view(x.shape))
        torch.exp2(u, out=r)
        for s in range(1, STRIDE):
            torch.mul(low[s - 1], r, out=low[s])
        link = back = None
        if chunk.groups > 1:
            link = torch.mul(r, r, out=t).square_().mul_(r)
            back = torch.reciprocal(link, out=r) if chunk.middle else None
        return u, low.transpose(0, 1), link, back


def _joined(inner, chunk, link, back):
    """sum over q of inner_q R^(q - middle), in place of the middle group (Horner's rule from both ends)."""
    middle = inner[chunk.middle]
    for q in range(chunk.groups - 2, chunk.middle - 1, -1):
        inner[q].addcmul_(inner[q + 1], link)
    for q in range(1, chunk.middle + 1):
        inner[q].addcmul_(inner[q - 1], back)
    return middle


def _coefficients(alpha, chunk, grid, want_slope):
    """alpha w, and m alpha w for the slope, as matrices (C, groups or 2 groups, STRIDE) that meet the powers r^s."""
    a = F.pad(alpha[:, chunk.start : chunk.stop], (0, len(chunk.weights) - (chunk.stop - chunk.start)))
    a = a * alpha.new_tensor(chunk.weights)
    if want_slope:
        a = torch.cat([a, a * alpha.new_tensor(chunk.offsets) * (2 * grid.gamma * grid.spacing)], 1)
    return a.view(len(a), -1, STRIDE)


def _flat(x):
    """x as (C, N, L)."""
    return (x.reshape(*x.shape[:2], -1) if x.numel() else x.new_empty(0, x.shape[1], 1)).transpose(0, 1)


def _tiles(c, n, length):
    """Pairs of slices, over examples and over places, of at most BLOCK elements; and the largest's elements."""
    wide = min(length, max(1, BLOCK // c))
    tall = max(1, min(n, BLOCK // (c * wide)))
    return [
        (slice(None), slice(i, i + tall), slice(j, j + wide)) for i in range(0, n, tall) for j in range(0, length, wide)
    ], tall * wide


def forward(x, alpha, grid, want_slope):
    """f and df/dx (None unless wanted), the latter in alpha's type."""
    flat = _flat(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    slope = torch.empty_like(out, dtype=alpha.dtype) if want_slope else None
    tiles, largest = _tiles(*flat.shape)
    work = _Workspace(len(flat), largest, grid, x, alpha.dtype, inner=1 + want_slope)
    plan = [(chunk, _coefficients(alpha, chunk, grid, want_slope)) for chunk in _chunks(grid)]
    flat_out, flat_slope = _flat(out), _flat(slope) if want_slope else None
    for tile in tiles:
        xb, f = flat[tile], flat_out[tile]
        wide = f.dtype != alpha.dtype  # half precision: summed in float32
        f = torch.empty_like(f, dtype=alpha.dtype) if wide else f
        for chunk, a in plan:
            u, low, link, back = work.factors(xb, chunk)
            inner = torch.bmm(a, low, out=work.inner[:, : a.shape[1], : u.shape[1]])  # (C, groups, 5) x (C, 5, size)
            inner = inner.unbind(1)
            e, total = low[:, 0].view(f.shape), _joined(inner[: chunk.groups], chunk, link, back)
            first = chunk.start == 0
            _add(f, e, total.view(f.shape), first)
            if want_slope:  # f' = 2 gamma (spacing sum m alpha k - (x - c) f)
                moment = _joined(inner[chunk.groups :], chunk, link, back)
                moment.addcmul_(u, total, value=-2 * grid.gamma / work.scale)
                _add(flat_slope[tile], e, moment.view(f.shape), first)
        if wide:
            flat_out[tile].copy_(f)
    return out, slope


def _add(out, a, b, first):
    """out = a b for the first chunk, out + a b for the others."""
    torch.mul(a, b, out=out) if first else out.addcmul_(a, b)


def correlation(x, g, grid, dtype):
    """h_ci = sum g k(x, d_i), (C, D), in ``dtype``."""
    flat, g = _flat(x), _flat(g)
    c = len(flat)
    tiles, largest = _tiles(*flat.shape)
    work = _Workspace(c, largest, grid, x, dtype)
    sums = [torch.zeros(c, chunk.groups, STRIDE, dtype=dtype, device=x.device) for chunk in _chunks(grid)]
    for tile in tiles:
        for chunk, h in zip(_chunks(grid), sums, strict=True):
            u, low, link, back = work.factors(flat[tile], chunk, g[tile])
            high = work.high[: chunk.groups, :, : u.shape[1]]
            for q in range(chunk.middle + 1, chunk.groups):
                torch.mul(high[q - 1], link, out=high[q])
            for q in range(chunk.middle - 1, -1, -1):
                torch.mul(high[q + 1], back, out=high[q])
            h.baddbmm_(high.transpose(0, 1), low.transpose(1, 2))
    parts = [
        (h.view(c, -1) * h.new_tensor(chunk.weights))[:, : chunk.stop - chunk.start]
        for chunk, h in zip(_chunks(grid), sums, strict=True)
    ]
    return torch.cat(parts, 1)
