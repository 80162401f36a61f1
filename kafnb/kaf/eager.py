"""The even-grid mixture in eager mode: element-wise steps on tiles that fit the cache, and small matrix products."""

import functools
import itertools
import math

import torch
from torch.nn import functional as F

from .grid import chunks
from .tiles import kept, subnormal_as_zero, temporaries, tiles, with_shapes

STRIDE = 5  # powers r^0 .. r^4 are stored, R = r^5 links the groups
BLOCK = 16_384  # elements worked on at a time: some 1 MB of temporaries


@functools.lru_cache(maxsize=64)
def _chunks(grid):
    return chunks(grid, STRIDE)


@kept
def _table(grid, k, rows, dtype, device):
    """Of chunk k: w and, as a second row, m w for the slope, (rows, D padded), to be multiplied with alpha."""
    chunk, slope = _chunks(grid)[k], 2 * grid.gamma * grid.spacing
    moments = [slope * m * w for m, w in zip(chunk.offsets, chunk.weights, strict=True)]
    return torch.tensor([chunk.weights, moments][:rows], dtype=torch.float64).to(device, dtype)


def _cut(memory, shape, grid, inner):
    """A tile for each chunk of the grid, all in the same memory."""
    return [_Tile(memory, shape, chunk, grid, inner) for chunk in _chunks(grid)]


def _cuts(x, pieces, grid, dtype, inner):
    """``_cut`` for each of x's pieces, in memory that the thread keeps."""

    def of_shape(shape):
        size = math.prod(shape) * max(_Tile.rows(chunk, inner) for chunk in _chunks(grid))
        return temporaries(x, dtype, size, _cut, shape, grid, inner)

    return with_shapes(pieces, of_shape)


class _Tile:
    """Temporaries for one tile of x, (C, n, l), and one chunk of the grid; of its groups, ``inner`` sums are wanted."""

    @staticmethod
    def rows(chunk, inner):
        return 3 + STRIDE + inner * chunk.groups

    def __init__(self, memory, shape, chunk, grid, inner):
        c, size, count = shape[0], shape[1] * shape[2], self.rows(chunk, inner)
        rows = memory[: count * c * size].view(count, c, size)
        self.chunk = chunk
        self.u, self.t, self.r, *low = (row.view(shape) for row in rows[: 3 + STRIDE])
        self.low, self.steps = low[0], list(itertools.pairwise(low))
        self.powers = rows[3 : 3 + STRIDE].transpose(0, 1)  # (C, 5, elements), as a matrix product wants them
        # the same memory twice: kernels of each group, a group's slices together, and sums of each group, a channel's
        rows = rows[3 + STRIDE :]
        self.high, self.groups = [row.view(shape) for row in rows], rows.transpose(0, 1)
        self.inner = rows.view(c, len(rows), size)
        sums = self.inner.view(c, len(rows), *shape[1:]).unbind(1)
        self.sums, self.moments = sums[: chunk.groups], sums[chunk.groups :]
        # r = 2^u and e = 2^(-kappa u^2), as PyTorch's exp2 takes a quarter of exp's time; at u = +-far e is 0, r finite
        self.scale = 2 * grid.gamma * grid.spacing / math.log(2)
        self.kappa = grid.gamma / (2 * self.scale**2) / math.log(2)
        limits = torch.finfo(memory.dtype)
        self.far = math.sqrt((2 - math.log2(limits.tiny) - math.log2(limits.eps)) / self.kappa)
        self.zero = memory.new_zeros(())
        self.shift = self.zero - self.scale * chunk.centre

    def factors(self, x, g=None):
        """For x and g (C, n, l): fills u, a multiple of x - c, and ``powers`` g e r^s; returns R = r^5, and 1/R.

        With g also e, in the middle of ``high``.
        """
        u, t, r = self.u, self.t, self.r
        if x.dtype != u.dtype:
            x = u.copy_(x)
        torch.add(self.shift, x, alpha=self.scale, out=u)
        u.clamp_(-self.far, self.far)
        torch.addcmul(self.zero, u, u, value=-self.kappa, out=t)
        if g is None:
            torch.exp2(t, out=self.low)
        else:
            torch.mul(torch.exp2(t, out=self.high[self.chunk.middle]), g, out=self.low)
        torch.exp2(u, out=r)
        for power, higher in self.steps:
            torch.mul(power, r, out=higher)
        link = back = None
        if self.chunk.groups > 1:
            link = torch.mul(r, r, out=t).square_().mul_(r)
            back = torch.reciprocal(link, out=r) if self.chunk.middle else None
        return link, back


def _joined(inner, chunk, link, back):
    """sum over q of inner_q R^(q - middle), in place of the middle group (Horner's rule from both ends)."""
    middle = inner[chunk.middle]
    for q in range(chunk.groups - 2, chunk.middle - 1, -1):
        inner[q].addcmul_(inner[q + 1], link)
    for q in range(1, chunk.middle + 1):
        inner[q].addcmul_(inner[q - 1], back)
    return middle


def _coefficients(alpha, k, chunk, grid, rows):
    """alpha w, and m alpha w for the slope, as matrices (C, groups or 2 groups, STRIDE) that meet the powers r^s."""
    a = alpha[:, chunk.start : chunk.stop]
    if padding := len(chunk.weights) - a.shape[1]:
        a = F.pad(a, (0, padding))
    return (a[:, None] * _table(grid, k, rows, alpha)).view(len(a), rows * chunk.groups, STRIDE)


def forward(x, alpha, grid, want_slope):
    """f and df/dx (None unless wanted), the latter in alpha's type."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    slope = torch.empty_like(out, dtype=alpha.dtype) if want_slope else None
    wide = x.dtype != alpha.dtype  # half precision: summed in float32
    rows, pieces = 1 + want_slope, tiles(x, BLOCK)
    coefficients = [_coefficients(alpha, k, chunk, grid, rows) for k, chunk in enumerate(_chunks(grid))]
    cuts = _cuts(x, pieces, grid, alpha.dtype, rows)
    slopes = tiles(slope, BLOCK) if want_slope else pieces
    with subnormal_as_zero(x):
        for xb, whole, df, cut in zip(pieces, tiles(out, BLOCK), slopes, cuts, strict=True):
            f = torch.empty_like(whole, dtype=alpha.dtype) if wide else whole
            for a, tile in zip(coefficients, cut, strict=True):
                link, back = tile.factors(xb)
                torch.bmm(a, tile.powers, out=tile.inner)  # (C, groups, 5) x (C, 5, elements)
                total, first = _joined(tile.sums, tile.chunk, link, back), tile.chunk.start == 0
                _add(f, tile.low, total, first)
                if want_slope:  # f' = 2 gamma (spacing sum m alpha k - (x - c) f)
                    moment = _joined(tile.moments, tile.chunk, link, back)
                    moment.addcmul_(tile.u, total, value=-2 * grid.gamma / tile.scale)
                    _add(df, tile.low, moment, first)
            if wide:
                whole.copy_(f)
    return out, slope


def _add(out, a, b, first):
    """out = a b for the first chunk, out + a b for the others."""
    torch.mul(a, b, out=out) if first else out.addcmul_(a, b)


def correlation(x, g, grid, dtype):
    """h_ci = sum g k(x, d_i), (C, D), in ``dtype``."""
    sums = [x.new_zeros(x.shape[1], chunk.groups, STRIDE, dtype=dtype) for chunk in _chunks(grid)]
    pieces = tiles(x, BLOCK)
    with subnormal_as_zero(x):
        for xb, gb, cut in zip(pieces, tiles(g, BLOCK), _cuts(x, pieces, grid, dtype, 1), strict=True):
            for h, tile in zip(sums, cut, strict=True):
                (link, back), middle = tile.factors(xb, gb), tile.chunk.middle
                for q in range(middle + 1, tile.chunk.groups):
                    torch.mul(tile.high[q - 1], link, out=tile.high[q])
                for q in range(middle - 1, -1, -1):
                    torch.mul(tile.high[q + 1], back, out=tile.high[q])
                h.baddbmm_(tile.groups, tile.powers.transpose(1, 2))
    parts = [h.view(len(h), -1) * _table(grid, k, 1, h) for k, h in enumerate(sums)]
    return torch.cat([part[:, : c.stop - c.start] for part, c in zip(parts, _chunks(grid), strict=True)], 1)
