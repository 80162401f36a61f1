"""How the CUDA kernels go through a tensor, in channels first or last.

A program works on tiles of ROWS rows, each of them one element a thread: LANES places of WIDTH channels, neighbours in
memory in channels first (WIDTH 1) as in channels last. A thread keeps to its lane and channel, so what it sums over
images stays in its registers until the program's last tile.
"""

import math

import torch
import triton
import triton.language as tl

WARPS = 4
ROWS = 8  # of a tile
LEAST, TILES = 256, 16  # programs of a backward pass that give a GPU enough to do; tiles of each where there are more


@triton.jit
def places(tile, n_stride, c_stride, l_stride, total,
           C: tl.constexpr, L: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """Places in memory of a tile's elements, which of them exist, and the channel of each thread (1, threads)."""
    row, thread = tl.arange(0, ROWS)[:, None], tl.arange(0, LANES * WIDTH)[None, :]
    c = tl.program_id(1) * WIDTH + thread % WIDTH
    j = (tile * ROWS + row) * LANES + thread // WIDTH
    place = (j // L).to(tl.int64) * n_stride + c * c_stride + (j % L) * l_stride
    # the compiler lets threads run along the contiguous dimension, and does not see which one that is
    return tl.max_contiguous(place, (1, 2)), (j < total) & (c < C), c


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
    """x, contiguous in channels first or last, and how a kernel goes through it: (total, strides), constants."""
    last = torch.channels_last
    x = x if x.ndim == 4 and x.is_contiguous(memory_format=last) else x.contiguous()
    (n, c), length = x.shape[:2], math.prod(x.shape[2:])
    strides = (c * length, length, 1) if x.is_contiguous() else (c * length, 1, c)
    width = min(triton.next_power_of_2(c), 32 * WARPS) if strides[1] == 1 else 1
    shape = dict(C=c, L=length, ROWS=ROWS, LANES=32 * WARPS // width, WIDTH=width, num_warps=WARPS)
    return x, (n * length, *strides), shape


def programs(shape, total, several=False):
    """The grid of programs, (tiles, groups of channels); fewer than tiles where each is to go through several."""
    groups = triton.cdiv(shape["C"], shape["WIDTH"])
    tiles = triton.cdiv(total, shape["ROWS"] * shape["LANES"])
    return min(tiles, max(triton.cdiv(LEAST, groups), tiles // TILES)) if several else tiles, groups


def like(g, x):
    """g in the memory format of x, a result of ``layout``."""
    return g.contiguous() if x.is_contiguous() else g.contiguous(memory_format=torch.channels_last)
