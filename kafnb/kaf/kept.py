"""Small tensors that are made once and kept, one a type and device."""

import concurrent.futures
import functools

import torch


def plain(x):
    """Whether x is a Tensor and no stand-in for one (FakeTensorMode's, say)."""
    return type(x) in (torch.Tensor, torch.nn.Parameter)


def _apart(make, *args):
    """Made in a thread of its own, where no mode of the caller is on (inference mode, FakeTensorMode, torch.func)."""
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        made = thread.submit(make, *args).result()
    if made.is_cuda:
        torch.cuda.synchronize(made.device)  # the caller's stream need not be the one that it was made on
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
            made = known[args] = _apart(make, *args)
        return made

    return wrapped
