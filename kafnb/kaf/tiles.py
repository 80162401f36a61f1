"""Pieces of a tensor that fit the cache, and what a thread keeps to work on them.

What is kept for later calls must not be what a mode of the first caller makes of it (inference mode, FakeTensorMode,
``torch.func``): it is made in a thread of its own, where none is on.
"""

import concurrent.futures
import contextlib
import functools
import threading

import torch

KEEP = 2**24  # largest workspace, in elements, that a thread keeps


def plain(x):
    """Whether x is a Tensor and no stand-in for one (FakeTensorMode's, say)."""
    return type(x) in (torch.Tensor, torch.nn.Parameter)


def _apart(make, *args):
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        made = thread.submit(make, *args).result()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()  # the caller's stream need not be the one that it was made on
    return made


def kept(make):
    """A decorator: ``make(..., dtype, device)`` becomes a function of (..., like) that keeps its tensors."""
    known = {}

    @functools.wraps(make)
    def wrapped(*args):
        *args, like = args
        args = (*args, like.dtype, like.device)
        if torch.compiler.is_compiling() or not plain(like):
            return make(*args)
        made = known.get(args)
        if made is None:
            if len(known) >= 64:
                known.clear()
            made = known[args] = _apart(make, *args)
        return made

    return wrapped


class _Kept(threading.local):
    """Of this thread: memory, one piece a type and device, and the temporaries cut from it."""

    def __init__(self):
        self.memory, self.cuts = {}, {}


_kept = _Kept()


def _memory(size, dtype, device):
    return torch.empty(size, dtype=dtype, device=device)


def temporaries(x, dtype, size, cut, *what):
    """``cut(memory, *what)`` for memory of ``size`` elements, kept for the next call with the same ``what``.

    Asking the allocator for fresh pages, and cutting them up, costs more than the arithmetic on small layers. All
    temporaries of a thread share the memory, so only one call's are in use at a time.
    """
    place = (dtype, x.device)
    if size > KEEP or not plain(x):
        return cut(_memory(size, *place), *what)
    key = (place, cut, *what)
    if key not in _kept.cuts:
        if place not in _kept.memory or len(_kept.memory[place]) < size:
            _kept.memory[place] = _apart(_memory, size, *place)
            _kept.cuts.clear()  # they hold what was there before
        if len(_kept.cuts) >= 256:
            _kept.cuts.clear()
        _kept.cuts[key] = _apart(cut, _kept.memory[place], *what)
    return _kept.cuts[key]


def tiles(x, block):
    """x (N, C, *) as pieces (C, n, l) of at most ``block`` elements, over examples and over places.

    Of 256 times as many where x is not on a CPU: there a step's start costs more than memory.
    """
    block *= 1 if x.is_cpu else 256
    x = x.reshape(*x.shape[:2], -1) if x.numel() else x.new_empty(0, x.shape[1], 1)
    (n, c, length), x = x.shape, x.transpose(0, 1)
    if n * c * length <= block:
        return [x]
    wide = min(length, max(1, block // c))
    rows = x.split(max(1, min(n, block // (c * wide))), 1)
    return rows if wide == length else [tile for row in rows for tile in row.split(wide, 2)]


_SUBNORMAL = 5e-324


@contextlib.contextmanager
def subnormal_as_zero(x):
    """Inside, this thread's arithmetic on a CPU takes subnormal numbers, below float32's 1e-38, for zero.

    They come up where a kernel's factors fade, and some processors (Intel's) need a hundred times as long for each.
    """
    if not x.is_cpu or _SUBNORMAL == 0.0:  # it does already: the comparison is made by the same arithmetic
        yield
        return
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def with_shapes(pieces, of_shape):
    """``of_shape(shape)`` for each of the pieces, most of which have one shape."""
    for i, x in enumerate(pieces):
        if i == 0 or x.shape != pieces[i - 1].shape:
            made = of_shape(tuple(x.shape))
        yield made
