"""Mixtures, on an even grid or any: the evaluation that serves a tensor, Triton's on CUDA, else an eager one."""

import torch

from . import eager, free


def _triton(x, any_grid=False):
    """The module of CUDA kernels if it can serve x, else None."""
    if not x.is_cuda:
        return None
    try:
        from . import fused, fused_free
    except ImportError:  # a torch without Triton: the eager evaluations run on CUDA as well
        return None
    return (fused_free if any_grid else fused) if fused.usable(x) else None


def forward(x, alpha, grid, want_slope):
    """f, and df/dx in alpha's type where ``gradients`` will want it again (on CUDA it does not)."""
    if kernels := _triton(x):
        return kernels.forward(x, alpha, grid), None
    return eager.forward(x, alpha, grid, want_slope)


def correlation(x, g, grid, dtype):
    """h_ci = sum over n, * of g k(x, d_i), (C, D), in ``dtype``."""
    if kernels := _triton(x):
        alpha = torch.zeros(x.shape[1], grid.size, dtype=dtype, device=x.device)
        return kernels.gradients(g, x, alpha, grid, need_x=False)[1]
    return eager.correlation(x, g, grid, dtype)


def gradients(g, x, alpha, grid, slope, need_x, need_alpha):
    """First derivatives of sum(g f) in x and alpha, None where not needed."""
    if kernels := _triton(x):
        return kernels.gradients(g, x, alpha, grid, need_x, need_alpha)
    if need_x and slope is None:
        slope = eager.forward(x, alpha, grid, True)[1]
    dx = (g * slope).to(x.dtype) if need_x else None
    return dx, eager.correlation(x, g, grid, alpha.dtype) if need_alpha else None


def free_forward(x, alpha, dictionary, gamma, want_slope):
    """``forward`` for any dictionary (1 or C, D) and gamma (1 or C,)."""
    if kernels := _triton(x, any_grid=True):
        return kernels.forward(x, alpha, dictionary, gamma), None
    return free.forward(x, alpha, dictionary, gamma, want_slope)


def free_correlation(x, g, dictionary, gamma):
    """``correlation`` for any dictionary."""
    if kernels := _triton(x, any_grid=True):
        return kernels.correlation(x, g, dictionary, gamma)
    return free.correlation(x, g, dictionary, gamma)


def free_gradients(g, x, alpha, dictionary, gamma, slope, need_x, need_parameters):
    """First derivatives of sum(g f) in x, alpha, dictionary and gamma, None where not needed."""
    if kernels := _triton(x, any_grid=True):
        return kernels.gradients(g, x, alpha, dictionary, gamma, need_x, need_parameters)
    return free.gradients(g, x, alpha, dictionary, gamma, slope, need_x, need_parameters)
