"""How the CUDA kernels go through a tensor, in channels first or last.

A program works on tiles of ROWS rows, each of them one element a thread: LANES places of WIDTH channels, neighbours in
memory in channels first (WIDTH 1) as in channels last. A thread keeps to its lane and channel, so what belongs to a
channel and what is summed over images stays in its registers until the program's last tile.
"""

import math

import torch
import triton
import triton.language as tl

WARPS = 4
ROWS = 8  # of a tile
LEAST = 512  # programs that give a GPU enough to do


@triton.jit
def channels(LANES: tl.constexpr, WIDTH: tl.constexpr):
    """The channel of each thread, (1, threads)."""
    return tl.program_id(1) * WIDTH + tl.arange(0, LANES * WIDTH)[None, :] % WIDTH


@triton.jit
def places(tile, c, total, C: tl.constexpr, L: tl.constexpr, LAST: tl.constexpr,
           ROWS: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """Places in memory of a tile's elements, and which of them exist; what differs between tiles is one number."""
    j = tl.arange(0, ROWS)[:, None] * LANES + tl.arange(0, LANES * WIDTH)[None, :] // WIDTH
    start = tile * (ROWS * LANES)
    if LAST:
        place = start.to(tl.int64) * C + (j * C + c)
    elif L % (ROWS * LANES) == 0:
        place = (start // L).to(tl.int64) * (C * L) + start % L + (c * L + j)
    else:
        place = ((start + j) // L).to(tl.int64) * (C * L) + c * L + (start + j) % L
    # for the compiler: threads run along the second dimension, and each takes one element of it
    place = tl.multiple_of(tl.max_contiguous(place, (1, 2)), (1, 1))
    return place, (j < total - start) & (c < C)


@triton.jit
def read(ptr, place, inside):
    """Elements in float32, zero where there are none."""
    return tl.load(ptr + place, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def column(ptr, c, i, C: tl.constexpr, D: tl.constexpr):
    """Entry i of each thread's channel in a table (C, D), zero where there is none."""
    return tl.load(ptr + c * D + i, mask=(c < C) & (i < D), other=0.0)


@triton.jit
def keep(ptr, i, sums, C: tl.constexpr, D: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """Write sums (threads), added over lanes, as entry i of each channel into a table (C, D)."""
    c = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    tl.store(ptr + c * D + i, tl.sum(sums.reshape(LANES, WIDTH), 0), mask=(c < C) & (i < D))


def layout(x):
    """x, contiguous in channels first or last, how many places it has of each channel, and how a kernel goes there."""
    last = torch.channels_last
    x = x if x.ndim == 4 and x.is_contiguous(memory_format=last) else x.contiguous()
    (n, c), length = x.shape[:2], math.prod(x.shape[2:])
    last = length == 1 or not x.is_contiguous()
    width = min(triton.next_power_of_2(c), 32 * WARPS) if last else 1
    shape = dict(C=c, L=length, LAST=last, ROWS=ROWS, LANES=32 * WARPS // width, WIDTH=width, num_warps=WARPS)
    return x, n * length, shape


def programs(shape, total, each=1):
    """The grid of programs, (tiles, groups of channels); where there are enough, ``each`` goes through several."""
    groups = triton.cdiv(shape["C"], shape["WIDTH"])
    tiles = triton.cdiv(total, shape["ROWS"] * shape["LANES"])
    return min(tiles, max(triton.cdiv(LEAST, groups), tiles // each)), groups


def like(g, x):
    """g in the memory format of x, a result of ``layout``."""
    return g.contiguous() if x.is_contiguous() else g.contiguous(memory_format=torch.channels_last)
