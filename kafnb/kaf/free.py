"""Mixtures over any dictionary, one a channel or one for all, as operations on whole tensors.

One dictionary point at a time. For ``torch.compile``, which fuses them, and where no kernel is (``dispatch``).
"""

import torch

from .channels import column


def forward(x, alpha, dictionary, gamma, want_slope):
    """f and df/dx (None unless wanted) for x (N, C, *), alpha (C, D), dictionary (1 or C, D), gamma (1 or C,)."""
    scale = -gamma.reshape(-1, *[1] * (x.ndim - 2))
    out, slope = torch.zeros_like(x), torch.zeros_like(x) if want_slope else None
    for i in range(alpha.shape[1]):
        t = x - column(dictionary, i, x)
        k = torch.exp(scale * t * t) * column(alpha, i, x)
        out = out + k
        slope = slope + t * k if want_slope else None
    return out, 2 * scale * slope if want_slope else None


def sums(x, g, dictionary, gamma):
    """Sums over images of g k, g k t and g k t^2, t = x - d, (3, C, D)."""
    scale, images, found = -gamma.reshape(-1, *[1] * (x.ndim - 2)), [d for d in range(x.ndim) if d != 1], []
    for i in range(dictionary.shape[1]):
        t = x - column(dictionary, i, x)
        gk = g * torch.exp(scale * t * t)
        found.append(torch.stack([v.sum(images) for v in (gk, gk * t, gk * t * t)]))
    return torch.stack(found, 2)


def of_parameters(sums, alpha, dictionary, gamma):
    """Gradients in alpha, dictionary and gamma by the sums of g k, g k t and g k t^2, (3, C, D)."""
    h0, h1, h2 = sums
    dd = (2 * gamma[:, None] * alpha * h1).sum_to_size(dictionary.shape)
    return h0, dd, -(alpha * h2).sum(1).sum_to_size(gamma.shape)
