"""Kernels k(x, d) of a KAF, as functions of t = x - d and the bandwidth gamma > 0.

gamma has the meaning that it has for the Gaussian, 1 / length^2 up to a factor: the length scale of each kernel is the
Gaussian's of that gamma.
"""

import math
import typing

import torch
from torch.nn import functional as F


class Kernel(typing.NamedTuple):
    """``value``: (t, gamma) -> k, element-wise, differentiable. Ridge initialisation needs a positive definite one."""

    value: typing.Callable
    positive_definite: bool = True


def _length(t, gamma):
    """Distance in units of the length 1 / sqrt(2 gamma), the Gaussian's standard deviation."""
    return t.abs() * (2 * gamma).sqrt()


def _smooth_length(t, gamma):
    """The same; its derivative at 0 is 1 and not abs', which is 0 and would lose the second derivative of a Matérn."""
    return torch.where(t < 0, -t, t) * (2 * gamma).sqrt()


def _matern32(t, gamma):
    s = math.sqrt(3) * _smooth_length(t, gamma).clamp_max(800)  # beyond, the exponential is 0 in any type
    return (1 + s) * torch.exp(-s)


def _matern52(t, gamma):
    s = math.sqrt(5) * _smooth_length(t, gamma).clamp_max(800)
    return (1 + s + s * s / 3) * torch.exp(-s)


PERIOD = 8.0  # of the periodic kernel, in units of x: wider than the default dictionary, so its ends differ

# all but two: Rasmussen and Williams, Gaussian Processes for Machine Learning, 2006, section 4.2
KERNELS = {
    "gaussian": Kernel(lambda t, gamma: torch.exp(-gamma * t * t)),
    "laplacian": Kernel(lambda t, gamma: torch.exp(-_length(t, gamma))),
    "matern32": Kernel(_matern32),
    "matern52": Kernel(_matern52),
    "rational_quadratic": Kernel(lambda t, gamma: 1 / (1 + gamma * t * t)),  # alpha = 1
    "periodic": Kernel(lambda t, gamma: torch.exp(-gamma * (PERIOD / math.pi * torch.sin(math.pi * t / PERIOD)) ** 2)),
    # Marra, Zanca, Betti, Gori, 2018, arXiv:1807.06302
    "relu": Kernel(lambda t, gamma: torch.relu(t) * gamma.sqrt(), False),
    "softplus": Kernel(lambda t, gamma: F.softplus(4 * t * gamma.sqrt()) / 4, False),
}


def default_bandwidth(dictionary_size, boundary):
    r"""Rule of thumb of the Kafnets paper (sec. 3.2), :math:`\gamma = 1 / (6 \Delta^2)`, Delta the grid's spacing."""
    spacing = 2 * boundary / (dictionary_size - 1)
    return 1 / (6 * spacing**2)


def _mean(kernel, t, bandwidth):
    """Value of a kernel by name, or the mean of several."""
    names = (kernel,) if isinstance(kernel, str) else kernel
    gamma = torch.as_tensor(bandwidth, dtype=t.dtype, device=t.device)
    return sum(KERNELS[n].value(t, gamma) for n in names) / len(names)


def gram(dictionary, bandwidth, kernel="gaussian"):
    """Kernel matrix of the dictionary with itself, (D,) -> (D, D)."""
    return _mean(kernel, dictionary[:, None] - dictionary[None, :], bandwidth)


def ridge_coefficients(target, dictionary, bandwidth, eps=1e-6, kernel="gaussian"):
    r"""Coefficients that make a KAF follow ``target`` at its dictionary points.

    .. math:: \alpha = (K + \varepsilon I)^{-1} t, \qquad t_i = \mathrm{target}(d_i)

    Parameters
    ----------
    target : callable
        Element-wise function on tensors.
    dictionary : Tensor, shape (D,)
    bandwidth : float
    eps : float
        Ridge term. 1e-6 (the thesis) fits the points nearly exactly, with coefficients near 70 for ReLU at D = 20; 1e-3
        keeps them under 10, which float16 needs. ``condition`` tells what the solution amplifies.
    kernel : str or tuple of str
        Several are averaged.

    Returns
    -------
    Tensor, shape (D,), float64

    Raises
    ------
    ValueError
        For a kernel whose matrix is not positive definite ("relu", "softplus"); for a target that does not return a
        value a point.
    """
    for name in (kernel,) if isinstance(kernel, str) else kernel:
        if not KERNELS[name].positive_definite:
            raise ValueError(f"no ridge initialisation for kernel {name!r}, not positive definite: use init=None")
    dictionary = dictionary.detach().double()
    identity = torch.eye(len(dictionary), dtype=torch.float64, device=dictionary.device)
    try:
        wanted = torch.as_tensor(target(dictionary)).detach().double()
    except RuntimeError as error:
        raise ValueError(f"KAF init must be a function of float64 tensors, element by element: {error}") from None
    if wanted.shape != dictionary.shape:
        raise ValueError(f"KAF init must return a value a point, {tuple(dictionary.shape)}, got {tuple(wanted.shape)}")
    return torch.linalg.solve(gram(dictionary, bandwidth, kernel) + eps * identity, wanted)


def condition(dictionary, bandwidth, eps=1e-6, kernel="gaussian"):
    """Condition number of K + eps I: how much the ridge initialisation amplifies rounding."""
    dictionary = dictionary.detach().double()
    identity = torch.eye(len(dictionary), dtype=torch.float64, device=dictionary.device)
    return torch.linalg.cond(gram(dictionary, bandwidth, kernel) + eps * identity).item()


def second_moment(dictionary, bandwidth, kernel="gaussian"):
    """sum_i E[k(x, d_i)^2] under x ~ N(0, 1): E[f^2] of a KAF with independent coefficients of variance 1."""
    x = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    density = torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    k = _mean(kernel, x[:, None] - dictionary.detach().double().cpu(), bandwidth)
    return float((density[:, None] * k * k).sum() * (x[1] - x[0]))
