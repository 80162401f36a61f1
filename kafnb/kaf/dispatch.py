"""Mixtures, on an even grid or any: Triton's kernels on CUDA, numba's on a CPU, else operations on whole tensors.

The last serve other devices and a float64 on CUDA, the compiler and stand-ins for tensors (meta, FakeTensorMode), and a
Python without Triton or numba.
"""

import functools

import torch

from . import compiled, free
from .kept import plain


@functools.cache
def _cuda():
    """The modules of CUDA kernels, for an even grid and for any dictionary; None without Triton."""
    try:
        from . import fused, fused_free
    except ImportError:
        return None, None
    return fused, fused_free


@functools.cache
def _cpu():
    """The module of CPU kernels, None without numba."""
    try:
        from . import native
    except ImportError:
        return None
    return native


def _triton(x, any_grid=False):
    """The module of CUDA kernels if it can serve x, else None."""
    usable = x.is_cuda and x.dtype in (torch.float16, torch.bfloat16, torch.float32)
    usable = usable and not torch.compiler.is_compiling() and plain(x)
    return _cuda()[any_grid] if usable else None


def _native(x):
    """The module of CPU kernels if it can serve x, else None."""
    usable = x.device.type == "cpu" and not torch.compiler.is_compiling() and plain(x)
    return _cpu() if usable else None


def forward(x, alpha, grid, want_slope):
    """f, and df/dx in alpha's type where ``gradients`` will want it again (on CUDA it does not)."""
    if kernels := _triton(x):
        return kernels.forward(x, alpha, grid), None
    if kernels := _native(x):
        return kernels.forward(x, alpha, grid, want_slope)
    f, slope = compiled.forward(x, alpha, grid)
    return f.to(x.dtype), slope if want_slope else None


def correlation(x, g, grid, dtype):
    """h_ci = sum over n, * of g k(x, d_i), (C, D), in ``dtype``."""
    if kernels := _triton(x):
        alpha = torch.zeros(x.shape[1], grid.size, dtype=dtype, device=x.device)
        return kernels.gradients(g, x, alpha, grid, need_x=False)[1]
    return (_native(x) or compiled).correlation(x, g, grid, dtype)


def gradients(g, x, alpha, grid, slope, need_x, need_alpha):
    """First derivatives of sum(g f) in x and alpha, None where not needed."""
    if kernels := _triton(x):
        return kernels.gradients(g, x, alpha, grid, need_x, need_alpha)
    if need_x and slope is None:
        slope = forward(x, alpha, grid, True)[1]
    dx = (g * slope).to(x.dtype) if need_x else None
    return dx, correlation(x, g, grid, alpha.dtype) if need_alpha else None


def free_forward(x, alpha, dictionary, gamma, want_slope):
    """``forward`` for any dictionary (1 or C, D) and gamma (1 or C,)."""
    if kernels := _triton(x, any_grid=True):
        return kernels.forward(x, alpha, dictionary, gamma), None
    if kernels := _native(x):
        return kernels.free_forward(x, alpha, dictionary, gamma, want_slope)
    return free.forward(x, alpha, dictionary, gamma, want_slope)


def _free_sums(x, g, dictionary, gamma):
    kernels = _native(x)
    return kernels.free_sums(x, g, dictionary, gamma) if kernels else free.sums(x, g, dictionary, gamma)


def free_correlation(x, g, dictionary, gamma):
    """``correlation`` for any dictionary."""
    if kernels := _triton(x, any_grid=True):
        return kernels.correlation(x, g, dictionary, gamma)
    return _free_sums(x, g, dictionary, gamma)[0]


def free_gradients(g, x, alpha, dictionary, gamma, slope, need_x, need_parameters):
    """First derivatives of sum(g f) in x, alpha, dictionary and gamma, None where not needed."""
    if kernels := _triton(x, any_grid=True):
        return kernels.gradients(g, x, alpha, dictionary, gamma, need_x, need_parameters)
    if need_x and slope is None:
        slope = free_forward(x, alpha, dictionary, gamma, True)[1]
    dx = (g * slope).to(x.dtype) if need_x else None
    if not need_parameters:
        return dx, None, None, None
    return dx, *free.of_parameters(_free_sums(x, g, dictionary, gamma), alpha, dictionary, gamma)
