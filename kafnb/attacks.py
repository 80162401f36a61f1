"""Attacks behind one call shape: ``attack(model, x, y, *, eps, ...) -> x_adv``.

Images are float tensors in [0, 1], eps is in the same units, labels are required: which label an attack pushes
away from decides what its score means (notebook 17). No attack changes the model's mode, its statistics, its
gradients or which parameters require them.
"""

import contextlib

import torch
from torch.nn import functional as F

NORMS = ("linf", "l2")


@contextlib.contextmanager
def frozen(model):
    """Inside, no parameter requires a gradient: a backward pass computes the input's alone."""
    params = [p for p in model.parameters() if p.requires_grad]
    for p in params:
        p.requires_grad_(False)
    try:
        yield model
    finally:
        for p in params:
            p.requires_grad_(True)


@contextlib.contextmanager
def still(model):
    """Inside, the model is frozen and in eval mode; every module's own mode is put back after."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        with frozen(model):
            yield model
    finally:
        for m, training in modes:
            m.training = training


def input_gradient(model, x, y):
    """Gradient of the summed cross-entropy in the input, same shape as x."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(F.cross_entropy(model(x), y, reduction="sum"), x)[0]


def _length(delta):
    """L2 norm of each example, shaped to broadcast: (N, *) -> (N, 1, ..., 1)."""
    return delta.flatten(1).norm(dim=1).view(-1, *[1] * (delta.ndim - 1))


def random_delta(x, eps, norm="linf"):
    """A uniform draw from the eps ball, one an example."""
    if norm == "linf":
        return torch.empty_like(x).uniform_(-eps, eps)
    direction, dims = torch.randn_like(x), x[0].numel()
    radius = torch.rand(len(x), *[1] * (x.ndim - 1), device=x.device, dtype=x.dtype) ** (1 / dims)
    return eps * radius * direction / _length(direction).clamp_min(1e-12)


def project(x, delta, eps, norm="linf"):
    """The nearest delta in the ball with x + delta in [0, 1]; returns x + delta."""
    if norm == "linf":
        delta = delta.clamp(-eps, eps)
    else:
        delta = delta * (eps / _length(delta).clamp_min(1e-12)).clamp_max(1)
    return (x + delta).clamp(0, 1)


def steepest(gradient, norm="linf"):
    """The unit step that increases the linearised loss most: sign for L-inf, the direction itself for L2."""
    return gradient.sign() if norm == "linf" else gradient / _length(gradient).clamp_min(1e-12)


def _check(x, y, eps, norm):
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {NORMS}, got {norm!r}")
    if not 0 <= eps < float("inf"):
        raise ValueError(f"eps must be finite and >= 0, in pixel units of [0, 1], got {eps}")
    if not x.is_floating_point():
        raise ValueError(f"attacks need float images in [0, 1], got {x.dtype}: divide by 255 first")
    if len(x) and not (x.min() >= 0 and x.max() <= 1):
        raise ValueError(f"attacks need images in [0, 1], got [{x.min():.3g}, {x.max():.3g}]")
    if y is None or y.shape != (len(x),) or y.is_floating_point():
        raise ValueError(
            f"attacks need one integer label an image, got {None if y is None else (y.dtype, tuple(y.shape))}"
        )


def ascend(model, x, y, delta, *, eps, step_size, steps, norm="linf", sign=1):
    """Projected gradient ascent on the cross-entropy from x + delta, the model as it is; ``sign=-1`` descends."""
    x_adv = project(x, delta, eps, norm)
    for _ in range(steps):
        step = sign * step_size * steepest(input_gradient(model, x_adv, y), norm)
        x_adv = project(x, x_adv + step - x, eps, norm)
    return x_adv


def pgd(
    model, x, y, *, eps, step_size=None, steps=10, restarts=1, norm="linf", targeted=False, random_start=True
):  # fmt: skip
    """Projected gradient descent.

    Parameters
    ----------
    model : Module
        (N, C, H, W) images in [0, 1] -> (N, classes) logits. Used in eval mode.
    x : Tensor, shape (N, C, H, W)
    y : Tensor, shape (N,)
        Labels to leave, or to reach when ``targeted``.
    eps : float
        Radius of the ball, pixel units.
    step_size : float, optional
        Default 2.5 eps / steps.
    steps, restarts : int
        Later restarts attack only the images that still stand, and the result is the worst case of each image.
    norm : {"linf", "l2"}
    random_start : bool
        Fresh uniform draw from the ball at every call and restart.

    Returns
    -------
    Tensor, same shape as x
        Of each image the first restart that succeeded, else the one with the highest loss.

    Source: Madry et al., ICLR 2018, arXiv:1706.06083.
    """
    _check(x, y, eps, norm)
    if steps < 1 or restarts < 1:
        raise ValueError(f"pgd needs steps >= 1 and restarts >= 1, got {steps} and {restarts}")
    if restarts > 1 and not random_start:
        raise ValueError("restarts > 1 without random_start would repeat the same attack")
    step_size = 2.5 * eps / steps if step_size is None else step_size
    sign = -1 if targeted else 1
    best, best_loss = x.clone(), torch.full((len(x),), -float("inf"), device=x.device)
    alive = torch.arange(len(x), device=x.device)
    with still(model):
        for _ in range(restarts):
            if len(alive) == 0:
                break
            xa, ya = x[alive], y[alive]
            delta = random_delta(xa, eps, norm) if random_start else torch.zeros_like(xa)
            adv = ascend(model, xa, ya, delta, eps=eps, step_size=step_size, steps=steps, norm=norm, sign=sign)
            with torch.no_grad():
                logits = model(adv).float()
                loss = sign * F.cross_entropy(logits, ya, reduction="none")
            done = (logits.argmax(1) == ya) == targeted
            better = done | (loss > best_loss[alive])
            best[alive[better]], best_loss[alive[better]] = adv[better], loss[better]
            alive = alive[~done]
    return best


def fgsm(model, x, y, *, eps, norm="linf", targeted=False):
    """Fast gradient sign method: one step of size eps from x itself. Source: Goodfellow et al., arXiv:1412.6572."""
    return pgd(model, x, y, eps=eps, step_size=eps, steps=1, norm=norm, targeted=targeted, random_start=False)
