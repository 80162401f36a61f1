r"""Gaussian mixtures :math:`f(x) = \sum_i \alpha_i k(x, d_i)`, :math:`k = \exp(-\gamma (x - d_i)^2)`, per channel.

Two evaluations, neither of which builds the (x, D) tensor:

* ``mixture``: any dictionary, any bandwidth, one point at a time: D exponentials an element.
* ``grid_mixture``: points an even ``spacing`` apart. With u = x - c, c the grid's middle, and m = (d - c) / spacing,

  .. math:: k(x, d) = e^{-\gamma u^2} r^m w_m, \qquad r = e^{2 \gamma \Delta u}, \quad w_m = e^{-\gamma m^2 \Delta^2},

  so all D kernels are powers of one number: two exponentials an element. Powers up to D - 1 would overflow float32
  away from the middle; they are products r^(4q) r^s instead, each carrying half of exp(-gamma u^2), which keeps
  every factor in range, and the sums over s become small matrix products. Where the far half underflows, some 20
  spacings beyond the grid, f is exactly zero.
"""

import functools
import itertools
import math
import threading
import typing

import torch
from torch.nn import functional as F

STRIDE = 4  # powers r^0 .. r^3 are stored, r^(4q) link the groups
BLOCK = 65_536  # elements worked on at a time, so that the temporaries stay in the cache
KEEP = 2**24  # largest workspace, in elements, that a thread keeps


def _column(p, i, x):
    """Column i of a (1 or C, D) parameter, shaped to broadcast along x's channels."""
    return p[:, i].reshape(-1, *[1] * (x.ndim - 2))


def _per_channel(v, like):
    """Sum a (N, C, *) tensor to ``like``'s leading size: C, or 1 when all channels share the parameter."""
    v = v.sum(dim=[d for d in range(v.ndim) if d != 1])
    return v if like.shape[0] > 1 else v.sum(0, keepdim=True)


# --- any dictionary --------------------------------------------------------------------------------------------


class _Mixture(torch.autograd.Function):
    """f(x), one dictionary point at a time."""

    @staticmethod
    def forward(x, alpha, dictionary, gamma):
        scale = -gamma.reshape(-1, *[1] * (x.ndim - 2))
        out = torch.zeros_like(x)
        for i in range(alpha.shape[1]):
            k = (x - _column(dictionary, i, x)).square_().mul_(scale).exp_()
            out.addcmul_(_column(alpha, i, x), k)
        return out

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        return _vjp(grad, *ctx.saved_tensors, ctx.needs_input_grad)


class _Correlation(torch.autograd.Function):
    """h_ci = sum over n, * of g * k(x, d_i): the gradient of a mixture in its coefficients, shape (C, D).

    Since <v, h> = sum g * f(x; alpha = v), its own derivatives are a mixture's: the two functions close
    under differentiation, so derivatives of any order need no more memory than the first.
    """

    @staticmethod
    def forward(x, g, dictionary, gamma):
        scale = -gamma.reshape(-1, *[1] * (x.ndim - 2))
        dims = [d for d in range(x.ndim) if d != 1]
        columns = [
            (x - _column(dictionary, i, x)).square_().mul_(scale).exp_().mul_(g).sum(dims)
            for i in range(dictionary.shape[1])
        ]
        return torch.stack(columns, dim=1)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, v):
        x, g, dictionary, gamma = ctx.saved_tensors
        need_x, need_g, need_d, need_gamma = ctx.needs_input_grad
        dx, _, dd, dgamma = _vjp(g, x, v, dictionary, gamma, (need_x, False, need_d, need_gamma))
        return dx, _Mixture.apply(x, v, dictionary, gamma) if need_g else None, dd, dgamma


def _vjp(grad, x, alpha, dictionary, gamma, needs):
    """Gradients of sum(grad * f) in x, alpha, dictionary and gamma; None where not needed."""
    if torch.is_grad_enabled():
        return _differentiable_vjp(grad, x, alpha, dictionary, gamma, needs)
    need_x, need_alpha, need_d, need_gamma = needs
    scale = -gamma.reshape(-1, *[1] * (x.ndim - 2))
    dx = torch.zeros_like(x) if need_x else None
    columns = {"alpha": [], "dictionary": [], "gamma": []}
    for i in range(dictionary.shape[1]):
        t = x - _column(dictionary, i, x)
        gk = t.square().mul_(scale).exp_().mul_(grad)
        if need_alpha:
            columns["alpha"].append(_per_channel(gk, alpha))
        gkt = gk.mul_(t)
        if need_x:
            dx.addcmul_(_column(alpha, i, x), gkt)
        if need_d:
            columns["dictionary"].append(_per_channel(gkt * _column(alpha, i, x), dictionary))
        if need_gamma:
            columns["gamma"].append(_per_channel(gkt.mul_(t) * _column(alpha, i, x), gamma))
    if need_x:
        dx.mul_(2 * scale)
    dalpha = torch.stack(columns["alpha"], 1) if need_alpha else None
    dd = 2 * gamma[:, None] * torch.stack(columns["dictionary"], 1) if need_d else None
    dgamma = -torch.stack(columns["gamma"], 1).sum(1) if need_gamma else None
    return dx, dalpha, dd, dgamma


def _differentiable_vjp(grad, x, alpha, dictionary, gamma, needs):
    """The same in terms of the two functions themselves, for derivatives of higher order.

    df/dx = -2 gamma sum_i alpha_i (x - d_i) k_i = -2 gamma (x f(x; alpha) - f(x; alpha d)).
    """
    need_x, need_alpha, need_d, need_gamma = needs
    dx = dalpha = dd = dgamma = None
    if need_x:
        scale = gamma.reshape(-1, *[1] * (x.ndim - 2))
        f = _Mixture.apply(x, alpha, dictionary, gamma)
        dx = -2 * scale * grad * (x * f - _Mixture.apply(x, alpha * dictionary, dictionary, gamma))
    if need_alpha or need_d or need_gamma:
        h0 = _Correlation.apply(x, grad, dictionary, gamma)
        dalpha = h0 if need_alpha else None
    if need_d or need_gamma:
        h1 = _Correlation.apply(x, grad * x, dictionary, gamma)
    if need_d:
        dd = (2 * gamma[:, None] * alpha * (h1 - dictionary * h0)).sum_to_size(dictionary.shape)
    if need_gamma:
        h2 = _Correlation.apply(x, grad * x * x, dictionary, gamma)
        moments = h2 - 2 * dictionary * h1 + dictionary**2 * h0
        dgamma = -(alpha * moments).sum(1).sum_to_size(gamma.shape)
    return dx, dalpha, dd, dgamma


def mixture(x, alpha, dictionary, gamma):
    """f(x) for x (N, C, *), alpha (C, D), dictionary (1 or C, D), gamma (1 or C,); differentiable in all four."""
    return _Mixture.apply(x, alpha, dictionary, gamma)


# --- an even grid ----------------------------------------------------------------------------------------------


class Grid(typing.NamedTuple):
    """``size`` points from ``first`` on, ``spacing`` apart, with bandwidth ``gamma``."""

    size: int
    first: float
    spacing: float
    gamma: float


class _Chunk(typing.NamedTuple):
    """Dictionary points start..stop-1, few enough for one centre; m counts spacings from the centre."""

    start: int
    stop: int
    groups: int
    middle: int  # the group whose first point is the centre
    centre: float
    weights: tuple  # w_m, zero for the padding behind the last point
    offsets: tuple  # m


@functools.lru_cache(maxsize=64)
def _chunks(grid):
    # Limits on m with log(max float32) = 88: r^(2m) e^(-gamma u^2 / 2) must not overflow at its peak, and
    # e^(-gamma u^2 / 2) must not underflow while the last point's kernel is above e^-60.
    most = max(1, int(10.8 / math.sqrt(grid.gamma * grid.spacing**2)))
    count = math.ceil(grid.size / most)
    edges = [round(i * grid.size / count) for i in range(count + 1)]
    chunks = []
    for a, b in itertools.pairwise(edges):
        groups = math.ceil((b - a) / STRIDE)
        middle = (groups - 1) // 2
        offsets = [j - STRIDE * middle for j in range(groups * STRIDE)]
        weights = [math.exp(-grid.gamma * (m * grid.spacing) ** 2) for m in offsets[: b - a]]
        weights += [0.0] * (len(offsets) - len(weights))
        centre = grid.first + (a + STRIDE * middle) * grid.spacing
        chunks.append(_Chunk(a, b, groups, middle, centre, tuple(weights), tuple(offsets)))
    return chunks


_arenas = threading.local()


class _Workspace:
    """Temporaries of one block, channels first: (C, elements), cut from memory that the thread keeps for the next call.

    (Asking the allocator for fresh pages at every call costs more than the arithmetic on small layers.)
    """

    def __init__(self, channels, elements, grid, x, dtype, inner=0):
        self.groups = max(c.groups for c in _chunks(grid))
        rows = (1, 1, 1, 1, 1, STRIDE, self.groups, inner * self.groups)
        size = channels * elements * sum(rows)
        key = f"{x.device}-{dtype}"
        arena = getattr(_arenas, key, None)
        if arena is None or len(arena) < size:
            arena = torch.empty(size, dtype=dtype, device=x.device)
            if size <= KEEP:
                setattr(_arenas, key, arena)
        parts = arena[:size].split([channels * elements * r for r in rows])
        self.u, self.t, self.r, self.f, self.d = (p.view(channels, elements) for p in parts[:5])
        self.low, self.high, self.inner = (p.view(channels, -1, elements) for p in parts[5:])

    def factors(self, x, chunk, grid, g=None):
        """u, and the two factors of the kernels: low e r^s (times g), high e r^(4q), with e = exp(-gamma u^2 / 2)."""
        n, c, hw = x.shape
        u, t, r = (v[:, : n * hw] for v in (self.u, self.t, self.r))
        low, high = self.low[..., : n * hw], self.high[:, : chunk.groups, : n * hw]
        u.view(c, n, hw).copy_(x.transpose(0, 1))
        u.sub_(chunk.centre)
        smallest = math.log(torch.finfo(u.dtype).tiny)
        torch.mul(u, u, out=t).mul_(-grid.gamma / 2)
        F.threshold_(t, smallest, -math.inf)  # e is normal or zero, never a (slow) denormal
        e = torch.exp(t, out=high[:, chunk.middle])
        if g is None:
            low[:, 0].copy_(e)
        else:
            low[:, 0].view(c, n, hw).copy_(g.transpose(0, 1))
            low[:, 0].mul_(e)
        reach = math.sqrt(-2 * smallest / grid.gamma)  # where e becomes zero; r stays finite from there on
        u.clamp_(-reach, reach)
        torch.mul(u, 2 * grid.gamma * grid.spacing, out=r).exp_()
        for s in range(1, STRIDE):
            torch.mul(low[:, s - 1], r, out=low[:, s])
        link = torch.mul(r, r, out=t).square_()  # r^4
        for q in range(chunk.middle + 1, chunk.groups):
            torch.mul(high[:, q - 1], link, out=high[:, q])
        if chunk.middle:
            link.reciprocal_()
        for q in range(chunk.middle - 1, -1, -1):
            torch.mul(high[:, q + 1], link, out=high[:, q])
        return u, t, low, high


def _coefficients(alpha, chunk, grid, want_slope):
    """alpha w, and m alpha w for the slope, as the matrices (C, groups or 2 groups, 4) that meet the powers r^s."""
    a = F.pad(alpha[:, chunk.start : chunk.stop], (0, len(chunk.weights) - (chunk.stop - chunk.start)))
    a = a * alpha.new_tensor(chunk.weights)
    if want_slope:
        a = torch.cat([a, a * alpha.new_tensor(chunk.offsets) * (2 * grid.gamma * grid.spacing)], 1)
    return a.view(len(a), -1, STRIDE)


def _blocks(x):
    """The whole (N, C, *) tensor as (N, C, L), and how many examples make a block."""
    n, c = x.shape[:2]
    length = x[0, 0].numel() if n else 1
    return x.reshape(n, c, -1) if n else x.new_empty(0, c, 1), max(1, min(n, BLOCK // (c * length)))


def _grid_forward(x, alpha, grid, want_slope):
    """f and df/dx (None unless wanted), the latter in alpha's type."""
    flat, per = _blocks(x)
    n, c, length = flat.shape
    out, slope = flat.new_empty(flat.shape), flat.new_empty(flat.shape, dtype=alpha.dtype) if want_slope else None
    work = _Workspace(c, per * length, grid, x, alpha.dtype, inner=1 + want_slope)
    plan = [(chunk, _coefficients(alpha, chunk, grid, want_slope)) for chunk in _chunks(grid)]
    for i in range(0, n, per):
        xb = flat[i : i + per]
        size = len(xb) * length
        f, d = work.f[:, :size].zero_(), work.d[:, :size].zero_()
        for chunk, a in plan:
            u, t, low, high = work.factors(xb, chunk, grid)
            inner = torch.bmm(a, low, out=work.inner[:, : a.shape[1], :size])  # (C, groups, 4) x (C, 4, size)
            part = torch.mul(high[:, 0], inner[:, 0], out=t)
            for q in range(1, chunk.groups):
                part.addcmul_(high[:, q], inner[:, q])
            f.add_(part)
            if want_slope:  # f' = 2 gamma (spacing sum m alpha k - u f)
                d.addcmul_(u, part, value=-2 * grid.gamma)
                for q in range(chunk.groups):
                    d.addcmul_(high[:, q], inner[:, chunk.groups + q])
        out[i : i + per].copy_(f.view(c, -1, length).transpose(0, 1))
        if want_slope:
            slope[i : i + per].copy_(d.view(c, -1, length).transpose(0, 1))
    return out.view(x.shape), slope.view(x.shape) if want_slope else None


def _grid_correlation(x, g, grid, dtype):
    """h_ci = sum g k(x, d_i), (C, D), in ``dtype``."""
    flat, per = _blocks(x)
    n, c, length = flat.shape
    g = g.reshape(flat.shape)
    work = _Workspace(c, per * length, grid, x, dtype)
    sums = [torch.zeros(c, chunk.groups, STRIDE, dtype=dtype, device=x.device) for chunk in _chunks(grid)]
    for i in range(0, n, per):
        for chunk, h in zip(_chunks(grid), sums, strict=True):
            _, _, low, high = work.factors(flat[i : i + per], chunk, grid, g[i : i + per])
            h.baddbmm_(high, low.transpose(1, 2))
    parts = [
        (h.view(c, -1) * h.new_tensor(chunk.weights))[:, : chunk.stop - chunk.start]
        for chunk, h in zip(_chunks(grid), sums, strict=True)
    ]
    return torch.cat(parts, 1)


class _GridMixture(torch.autograd.Function):
    """f(x) on an even grid; the slope is computed with it, so that the gradient in x is one product."""

    @staticmethod
    def forward(x, alpha, grid, want_slope):
        return _grid_forward(x, alpha, grid, want_slope)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, alpha, ctx.grid, _ = inputs
        slope = output[1]
        if slope is not None:
            ctx.mark_non_differentiable(slope)
        ctx.save_for_backward(x, alpha, slope)

    @staticmethod
    def backward(ctx, grad, _):
        x, alpha, slope = ctx.saved_tensors
        grid, (need_x, need_alpha) = ctx.grid, ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():  # a derivative of the derivative is wanted
            steps = torch.arange(grid.size, dtype=torch.float64, device=x.device)
            dictionary = (grid.first + grid.spacing * steps).to(alpha.dtype)[None]
            gamma = alpha.new_tensor([grid.gamma])
            args = grad.to(alpha.dtype), x.to(alpha.dtype), alpha, dictionary, gamma
            dx, dalpha, _, _ = _differentiable_vjp(*args, (need_x, need_alpha, False, False))
            return dx.to(x.dtype) if need_x else None, dalpha, None, None
        dx = (grad * slope).to(x.dtype) if need_x else None
        return dx, _grid_correlation(x, grad, grid, alpha.dtype) if need_alpha else None, None, None


def grid_mixture(x, alpha, grid):
    """f(x) for x (N, C, *) of any floating type, alpha (C, D) float32 or float64, in which it is computed."""
    want_slope = x.requires_grad and torch.is_grad_enabled()
    return _GridMixture.apply(x, alpha, grid, want_slope)[0]
