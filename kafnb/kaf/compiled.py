"""The even-grid mixture as operations on whole tensors: what ``torch.compile`` makes one pass forward of, one backward.

Without the compiler they serve where no kernel is (``dispatch``), at the memory of a few dozen activations.
"""

import math

import torch

from .grid import STRIDE, chunks, parsed


def _powers(x, chunk, grid):
    """u, the factors high e r^(4q), and low e r^s, as element-wise operations.

    Written with powers of two: the compiler would put the results of ``exp`` into memory for each loop that reads them,
    those of ``exp2`` it computes again. That costs time, more with a larger D, and keeps the peak at four activations.
    """
    u = x - chunk.centre
    smallest, log2 = math.log2(torch.finfo(u.dtype).tiny), math.log(2)
    exponent = -grid.gamma / 2 / log2 * u * u
    e = torch.where(exponent > smallest, torch.exp2(exponent), 0.0)
    reach = math.sqrt(-2 * log2 * smallest / grid.gamma)
    u = u.clamp(-reach, reach)
    r = torch.exp2(2 * grid.gamma * grid.spacing / log2 * u)
    low = [e, e * r, e * r * r, e * r * r * r]  # STRIDE of them
    link, high = (r * r) * (r * r), {chunk.middle: e}
    for q in range(chunk.middle + 1, chunk.groups):
        high[q] = high[q - 1] * link
    back = 1 / link
    for q in range(chunk.middle - 1, -1, -1):
        high[q] = high[q + 1] * back
    return u, low, high


def forward(x, alpha, grid):
    """f and df/dx for x (N, C, *), both in alpha's type."""
    xs, f, slope = x.to(alpha.dtype), 0.0, 0.0
    # (D, C), by a matrix product: the compiler then reads a ready table, contiguous in the channels, whichever
    # memory format x has; in float64, which autocast leaves alone
    pieces = chunks(grid)
    weights = [w for chunk in pieces for w in chunk.weights[: chunk.stop - chunk.start]]
    table = (torch.diag(alpha.new_tensor(weights, dtype=torch.float64)) @ alpha.t().double()).to(alpha.dtype)
    for chunk in pieces:
        u, low, high = _powers(xs, chunk, grid)
        part = moment = 0.0
        for j in range(chunk.stop - chunk.start):
            row = table[chunk.start + j].view(-1, *[1] * (x.ndim - 2))
            term = row * low[j % STRIDE] * high[j // STRIDE]
            part, moment = part + term, moment + chunk.offsets[j] * term
        f = f + part
        slope = slope + 2 * grid.gamma * (grid.spacing * moment - u * part)
    return f, slope


def correlation(x, g, grid, dtype):
    """h_ci = sum over n, * of g k(x, d_i), (C, D), in ``dtype``."""
    x, g, columns = x.to(dtype), g.to(dtype), []
    for chunk in chunks(grid):
        _, low, high = _powers(x, chunk, grid)
        low = [g * v for v in low]
        for j in range(chunk.stop - chunk.start):
            terms = low[j % STRIDE] * high[j // STRIDE]
            columns.append(terms.sum([d for d in range(x.ndim) if d != 1]) * chunk.weights[j])
    return torch.stack(columns, 1)


class _Fused(torch.autograd.Function):
    """f for the compiler. The grid comes as text: numbers that differ between two layers would become symbols of the
    graph, text does not.
    """

    @staticmethod
    def forward(x, alpha, text):
        f, slope = forward(x, alpha, parsed(text))
        # a cast that does nothing would return f itself, and torch 2.11 then hands zeros to ``backward``
        return f if f.dtype == x.dtype else f.to(x.dtype), slope

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, alpha, ctx.text = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, alpha, output[1])

    @staticmethod
    def backward(ctx, g, _):
        x, alpha, slope = ctx.saved_tensors
        dx = (g * slope).to(x.dtype)
        if not ctx.needs_input_grad[1]:
            return dx, None, None
        # behind the barrier the D sums are one loop of their own; fused with what stands around them in a network
        # (batch normalisation's sums), the compiler makes D loops
        x, g = barrier(x.to(alpha.dtype), g.to(alpha.dtype))
        return dx, correlation(x, g, parsed(ctx.text), alpha.dtype), None


@torch.library.custom_op("kafnb::barrier", mutates_args=())
def barrier(x: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Copies that the compiler cannot see through."""
    return x.contiguous().clone(), g.contiguous().clone()


@barrier.register_fake
def _(x, g):
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(
        g, memory_format=torch.contiguous_format
    )


def fused(x, alpha, text):
    """f(x), written for ``torch.compile``; differentiable once. ``text`` is ``str(grid)``."""
    return _Fused.apply(x, alpha, text)[0]
