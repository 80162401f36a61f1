"""Attacks behind one call shape: ``attack(model, x, y, *, eps, ...) -> x_adv``.

Images are float32 or float64 in [0, 1], eps is in the same units, labels are required: which label an attack pushes
away from decides what its score means (notebook 17). No attack changes the model's mode, its statistics, its
gradients or which parameters require them. Ours are here; those of libraries in ``library``, those made
for one kind of network in ``adaptive``.
"""

import math

import torch

from .. import checks
from .ascent import ascend, frozen, input_gradient, logits_and_gradient, still
from .balls import NORMS, project, random_delta, steepest
from .fast import twin
from .losses import LOSSES, cross_entropy, towards

__all__ = [
    "NORMS", "ascend", "cross_entropy", "fgsm", "frozen", "input_gradient", "logits_and_gradient", "pgd", "project",
    "random_delta", "steepest", "still",
]  # fmt: skip


def pgd(
    model, x, y, *, eps, step_size=None, steps=10, restarts=1, norm="linf", targeted=False, random_start=True,
    loss="ce", early_stop=False, fast=True, surrogate=None, gradient=None,
):  # fmt: skip
    """Projected gradient descent.

    Parameters
    ----------
    model : Module
        (N, C, H, W) images in [0, 1] -> (N, classes) logits. Used in eval mode.
    x : Tensor, shape (N, C, H, W)
    y : Tensor, shape (N,)
        Labels to leave, or to reach when ``targeted`` is True.
    eps : float
        Radius of the ball, pixel units.
    step_size : float, optional
        Default 2.5 eps / steps.
    steps, restarts : int
        Later restarts attack only the images that still stand, and the result is the worst case of each image.
    norm : {"linf", "l2", "l1"}
    targeted : bool or "all"
        "all": y are the labels to leave, and every other class is the target once, the likeliest first; a restart
        is then one round over all of them.
    random_start : bool
        Fresh uniform draw from the ball at every call and restart.
    loss : {"ce", "margin", "dlr"}
    early_stop : bool
        An image that is broken at any step stays there and leaves the batch. It then counts as broken even if a later
        step would have mended it, so this finds at least what the last step alone does.
    fast : bool
        Take the steps on ``fast.twin(model)``: the same logits and gradients up to rounding. Success is judged on the
        model itself.
    surrogate : Module, optional
        Another network whose gradients lead the steps: transfer, or the model with a replaced backward pass.
    gradient : callable, optional
        In place of ``logits_and_gradient``, for adaptive attacks.

    Returns
    -------
    Tensor, same shape as x
        Of each image the first restart that succeeded, else the one with the highest loss. Logits of NaN are no class:
        a success where y are the labels to leave, as evaluation counts them.

    Raises
    ------
    ValueError, TypeError
        Images that are not float32 or float64 in [0, 1], or that the model cannot take; labels that are not int64, one
        an image, each a class; unknown names; a number of another type or out of range, eps > 1 in L-inf too; restarts
        without ``random_start``; fewer than 3 classes for "dlr", 4 with "all"; a call inside ``torch.inference_mode``.

    Source: Madry et al., ICLR 2018, arXiv:1706.06083.
    """
    _check(model, x, y, eps, norm)
    checks.count(steps, "steps")
    checks.count(restarts, "restarts")
    checks.number(step_size, "step_size", low=0, optional=True)
    if restarts > 1 and not random_start:
        raise ValueError("restarts > 1 without random_start would repeat the same attack")
    if isinstance(targeted, torch.Tensor) or targeted not in (False, True, "all"):
        raise ValueError(f"targeted must be False, True or 'all', got {checks.shown(targeted)}")
    x, targeted = x.detach(), targeted if targeted == "all" else bool(targeted)
    sign, raised = (-1 if targeted is True else 1), _within(checks.pick(LOSSES, loss, "loss"))
    if surrogate is not None:
        checks.instance(surrogate, torch.nn.Module, "surrogate")
    options = dict(eps=eps, steps=steps, norm=norm)
    options |= {} if gradient is None else {"gradient": gradient}
    options["step_size"] = 2.5 * eps / steps if step_size is None else step_size
    best, best_loss = x.clone(), torch.full((len(x),), -float("inf"), device=x.device)
    alive = torch.arange(len(x), device=x.device)
    net = model if surrogate is None else surrogate
    net = twin(net) if fast and steps * restarts >= 4 else net  # a copy costs as much as about two steps
    own = surrogate is None and gradient is None  # the logits that come with the gradient are the model's

    def broken(x_adv, told, logits):
        wanted = told if told.ndim == 1 else told[:, 0]
        done = (_answer(logits) == wanted) == (targeted is True) if own else torch.ones_like(wanted, dtype=torch.bool)
        if (net is not model and done.any()) or not own:
            with torch.no_grad():
                done[done.clone()] = (_answer(model(x_adv[done])) == wanted[done]) == (targeted is True)
        return done

    with still(model), still(net):
        rounds = _rounds(model, x, y, restarts, targeted)
        for _, target in rounds:
            if len(alive) == 0:
                break
            xa, ya = x[alive], y[alive]
            delta = random_delta(xa, eps, norm) if random_start else torch.zeros_like(xa)
            told, aim = ya, raised
            if target is not None:
                told, aim = torch.stack([ya, target[alive]], 1), lambda z, t: towards(z, t[:, 0], t[:, 1], loss)
            stop = broken if early_stop else None
            adv = ascend(net, xa, told, delta, sign=sign, loss=aim, broken=stop, **options)
            if len(rounds) == 1:  # nothing to choose from
                return adv
            with torch.no_grad():
                logits = model(adv).float()
                value = sign * raised(logits, ya)
            done = (_answer(logits) == ya) == (targeted is True)
            better = done | (value > best_loss[alive])
            best[alive[better]], best_loss[alive[better]] = adv[better], value[better]
            alive = alive[~done]
    return best


def _check(model, x, y, eps, norm):
    checks.gradients("an attack")
    checks.instance(model, torch.nn.Module, "model")
    checks.pick(NORMS, norm, "norm")
    checks.radius(eps, norm)
    checks.labels(y, len(checks.images(x)))
    if x.dtype not in (torch.float32, torch.float64):  # rounding of the size of eps: a pixel would leave the ball
        hint = "pass x.float(); a network in half precision casts inside"
        raise ValueError(f"images must be float32 or float64 in [0, 1], got {x.dtype}: {hint}")


def _answer(logits):
    """The class of each image, as ``evaluate.predict`` says it: -1 where logits are NaN, whose argmax would be 0."""
    return logits.argmax(1).masked_fill(logits.isnan().any(1), -1)


def _within(loss):
    """``loss``, which at its first call looks whether the labels are classes of the logits."""
    looked = []

    def checked(logits, y):
        if not looked:
            looked.append(checks.labels(y, classes=logits.shape[1]))
        return loss(logits, y)

    return checked


def _rounds(model, x, y, restarts, targeted):
    """(restart, target of each image or None), in the order in which they are tried."""
    if targeted != "all" or len(x) == 0:
        return [(r, None) for r in range(restarts)]
    with torch.no_grad():
        with checks.forward(x):
            logits = model(x)
        checks.labels(y, classes=logits.shape[1])
        order = logits.scatter(1, y[:, None], -math.inf).argsort(1, descending=True)  # the last one is y itself
    return [(r, order[:, k]) for r in range(restarts) for k in range(order.shape[1] - 1)]


def fgsm(model, x, y, *, eps, norm="linf", targeted=False):
    """Fast gradient sign method: one step of size eps from x itself.

    Arguments, result and errors as for ``pgd``: images (N, C, H, W) in [0, 1], int64 labels (N,) and eps in pixel units
    -> images of the same shape in [0, 1]. In L2 and L1 the step is not the sign but that of ``steepest``.

    Source: Goodfellow et al., arXiv:1412.6572.
    """
    return pgd(model, x, y, eps=eps, step_size=eps, steps=1, norm=norm, targeted=targeted, random_start=False)
