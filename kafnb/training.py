"""One training loop, and the learning-rate range test. A pass over the images is in ``epoch``."""

import dataclasses
import functools
import math
import time
import warnings

import pandas as pd
import torch
from tqdm.auto import tqdm

from . import checks, graphs
from .attacks import pgd
from .collapse import collapsed, message, watched
from .data import Data, to_unit
from .epoch import Diverged, one_pass
from .evaluate import clean_accuracy, robust_accuracy
from .gradients import measure
from .kwta import KWTA
from .models import any_layout
from .recipe import Recipe, epochs_of, kwta_ratio, optimizer_of, triangular


def _check(model, data, recipe, seed, device):
    checks.gradients("training")
    checks.instance(model, torch.nn.Module, "model")
    checks.instance(data, Data, "data", " (see load_data)")
    checks.instance(recipe, Recipe, "recipe")
    checks.seed(seed)
    checks.device(device)


def _to(model, data, device):
    """The training images and labels there, and the model, which takes them.

    Convolutions are quicker in channels last: by a fifth on a CPU, where a KAF would copy; by half on CUDA.
    """
    model.to(device)
    if any_layout(model):
        model.to(memory_format=torch.channels_last)
    x, y = data.x_train.to(device), data.y_train.to(device)
    one = to_unit(x[:1])
    with torch.no_grad(), torch.random.fork_rng(), checks.forward(one):
        logits = model.eval()(one)
    checks.logits(logits, data.num_classes)
    return x, y


@torch.enable_grad()
def fit(
    model, data, recipe, *, seed=0, device="cpu", progress=False, resume=None, save=None, epoch=None
):  # fmt: skip
    """Train ``model`` in place.

    Every epoch starts from its own seed, (seed, epoch), so a run that was stopped and resumed draws the same
    numbers as one that was not. The global generators are left as they were. On CUDA the steps are replays of one
    graph where they can be (``graphs.usable``), and cuDNN picks its kernels by timing them: two runs agree up to
    rounding, which long trainings magnify.

    Parameters
    ----------
    model : Module
        (N, C, H, W) images in [0, 1] -> logits, one for each class of ``data``. Left on ``device``, in eval mode.
    data : Data
    recipe : Recipe
    seed : int
        Of all that is drawn in training: batches, augmentation, dropout, perturbations. The initial weights are those
        that the model has.
    device : str
        "cpu", "cuda" or "cuda:N"; the model and all training images are moved there.
    progress : bool
        Show a bar, one step an epoch.
    resume : dict, optional
        A state that ``save`` was given.
    save : callable, optional
        Called after each epoch with the whole state: model, optimiser, epoch, history.
    epoch : callable
        In place of ``epoch.one_pass``; ``distributed`` has one for several processes.

    Returns
    -------
    DataFrame
        One row an epoch: epoch, lr (its last), loss, accuracy (on the perturbed batches), seconds, cpu_seconds, and
        clean, pgd where the recipe tracks them, watch_fgsm, watch_pgd where it watches, gradient norms where it
        monitors. If a loss, a weight or buffer after an epoch, or under ``monitor`` a gradient, is not finite, training
        stops with a warning: the weights are those of the last good epoch and the last row's loss is NaN.

    Raises
    ------
    ValueError, TypeError
        Model, data, recipe or seed of another type; a seed out of range; a device that is not there; a model that
        cannot take the images, has no logit for each class, or that the method ("interval", "lipschitz") knows no
        bound of; ``resume`` that is no state of this model; a single training image; a call inside
        ``torch.inference_mode``.
    """
    _check(model, data, recipe, seed, device)
    x, y = _to(model, data, device)
    optimizer = optimizer_of(model, recipe)
    scaler = torch.amp.GradScaler(torch.device(device).type, enabled=recipe.precision == "float16")
    history, epochs, graphed = [], epochs_of(recipe), epoch is None and graphs.usable(model, recipe, device)
    epoch = epoch or functools.partial(one_pass, graphed=graphs.Graphed() if graphed else None)
    if resume:
        try:
            model.load_state_dict(resume["model"])
            optimizer.load_state_dict(resume["optimizer"])
            scaler.load_state_dict(resume["scaler"])
            history = list(resume["history"])
        except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise ValueError("resume is not a state that fit saved of this model and recipe: start without") from error
    if recipe.optimizer in graphs.OPTIMIZERS:
        graphs.prepare(optimizer, device, graphed)
    batches = len(x) // recipe.batch_size + (len(x) % recipe.batch_size > 1)
    total = epochs * batches * (recipe.replays if recipe.method == "free" else 1)
    step = len(history) * (total // max(epochs, 1))
    lr = recipe.lr[1]
    ratios = {m: m.ratio for m in model.modules() if isinstance(m, KWTA) and recipe.kwta_start}

    def lr_at():
        nonlocal step, lr
        step += 1
        if recipe.schedule == "triangular":
            lr = triangular(step - 0.5, total, *recipe.lr, recipe.peak)
        return lr

    bar = tqdm(total=epochs, initial=len(history), unit="epoch", leave=False, disable=not progress)
    while len(history) < epochs and (not history or pd.notna(history[-1]["loss"])):
        before = {k: v.clone() for k, v in model.state_dict().items()}
        wall, cpu, sums = time.perf_counter(), time.process_time(), [0, 0, 0]
        with torch.random.fork_rng(), graphs.tried(device):
            torch.manual_seed(1_000_003 * seed + len(history))
            done = len(history) / epochs, (len(history) + 1) / epochs
            for layer, own in ratios.items():
                layer.ratio = kwta_ratio(len(history), epochs, recipe.kwta_start, own)
            reason = "the loss is not finite"
            try:
                for values in epoch(model, x, y, optimizer, scaler, recipe, lr_at, done):
                    sums = [a + b for a, b in zip(sums, values, strict=True)]
                if not sums[2]:
                    raise ValueError(f"nothing to train on: {len(x)} images in batches of {recipe.batch_size}")
                loss = float(sums[0]) / sums[2]
            except Diverged as diverged:
                loss, reason = float("nan"), str(diverged)
        row = {"epoch": len(history) + 1, "lr": lr, "loss": loss, "accuracy": int(sums[1]) / max(sums[2], 1)}
        row |= {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
        if math.isfinite(loss) and _spoilt(before, model.state_dict()):  # by the last step, after the last loss
            loss, reason = float("nan"), "a weight or buffer is not finite"
        if not math.isfinite(loss):
            model.load_state_dict(before)
            row["loss"] = float("nan")
            warnings.warn(
                f"training stopped in epoch {row['epoch']}: {reason}; weights of the last good epoch kept", stacklevel=2
            )
        if recipe.monitor:
            row |= _monitored(model, x, y)
        if recipe.track:
            row |= _tracked(model, data, recipe)
        if recipe.watch:
            row |= watched(model, data, recipe)
        history.append(row)
        if recipe.watch and collapsed(history) == row["epoch"]:
            warnings.warn(message(history, recipe.watch), stacklevel=2)
        if save:
            states = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
            save(states | {"history": history})
        bar.update()
        bar.set_postfix(loss=f"{loss:.3f}", accuracy=f"{row['accuracy']:.3f}")
    bar.close()
    for layer, own in ratios.items():
        layer.ratio = own
    model.to(memory_format=torch.contiguous_format).eval()
    return pd.DataFrame(history)


def _spoilt(before, after):
    """Whether of two states of a model the later has a number that is not finite any more: asked of the device once."""
    return bool(torch.stack([(before[k].isfinite() & ~v.isfinite()).any() for k, v in after.items()]).any())


def _monitored(model, x, y):
    norms = measure(model, (to_unit(x[:64]), y[:64]))
    limit = torch.finfo(torch.float16).max
    if beyond := [name for name, norm in norms.items() if not norm <= limit]:  # NaN is beyond, too
        name = max(beyond, key=lambda n: (not math.isfinite(norms[n]), norms[n]))
        why = f"float16 ends at {limit:,.0f}" if math.isfinite(norms[name]) else "beyond what numbers of this kind hold"
        warnings.warn(f"the gradient at {name} has norm {norms[name]:.1e}: {why}", stacklevel=3)
    return {f"gradient {name}": norm for name, norm in norms.items()}


def _tracked(model, data, recipe):
    attack = lambda m, x, y: pgd(m, x, y, eps=recipe.eps, steps=10)  # noqa: E731
    return {
        "clean": clean_accuracy(model, data, n=recipe.track).rate,
        "pgd": robust_accuracy(model, data, attack, n=recipe.track).rate,
    }


@torch.enable_grad()
def range_test(model, data, recipe, *, low=1e-4, high=10.0, steps=100, seed=0, device="cpu"):
    """Learning-rate range test: train while the rate grows geometrically, and record the loss of each step.

    Parameters
    ----------
    model : Module
        Trained in place: give a fresh one.
    recipe : Recipe
        Its method, batch size and optimiser are used; its rates are not.

    Returns
    -------
    DataFrame
        lr, loss (of the step), smooth (exponential mean, bias-corrected). Stops when smooth exceeds 4x its minimum.

    Source: Smith, WACV 2017, arXiv:1506.01186.
    """
    _check(model, data, recipe, seed, device)
    recipe = dataclasses.replace(recipe, monitor=False)  # to diverge is what it is for
    checks.count(steps, "steps", low=2)
    checks.number(low, "low", above=0)
    checks.number(high, "high", above=low)
    x, y = _to(model, data, device)
    optimizer = optimizer_of(model, recipe)
    scaler = torch.amp.GradScaler(torch.device(device).type, enabled=False)
    rows, mean, best = [], 0.0, float("inf")

    def rate():
        return low * (high / low) ** (len(rows) / (steps - 1))

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        while True:
            for loss_sum, _, n in one_pass(model, x, y, optimizer, scaler, recipe, rate):
                mean = 0.9 * mean + 0.1 * float(loss_sum) / n
                smooth = mean / (1 - 0.9 ** (len(rows) + 1))
                rows.append({"lr": rate(), "loss": float(loss_sum) / n, "smooth": smooth})
                best = min(best, smooth)
                if len(rows) == steps or not smooth < 4 * best:
                    return pd.DataFrame(rows)
            if not rows:
                raise ValueError("a range test needs at least 2 training images")
