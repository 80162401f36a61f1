r"""Gaussian mixtures :math:`f(x) = \sum_i \alpha_i \exp(-\gamma (x - d_i)^2)`, one a channel, and their derivatives.

``grid_mixture`` is for an even, fixed grid of points, ``gaussian_mixture`` for any dictionary. Neither builds the
(x, D) tensor, forward or backward.

The Gaussian closes under differentiation: with h_ci = sum over n, * of g k(x, d_i), the *correlation*,

* the gradient of sum(g f) in x is g f', and f' = -2 gamma (x f[alpha] - f[alpha d]) is made of mixtures,
* its gradient in alpha is h, and <v, h> = sum(g f[v]), so what is true of f holds for h.

Two functions that call each other are therefore enough, at the memory of the first derivative.
"""

import inspect

import torch

from . import compiled as grid_compiled
from . import dispatch
from .channels import fold, unfold_images
from .grid import bandwidth, points

# --- as functions of autograd ----------------------------------------------------------------------------------


class _Gaussian(torch.autograd.Function):
    """f and, if wanted, f'. ``grid`` set: fast, dictionary and gamma are constants that agree with it."""

    @staticmethod
    def forward(x, alpha, dictionary, gamma, grid, want_slope):
        if grid is not None:
            return dispatch.forward(x, alpha, grid, want_slope)
        return dispatch.free_forward(x, alpha, dictionary, gamma, want_slope)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, alpha, dictionary, gamma, ctx.grid, _ = inputs
        if output[1] is not None:
            ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, alpha, dictionary, gamma, output[1])

    @staticmethod
    def backward(ctx, g, _):
        x, alpha, dictionary, gamma, slope = ctx.saved_tensors
        return *_gradients(g, x, alpha, dictionary, gamma, ctx.grid, slope, ctx.needs_input_grad), None, None

    @staticmethod
    def vmap(info, in_dims, x, alpha, dictionary, gamma, grid, want_slope):
        args = fold(info.batch_size, (x,), (alpha, dictionary, gamma), in_dims[:4])
        out, slope = _Gaussian.apply(*args, grid, want_slope)
        out, slope = unfold_images(out, info.batch_size), unfold_images(slope, info.batch_size)
        return (out, slope), (1, None if slope is None else 1)


class _Correlation(torch.autograd.Function):
    """h_ci = sum over n, * of g k(x, d_i), shape (C, D)."""

    @staticmethod
    def forward(x, g, dictionary, gamma, grid):
        if grid is not None:
            return dispatch.correlation(x, g, grid, dictionary.dtype)
        return dispatch.free_correlation(x, g, dictionary, gamma)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.grid = inputs[4]
        ctx.save_for_backward(*inputs[:4])

    @staticmethod
    def backward(ctx, v):
        x, g, dictionary, gamma = ctx.saved_tensors
        need_x, need_g, need_d, need_gamma, _ = ctx.needs_input_grad
        needs = (need_x, False, need_d, need_gamma)
        dx, _, dd, dgamma = _gradients(g, x, v, dictionary, gamma, ctx.grid, None, needs)
        dg = _Gaussian.apply(x, v, dictionary, gamma, ctx.grid, False)[0] if need_g else None
        return dx, dg, dd, dgamma, None

    @staticmethod
    def vmap(info, in_dims, x, g, dictionary, gamma, grid):
        args = fold(info.batch_size, (x, g), (dictionary, gamma), in_dims[:4])
        h = _Correlation.apply(*args, grid)
        return h.reshape(info.batch_size, -1, h.shape[1]), 0


def _gradients(g, x, alpha, dictionary, gamma, grid, slope, needs):
    """Gradients of sum(g f) in x, alpha, dictionary and gamma; None where not needed."""
    need_x, need_alpha, need_d, need_gamma = needs[:4]
    if not torch.is_grad_enabled():  # no derivative of these is wanted: the fast ways
        if grid is not None:
            return *dispatch.gradients(g, x, alpha, grid, slope, need_x, need_alpha), None, None
        need_parameters = need_alpha or need_d or need_gamma
        return dispatch.free_gradients(g, x, alpha, dictionary, gamma, slope, need_x, need_parameters)
    dx = dalpha = dd = dgamma = None
    if need_x:
        xs, scale = x.to(alpha.dtype), gamma.reshape(-1, *[1] * (x.ndim - 2))
        f = _Gaussian.apply(xs, alpha, dictionary, gamma, grid, False)[0]
        fd = _Gaussian.apply(xs, alpha * dictionary, dictionary, gamma, grid, False)[0]
        dx = (-2 * scale * g * (xs * f - fd)).to(x.dtype)
    if need_alpha or need_d or need_gamma:
        h0 = dalpha = _Correlation.apply(x, g, dictionary, gamma, grid)
    if need_d or need_gamma:
        h1 = _Correlation.apply(x, g * x, dictionary, gamma, grid)
    if need_d:
        dd = (2 * gamma[:, None] * alpha * (h1 - dictionary * h0)).sum_to_size(dictionary.shape)
    if need_gamma:
        h2 = _Correlation.apply(x, g * x * x, dictionary, gamma, grid)
        moments = h2 - 2 * dictionary * h1 + dictionary**2 * h0
        dgamma = -(alpha * moments).sum(1).sum_to_size(gamma.shape)
    return dx, dalpha if need_alpha else None, dd, dgamma


for _function in (_Gaussian, _Correlation):  # PyTorch asks for it at every call; kept, it costs nothing
    _function.forward.__signature__ = inspect.signature(_function.forward)


def gaussian_mixture(x, alpha, dictionary, gamma):
    """f(x) for x (N, C, *), alpha (C, D), dictionary (1 or C, D), gamma (1 or C,); differentiable in all four."""
    want_slope = x.requires_grad and torch.is_grad_enabled()
    return _Gaussian.apply(x, alpha, dictionary, gamma, None, want_slope)[0]


def grid_mixture(x, alpha, grid, text=None):
    """f(x) for x (N, C, *) of any floating type, alpha (C, D) float32 or float64, in which it is computed.

    ``text`` is ``str(grid)``, made beforehand for ``torch.compile``.
    """
    if torch.compiler.is_compiling() and text is not None:
        return grid_compiled.fused(x, alpha, text)
    want_slope = x.requires_grad and torch.is_grad_enabled()
    return _Gaussian.apply(x, alpha, points(grid, alpha), bandwidth(grid, alpha), grid, want_slope)[0]
