r"""How steep a KAF can be: bounds on :math:`\sup_x |f'(x)|`, and ranges of f and f' over intervals, all in float64.

The derivatives of one Gaussian kernel are largest at known places, so those of a KAF are bounded by the sum of
|alpha_i|. Where coefficients of both signs cancel, as after ridge initialisation, that sum is hundreds of times too
large, but it is good enough for the *remainder* of a Taylor expansion on a small interval:

.. math:: |f'(x)| \le |f'(m)| + |f''(m)| h + M_3 h^2 / 2, \qquad |x - m| \le h, \quad M_3 \ge \sup |f'''| .
"""

import math

import torch

from ..checks import shown

_S3 = math.sqrt((3 - math.sqrt(6)) / 2)  # where |d^3/ds^3 exp(-s^2)| is largest
# sup of exp(-s^2) and of its first four derivatives
SUPREMA = (1.0, math.sqrt(2 / math.e), 2.0, (12 * _S3 - 8 * _S3**3) * math.exp(-(_S3**2)), 12.0)
REACH = 6.0  # in units of 1 / sqrt(gamma): beyond, a kernel and its slope are below 3e-15 of their scale
MOST = 2**20  # intervals at a time: more are left where rounding, and not their width, keeps them open
ROUNDING = 1e-14  # of a sum of kernels, as a share of sum |alpha_i| times the derivative's scale


def _gaussian(kaf):
    if kaf.kernels != ("gaussian",):
        raise ValueError(f"Lipschitz constants are for KAFs with one Gaussian kernel, got {kaf.kernels}")


def _float64(kaf):
    """alpha (C, D), points (C, D), gamma (C,) in float64, detached."""
    if not (hasattr(kaf, "alpha") and hasattr(kaf, "kernels")):
        raise TypeError(f"a KAF is needed, got {shown(kaf)}")
    _gaussian(kaf)
    alpha = kaf.alpha.detach().double()
    if not torch.isfinite(alpha).all():
        raise ValueError("Lipschitz constant of a KAF with coefficients that are not finite: train it again")
    if kaf.grid is None:
        return alpha, kaf.points.detach().double(), kaf.log_bandwidth.detach().double().exp()
    steps = torch.arange(kaf.grid.size, dtype=torch.float64, device=alpha.device)
    points = (kaf.grid.first + kaf.grid.spacing * steps).expand_as(alpha)
    return alpha, points, alpha.new_full((len(alpha),), kaf.grid.gamma)


def derivatives(x, alpha, points, gamma):
    """f, f', f'', f''' at x: tensors of any one shape; alpha, points (D, ...) and gamma broadcast to it."""
    out = [torch.zeros_like(x) for _ in range(4)]
    for a, d in zip(alpha, points, strict=True):
        t = x - d
        k, u = a * torch.exp(-gamma * t * t), 2 * gamma * t
        for total, factor in zip(out, (1, -u, u * u - 2 * gamma, u * (6 * gamma - u * u)), strict=True):
            total += factor * k
    return out


def _suprema(alpha, gamma):
    """Bounds on |f| and its first four derivatives over all x, (5, C)."""
    return alpha.abs().sum(1) * torch.stack([c * gamma ** (n / 2) for n, c in enumerate(SUPREMA)])


def kaf_bound(kaf, kind="sum"):
    r"""Closed-form bound on the slope, one a channel.

    Every kernel's slope is at most :math:`\sqrt{2\gamma/e}`, so

    .. math:: |f'(x)| \le \sqrt{2\gamma/e} \sum_i |\alpha_i| \le \sqrt{2\gamma/e}\; D \max_i |\alpha_i| .

    Parameters
    ----------
    kaf : KAF
    kind : {"sum", "max"}
        The first, or the second, the form that arguments from a bound on the coefficients use (stability of
        training: Cirillo et al., 2019, arXiv:1903.11990).

    Returns
    -------
    Tensor, shape (C,), float64
    """
    if kind not in ("sum", "max"):
        raise ValueError(f"kaf_bound kind must be 'sum' or 'max', got {kind!r}")
    alpha, _, gamma = _float64(kaf)
    size = alpha.abs().sum(1) if kind == "sum" else alpha.shape[1] * alpha.abs().amax(1)
    return size * SUPREMA[1] * gamma.sqrt()


def kaf_constant(kaf):
    """Lipschitz constant of each channel of a KAF: never below the supremum of |f'|, and at most 0.1 % above.

    Branch and bound: the real line, but for tails on which all kernels are below 3e-15, is cut into 64 intervals;
    those on which the Taylor bound above exceeds 1.001 times the steepest slope found are halved. Rounding errors are
    part of the bound; it is for the coefficients as they are stored, in exact arithmetic.

    Returns
    -------
    Tensor, shape (C,), float64
        If rounding keeps a bound from closing (a KAF whose kernels cancel to 1e-10), it is larger, and still valid.

    Raises
    ------
    ValueError
        For kernels other than one Gaussian, or coefficients that are not finite.
    """
    cells, tolerance = 64, 1e-3
    alpha, points, gamma = _float64(kaf)
    suprema = _suprema(alpha, gamma)
    slack = ROUNDING * (suprema[1] + suprema[2] * gamma.rsqrt())
    left, right = points.amin(1) - REACH * gamma.rsqrt(), points.amax(1) + REACH * gamma.rsqrt()
    half = (right - left) / (2 * cells)
    steps = 2 * torch.arange(cells, dtype=torch.float64, device=alpha.device) + 1
    channel = torch.arange(len(alpha), device=alpha.device).repeat_interleave(cells)
    middle = (left[:, None] + half[:, None] * steps).flatten()
    steepest = torch.zeros_like(gamma)
    for _ in range(24):  # the intervals left are (channel, middle, half[channel])
        _, slope, curve, _ = derivatives(middle, alpha.T[:, channel], points.T[:, channel], gamma[channel])
        h = half[channel]
        steepest = steepest.scatter_reduce(0, channel, slope.abs(), "amax")
        upper = slope.abs() + curve.abs() * h + suprema[3][channel] * h * h / 2 + slack[channel]
        left_over = upper > (1 + tolerance) * steepest[channel]
        channel, middle, h = channel[left_over], middle[left_over], h[left_over]
        unsettled = torch.zeros_like(gamma).scatter_reduce(0, channel, upper[left_over], "amax")
        if len(channel) == 0 or len(channel) > MOST:
            break
        half = half / 2
        channel, middle = channel.repeat(2), torch.cat([middle - h / 2, middle + h / 2])
    return torch.maximum((1 + tolerance) * steepest, unsettled)  # the tails are below the slack


def kaf_steepest(kaf, cells=200):
    """Steepest slope of each channel on a grid, (C,): not certified, but differentiable, for training."""
    _gaussian(kaf)
    gamma = kaf.bandwidth[:, None, None]
    reach = 2.5 * gamma.detach().amin().rsqrt().item()
    low, high = kaf.dictionary.detach().min().item() - reach, kaf.dictionary.detach().max().item() + reach
    t = torch.linspace(low, high, cells, device=kaf.alpha.device)[:, None] - kaf.dictionary[:, None]  # (C, cells, D)
    slopes = 2 * gamma * t * torch.exp(-gamma * t * t)
    total = slopes[0] @ kaf.alpha.T if len(slopes) == 1 else torch.einsum("cxd,cd->xc", slopes, kaf.alpha)
    return total.abs().amax(0)


class KafRanges:
    """Ranges of f and f' of a KAF over any intervals: certified, and at the price of a few look-ups each.

    Each channel's line is cut into ``cells``; on a cell f and f' are bounded by Taylor expansion about its middle.
    A sparse table keeps the largest bound of every run of 2^j cells, so that any interval is covered by two runs.
    On intervals narrower than a cell the expansion about their own middle is better; both hold, so the smaller counts.
    """

    def __init__(self, kaf, cells=1024):
        self.alpha, self.points, self.gamma = _float64(kaf)
        reach = REACH * self.gamma.rsqrt()
        self.cells, self.left = cells, self.points.amin(1) - reach
        self.width = (self.points.amax(1) + reach - self.left) / cells
        steps = torch.arange(cells, dtype=torch.float64, device=reach.device) + 0.5
        middle = (self.left[:, None] + self.width[:, None] * steps)[None]  # (1, C, cells)
        level = self._taylor(middle, self.width[:, None] / 2)[:, 0]  # (4, C, cells)
        levels = [level]  # the outermost cells stand for the tails, too, which are below their slack
        while 2 ** len(levels) <= cells:
            run, last = 2 ** (len(levels) - 1), levels[-1]
            shifted = torch.cat([last[:, :, run:], last[:, :, -1:].expand(-1, -1, run)], 2)
            levels.append(torch.maximum(last, shifted))
        self.table = torch.stack(levels, 1).flatten(1)  # (4, levels * C * cells)

    def _taylor(self, middle, h):
        """Upper bounds of f, -f, f', -f' on middle - h .. middle + h, (4, N, C, *)."""
        shape = (-1, *[1] * (middle.ndim - 2))  # of what is one a channel
        alpha, points = (v.T.reshape(v.shape[1], *shape) for v in (self.alpha, self.points))
        f, slope, curve, third = derivatives(middle, alpha, points, self.gamma.view(shape))
        m = [v.view(shape) for v in _suprema(self.alpha, self.gamma)]
        slack = [ROUNDING * (m[n] + m[n + 1] * self.gamma.view(shape).rsqrt()) for n in (0, 1)]
        df = slope.abs() * h + curve.abs() * h**2 / 2 + m[3] * h**3 / 6 + slack[0]
        ds = curve.abs() * h + third.abs() * h**2 / 2 + m[4] * h**3 / 6 + slack[1]
        return torch.stack([f + df, df - f, slope + ds, ds - slope])

    def __call__(self, low, high):
        """low, high (N, C, *) float64 -> smallest and largest f, smallest and largest f', same shape each."""
        shape = (-1, *[1] * (low.ndim - 2))
        left, width = self.left.view(shape), self.width.view(shape)
        a, b = (((v - left) / width).floor().clamp(0, self.cells - 1).long() for v in (low, high))
        j = torch.log2((b - a + 1).double()).floor().long()  # exact: an integer below 2^52
        channels = torch.arange(len(self.left), device=low.device).view(shape)
        row = (j * len(self.left) + channels) * self.cells
        first, second = row + a, row + b - 2**j + 1
        top = torch.stack([torch.maximum(t[first], t[second]) for t in self.table])
        top = torch.minimum(top, self._taylor((low + high) / 2, (high - low) / 2 * (1 + 1e-12)))
        return -top[1], top[0], -top[3], top[2]
