"""Trainable activation functions before and beside KAFs. All keep the shape (N, C, *); parameters are per channel."""

import torch
from torch import nn

from .checks import count, number


def _shaped(p, x):
    """(C,) -> (C, 1, ...), to broadcast along dimension 1 of x."""
    return p.reshape(-1, *[1] * (x.ndim - 2))


class SReLU(nn.Module):
    """S-shaped ReLU: identity between two learned thresholds, learned slopes outside.

    Starts as a leaky ReLU of slope 0.2. Source: Jin et al., AAAI 2016, arXiv:1512.07030, eq. 1.
    """

    def __init__(self, channels):
        super().__init__()
        count(channels, "SReLU channels")
        self.left = nn.Parameter(torch.zeros(channels))
        self.left_slope = nn.Parameter(torch.full((channels,), 0.2))
        self.right = nn.Parameter(torch.ones(channels))
        self.right_slope = nn.Parameter(torch.ones(channels))

    def forward(self, x):
        left, right = _shaped(self.left, x), _shaped(self.right, x)
        over, under = torch.relu(x - right), torch.relu(left - x)
        return x.clamp(left, right) + _shaped(self.right_slope, x) * over - _shaped(self.left_slope, x) * under


class APL(nn.Module):
    r"""Adaptive piecewise linear unit, :math:`\max(0, x) + \sum_s a_s \max(0, b_s - x)`.

    Source: Agostinelli et al., ICLR 2015 workshop, arXiv:1412.6830, eq. 1.
    """

    def __init__(self, channels, pieces=2):
        super().__init__()
        count(channels, "APL channels")
        count(pieces, "APL pieces")
        self.slopes = nn.Parameter(torch.randn(pieces, channels) * 0.1)
        self.hinges = nn.Parameter(torch.randn(pieces, channels))

    def forward(self, x):
        out = torch.relu(x)
        for a, b in zip(self.slopes, self.hinges, strict=True):
            out = out + _shaped(a, x) * torch.relu(_shaped(b, x) - x)
        return out


class SAF(nn.Module):
    """Spline activation function: a cubic Catmull-Rom spline through learned values on an even grid.

    Starts on tanh; outside the grid it goes on linearly with the end's slope.
    Source: Scardapane, Scarpiniti, Comminiello, Uncini, WIRN 2016, arXiv:1605.05509.
    """

    def __init__(self, channels, points=20, boundary=3.0):
        super().__init__()
        count(channels, "SAF channels")
        count(points, "SAF points", low=4)
        number(boundary, "SAF boundary", above=0)
        self.boundary = boundary
        grid = torch.linspace(-boundary, boundary, points)
        self.values = nn.Parameter(torch.tanh(grid).repeat(channels, 1))

    def forward(self, x):
        channels, points = self.values.shape
        spacing = 2 * self.boundary / (points - 1)
        # one phantom value at each end, by linear extrapolation, so that every interval has four neighbours
        v = self.values
        v = torch.cat([2 * v[:, :1] - v[:, 1:2], v, 2 * v[:, -1:] - v[:, -2:-1]], dim=1)  # (C, points + 2)
        inside = x.clamp(-self.boundary, self.boundary)
        position = (inside + self.boundary) / spacing
        index = position.detach().nan_to_num().floor().clamp(0, points - 2)  # NaN stays in t
        t = position - index
        offset = _shaped(torch.arange(channels, device=x.device) * (points + 2), x)
        flat = (index.long() + offset).expand(x.shape)
        p0, p1, p2, p3 = (v.flatten()[flat + j] for j in range(4))
        cubic = p1 + 0.5 * t * (p2 - p0 + t * (2 * p0 - 5 * p1 + 4 * p2 - p3 + t * (3 * (p1 - p2) + p3 - p0)))
        low_slope = _shaped((v[:, 2] - v[:, 0]) / (2 * spacing), x)
        high_slope = _shaped((v[:, -1] - v[:, -3]) / (2 * spacing), x)
        beyond = x - inside
        return cubic + torch.where(x < 0, low_slope, high_slope) * beyond


class Maxout(nn.Module):
    r"""Largest of several learned lines of one input, :math:`\max_j (w_j x + b_j)`: any convex shape.

    Maxout over one input a unit, so that it can stand where an activation stands; Goodfellow et al. take
    the maximum over full linear layers. Starts as ReLU plus small noise. Source: ICML 2013, arXiv:1302.4389.
    """

    def __init__(self, channels, pieces=3):
        super().__init__()
        count(channels, "maxout channels")
        count(pieces, "maxout pieces")
        start = torch.linspace(0, 1, pieces)[:, None].repeat(1, channels)
        self.weight = nn.Parameter(start + torch.randn_like(start) * 0.01)
        self.bias = nn.Parameter(torch.zeros_like(start))

    def forward(self, x):
        lines = (_shaped(w, x) * x + _shaped(b, x) for w, b in zip(self.weight, self.bias, strict=True))
        out = next(lines)
        for line in lines:
            out = torch.maximum(out, line)
        return out


class PSSiLU(nn.Module):
    r"""Parametric shifted SiLU, :math:`x (\sigma(a x) - b) / (1 - b)`, b kept in [0, 0.99].

    Starts as SiLU, with b = 0, where the gradient in b is that without the bound: it could not leave it otherwise.
    Source: Dai, Mahloujifar, Mittal, IEEE S&P workshops 2022, arXiv:2110.05626.
    """

    def __init__(self, channels):
        super().__init__()
        count(channels, "PSSiLU channels")
        self.a = nn.Parameter(torch.ones(channels))
        self.b = nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        b = _shaped(self.b + (self.b.clamp(0, 0.99) - self.b).detach(), x)
        return x * (torch.sigmoid(_shaped(self.a, x) * x) - b) / (1 - b)
