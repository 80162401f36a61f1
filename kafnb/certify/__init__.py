"""Certificates: what no attack within the ball can break. Three kinds, each with its own ball and its own price.

``certified`` is for boxes (L-inf), by ``bounds``; ``lipschitz_radius`` for L2, from a constant of the network;
``Smoothed`` for L2 around a classifier that votes under noise, right with probability 1 - alpha.
"""

import copy
import dataclasses
import math

import torch
from scipy.stats import beta, binomtest, norm
from torch import nn

from ..attacks import still
from ..attacks.losses import margin
from ..checks import count, forward, images, instance, labels, number, pick, radius, shown
from .bounds import interval_bounds
from .crown import crown_bounds

METHODS = ("interval", "crown-ibp", "crown")


def _against(y, classes):
    """Rows z_y - z_j of each image, (N, classes - 1, classes)."""
    others = torch.arange(classes, device=y.device).expand(len(y), -1)
    others = others[others != y[:, None]].view(len(y), classes - 1)
    one_hot = nn.functional.one_hot
    return (one_hot(y, classes)[:, None] - one_hot(others, classes)).double()


@torch.no_grad()
def margin_bound(model, x, y, eps, method="crown"):
    """Lower bound of min_j (z_y - z_j) over the L-inf ball of radius eps within [0, 1], in float64.

    Parameters
    ----------
    model : Module
        Left as it is: bounds are computed on a copy.
    x, y : Tensors, shapes (N, C, H, W) and (N,)
    method : {"interval", "crown-ibp", "crown"}
        In order of tightness and of cost; see ``bounds``.

    Returns
    -------
    float64 Tensor, shape (N,). Above 0: no perturbation changes the answer y.
    """
    pick(METHODS, method, "method")
    instance(model, nn.Module, "model")
    labels(y, len(images(x)))
    radius(eps, "linf")
    if len(x) == 0:
        raise ValueError("at least one image is needed, got none")
    double, out = copy.deepcopy(model).double().eval(), []
    for xb, yb in zip(x.double().split(64), y.split(64), strict=True):
        low, high = (xb - eps).clamp(0, 1), (xb + eps).clamp(0, 1)
        with forward(xb):
            classes = double(xb[:1]).shape[1]
        spec = _against(labels(yb, classes=classes), classes)
        if method == "interval":
            a, b = (t[:, None] for t in interval_bounds(double, low, high))
            bound = (spec.clamp_min(0) * a + spec.clamp_max(0) * b).sum(2)
        else:
            bound, _ = crown_bounds(double, low, high, spec, inner="crown" if method == "crown" else "interval")
        out.append(bound.amin(1))
    return torch.cat(out)


def certified(model, x, y, eps, method="crown"):
    """Whether each image is proved to keep its label y everywhere in the L-inf ball of radius eps; bool (N,)."""
    return margin_bound(model, x, y, eps, method) > 0


def lipschitz_radius(logits, y, constant):
    """L2 radius that a Lipschitz constant of the logits (L2 to L2) proves: margin / (sqrt(2) constant), at least 0.

    Source: Tsuzuku, Sato, Sugiyama, NeurIPS 2018, arXiv:1802.04034, proposition 1.
    """
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2:
        raise ValueError(f"logits must be a Tensor (N, classes), got {shown(getattr(logits, 'shape', logits))}")
    labels(y, *logits.shape)
    if not isinstance(constant, torch.Tensor) and constant != math.inf:
        number(constant, "constant", above=0)
    return (-margin(logits, y) / (math.sqrt(2) * constant)).clamp_min(0)


@dataclasses.dataclass
class Smoothed:
    """The classifier that answers what ``model`` answers most often under normal noise.

    Attributes
    ----------
    sigma : float
        Standard deviation of the noise, pixel units; noisy images are not clipped.
    alpha : float
        Probability with which a certificate, or an answer, may be wrong.

    Source: Cohen, Rosenfeld, Kolter, ICML 2019, arXiv:1902.02918, figure 2 and section 3.2.
    """

    model: nn.Module
    sigma: float
    alpha: float = 0.001
    batch_size: int = 1024

    def __post_init__(self):
        instance(self.model, nn.Module, "model")
        number(self.sigma, "sigma", above=0)
        if not number(self.alpha, "alpha", above=0) < 1:
            raise ValueError(f"alpha must be a probability below 1, got {self.alpha}")
        count(self.batch_size, "batch_size")

    @torch.no_grad()
    def votes(self, image, n, generator=None):
        """How often each class wins among n noisy copies of one image (C, H, W); int64 (classes,). NaN has no vote."""
        images(image, dims=3)
        count(n, "n")
        with still(self.model):
            counts = 0
            for size in [self.batch_size] * (n // self.batch_size) + [n % self.batch_size] * (n % self.batch_size > 0):
                noise = torch.randn(size, *image.shape, device=image.device, generator=generator)
                with forward(image[None]):
                    logits = self.model(image + self.sigma * noise)
                answers = logits.argmax(1)[~logits.isnan().any(1)]
                counts = counts + torch.bincount(answers, minlength=logits.shape[1])
        return counts

    def predict(self, image, n, generator=None):
        """The most frequent class, or -1 where a test at level alpha does not tell it from the second."""
        (first, second), (answer, _) = self.votes(image, n, generator).topk(2)
        sure = first + second > 0 and binomtest(int(first), int(first + second), 0.5).pvalue <= self.alpha
        return int(answer) if sure else -1

    def certify(self, image, n0, n, generator=None):
        """(class, L2 radius), or (-1, 0.0) where no certificate is found.

        n0 votes choose the class, n others bound its probability from below (Clopper and Pearson).
        """
        answer = int(self.votes(image, n0, generator).argmax())
        lowest = lower_confidence(int(self.votes(image, n, generator)[answer]), n, self.alpha)
        return (answer, self.sigma * float(norm.ppf(lowest))) if lowest > 0.5 else (-1, 0.0)


def lower_confidence(successes, n, alpha):
    """One-sided Clopper-Pearson bound: with probability 1 - alpha the true rate is at least this."""
    count(n, "n")
    count(successes, "successes", low=0, high=n)
    number(alpha, "alpha", above=0, high=1)
    return float(beta.ppf(alpha, successes, n - successes + 1)) if successes else 0.0
