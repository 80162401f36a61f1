r"""How gradients grow with depth: measured in a network, and predicted from its activation function.

Batch normalisation hands an activation x ~ N(0, 1). From the input of one normalisation to that of the next, through
f and a convolution, the squared gradient grows, going backward, by

.. math:: \chi = \frac{E[f'(x)^2]}{\mathrm{Var}[f(x)]}, \qquad x \sim N(0, 1).

In Hermite polynomials f = sum c_n h_n this is sum n c_n^2 / sum_{n>0} c_n^2, the mean degree of f: chi >= 1, and 1 only
for straight lines. Notebook 13 derives it and what residual blocks make of it.
"""

import copy
import math

import numpy as np
import torch
from torch import nn

from . import checks
from .activations import activation as named_activation
from .attacks import frozen
from .kwta import KWTA
from .meanfield import predict
from .models import out_of_place
from .probes import capture


def _nodes(equal):
    """Nodes and weights for E[g(x)], x ~ N(0, 1), float64.

    Gauss-Legendre with 16 nodes on each unit interval of [-10, 10]: exact to 1e-12 for smooth functions and for those
    with kinks at integers (ReLU), where Gauss-Hermite's error falls only like 1 / nodes. ``equal``: equal weights,
    as a function that ranks its inputs needs.
    """
    if equal:
        share = (torch.arange(4096, dtype=torch.float64) + 0.5) / 4096
        return math.sqrt(2) * torch.erfinv(2 * share - 1), torch.full_like(share, 1 / 4096)
    t, w = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(16))
    x = (torch.arange(-10, 10, dtype=torch.float64)[:, None] + 0.5 + t / 2).flatten()
    return x, (w / 2).repeat(20) * torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)


@torch.enable_grad()
def chi_of(f, channels=1):
    """chi of a module as it is now, over its channels; ``growth_factor`` draws a new one from a name.

    Parameters
    ----------
    f : Module or callable
        (1, channels, n) -> same. A module is left in float64 and in eval mode.
    """
    f = f.double().train(False) if isinstance(f, nn.Module) else f
    x, w = _nodes(any(isinstance(m, KWTA) for m in f.modules()) if isinstance(f, nn.Module) else False)
    z = x.expand(1, channels, -1).clone().requires_grad_()  # (1, channels, nodes)
    y = f(z.clone())  # which it may overwrite
    slope = torch.autograd.grad(y.sum(), z)[0]
    slopes = (slope**2) @ w
    variances = (y.detach() ** 2) @ w - (y.detach() @ w) ** 2
    if not variances.sum() > 0:
        raise ValueError(f"activation {f!r} is constant on N(0, 1): its growth factor is not defined")
    return float(slopes.sum() / variances.sum())


def growth_factor(name, block=None, *, depth=56, image_size=16, seeds=2):
    """Growth of the gradient through an activation behind batch normalisation, at initialisation.

    Parameters
    ----------
    name : str or callable
        An activation's name, or channels -> module.
    block : {"thesis", "he", "preact", "plain"}, optional
        Without: chi, the growth of the *squared* norm through one normalisation, activation and convolution. With:
        growth of the norm a residual block, the geometric mean over a ResNet of this ``depth``, by mean-field theory
        (``kafnb.meanfield``).
    image_size : int
        Of the ResNet's input. 16 stands between digits (8) and CIFAR-10 (32); the growth of a random KAF in the
        thesis' block is 7 % less at 8 and 4 % more at 32.
    seeds : int
        Draws that the prediction is averaged over.

    Returns
    -------
    float

    Raises
    ------
    ValueError
        Unknown names; a constant function.
    """
    if block is None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return chi_of(name(4096) if callable(name) else named_activation(name, 4096), 4096)
    checks.count(seeds, "seeds")
    logs = []
    for seed in range(seeds):
        norms = list(predict(name, block, depth, image_size, seed=seed).values())
        logs.append(math.log(norms[0] / norms[-1]) / (len(norms) - 1))
    return math.exp(sum(logs) / len(logs))


def kaf_moments(dictionary, bandwidth):
    r"""Gaussian moments of a Gaussian KAF in closed form: with them chi = a^T A a / a^T B a for coefficients a.

    For independent random coefficients of mean 0 and equal variance chi = trace A / trace B on average over many
    channels, whatever their scale.

    Parameters
    ----------
    dictionary : Tensor, shape (D,)
    bandwidth : float
        gamma.

    Returns
    -------
    (A, B) : Tensors, shape (D, D), float64
        A_ij = E[k_i'(x) k_j'(x)], B_ij = Cov[k_i(x), k_j(x)], x ~ N(0, 1).
    """
    d, g = dictionary.detach().double(), float(bandwidth)
    mean, gap = (d[:, None] + d[None, :]) / 2, d[:, None] - d[None, :]
    s = 1 + 4 * g  # k_i k_j is a Gaussian around the mean of d_i and d_j, times exp(-g gap^2 / 2)
    second = torch.exp(-g * gap**2 / 2 - 2 * g * mean**2 / s) / math.sqrt(s)
    first = torch.exp(-g * d**2 / (1 + 2 * g)) / math.sqrt(1 + 2 * g)
    # under the product density x has mean 4 g m / s and variance 1 / s
    center = 4 * g * mean / s
    slopes = 4 * g**2 * second * ((center - d[:, None]) * (center - d[None, :]) + 1 / s)
    return slopes, second - first[:, None] * first[None, :]


def _watched(model):
    """Names of the parts whose outputs are measured: residual blocks where there are some, else the layers in order."""
    blocks = getattr(model, "blocks", None)
    return [f"blocks.{n}" for n, _ in blocks.named_children()] if blocks else [n for n, _ in model.named_children()]


def measure(model, batch, dtype=None):
    """Norms of the loss' gradient in each block's output, for cross-entropy on one batch with batch statistics.

    Parameters
    ----------
    model : Module
        Left as it was: mode, statistics, gradients. Without ``blocks``, its direct children are measured.
    batch : (images, labels)
        At least 2 images.
    dtype : torch.dtype, optional
        Number type of weights, activations and gradients, e.g. torch.float16; the model's own by default.

    Returns
    -------
    dict
        Block name -> Euclidean norm (summed in float64), input side first.
    """
    if not isinstance(batch, list | tuple) or len(batch) != 2:
        raise TypeError(f"batch must be a pair (images, labels), got {checks.shown(batch)}")
    checks.instance(model, nn.Module, "model")
    x, y = checks.images(batch[0], box=False), batch[1]
    if len(x) < 2:
        raise ValueError(f"measure needs at least 2 images, and a label each, got {len(x)}")
    checks.labels(y, len(x))
    p = next(model.parameters(), x)
    model = out_of_place(copy.deepcopy(model)).to(dtype=dtype or p.dtype).train()  # batch statistics move in the copy
    with torch.random.fork_rng(), torch.enable_grad(), frozen(model), capture(model, _watched(model)) as outputs:
        torch.manual_seed(0)  # of dropout
        with checks.forward(x):
            logits = model(x.detach().to(p.device, dtype or p.dtype).requires_grad_())
        checks.labels(y, classes=logits.shape[1])
        wide = torch.promote_types(logits.dtype, torch.float32)
        loss = nn.functional.cross_entropy(logits.to(wide), y.to(p.device))
        grads = torch.autograd.grad(loss, list(outputs.values()))
    return {name: g.double().norm().item() for name, g in zip(outputs, grads, strict=True)}


def first_nonfinite(model):
    """Name of the last layer whose parameter gradients are not all finite, or None.

    Going backward this is where it began; what lies on the input side of it is non-finite in consequence. Layers are
    in the order that the model registers them: of a block's two branches, which are equally near to the loss, the
    shortcut is the last.
    """
    named = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    bad = [name for name, grad in named if not torch.isfinite(grad).all()]
    return bad[-1].rpartition(".")[0] if bad else None
