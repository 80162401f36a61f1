"""Mixtures on an even grid: the evaluation that serves a tensor, Triton's kernels on CUDA, else the eager one."""

import torch

from . import eager


def _triton(x):
    """The module of CUDA kernels if it can serve x, else None."""
    if not x.is_cuda:
        return None
    try:
        from . import fused
    except ImportError:  # a torch without Triton: the eager evaluation runs on CUDA as well
        return None
    return fused if fused.usable(x) else None


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
