"""The even-grid mixture on CUDA: one kernel forward, one backward, each reading its inputs once.

The arithmetic is that of ``grid``, with every factor an exponential of its own: on a GPU they are cheap, and nothing
has to be carried from group to group. A program works on one channel, so its coefficients are read once.
"""

import functools
import math

import torch
import triton
import triton.language as tl

from .grid import chunks as chunks_of

BLOCK = 256  # elements a program works on at a time; half of it backward, where 32 sums an element wait in registers
PROGRAMS = 2048  # of a backward pass, at most: each loops over blocks and leaves one partial sum a coefficient


def usable(x):
    """float64 stays with the eager evaluation."""
    return x.dtype in (torch.float16, torch.bfloat16, torch.float32)


@triton.jit
def _factors(u, gamma, kappa, middle, groups, GROUPS: tl.constexpr):
    """high[q] = e r^(4 (q - middle)) and low[s] = e r^s, e = exp2(-gamma u^2 / 2), r = exp2(kappa u)."""
    e = -0.5 * gamma * u * u
    q = tl.arange(0, GROUPS)[:, None]
    high = tl.exp2(e[None, :] + (4 * (q - middle)).to(tl.float32) * kappa * u[None, :])
    s = tl.arange(0, 4)[:, None].to(tl.float32)
    return tl.where(q < groups, high, 0.0), tl.exp2(e[None, :] + s * kappa * u[None, :])


@triton.jit
def _read(x_ptr, j, c, total, C: tl.constexpr, L: tl.constexpr):
    """Elements j of channel c of a contiguous (N, C, L) tensor in float32, their places, and which of them exist."""
    place = (j // L).to(tl.int64) * (C * L) + c * L + j % L
    inside = j < total
    return tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32), place, inside


@triton.jit
def _coefficients(ptr, c, k, CHUNKS: tl.constexpr, GROUPS: tl.constexpr):
    q, s = tl.arange(0, GROUPS)[:, None], tl.arange(0, 4)[None, :]
    return tl.load(ptr + ((c * CHUNKS + k) * GROUPS + q) * 4 + s)


@triton.jit
def _forward_kernel(
    x_ptr, a_ptr, f_ptr, centres, middles, sizes, total, gamma, kappa,
    C: tl.constexpr, L: tl.constexpr, CHUNKS: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(1)
    x, place, inside = _read(x_ptr, tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), c, total, C, L)
    f = tl.zeros([BLOCK], tl.float32)
    for k in range(CHUNKS):
        u = tl.minimum(tl.maximum(x - tl.load(centres + k), -1e6), 1e6)
        high, low = _factors(u, gamma, kappa, tl.load(middles + k), tl.load(sizes + k), GROUPS)
        a = _coefficients(a_ptr, c, k, CHUNKS, GROUPS)
        f += tl.sum(tl.sum(a[:, :, None] * low[None, :, :], 1) * high, 0)
    tl.store(f_ptr + place, f.to(f_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    x_ptr, g_ptr, a_ptr, m_ptr, dx_ptr, h_ptr, k, centre, middle, groups, total, gamma, kappa, slope_scale,
    C: tl.constexpr, L: tl.constexpr, CHUNKS: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr,
    NEED_X: tl.constexpr, NEED_ALPHA: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    c, programs = tl.program_id(1), tl.num_programs(0)
    a, m = _coefficients(a_ptr, c, k, CHUNKS, GROUPS), _coefficients(m_ptr, c, k, CHUNKS, GROUPS)
    sums = tl.zeros([GROUPS, 4, BLOCK], tl.float32)
    for start in range(tl.program_id(0) * BLOCK, total, programs * BLOCK):
        j = start + tl.arange(0, BLOCK)
        x, place, inside = _read(x_ptr, j, c, total, C, L)
        g = tl.load(g_ptr + place, mask=inside, other=0.0).to(tl.float32)
        u = tl.minimum(tl.maximum(x - centre, -1e6), 1e6)
        high, low = _factors(u, gamma, kappa, middle, groups, GROUPS)
        if NEED_X:
            part = tl.sum(tl.sum(a[:, :, None] * low[None, :, :], 1) * high, 0)
            moment = tl.sum(tl.sum(m[:, :, None] * low[None, :, :], 1) * high, 0)
            dx = g * (moment - slope_scale * u * part)
            if ADD:
                dx += tl.load(dx_ptr + place, mask=inside, other=0.0)
            tl.store(dx_ptr + place, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        if NEED_ALPHA:
            sums += (g[None, :] * high)[:, None, :] * low[None, :, :]
    if NEED_ALPHA:
        q, s = tl.arange(0, GROUPS)[:, None], tl.arange(0, 4)[None, :]
        out = h_ptr + ((tl.program_id(0) * C + c) * GROUPS + q) * 4 + s
        tl.store(out, tl.sum(sums, 2))


@functools.lru_cache(maxsize=64)
def _plan(grid, device):
    """Chunks of the grid as tables: weights and weighted offsets (K, groups, 4), and each chunk's numbers."""
    chunks = chunks_of(grid, 4)
    groups = triton.next_power_of_2(max(c.groups for c in chunks))
    weights = torch.zeros(len(chunks), groups * 4, dtype=torch.float64)
    offsets = torch.zeros_like(weights)
    for k, chunk in enumerate(chunks):
        weights[k, : len(chunk.weights)] = torch.tensor(chunk.weights, dtype=torch.float64)
        offsets[k, : len(chunk.offsets)] = torch.tensor(chunk.offsets, dtype=torch.float64)
    moments = weights * offsets * 2 * grid.gamma * grid.spacing
    numbers = torch.tensor([c.centre for c in chunks]), torch.tensor([[c.middle, c.groups] for c in chunks])
    return chunks, groups, *(t.float().to(device) for t in (weights, moments)), *(t.to(device) for t in numbers)


def _tables(alpha, chunks, groups, *factors):
    """alpha spread over (C, K, groups, 4), times each of the factors (K, groups * 4)."""
    spread = alpha.new_zeros(len(alpha), len(chunks), groups * 4)
    for k, chunk in enumerate(chunks):
        spread[:, k, : chunk.stop - chunk.start] = alpha[:, chunk.start : chunk.stop]
    return [(spread * f).contiguous() for f in factors]


def _log2(grid):
    return grid.gamma / math.log(2), 2 * grid.gamma * grid.spacing / math.log(2)


def forward(x, alpha, grid):
    """f(x), contiguous, in x's type."""
    x, (n, c) = x.contiguous(), x.shape[:2]
    out, total = torch.empty_like(x), x.numel() // c
    if total:
        chunks, groups, weights, _, centres, numbers = _plan(grid, x.device)
        (a,) = _tables(alpha.float(), chunks, groups, weights)
        middles, sizes = numbers[:, 0].contiguous(), numbers[:, 1].contiguous()
        shape = dict(C=c, L=total // n, CHUNKS=len(chunks), GROUPS=groups, BLOCK=BLOCK)
        _forward_kernel[triton.cdiv(total, BLOCK), c](x, a, out, centres, middles, sizes, total, *_log2(grid), **shape)
    return out


def gradients(g, x, alpha, grid, need_x=True, need_alpha=True):
    """(dx, dalpha) of sum(g f), None where not needed. Partial sums are added in a fixed order: repeatable."""
    x, g, (n, c) = x.contiguous(), g.contiguous(), x.shape[:2]
    total = x.numel() // c
    chunks, groups, weights, moments, _, _ = _plan(grid, x.device)
    a, m = _tables(alpha.float(), chunks, groups, weights, moments)
    # several chunks add into dx one after the other: then it must not be rounded in between
    dx = torch.zeros_like(x, dtype=x.dtype if len(chunks) == 1 else torch.float32) if need_x else x
    programs = max(1, min(triton.cdiv(total, BLOCK // 2), PROGRAMS // c))
    partial = torch.zeros(programs, c, groups * 4, dtype=torch.float32, device=x.device)
    parts = []
    for k, chunk in enumerate(chunks):
        if total:
            _backward_kernel[programs, c](
                x, g, a, m, dx, partial, k, chunk.centre, chunk.middle, chunk.groups, total, *_log2(grid),
                2 * grid.gamma, C=c, L=total // n, CHUNKS=len(chunks), GROUPS=groups, BLOCK=BLOCK // 2,
                NEED_X=need_x, NEED_ALPHA=need_alpha, ADD=k > 0,
            )  # fmt: skip
        parts.append((partial.sum(0) * weights[k])[:, : chunk.stop - chunk.start])
    return dx.to(x.dtype) if need_x else None, torch.cat(parts, 1).to(alpha.dtype) if need_alpha else None
