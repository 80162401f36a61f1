"""Mixtures of any kernel, f(x) = sum_i alpha_i k(x, d_i), one a channel, one dictionary point at a time."""

import torch

from .channels import column, per_channel
from .gaussian import gaussian_mixture
from .kernels import KERNELS


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
                t = (x - column(dictionary, i, x)).requires_grad_()
                w = gamma.detach().requires_grad_()
                k = KERNELS[ctx.name].value(t, w.reshape(-1, *[1] * (x.ndim - 2)))
            ga = g * column(alpha, i, x)
            dt, dw = torch.autograd.grad(k, (t, w), ga)
            if needs[0]:
                dx.add_(dt)
            sums.append((per_channel(g * k.detach(), alpha), -per_channel(dt, dictionary), dw))
        dalpha, dd, dgamma = (torch.stack(v, 1) for v in zip(*sums, strict=True))
        return dx, *(v if need else None for v, need in zip((dalpha, dd, dgamma.sum(1)), needs[1:], strict=True)), None


def _plain(x, alpha, dictionary, gamma, name):
    value, w = KERNELS[name].value, gamma.reshape(-1, *[1] * (x.ndim - 2))
    return sum(column(alpha, i, x) * value(x - column(dictionary, i, x), w) for i in range(alpha.shape[1]))


def mixture(x, alpha, dictionary, gamma, kernel):
    """f(x) for any kernel by name; shapes as ``gaussian_mixture``."""
    if kernel == "gaussian":
        return gaussian_mixture(x, alpha, dictionary, gamma)
    if torch.compiler.is_compiling():  # which derives by itself, and cannot look into a backward that does
        return _plain(x, alpha, dictionary, gamma, kernel)
    return _AnyMixture.apply(x, alpha, dictionary, gamma, kernel)
