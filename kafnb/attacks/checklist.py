"""Is a robust accuracy real, or are the gradients hidden? A list of checks, run on any model with one call.

After Carlini et al., "On evaluating adversarial robustness", 2019, arXiv:1902.06705, section 5; Athalye, Carlini,
Wagner, ICML 2018, arXiv:1802.00420, section 3.1; and the checks in AutoAttack's code (arXiv:2003.01690).
"""

import functools

import numpy as np
import pandas as pd
import torch

from ..checks import count, forward, images, instance, labels, radius
from ..checks import seed as seed_of
from ..evaluate import _images, model_device, robust_accuracy
from . import fgsm, input_gradient, pgd, still
from .adaptive import transfer
from .library import square
from .losses import cross_entropy

TOLERANCE = 0.02  # share of images by which one attack may beat a stronger one before it is a finding
LIMITS = {"softmax outputs": 0.0, "randomness": 1e-4, "zeros in the gradient": 0.1, "gradient against differences": 0.1}
NO_IMAGES = {"softmax outputs", "randomness", "zeros in the gradient"}  # all others are shares of images

EXPLANATIONS = {
    "softmax outputs": "Outputs in [0, 1] that sum to 1 are probabilities; losses on them saturate. Attack the logits.",
    "randomness": "Two passes over the same images differ: attack the average over draws, not one draw.",
    "images without gradient": "Share of images whose input gradient is exactly zero: no gradient attack moves them.",
    "zeros in the gradient": "Share of gradient entries that are exactly zero: underflow or dead units block the way.",
    "gradient against differences": "Share of images on which a small step along the gradient changes the loss by less "
    "than half or more than twice what the gradient says: the gradient is another function's, or the loss is too "
    "coarse for small differences.",
    "one step beats many": "Share of images that one step breaks and many do not; many include the one.",
    "transfer beats white box": "Share that falls to another network's adversarial images but not to its own.",
    "Square beats white box": "Share that falls to random search without gradients but not to gradients.",
    "large eps": "Share still right at eps 0.5, where every image can become grey: a working attack leaves none.",
    "more steps help": "Share that falls only to five times the steps: the attack had not converged.",
    "more restarts help": "Share that falls only to five restarts more: the loss surface is rugged.",
}


def outputs(model, x, y):
    """The checks that need no attack: name -> value.

    An entry of the gradient that is NaN or infinite counts as a zero: it leads nowhere either.
    """
    with still(model):
        with torch.no_grad(), forward(x):
            first, second = model(x), model(x)
        labels(y, len(images(x)), first.shape[1])
        probable = first.min() > -1e-5 and first.max() < 1 + 1e-5 and ((first.sum(1) - 1).abs() < 1e-5).all()
        right = first.argmax(1) == y
        g = input_gradient(model, x[right], y[right]).flatten(1)
        no_way = (g == 0) | ~g.isfinite()
        return {
            "softmax outputs": float(probable),
            "randomness": float((first - second).abs().max() / first.abs().max().clamp_min(1e-12)),
            "images without gradient": float(no_way.all(1).double().mean()) if len(g) else 0.0,
            "zeros in the gradient": float(no_way.float().mean()) if len(g) else 0.0,
            "gradient against differences": mismatch(model, x[right], y[right], g.view_as(x[right])),
        }


def mismatch(model, x, y, g, step=0.01):
    """Share of images whose loss changes along g by less than half or more than twice what g says.

    Parameters
    ----------
    model : Module
    x : Tensor, shape (N, C, H, W)
    y : Tensor, shape (N,)
    g : Tensor, same shape as x
        A gradient of the loss: the model's own, or another's that is to be held against this model's loss.
    step : float
        L2 length over which the loss is differenced, pixel units.
    """
    images(x)
    if len(x) == 0:
        return 0.0
    length = g.flatten(1).norm(dim=1)
    direction = g / length.clamp_min(1e-30).view(-1, *[1] * (x.ndim - 1))
    with still(model), torch.no_grad(), forward(x):
        ahead, behind = (cross_entropy(model(x + s * step * direction).double(), y) for s in (0.5, -0.5))
    ratio = (ahead - behind) / (step * length.double()).clamp_min(1e-30)
    return float((~((ratio >= 0.5) & (ratio <= 2))).double().mean())  # so that NaN is a mismatch


def checklist(model, data, *, eps, source=None, n=100, steps=20, queries=500, seed=0):
    """Run every check on the first n test images.

    Parameters
    ----------
    model : Module
        Left as it was.
    data : Data or (images, labels)
    eps : float
        L-inf radius at which the model is said to be robust, pixel units.
    source : Module, optional
        Another network of the same task, for the transfer check; without it that check is left out.
    steps : int
        Of the reference attack, PGD with 2 restarts and steps of eps / 4.
    queries : int
        Of the Square attack.

    Returns
    -------
    DataFrame
        One row a check: check, value (what the explanation names), limit, finding (bool: value > limit), explanation.
        Where the value is a share of n images, the limit is that of ``LIMITS`` or ``TOLERANCE`` and one image more:
        one image alone is no finding, however few they are. Entries of a gradient that are NaN or infinite count as
        zeros, and never agree with differences.
    """
    radius(eps, "linf")
    count(steps, "steps")
    count(queries, "queries")
    if source is not None:
        instance(source, torch.nn.Module, "source")
    x, y = (t.to(model_device(model)) for t in _images(data, n))
    values = outputs(model, x, y)
    with still(model), torch.no_grad():
        right = int((model(x).argmax(1) == y).sum())
    options = dict(eps=eps, step_size=eps / 4, early_stop=True)
    stands = functools.partial(_stands, model, seed=seed)
    left = torch.from_numpy(stands((x, y), pgd, steps=steps, restarts=2, **options)).to(x.device)

    def beyond(attack, **changes):
        """Share of the images that stand the reference attack and fall to this one."""
        return float((~stands((x[left], y[left]), attack, **changes)).sum() / len(x)) if left.any() else 0.0

    values["one step beats many"] = beyond(fgsm, eps=eps)
    if source is not None:
        values["transfer beats white box"] = beyond(transfer, source=source, steps=steps, **options)
    values["Square beats white box"] = beyond(square, eps=eps, queries=queries)
    large = dict(eps=0.5, steps=5 * steps, step_size=0.05, early_stop=True)
    values["large eps"] = float(stands((x, y), pgd, **large).mean())
    values["more steps help"] = beyond(pgd, steps=5 * steps, seed=seed + 1, **options)
    values["more restarts help"] = beyond(pgd, steps=steps, restarts=5, seed=seed + 2, **options)
    counted = {k: right for k in ("images without gradient", "gradient against differences")}
    rows = [(k, v, _limit(k, counted.get(k, len(x)))) for k, v in values.items()]
    return pd.DataFrame(
        [(k, v, limit, v > limit, EXPLANATIONS[k]) for k, v, limit in rows],
        columns=["check", "value", "limit", "finding", "explanation"],
    )


def _limit(check, n):
    """What the value of a check may be; of a share of n images one image more than the limit says."""
    limit = LIMITS.get(check, TOLERANCE)
    return limit if check in NO_IMAGES else (limit * n + 1) / max(n, 1)


def _stands(model, data, attack, seed, **options):
    """bool (n,): which images stand ``attack``."""
    return robust_accuracy(model, data, functools.partial(attack, **options), seed=seed).correct


def loss_surface(model, x, y, *, eps, size=25, seed=0):
    """Cross-entropy of one image on a plane: the sign of its gradient against a random direction of signs.

    Parameters
    ----------
    x : Tensor, shape (C, H, W)
    y : int
    size : int
        Points along each axis, over [-eps, eps].

    Returns
    -------
    DataFrame
        gradient, random (pixel units), loss; size^2 rows.
    """
    radius(eps, "linf")
    count(size, "size")
    count(y, "y", low=0)
    seed_of(seed)
    images(x, dims=3)
    device = model_device(model)
    x, label = x[None].to(device), torch.tensor([y], device=device)
    generator = torch.Generator().manual_seed(seed)
    along = torch.from_numpy(np.linspace(-eps, eps, size)).to(x)
    with still(model):
        g = input_gradient(model, x, label).sign()
        across = (2 * torch.randint(0, 2, x.shape, generator=generator) - 1).to(x)
        a, b = torch.meshgrid(along, along, indexing="ij")
        points = x + a.reshape(-1, 1, 1, 1) * g + b.reshape(-1, 1, 1, 1) * across
        with torch.no_grad():
            loss = torch.cat([cross_entropy(model(p), label.expand(len(p))) for p in points.split(256)])
    return pd.DataFrame({"gradient": a.flatten().cpu(), "random": b.flatten().cpu(), "loss": loss.cpu()})
