"""Clean and robust accuracy, with the label protocol as an explicit choice."""

import dataclasses

import numpy as np
import torch

from .attacks import still
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


def wilson(successes, n, confidence=0.95):
    """Wilson score interval of a proportion, (low, high)."""
    from scipy.stats import binomtest

    interval = binomtest(successes, n).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def _images(data, n):
    x, y = data.test(n) if isinstance(data, Data) else (data[0][:n], data[1][:n])
    if len(x) == 0 or len(x) != len(y):
        raise ValueError(
            f"evaluation needs as many labels as images and at least one, got {len(x)} images, {len(y)} labels"
        )
    return x, y


def predict(model, x, batch_size=512):
    """Predicted class of each image, int64 (N,), in eval mode without gradients."""
    device = next(model.parameters()).device
    with still(model), torch.no_grad():
        return torch.cat([model(b.to(device)).argmax(1).cpu() for b in x.split(batch_size)])


def clean_accuracy(model, data, *, n=None, batch_size=512):
    """Accuracy on the first n test images of ``data`` (a ``Data``, or a pair of tensors images, labels)."""
    x, y = _images(data, n)
    return Score((predict(model, x, batch_size) == y.cpu()).numpy(), "none")


def robust_accuracy(model, data, attack, labels="true", *, n=None, batch_size=512, seed=0):
    """Accuracy under attack.

    Parameters
    ----------
    model : Module
        Left exactly as it was: mode, statistics, gradients; the global random generators too.
    data : Data or (images, labels)
    attack : callable
        ``attack(model, x, y) -> x_adv``, e.g. ``functools.partial(kafnb.attacks.pgd, eps=8 / 255)``.
    labels : {"true", "predicted"}
        What the attack is told. "true": the honest protocol; an image that is wrong already counts as broken.
        "predicted": the thesis' protocol, where the attack pushes away from the model's own answer while the
        score still compares with the truth, so misclassified images can be pushed onto the right class.
    n : int, optional
        First n test images; all by default.
    seed : int
        Of the attack's random starts.

    Returns
    -------
    Score
    """
    if labels not in LABELS:
        raise ValueError(f"labels must be one of {LABELS}, got {labels!r}")
    x, y = _images(data, n)
    device = next(model.parameters()).device
    answer = predict(model, x, batch_size)
    told = y.cpu() if labels == "true" else answer
    correct = (answer == y.cpu()).numpy()
    attacked = torch.from_numpy(np.flatnonzero(correct)) if labels == "true" else torch.arange(len(x))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for batch in attacked.split(batch_size):
            if len(batch) == 0:  # nothing left to attack
                continue
            x_adv = attack(model, x[batch].to(device), told[batch].to(device))
            correct[batch.numpy()] = (predict(model, x_adv, batch_size) == y.cpu()[batch]).numpy()
    return Score(correct, labels)
