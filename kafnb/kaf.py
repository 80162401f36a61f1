r"""Kernel activation functions (KAF): each channel learns its own smooth non-linearity.

.. math:: \mathrm{KAF}(x) = \sum_{i=1}^{D} \alpha_i \exp\bigl(-\gamma (x - d_i)^2\bigr)

Source: Scardapane, Van Vaerenbergh, Totaro, Uncini, "Kafnets: kernel-based non-parametric activation
functions for neural networks", Neural Networks 110 (2019), https://doi.org/10.1016/j.neunet.2018.11.002
"""

import math

import torch
from torch import nn

from .mixture import Grid, grid_mixture, mixture

DEFAULT_INIT_STD = 0.05  # Keras' RandomNormal default, which the thesis used for alpha

RIDGE_TARGETS = {
    "relu": torch.relu,
    "elu": nn.functional.elu,
    "swish": nn.functional.silu,
    "tanh": torch.tanh,
}


def default_bandwidth(dictionary_size, boundary):
    r"""Rule of thumb of the Kafnets paper (sec. 3.2), :math:`\gamma = 1 / (6 \Delta^2)`, Delta the grid's spacing."""
    spacing = 2 * boundary / (dictionary_size - 1)
    return 1 / (6 * spacing**2)


def gram(dictionary, bandwidth):
    """Kernel matrix of the dictionary with itself, (D,) -> (D, D)."""
    return torch.exp(-bandwidth * (dictionary[:, None] - dictionary[None, :]) ** 2)


def ridge_coefficients(target, dictionary, bandwidth, eps=1e-6):
    r"""Coefficients that make a KAF follow ``target`` at its dictionary points.

    .. math:: \alpha = (K + \varepsilon I)^{-1} t, \qquad t_i = \mathrm{target}(d_i)

    Parameters
    ----------
    target : callable
        Element-wise function on tensors.
    dictionary : Tensor, shape (D,)
    bandwidth : float
    eps : float
        Ridge term. 1e-6 (the paper) gives an exact fit and coefficients near 70 for ReLU at D = 20;
        1e-3 keeps them under 10, which float16 needs.

    Returns
    -------
    Tensor, shape (D,), float64
    """
    dictionary = dictionary.detach().double()
    matrix = gram(dictionary, bandwidth) + eps * torch.eye(
        len(dictionary), dtype=torch.float64, device=dictionary.device
    )
    return torch.linalg.solve(matrix, target(dictionary))


class KAF(nn.Module):
    """Kernel activation function, one learned non-linearity a channel.

    Parameters
    ----------
    channels : int
        Size of dimension 1 of the input.
    dictionary_size : int
        D >= 2 points, evenly spaced over [-boundary, boundary].
    boundary : float
        Half width of the dictionary, > 0.
    kernel : str
        "gaussian".
    init : None, str or callable
        None draws alpha from normal(0, 0.05), as the thesis does. "relu", "elu", "swish", "tanh" or any
        element-wise function on tensors: alpha by ridge regression on it (``ridge_coefficients``).
    trainable_dictionary : bool
        Learn dictionary and bandwidth too, each per channel (the thesis' KAF_Free). The bandwidth is stored
        as its logarithm, so it stays positive.
    bandwidth : float, optional
        gamma > 0; default 1 / (6 spacing^2).
    ridge : float
        eps of the ridge initialisation.

    Shape
    -----
    (N, C, *) -> same. float16 and bfloat16 inputs are evaluated in float32 and returned in their own type.

    Raises
    ------
    ValueError
        For sizes out of range or unknown names; for an input whose dimension 1 is not ``channels``.
    """

    def __init__(
        self,
        channels,
        dictionary_size=20,
        boundary=3.0,
        kernel="gaussian",
        init=None,
        trainable_dictionary=False,
        *,
        bandwidth=None,
        ridge=1e-6,
    ):
        super().__init__()
        if channels < 1 or dictionary_size < 2:
            raise ValueError(f"KAF needs channels >= 1 and dictionary_size >= 2, got {channels} and {dictionary_size}")
        if not (boundary > 0 and math.isfinite(boundary)):
            raise ValueError(f"KAF needs a finite boundary > 0, got {boundary}")
        if kernel != "gaussian":
            raise ValueError(f"KAF kernel must be 'gaussian', got {kernel!r}")
        if bandwidth is None:
            bandwidth = default_bandwidth(dictionary_size, boundary)
        if not (bandwidth > 0 and math.isfinite(bandwidth)):
            raise ValueError(f"KAF needs a finite bandwidth > 0, got {bandwidth}")
        self.channels, self.boundary, self.kernel = channels, boundary, kernel
        # float64 first, so that the points, and what is fitted on them, are exact before they are rounded
        points = torch.linspace(-boundary, boundary, dictionary_size, dtype=torch.float64)
        self.alpha = nn.Parameter(self._initial_alpha(init, points, bandwidth, ridge))
        self.grid = Grid(dictionary_size, -boundary, 2 * boundary / (dictionary_size - 1), bandwidth)
        if trainable_dictionary:
            self.grid = None
            self.dictionary = nn.Parameter(points.to(self.alpha.dtype).repeat(channels, 1))
            self.log_bandwidth = nn.Parameter(torch.full_like(self.alpha[:, 0], math.log(bandwidth)))
        else:
            self.register_buffer("dictionary", points[None].to(self.alpha.dtype), persistent=False)
            self.register_buffer(
                "log_bandwidth", torch.full_like(self.alpha[:1, 0], math.log(bandwidth)), persistent=False
            )

    def _initial_alpha(self, init, dictionary, bandwidth, ridge):
        shape = (self.channels, len(dictionary))
        if init is None:
            return torch.randn(shape) * DEFAULT_INIT_STD
        if isinstance(init, str):
            if init not in RIDGE_TARGETS:
                raise ValueError(f"KAF init must be None, a function or one of {sorted(RIDGE_TARGETS)}, got {init!r}")
            init = RIDGE_TARGETS[init]
        alpha = ridge_coefficients(init, dictionary, bandwidth, ridge)
        return alpha.to(torch.get_default_dtype()).repeat(self.channels, 1)

    @property
    def dictionary_size(self):
        return self.alpha.shape[1]

    @property
    def bandwidth(self):
        """gamma, shape (1,) or (C,)."""
        return self.log_bandwidth.exp()

    def forward(self, x):
        if x.ndim < 2 or x.shape[1] != self.channels:
            raise ValueError(f"KAF of {self.channels} channels needs (N, {self.channels}, *), got {tuple(x.shape)}")
        dtype = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
        if self.grid is not None:
            return grid_mixture(x, self.alpha.to(dtype), self.grid)
        params = (p.to(dtype) for p in (self.alpha, self.dictionary, self.bandwidth))
        return mixture(x.to(dtype), *params).to(x.dtype)

    def extra_repr(self):
        trainable = ", trainable_dictionary=True" if self.grid is None else ""
        return f"{self.channels}, dictionary_size={self.dictionary_size}, boundary={self.boundary}{trainable}"
