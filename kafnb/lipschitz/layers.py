"""Spectral norms of dense and convolutional layers as they act: with their stride, padding and image size.

Source of the Fourier method: Sedghi, Gupta, Long, ICLR 2019, arXiv:1805.10408 (circular padding, stride 1).
"""

import math
import typing

import torch
from torch import nn

from ..checks import count, number
from .maps import linear_map

METHODS = ("power", "svd", "fourier", "certified")


class SpectralNorm(typing.NamedTuple):
    """``residual`` is ||A'Av - s^2 v|| / s^2 of "power": a singular value lies within half of it, relatively."""

    value: float
    method: str
    iterations: int
    residual: float


def _power(apply, transpose, shape, iterations, tolerance, device, block=8):
    """Power iteration on A'A with a block of vectors: the first converges as fast as the ninth is smaller."""
    generator, size = torch.Generator().manual_seed(0), math.prod(shape)
    v = torch.randn(size, min(block, size), dtype=torch.float64, generator=generator).to(device)
    for step in range(1, iterations + 1):  # noqa: B007 (reported)
        v = torch.linalg.qr(v).Q
        w = transpose(apply(v.T.reshape(-1, *shape))).flatten(1).T  # A'A v, (size, block)
        values, rotation = torch.linalg.eigh(v.T @ w)
        largest, top = values[-1].clamp_min(0), rotation[:, -1]
        residual = (w @ top - largest * (v @ top)).norm() / largest.clamp_min(1e-300)
        if residual <= tolerance or largest == 0:
            break
        v = w
    return SpectralNorm(largest.sqrt().item(), "power", step, residual.item())


def _fourier(weight, layer, shape):
    """Largest singular value of the convolution on a torus, one small matrix a frequency.

    Zero padding is a torus with room for the zeros, of which some inputs and outputs are not used: that cannot raise
    the norm. A stride of s adds up the s^2 frequencies that look alike on the coarser grid.
    """
    circular = layer.padding_mode == "circular"
    sizes = zip(shape[1:], layer.kernel_size, layer.padding, strict=True)
    if circular and any(2 * p > k - 1 or k > n for n, k, p in sizes):
        raise ValueError(
            "circular padding beyond (kernel_size - 1) / 2, or on images smaller than the kernel, repeats outputs: "
            "take method 'svd' or 'power'"
        )
    room, stride = [], []
    for n, k, p, s in zip(shape[1:], layer.kernel_size, layer.padding, layer.stride, strict=True):
        size = max(n + (0 if circular else p), k)
        stride.append(s if not circular or size % s == 0 else 1)  # leaving outputs out cannot raise the norm either
        room.append(-(-size // stride[-1]) * stride[-1])
    symbols = torch.fft.fft2(weight, s=room).permute(2, 3, 0, 1)  # (H, W, out, in)
    gram = (symbols @ symbols.mH).unflatten(1, (stride[1], -1)).unflatten(0, (stride[0], -1)).mean((0, 2))
    value = torch.linalg.eigvalsh(gram)[..., -1].amax().clamp_min(0).sqrt()
    return SpectralNorm(value.item() * (1 + 1e-12), "fourier", 0, 0.0)


def spectral_norm(layer, input_shape=None, method="power", *, scale=None, iterations=1000, tolerance=1e-5):
    """Spectral norm of a dense or convolutional layer: the most it can stretch an input in L2.

    Parameters
    ----------
    layer : Linear or Conv2d
        Any stride and padding ("zeros", "circular"), dilation 1, groups 1. The bias does not matter.
    input_shape : (C, H, W), optional
        What a convolution is applied to: its norm grows with the image.
    method : {"power", "svd", "fourier", "certified"}
        "power": block power iteration through the layer and its transpose, from below. "svd": of the dense matrix,
        for layers of a few thousand inputs. "fourier": for convolutions, exact on a torus (circular padding of at
        most (kernel_size - 1) / 2, a stride that divides the image), an upper bound otherwise. "certified":
        "fourier" for a convolution, "svd" for a dense layer.
    scale : Tensor, shape (output channels,), optional
        Folded in: the norm of diag(scale) W.
    iterations, tolerance
        Of "power", which stops when its relative residual is below ``tolerance``.

    Returns
    -------
    SpectralNorm
        value, method, iterations, residual. Computed in float64.

    Raises
    ------
    ValueError
        Another layer, dilation or groups; an unknown method; a convolution without input_shape.
    """
    convolution = isinstance(layer, nn.Conv2d)
    if method not in METHODS:
        raise ValueError(f"spectral_norm method must be one of {METHODS}, got {method!r}")
    if method == "fourier" and not convolution:
        raise ValueError("spectral_norm method 'fourier' is for convolutions: use 'svd' for a dense layer")
    if convolution and (input_shape is None or len(input_shape) != 3):
        raise ValueError(f"the norm of a convolution needs input_shape (C, H, W), got {input_shape}")
    count(iterations, "iterations")
    number(tolerance, "tolerance", above=0)
    with torch.no_grad():
        apply, transpose, weight = linear_map(layer, input_shape, scale)
        shape = tuple(input_shape) if convolution else (layer.in_features,)
        if method == "power":
            return _power(apply, transpose, shape, iterations, tolerance, weight.device)
        if method == "fourier" or (method == "certified" and convolution):
            return _fourier(weight, layer, shape)
        basis = torch.eye(math.prod(shape), dtype=weight.dtype, device=weight.device).view(-1, *shape)
        value = torch.linalg.matrix_norm(apply(basis).flatten(1), 2).item()
        return SpectralNorm(value * (1 + 1e-12), "svd", 0, 0.0)
