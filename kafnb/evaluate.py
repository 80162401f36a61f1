"""Clean and robust accuracy, with the label protocol as an explicit choice."""

import contextlib
import dataclasses
import math

import numpy as np
import pandas as pd
import torch

from .attacks import still
from .checks import count, forward, images, instance, labels, shown
from .checks import seed as seed_of
from .data import Data

LABELS = ("true", "predicted")


@dataclasses.dataclass(frozen=True, eq=False)
class Score:
    """Share of images classified correctly.

    Attributes
    ----------
    correct : bool array, shape (n,)
        One an image, in the order of the data.
    labels : str
        Which labels the attack was given: "true", "predicted", or "none" for clean accuracy.
    """

    correct: np.ndarray
    labels: str

    @property
    def n(self):
        return len(self.correct)

    @property
    def rate(self):
        """In [0, 1]."""
        return float(self.correct.mean())

    @property
    def interval(self):
        """95 % Wilson interval of the rate, (low, high)."""
        return wilson(int(self.correct.sum()), self.n)

    def __str__(self):
        low, high = self.interval
        how = "clean" if self.labels == "none" else f"attack given {self.labels} labels"
        return f"{100 * self.rate:.1f} % [{100 * low:.1f}, {100 * high:.1f}] (n = {self.n}, {how})"


def wilson(successes, n):
    """95 % Wilson score interval of a proportion, (low, high)."""
    from scipy.stats import binomtest

    count(n, "n")
    count(successes, "successes", low=0, high=n)
    interval = binomtest(successes, n).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def _images(data, n):
    count(n, "n", optional=True)
    if not isinstance(data, Data):
        if not isinstance(data, list | tuple) or len(data) != 2:
            raise TypeError(f"data must be a Data or a pair (images, labels), got {shown(data)}")
        labels(data[1])
        if not images(data[0], box=False).isfinite().all():
            raise ValueError("images must be finite, and some are NaN or infinite")
    x, y = data.test(n) if isinstance(data, Data) else (data[0][:n], data[1][:n])
    if len(x) == 0 or len(x) != len(y):
        raise ValueError(
            f"evaluation needs as many labels as images and at least one, got {len(x)} images, {len(y)} labels"
        )
    return x, y


@contextlib.contextmanager
def exact(device):
    """Inside, convolutions on CUDA are computed in float32, and not in TF32, as is PyTorch's default."""
    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision
    if device.type == "cuda":
        conv.fp32_precision = "ieee"
    try:
        yield
    finally:
        if device.type == "cuda":
            conv.fp32_precision = before


def predict(model, x, batch_size=None, y=None):
    """Predicted class of each image, int64 (N,), in eval mode without gradients; -1 where logits are NaN.

    ``batch_size``: default as in ``robust_accuracy``. The labels ``y``, if given, must be among the classes.
    """
    device, answers = model_device(model), []
    if len(images(x, box=False)) == 0:
        raise ValueError("predict needs at least one image")
    batch_size = _batch_size(batch_size, device, x)
    with still(model), torch.no_grad(), exact(device), forward(x):
        for batch in x.split(batch_size):
            logits = model(batch.to(device))
            answers.append(logits.argmax(1).masked_fill(logits.isnan().any(1), -1).cpu())
    if y is not None:
        labels(y, len(x), logits.shape[1])
    return torch.cat(answers)


def _batch_size(wanted, device, x):
    if wanted is not None:
        return count(wanted, "batch_size")
    return 2048 if device.type != "cpu" and x[0, 0].numel() <= 32 * 32 else 512


def model_device(model):
    """Where a model is; of one without parameters the CPU."""
    return next((p.device for p in instance(model, torch.nn.Module, "model").parameters()), torch.device("cpu"))


def _returned(x_adv, x):
    """What an attack gave back, if it may count: images that anyone could have sent."""
    instance(x_adv, torch.Tensor, "what the attack returns")
    if x_adv.shape != x.shape or not (x_adv.min() >= -1e-6 and x_adv.max() <= 1 + 1e-6):  # NaN is not either
        raise ValueError(
            f"the attack must return images of shape {tuple(x.shape)} in [0, 1], got {tuple(x_adv.shape)} in "
            f"[{x_adv.min():.3g}, {x_adv.max():.3g}]"
        )
    return x_adv


def clean_accuracy(model, data, *, n=None, batch_size=None):
    """Accuracy on the first n test images of ``data`` (a ``Data``, or a pair of tensors images, labels)."""
    x, y = _images(data, n)
    return Score((predict(model, x, batch_size, y) == y.cpu()).numpy(), "none")


def robust_accuracy(model, data, attack, labels="true", *, n=None, batch_size=None, seed=0):
    """Accuracy under attack; convolutions on CUDA are in float32 throughout, matrix products as you have set them.

    Parameters
    ----------
    model : Module
        Left exactly as it was: mode, statistics, gradients; the global random generators too.
    data : Data or (images, labels)
    attack : callable or list of callables
        ``attack(model, x, y) -> x_adv``, e.g. ``functools.partial(kafnb.attacks.pgd, eps=8 / 255)``. Of several an
        image must stand all; with true labels, each attacks only what stood those before it.
    labels : {"true", "predicted"}
        What the attack is told. "true": the honest protocol; an image that is wrong already counts as broken.
        "predicted": the thesis' protocol, where the attack pushes away from the model's own answer while the
        score still compares with the truth, so misclassified images can be pushed onto the right class. Images
        that are right already are attacked first, from the same random starts as with "true".
    n : int, optional
        First n test images; all by default.
    batch_size : int, optional
        Images attacked at a time; default 512, off the CPU 2048 of up to 32x32.
    seed : int
        Of the attack's random starts.

    Returns
    -------
    Score
    """
    if labels not in LABELS:
        raise ValueError(f"labels must be one of {LABELS}, got {labels!r}")
    seed_of(seed)
    x, y = _images(data, n)
    attacks = list(attack) if isinstance(attack, list | tuple) else [attack]
    if not attacks:
        raise ValueError("robust_accuracy needs an attack, got an empty list: clean_accuracy has none")
    for one in attacks:
        if not callable(one):
            raise TypeError(f"attack must be a function attack(model, x, y), or a list of such, got {shown(one)}")
    device = model_device(model)
    answer, truth = predict(model, x, batch_size, y), y.cpu()
    told = truth if labels == "true" else answer
    correct = (answer == truth).numpy()
    size = _batch_size(batch_size, device, x)
    groups = [correct] if labels == "true" else [correct, ~correct & (answer >= 0).numpy()]
    batches = [batch for group in groups for batch in torch.from_numpy(np.flatnonzero(group)).split(size) if len(batch)]
    with torch.random.fork_rng(), exact(device):
        torch.manual_seed(seed)
        for batch in batches:
            standing = torch.ones(len(batch), dtype=torch.bool)
            for one in attacks:
                rows = standing.nonzero()[:, 0] if labels == "true" else torch.arange(len(batch))
                if len(rows) == 0:  # nothing left to attack
                    continue
                before = x[batch[rows]].to(device)
                x_adv = _returned(one(model, before, told[batch[rows]].to(device)), before)
                standing[rows] &= predict(model, x_adv.to(x.dtype), batch_size) == truth[batch[rows]]
            correct[batch.numpy()] = standing.numpy()
    return Score(correct, labels)


def generalisation_gap(model, data, attack, *, n, seed=0):
    """Accuracy on training images, accuracy on test images, and their difference, clean and under attack.

    Parameters
    ----------
    model, attack, seed
        As for ``robust_accuracy``; the attack is told the truth.
    data : Data
    n : int
        First n images of each set, or all there are.

    Returns
    -------
    DataFrame
        Rows "clean" and "attacked"; columns training, test, gap (training less test), and low and high, its 95 %
        interval for two independent samples, all in points; n_training, n_test.

    Source of the interval, made of the two Wilson intervals: Newcombe, Statistics in Medicine 17, 1998, method 10.
    """
    sets = {"training": instance(data, Data, "data").train(n), "test": data.test(n)}
    kinds = {"clean": clean_accuracy, "attacked": lambda m, d: robust_accuracy(m, d, attack, seed=seed)}
    rows = {}
    for kind, measure in kinds.items():
        scores = {name: measure(model, images) for name, images in sets.items()}
        rates = {name: 100 * score.rate for name, score in scores.items()}
        gap = rates["training"] - rates["test"]
        (below, above), (low, high) = (
            (rates[name] - 100 * score.interval[0], 100 * score.interval[1] - rates[name])
            for name, score in scores.items()
        )
        n_of = {f"n_{name}": score.n for name, score in scores.items()}
        rows[kind] = (
            rates | {"gap": gap, "low": gap - math.hypot(below, high), "high": gap + math.hypot(above, low)} | n_of
        )
    return pd.DataFrame.from_dict(rows, orient="index")
