r"""Kernel activation functions (KAF): each channel learns its own smooth non-linearity.

.. math:: \mathrm{KAF}(x) = \sum_{i=1}^{D} \alpha_i \exp\bigl(-\gamma (x - d_i)^2\bigr)

Source: Scardapane, Van Vaerenbergh, Totaro, Uncini, "Kafnets: kernel-based non-parametric activation
functions for neural networks", Neural Networks 110 (2019), https://doi.org/10.1016/j.neunet.2018.11.002
"""

import math

import torch
from torch import nn

from ..checks import count, instance, number, pick, shown
from .gaussian import grid_mixture
from .grid import Grid, bandwidth, points
from .kernels import KERNELS, default_bandwidth, ridge_coefficients, second_moment
from .mixture import mixture

DEFAULT_INIT_STD = 0.05  # Keras' RandomNormal default, which the thesis used for alpha

RIDGE_TARGETS = {"relu": torch.relu, "elu": nn.functional.elu, "swish": nn.functional.silu, "tanh": torch.tanh}


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
    kernel : str or tuple of str
        "gaussian", "laplacian", "matern32", "matern52", "rational_quadratic", "periodic", "relu", "softplus". The
        Gaussian is much the fastest, and alone works inside ``torch.func`` (grad, vjp, jacrev, vmap; not jvp). Several
        share alpha and are summed with weights learned per channel (``mix``).
    init : None, str or callable
        None draws alpha from normal(0, 0.05), as the thesis does. "unit" draws it so that E[f(x)^2] = 1 on average for
        x ~ N(0, 1). "relu", "elu", "swish", "tanh" or any element-wise function on tensors: alpha by ridge regression
        on it (``kernels.ridge_coefficients``; float16-safe with ridge=1e-3). In networks deeper than about 20 layers
        use "elu": behind batch normalisation the random ones multiply the squared gradient by 3.2 a layer, "elu" by
        1.09 (``kafnb.gradients.growth_factor``, notebook 13).
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

    On a CPU the loops are compiled by numba, at the first call on a machine (some seconds, then kept on disk).

    Under ``torch.compile`` on an Intel processor and with 50 points or more, set ``torch.set_flush_denormal(True)``:
    subnormal numbers, which mean nothing here, make it some ten times slower. (In eager mode that is seen to.)

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
        # plain numbers from here on: a numpy or torch scalar would stop torch.compile
        channels = count(channels, "KAF channels")
        dictionary_size = count(dictionary_size, "KAF dictionary_size", low=2)
        boundary = number(boundary, "KAF boundary", above=0)
        ridge = number(ridge, "KAF ridge", low=0)
        kernels = (kernel,) if isinstance(kernel, str) else tuple(instance(kernel, list | tuple, "KAF kernel"))
        if not kernels:
            raise ValueError(f"KAF kernel must be one or several of {', '.join(KERNELS)}, got {kernel!r}")
        for one in kernels:
            pick(KERNELS, one, "KAF kernel")
        if bandwidth is None:
            bandwidth = default_bandwidth(dictionary_size, boundary)
        bandwidth = number(bandwidth, "KAF bandwidth", above=0)
        self.channels, self.boundary, self.kernels = channels, boundary, kernels
        # of a fixed dictionary plain numbers, so that they are exact in every type the layer is moved to
        self.grid = Grid(dictionary_size, -boundary, 2 * boundary / (dictionary_size - 1), bandwidth)
        self._grid_text = str(self.grid) if self.grid.in_range() else None
        start = torch.linspace(-boundary, boundary, dictionary_size, dtype=torch.float64)
        self.alpha = nn.Parameter(self._initial_alpha(init, start, bandwidth, ridge))
        if len(kernels) > 1:
            self.mix = nn.Parameter(torch.full_like(self.alpha[:, : len(kernels)], 1 / len(kernels)))
        if trainable_dictionary:
            self.grid = self._grid_text = None
            self.points = nn.Parameter(start.to(self.alpha.dtype).repeat(channels, 1))
            self.log_bandwidth = nn.Parameter(torch.full_like(self.alpha[:, 0], math.log(bandwidth)))

    def _initial_alpha(self, init, dictionary, bandwidth, ridge):
        shape = (self.channels, len(dictionary))
        if init is None:
            return torch.randn(shape) * DEFAULT_INIT_STD
        if init == "unit":
            return torch.randn(shape) / math.sqrt(second_moment(dictionary, bandwidth, self.kernels))
        if isinstance(init, str):
            init = pick(RIDGE_TARGETS | {"unit": None}, init, "KAF init")
        if not callable(init):
            raise TypeError(f"KAF init must be None, a name or a function on tensors, got {shown(init)}")
        alpha = ridge_coefficients(init, dictionary, bandwidth, ridge, self.kernels)
        return alpha.to(torch.get_default_dtype()).repeat(self.channels, 1)

    @property
    def dictionary_size(self):
        return self.alpha.shape[1]

    @property
    def dictionary(self):
        """Points d_i, shape (1, D), or (C, D) where they are learned."""
        return self.points if self.grid is None else points(self.grid, self.alpha).clone()

    @property
    def bandwidth(self):
        """gamma, shape (1,), or (C,) where it is learned."""
        return self.log_bandwidth.exp() if self.grid is None else bandwidth(self.grid, self.alpha).clone()

    def forward(self, x):
        if not hasattr(x, "ndim") or (isinstance(x, torch.Tensor) and not x.is_floating_point()):
            raise TypeError(f"KAF needs a Tensor of floating-point numbers, got {shown(getattr(x, 'dtype', x))}")
        if x.ndim < 2 or x.shape[1] != self.channels:
            raise ValueError(f"KAF of {self.channels} channels needs (N, {self.channels}, *), got {tuple(x.shape)}")
        dtype = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
        given, alpha, out = x.dtype, self.alpha.to(dtype), None
        x = x.to(dtype) if len(self.kernels) > 1 else x  # a sum is rounded once, at its end
        for p, kernel in enumerate(self.kernels):
            a = alpha * self.mix[:, p : p + 1].to(dtype) if len(self.kernels) > 1 else alpha
            if kernel == "gaussian" and self._grid_text:
                part = grid_mixture(x, a, self.grid, self._grid_text)
            else:
                dictionary = self.points.to(dtype) if self.grid is None else points(self.grid, a)
                gamma = self.log_bandwidth.to(dtype).exp() if self.grid is None else bandwidth(self.grid, a)
                part = mixture(x.to(dtype), a, dictionary, gamma, kernel).to(x.dtype)
            out = part if out is None else out + part
        return out.to(given)

    def extra_repr(self):
        kernel = "" if self.kernels == ("gaussian",) else f", kernel={self.kernels}"
        trainable = ", trainable_dictionary=True" if self.grid is None else ""
        return f"{self.channels}, dictionary_size={self.dictionary_size}, boundary={self.boundary}{kernel}{trainable}"
