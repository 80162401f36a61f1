"""How the CUDA kernels go through a tensor, in channels first or last.

A program works on tiles of ROWS rows, each of them one element a thread: LANES places of WIDTH channels, neighbours in
memory in channels first (WIDTH 1) as in channels last; in channels first VECTOR elements, which are loaded at once. A
thread keeps to its lane and channel, so what belongs to a channel and what is summed over images stays in its registers
until the program's last tile.
"""

import math

import torch
import triton
import triton.language as tl

WARPS = 4
EACH = 8  # elements of a tile that a thread takes
LEAST = 512  # programs that give a GPU enough to do


@triton.jit
def turn(C: tl.constexpr, WIDTH: tl.constexpr):
    """A program's first tile and how many on its next is: one dimension, the others of a grid end at 65535."""
    groups: tl.constexpr = (C + WIDTH - 1) // WIDTH
    return tl.program_id(0) // groups, tl.num_programs(0) // groups


@triton.jit
def first_channel(C: tl.constexpr, WIDTH: tl.constexpr):
    return tl.program_id(0) % ((C + WIDTH - 1) // WIDTH) * WIDTH


@triton.jit
def channels(C: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """The channel of each thread, (threads, 1, 1)."""
    return first_channel(C, WIDTH) + tl.arange(0, LANES * WIDTH)[:, None, None] % WIDTH


@triton.jit
def places(tile, c, total, C: tl.constexpr, L: tl.constexpr, LAST: tl.constexpr, WHOLE: tl.constexpr,
           ROWS: tl.constexpr, VECTOR: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """Places in memory of a tile's elements, (threads, ROWS, VECTOR), and which of them exist.

    Rows are added last, as 64-bit constants: in machine code they are a load's offset, not arithmetic.
    """
    step: tl.constexpr = LANES * VECTOR
    row, piece = tl.arange(0, ROWS)[None, :, None], tl.arange(0, VECTOR)[None, None, :]
    lane = tl.arange(0, LANES * WIDTH)[:, None, None] // WIDTH * VECTOR
    start = tile * (ROWS * step)
    if LAST:
        place = (start.to(tl.int64) * C + (lane * C + c)) + row * (step * C)
    elif L % (ROWS * step) == 0:
        place = (start.to(tl.int64) + (start // L).to(tl.int64) * (C * L - L) + (c * L + lane)) + row * step
    else:
        j = row * step + lane
        place = start.to(tl.int64) + ((start + j) // L).to(tl.int64) * (C * L - L) + (c * L + j)
    if WHOLE:
        inside = tl.full([LANES * WIDTH, ROWS, VECTOR], True, tl.int1)
    else:
        inside = (row * step + lane < total - start) & (c < C) & (piece >= 0)
    if VECTOR > 1:  # an addition of zeros is folded, and with it what the next line says
        place += piece
    # for the compiler: a thread takes VECTOR elements at once, then threads run along the first dimension
    place = tl.multiple_of(tl.max_contiguous(place, (2, 1, VECTOR)), (1, 1, VECTOR))
    return place, inside


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
    c = first_channel(C, WIDTH) + tl.arange(0, WIDTH)
    tl.store(ptr + c * D + i, tl.sum(sums.reshape(LANES, WIDTH), 0), mask=(c < C) & (i < D))


def layout(x, each=None, widest=32 * WARPS):
    """x, contiguous in channels first or last, how many places it has of each channel, and how a kernel goes there.

    ``each`` elements of a tile are a thread's, fewer where tiles would be too few, of at most ``widest`` channels.
    """
    last = torch.channels_last
    x = x if x.ndim == 4 and x.is_contiguous(memory_format=last) else x.contiguous()
    (n, c), length, each = x.shape[:2], math.prod(x.shape[2:]), each or EACH
    last = length == 1 or not x.is_contiguous()
    width = min(triton.next_power_of_2(c), widest) if last else 1
    vector, lanes = 1 if last else math.gcd(length, 16 // x.itemsize), 32 * WARPS // width
    each = each if last or vector > 1 else min(each, 2 * EACH)  # every place is then a register
    while each > EACH and x.numel() < LEAST * each * 32 * WARPS:
        each //= 2
    rows = max(1, each // vector)
    shape = dict(C=c, L=length, LAST=last, ROWS=rows, VECTOR=vector, LANES=lanes, WIDTH=width, num_warps=WARPS)
    shape["WHOLE"] = n * length % (rows * lanes * vector) == c % width == 0
    return x, n * length, shape


def programs(shape, total, each=1):
    """Programs of each group of channels, and of all; where there are enough, ``each`` goes through several tiles."""
    groups = triton.cdiv(shape["C"], shape["WIDTH"])
    tiles = triton.cdiv(total, shape["ROWS"] * shape["VECTOR"] * shape["LANES"])
    count = min(tiles, max(triton.cdiv(LEAST, groups), tiles // each))
    return count, (count * groups,)


def like(g, x):
    """g in the memory format of x, a result of ``layout``."""
    return g.contiguous() if x.is_contiguous() else g.contiguous(memory_format=torch.channels_last)
