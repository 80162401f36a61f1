"""The balls that attacks stay in: uniform draws, projections onto ball and box [0, 1], steepest steps."""

import math

import torch

NORMS = ("linf", "l2", "l1")
SPARSE = 0.01  # share of pixels that a step in L1 moves; Tramer and Boneh, NeurIPS 2019, arXiv:1904.13000


def _length(delta):
    """L2 norm of each example, shaped to broadcast: (N, *) -> (N, 1, ..., 1)."""
    return delta.flatten(1).norm(dim=1).view(-1, *[1] * (delta.ndim - 1))


def size(delta, norm="linf"):
    """The norm of each example, (N, *) -> (N,)."""
    return torch.linalg.vector_norm(delta.flatten(1), {"linf": float("inf"), "l2": 2, "l1": 1}[norm], dim=1)


def random_delta(x, eps, norm="linf"):
    """A uniform draw from the eps ball, one an example."""
    if norm == "linf":
        return torch.empty_like(x).uniform_(-eps, eps)
    if norm == "l1":  # d of d + 1 exponentials over their sum are uniform in the simplex (Barthe et al., 2005)
        parts = torch.empty_like(x).exponential_()
        rest = torch.empty_like(x.flatten(1)[:, :1]).exponential_()
        total = parts.flatten(1).sum(1, keepdim=True) + rest
        signs = torch.empty_like(x).bernoulli_().mul_(2).sub_(1)
        return eps * signs * parts / total.view(-1, *[1] * (x.ndim - 1))
    direction, dims = torch.randn_like(x), x[0].numel()
    radius = torch.rand(len(x), *[1] * (x.ndim - 1), device=x.device, dtype=x.dtype) ** (1 / dims)
    return eps * radius * direction / _length(direction).clamp_min(1e-12)


def project(x, delta, eps, norm="linf"):
    """x + delta brought back into ball and box [0, 1].

    The nearest such point for L-inf and L1; for L2 first scaled into the ball, then clipped to the box.
    """
    if norm == "linf":
        delta = delta.clamp(-eps, eps)
    elif norm == "l2":
        delta = delta * (eps / _length(delta).clamp_min(1e-12)).clamp_max(1)
    else:
        delta = _project_l1(x, delta, eps)
    return (x + delta).clamp(0, 1)


def _project_l1(x, delta, eps):
    """The nearest point of {|d|_1 <= eps, 0 <= x + d <= 1}.

    It is d_i = sign(delta_i) min(max(|delta_i| - lam, 0), room_i), where lam >= 0 makes the sum of |d_i| equal eps.
    That sum is piecewise linear in lam, with corners where a pixel leaves its bound or reaches zero.
    Source: Croce and Hein, ICML 2021, arXiv:2103.01208, proposition 2.1.
    """
    a = delta.flatten(1).abs().double()
    room = torch.where(delta > 0, 1 - x, x).flatten(1).double()
    # below the first a pixel stands at its bound, above the second at 0
    corners = torch.cat([a - room, a], 1).clamp_min(0)
    order = corners.argsort(1)
    corners = corners.gather(1, order)
    start = torch.minimum(a, room).sum(1, keepdim=True)  # the sum at lam = 0
    # the slope changes by -1 where a pixel leaves its bound, by +1 where it reaches zero
    change = torch.cat([-torch.ones_like(a), torch.ones_like(a)], 1).gather(1, order)
    slope = change.cumsum(1)  # right of each corner
    width = torch.diff(corners, dim=1)
    below = start + torch.cat([torch.zeros_like(start), (slope[:, :-1] * width).cumsum(1)], 1)  # the sum at each corner
    index = (below > eps).sum(1, keepdim=True).sub(1).clamp_min(0)  # the last corner where it is too large
    down = -slope.gather(1, index)
    lam = corners.gather(1, index) + (below.gather(1, index) - eps) / down.clamp_min(1)
    lam = torch.where(start > eps, lam, 0)
    size = torch.minimum((a - lam).clamp_min(0), room)
    return (size.view_as(delta) * delta.sign()).to(delta.dtype)


def steepest(gradient, norm="linf", size=1.0):
    """The unit step that increases the linearised loss most: sign for L-inf, the direction itself for L2.

    For L1 that would be one pixel; the step is shared equally by the ``SPARSE`` largest, or so many that none needs to
    change by more than 1 in a step of ``size``.
    """
    if norm == "linf":
        return gradient.sign()
    if norm == "l2":
        gradient = gradient.nan_to_num(0.0)  # as the sign of NaN is 0
        largest = gradient.flatten(1).abs().amax(1).clamp_min(torch.finfo(gradient.dtype).tiny)
        gradient = gradient / largest.view(-1, *[1] * (gradient.ndim - 1))  # or the squares of a small one would vanish
        return gradient / _length(gradient).clamp_min(1e-12)
    flat = gradient.flatten(1)
    k = min(flat.shape[1], max(1, round(SPARSE * flat.shape[1]), math.ceil(size)))
    top = flat.abs().topk(k, dim=1).indices
    return torch.zeros_like(flat).scatter(1, top, flat.gather(1, top).sign() / k).view_as(gradient)
