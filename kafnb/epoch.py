"""One pass over the training images: batches, what a method learns from each, the optimiser's steps."""

import torch

from . import graphs
from .data import augment, to_unit
from .gradients import first_nonfinite
from .methods import METHODS, Autocast
from .recipe import PRECISIONS


def batches(x, recipe):
    """One shuffled pass: the indices of each batch. A last batch of one image is left out."""
    for index in torch.randperm(len(x), device=x.device).split(recipe.batch_size):
        if len(index) > 1:  # batch statistics of one image would be an error
            yield index


def taken(x, y, index, recipe):
    """These of the uint8 images as a float batch, and their labels."""
    batch = to_unit(x[index])
    return (batch if recipe.augment == "none" else augment(batch, recipe.augment)), y[index]


class Diverged(ArithmeticError):
    """A gradient that is not finite; the message names the layer."""


def steps_on(net, model, x, y, index, optimizer, scaler, recipe, state, lr_at):
    """Learn from these of the uint8 images: yields (summed loss, number correct) after each optimiser step.

    ``lr_at`` None leaves the rate as it is.
    """
    xb, yb = taken(x, y, index, recipe)
    for logits, loss in METHODS[recipe.method](net, xb, yb, recipe, state):
        if lr_at:
            graphs.set_rate(optimizer, lr_at())
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        if recipe.monitor and not scaler.is_enabled() and (layer := first_nonfinite(model)):
            raise Diverged(f"the gradient of {layer} is not finite")  # before clipping makes all of them so
        finish(model, optimizer, scaler, recipe)
        yield loss.detach() * len(yb), (logits.detach().argmax(1) == yb).sum()


def finish(model, optimizer, scaler, recipe):
    """A step of the optimiser with the gradients that are there, clipped if the recipe says so."""
    if recipe.clip is not None:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
    scaler.step(optimizer)
    scaler.update()


def one_pass(model, x, y, optimizer, scaler, recipe, lr_at, done=(0.0, 1.0), graphed=None):
    """Train for one pass, from ``done[0]`` to ``done[1]`` of all training; with ``graphed`` its steps are replays.

    Yields (summed loss, number correct, number seen) after each optimiser step.
    """
    dtype, state = PRECISIONS[recipe.precision], {}
    net = model if dtype == torch.float32 else Autocast(model, dtype)
    net.train()

    def step(index):
        return next(steps_on(net, model, x, y, index, optimizer, scaler, recipe, state, None))

    for i, index in enumerate(batches(x, recipe)):
        state["progress"] = done[0] + (done[1] - done[0]) * i * recipe.batch_size / len(x)
        if graphed:
            graphs.set_rate(optimizer, lr_at())
            yield *graphed(step, index), len(index)
        else:
            for sums in steps_on(net, model, x, y, index, optimizer, scaler, recipe, state, lr_at):
                yield *sums, len(index)
