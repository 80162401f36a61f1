"""Attacks made for one kind of network: where its gradients mislead, they take others. Success is judged on the model.

Each is called as ``attacks.pgd`` is, with its shapes, units, options and errors, and returns what that does.

Source of the method: Tramer, Carlini, Brendel, Madry, NeurIPS 2020, arXiv:2002.08347; replaced backward passes
(BPDA) and averaged gradients: Athalye, Carlini, Wagner, ICML 2018, arXiv:1802.00420.
"""

import copy
import functools

import torch
from torch import nn

from ..checks import count, instance, number
from ..kaf import KAF
from ..kwta import KWTA, threshold
from . import _check, logits_and_gradient, pgd
from .balls import random_delta


def swapped(model, kind, make):
    """A copy of the model with ``make(module)`` in place of each module of ``kind``."""
    if isinstance(model, kind):
        return make(model)
    out = copy.deepcopy(model)
    for name, child in list(out.named_modules(remove_duplicate=False)):
        if isinstance(child, kind):
            parent = out.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], make(child))
    return out.requires_grad_(False).eval()


def averaged(draws, radius):
    """A gradient for ``pgd``: the mean over ``draws`` uniform neighbours within ``radius`` (L-inf, pixel units)."""
    count(draws, "draws")
    number(radius, "radius", low=0)

    def gradient(model, x, objective):
        total = 0
        for _ in range(draws):
            near = (x + random_delta(x, radius)).clamp(0, 1)
            logits, g = logits_and_gradient(model, near, objective)
            total = total + g
        return logits, total / draws

    return gradient


# --- k-WTA -------------------------------------------------------------------------------------------------------


class SmoothKWTA(nn.Module):
    """k-WTA whose backward pass is that of x * sigmoid((x - threshold) / temperature); forward as it is."""

    def __init__(self, layer, temperature=0.2):
        super().__init__()
        self.layer, self.temperature = layer, temperature

    def forward(self, x):
        least = threshold(x, self.layer.ratio)
        # in units of the layer's own spread, so that one temperature serves all layers
        spread = x.detach().flatten(1).std(1).clamp_min(1e-6).view_as(least)
        soft = x * torch.sigmoid((x - least) / (self.temperature * spread))
        return self.layer(x).detach() + soft - soft.detach()


def neighbours(model, x, y, *, eps, draws=4, radius=None, **options):
    """PGD along the gradient averaged over random neighbours, which sees past the jumps of k-WTA."""
    _check(model, x, y, eps, options.get("norm", "linf"))
    return pgd(model, x, y, eps=eps, gradient=averaged(draws, eps / 10 if radius is None else radius), **options)


def kwta_smooth(model, x, y, *, eps, **options):
    """PGD with every k-WTA's backward pass replaced by a smooth one (``SmoothKWTA``)."""
    _check(model, x, y, eps, options.get("norm", "linf"))
    return pgd(model, x, y, eps=eps, surrogate=swapped(model, KWTA, SmoothKWTA), **options)


def kwta_both(model, x, y, *, eps, **options):
    """The smooth backward pass, averaged over random neighbours."""
    _check(model, x, y, eps, options.get("norm", "linf"))
    return kwta_smooth(model, x, y, eps=eps, gradient=averaged(4, eps / 10), **options)


# --- KAF ---------------------------------------------------------------------------------------------------------


def in_double(model):
    """A gradient for ``pgd``: the model's in float64, that of each image divided by its largest entry.

    What rounds to zero in float32, within the network or as a gradient of 1e-60, is there.
    """
    net = copy.deepcopy(model).double().requires_grad_(False).eval()

    def gradient(model, x, objective):
        logits, g = logits_and_gradient(net, x.double(), objective)
        largest = g.flatten(1).abs().amax(1).clamp_min(torch.finfo(g.dtype).tiny)
        return logits.to(x.dtype), (g / largest.view(-1, *[1] * (x.ndim - 1))).to(x.dtype)

    return gradient


class OpenTails(nn.Module):
    """A KAF whose backward pass beyond its boundary is that there: a saturated unit passes a gradient on."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        inside = x.detach().clamp(-self.layer.boundary, self.layer.boundary)
        held = self.layer(inside + (x - x.detach()))  # its slope in x is f'(inside)
        return held + (self.layer(x) - held).detach()


def smoothed(layer, tau):
    """The KAF averaged over normal noise of standard deviation ``tau`` on its input: a KAF again.

    A Gaussian kernel of bandwidth gamma becomes one of gamma / s, s = 1 + 2 gamma tau^2, and its coefficients
    shrink by sqrt(s).
    """
    if layer.kernels != ("gaussian",):
        raise ValueError(f"only Gaussian KAFs are smoothed in closed form, got kernel {layer.kernels}")
    out = copy.deepcopy(layer)
    with torch.no_grad():
        s = 1 + 2 * layer.bandwidth * tau**2
        out.alpha.div_(s.sqrt().view(-1, 1))
        if layer.grid is None:
            out.log_bandwidth.sub_(s.log())
        else:
            out.grid = layer.grid._replace(gamma=layer.grid.gamma / float(s))
            out._grid_text = str(out.grid) if out.grid.in_range() else None
    return out


class _Annealed:
    """A gradient for ``pgd`` that takes the next network after each equal share of the steps."""

    def __init__(self, nets, steps):
        self.nets, self.steps, self.calls = nets, steps, 0

    def __call__(self, model, x, objective):
        net = self.nets[self.calls % self.steps * len(self.nets) // self.steps]
        self.calls += 1
        return logits_and_gradient(net, x, objective)


def double(model, x, y, *, eps, **options):
    """PGD with gradients in float64."""
    _check(model, x, y, eps, options.get("norm", "linf"))
    return pgd(model, x, y, eps=eps, gradient=in_double(model), **options)


def kaf_tails(model, x, y, *, eps, **options):
    """PGD with the KAFs' tails replaced in the backward pass (``OpenTails``)."""
    _check(model, x, y, eps, options.get("norm", "linf"))
    return pgd(model, x, y, eps=eps, surrogate=swapped(model, KAF, OpenTails), **options)


def kaf_annealed(model, x, y, *, eps, steps=20, **options):
    """PGD that begins on a smoothed network and ends on the model: KAFs averaged over noise of 0.5, 0.25, 0.1, 0."""
    _check(model, x, y, eps, options.get("norm", "linf"))
    count(steps, "steps")
    nets = [swapped(model, KAF, functools.partial(smoothed, tau=tau)) if tau else model for tau in (0.5, 0.25, 0.1, 0)]
    return pgd(model, x, y, eps=eps, steps=steps, gradient=_Annealed(nets, steps), **options)


def transfer(model, x, y, *, eps, source, **options):
    """PGD on another network, ``source``; black box as far as the model is concerned."""
    return pgd(model, x, y, eps=eps, surrogate=instance(source, nn.Module, "source"), **options)


def suite(model, source=None):
    """name -> attack, everything here that concerns this model; call each as ``attack(model, x, y, eps=..., ...)``."""
    out = {}
    if any(isinstance(m, KWTA) for m in model.modules()):
        out |= {"neighbours": neighbours, "kwta_smooth": kwta_smooth, "kwta_both": kwta_both}
    kafs = [m for m in model.modules() if isinstance(m, KAF)]
    if kafs:
        out |= {"double": double, "kaf_tails": kaf_tails}
    if kafs and all(m.kernels == ("gaussian",) for m in kafs):
        out["kaf_annealed"] = kaf_annealed
    return out if source is None else out | {"transfer": functools.partial(transfer, source=source)}
