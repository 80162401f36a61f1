r"""Kernel mixtures :math:`f(x) = \sum_i \alpha_i k(x, d_i)`, one for each channel, and their derivatives.

``grid_mixture`` is for Gaussian kernels on an even, fixed grid, ``gaussian_mixture`` for Gaussian kernels on any
dictionary, ``mixture`` for any kernel. None builds the (x, D) tensor, neither forward nor backward.

The Gaussian closes under differentiation: with h_ci = sum over n, * of g k(x, d_i), the *correlation*,

* the gradient of sum(g f) in x is g f', and f' = -2 gamma (x f[alpha] - f[alpha d]) is made of mixtures,
* its gradient in alpha is h, and <v, h> = sum(g f[v]), so what is true of f holds for h.

Two functions that call each other are therefore enough for derivatives of any order, at the memory of the first.
"""

import torch

from . import compiled as grid_compiled
from . import eager as grid_eager
from .grid import points
from .kernels import KERNELS


def _column(p, i, x):
    """Column i of a (1 or C, D) parameter, shaped to broadcast along x's channels."""
    return p[:, i].reshape(-1, *[1] * (x.ndim - 2))


def _per_channel(v, like):
    """Sum a (N, C, *) tensor to ``like``'s leading size: C, or 1 when all channels share the parameter."""
    v = v.sum(dim=[d for d in range(v.ndim) if d != 1])
    return v if like.shape[0] > 1 else v.sum(0, keepdim=True)


# --- vmap: a batch of mixtures is a mixture of more channels -----------------------------------------------------


def _fold(size, images, tables, in_dims):
    """Fold the mapped dimension into the channels.

    images are (N, C, *), tables (1 or C, ...); in_dims has the mapped dimension of each, None where it is not mapped.
    """
    folded, channels = [], None
    for v, dim in zip(images, in_dims, strict=False):
        v = v.movedim(dim, 1) if dim is not None else v.unsqueeze(1).expand(-1, size, *v.shape[1:])
        channels = v.shape[2]
        folded.append(v.reshape(v.shape[0], size * channels, *v.shape[3:]))
    for v, dim in zip(tables, in_dims[len(images) :], strict=True):
        if dim is None and v.shape[0] == 1:
            folded.append(v)  # shared by all
            continue
        v = v.movedim(dim, 0) if dim is not None else v.expand(size, *v.shape)
        v = v.expand(size, channels, *v.shape[2:])
        folded.append(v.reshape(size * channels, *v.shape[2:]))
    return folded


def _unfold_images(v, size):
    return None if v is None else v.reshape(v.shape[0], size, -1, *v.shape[2:])


# --- the evaluation that serves a tensor on an even grid ---------------------------------------------------------


def _triton(x):
    """The module of CUDA kernels if it can serve x, else None."""
    if not x.is_cuda:
        return None
    try:
        from . import fused as grid_triton
    except ImportError:  # a torch without Triton: the eager evaluation runs on CUDA as well
        return None
    return grid_triton if grid_triton.usable(x) else None


def _grid_forward(x, alpha, grid, want_slope):
    """f, and df/dx in alpha's type where ``_grid_gradients`` will want it again (on CUDA it does not)."""
    if kernels := _triton(x):
        return kernels.forward(x, alpha, grid), None
    return grid_eager.forward(x, alpha, grid, want_slope)


def _grid_correlation(x, g, grid, dtype):
    """h_ci = sum over n, * of g k(x, d_i), (C, D), in ``dtype``."""
    if kernels := _triton(x):
        alpha = torch.zeros(x.shape[1], grid.size, dtype=dtype, device=x.device)
        return kernels.gradients(g, x, alpha, grid, need_x=False)[1]
    return grid_eager.correlation(x, g, grid, dtype)


def _grid_gradients(g, x, alpha, grid, slope, need_x, need_alpha):
    """First derivatives of sum(g f) in x and alpha, None where not needed."""
    if kernels := _triton(x):
        return kernels.gradients(g, x, alpha, grid, need_x, need_alpha)
    if need_x and slope is None:
        slope = grid_eager.forward(x, alpha, grid, True)[1]
    dx = (g * slope).to(x.dtype) if need_x else None
    return dx, grid_eager.correlation(x, g, grid, alpha.dtype) if need_alpha else None


# --- Gaussian kernels ------------------------------------------------------------------------------------------


class _Gaussian(torch.autograd.Function):
    """f and, if wanted, f'. ``grid`` set: fast, dictionary and gamma are constants that agree with it."""

    @staticmethod
    def forward(x, alpha, dictionary, gamma, grid, want_slope):
        if grid is not None:
            return _grid_forward(x, alpha, grid, want_slope)
        scale = -gamma.reshape(-1, *[1] * (x.ndim - 2))
        out, slope = torch.zeros_like(x), torch.zeros_like(x) if want_slope else None
        for i in range(alpha.shape[1]):
            t = x - _column(dictionary, i, x)
            k = t.square().mul_(scale).exp_().mul_(_column(alpha, i, x))
            out.add_(k)
            if want_slope:
                slope.addcmul_(t, k)
        return out, slope.mul_(2 * scale) if want_slope else None

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
        args = _fold(info.batch_size, (x,), (alpha, dictionary, gamma), in_dims[:4])
        out, slope = _Gaussian.apply(*args, grid, want_slope)
        out, slope = _unfold_images(out, info.batch_size), _unfold_images(slope, info.batch_size)
        return (out, slope), (1, None if slope is None else 1)


class _Correlation(torch.autograd.Function):
    """h_ci = sum over n, * of g k(x, d_i), shape (C, D)."""

    @staticmethod
    def forward(x, g, dictionary, gamma, grid):
        if grid is not None:
            return _grid_correlation(x, g, grid, dictionary.dtype)
        scale = -gamma.reshape(-1, *[1] * (x.ndim - 2))
        dims = [d for d in range(x.ndim) if d != 1]
        columns = [
            (x - _column(dictionary, i, x)).square_().mul_(scale).exp_().mul_(g).sum(dims)
            for i in range(dictionary.shape[1])
        ]
        return torch.stack(columns, dim=1)

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
        args = _fold(info.batch_size, (x, g), (dictionary, gamma), in_dims[:4])
        h = _Correlation.apply(*args, grid)
        return h.reshape(info.batch_size, -1, h.shape[1]), 0


def _gradients(g, x, alpha, dictionary, gamma, grid, slope, needs):
    """Gradients of sum(g f) in x, alpha, dictionary and gamma; None where not needed."""
    need_x, need_alpha, need_d, need_gamma = needs[:4]
    if not torch.is_grad_enabled():  # no derivative of these is wanted: the fast ways
        if grid is not None:
            return *_grid_gradients(g, x, alpha, grid, slope, need_x, need_alpha), None, None
        return _free_gradients(g, x, alpha, dictionary, gamma, slope)
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


def _free_gradients(g, x, alpha, dictionary, gamma, slope):
    """All four first derivatives in one pass over the dictionary, for what learns it."""
    scale = -gamma.reshape(-1, *[1] * (x.ndim - 2))
    sums, dx = [], g * slope if slope is not None else torch.zeros_like(x)
    for i in range(dictionary.shape[1]):
        t = x - _column(dictionary, i, x)
        gk = t.square().mul_(scale).exp_().mul_(g)
        h0 = _per_channel(gk, alpha)
        h1 = _per_channel(gk.mul_(t), alpha)
        if slope is None:
            dx.addcmul_(gk, 2 * scale * _column(alpha, i, x))
        sums.append(torch.stack((h0, h1, _per_channel(gk.mul_(t), alpha))))
    h0, h1, h2 = torch.stack(sums, 2)  # (C, D) each: sums of g k, g k t, g k t^2
    dd = (2 * gamma[:, None] * alpha * h1).sum_to_size(dictionary.shape)
    dgamma = -(alpha * h2).sum(1).sum_to_size(gamma.shape)
    return dx, h0, dd, dgamma


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
    return _Gaussian.apply(x, alpha, points(grid, alpha), alpha.new_full((1,), grid.gamma), grid, want_slope)[0]


# --- any kernel ------------------------------------------------------------------------------------------------


class _AnyMixture(torch.autograd.Function):
    """f(x) for a kernel of ``kernels.KERNELS``, one dictionary point at a time."""

    @staticmethod
    def forward(ctx, x, alpha, dictionary, gamma, name):
        ctx.name = name
        ctx.save_for_backward(x, alpha, dictionary, gamma)
        return _plain(x, alpha, dictionary, gamma, name)

    @staticmethod
    def backward(ctx, g):
        inputs, needs = ctx.saved_tensors, ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():  # second derivatives: the plain formula, with D activations
            leaves = [v for v, need in zip(inputs, needs, strict=True) if need]
            grads = iter(torch.autograd.grad(_plain(*inputs, ctx.name), leaves, g, create_graph=True))
            return *(next(grads) if need else None for need in needs), None
        x, alpha, dictionary, gamma = inputs
        sums, dx = [], torch.zeros_like(x) if needs[0] else None
        for i in range(alpha.shape[1]):
            with torch.enable_grad():
                t = (x - _column(dictionary, i, x)).requires_grad_()
                w = gamma.detach().requires_grad_()
                k = KERNELS[ctx.name].value(t, w.reshape(-1, *[1] * (x.ndim - 2)))
            ga = g * _column(alpha, i, x)
            dt, dw = torch.autograd.grad(k, (t, w), ga)
            if needs[0]:
                dx.add_(dt)
            sums.append((_per_channel(g * k.detach(), alpha), -_per_channel(dt, dictionary), dw))
        dalpha, dd, dgamma = (torch.stack(v, 1) for v in zip(*sums, strict=True))
        return dx, *(v if need else None for v, need in zip((dalpha, dd, dgamma.sum(1)), needs[1:], strict=True)), None


def _plain(x, alpha, dictionary, gamma, name):
    value, w = KERNELS[name].value, gamma.reshape(-1, *[1] * (x.ndim - 2))
    return sum(_column(alpha, i, x) * value(x - _column(dictionary, i, x), w) for i in range(alpha.shape[1]))


def mixture(x, alpha, dictionary, gamma, kernel):
    """f(x) for any kernel by name; shapes as ``gaussian_mixture``."""
    if kernel == "gaussian":
        return gaussian_mixture(x, alpha, dictionary, gamma)
    return _AnyMixture.apply(x, alpha, dictionary, gamma, kernel)
