"""Gradient ascent in a ball around an image, on a model that is left as it was."""

import contextlib
import functools
import warnings

import torch

from .. import checks
from .balls import project, steepest
from .losses import cross_entropy


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


def logits_and_gradient(model, x, objective):
    """The logits at x, and the gradient of ``objective(logits)``, summed over images, in x."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        with checks.forward(x):
            logits = model(x)
        raised = objective(logits).sum()
        if not raised.requires_grad:  # no path from the image to the logits
            warnings.warn("no gradient reaches the images: an attack that follows it says nothing", stacklevel=2)
            return logits.detach(), torch.zeros_like(x)
        return logits.detach(), torch.autograd.grad(raised, x, materialize_grads=True)[0]


def input_gradient(model, x, y):
    """Gradient of the summed cross-entropy in the input, same shape as x; part of a training step: y is not checked."""
    return logits_and_gradient(model, x, lambda logits: cross_entropy(logits, y))[1]


def ascend(
    model, x, y, delta, *, eps, step_size, steps, norm="linf", sign=1, loss=cross_entropy, broken=None,
    gradient=logits_and_gradient,
):  # fmt: skip
    """Projected gradient ascent on ``loss(logits, y)`` from x + delta, the model as it is; ``sign=-1`` descends.

    Parameters
    ----------
    y : Tensor, shape (N,) or (N, any)
        What ``loss`` is told of each image.
    broken : callable, optional
        ``broken(x_adv, y, logits)`` -> bool (N,): these images stay where they are and leave the batch.
    gradient : callable
        In place of ``logits_and_gradient``.
    """
    x_adv = result = project(x, delta, eps, norm)
    rows = None
    for _ in range(steps):
        logits, g = gradient(model, x_adv, functools.partial(_told, loss, y))
        if broken is not None and (done := broken(x_adv, y, logits)).any():
            rows = torch.arange(len(x), device=x.device) if rows is None else rows
            result = result.clone() if result is x_adv else result
            result[rows[done]], keep = x_adv[done], ~done
            x, y, x_adv, g, rows = (v[keep] for v in (x, y, x_adv, g, rows))
            if len(x) == 0:
                return result
        if norm == "l1":  # a pixel at 0 or 1 cannot go further: leave the step to others
            g = torch.where((x_adv <= 0) & (sign * g < 0) | (x_adv >= 1) & (sign * g > 0), 0, g)
        step = sign * step_size * steepest(g, norm, step_size)
        x_adv = project(x, x_adv + step - x, eps, norm)
    if rows is None:
        return x_adv
    result[rows] = x_adv
    return result


def _told(loss, y, logits):
    return loss(logits, y)
